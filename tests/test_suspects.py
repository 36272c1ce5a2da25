"""Wrong labels found with a trained network: what is chosen, its precision and recall, the files."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from noisysam import cli, data, fit, suspects
from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import prepare


@pytest.fixture(scope="module")
def trained(digits: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, str]:
    """A run that has learnt most of the digits, with 30 % of the labels wrong."""
    store = tmp_path_factory.mktemp("store")
    config = digits(train_subset=600, epochs=12, noise=0.3, width=0.5, snapshots=3, noise_type="symmetric-exclusive")
    return store, config, fit(config, store=store).key


def test_most_wrong_labels_are_found(trained: tuple[Path, RunConfig, str]) -> None:
    store, config, key = trained
    found = suspects(key, store)
    figures, table = found.figures, found.table
    assert (figures["images"], figures["wrong labels"], figures["moments"]) == (600, 180, 5)
    assert figures["precision"] > 0.75
    assert figures["recall"] > 0.75
    assert figures["auroc"] > 0.9
    # the figures are those of the table, and the table that of the labels
    noisy, chosen = prepare(config).noisy, prepare(config).chosen
    wrong = dict(zip(chosen.tolist(), noisy.flipped.tolist(), strict=True))
    assert table["wrong"].tolist() == [wrong[i] for i in table["index"]]
    assert figures["precision"] == pytest.approx(table["wrong"].mean())
    assert figures["recall"] == pytest.approx(table["wrong"].sum() / 180)
    assert table["held_out"].any()
    assert table["probability_wrong"].is_monotonic_decreasing
    given = dict(zip(chosen.tolist(), noisy.labels.tolist(), strict=True))
    assert table["given"].astype(int).tolist() == [given[i] for i in table["index"]]
    assert (table["suggested"] != table["given"]).all()
    other = table["predicted"] != table["given"]
    assert table["suggested"][other].tolist() == table["predicted"][other].tolist()
    assert (table["suggested"] == table["true"])[table["wrong"]].mean() > 0.8
    np.testing.assert_array_equal(found.images(3), data.load("digits").train_images[table["index"].to_numpy()[:3]])


def test_a_number_of_them(trained: tuple[Path, RunConfig, str]) -> None:
    store, _, key = trained
    few, many = suspects(key, store, count=20), suspects(key, store, count=200)
    assert (len(few.table), len(many.table)) == (20, 200)
    assert few.table["index"].tolist() == many.table["index"].tolist()[:20]
    assert few.figures["precision"] >= many.figures["precision"]
    with pytest.raises(UserError, match="give 1 or more"):
        suspects(key, store, count=0)


def test_the_command_writes_a_list_and_a_sheet(
    trained: tuple[Path, RunConfig, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _, key = trained
    assert cli._run(["suspects", key[:6], "--store", str(store), "--out", str(tmp_path), "--count", "30"]) == 0
    said = capsys.readouterr().out
    assert "30 of 600 labels are probably wrong" in said
    assert "180 are wrong: precision" in said
    assert len(re.findall(r"^  \d+: labelled (\d), perhaps (?!\1)\d$", said, re.M)) == 10
    assert len(pd.read_csv(tmp_path / "suspects.csv")) == 30
    with Image.open(tmp_path / "suspects.png") as picture:
        assert min(picture.size) > 400
        assert len(np.unique(np.asarray(picture))) > 50
    assert cli._run(["suspects", "nowhere", "--store", str(store)]) == 2


def test_where_the_truth_is_not_known_nothing_is_said_of_it(
    digits: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, root = data.load("digits"), tmp_path / "own"
    for i in range(120):
        place = root / images.class_names[(int(images.train_labels[i]) + (i % 5 == 0)) % 10]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.train_images[i, ..., 0].numpy()).save(place / f"{i:04}.png")
    config = digits(epochs=2).model_copy(
        update={"dataset": f"folder:{root}", "noise_type": "given", "noise": 0.0, "train_subset": None}
    )
    result = fit(config, store=tmp_path / "store")
    assert cli._run(["suspects", result.key, "--store", str(tmp_path / "store"), "--count", "5"]) == 0
    said = capsys.readouterr().out
    assert "precision" not in said
    table = pd.read_csv(result.folder / "suspects.csv")
    assert not {"true", "wrong"} & set(table)
    assert all((root / file).exists() for file in table["file"])


def test_confident_learning_is_imported_only_where_it_is_asked_for(trained: tuple[Path, RunConfig, str]) -> None:
    store, _, key = trained
    suspects(key, store)
    assert "cleanlab" not in sys.modules
    try:
        import cleanlab  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs cleanlab, whose licence is AGPL"):
            suspects(key, store, by="confident-learning")
        return
    found = suspects(key, store, by="confident-learning")
    assert found.figures["precision"] > 0.7
    assert found.figures["recall"] > 0.5
