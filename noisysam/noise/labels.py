"""Noisy labels with the facts that identify, measure and reproduce them; label files."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from noisysam.core.errors import UserError
from noisysam.core.files import temporary_name
from noisysam.core.text import one_line
from noisysam.data.datasets import checked_labels, read_npz

Labels = NDArray[np.int64]


Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Noisy labels beside the clean ones, where those are known. What depends on them is None where they are not."""

    labels: Labels  # (n,)
    clean: Labels | None  # (n,); None: not known
    classes: int
    definition: dict[str, Any]  # what the labels follow from: type, rate, draw, seed, revision, ...; JSON-able
    transition: Matrix | None = None  # (K, K), P(noisy = j | clean = i), where the model states it

    @property
    def rate(self) -> float | None:
        """The nominal rate; where the labels have none (human, file, given), the measured flip rate."""
        nominal = self.definition["rate"]
        return self.flip_rate if nominal is None else float(nominal)

    @property
    def truth(self) -> Labels:
        """The clean labels; ``UserError`` where they are not known."""
        if self.clean is None:
            raise UserError("the correct training labels of these data are not known, so this cannot be measured")
        return self.clean

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """Mask (n,) of the wrong labels; ``UserError`` where the clean ones are not known."""
        flipped: NDArray[np.bool_] = self.labels != self.truth
        return flipped

    @property
    def strata(self) -> tuple[NDArray[np.bool_], Labels]:
        """Masks of the wrong labels and true classes (n,), by which samples are drawn in proportion; all right and the
        given classes, where the clean labels are not known."""
        truth = self.labels if self.clean is None else self.clean
        return self.labels != truth, truth

    @property
    def flip_rate(self) -> float | None:
        """Share of wrong labels."""
        return None if self.clean is None else float(self.flipped.mean())

    @property
    def matrix(self) -> Matrix | None:
        """The measured transition matrix (K, K); a class without samples has its row of the identity."""
        if self.clean is None:
            return None
        pairs = np.bincount(self.clean * self.classes + self.labels, minlength=self.classes**2)
        counts = pairs.reshape(self.classes, self.classes)
        absent = counts.sum(1) == 0
        counts = counts + np.diag(absent)
        matrix: Matrix = counts / counts.sum(1, keepdims=True)
        return matrix

    @property
    def per_class_flip_rate(self) -> NDArray[np.float64] | None:
        """Share of wrong labels in each clean class (K,)."""
        matrix = self.matrix
        return None if matrix is None else 1 - np.diag(matrix)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the labels, then the clean labels (or that they are not known), as little-endian int64."""
        clean = b"clean labels are not known" if self.clean is None else self.clean.astype("<i8").tobytes()
        return hashlib.sha256(self.labels.astype("<i8").tobytes() + clean).hexdigest()

    @cached_property
    def definition_digest(self) -> str:
        """SHA-256 (hex) of the definition as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    def card(self) -> dict[str, Any]:
        """The facts about these labels, JSON-able."""
        per_class, matrix = self.per_class_flip_rate, self.matrix
        return {
            **self.definition,
            "n": len(self.labels),
            "flip_rate": self.flip_rate,
            "per_class_flip_rate": None if per_class is None else per_class.tolist(),
            "matrix": None if matrix is None else matrix.tolist(),
            "digest": self.digest,
            "definition_digest": self.definition_digest,
        }

    def take(self, index: ArrayLike) -> "NoisyLabels":
        """The samples at ``index`` (positions or a mask). Their definition names the digest of the whole."""
        chosen = np.asarray(index)
        definition = {**self.definition, "taken_from": self.digest}
        clean = None if self.clean is None else self.clean[chosen]
        return NoisyLabels(self.labels[chosen], clean, self.classes, definition, self.transition)


def save(noisy: NoisyLabels, path: Path) -> None:
    """Write ``path`` (.npz, no pickles) and beside it a CSV ``index,clean,noisy``, each by rename; without ``clean``
    where that is not known."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: label files are named .npz (a .csv is written beside it)")
    arrays: dict[str, Any] = {
        "labels": noisy.labels,
        **({} if noisy.clean is None else {"clean": noisy.clean}),
        "definition": np.array(json.dumps(noisy.definition, sort_keys=True)),
        "checksum": np.array(_checksum(noisy)),
    }
    if noisy.transition is not None:
        arrays["transition"] = noisy.transition
    columns = {"index": np.arange(len(noisy.labels)), "clean": noisy.clean, "noisy": noisy.labels}
    known = {name: column for name, column in columns.items() if column is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            np.savez_compressed(file, **arrays)
        with _replacing(path.with_suffix(".csv")) as file:
            rows = np.column_stack(list(known.values()))
            np.savetxt(file, rows, fmt="%d", delimiter=",", header=",".join(known), comments="")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error


def load(path: Path) -> NoisyLabels:
    """Labels that ``save`` wrote; ``UserError`` where the file is faulty or its content does not fit its checksum."""
    arrays = read_npz(path, ("labels", "definition", "checksum"), optional=("clean", "transition"))
    try:
        definition = json.loads(str(arrays["definition"][()]))
        classes, rate = definition["classes"], definition["rate"]
        sane = isinstance(classes, int) and classes >= 2 and (rate is None or 0 <= rate <= 1)
        sane = sane and isinstance(definition["type"], str) and {"draw", "seed", "revision"} <= definition.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its definition cannot be read ({one_line(error)})") from error
    if not sane:
        raise UserError(f"{path}: its definition lacks or misstates type, rate, draw, seed, revision or classes")
    clean = None
    if "clean" in arrays:
        clean = checked_labels(arrays["clean"], f"{path}: clean", arrays["clean"].size, classes)
    elif definition["type"] != "given":
        raise UserError(f"{path}: lacks clean")
    size = arrays["labels"].size if clean is None else clean.size
    labels = checked_labels(arrays["labels"], f"{path}: labels", size, classes)
    transition = arrays.get("transition")
    if transition is not None and (transition.shape != (classes, classes) or transition.dtype != np.float64):
        raise UserError(
            f"{path}: transition is {transition.dtype} {transition.shape}, not float64 for {classes} classes"
        )
    noisy = NoisyLabels(labels, clean, classes, definition, transition)
    if str(arrays["checksum"][()]) != _checksum(noisy):
        raise UserError(f"{path}: its content does not fit its checksum: it was damaged or edited")
    return noisy


def check_clean(found: NDArray[Any], clean: Labels, where: str) -> None:
    if found.shape != clean.shape:
        raise UserError(f"{where}: it has clean labels {found.shape}, the data set {clean.shape}")
    differing = int((found != clean).sum())
    if differing:
        raise UserError(f"{where}: {differing} clean labels differ from the data set's: other data, or another order")


def _checksum(noisy: NoisyLabels) -> str:
    transition = b"" if noisy.transition is None else noisy.transition.astype("<f8").tobytes()
    return hashlib.sha256(f"{noisy.digest}{noisy.definition_digest}".encode() + transition).hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when it is complete, and leaves nothing behind when it is not."""
    draft = temporary_name(path)
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
