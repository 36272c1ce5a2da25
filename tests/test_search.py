"""Search: the same budget for every row, judged by noisy validation labels alone, the same after an interruption."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import complete

from noisysam import cli
from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.runs.schema import RECORD_SCHEMA
from noisysam.studies import plan as plans
from noisysam.studies import study_file, tuning
from noisysam.studies.engines.base import CellOutcome
from noisysam.studies.plan import Cell
from noisysam.studies.tuning import Range, Row

pytest.importorskip("optuna")

STUDY = """\
base: {dataset: digits, model: resnet8, width: 0.25, epochs: 2, train_subset: 100, lr: 0.3}
grid:
  noise: [0.2, 0.4]
rows:
  SGD: {opt: sgd}
  SAM: {opt: sam}
seeds: [3, 5]
retries: 1
"""
LR = "lr=0.01:1:log"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "one.yaml"
    path.write_text(STUDY)
    return path


class Trainer:
    """Puts records in the store as if the cells had been trained: validation is best at a learning rate of 0.1 for SGD
    and 0.03 for SAM, test accuracy where validation is worst."""

    def __init__(self, store: Path, limit: int = 10**9) -> None:
        self.store, self.limit = store, limit
        self.batches: list[list[Cell]] = []

    def __call__(self, cells: list[Cell]) -> list[CellOutcome]:
        self.batches.append(cells)
        failed = []
        for cell in cells:
            if self.limit == 0:
                break
            self.limit -= 1
            best = 0.03 if cell.config.opt == "sam" else 0.1
            value = 0.9 - 0.1 * abs(math.log(cell.config.lr / best)) - cell.config.noise / 10
            record = {"schema": RECORD_SCHEMA, "key": cell.key, "status": "finished", "results": {"last": 1 - value}}
            folder = RunFolder(self.store, cell.key)
            if cell.config.lr > 0.9:
                failed.append(CellOutcome(cell, "failed", "diverged"))
                record["status"] = "failed"
            folder.write(complete(record))
            lines = [{"stage": 0, "epoch": k, "val_accuracy": v, "test_accuracy": 1 - value}
                     for k, v in enumerate((0.99, value))]  # fmt: skip
            folder.write_epochs(lines)
        return failed

    @property
    def cells(self) -> list[Cell]:
        return [cell for batch in self.batches for cell in batch]


def rows_of(path: Path, store: Path, text: str = LR) -> list[Row]:
    return tuning.rows(path, plans.plan(path), Range.parse(text), store)


def values(row: Row) -> list[float]:
    return [row.rounded(trial.params[row.asked.field]) for trial in row.trials()]


# ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=0.01:1:log", Range("lr", 0.01, 1.0, True)),
        ("batch=16:256", Range("batch", 16.0, 256.0, False)),
        ("opt_option.rho=0:1", Range("opt_option.rho", 0.0, 1.0, False)),
    ],
)
def test_ranges(text: str, expected: Range) -> None:
    assert Range.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("lr", "write it as FIELD=low:high"),
        ("lr=1", "write it as FIELD=low:high"),
        ("lr=a:b", "write it as FIELD=low:high"),
        ("lr=0:1:ln", "write it as FIELD=low:high"),
        ("lr=1:0.1", "the first value must be below the second"),
        ("lr=0.1:inf", "the first value must be below the second"),
        ("lr=0:1:log", "with log both values must be above 0"),
        ("epochs=1:100", "epochs is the same for all rows"),
        ("noise=0:1", "noise is the same for all rows"),
    ],
)
def test_bad_ranges(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Range.parse(text)


def test_fields_and_options() -> None:
    config = RunConfig(dataset="digits", opt="sam", method="gce", method_option={"q": 0.5})
    assert Range.parse("lr=0.01:1").set(config, 0.2).lr == 0.2
    tuned = Range.parse("method_option.q=0:1").set(config, 0.3)
    assert tuned.method_option == {"q": 0.3}
    assert Range.parse("rho=0:1").get(config) == 0.1, "the default of the optimizer"
    assert Range.parse("method_option.q=0:1").get(config) == 0.5
    assert Range.parse("lr=0.2:1").get(config) is None, "out of the range"
    assert [Range.parse(f"{f}=0:9").whole(config) for f in ("batch", "lr", "rho", "method_option.q", "sam_m")] == [
        True, False, False, False, True,
    ]  # fmt: skip
    for field in ("norm", "method_option.k", "learning"):
        with pytest.raises(UserError, match="it takes no numbers here, or there is no such field"):
            Range.parse(f"{field}=0:1").whole(config)


@pytest.mark.parametrize(
    ("text", "asked", "fault"),
    [
        (STUDY.replace("lr: 0.3", "val_fraction: 0"), LR, "row 'SGD' holds nothing out"),
        (STUDY, "rho=0.01:1", "--search rho"),
        (STUDY.replace("grid:\n", "grid:\n  lr: [0.1]\n"), LR, "has it in the grid, or for single noise rates"),
        (STUDY.replace("{opt: sam}", "{opt: sam, noise: {0.4: {lr: 1}}}"), LR, "or for single noise rates"),
    ],
)
def test_what_cannot_be_searched(text: str, asked: str, fault: str, path: Path, tmp_path: Path) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        rows_of(path, tmp_path / "runs", asked)


# the search


def test_every_row_has_the_same_budget(path: Path, tmp_path: Path) -> None:
    rows, train = rows_of(path, tmp_path), Trainer(tmp_path)
    assert tuning.search(rows, 8, tmp_path, 1, train)
    assert [len(row.trials("COMPLETE", "PRUNED")) for row in rows] == [8, 8]
    assert len(train.cells) == 2 * 8 * 2, "rows, trials, noise rates"
    assert {cell.config.seed for cell in train.cells} == {3}, "the study's first seed"
    assert [values(row)[0] for row in rows] == [0.3, 0.3], "what the rows have now"
    assert values(rows[0])[1:5] == values(rows[1])[1:5], "the same candidates, until results tell them apart"
    assert all(0.01 <= value <= 1 for row in rows for value in values(row))
    keys = {(c.config.opt, c.config.lr, c.config.noise): c.key for c in train.cells}
    for cell in train.cells:  # ordinary runs
        assert cell.key == cell.config.key(plans.Digests()(cell.config)) == keys[c_place(cell)]
    assert tuning.search(rows, 8, tmp_path, 1, train)
    assert len(train.cells) == 32, "nothing more to do"


def c_place(cell: Cell) -> tuple[str, float, float]:
    return (cell.config.opt, cell.config.lr, cell.config.noise)


def test_validation_at_the_last_epoch_decides(path: Path, tmp_path: Path) -> None:
    """Not the test set, whose accuracies are the other way round, and not the best epoch."""
    rows = rows_of(path, tmp_path)
    tuning.search(rows, 12, tmp_path, 1, Trainer(tmp_path))
    for row, optimum in zip(rows, (0.1, 0.03), strict=True):
        best = row.best()
        assert best is not None
        tried = [value for value in values(row) if value <= 0.9]
        assert best.value == min(tried, key=lambda value: abs(math.log(value / optimum)))
        assert best.accuracy == pytest.approx(0.87 - 0.1 * abs(math.log(best.value / optimum)))  # mean over noise
        assert best.present == pytest.approx(0.87 - 0.1 * abs(math.log(0.3 / optimum)))
        assert best.trials == 12


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(path: Path, tmp_path: Path) -> None:
    whole = rows_of(path, tmp_path / "whole")
    tuning.search(whole, 6, tmp_path / "whole", 1, Trainer(tmp_path / "whole"))
    store = tmp_path / "parts"
    for limit in (3, 1, 7):  # runs until the time is up
        assert not tuning.search(rows_of(path, store), 6, store, 1, Trainer(store, limit))
    train = Trainer(store)
    rows = rows_of(path, store)
    assert tuning.search(rows, 6, store, 1, train)
    assert [values(row) for row in rows] == [values(row) for row in whole]
    assert [row.best() for row in rows] == [row.best() for row in whole]


def test_failed_trials_count_and_never_win(path: Path, tmp_path: Path) -> None:
    rows = rows_of(path, tmp_path, "lr=0.85:1")
    assert tuning.search(rows, 6, tmp_path, 1, Trainer(tmp_path))
    for row in rows:
        assert len(row.trials("PRUNED")) == sum(value > 0.9 for value in values(row)) > 0
        best = row.best()
        assert best is None or (best.value <= 0.9 and best.trials == 6)


def test_several_trials_at_once_where_there_is_room(path: Path, tmp_path: Path) -> None:
    train = Trainer(tmp_path)
    tuning.search(rows_of(path, tmp_path), 6, tmp_path, 8, train)
    assert [len(batch) for batch in train.batches] == [8, 8, 8], "two trials of two rows at two rates"


def test_another_range_or_study_is_another_search(path: Path, tmp_path: Path) -> None:
    tuning.search(rows_of(path, tmp_path), 2, tmp_path, 1, Trainer(tmp_path))
    assert [len(row.trials()) for row in rows_of(path, tmp_path)] == [2, 2]
    assert all(not row.trials("COMPLETE") for row in rows_of(path, tmp_path, "lr=0.01:2:log"))
    path.write_text(STUDY.replace("epochs: 2", "epochs: 3"))
    assert all(not row.trials("COMPLETE") for row in rows_of(path, tmp_path))


def test_the_tuned_study(path: Path, tmp_path: Path) -> None:
    """The study itself, but for the values that were found."""
    found = [tuning.Best("SAM", 0.05, 0.8, 0.7, 3)]
    target = tmp_path / "one-lr.yaml"
    target.write_text(tuning.tuned(path, target, Range.parse(LR), found, plans.plan(path)))
    assert "include: one.yaml" in target.read_text()
    expected = STUDY.replace("{opt: sam}", "{opt: sam, lr: 0.05}")
    path.with_name("other.yaml").write_text(expected)
    assert [c.key for c in plans.plan(target)] == [c.key for c in plans.plan(path.with_name("other.yaml"))]
    assert study_file.read(target).retries == 1


def test_options_of_the_tuned_study_are_kept_whole(path: Path, tmp_path: Path) -> None:
    path.write_text(
        STUDY.replace("{opt: sam}", "{method: mixup, method_option: {alpha: 8}, opt: asam, opt_option: {eta: 0.02}}")
    )
    asked, target = Range.parse("opt_option.rho=0.1:2"), tmp_path / "one-rho.yaml"
    found = [tuning.Best("SAM", 0.7, 0.8, None, 3)]
    target.write_text(tuning.tuned(path, target, asked, found, plans.plan(path)))
    (config,) = [
        c.config for c in plans.plan(target) if c.row == "SAM" and c.config.noise == 0.2 and c.config.seed == 3
    ]
    assert config.opt_option == {"eta": 0.02, "rho": 0.7}
    assert config.method_option == {"alpha": 8}


def test_the_command(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs; no test accuracy is shown; the file that is written is a study whose tuned cells have run."""
    monkeypatch.chdir(path.parent)
    path.write_text(STUDY.replace("noise: [0.2, 0.4]", "noise: [0.2]").replace("  SGD: {opt: sgd}\n", ""))
    command = ["sweep", "one.yaml", "--no-track", "--search", LR, "--trials", "2"]
    texts = []
    for _ in range(2):
        assert cli._run(command) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        for record in Path("runs").glob("*/record.json"):
            last = json.loads(record.read_text())["results"]["last"]
            assert f"{100 * last:.2f} % at the last epoch" not in captured.err + captured.out
    assert texts[0] == texts[1], "twice changes nothing"
    assert len(list(Path("runs").glob("*/record.json"))) == 2
    assert texts[0].startswith("SAM: lr ")
    assert texts[0].endswith("2 trials\nnoisysam sweep one-lr.yaml\n")
    first = {c.config.seed: c for c in plans.plan(Path("one-lr.yaml"))}[3]
    assert (Path("runs") / first.key / "record.json").exists()
    assert not list(Path("runs").glob("studies/*.json")), "the study's plan is not touched"


def test_without_optuna(path: Path, tmp_path: Path, no_optuna: Callable[[], None]) -> None:
    no_optuna()
    with pytest.raises(UserError, match=r"--search needs Optuna: pip install 'noisysam\[search\]'"):
        rows_of(path, tmp_path)


@pytest.fixture
def no_optuna(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    import builtins

    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest, **more)

    return lambda: monkeypatch.setattr(builtins, "__import__", without)
