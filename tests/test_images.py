"""Data sets of image files: folders, torchvision's and Hugging Face's; their faults in one line."""

import csv
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from noisysam import data, fit
from noisysam.core.errors import UserError
from noisysam.data import images
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import load_dataset, prepare

CLASSES = ("bird", "cat", "dog")


def picture(number: int, size: tuple[int, int] = (8, 8), colour: bool = True) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (size[1], size[0], 3) if colour else (size[1], size[0]), dtype=np.uint8)


def image_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), each: int = 4, **options: Any) -> Path:
    """PNG files PART/CLASS/N.png with the pictures 0, 1, 2, ..."""
    number = 0
    for part in parts:
        for name in CLASSES:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for _ in range(each):
                Image.fromarray(picture(number, **options)).save(root / part / name / f"{number:03}.png")
                number += 1
    return root


def test_a_folder_of_two_parts(tmp_path: Path) -> None:
    found = data.load(f"folder:{image_folder(tmp_path / 'pets')}")
    assert (found.name, found.class_names, found.size, found.pad) == ("folder:pets", CLASSES, 8, 1)
    assert found.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 == found.test_labels.tolist()
    np.testing.assert_array_equal(found.train_images[5].numpy(), picture(5))
    np.testing.assert_array_equal(found.test_images[0].numpy(), picture(12))
    assert found.files is not None
    assert found.files[5] == "train/cat/005.png"


def test_content_makes_the_digest_and_the_place_does_not(tmp_path: Path) -> None:
    first = data.load(f"folder:{image_folder(tmp_path / 'a')}")
    arrays = {name: getattr(first, name).numpy() for name in data.ARRAYS}
    np.savez(tmp_path / "same.npz", **arrays)
    assert data.load(f"npz:{tmp_path / 'same.npz'}").digest == first.digest
    assert data.load(f"folder:{image_folder(tmp_path / 'b' / 'c')}").digest == first.digest
    Image.fromarray(picture(99)).save(tmp_path / "a" / "train" / "cat" / "004.png")
    assert data.load(f"folder:{tmp_path / 'a'}").digest != first.digest


def test_a_changed_folder_is_read_again(tmp_path: Path) -> None:
    name = f"folder:{image_folder(tmp_path)}"
    first = load_dataset(name, None)
    assert load_dataset(name, None) is first
    Image.fromarray(picture(99)).save(tmp_path / "train" / "cat" / "zzz.png")
    assert len(load_dataset(name, None).train_labels) == 13


def test_without_a_test_part_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.fromarray(picture(number)).save(tmp_path / name / f"{number}.png")
    found = data.load(f"folder:{tmp_path}")
    assert (len(found.train_labels), len(found.test_labels)) == (24, 6)
    assert np.bincount(found.test_labels.numpy()).tolist() == [2, 2, 2]
    assert data.load(f"folder:{tmp_path}").digest == found.digest


def test_sizes_and_grey_images(tmp_path: Path) -> None:
    oblong = image_folder(tmp_path / "oblong", size=(12, 8))
    with pytest.raises(UserError, match="12 x 8 pixels, not 12 x 12: give --image-size"):
        data.load(f"folder:{oblong}")
    found = data.load(f"folder:{oblong}", image_size=8)
    np.testing.assert_array_equal(found.train_images[0].numpy(), picture(0, (12, 8))[:, 2:10])  # the middle of it
    grey = image_folder(tmp_path / "grey", colour=False)
    assert data.load(f"folder:{grey}").train_images.shape == (12, 8, 8, 1)
    Image.fromarray(picture(50)).save(grey / "train" / "dog" / "zzz.png")
    assert data.load(f"folder:{grey}").train_images.shape == (13, 8, 8, 3)


def test_any_data_set_can_be_resized() -> None:
    small, large = data.load("digits"), data.load("digits", image_size=16)
    assert large.train_images.shape == (1348, 16, 16, 1)
    assert (large.pad, large.digest == small.digest) == (2, False)
    np.testing.assert_allclose(  # the mean stays, as bilinear weights sum to one
        large.train_images.float().mean((1, 2)).numpy(), small.train_images.float().mean((1, 2)).numpy(), atol=8
    )


def clean_csv(root: Path, truth: dict[str, str]) -> None:
    with (root / "clean.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *truth.items()])


def test_known_correct_labels_of_a_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    files = data.load(f"folder:{root}").files or ()
    truth = {name: name.split("/")[1] for name in files} | {files[0]: "dog"}
    clean_csv(root, truth)
    found = data.load(f"folder:{root}")
    assert found.train_labels.tolist() == [2] + [0] * 3 + [1] * 4 + [2] * 4
    assert found.noisy_labels is not None
    assert found.noisy_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    noisy = prepare(RunConfig(dataset=f"folder:{root}", noise_type="given")).noisy
    assert noisy.flip_rate == 1 / 12
    with pytest.warns(UserWarning, match="--noise-type given trains on them"):
        prepare(RunConfig(dataset=f"folder:{root}"))
    clean_csv(root, dict(list(truth.items())[1:]))
    with pytest.raises(UserError, match="1 of 12 training images are not in it"):
        data.load(f"folder:{root}")
    clean_csv(root, truth | {files[3]: "cow"})
    with pytest.raises(UserError, match="label 'cow', which is no class"):
        data.load(f"folder:{root}")


def _png(size: tuple[int, int]) -> bytes:
    """The header of a PNG file that claims to be so large."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + b"IHDR" + header + b"\0\0\0\0"


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda root: root / "nowhere", "no such folder"),
    "no classes": (lambda root: _made(root / "empty"), "a folder for each class was expected"),
    "not an image": (lambda root: _with(root, b"hello"), "bad.png cannot be read as an image"),
    "cut short": (lambda root: _with(root, _png((8, 8))), "bad.png cannot be read as an image"),
    "a bomb": (lambda root: _with(root, _png((60_000, 60_000))), "bad.png cannot be read as an image"),
    "an empty class": (lambda root: _made(root / "train" / "cow").parents[1], "no sample of class 2"),
    "a class of the test alone": (lambda root: _made(root / "test" / "cow").parents[1], "'cow' has no training images"),
}


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _with(root: Path, content: bytes) -> Path:
    (root / "train" / "cat" / "bad.png").write_bytes(content)
    return root


@pytest.mark.parametrize(("prepared", "fault"), FAULTS.values(), ids=FAULTS)
def test_faulty_folders_are_told_in_one_line(tmp_path: Path, prepared: Callable[[Path], Path], fault: str) -> None:
    path = prepared(image_folder(tmp_path))
    with pytest.raises(UserError, match=fault) as error:
        data.load(f"folder:{path}")
    assert "\n" not in str(error.value)


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images.os, "sysconf", lambda name: 8)
    with pytest.raises(UserError, match="give a smaller --image-size"):
        data.load(f"folder:{image_folder(tmp_path)}")


# torchvision


def write_mnist(root: Path) -> None:
    """MNIST's own files, with 20 and 10 images."""
    folder = _made(root / "MNIST" / "raw")
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = np.stack([picture(i, (28, 28), colour=False) for i in range(count)])
        head = struct.pack(">4I", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels.tobytes())


def test_torchvision_from_local_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    found = data.load("torchvision:MNIST", tmp_path)
    assert found.train_images.shape == (20, 28, 28, 1)
    assert found.test_labels.tolist() == list(range(10))
    assert (found.name, found.flip, found.class_names[3]) == ("torchvision:MNIST", False, "3 - three")
    np.testing.assert_array_equal(found.train_images[7, ..., 0].numpy(), picture(7, (28, 28), colour=False))
    assert data.load("torchvision:MNIST", tmp_path, image_size=14).train_images.shape == (20, 14, 14, 1)


def test_torchvision_by_its_split(tmp_path: Path) -> None:
    """SVHN is read through scipy and takes split=..., not train=..."""
    from scipy.io import savemat

    for part, count in (("train", 20), ("test", 10)):
        pixels = np.stack([picture(i, (32, 32)) for i in range(count)], axis=-1)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.arange(count)[:, None] % 10 + 1})
    import torchvision.datasets

    with pytest.MonkeyPatch.context() as patch:  # its files have known sums
        patch.setattr(torchvision.datasets.svhn, "check_integrity", lambda path, md5: Path(path).exists())
        found = data.load("torchvision:SVHN", tmp_path)
    assert found.train_images.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(found.train_images[7].numpy(), picture(7, (32, 32)))


def test_torchvision_faults_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision.datasets

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    for name in ("mnist", "svhn", "stl10", "cifar"):
        for tool in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(getattr(torchvision.datasets, name), tool, offline, raising=False)
    for name in ("MNIST", "SVHN", "STL10", "CIFAR100"):
        with pytest.raises(UserError, match=rf"torchvision:{name} is not in .*npz:FILE or folder:DIR") as error:
            data.load(f"torchvision:{name}", tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'FashionMNIST'"):
        data.load("torchvision:FashionMnist")
    with pytest.raises(UserError, match="say which after the colon"):
        data.load("torchvision:")


def test_every_listed_data_set_is_torchvisions() -> None:
    import torchvision.datasets

    for name in images.TORCHVISION:
        assert issubclass(getattr(torchvision.datasets, name), torchvision.datasets.VisionDataset)


# Hugging Face


def test_hugging_face_from_a_local_copy(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    features = library.Features(
        {"img": library.Image(), "fine": library.ClassLabel(names=CLASSES), "coarse": library.ClassLabel(names="ab"),
         "clean_label": library.Value("int64")}
    )  # fmt: skip

    def split(count: int) -> Any:
        columns = {
            "img": [Image.fromarray(picture(i)) for i in range(count)],
            "fine": [i % 3 for i in range(count)],
            "coarse": [i % 2 for i in range(count)],
            "clean_label": [(i + (i == 0)) % 3 for i in range(count)],
        }
        return library.Dataset.from_dict(columns, features=features)

    library.DatasetDict({"train": split(9), "test": split(6)}).save_to_disk(str(tmp_path / "own"))
    with pytest.raises(UserError, match=r"several label columns \(fine, coarse\): choose one"):
        data.load(f"hf:{tmp_path / 'own'}")
    found = data.load(f"hf:{tmp_path / 'own'}#fine")
    assert (found.name, found.class_names) == ("hf:own", CLASSES)
    assert found.noisy_labels is not None
    assert found.noisy_labels.tolist() == [0, 1, 2] * 3
    assert found.train_labels.tolist() == [1, 1, 2, *[0, 1, 2] * 2]
    np.testing.assert_array_equal(found.train_images[4].numpy(), picture(4))
    with pytest.raises(UserError, match="give the path of a local copy") as error:
        data.load(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(error.value)


# labels that are noisy already


def given_npz(path: Path, clean: bool) -> Path:
    digits = data.load("digits")
    arrays = {name: getattr(digits, name).numpy() for name in data.ARRAYS}
    truth = arrays["train_labels"]
    arrays["train_labels"] = np.where(np.arange(len(truth)) % 4 == 0, (truth + 1) % 10, truth)
    np.savez(path, **arrays, **({"train_labels_clean": truth} if clean else {}))
    return path


@pytest.mark.parametrize("known", [True, False])
def test_given_labels_from_run_to_compare(
    known: bool, digits: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from noisysam import cli, results
    from noisysam.runs.record import RunFolder

    path = given_npz(tmp_path / "own.npz", known)
    values = {"dataset": f"npz:{path}", "noise_type": "given", "noise": 0.0}
    config = RunConfig(**{**digits().model_dump(exclude={"noise_seed"}), **values})
    result = fit(config, store=tmp_path / "store")
    record = result.record
    measured = ("memorised", "recovered", "auroc", "clean_accuracy")
    assert (record["noise"]["flip_rate"] is not None) == known
    assert [name in record["results"] for name in measured] == [known] * 4
    assert ("memorised" in RunFolder(tmp_path / "store", result.key).epochs[-1]) == known
    if known:
        chosen = prepare(config).chosen
        assert record["noise"]["flip_rate"] == pytest.approx(np.mean(chosen % 4 == 0))
    table = results(store=tmp_path / "store")
    assert ("memorised" in table) == known
    assert cli._run(["compare", result.key, "--store", str(tmp_path / "store")]) == 0
    assert ("not known" in capsys.readouterr().out) != known
    assert cli._run(["noise", "show", str(next((tmp_path / "store" / "labels").glob("*.npz")))]) == 0
    study = tmp_path / "s.yaml"
    base = {name: value for name, value in config.model_dump(mode="json").items() if value not in (None, {}, -1)}
    study.write_text(json.dumps({"base": {**base, "noise_seed": 0}, "rows": {"SGD": {}, "SAM": {"opt": "sam"}}}))
    store = ["--store", str(tmp_path / "store"), "--no-track"]
    assert cli._run(["sweep", str(study), *store]) == 0
    capsys.readouterr()
    assert cli._run(["report", "s", *store, "--out", str(tmp_path / "reports")]) == 0
    text = capsys.readouterr().out
    assert ("Memorised" in text) == known
    assert ("not known" in (tmp_path / "reports" / "s" / "report.md").read_text()) != known
    assert (tmp_path / "reports" / "s" / "figures" / "accuracy.svg").exists()


def test_without_correct_labels_an_oracle_is_refused(tmp_path: Path) -> None:
    path = given_npz(tmp_path / "own.npz", False)
    with pytest.raises(UserError, match="method o2u is told the noise rate, but the correct training labels"):
        prepare(RunConfig(dataset=f"npz:{path}", noise_type="given", method="o2u"))


def test_given_data_round_trip(tmp_path: Path) -> None:
    first = data.load(f"npz:{given_npz(tmp_path / 'own.npz', True)}")
    data.save_npz(first, tmp_path / "again.npz")
    again = data.load(f"npz:{tmp_path / 'again.npz'}")
    assert again.digest == first.digest
    assert again.noisy_labels is not None
    assert first.noisy_labels is not None
    assert again.noisy_labels.equal(first.noisy_labels)


def test_a_label_file_without_correct_labels(tmp_path: Path) -> None:
    from noisysam import noise

    labels = np.arange(12) % 3
    noisy = noise.make("given", labels, 3)
    assert (noisy.clean, noisy.flip_rate, noisy.matrix, noisy.rate) == (None, None, None, None)
    noise.save(noisy, tmp_path / "labels.npz")
    again = noise.load(tmp_path / "labels.npz")
    assert again.clean is None
    assert again.digest == noisy.digest != noise.make("given", labels, 3, given=labels).digest
    assert (tmp_path / "labels.csv").read_text().splitlines()[:2] == ["index,noisy", "0,0"]
    assert len(noise.verify(tmp_path / "labels.npz", labels)) == 1
    with pytest.raises(UserError, match="are not known"):
        _ = noisy.flipped
