"""Mosaics: quadtrees of blocks, their images, positions and files."""
