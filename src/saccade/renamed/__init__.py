"""Names of before, which still work."""
