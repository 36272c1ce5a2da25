"""Runs side by side: what differs is shown, what is the same is not."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from samples import complete

from noisysam.core.errors import UserError
from noisysam.core.files import write_json
from noisysam.runs.compare import compare
from noisysam.runs.record import RunFolder, find_run
from noisysam.tracking.pages import comparison as page


def record(key: str, opt: str, last: float, **changes: Any) -> dict[str, Any]:
    return complete({
        "schema": 1, "key": key, "status": "finished", "oracle": [], "resolved": {"precision": "fp32"},
        "config": {"dataset": "digits", "noise": 0.4, "method": "ce", "opt": opt, "rho": 0.2},
        "optimizer_options": {"rho": 0.2} if opt == "sam" else {}, "method_options": {},
        "noise": {"digest": "ab" * 32, "flip_rate": 0.36},
        "results": {"last": last, "best": 0.9, "nll": 1.5},
        "cost": {"gradient_evaluations": 2.0 if opt == "sam" else 1.0, "train_seconds": 12.3}, **changes,
    })  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for key, opt, last in (("aa11", "sgd", 0.5), ("aa22", "sam", 0.625), ("bb33", "sam", 0.5)):
        RunFolder(tmp_path, key).write(record(key, opt, last))
    return tmp_path


def test_the_page_that_compares_them(store: Path) -> None:
    folders = [find_run(store, key) for key in ("aa11", "aa22")]
    assert page(folders) is None
    for n, folder in enumerate(folders):
        state = {"uri": "sqlite:////x/mlflow.db", "experiment_id": "7", "run_id": f"r{n}"}
        write_json(folder.path / "tracking.json", state)
    found = page(folders)
    assert found is not None
    assert unquote(found) == '/#/compare-runs?runs=["r0", "r1"]&experiments=["7"]&workflowType=machine_learning'
    write_json(folders[1].path / "tracking.json", {**state, "uri": "sqlite:////y/mlflow.db"})
    assert page(folders) is None


def test_what_differs_and_by_how_much(store: Path) -> None:
    table = compare([find_run(store, key) for key in ("aa11", "aa22")]).set_index("run")
    assert list(table.columns) == ["aa11", "aa22"]
    assert list(table.loc["opt"]) == ["sgd", "sam"]
    assert list(table.loc["sam: rho"]) == ["-", "0.2"]
    assert list(table.loc["test accuracy, last epoch (%)"]) == ["50.00", "62.50 (+12.50)"]
    assert list(table.loc["best on test, oracle (%)"]) == ["90.00", "90.00"]
    assert list(table.loc["gradient evaluations per image"]) == ["1.00", "2.00"]
    assert not {"dataset", "noise", "rho", "selected on noisy validation (%)"} & set(table.index)


def test_a_key_may_be_shortened(store: Path) -> None:
    assert find_run(store, "b").key == "bb33"
    with pytest.raises(UserError, match=r"^.aa. is the beginning of 2 runs .*: aa11, aa22;"):
        find_run(store, "aa")
    for wrong in ("cc", "../aa11", "*"):
        with pytest.raises(UserError, match="no run"):
            find_run(store, wrong)


def test_an_unfinished_run_is_refused(store: Path) -> None:
    RunFolder(store, "cc44").write(record("cc44", "sgd", 0.1, status="failed"))
    with pytest.raises(UserError, match=r"only finished runs can be compared: cc44 \(failed\)"):
        compare([find_run(store, "aa11"), find_run(store, "cc44")])
