"""Whole runs as short functions: a recipe introduces data, model and engine to each other."""
