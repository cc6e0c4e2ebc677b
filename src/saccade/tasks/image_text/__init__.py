"""Images and texts in one space: model, data, learning and measures."""
