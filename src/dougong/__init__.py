"""Dougong: records of several modalities to a trained, explained and usable model."""

__version__ = "0.1.0"
