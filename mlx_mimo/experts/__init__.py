"""Expert residency: where experts lie on disk, which are in memory, and the layer that computes with them."""
