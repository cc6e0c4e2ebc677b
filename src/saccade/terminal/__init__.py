"""What verbs print: progress, tables and results."""
