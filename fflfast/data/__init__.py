"""Data sets and loaders.

``open_data(name)`` gives a :class:`DataBundle`; ``Loader(bundle.train, …).epoch(e)`` gives
:class:`Batch` after Batch of uint8 images. Data order and crops are pure functions of (seed, epoch,
index, view). Nothing here imports another part of the project, and torchvision or scikit-learn only
where a data set needs them.
"""

from __future__ import annotations

from fflfast.data.arrays import ArraySplit
from fflfast.data.batch import Batch, CropKey, DataBundle, DataError, Split
from fflfast.data.loader import Loader
from fflfast.data.order import permutation, random_resized_crop_boxes
from fflfast.data.sets import available, open_data

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
