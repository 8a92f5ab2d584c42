"""Versions of bundles: kept once, by content, with where they come from and which one is in use."""
