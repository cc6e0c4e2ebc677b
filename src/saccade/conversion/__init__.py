"""Conversions of weights: flexible patch sizes, other patch sizes, other layouts, a fitted stem."""
