"""Training: what a step sees, and what becomes of it."""
