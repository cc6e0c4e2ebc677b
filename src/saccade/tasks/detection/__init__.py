"""Open-vocabulary detection: model, data, learning and measures."""
