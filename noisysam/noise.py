"""Noise models: clean labels in, noisy labels out, with the facts that identify, measure and reproduce them.

Noisy labels depend on the kind, the clean labels, the rate, the draw and the seed alone. Selection and new label come
from two fixed words of random bits per sample, so with one seed the samples selected at a low rate are selected at
every higher rate too.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from noisysam.data import checked_labels, data_folder, one_line, read_npz
from noisysam.data import random_bits as random_bits
from noisysam.errors import UserError
from noisysam.registry import Registry

Labels = NDArray[np.int64]
Matrix = NDArray[np.float64]

DRAWS = ("exact", "bernoulli")


def random_uniforms(n: int, *name: object) -> NDArray[np.float64]:
    """``n`` numbers in [0, 1), the top 53 bits of ``random_bits``."""
    return (random_bits(n, *name) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_normals(n: int, *name: object) -> NDArray[np.float64]:
    """``n`` standard normal numbers, by the inverse of the distribution function at the middles of 2^53 equal parts."""
    values: NDArray[np.float64] = ndtri(random_uniforms(n, *name) + 2.0**-54)
    return values


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Noisy labels beside the clean ones."""

    labels: Labels  # (n,)
    clean: Labels  # (n,)
    classes: int
    definition: dict[str, Any]  # what the labels follow from: type, rate, draw, seed, revision, ...; JSON-able
    transition: Matrix | None = None  # (K, K), P(noisy = j | clean = i), where the model states it

    @property
    def rate(self) -> float:
        """The nominal rate; where the labels have none (human, file), the measured flip rate."""
        nominal = self.definition["rate"]
        return self.flip_rate if nominal is None else float(nominal)

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """Mask (n,) of the wrong labels."""
        flipped: NDArray[np.bool_] = self.labels != self.clean
        return flipped

    @property
    def flip_rate(self) -> float:
        """Share of wrong labels."""
        return float(self.flipped.mean())

    @property
    def matrix(self) -> Matrix:
        """The measured transition matrix (K, K); a class without samples has its row of the identity."""
        pairs = np.bincount(self.clean * self.classes + self.labels, minlength=self.classes**2)
        counts = pairs.reshape(self.classes, self.classes)
        absent = counts.sum(1) == 0
        counts = counts + np.diag(absent)
        matrix: Matrix = counts / counts.sum(1, keepdims=True)
        return matrix

    @property
    def per_class_flip_rate(self) -> NDArray[np.float64]:
        """Share of wrong labels in each clean class (K,)."""
        rates: NDArray[np.float64] = 1 - np.diag(self.matrix)
        return rates

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the labels, then the clean labels, as little-endian int64."""
        return hashlib.sha256(self.labels.astype("<i8").tobytes() + self.clean.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def definition_digest(self) -> str:
        """SHA-256 (hex) of the definition as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    def card(self) -> dict[str, Any]:
        """The facts about these labels, JSON-able."""
        return {
            **self.definition,
            "n": len(self.labels),
            "flip_rate": self.flip_rate,
            "per_class_flip_rate": self.per_class_flip_rate.tolist(),
            "matrix": self.matrix.tolist(),
            "digest": self.digest,
            "definition_digest": self.definition_digest,
        }

    def take(self, index: ArrayLike) -> "NoisyLabels":
        """The samples at ``index`` (positions or a mask). Their definition names the digest of the whole."""
        chosen = np.asarray(index)
        definition = {**self.definition, "taken_from": self.digest}
        return NoisyLabels(self.labels[chosen], self.clean[chosen], self.classes, definition, self.transition)


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


class Noise:
    """A noise model: from a request to noisy labels. Models that bring their labels take no rate, draw or seed."""

    name: ClassVar[str]
    source: ClassVar[str]
    revision: ClassVar[int]
    brings_labels: ClassVar[bool] = False

    def make(self, request: Request) -> NoisyLabels:
        """The noisy labels of one request."""
        raise NotImplementedError

    def definition(self, request: Request, **facts: Any) -> dict[str, Any]:
        """What the labels follow from, apart from the clean labels."""
        drawn = {"rate": float(request.rate), "draw": request.draw, "seed": int(request.seed)}
        if self.brings_labels:
            drawn = dict.fromkeys(drawn)
        return {"type": self.name, **drawn, "revision": self.revision, "classes": request.classes, **facts}


class MatrixNoise(Noise):
    """Noise that depends on the class alone: a share ``rate`` of each class is selected and labelled anew."""

    def conditional(self, request: Request) -> Matrix:
        """The matrix (K, K) of P(new label = j | clean label = i, selected)."""
        raise NotImplementedError

    def make(self, request: Request) -> NoisyLabels:
        """Select in each class (exact: the round(rate * n_c) smallest keys; bernoulli: keys below rate), then draw."""
        r, conditional = request, self.conditional(request)
        keys = random_uniforms(len(r.clean), "noise", self.name, r.seed, "select")
        values = random_uniforms(len(r.clean), "noise", self.name, r.seed, "label")
        labels = r.clean.copy()
        for label in range(r.classes):
            members = np.flatnonzero(r.clean == label)
            if r.draw == "exact":
                selected = members[np.argsort(keys[members], kind="stable")[: round(r.rate * len(members))]]
            else:
                selected = members[keys[members] < r.rate]
            labels[selected] = np.searchsorted(_cumulative(conditional[label]), values[selected], side="right")
        transition = (1 - r.rate) * np.eye(r.classes) + r.rate * conditional
        return NoisyLabels(labels, r.clean, r.classes, self.definition(r, **self.facts(r)), transition)

    def facts(self, request: Request) -> dict[str, Any]:
        """What else of the request the conditional matrix depends on."""
        return {}


NOISE: Registry[type[Noise]] = Registry("noise type")


@NOISE.register("symmetric", source="uniform over all K classes, as in DivideMix (arXiv 2002.07394), ELR (2007.00151)")
class Symmetric(MatrixNoise):
    """Selected samples get a label uniform over all K classes: the true flip rate is r(K-1)/K."""

    def conditional(self, request: Request) -> Matrix:
        """1/K everywhere."""
        return np.full((request.classes, request.classes), 1 / request.classes)


@NOISE.register("symmetric-exclusive", source="uniform over the others, as in Co-teaching (arXiv 1804.06872)")
class SymmetricExclusive(MatrixNoise):
    """Selected samples get a label uniform over the K-1 other classes: the true flip rate is r."""

    def conditional(self, request: Request) -> Matrix:
        """1/(K-1) off the diagonal."""
        return (1 - np.eye(request.classes)) / (request.classes - 1)


@NOISE.register("asymmetric", source="Patrini et al. 2017, arXiv 1609.03683, section 5")
class Asymmetric(MatrixNoise):
    """Selected samples get the class theirs is mistaken for (10 classes: CIFAR-10's map; else within superclasses).

    CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog; the other five classes keep their
    labels, so the true flip rate is r/2. CIFAR-100: the next class of the same superclass, the last to the first.
    """

    CIFAR10: ClassVar[dict[int, int]] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}

    def conditional(self, request: Request) -> Matrix:
        """One entry of 1 in each row; ``UserError`` where the classes have no published map."""
        if request.superclasses is not None:
            groups = np.asarray(request.superclasses)
            if len(groups) != request.classes:
                raise UserError(f"{len(groups)} superclass labels were given for {request.classes} classes")
            target = np.arange(request.classes)
            for group in np.unique(groups):
                members = np.flatnonzero(groups == group)
                target[members] = np.roll(members, -1)
        elif request.classes == 10:
            target = np.array([self.CIFAR10.get(label, label) for label in range(10)])
        else:
            raise UserError(
                f"asymmetric noise needs 10 classes or superclasses, not {request.classes} classes: use pair noise"
            )
        return np.eye(request.classes)[target]

    def facts(self, request: Request) -> dict[str, Any]:
        """The superclasses, where there are any."""
        return {} if request.superclasses is None else {"superclasses": [int(group) for group in request.superclasses]}


@NOISE.register("pair", source="pair flipping, Han et al. 2018 (Co-teaching), arXiv 1804.06872, section 4")
class Pair(MatrixNoise):
    """Selected samples of class i get label i + 1, those of the last class label 0: the true flip rate is r."""

    def conditional(self, request: Request) -> Matrix:
        """1 on the circular superdiagonal."""
        return np.roll(np.eye(request.classes), 1, axis=1)


@NOISE.register("instance", source="Xia et al. 2020, arXiv 2006.07836, Algorithm 2")
class Instance(Noise):
    """Each image has its own flip rate and its own favoured wrong classes.

    q_i ~ N(rate, 0.1^2) cut to [0, 1]; W_c ~ N(0, 1) of shape (S, K) for each class c; the label stays with probability
    1 - q_i, else follows softmax(x_i W_{y_i}) over the other classes, x_i being the S pixel values from 0 to 255 (the
    scale of the authors' release; its softmax is close to an argmax). Each sample is always drawn by itself, whatever
    ``draw`` says, and near 0 and 1 the cut moves the mean of q_i away from ``rate``. Rate 0 gives the clean labels.
    """

    SPREAD = 0.1

    def make(self, request: Request) -> NoisyLabels:
        """The noisy labels; ``UserError`` without one uint8 image for each label."""
        r = request
        labels = r.clean.copy()
        definition = {**self.definition(r), "draw": "bernoulli"}
        if r.rate == 0:
            return NoisyLabels(labels, r.clean, r.classes, definition)
        if r.images is None or len(r.images) != len(r.clean) or r.images.dtype != np.uint8:
            raise UserError(f"instance noise needs the uint8 images of all {len(r.clean)} samples")
        low, high = ndtr((0 - r.rate) / self.SPREAD), ndtr((1 - r.rate) / self.SPREAD)
        quantile = low + (high - low) * random_uniforms(len(labels), "noise", self.name, r.seed, "rate")
        flip_rates = np.clip(r.rate + self.SPREAD * ndtri(quantile), 0, 1)
        keys = random_uniforms(len(labels), "noise", self.name, r.seed, "select")
        values = random_uniforms(len(labels), "noise", self.name, r.seed, "label")
        images = r.images.reshape(len(r.images), -1)
        for label in range(r.classes):
            selected = np.flatnonzero((r.clean == label) & (keys < flip_rates))
            pixels = images[selected].astype(np.float64)
            size = (pixels.shape[1], r.classes)
            projection = random_normals(math.prod(size), "noise", self.name, r.seed, "projection", label).reshape(size)
            logits = pixels @ projection  # float64, so that a label does not hang on the order of a sum
            logits[:, label] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            labels[selected] = (values[selected, None] >= _cumulative(weights)).sum(axis=1)
        return NoisyLabels(labels, r.clean, r.classes, definition)


@NOISE.register("human", source="Wei et al. 2022 (CIFAR-10N, CIFAR-100N), arXiv 2110.12088")
class Human(Noise):
    """Labels given by people, human:SET (CIFAR-10: aggre, random1, random2, random3, worse; CIFAR-100: noisy).

    They lie in the data folder, as the authors' ``CIFAR-10_human.pt`` or as ``cifar10n.npz`` (CIFAR-100 likewise).
    """

    brings_labels = True
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
        _check_clean(clean, r.clean, str(path))
        labels = checked_labels(labels, f"{path}: {chosen}", len(r.clean), r.classes)
        definition = {**self.definition(r), "type": f"{self.name}:{chosen}"}
        return NoisyLabels(labels, r.clean, r.classes, definition)


@NOISE.register("file", source="own labels")
class File(Noise):
    """Labels from a file, file:PATH: one that ``save`` wrote, an .npz with ``labels``, or a CSV with ``noisy``.

    A saved file brings its definition with it. In the others ``clean`` is optional, and checked; so is a CSV's
    ``index`` (positions from 0), without which rows are in the order of the data set.
    """

    brings_labels = True

    def make(self, request: Request) -> NoisyLabels:
        """The labels of the file; ``UserError`` where they do not fit the data set."""
        r, path = request, Path(request.argument)
        if path.suffix.lower() == ".csv":
            arrays = _read_csv(path)
        else:
            arrays = read_npz(path, ("labels",), optional=("clean", "definition"))
            if "definition" in arrays:
                noisy = load(path)
                if noisy.classes != r.classes:
                    raise UserError(f"{path}: made for {noisy.classes} classes, not {r.classes}")
                _check_clean(noisy.clean, r.clean, str(path))
                return noisy
        if "clean" in arrays:
            _check_clean(arrays["clean"], r.clean, str(path))
        labels = checked_labels(arrays["labels"], f"{path}: labels", len(r.clean), r.classes)
        return NoisyLabels(labels, r.clean, r.classes, self.definition(r))


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
) -> NoisyLabels:
    """Noisy labels of ``kind`` (a registered name; human:SET, file:PATH) for the clean labels (n,).

    ``rate`` is the share of samples selected for a new label; ``draw`` selects an exact number in each class or each
    sample by itself. ``images`` (n, H, W, C) are for instance noise, ``superclasses`` (K,) for asymmetric. Warns where
    the true label of a class is not its most probable label. ``UserError`` for anything out of range.
    """
    name, colon, argument = kind.partition(":")
    model = NOISE[name]()
    given = np.asarray(clean)
    true = checked_labels(given, "clean labels", given.size, classes)
    if not true.size:
        raise UserError("there are no labels to make noisy")
    if not 0 <= rate <= 1:  # also refuses nan
        raise UserError(f"noise rate {rate} is not between 0 and 1")
    if draw not in DRAWS:
        raise UserError(f"unknown noise draw {draw!r} (known: {', '.join(DRAWS)})")
    if model.brings_labels and rate:
        raise UserError(f"noise type {name} brings its own rate: leave the noise rate out")
    if model.brings_labels and not argument:
        raise UserError(f"noise type {name} needs {'a set, human:worse' if name == 'human' else 'a path, file:PATH'}")
    if colon and not model.brings_labels:
        raise UserError(f"noise type {name} takes nothing after a colon, got {kind!r}")
    noisy = model.make(Request(true, classes, rate, draw, seed, argument, images, superclasses, data_dir))

    matrix = noisy.matrix if noisy.transition is None else noisy.transition
    rivals = np.where(np.eye(classes, dtype=bool), -np.inf, matrix).max(axis=1)
    lost = np.flatnonzero(np.diag(matrix) <= rivals + 1e-9)
    if len(lost):
        at = f" at rate {rate:g}" if rate else ""
        what = f"the true label is not the most probable one in {len(lost)} of {classes} classes"
        warnings.warn(f"{kind} noise{at}: {what} (first: {lost[0]}), which cannot be learnt from it", stacklevel=2)
    return noisy


def save(noisy: NoisyLabels, path: Path) -> None:
    """Write ``path`` (.npz, no pickles) and beside it a CSV ``index,clean,noisy``, each by rename."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: label files are named .npz (a .csv is written beside it)")
    arrays: dict[str, Any] = {
        "labels": noisy.labels,
        "clean": noisy.clean,
        "definition": np.array(json.dumps(noisy.definition, sort_keys=True)),
        "checksum": np.array(_checksum(noisy)),
    }
    if noisy.transition is not None:
        arrays["transition"] = noisy.transition
    rows = np.column_stack((np.arange(len(noisy.labels)), noisy.clean, noisy.labels))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            np.savez_compressed(file, **arrays)
        with _replacing(path.with_suffix(".csv")) as file:
            np.savetxt(file, rows, fmt="%d", delimiter=",", header="index,clean,noisy", comments="")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error


def load(path: Path) -> NoisyLabels:
    """Labels that ``save`` wrote; ``UserError`` where the file is faulty or its content does not fit its checksum."""
    arrays = read_npz(path, ("labels", "clean", "definition", "checksum"), optional=("transition",))
    try:
        definition = json.loads(str(arrays["definition"][()]))
        classes, rate = definition["classes"], definition["rate"]
        sane = isinstance(classes, int) and classes >= 2 and (rate is None or 0 <= rate <= 1)
        sane = sane and isinstance(definition["type"], str) and {"draw", "seed", "revision"} <= definition.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its definition cannot be read ({one_line(error)})") from error
    if not sane:
        raise UserError(f"{path}: its definition lacks or misstates type, rate, draw, seed, revision or classes")
    clean = checked_labels(arrays["clean"], f"{path}: clean", arrays["clean"].size, classes)
    labels = checked_labels(arrays["labels"], f"{path}: labels", clean.size, classes)
    transition = arrays.get("transition")
    if transition is not None and (transition.shape != (classes, classes) or transition.dtype != np.float64):
        raise UserError(
            f"{path}: transition is {transition.dtype} {transition.shape}, not float64 for {classes} classes"
        )
    noisy = NoisyLabels(labels, clean, classes, definition, transition)
    if str(arrays["checksum"][()]) != _checksum(noisy):
        raise UserError(f"{path}: its content does not fit its checksum: it was damaged or edited")
    return noisy


def verify(path: Path, clean: ArrayLike | None = None) -> list[str]:
    """What could be checked about a saved label file, one line each; ``UserError`` where a check fails.

    Checked are the checksum; the clean labels against ``clean``, where given; and, where the labels follow from the
    definition alone (noise by class, of the present revision, not a part of a larger set), that a new draw gives them.
    """
    noisy = load(path)
    passed = [f"content fits its checksum (labels {noisy.digest[:12]}, definition {noisy.definition_digest[:12]})"]
    if clean is not None:
        _check_clean(np.asarray(clean), noisy.clean, str(path))
        passed.append(f"all {len(noisy.clean)} clean labels equal the data set's")
    facts = noisy.definition
    by_class = facts["type"] in NOISE and issubclass(NOISE[facts["type"]], MatrixNoise)
    if by_class and facts["revision"] == NOISE[facts["type"]].revision and "taken_from" not in facts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether the noise can be learnt is not the question here
            again = make(
                facts["type"],
                noisy.clean,
                noisy.classes,
                rate=facts["rate"],
                seed=facts["seed"],
                draw=facts["draw"],
                superclasses=facts.get("superclasses"),
            )
        differing = int((again.labels != noisy.labels).sum())
        if differing:
            raise UserError(f"{path}: {differing} labels are not what its definition gives")
        passed.append(f"all {len(noisy.labels)} labels drawn again from the definition are the same")
    return passed


def _cumulative(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cumulative shares along the last axis, ending in exactly 1: no number in [0, 1) falls on a weight of 0."""
    sums = np.cumsum(weights, axis=-1)
    shares: NDArray[np.float64] = sums / sums[..., -1:]
    return shares


def _check_clean(found: NDArray[Any], clean: Labels, where: str) -> None:
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
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read_csv(path: Path) -> dict[str, NDArray[np.int64]]:
    """``labels`` and, if there, ``clean`` of a CSV with a header, in the order of its ``index`` column, if any."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            header = [column.strip() for column in next(lines, [])]
            if "noisy" not in header:
                raise UserError(f"{path}: its first line must name a column noisy (and may name index and clean)")
            rows = [row for row in lines if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise UserError(f"{path}: data row {number} has {len(row)} fields for {len(header)} columns")
    columns = {}
    for column in ("noisy", "clean", "index"):
        if column in header:
            place = header.index(column)
            try:
                columns[column] = np.array([int(row[place]) for row in rows], dtype=np.int64)
            except (ValueError, OverflowError) as error:
                raise UserError(f"{path}: column {column} holds something that is no integer label") from error
    arrays = {"labels": columns["noisy"]} | ({"clean": columns["clean"]} if "clean" in columns else {})
    if "index" in columns:
        order = np.argsort(columns["index"], kind="stable")
        if not np.array_equal(columns["index"][order], np.arange(len(rows))):
            raise UserError(f"{path}: column index must hold each of 0 to {len(rows) - 1} once")
        arrays = {key: array[order] for key, array in arrays.items()}
    return arrays


def _read_released(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Arrays of the authors' .pt file: a pickle, of which nothing but integer numpy arrays is let through."""
    import torch

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
