"""Image sets, preprocessing and bad input."""

from saccade.data.decode import ImageError, decode, upright
from saccade.data.image_folders import open_images, splits
from saccade.data.labels import Labels, class_indices, class_names, head_labels
from saccade.data.loader import CACHE_BYTES, Batch, Failures, Loader, Loaders
from saccade.data.preprocess import Preprocess
from saccade.data.source import ImageSet

__all__ = [
    "CACHE_BYTES",
    "Batch",
    "Failures",
    "ImageError",
    "ImageSet",
    "Labels",
    "Loader",
    "Loaders",
    "Preprocess",
    "class_indices",
    "class_names",
    "decode",
    "head_labels",
    "open_images",
    "splits",
    "upright",
]
