"""Weights on disk: the base checkpoint, the adapter, and the two fused. Nothing here computes a forward pass."""
