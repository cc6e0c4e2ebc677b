"""A class for every pixel: model, data, learning and measures."""
