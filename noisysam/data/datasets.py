"""Data sets as uint8 tensors: read from local files or downloaded once, checked, and identified by a digest."""

import contextlib
import hashlib
import math
import os
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from noisysam.core.errors import UserError
from noisysam.core.files import atomic
from noisysam.core.registry import Registry, call_fault

if TYPE_CHECKING:  # noise models and reports do without torch, whose import takes a second
    from torch import Tensor
from noisysam.core.text import one_line, printable
from noisysam.core.untrusted import check_file

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


CLEAN = "train_labels_clean"  # of an .npz file whose `train_labels` are noisy


DOWNLOAD_TIMEOUT = 10.0  # seconds to wait for an answer of a server


DEFLATE = 1032  # bytes that one compressed byte can stand for at most


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# The 20 superclasses of CIFAR-100, in the order of their coarse labels (Krizhevsky 2009). Fine labels are alphabetical.
CIFAR100_SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


_COARSE = {fine: coarse for coarse, fines in enumerate(CIFAR100_SUPERCLASSES.values()) for fine in fines.split()}


CIFAR100_CLASSES = tuple(sorted(_COARSE))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of one data set, on the CPU."""

    name: str  # "cifar10", "digits", "npz:<file name>", "folder:<folder name>", ...
    train_images: "Tensor"  # uint8 (n, H, W, C)
    train_labels: "Tensor"  # int64 (n,), correct as far as is known
    test_images: "Tensor"
    test_labels: "Tensor"
    class_names: tuple[str, ...]
    pad: int  # crop padding of the standard augmentation, in pixels
    flip: bool  # whether a mirror image keeps its class
    superclasses: tuple[int, ...] | None = None  # CIFAR-100: the coarse label of each fine class
    noisy_labels: "Tensor | None" = None  # int64 (n,), that came with the data, where `train_labels` correct them
    files: tuple[str, ...] | None = None  # of the training images, where they are files

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return int(self.train_images.shape[1])

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names, types, shapes and values of the four arrays; independent of the file format."""
        sha = hashlib.sha256()
        for key in ARRAYS:
            array: NDArray[Any] = getattr(self, key).numpy()
            sha.update(f"{key} {array.dtype.name} {array.shape}\n".encode())
            sha.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return sha.hexdigest()

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training images, pixels scaled to 0..1; 1 as the
        deviation of a constant channel."""
        import torch

        levels = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.train_images.unbind(-1):
            share = (
                torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            )  # exact: no sum over all pixels
            mean = (share * levels).sum()
            means.append(mean.item())
            stds.append((share * (levels - mean) ** 2).sum().sqrt().item() or 1.0)
        return tuple(means), tuple(stds)


DATASETS: Registry[Callable[[Path | None], Dataset]] = Registry(
    "dataset", lambda item: call_fault(item, ("data_dir",), "the function")
)


# What the word before the colon of KIND:ARGUMENT names: from the argument, the folder of the data sets and the size
# that is asked for to a data set of that size, if it can be had.
SOURCES: Registry[Callable[[str, Path | None, int | None], Dataset]] = Registry(
    "kind of data set", lambda item: call_fault(item, ("argument", "data_dir", "image_size"), "the function")
)


def load(name: str, data_dir: Path | None = None, image_size: int | None = None) -> Dataset:
    """Return the data set ``name``: a registered name, or ``npz:FILE``, ``folder:DIR``, ``torchvision:NAME``,
    ``hf:NAME``. ``UserError`` if it is missing or invalid.

    ``image_size``: height and width in pixels that the images are resized to, where they have another size.
    """
    kind, colon, argument = name.partition(":")
    if colon and kind in SOURCES:
        if not argument:
            raise UserError(f"--dataset {name}: say which after the colon")
        dataset = SOURCES[kind](argument, data_dir, image_size)
    else:
        dataset = DATASETS[name](data_dir)
        if not isinstance(dataset, Dataset):
            raise UserError(f"dataset {name!r} gave a {type(dataset).__name__}: return data.from_arrays(...)")
    return dataset if image_size in (None, dataset.size) else resized(dataset, image_size or 0)


def resized(dataset: Dataset, size: int) -> Dataset:
    """The data set with images of ``size`` x ``size`` pixels, by PIL's bilinear filter."""
    import torch
    from PIL import Image

    def part(images: "Tensor") -> "Tensor":
        grey = images.shape[3] == 1
        pictures = (Image.fromarray(image[..., 0] if grey else image) for image in images.numpy())
        made = [np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)) for picture in pictures]
        return torch.from_numpy(np.stack(made)[..., None] if grey else np.stack(made))

    return replace(
        dataset,
        train_images=part(dataset.train_images),
        test_images=part(dataset.test_images),
        pad=round(dataset.pad * size / dataset.size),
    )


@DATASETS.register("cifar10", source="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images")
def cifar10(data_dir: Path | None = None) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels, 10 classes."""
    return _cifar("cifar10", "CIFAR10", "cifar-10-batches-py", CIFAR10_CLASSES, None, data_dir)


@DATASETS.register("cifar100", source="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images")
def cifar100(data_dir: Path | None = None) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32x32 pixels, 100 classes in 20 superclasses."""
    superclasses = tuple(_COARSE[name] for name in CIFAR100_CLASSES)
    return _cifar("cifar100", "CIFAR100", "cifar-100-python", CIFAR100_CLASSES, superclasses, data_dir)


@DATASETS.register("digits", source="scikit-learn load_digits: Alpaydin & Kaynak 1998, UCI optical digits, test part")
def digits(data_dir: Path | None = None) -> Dataset:
    """Handwritten digits, 1,348 + 449 grey images of 8x8 pixels; part of scikit-learn, no download."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.arange(len(images)) % 4 == 3
    labels = raw.target.astype(np.int64)
    arrays = dict(zip(ARRAYS, (images[~test], labels[~test], images[test], labels[test]), strict=True))
    return _checked("digits", "digits", arrays, tuple("0123456789"), pad=1, flip=False)


def load_npz(path: Path) -> Dataset:
    """Read own data from an ``.npz`` file with the arrays ``ARRAYS`` and, optionally, ``class_names`` and
    ``train_labels_clean``.

    Images are uint8 (n, H, H, C) with C of 1 or 3; labels are integers from 0 to K-1, each in the training set. Without
    ``class_names`` K is the largest training label plus one. Where ``train_labels`` are noisy and the correct ones are
    known, those are ``train_labels_clean``.
    """
    arrays = read_npz(path, ARRAYS, optional=("class_names", CLEAN))
    given = arrays.pop("class_names", None)
    class_names: tuple[str, ...] | None = None
    if given is not None:
        if given.ndim != 1 or given.dtype.kind != "U":
            raise UserError(f"{path}: class_names must be a 1-D array of strings, not {_kind(given)}")
        class_names = tuple(str(name) for name in given)
    return _checked(f"npz:{path.name}", str(path), arrays, class_names, pad=None, flip=True)


@SOURCES.register("npz", source="a file")
def _npz(argument: str, data_dir: Path | None, image_size: int | None) -> Dataset:
    """Arrays in a file."""
    return load_npz(Path(argument))


def save_npz(dataset: Dataset, path: Path | str) -> None:
    """Write a data set as a file that ``npz:FILE`` reads."""
    arrays: dict[str, NDArray[Any]] = {key: getattr(dataset, key).numpy() for key in ARRAYS}
    if dataset.noisy_labels is not None:
        arrays |= {CLEAN: arrays["train_labels"], "train_labels": dataset.noisy_labels.numpy()}
    arrays["class_names"] = np.array(dataset.class_names)
    with atomic(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def from_arrays(
    name: str,
    train_images: NDArray[np.uint8],
    train_labels: NDArray[Any],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[Any],
    *,
    train_labels_clean: NDArray[Any] | None = None,
    class_names: Sequence[str] | None = None,
    pad: int | None = None,
    flip: bool = True,
    files: Sequence[str] | None = None,
    where: str | None = None,
) -> Dataset:
    """A data set of arrays: images uint8 (n, H, H, 1 or 3), labels integers (n,) from 0 to K-1.

    ``train_labels_clean``: the correct labels, where ``train_labels`` are noisy and they are known; ``pad``: zero
    pixels around an image for random crops (default: an eighth of its size); ``flip``: whether a mirror image keeps its
    class; ``files``: where each training image comes from; ``where``: what messages name instead of ``name``.
    ``UserError`` for arrays of other types, shapes or lengths, and for a class without training images.
    """
    arrays = dict(zip(ARRAYS, (train_images, train_labels, test_images, test_labels), strict=True))
    if train_labels_clean is not None:
        arrays[CLEAN] = train_labels_clean
    names = None if class_names is None else tuple(str(one) for one in class_names)
    made = _checked(name, where or name, arrays, names, pad=pad, flip=flip)
    return made if files is None else replace(made, files=tuple(files))


def data_folder(data_dir: Path | None = None) -> Path:
    """The folder of the data sets: ``data_dir``, else the environment variable NOISYSAM_DATA_DIR, else ./data."""
    return data_dir or Path(os.environ.get("NOISYSAM_DATA_DIR") or "data")


def read_npz(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    """The named arrays of an ``.npz`` file. Nothing is unpickled, and no memory is taken for an array that the file
    cannot hold. ``UserError`` if anything about the file is wrong."""
    check_file(path)
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not an .npz file, or cut short")
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # numpy's, of headers of other versions
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            missing = [key for key in required if key not in names]
            if missing:
                found = " ".join(printable(", ".join(names)).split())[:200] or "nothing"
                raise UserError(f"{path}: lacks {', '.join(missing)} (it holds {found})")
            return {key: _member(archive, names[key], path) for key in (*required, *optional) if key in names}
    except UserError:
        raise
    except Exception as error:  # of zipfile, zlib, numpy, and of the parser that reads headers
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> NDArray[Any]:
    """One array of an ``.npz`` file, after comparing its header with the size of the member."""
    info = archive.getinfo(name)
    if not name.endswith(".npy"):
        raise UserError(f"{path}: {name} is not an array")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path}: {name} is compressed in a way that numpy does not write")
    with archive.open(info) as file:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read_header is None:
            raise UserError(f"{path}: {name} has version {version} of the format: 1.0 and 2.0 are read")
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise UserError(f"{path}: {name} holds Python objects, which are not read")
        size = math.prod(shape) * dtype.itemsize
        if size > min(info.file_size, info.compress_size * DEFLATE):
            raise UserError(f"{path}: {name} claims to be {dtype} {shape}: more than the file holds")
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)


def checked_labels(labels: NDArray[Any], where: str, n: int, classes: int | None = None) -> NDArray[np.int64]:
    """``labels`` as int64 (n,); ``UserError`` naming ``where`` unless they are n integers from 0 to ``classes`` - 1."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{where} must be a 1-D array of integers, not {_kind(labels)}")
    if len(labels) != n:
        raise UserError(f"{where} has {len(labels)} entries for {n} images")
    if n:
        low, high = int(labels.min()), int(labels.max())
        limit = classes or 2**31
        if low < 0 or high >= limit:
            raise UserError(f"{where} holds {low if low < 0 else high}: labels must be 0 to {limit - 1}")
    return labels.astype(np.int64)


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"


def _checked(
    name: str,
    where: str,
    arrays: dict[str, NDArray[Any]],
    class_names: tuple[str, ...] | None,
    *,
    pad: int | None,
    flip: bool,
    superclasses: tuple[int, ...] | None = None,
) -> Dataset:
    """A ``Dataset`` of the four arrays, after checking types, shapes, lengths, label ranges and class presence. With
    ``CLEAN`` among them, ``train_labels`` are the noisy ones."""
    for key in ("train_images", "test_images"):
        images = arrays[key]
        square = images.ndim == 4 and images.shape[1] == images.shape[2] > 0 and images.shape[3] in (1, 3)
        if images.dtype != np.uint8 or not square:
            raise UserError(f"{where}: {key} must be uint8 (n, H, H, 1 or 3), not {_kind(images)}")
        if not len(images):
            raise UserError(f"{where}: {key} is empty")
    train, test = arrays["train_images"], arrays["test_images"]
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{where}: train_images are {train.shape[1:]} each, test_images {test.shape[1:]}")

    given = None if class_names is None else len(class_names)
    train_labels = checked_labels(arrays["train_labels"], f"{where}: train_labels", len(train), given)
    clean = None if CLEAN not in arrays else checked_labels(arrays[CLEAN], f"{where}: {CLEAN}", len(train), given)
    present = np.unique(train_labels)
    classes = given or int(present[-1] if clean is None else max(present[-1], clean.max())) + 1
    if classes < 2:
        raise UserError(f"{where}: train_labels hold one class: two are needed")
    if len(present) < classes:  # the first class that is not at its place in 0, 1, 2, ... is absent
        gaps = np.flatnonzero(present != np.arange(len(present)))
        absent = int(gaps[0]) if len(gaps) else len(present)
        raise UserError(f"{where}: train_labels hold no sample of class {absent}, of {classes} classes")
    test_labels = checked_labels(arrays["test_labels"], f"{where}: test_labels", len(test), classes)

    import torch

    return Dataset(
        name,
        torch.from_numpy(np.ascontiguousarray(train)),
        torch.from_numpy(train_labels if clean is None else clean),
        torch.from_numpy(np.ascontiguousarray(test)),
        torch.from_numpy(test_labels),
        class_names or tuple(str(label) for label in range(classes)),
        train.shape[1] // 8 if pad is None else pad,
        flip,
        superclasses,
        None if clean is None else torch.from_numpy(train_labels),
    )


def _cifar(
    name: str,
    torchvision_class: str,
    torchvision_folder: str,
    class_names: tuple[str, ...],
    superclasses: tuple[int, ...] | None,
    data_dir: Path | None,
) -> Dataset:
    """Read ``<name>.npz`` or torchvision's folder; download the data if there is neither."""
    folder = data_folder(data_dir)
    npz = folder / f"{name}.npz"
    if npz.exists():
        where, arrays = str(npz), read_npz(npz, ARRAYS)
    else:
        where = str(folder / torchvision_folder)
        local = Path(where).is_dir()
        try:
            arrays = _torchvision(folder, torchvision_class, download=not local)
        except (OSError, RuntimeError, EOFError, HTTPException) as error:
            if local:
                fault = f"{where} is incomplete or damaged ({one_line(error)}): remove it to download it again, or"
            else:
                fault = f"{name} is not in {folder} and cannot be downloaded ({one_line(error)}):"
            layouts = f"{name}.npz ({', '.join(ARRAYS)}) or torchvision's {torchvision_folder}"
            raise UserError(f"{fault} put {layouts} into {folder}, or use --dataset digits") from error
    for key, shape in (("train_images", (50000, 32, 32, 3)), ("test_images", (10000, 32, 32, 3))):
        if arrays[key].shape != shape:
            raise UserError(f"{where}: {key} is {arrays[key].shape}, not {shape}; npz:FILE takes other data")
    return _checked(name, where, arrays, class_names, pad=4, flip=True, superclasses=superclasses)


def _torchvision(folder: Path, dataset: str, download: bool) -> dict[str, NDArray[Any]]:
    """The four arrays from torchvision's copy in ``folder``; torchvision verifies its MD5 sums."""
    import torchvision.datasets

    arrays = {}
    with _short_timeout(), contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        for split, train in (("train", True), ("test", False)):
            part = getattr(torchvision.datasets, dataset)(folder, train=train, download=download)
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = part.data, np.asarray(part.targets)
    return arrays


@contextlib.contextmanager
def _short_timeout() -> Iterator[None]:
    """Set the default timeout of sockets, for code that sets none itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
