"""Layers that any model may be made of, the batch they read, and the one shape of every model (BlockStack)."""
