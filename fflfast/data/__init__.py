"""Data sets and loaders.

``open_data(name)`` gives a `DataBundle`; ``Loader(bundle.train, …).epoch(e)`` gives `Batch` after Batch of uint8
images, `ResidentLoader` the same from a device's own memory. Data order and crops are pure functions of (seed, epoch,
index, view). Nothing here imports another part of the project, and torchvision or scikit-learn only where a data set
needs them.
"""

from __future__ import annotations

from .arrays import ArraySplit
from .batch import Batch, CropKey, DataBundle, DataError, Keypoints, Split
from .coco_keypoints import CocoSplit
from .loader import Loader
from .order import permutation, random_resized_crop_boxes
from .prefetch import prefetch
from .resident import ResidentLoader, resident_bytes
from .sampler import share
from .sets import available, open_data, task_of

__all__ = [
    "ArraySplit",
    "Batch",
    "CocoSplit",
    "CropKey",
    "DataBundle",
    "DataError",
    "Keypoints",
    "Loader",
    "ResidentLoader",
    "Split",
    "available",
    "open_data",
    "permutation",
    "prefetch",
    "random_resized_crop_boxes",
    "resident_bytes",
    "share",
    "task_of",
]
