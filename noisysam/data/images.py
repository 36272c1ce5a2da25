"""Data sets of image files: folders, torchvision's and Hugging Face's, as the same arrays as any other."""

import contextlib
import csv
import difflib
import inspect
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from noisysam.core.errors import UserError
from noisysam.core.rng import random_bits
from noisysam.core.text import one_line
from noisysam.core.untrusted import check_file
from noisysam.data.datasets import SOURCES, Dataset, _short_timeout, data_folder, from_arrays

if TYPE_CHECKING:
    from PIL.Image import Image

TEST_SHARE = 0.2  # of each class, held out where there are no test images
SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
TEST_NAMES = ("test", "val", "valid", "validation")
TRAIN_NAMES = ("train", "trainval", "training")
GREY = ("1", "L", "LA")  # PIL's modes without colour
CLEAN_FILE = "clean.csv"  # beside the images: the correct labels of noisy ones

TORCHVISION = {  # whose samples are an image and its class; whether a mirror image keeps its class
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "Caltech101", "Caltech256", "Country211", "DTD", "EuroSAT", "FGVCAircraft",
         "FashionMNIST", "Flowers102", "Food101", "Imagenette", "OxfordIIITPet", "PCAM", "STL10", "SUN397",
         "StanfordCars"),
        True,
    ),
    **dict.fromkeys(("GTSRB", "KMNIST", "MNIST", "QMNIST", "RenderedSST2", "SEMEION", "SVHN", "USPS"), False),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Images that are read one by one. ``read(i)``: the i-th and its label; ``names``: what messages call them."""

    count: int
    read: "Callable[[int], tuple[Image, int]]"
    names: Sequence[str]

    def take(self, index: NDArray[np.int64]) -> "Part":
        """Some of the images."""
        return Part(len(index), lambda i: self.read(int(index[i])), [self.names[i] for i in index])


def arrays_of(part: Part, size: int | None, mode: str | None, where: str) -> tuple[NDArray[np.uint8], list[int], str]:
    """Images uint8 (n, S, S, 1 or 3), their labels, and the mode that they were converted to, L or RGB.

    ``size``: S; an image of another size is scaled and its middle cut out. None: the first one's, which all must have.
    ``mode``: None for grey where all images are. ``UserError`` names an image that cannot be read.
    """
    from PIL import Image, ImageOps

    found: NDArray[np.uint8] | None = None
    labels, given = [], mode
    for i in range(part.count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image, label = part.read(i)
                image.load()
        except UserError:
            raise
        except Exception as error:  # of decoders, for damaged and hostile files
            raise UserError(f"{where}: {part.names[i]} cannot be read as an image ({one_line(error)})") from None
        if found is None:
            mode = mode or ("L" if image.mode in GREY else "RGB")
            side = size or image.width
            found = _memory(part.count, side, mode, where)
        if given is None and mode == "L" and image.mode not in GREY:
            return arrays_of(part, size, "RGB", where)
        if size is None and image.size != (side, side):
            raise UserError(
                f"{where}: {part.names[i]} has {image.width} x {image.height} pixels, not {side} x {side}: "
                "give --image-size"
            )
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        found[i] = np.asarray(image.convert(mode)).reshape(side, side, -1)
        labels.append(label)
    if found is None or mode is None:
        raise UserError(f"{where}: there are no images")
    return found, labels, mode


def _memory(count: int, side: int, mode: str, where: str) -> NDArray[np.uint8]:
    """Space for images, if the machine has as much."""
    shape = (count, side, side, 1 if mode == "L" else 3)
    size, memory = int(np.prod(shape)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        needed = f"{size / 1e9:.0f} GB for {count:,} images of {side} x {side} pixels"
        raise UserError(f"{where}: takes {needed}, this machine has {memory / 1e9:.0f}: give a smaller --image-size")
    return np.empty(shape, np.uint8)


def held_out(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions for training and for testing: of each class ``TEST_SHARE``, always the same ones."""
    keys, test = random_bits(len(labels), "test"), np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test[members[np.argsort(keys[members], kind="stable")[: round(TEST_SHARE * len(members))]]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def dataset_of(
    name: str,
    where: str,
    train: Part,
    test: Part,
    size: int | None,
    class_names: Sequence[str] | None,
    flip: bool,
    clean: NDArray[np.int64] | None = None,
    files: Sequence[str] | None = None,
) -> Dataset:
    """A data set of two parts. ``clean``: the correct labels of the training images, where their own are noisy."""
    images, labels, mode = arrays_of(train, size, None, where)
    test_images, test_labels, _ = arrays_of(test, images.shape[1], mode, where)
    return from_arrays(
        name, images, np.array(labels), test_images, np.array(test_labels, np.int64),
        train_labels_clean=clean, class_names=class_names, flip=flip, files=files, where=where,
    )  # fmt: skip


# Folders


@SOURCES.register("folder", source="one folder for each class")
def folder(argument: str, data_dir: Path | None, image_size: int | None) -> Dataset:
    """Images in ``train/CLASS/`` and ``test/CLASS/`` (or val/), or in ``CLASS/`` alone: then a share of each is held
    out for the test. ``clean.csv`` (columns file, label) has the correct labels of noisy ones, if they are known."""
    from PIL import Image

    root = Path(argument)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    top = next((root / name for name in TRAIN_NAMES if (root / name).is_dir()), root)
    tested = next((root / name for name in TEST_NAMES if top != root and (root / name).is_dir()), None)
    names = _class_names(top)
    files, labels = _labelled(top, names)

    def part(paths: Sequence[Path], classes: NDArray[np.int64]) -> Part:
        def read(i: int) -> "tuple[Image.Image, int]":
            check_file(paths[i])
            return Image.open(paths[i]), int(classes[i])

        return Part(len(paths), read, [str(path.relative_to(root)) for path in paths])

    truth = _read_clean(root, [str(path.relative_to(root)) for path in files], names)
    train, test = part(files, labels), None
    if tested is not None:
        test = part(*_labelled(tested, names))
    else:
        kept, out = held_out(labels)
        if not len(out):
            raise UserError(f"{root}: too few images to hold out some for the test: make folders train/ and test/")
        test, train = part(files, labels if truth is None else truth).take(out), train.take(kept)
        truth = None if truth is None else truth[kept]
    return dataset_of(
        f"folder:{root.resolve().name}", str(root), train, test, image_size, names, True, truth, train.names
    )


def _class_names(top: Path) -> list[str]:
    names = sorted(path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{top}: a folder for each class was expected, found {', '.join(names) or 'none'}")
    return names


def _labelled(top: Path, names: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    """The images below the folders of classes, in the order of their names, with their labels."""
    for name in _class_names(top):
        if name not in names:
            raise UserError(f"{top}: class {name!r} has no training images")
    files, labels = [], []
    for label, name in enumerate(names):
        found = list(walk(top / name)) if (top / name).is_dir() else []
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, np.int64)


def walk(top: Path) -> Iterator[Path]:
    """Every image file below a folder, in the order of their names."""
    for place, folders, files in os.walk(top):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(place) / name


def changed(name: str) -> int:
    """A number that is another one when the local files of a data set have changed; 0 where that is not followed."""
    kind, _, argument = name.partition(":")
    paths: Iterator[Path] = iter(())
    if kind == "npz":
        paths = iter([Path(argument)])
    elif kind == "folder":
        paths = itertools.chain([Path(argument) / CLEAN_FILE], walk(Path(argument)))
    found = [(str(path), *stamp(path)) for path in paths if path.exists()]
    return hash(tuple(found)) if found else 0


def stamp(path: Path) -> tuple[int, int]:
    """When a file was changed, and its size."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _read_clean(root: Path, files: Sequence[str], names: Sequence[str]) -> NDArray[np.int64] | None:
    """The correct labels of the files, from ``clean.csv``; None where there is none."""
    path = root / CLEAN_FILE
    if not path.exists():
        return None
    check_file(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            truth = {row["file"]: row["label"] for row in csv.DictReader(file)}
    except (OSError, ValueError, csv.Error, KeyError) as error:
        raise UserError(f"{path}: columns file and label were expected ({one_line(error)})") from None
    missing = [name for name in files if name not in truth]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(files)} training images are not in it (first: {missing[0]})")
    numbers = {name: label for label, name in enumerate(names)}
    for name in files:
        if truth[name] not in numbers:
            raise UserError(f"{path}: {name} has the label {truth[name]!r}, which is no class")
    return np.array([numbers[truth[name]] for name in files], np.int64)


# torchvision


@SOURCES.register("torchvision", source="https://docs.pytorch.org/vision/stable/datasets.html")
def torchvision_dataset(argument: str, data_dir: Path | None, image_size: int | None) -> Dataset:
    """A data set of torchvision by its class name, from its files in the data folder; downloaded if there are none."""
    import torchvision.datasets

    if argument not in TORCHVISION:
        near = difflib.get_close_matches(argument, TORCHVISION, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown torchvision dataset {argument!r}{hint} (known: {', '.join(sorted(TORCHVISION))})")
    kind, root = getattr(torchvision.datasets, argument), data_folder(data_dir)
    train = _open(kind, root, TRAIN_NAMES, True)
    test = _open(kind, root, TEST_NAMES, False) if _splits(kind) else None
    names = getattr(train, "classes", None)
    where, part = f"torchvision:{argument}", _part(train, "training image")
    if test is None:
        labels = np.array([int(train[i][1]) for i in range(len(train))], np.int64)
        kept, out = held_out(labels)
        part, tested = part.take(kept), part.take(out)
    else:
        tested = _part(test, "test image")
    labels_known = names is not None and all(isinstance(name, str) for name in names)
    return dataset_of(
        where, where, part, tested, image_size, names if labels_known else None, flip=TORCHVISION[argument]
    )


def _splits(kind: Any) -> str | None:
    """The argument by which a data set of torchvision gives training and test images."""
    return next((name for name in ("train", "split") if name in inspect.signature(kind).parameters), None)


def _open(kind: Any, root: Path, names: Sequence[str], train: bool) -> Any:
    """A part of a data set of torchvision, downloaded where it is not there; ``UserError`` where that fails."""
    argument = _splits(kind)
    choices: Sequence[dict[str, Any]] = [{}]
    if argument is not None:
        choices = [{"train": train}] if argument == "train" else [{"split": name} for name in names]
    downloads = "download" in inspect.signature(kind).parameters
    fault: Exception | None = None
    for options in choices:
        for download in (False, True) if downloads else (None,):
            extra = {} if download is None else {"download": download}
            try:
                with _short_timeout(), contextlib.redirect_stdout(sys.stderr):
                    return kind(root, **options, **extra)
            except ValueError as error:  # no part of this name
                fault = fault or error
                break
            except Exception as error:  # of torchvision, urllib, tarfile, scipy
                fault = error
        else:
            break
    raise UserError(
        f"torchvision:{kind.__name__} is not in {root} and cannot be downloaded ({one_line(fault or OSError())}): put "
        f"the files that torchvision.datasets.{kind.__name__} reads there, or use npz:FILE or folder:DIR"
    )


def _part(dataset: Any, word: str) -> Part:
    def read(i: int) -> "tuple[Image, int]":
        image, label = dataset[i]
        return image, int(label)

    return Part(len(dataset), read, _Numbered(word, len(dataset)))


class _Numbered(Sequence[str]):
    """'training image 3' and so on, made when they are asked for."""

    def __init__(self, word: str, total: int) -> None:
        self.word, self.total = word, total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: Any) -> Any:
        return f"{self.word} {i}"


# Hugging Face


@SOURCES.register("hf", source="https://huggingface.co/docs/datasets")
def hugging_face(argument: str, data_dir: Path | None, image_size: int | None) -> Dataset:
    """A data set of the Hugging Face Hub, or a local folder that ``datasets`` reads, hf:NAME or hf:NAME#LABEL_COLUMN.
    A column ``clean_label`` has the correct labels of noisy ones, if they are known."""
    try:
        import datasets
    except ImportError:
        raise UserError("hf:NAME needs the datasets library: pip install 'noisysam[hf]'") from None
    name, _, chosen = argument.partition("#")
    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):  # they tell each attempt to reach a server
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with _short_timeout(), contextlib.redirect_stdout(sys.stderr):
            local = Path(name)
            stored = any((local / file).exists() for file in ("dataset_dict.json", "state.json"))
            found = datasets.load_from_disk(name) if stored else datasets.load_dataset(name)
    except Exception as error:  # of datasets, pyarrow, requests, huggingface_hub
        raise UserError(
            f"hf:{name} is neither in the local cache nor can it be loaded ({one_line(error)}): give the path of a "
            "local copy, or use npz:FILE or folder:DIR"
        ) from None
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    train = next((splits[n] for n in TRAIN_NAMES if n in splits), None)
    test = next((splits[n] for n in TEST_NAMES if n in splits), None)
    where = f"hf:{name}"
    if train is None:
        raise UserError(f"{where}: there is no split train (found: {', '.join(splits)})")
    columns = train.features
    image = _column(where, [c for c, kind in columns.items() if isinstance(kind, datasets.Image)], "image", None)
    classes = [c for c, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    classes = classes or [c for c in ("label", "labels") if c in columns]
    truth = next((c for c in ("clean_label", f"{chosen}_clean") if c in columns and c != chosen), None)
    label = _column(where, [c for c in classes if c != truth], "label", chosen or None)
    names = getattr(columns[label], "names", None)

    def part(split: Any, column: str, word: str) -> Part:
        def read(i: int) -> "tuple[Image, int]":
            row = split[i]
            return row[image], int(row[column])

        return Part(len(split), read, _Numbered(word, len(split)))

    whole = part(train, label, "training image")
    clean = None if truth is None else np.array(train[truth], np.int64)
    if test is not None:
        tested = part(test, label, "test image")
    else:
        kept, out = held_out(np.array(train[label], np.int64))
        tested, whole = part(train, truth or label, "training image").take(out), whole.take(kept)
        clean = None if clean is None else clean[kept]
    return dataset_of(f"hf:{Path(name).name}", where, whole, tested, image_size, names, True, clean)


def _column(where: str, found: Sequence[str], kind: str, chosen: str | None) -> str:
    """The column of a kind; ``UserError`` where there is none, or several and none is chosen."""
    if chosen is not None and chosen in found:
        return chosen
    if len(found) != 1 or chosen is not None:
        several = f"several {kind} columns ({', '.join(found)}): choose one, hf:NAME#COLUMN"
        raise UserError(f"{where}: {several if found else f'no {kind} column'}")
    return found[0]
