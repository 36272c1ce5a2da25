"""What every noise type has in common, and the registry."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from noisysam.core.errors import UserError
from noisysam.core.registry import Registry, class_fault
from noisysam.data.datasets import checked_labels
from noisysam.noise.labels import Labels, NoisyLabels

DRAWS = ("exact", "bernoulli")


@dataclass(frozen=True, eq=False)
class Request:
    """What a noise model may look at."""

    clean: Labels
    classes: int
    rate: float
    draw: str
    seed: int
    argument: str  # what follows the colon in human:SET and file:PATH
    images: NDArray[np.uint8] | None
    superclasses: tuple[int, ...] | None
    data_dir: Path | None
    given: Labels | None = None  # noisy labels that came with the data, where `clean` corrects them


class Noise:
    """A noise model: from a request to noisy labels.

    ``brings_labels``: the labels exist already, for the whole data set; such a model takes no rate, draw or seed.
    ``argument``: what it takes after a colon, for messages; None: nothing.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    revision: ClassVar[int]
    brings_labels: ClassVar[bool] = False
    argument: ClassVar[str | None] = None

    def make(self, request: Request) -> NoisyLabels:
        """The noisy labels of one request."""
        raise NotImplementedError

    def definition(self, request: Request, **facts: Any) -> dict[str, Any]:
        """What the labels follow from, apart from the clean labels."""
        drawn = {"rate": float(request.rate), "draw": request.draw, "seed": int(request.seed)}
        if self.brings_labels:
            drawn = dict.fromkeys(drawn)
        return {"type": self.name, **drawn, "revision": self.revision, "classes": request.classes, **facts}


NOISE: Registry[type[Noise]] = Registry("noise type", lambda item: class_fault(item, Noise, must=("make",)))


def brings_labels(kind: str) -> bool:
    """Whether the labels of a noise type (human:SET) exist already, for the whole data set."""
    return NOISE[kind.partition(":")[0]].brings_labels


def make(
    kind: str,
    clean: ArrayLike,
    classes: int,
    *,
    rate: float = 0.0,
    seed: int = 0,
    draw: str = "exact",
    images: NDArray[np.uint8] | None = None,
    superclasses: tuple[int, ...] | None = None,
    data_dir: Path | None = None,
    given: ArrayLike | None = None,
) -> NoisyLabels:
    """Noisy labels of ``kind`` (a registered name; human:SET, file:PATH) for the clean labels (n,).

    ``rate`` is the share of samples selected for a new label; ``draw`` selects an exact number in each class or each
    sample by itself. ``images`` (n, H, W, C) are for instance noise, ``superclasses`` (K,) for asymmetric, ``given``
    (n,), the labels that came with the data, for given. Warns where the true label of a class is not its most probable
    label. ``UserError`` for anything out of range.
    """
    name, colon, argument = kind.partition(":")
    model = NOISE[name]()
    array = np.asarray(clean)
    true = checked_labels(array, "clean labels", array.size, classes)
    if not true.size:
        raise UserError("there are no labels to make noisy")
    if not 0 <= rate <= 1:  # also refuses nan
        raise UserError(f"noise rate {rate} is not between 0 and 1")
    if draw not in DRAWS:
        raise UserError(f"unknown noise draw {draw!r} (known: {', '.join(DRAWS)})")
    if model.brings_labels and rate:
        raise UserError(f"noise type {name} brings its own rate: leave the noise rate out")
    if model.argument is not None and not argument:
        raise UserError(f"noise type {name} needs {model.argument}")
    if colon and model.argument is None:
        raise UserError(f"noise type {name} takes nothing after a colon, got {kind!r}")
    brought = None if given is None else checked_labels(np.asarray(given), "given labels", true.size, classes)
    noisy = model.make(Request(true, classes, rate, draw, seed, argument, images, superclasses, data_dir, brought))

    matrix = noisy.matrix if noisy.transition is None else noisy.transition
    if matrix is None:
        return noisy
    rivals = np.where(np.eye(classes, dtype=bool), -np.inf, matrix).max(axis=1)
    lost = np.flatnonzero(np.diag(matrix) <= rivals + 1e-9)
    if len(lost):
        at = f" at rate {rate:g}" if rate else ""
        what = f"the true label is not the most probable one in {len(lost)} of {classes} classes"
        warnings.warn(f"{kind} noise{at}: {what} (first: {lost[0]}), which cannot be learnt from it", stacklevel=2)
    return noisy


def _cumulative(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cumulative shares along the last axis, ending in exactly 1: no number in [0, 1) falls on a weight of 0."""
    sums = np.cumsum(weights, axis=-1)
    shares: NDArray[np.float64] = sums / sums[..., -1:]
    return shares
