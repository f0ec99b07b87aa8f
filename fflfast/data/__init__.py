"""Data sets and loaders.

``open_data(name)`` gives a `DataBundle`; ``Loader(bundle.train, …).epoch(e)`` gives
`Batch` after Batch of uint8 images. Data order and crops are pure functions of (seed, epoch,
index, view). Nothing here imports another part of the project, and torchvision or scikit-learn only
where a data set needs them.
"""

from __future__ import annotations

from .arrays import ArraySplit
from .batch import Batch, CropKey, DataBundle, DataError, Split
from .loader import Loader
from .order import permutation, random_resized_crop_boxes
from .sets import available, open_data

__all__ = [
    "ArraySplit",
    "Batch",
    "CropKey",
    "DataBundle",
    "DataError",
    "Loader",
    "Split",
    "available",
    "open_data",
    "permutation",
    "random_resized_crop_boxes",
]
