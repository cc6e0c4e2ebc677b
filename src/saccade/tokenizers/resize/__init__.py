"""Resizing of patch kernels and position tables, and the caches of what was resized."""
