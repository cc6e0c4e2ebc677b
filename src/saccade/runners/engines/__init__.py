"""Engines that run an exported program: one module each, see ``saccade.runners.engine.Engine``."""
