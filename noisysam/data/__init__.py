"""Data sets, splits, augmentation and the loader."""

from noisysam.data.datasets import (
    ARRAYS,
    CIFAR10_CLASSES,
    CIFAR100_SUPERCLASSES,
    DATASETS,
    Dataset,
    checked_labels,
    data_folder,
    from_arrays,
    load,
    load_npz,
    read_npz,
    save_npz,
)
from noisysam.data.images import changed, stamp
from noisysam.data.splits import balanced_subset, split_validation

__all__ = [
    "ARRAYS",
    "CIFAR10_CLASSES",
    "CIFAR100_SUPERCLASSES",
    "DATASETS",
    "Dataset",
    "balanced_subset",
    "changed",
    "checked_labels",
    "data_folder",
    "from_arrays",
    "load",
    "load_npz",
    "read_npz",
    "save_npz",
    "split_validation",
    "stamp",
]  # fmt: skip
