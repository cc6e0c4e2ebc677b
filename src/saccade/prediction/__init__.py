"""From photos to label names, probabilities, embeddings and token maps."""
