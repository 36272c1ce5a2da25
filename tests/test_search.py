"""Search: the same budget for every row, judged by noisy validation labels alone, the same after an interruption."""

import json
import math
from pathlib import Path

import pytest
from samples import complete

from noisysam import cli
from noisysam.core.errors import UserError
from noisysam.report.tables import read_cells, row_table, summary_table
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder, load_study
from noisysam.runs.schema import RECORD_SCHEMA
from noisysam.runs.transfer import export_study, import_study
from noisysam.studies import plan as plans
from noisysam.studies import study_file, tuning
from noisysam.studies.engines.base import CellOutcome
from noisysam.studies.plan import Cell
from noisysam.studies.tuning import Range, Row

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


def rows_of(path: Path, asked: str | None = LR, trials: int = 4) -> list[Row]:
    return tuning.rows(path, [] if asked is None else [Range.parse(asked)], trials)


def values(row: Row, field: str = "lr") -> list[float]:
    return [point[field] for point in row.points]


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
def test_what_cannot_be_searched(text: str, asked: str, fault: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        rows_of(path, asked)


# the search


def test_every_row_has_the_same_budget(path: Path, tmp_path: Path) -> None:
    rows, train = rows_of(path, trials=8), Trainer(tmp_path)
    tuning.search(rows, tmp_path, train)
    assert tuning.over(rows, tmp_path)
    assert [row.ended(tmp_path) for row in rows] == [8, 8]
    assert len(train.cells) == 2 * 8 * 2, "rows, trials, noise rates"
    assert {cell.config.seed for cell in train.cells} == {cell.config.noise_seed for cell in train.cells} == {1000}
    assert [values(row)[0] for row in rows] == [0.3, 0.3], "what the rows have now"
    assert values(rows[0]) == values(rows[1]), "the same candidates for the same range"
    assert len(set(values(rows[0]))) == 8
    assert all(0.01 <= value <= 1 for row in rows for value in values(row))
    for cell in train.cells:  # ordinary runs
        assert cell.key == cell.config.key(plans.Digests()(cell.config))
    tuning.search(rows, tmp_path, train)
    assert len(train.cells) == 32, "nothing more to do"


def test_values_fill_the_range_evenly(path: Path) -> None:
    """Of 16 values in two fields each quarter of a range has its share, on the scale of the range."""
    path.write_text(STUDY + "search: {trials: 17, fields: {lr: {low: 0.01, high: 1, log: true},"
                    " momentum: {low: 0.1, high: 0.9}}}\n")  # fmt: skip
    row = rows_of(path, None)[0]
    assert list(row.points[0].values()) == [0.3, 0.9], "the present values"
    shares = [(math.log(p["lr"] / 0.01) / math.log(100), (p["momentum"] - 0.1) / 0.8) for p in row.points[1:]]
    for k in (0, 1):
        counts = [sum(n / 4 <= share[k] < (n + 1) / 4 for share in shares) for n in range(4)]
        assert min(counts) >= 3
    assert len({(share[0] > 0.5, share[1] > 0.5) for share in shares}) == 4


def test_validation_at_the_last_epoch_decides(path: Path, tmp_path: Path) -> None:
    """Not the test set, whose accuracies are the other way round, and not the best epoch."""
    rows = rows_of(path, trials=12)
    tuning.search(rows, tmp_path, Trainer(tmp_path))
    for row, optimum in zip(rows, (0.1, 0.03), strict=True):
        best = row.best(tmp_path)
        assert best is not None
        tried = [value for value in values(row) if value <= 0.9]
        assert best.values == {"lr": min(tried, key=lambda value: abs(math.log(value / optimum)))}
        assert best.accuracy == pytest.approx(0.87 - 0.1 * abs(math.log(best.values["lr"] / optimum)))
        assert best.present == pytest.approx(0.87 - 0.1 * abs(math.log(0.3 / optimum)))
        assert best.trials == 12


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(path: Path, tmp_path: Path) -> None:
    whole = rows_of(path, trials=6)
    tuning.search(whole, tmp_path / "whole", Trainer(tmp_path / "whole"))
    store = tmp_path / "parts"
    for limit in (3, 1, 7):  # runs until the time is up
        tuning.search(rows_of(path, trials=6), store, Trainer(store, limit))
        assert not tuning.over(rows_of(path, trials=6), store)
    rows = rows_of(path, trials=6)
    tuning.search(rows, store, Trainer(store))
    assert tuning.over(rows, store)
    assert [row.points for row in rows] == [row.points for row in whole]
    assert [row.best(store) for row in rows] == [row.best(tmp_path / "whole") for row in whole]


def test_failed_trials_count_and_never_win(path: Path, tmp_path: Path) -> None:
    rows = rows_of(path, "lr=0.85:1", trials=6)
    tuning.search(rows, tmp_path, Trainer(tmp_path))
    assert tuning.over(rows, tmp_path)
    for row in rows:
        assert any(value > 0.9 for value in values(row))
        best = row.best(tmp_path)
        assert best is not None
        assert best.values["lr"] <= 0.9
        assert best.trials == 6
    rows = rows_of(path, "lr=0.95:1")
    tuning.search(rows, tmp_path, Trainer(tmp_path))
    with pytest.raises(UserError, match="row 'SGD': all 4 trials of its search failed"):
        tuning.chosen(rows, plans.plan(path), tmp_path)


def test_the_tuned_study(path: Path, tmp_path: Path) -> None:
    """The study itself, but for the values that were found."""
    found = [tuning.Best("SAM", {"lr": 0.05}, 0.8, 0.7, 3)]
    target = tmp_path / "one-lr.yaml"
    target.write_text(tuning.tuned(path, target, found, rows_of(path)))
    assert "include: one.yaml" in target.read_text()
    expected = STUDY.replace("{opt: sam}", "{opt: sam, lr: 0.05}")
    path.with_name("other.yaml").write_text(expected)
    assert [c.key for c in plans.plan(target)] == [c.key for c in plans.plan(path.with_name("other.yaml"))]
    assert study_file.read(target).retries == 1


def test_options_of_the_tuned_study_are_kept_whole(path: Path, tmp_path: Path) -> None:
    path.write_text(
        STUDY.replace("  SGD: {opt: sgd}\n", "").replace(
            "{opt: sam}", "{method: mixup, method_option: {alpha: 8}, opt: asam, opt_option: {eta: 0.02}}"
        )
    )
    target = tmp_path / "one-rho.yaml"
    found = [tuning.Best("SAM", {"opt_option.rho": 0.7}, 0.8, None, 3)]
    target.write_text(tuning.tuned(path, target, found, rows_of(path, "opt_option.rho=0.1:2")))
    (config,) = [
        c.config for c in plans.plan(target) if c.row == "SAM" and c.config.noise == 0.2 and c.config.seed == 3
    ]
    assert config.opt_option == {"eta": 0.02, "rho": 0.7}
    assert config.method_option == {"alpha": 8}


def test_the_command(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs; no test accuracy is shown; the file that is written is a study."""
    monkeypatch.chdir(path.parent)
    path.write_text(STUDY.replace("noise: [0.2, 0.4]", "noise: [0.2]").replace("  SGD: {opt: sgd}\n", ""))
    command = ["sweep", "one.yaml", "--no-track", "--search", LR, "--trials", "2"]
    texts = []
    for _ in range(2):
        assert cli._run(command) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        no_test_accuracy(captured.err + captured.out)
    assert texts[0] == texts[1], "twice changes nothing"
    assert len(list(Path("runs").glob("*/record.json"))) == 2
    assert texts[0].startswith("SAM: lr ")
    assert texts[0].endswith("2 trials\nnoisysam sweep one-lr.yaml\n")
    assert {c.config.seed for c in plans.plan(Path("one-lr.yaml"))} == {3, 5}
    assert not list(Path("runs").glob("studies/*.json")), "the study's plan is not touched"


def no_test_accuracy(text: str) -> None:
    for record in Path("runs").glob("*/record.json"):
        last = json.loads(record.read_text())["results"]["last"]
        assert f"{100 * last:.2f} % at the last epoch" not in text


# the search of a study file

OWN = (
    STUDY.replace("noise: [0.2, 0.4]", "noise: [0.2]").replace("seeds: [3, 5]", "seeds: [3]")
    + """\
search:
  trials: 2
  fields: {lr: {low: 0.01, high: 1, log: true}}
"""
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (OWN.replace("trials: 2", "trials: 0"), "line 10: search.trials"),
        (OWN.replace("low: 0.01", "low: 2"), "line 11: search: lr: the first value must be below the second"),
        (OWN.replace("lr: {", "rho: {"), "line 11: search rho: .*row 'SGD'"),
        (OWN.replace("lr: {", "epochs: {"), "search: epochs: epochs is the same for all rows"),
        (OWN.replace("  fields", "  seed: 3\n  fields"), "line 11: search.seed: 3 is a seed of the study"),
        (OWN.replace("  fields: {lr: {low: 0.01, high: 1, log: true}}\n", ""), "row 'SGD' has no fields to search"),
        (OWN.replace("{opt: sam}", "{opt: sam, search: {lr: 3}}"), "line 6: rows.SAM.search.lr"),
        (
            STUDY.replace("{opt: sam}", "{opt: sam, search: {}}"),
            "line 6: row 'SAM' has fields to search, but",
        ),
    ],
)
def test_faults_name_their_line(text: str, fault: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        both(path)


def both(path: Path) -> tuple[list[Cell], list[Row]]:
    return plans.plan(path), rows_of(path, None)


def test_rows_with_fields_of_their_own(path: Path) -> None:
    path.write_text(OWN.replace("{opt: sam}", "{opt: sam, search: {rho: {low: 0.01, high: 0.5, log: true}}}")
                    .replace("{opt: sgd}", "{opt: sgd, search: {}}"))  # fmt: skip
    sgd, sam = rows_of(path, None)
    assert (sgd.trials, sgd.points) == (0, [])
    assert values(sam, "rho")[0] == 0.1
    assert len(sam.runs(1)) == 1
    assert sam.runs(1)[0].config.rho == values(sam, "rho")[1]


def test_a_study_with_a_search(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Trials first, then the cells with the values that were best; the trials are runs of the store and no seeds of a
    row; budget and values stand in the plan, the report and an archive; the second sweep has nothing to do."""
    monkeypatch.chdir(path.parent)
    path.write_text(OWN.replace("{opt: sam}", "{opt: sam, search: {}}"))
    store = Path("runs")
    assert cli._run(["sweep", "one.yaml", "--no-track", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to do") == 4 + 1, "two trials, two cells, the sum"
    assert cli._run(["sweep", "one.yaml", "--no-track"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("SGD: lr ")
    (searched, _) = rows_of(path, None)
    best = searched.best(store)
    assert best is not None
    plan = load_study(store, "one")
    assert {(c["row"], c["seed"]) for c in plan["cells"]} == {("SGD", 3), ("SAM", 3)}
    assert {c["row"]: c["config"]["lr"] for c in plan["cells"]} == {"SGD": best.values["lr"], "SAM": 0.3}
    found = plan["search"]
    assert (found["SGD"]["trials"], found["SAM"]["trials"]) == (2, 0)
    assert found["SGD"]["chosen"] == best.values
    assert found["SGD"]["runs"] == [cell.key for n in (0, 1) for cell in searched.runs(n)]
    assert len(list(store.glob("*/record.json"))) == 2 + 2, "trials and cells"
    assert cli._run(["sweep", "one.yaml", "--no-track"]) == 0
    assert "2 cells, 0 to do" in capsys.readouterr().err
    cells = read_cells(store, "one")
    assert list(row_table(cells)["tuning"]) == [f"2 trials: lr {best.values['lr']:g}", "0 trials"]
    assert [s["n"] for s in summary_table(cells)] == [1, 1]
    export_study(store, "one", Path("archive"))
    assert import_study(Path("archive"), Path("other")) == 4
    assert searched.best(Path("other")) == best, "the choice can be verified"
