"""What lies on disk: whole files, locks, weights, and the folder that a model is."""
