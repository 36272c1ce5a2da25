"""Class-balanced subsets and the validation split."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from noisysam.core.errors import UserError

if TYPE_CHECKING:  # noise models and reports do without torch, whose import takes a second
    pass
from noisysam.core.rng import random_bits


def balanced_subset(labels: NDArray[Any], size: int, classes: int, seed: int) -> NDArray[np.int64]:
    """Sorted positions of ``size`` samples, size // K of each class, one more of the first size % K classes.

    With one seed, a smaller subset lies within every larger one. ``UserError`` where a class has too few samples.
    """
    if size < classes:
        raise UserError(f"a subset of {size} samples has none of some of the {classes} classes: ask for more")
    keys = random_bits(len(labels), "subset", seed)
    chosen = []
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        quota = size // classes + (label < size % classes)
        if quota > len(members):
            raise UserError(f"a balanced subset of {size} needs {quota} samples of class {label}, of {len(members)}")
        chosen.append(members[np.argsort(keys[members], kind="stable")[:quota]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def split_validation(n: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted positions for training and for validation; round(n * fraction) of the n samples, drawn by ``seed``.

    A fraction of 0 holds nothing out. ``UserError`` where either part would be empty against the fraction's intent.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation fraction {fraction} is not in [0, 1)")
    held_out = round(n * fraction)
    if held_out == n or (fraction > 0 and held_out == 0):
        part = "training" if held_out == n else "validation"
        raise UserError(f"validation fraction {fraction} of {n} samples leaves none for {part}")
    order = np.argsort(random_bits(n, "validation", seed), kind="stable")
    return np.sort(order[held_out:]).astype(np.int64), np.sort(order[:held_out]).astype(np.int64)
