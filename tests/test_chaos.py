"""What a study survives: the short form of ``tests/chaos.py``, and single misfortunes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import complete

from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.studies.engines.base import Inline
from noisysam.studies.plan import Cell
from noisysam.studies.sweep import FAILURES, Sweep, TrainCell


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    path = tmp_path / "one.yaml"
    path.write_text("base: {dataset: digits, model: resnet8}\nrows: {SGD: {opt: sgd}, SAM: {opt: sam}}\n")
    return plans.plan(path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_no_fault_of_a_cell(
    cells: list[Cell], tmp_path: Path, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep ends at once, with one line; nothing is counted as a failure, so the same command goes on."""

    def fit(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        if wrapped:
            raise UserError("labels: cannot be written") from full
        raise full

    monkeypatch.setattr("noisysam.training.fit.fit", fit)
    sweep = Sweep(cells, tmp_path, TrainCell(tmp_path), Inline())
    with pytest.raises(RunFailed, match=r"the disk of .* is full: make room there, and the same command goes on"):
        list(sweep.run())
    assert (sweep.failed, sweep.left) == ({}, 2)
    assert not list(tmp_path.rglob(FAILURES))


def test_another_fault_of_the_disk_is_one(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("noisysam.training.fit.fit", fit)
    sweep = Sweep(cells, tmp_path, TrainCell(tmp_path), Inline())
    assert [outcome.state for outcome in sweep.run()] == ["failed", "failed"]


def test_what_lies_beside_a_finished_run_is_removed(cells: list[Cell], tmp_path: Path) -> None:
    """Its process was killed between its last word and its tidying up. Not while another one holds the run."""
    left = {"checkpoint.pt", "checkpoint.previous.pt", FAILURES, ".record.json.77"}
    for cell in cells:
        folder = RunFolder(tmp_path, cell.key)
        folder.write(complete({"key": cell.key}))
        with folder.lock():
            pass
        for name in left:
            (folder.path / name).touch()
    free, held = (RunFolder(tmp_path, cell.key) for cell in cells)
    with held.lock():
        for name in left:
            (held.path / name).touch()
        Sweep(cells, tmp_path, TrainCell(tmp_path), Inline())
        assert {path.name for path in held.path.iterdir()} == {"record.json", "status.json", "lock", *left}
    assert {path.name for path in free.path.iterdir()} == {"record.json", "status.json", "lock"}


@pytest.mark.services
def test_the_short_form(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script, root = Path(__file__).with_name("chaos.py"), Path(__file__).parents[1]
    form = ["--runs", "8", "--kills", "2", "--drivers", "1", "--outage", "6"]
    done = subprocess.run(
        [sys.executable, str(script), "--work", str(tmp_path / "chaos"), *form],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if "the disk is not filled" in done.stdout:
        pytest.skip("all is well, but the disk was not filled: not root")
    assert "workers killed: 2" in done.stdout
    assert "disk filled: 1" in done.stdout
