"""Noisy labels that exist already: those of people, and those of a file."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from noisysam.core.errors import UserError
from noisysam.core.text import one_line
from noisysam.core.untrusted import check_file
from noisysam.data.datasets import checked_labels, data_folder, read_npz
from noisysam.noise.base import NOISE, Noise, Request
from noisysam.noise.labels import NoisyLabels, check_clean, load
from noisysam.noise.tables import SUFFIXES, read_labels


@NOISE.register("human", source="Wei et al. 2022 (CIFAR-10N, CIFAR-100N), arXiv 2110.12088")
class Human(Noise):
    """Labels given by people, human:SET (CIFAR-10: aggre, random1, random2, random3, worse; CIFAR-100: noisy).

    They lie in the data folder, as the authors' ``CIFAR-10_human.pt`` or as ``cifar10n.npz`` (CIFAR-100 likewise).
    """

    brings_labels = True
    argument = "a set, human:worse"
    FILES: ClassVar[dict[int, tuple[str, str]]] = {
        10: ("CIFAR-10_human.pt", "cifar10n.npz"),
        100: ("CIFAR-100_human.pt", "cifar100n.npz"),
    }
    SETS: ClassVar[dict[int, dict[str, str]]] = {  # our name of each set -> the authors'
        10: {
            "aggre": "aggre_label",
            "random1": "random_label1",
            "random2": "random_label2",
            "random3": "random_label3",
            "worse": "worse_label",
        },
        100: {"noisy": "noisy_label"},
    }

    def make(self, request: Request) -> NoisyLabels:
        """The labels of one set, after checking that the file is about the same clean labels."""
        r, chosen = request, request.argument
        sets = self.SETS.get(r.classes)
        if sets is None:
            raise UserError(f"human labels exist for CIFAR-10 and CIFAR-100, not for data of {r.classes} classes")
        if chosen not in sets:
            raise UserError(
                f"unknown set of human labels {chosen!r} for {r.classes} classes (known: {', '.join(sets)})"
            )
        folder = data_folder(r.data_dir)
        released, plain = (folder / file for file in self.FILES[r.classes])
        if released.exists():
            path, arrays = released, _read_released(released, ("clean_label", sets[chosen]))
            clean, labels = arrays["clean_label"], arrays[sets[chosen]]
        elif plain.exists():
            path, arrays = plain, read_npz(plain, ("clean", chosen))
            clean, labels = arrays["clean"], arrays[chosen]
        else:
            raise UserError(f"human labels are not in {folder}: put {released.name} or {plain.name} there")
        check_clean(clean, r.clean, str(path))
        labels = checked_labels(labels, f"{path}: {chosen}", len(r.clean), r.classes)
        definition = {**self.definition(r), "type": f"{self.name}:{chosen}"}
        return NoisyLabels(labels, r.clean, r.classes, definition)


@NOISE.register("file", source="own labels")
class File(Noise):
    """Labels from a file, file:PATH: one that ``save`` wrote, an .npz with ``labels``, a .npy, .txt or .csv file.

    A saved file brings its definition with it. In an .npz and a CSV ``clean`` is optional, and checked; so is a CSV's
    ``index`` (positions from 0), without which labels are in the order of the data set.
    """

    brings_labels = True
    argument = "a path, file:PATH"

    def make(self, request: Request) -> NoisyLabels:
        """The labels of the file; ``UserError`` where they do not fit the data set."""
        r, path = request, Path(request.argument)
        if path.suffix.lower() in SUFFIXES:
            arrays = read_labels(path)
        else:
            arrays = read_npz(path, ("labels",), optional=("clean", "definition"))
            if "definition" in arrays:
                noisy = load(path)
                if noisy.classes != r.classes:
                    raise UserError(f"{path}: made for {noisy.classes} classes, not {r.classes}")
                if noisy.clean is not None:
                    check_clean(noisy.clean, r.clean, str(path))
                    return noisy
        if "clean" in arrays:
            check_clean(arrays["clean"], r.clean, str(path))
        labels = checked_labels(arrays["labels"], f"{path}: labels", len(r.clean), r.classes)
        return NoisyLabels(labels, r.clean, r.classes, self.definition(r))


@NOISE.register("given", source="the labels of the data set")
class Given(Noise):
    """The labels that the data set brings, which are noisy already; nothing is added to them.

    Which of them are wrong is known only where the data set brings the correct training labels too
    (``train_labels_clean`` in an .npz file, ``clean.csv`` in a folder).
    """

    brings_labels = True

    def make(self, request: Request) -> NoisyLabels:
        """The labels of the data set beside the correct ones, if they are known."""
        r = request
        known = r.given is not None
        labels = r.given if r.given is not None else r.clean
        return NoisyLabels(labels, r.clean if known else None, r.classes, self.definition(r))


def _read_released(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Arrays of the authors' .pt file: a pickle, of which nothing but integer numpy arrays is let through."""
    import torch

    check_file(path)
    rebuild = np.empty(0).__reduce__()[0]  # numpy's _reconstruct, which numpy 1 and 2 file under different names
    allowed: list[Any] = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    allowed += [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "bBhHiIlLqQ"}]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged pickle may fail in any way
        raise UserError(
            f"{path}: refused, it is not a plain dictionary of integer arrays ({one_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of arrays")
    for key in keys:
        if not isinstance(content.get(key), np.ndarray):
            raise UserError(f"{path}: lacks the array {key}")
    return {key: content[key] for key in keys}
