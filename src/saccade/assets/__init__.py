"""Models that come with the package, each a folder with its card."""

from importlib.resources import files


def folder(name: str) -> str:
    """Where a model that comes with the package lies, for ``saccade.load``."""
    return str(files(__name__) / name)
