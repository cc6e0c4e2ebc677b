"""Training runs that come with the package; see ``saccade train``."""
