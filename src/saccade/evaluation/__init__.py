"""Measuring: accuracy with intervals, speed in ratios, and the frontier between them."""
