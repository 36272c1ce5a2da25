"""The predicted classes of a run's training set, from which another run may begin."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from noisysam.core.errors import UserError
from noisysam.core.files import atomic
from noisysam.data.datasets import read_npz

PREDICTIONS = "predictions.npz"  # in a run's folder


def write_predictions(path: Path, predicted: Mapping[str, NDArray[np.int64]]) -> None:
    """Keep the predicted classes (n,) by epoch: 'last' and, where there is one, 'selected' (on noisy validation)."""
    arrays = {name: classes.astype(np.uint16) for name, classes in predicted.items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_predictions(path: Path, samples: int, classes: int) -> dict[str, NDArray[np.int64]]:
    """What ``write_predictions`` wrote; ``UserError`` where it does not fit the problem."""
    found = {}
    for name, values in read_npz(path, ("last",), optional=("selected",)).items():
        if values.shape != (samples,) or values.dtype != np.uint16 or values.max(initial=0) >= classes:
            raise UserError(f"{path}: {name} is not a class for each of {samples} images")
        found[name] = values.astype(np.int64)
    return found
