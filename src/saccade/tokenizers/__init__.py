"""Tokenizers: which regions of the image become tokens."""
