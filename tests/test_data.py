import io
import os
import socket
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noisysam import data
from noisysam.core import rng
from noisysam.core.errors import UserError
from noisysam.data import datasets

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_cifar = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared copy of CIFAR-10")


def small(**changes):
    """Arrays of a valid data set of three classes, with changes; a change to None leaves the array out."""
    arrays = {
        "train_images": np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3),
        "train_labels": np.array([0, 1, 2, 0, 1, 2], dtype=np.int32),
        "test_images": np.zeros((2, 8, 8, 3), np.uint8),
        "test_labels": np.array([2, 0], dtype=np.uint8),
    } | changes
    return {key: array for key, array in arrays.items() if array is not None}


def write(path, **changes):
    np.savez(path, **small(**changes))
    return path


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """CIFAR-10 by way of the plain .npz that the shared folder's script writes."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("load_cifar", SHARED / "load_cifar.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("cifar")
    np.savez(folder / "cifar10.npz", **module.load("cifar10"))
    yield data.load("cifar10", folder)
    (folder / "cifar10.npz").unlink()


@needs_cifar
def test_cifar10_is_the_published_data(cifar10):
    mean, std = cifar10.channel_statistics()
    assert mean == pytest.approx((0.49139967861519607, 0.48215840839460783, 0.44653091444546567), abs=1e-12)
    assert std == pytest.approx((0.24703223246328, 0.24348512800006, 0.26158784172796), abs=1e-12)
    assert cifar10.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert cifar10.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert cifar10.class_names[9] == "truck"
    assert (cifar10.classes, cifar10.pad, cifar10.flip, cifar10.superclasses) == (10, 4, True, None)
    assert cifar10.digest == "e5af5d481c74dfcb85212aa8a81459e36056f1f9d556b079e37db253769910ba"


def test_digits_are_scaled_and_split():
    digits = data.load("digits")
    assert digits.train_images.shape == (1348, 8, 8, 1)
    assert digits.test_images.shape == (449, 8, 8, 1)
    assert digits.train_images.max() == 255
    assert (digits.classes, digits.pad, digits.flip) == (10, 1, False)
    assert digits.digest == "38c4f886a1826343bcbd8908cc728d1e2f3a46b1e390eeb22036aa417d8a337e"
    from sklearn.datasets import load_digits

    raw = load_digits()
    np.testing.assert_array_equal(digits.test_labels.numpy(), raw.target[3::4])
    np.testing.assert_allclose(digits.test_images[..., 0].numpy() / 255 * 16, raw.images[3::4], atol=0.04)


def test_channel_statistics_agree_with_numpy():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    arrays = {key: torch.from_numpy(array) for key, array in small(train_images=images).items()}
    dataset = data.Dataset("x", **arrays, class_names=("a", "b", "c"), pad=1, flip=True)
    mean, std = dataset.channel_statistics()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)))


def test_own_data_from_npz(tmp_path):
    own = data.load(f"npz:{write(tmp_path / 'own.npz')}")
    assert own.name == "npz:own.npz"
    assert (own.classes, own.pad, own.flip) == (3, 1, True)
    assert own.class_names == ("0", "1", "2")
    assert own.train_labels.dtype == own.test_labels.dtype == torch.int64
    assert own.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    named = data.load(f"npz:{write(tmp_path / 'named.npz', class_names=np.array(['cat', 'dog', 'cow']))}")
    assert named.class_names == ("cat", "dog", "cow")


def test_digest_ignores_layout_and_sees_every_value(tmp_path):
    first = data.load(f"npz:{write(tmp_path / 'a.npz')}").digest
    arrays = small()
    images = np.asfortranarray(arrays["train_images"])
    wide = arrays["train_labels"].astype(">i8")
    assert data.load(f"npz:{write(tmp_path / 'b.npz', train_images=images, train_labels=wide)}").digest == first
    test_labels = np.array([2, 1])
    assert data.load(f"npz:{write(tmp_path / 'c.npz', test_labels=test_labels)}").digest != first
    test_images = np.zeros((2, 8, 8, 3), np.uint8)
    test_images[-1, -1, -1, -1] = 1
    assert data.load(f"npz:{write(tmp_path / 'd.npz', test_images=test_images)}").digest != first


BAD_ARRAYS = {
    "float images": ({"train_images": np.zeros((6, 8, 8, 3))}, "train_images must be uint8"),
    "no channel axis": ({"train_images": np.zeros((6, 8, 8), np.uint8)}, "train_images must be uint8"),
    "channels first": ({"train_images": np.zeros((6, 3, 8, 8), np.uint8)}, "train_images must be uint8"),
    "two channels": ({"test_images": np.zeros((2, 8, 8, 2), np.uint8)}, "test_images must be uint8"),
    "oblong": ({"train_images": np.zeros((6, 8, 4, 3), np.uint8)}, "train_images must be uint8"),
    "other test size": ({"test_images": np.zeros((2, 4, 4, 3), np.uint8)}, "test_images"),
    "empty test": ({"test_images": np.zeros((0, 8, 8, 3), np.uint8)}, "test_images is empty"),
    "float labels": ({"train_labels": np.zeros(6)}, "train_labels must be a 1-D array of integers"),
    "bool labels": ({"train_labels": np.array([True, False] * 3)}, "train_labels must be a 1-D array of integers"),
    "one-hot labels": ({"train_labels": np.eye(6, dtype=int)}, "train_labels must be a 1-D array of integers"),
    "few labels": ({"train_labels": np.array([0, 1, 2])}, "train_labels has 3 entries for 6 images"),
    "negative label": ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, "train_labels holds -1"),
    "absent class": ({"train_labels": np.array([0, 1, 3, 0, 1, 3])}, "no sample of class 2, of 4"),
    "labels from 1": ({"train_labels": np.array([1, 2, 3, 1, 2, 3])}, "no sample of class 0"),
    "huge label": ({"train_labels": np.array([0, 1, 2, 0, 1, 2**62])}, f"holds {2**62}"),
    "one class": ({"train_labels": np.zeros(6, int), "test_labels": np.zeros(2, int)}, "one class"),
    "unknown test class": ({"test_labels": np.array([0, 3])}, "test_labels holds 3"),
    "too few names": ({"class_names": np.array(["a", "b"])}, "train_labels holds 2"),
    "too many names": ({"class_names": np.array(["a", "b", "c", "d"])}, "no sample of class 3, of 4"),
    "numbers as names": ({"class_names": np.arange(3)}, "class_names must be"),
    "missing array": ({"test_labels": None}, "lacks test_labels"),
    "pickled array": ({"train_labels": np.array([0, 1, 2, 0, 1, "x"], dtype=object)}, "Python objects"),
}


@pytest.mark.parametrize(("changes", "fault"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_faulty_arrays_are_told_in_one_line(tmp_path, changes, fault):
    path = write(tmp_path / "own.npz", **changes)
    with pytest.raises(UserError) as error:
        data.load(f"npz:{path}")
    message = str(error.value)
    assert str(path) in message
    assert fault in message
    assert "\n" not in message


def _not_a_zip(path):
    path.write_bytes(b"labels")


def _empty(path):
    path.touch()


def _truncated(path):
    write(path)
    path.write_bytes(path.read_bytes()[:-200])


def _damaged(path):
    write(path)
    content = bytearray(path.read_bytes())
    content[300] ^= 255  # inside the first array: the archive's CRC no longer fits
    path.write_bytes(content)


def _plain_npy(path):
    with path.open("wb") as file:
        np.save(file, np.arange(3))


def _no_npy_inside(path):
    with zipfile.ZipFile(path, "w") as archive:
        for key in data.ARRAYS:
            archive.writestr(f"{key}.npy", "1,2,3")


def _lying_header(path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (2**60, 8, 8, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        for key in data.ARRAYS:
            archive.writestr(f"{key}.npy", buffer.getvalue())


@pytest.mark.parametrize(
    "make", [_not_a_zip, _empty, _truncated, _damaged, _plain_npy, _no_npy_inside, _lying_header, Path.mkdir]
)
def test_faulty_files_are_told_in_one_line(tmp_path, make):
    path = tmp_path / "own.npz"
    make(path)
    with pytest.raises(UserError) as error:
        data.load(f"npz:{path}")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_unknown_name():
    with pytest.raises(UserError, match=r"nowhere.npz: no such file"):
        data.load("npz:nowhere.npz")
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        data.load("cifar1")


def test_cifar_npz_must_have_the_published_shape(tmp_path):
    write(tmp_path / "cifar10.npz")
    with pytest.raises(UserError, match=r"train_images is \(6, 8, 8, 3\).*npz:FILE"):
        data.load("cifar10", tmp_path)


def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("NOISYSAM_DATA_DIR", raising=False)
    assert data.data_folder() == Path("data")
    monkeypatch.setenv("NOISYSAM_DATA_DIR", str(tmp_path))
    assert data.data_folder() == tmp_path
    assert data.data_folder(Path("given")) == Path("given")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("fault", [OSError("no route"), RuntimeError("bad sum\nsecond line"), TimeoutError()])
def test_no_network_is_told_in_one_line(monkeypatch, tmp_path, name, fault):
    import torchvision.datasets

    def offline(root, train, download):
        assert download
        assert socket.getdefaulttimeout() == datasets.DOWNLOAD_TIMEOUT
        raise fault

    monkeypatch.setattr(torchvision.datasets, name.upper(), offline)
    with pytest.raises(UserError) as error:
        data.load(name, tmp_path)
    for part in (str(tmp_path), f"{name}.npz", "torchvision's cifar-10", "--dataset digits"):
        assert part.replace("cifar-10", "cifar-100" if name == "cifar100" else "cifar-10") in str(error.value)
    assert "\n" not in str(error.value)
    assert socket.getdefaulttimeout() is None


def test_damaged_torchvision_folder_is_not_downloaded_over(monkeypatch, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cifar-10-batches-py is incomplete or damaged .* remove it"):
        data.load("cifar10", tmp_path)
    assert os.listdir(tmp_path) == ["cifar-10-batches-py"]  # noqa: PTH208


def test_torchvision_folder_gives_the_arrays(monkeypatch, tmp_path, capsys):
    import torchvision.datasets

    class Stored:
        def __init__(self, root, train, download):
            print("a message of torchvision")
            assert root == tmp_path
            assert not download
            self.data = np.zeros((50000 if train else 10000, 32, 32, 3), np.uint8)
            self.targets = [label % 100 for label in range(len(self.data))]

    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Stored)
    cifar100 = data.load("cifar100", tmp_path)
    assert cifar100.train_images.shape == (50000, 32, 32, 3)
    assert cifar100.train_labels[:101].tolist() == [*range(100), 0]
    assert len(cifar100.superclasses) == cifar100.classes == 100
    assert capsys.readouterr().out == ""


def test_superclasses_of_cifar100():
    superclasses = [datasets._COARSE[name] for name in datasets.CIFAR100_CLASSES]
    assert len(set(datasets.CIFAR100_CLASSES)) == 100
    assert np.bincount(superclasses).tolist() == [5] * 20
    # the first and last ten coarse labels of the fine classes, as in the release's meta data
    assert superclasses[:10] == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]
    assert superclasses[-10:] == [18, 1, 2, 15, 6, 0, 17, 8, 14, 13]
    assert datasets.CIFAR100_CLASSES[:3] == ("apple", "aquarium_fish", "baby")


def test_random_bits_are_pinned_and_named():
    # Philox4x64-10 keyed by sha256: these words must never change, they make published noise reproducible
    assert rng.random_bits(2, "a").tolist() == [3032838489708147381, 5340701529479776103]
    assert rng.random_bits(5, "x", 1).tolist() == rng.random_bits(9, "x/1").tolist()[:5]
    assert not np.intersect1d(rng.random_bits(1000, "x", 1), rng.random_bits(1000, "x", 2)).size
    assert rng.random_bits(0, "a").shape == (0,)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(classes=st.integers(2, 7), per_class=st.integers(4, 20), seed=st.integers(0, 99), choose=st.data())
def test_balanced_subset(classes, per_class, seed, choose):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))
    size = choose.draw(st.integers(classes, classes * per_class))
    subset = data.balanced_subset(labels, size, classes, seed)
    assert len(np.unique(subset)) == len(subset) == size
    assert (np.diff(subset) > 0).all()
    counts = np.bincount(labels[subset], minlength=classes)
    expected = [size // classes + (label < size % classes) for label in range(classes)]
    assert counts.tolist() == expected
    smaller = data.balanced_subset(labels, choose.draw(st.integers(classes, size)), classes, seed)
    assert np.isin(smaller, subset).all()


def test_balanced_subset_follows_its_seed():
    labels = np.repeat(np.arange(10), 100)
    first, again, other = (data.balanced_subset(labels, 50, 10, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize("size", [-1, 0, 2, 7, 10**9])
def test_balanced_subset_refuses(size):
    with pytest.raises(UserError):
        data.balanced_subset(np.array([0, 0, 1, 1, 2, 2]), size, 3, 0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(10, 500), fraction=st.floats(0.06, 0.9), seed=st.integers(0, 99))
def test_split_is_a_sorted_partition(n, fraction, seed):
    train, validation = data.split_validation(n, fraction, seed)
    assert len(validation) == round(n * fraction)
    assert np.sort(np.concatenate((train, validation))).tolist() == list(range(n))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert data.split_validation(n, fraction, seed)[1].tolist() == validation.tolist()


def test_split_of_nothing_and_refusals():
    train, validation = data.split_validation(7, 0.0, 0)
    assert train.tolist() == list(range(7))
    assert not len(validation)
    assert data.split_validation(1000, 0.1, 0)[1].tolist() != data.split_validation(1000, 0.1, 1)[1].tolist()
    for n, fraction in ((10, 1.0), (10, -0.1), (10, float("nan")), (10, 0.01), (2, 0.9)):
        with pytest.raises(UserError):
            data.split_validation(n, fraction, 0)


def test_reading_gives_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(f"npz:{write(tmp_path / 'own.npz')}")
