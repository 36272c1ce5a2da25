"""A run whose predictions fell to one class: said in record, tables, `compare`, on the terminal and in MLflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from samples import complete

import noisysam
from noisysam import cli
from noisysam.core.files import write_json
from noisysam.report import tables
from noisysam.runs.compare import compare
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.runs.summary import collapsed
from noisysam.tracking.tracker import Tracker
from noisysam.training.fit import fit


def spread(*columns: float) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Equally many test images of each class, predicted as the classes with these shares."""
    return np.tile(np.round(100 * np.array(columns)).astype(np.int64), (len(columns), 1))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (spread(1, 0, 0, 0), True),
        (spread(0, 0.9, 0.1, 0), True),
        (spread(0, 0.89, 0.11, 0), False),
        (spread(0.5, 0.5), False),
        (spread(0, 1), True),
        (np.diag([25, 25, 25, 25]), False),
        (np.array([[95, 0], [5, 0]]), False),  # the class that most images are of
        (np.array([[0, 95], [0, 5]]), True),  # the other one
    ],
)
def test_definition(counts: Any, expected: bool) -> None:
    assert collapsed(counts) is expected


def run_folder(store: Path, key: str, counts: Any, **changes: Any) -> RunFolder:
    folder = RunFolder(store, key)
    config = complete({})["config"] | {"noise_type": "symmetric"}
    folder.write(complete({"key": key, "config": config, **changes}))
    if counts is not None:
        folder.write_confusion(counts)
    return folder


def test_records_that_do_not_say_it(tmp_path: Path) -> None:
    """Those of earlier versions: it is computed from their confusion matrix, if they have one."""
    assert run_folder(tmp_path, "aa", spread(1, 0)).collapsed is True
    assert run_folder(tmp_path, "bb", spread(0.5, 0.5)).collapsed is False
    assert run_folder(tmp_path, "cc", None).collapsed is None
    assert run_folder(tmp_path, "dd", None, collapsed=True).collapsed is True
    assert run_folder(tmp_path, "ee", spread(1, 0), status="failed", error="?").collapsed is None
    (tmp_path / "aa" / "confusion.csv").write_text("1,2\n3")
    with pytest.warns(UserWarning, match="confusion.csv: cannot be read"):
        assert RunFolder(tmp_path, "aa").collapsed is None


def test_tables_and_compare(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, key, counts) for key, counts in (("aa", spread(1, 0)), ("bb", spread(0.5, 0.5)))]
    cells = [
        {"row": "SGD", "key": key, "noise": 0.4, "seed": seed, "config": {"noise_type": "symmetric"}}
        for seed, key in enumerate(("aa", "bb"))
    ]
    write_json(tmp_path / "studies" / "s.json", {"schema": 1, "file": "", "name": "s", "cells": cells})
    read = tables.read_cells(tmp_path, "s")
    (summary,) = tables.summary_table(read)
    assert summary["collapsed"] == 1
    assert tables.layout([summary])["40 %"][0] == "50.00 ± 0.00 (50.00, 50.00; 1 collapsed)"
    assert "at least 90 % of the test images" in tables.remark("last", read, marked=False)
    assert list(tables.row_table(read)["collapsed runs"]) == ["1"]
    assert list(noisysam.results(store=tmp_path)["collapsed"]) == [True, False]
    table = compare(folders).set_index("run")
    assert list(table.loc["collapsed to one class"]) == ["yes", "no"]
    sound = tables.read_cells(tmp_path, "s")[1:]
    assert "collapsed runs" not in tables.row_table(sound)
    assert "ollapsed" not in tables.remark("last", sound, marked=False)
    assert "collapsed to one class" not in set(compare(folders[1:])["run"])


def test_a_real_run(digits: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that is far too large leaves a network that says the same of every image."""
    config = digits(norm="none", lr=5.0, momentum=0.0, epochs=1)
    result = fit(config, store=tmp_path)
    folder = RunFolder(tmp_path, result.key)
    counts = folder.confusion
    assert counts is not None
    assert counts.sum(0).max() == counts.sum()
    assert result.record["collapsed"] is True
    assert folder.collapsed is True
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracker(folder, uri, "e").sync(final=True)
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.data.tags["noisysam.collapsed"].startswith("collapsed: at least 90 %")
    values = config.model_dump(exclude_defaults=True, exclude={"noise_seed"})
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert cli._run(["run", *flags, "--store", str(tmp_path), "--no-track"]) == 0
    assert "  collapsed: nearly all test images" in capsys.readouterr().out
