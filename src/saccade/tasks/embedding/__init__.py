"""Embeddings: one vector an image, as the end of a model."""
