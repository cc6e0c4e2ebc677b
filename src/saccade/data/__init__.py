"""Image sets, preprocessing and bad input."""

from saccade.data.decode import ImageError, decode, upright
from saccade.data.labels import class_indices, class_names
from saccade.data.loader import CACHE_BYTES, Batch, Failures, Loader
from saccade.data.preprocess import Preprocess
from saccade.data.source import ImageSet, open_images, splits

__all__ = [
    "CACHE_BYTES",
    "Batch",
    "Failures",
    "ImageError",
    "ImageSet",
    "Loader",
    "Preprocess",
    "class_indices",
    "class_names",
    "decode",
    "open_images",
    "splits",
    "upright",
]
