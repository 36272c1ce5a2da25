"""Studies: what a file becomes, which cells are run, and how a failed one ends. Bad files: test_cli_errors.py."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from noisysam import sweep
from noisysam.cli import bundled
from noisysam.errors import RunFailed, UserError
from noisysam.records import RECORD_SCHEMA, RunFolder, load_study
from noisysam.sweep import Cell, Outcome

STUDY = """\
base: {dataset: digits, model: resnet8, epochs: 2, noise: 0.4}
grid:
  noise: [0.0, 0.2]
  width: [1, 2]
rows:
  SGD: {opt: sgd}
  SAM: {opt: sam, epochs: 1}
seeds: [3, 5]
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "one.yaml"
    path.write_text(STUDY)
    return path


def finish(store: Path, cell: Cell, seconds: float = 1.0, status: str = "finished") -> None:
    """Put a record in the store as if the cell had run."""
    cost = {"train_seconds": seconds, "eval_seconds": seconds / 2}
    record = {"schema": RECORD_SCHEMA, "key": cell.key, "status": status, "cost": cost, "results": {"last": 0.5}}
    RunFolder(store, cell.key).write(record)


@dataclass
class Job:
    """Notes which cells it is given; fails those of some row."""

    store: Path
    fails: str = ""
    seen: list[Cell] = field(default_factory=list)

    def __call__(self, cell: Cell) -> str | None:
        self.seen.append(cell)
        if cell.row == self.fails:
            return "diverged"
        finish(self.store, cell)
        return None


# plan


def test_plan_is_the_product(study: Path) -> None:
    cells = sweep.plan(study)
    places = [(c.config.seed, c.config.noise, c.config.width, c.row) for c in cells]
    assert places == [
        (seed, noise, width, row)
        for seed in (3, 5) for noise in (0.0, 0.2) for width in (1.0, 2.0) for row in ("SGD", "SAM")
    ]  # fmt: skip
    assert len({cell.key for cell in cells}) == 16


def test_later_values_win(study: Path) -> None:
    """Base, then grid, then row."""
    for cell in sweep.plan(study):
        assert cell.config.noise in (0.0, 0.2), "the grid's, not the base's"
        assert cell.config.epochs == (1 if cell.row == "SAM" else 2), "the row's, not the base's"
        assert cell.config.opt == cell.row.lower()
        assert cell.config.noise_seed == cell.config.seed


def test_a_cell_is_the_run_of_the_same_flags(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from noisysam import cli

    flags = "--dataset digits --model resnet8 --epochs 1 --opt sam --width 1 --noise 0.2 --seed 3 --no-track --json"
    assert cli._run(["run", *flags.split(), "--store", str(tmp_path / "runs")]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    (cell,) = [c for c in sweep.plan(study) if c.key == key]
    assert (cell.row, cell.config.noise, cell.config.width, cell.config.seed) == ("SAM", 0.2, 1.0, 3)
    assert cell.label == "SAM | symmetric 0.2 | seed 3"
    assert sweep.finished(cell, tmp_path / "runs")


def test_rows_are_evaluated_alike(study: Path) -> None:
    study.write_text(STUDY.replace("{opt: sgd}", "{opt: sgd, eval_every: 5}"))
    with pytest.raises(UserError, match="eval_every must be the same for all rows"):
        sweep.plan(study)


def test_defaults_of_a_study(tmp_path: Path) -> None:
    path = tmp_path / "least.yaml"
    path.write_text("rows: {only: {dataset: digits}}\n")
    (cell,) = sweep.plan(path)
    assert (cell.config.seed, cell.config.epochs) == (0, 200)


def test_the_data_folder_is_for_every_cell_and_not_in_the_key(study: Path, tmp_path: Path) -> None:
    cells = sweep.plan(study, tmp_path)
    assert {cell.config.data_dir for cell in cells} == {tmp_path}
    assert [cell.key for cell in cells] == [cell.key for cell in sweep.plan(study)]


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text("base: &b {dataset: digits, epochs: 3}\nrows:\n  a: {<<: *b, epochs: 4}\n  b: {<<: *b}\n")
    assert [cell.config.epochs for cell in sweep.plan(path)] == [4, 3]


@pytest.mark.parametrize("name", ["demo", "table4", "table4-small"])
def test_bundled_studies_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell is a valid configuration (the data are not needed for that)."""

    @dataclass
    class Anything:
        config: Any

        @property
        def digests(self) -> dict[str, str]:
            return {"labels": f"{self.config.noise_type} {self.config.noise} {self.config.noise_seed}"}

    monkeypatch.setattr(sweep, "prepare", Anything)
    study = sweep.read(bundled(name))
    cells = sweep.plan(bundled(name))
    points = 1
    for values in study.grid.values():
        points *= len(values)
    assert len(cells) == points * len(study.rows) * len(study.seeds)


# run


def test_run_skips_what_is_finished(study: Path, tmp_path: Path) -> None:
    cells, job = sweep.plan(study), Job(tmp_path / "runs")
    for cell, status in zip(cells, ("finished", "failed", "interrupted", "running"), strict=False):
        finish(job.store, cell, status=status)
    told: list[Outcome] = []
    outcomes = sweep.run(cells, job, job.store, done=told.append)
    assert job.seen == cells[1:]
    assert [outcome.cell for outcome in outcomes] == cells[1:]
    assert told == outcomes
    assert all(outcome.error is None for outcome in outcomes)
    assert sweep.run(cells, job, job.store) == []


def test_a_failed_cell_is_an_outcome(study: Path, tmp_path: Path) -> None:
    cells, job = sweep.plan(study), Job(tmp_path / "runs", fails="SAM")
    outcomes = sweep.run(cells, job, job.store)
    assert [outcome.error for outcome in outcomes] == [None, "diverged"] * 8
    assert [outcome.cell for outcome in sweep.run(cells, job, job.store)] == cells[1::2], "failed ones are tried again"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RunFailed("diverged: no step\nmore"), "diverged: no step"),
        (UserError("no such file"), "no such file"),
        (ValueError("bad\nworse"), "ValueError: bad"),
        (KeyError(), "KeyError: "),
    ],
)
def test_errors_of_a_cell_are_one_line(
    error: Exception, line: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("noisysam.train.fit", fit)
    assert sweep.TrainCell(tmp_path)(sweep.plan(study)[0]) == line


def test_ctrl_c_ends_a_sweep(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("noisysam.train.fit", fit)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(sweep.plan(study), sweep.TrainCell(tmp_path), tmp_path)


def test_a_cell_is_trained(study: Path, tmp_path: Path) -> None:
    cell = next(c for c in sweep.plan(study) if c.row == "SAM" and c.config.width == 1)
    assert sweep.TrainCell(tmp_path)(cell) is None
    assert sweep.finished(cell, tmp_path)


# what is kept, and what it will cost


def test_save_keeps_the_plan(study: Path, tmp_path: Path) -> None:
    study.write_text(STUDY + "published: sam-table4\n")
    cells = sweep.plan(study, tmp_path / "data")
    assert sweep.save(study, cells, tmp_path / "runs") == "one"
    kept = load_study(tmp_path / "runs", "one")
    assert kept["file"] == study.read_text()
    assert kept["published"] == "sam-table4"
    assert [c["key"] for c in kept["cells"]] == [c.key for c in cells]
    assert {c["row"] for c in kept["cells"]} == {"SGD", "SAM"}
    assert [c["noise"] for c in kept["cells"]] == [c.config.noise for c in cells]
    assert str(tmp_path) not in json.dumps(kept["cells"]), "no paths of this machine"


def test_forecast(study: Path, tmp_path: Path) -> None:
    cells = sweep.plan(study)
    sgd, sam = cells[0::2], cells[1::2]
    assert sweep.forecast(cells, tmp_path) is None
    finish(tmp_path, sgd[0], 2.0)
    assert sweep.forecast(cells, tmp_path) is None, "nothing is known of the other row"
    finish(tmp_path, sgd[1], 4.0)
    finish(tmp_path, sam[0], 10.0)
    # 1.5 x mean(2, 4) for each of six, 1.5 x 10 for each of seven
    assert sweep.forecast(cells, tmp_path) == pytest.approx(6 * 4.5 + 7 * 15)
    for cell in cells:
        finish(tmp_path, cell)
    assert sweep.forecast(cells, tmp_path) is None


def test_no_ray(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--jobs needs Ray: pip install 'noisysam\[ray\]'"):
        sweep.run(sweep.plan(study), Job(tmp_path), tmp_path, jobs=2)
