"""Ways to run a model: number types, compiled graphs."""
