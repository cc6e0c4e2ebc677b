"""One file per method; each registers the name that settings use."""
