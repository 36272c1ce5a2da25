"""Study files: what cells they become, what they keep in the store, and how a fault is named."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from noisysam.cli.studies import bundled
from noisysam.core.errors import UserError
from noisysam.core.files import write_json
from noisysam.report.tables import read_cells
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import prepare
from noisysam.runs.record import load_study, study_path
from noisysam.studies import plan as plans
from noisysam.studies import study_file
from noisysam.studies.plan import Cell

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
BASE = "base: {dataset: digits, model: resnet8, epochs: 1}\n"
REPORTS = Path(__file__).resolve().parents[1] / "reports"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A study file with this text."""

    def make(text: str, name: str = "one.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


def keys(cells: list[Cell]) -> list[str]:
    return [cell.key for cell in cells]


# cells


def test_plan_is_the_product(write: Callable[..., Path]) -> None:
    cells = plans.plan(write(STUDY))
    places = [(c.config.seed, c.config.noise, c.config.width, c.row) for c in cells]
    assert places == [
        (seed, noise, width, row)
        for seed in (3, 5) for noise in (0.0, 0.2) for width in (1.0, 2.0) for row in ("SGD", "SAM")
    ]  # fmt: skip
    assert len(set(keys(cells))) == 16


def test_later_values_win(write: Callable[..., Path]) -> None:
    """Base, then grid, then row."""
    for cell in plans.plan(write(STUDY)):
        assert cell.config.noise in (0.0, 0.2), "the grid's, not the base's"
        assert cell.config.epochs == (1 if cell.row == "SAM" else 2), "the row's, not the base's"
        assert cell.config.opt == cell.row.lower()
        assert cell.config.noise_seed == cell.config.seed


def test_keys_are_those_of_the_problem_that_is_prepared(write: Callable[..., Path]) -> None:
    text = STUDY.replace("width: [1, 2]", "train_subset: [100, 200]").replace("noise: 0.4}", "val_fraction: 0.2}")
    for cell in plans.plan(write(text)):
        assert cell.key == cell.config.key(prepare(cell.config).digests)


def test_a_cell_is_the_run_of_the_same_flags(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from noisysam import cli

    flags = "--dataset digits --model resnet8 --epochs 1 --opt sam --width 1 --noise 0.2 --seed 3 --no-track --json"
    assert cli._run(["run", *flags.split(), "--store", str(tmp_path / "runs")]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    (cell,) = [c for c in plans.plan(write(STUDY)) if c.key == key]
    assert (cell.row, cell.config.noise, cell.config.width, cell.config.seed) == ("SAM", 0.2, 1.0, 3)
    assert cell.label == "SAM | symmetric 0.2 | seed 3"


def test_defaults_of_a_study(write: Callable[..., Path]) -> None:
    (cell,) = plans.plan(write("rows: {only: {dataset: digits}}\n"))
    assert (cell.config.seed, cell.config.epochs) == (0, 200)


def test_the_data_folder_is_for_every_cell_and_not_in_the_key(write: Callable[..., Path], tmp_path: Path) -> None:
    cells = plans.plan(write(STUDY), tmp_path)
    assert {cell.config.data_dir for cell in cells} == {tmp_path}
    assert keys(cells) == keys(plans.plan(write(STUDY)))


def test_merge_keys_and_anchors_work(write: Callable[..., Path]) -> None:
    text = "base: &b {dataset: digits, epochs: 3}\nrows:\n  a: {<<: *b, epochs: 4}\n  b: {<<: *b}\n"
    assert [cell.config.epochs for cell in plans.plan(write(text))] == [4, 3]


@pytest.mark.parametrize("name", ["demo", "table4", "table4-small"])
def test_bundled_studies_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell is a valid configuration (the data are not needed for that)."""

    def digests(_: Any, config: RunConfig) -> dict[str, str]:
        return {"labels": f"{config.noise_type} {config.noise} {config.noise_seed}"}

    monkeypatch.setattr(plans.Digests, "__call__", digests)
    content = study_file.read(bundled(name))
    points = 1
    for values in content.grid.values():
        points *= len(values)
    assert len(plans.plan(bundled(name))) == points * len(content.rows) * len(content.seeds)


def test_keys_of_the_committed_studies_stay(tmp_path: Path) -> None:
    """Digits need no download: these studies can be planned anywhere."""
    for name in ("precision-fp32", "precision-bf16"):
        kept = load_study(REPORTS / "records", name)["cells"]
        assert keys(plans.plan(bundled(name))) == [cell["key"] for cell in kept]


# values for single noise rates


def test_values_for_one_noise_rate(write: Callable[..., Path]) -> None:
    """Base, base at the rate, grid, row, row at the rate: later ones win."""
    text = """\
base: {dataset: digits, model: resnet8, epochs: 2, noise: {0.8: {epochs: 9, batch: 16, lr: 0.5}}}
grid: {noise: [0.2, 0.8], batch: [32]}
rows:
  SGD: {}
  SAM: {opt: sam, lr: 0.3, rho: 0.1, noise: {0.8: {rho: 0.05}}}
  one rate: {lr: 0.3, noise: {0.8: {lr: 0.4}, 0.2: {lr: 0.2}}}
"""
    cells = {(c.row, c.config.noise): c.config for c in plans.plan(write(text))}
    assert {place: c.epochs for place, c in cells.items()} == {place: 9 if place[1] == 0.8 else 2 for place in cells}
    assert {c.batch for c in cells.values()} == {32}, "the grid wins over base"
    assert (cells["SGD", 0.2].lr, cells["SGD", 0.8].lr) == (0.1, 0.5)
    assert (cells["SAM", 0.2].rho, cells["SAM", 0.8].rho) == (0.1, 0.05)
    assert cells["SAM", 0.8].lr == 0.3, "the row wins over what base says of a rate"
    assert (cells["one rate", 0.2].lr, cells["one rate", 0.8].lr) == (0.2, 0.4)


def test_a_value_for_a_rate_is_the_same_run_as_the_value(write: Callable[..., Path]) -> None:
    """The form does not enter the key."""
    special = "grid: {noise: [0.2]}\nrows: {a: {opt: sam, noise: {0.2: {rho: 0.05}}}}\n"
    assert keys(plans.plan(write(BASE + special))) == keys(
        plans.plan(write(BASE + "rows: {a: {opt: sam, noise: 0.2, rho: 0.05}}\n"))
    )


# what is refused, and where it stands

FAULTS = {
    "row's field": ("rows:\n  a: {}\n  SAM:\n    opt: sam\n    rho: big\n", 6, "row 'SAM': rho: ", "'big'"),
    "field without dashes": ("rows:\n  a:\n    weight_decay: -1\n", 4, "row 'a': weight_decay: ", "greater than"),
    "unknown field": ("rows:\n  a:\n    lr: 1\n    epoch: 3\n", 5, "there is no field epoch", "epochs?"),
    "unknown name": ("rows:\n  a:\n    lr: 1\n    opt: sma\n", 5, "row 'a'", "did you mean 'sam'?"),
    "grid": ("grid:\n  noise:\n    - 0.1\n  lr: [0.1, fast]\nrows: {a: {}}\n", 5, "row 'a': lr: ", "'fast'"),
    "base": ("grid: {noise: [0.1]}\nrows:\n  a: {momentum: 2}\n", 4, "momentum: ", "less than 1"),
    "several fields": ("rows:\n  a: {}\n  b: {opt: adamw, l2: loss}\n", 4, "row 'b'", "--l2 loss goes with sgd"),
    "seed": ("rows: {a: {}}\nseeds:\n  - 0\n  - -1\n", 5, "row 'a': seed: ", "greater than or equal to 0"),
    "kind of thing": ("rows: {a: {}}\nseeds: [0]\nretries: many\n", 4, "retries: ", "integer", "'many'"),
    "unknown key": ("rows: {a: {}}\n\nsedes: [1]\n", 4, "sedes: there is no such option, did you mean seeds?"),
    "one row": ("row: {a: {}}\n", 2, "row: there is no such option, did you mean rows?"),
    "a field at the top": ("rows: {a: {}}\nlr: 1\n", 3, "lr: there is no such option; a field of the configuration"),
    "a name that is a path": ("rows: {a: {}}\nname: ../a\n", 3, "name: "),
    "twice": ("rows:\n  a: {}\n  b: {}\n  a: {lr: 1}\n", 5, "'a' is given twice"),
    "the same run": ("grid: {lr: [1, 1.0]}\nrows:\n  a: {}\n", 4, "row 'a' has the same run twice"),
    "seeds of a row": ("rows:\n  a:\n    seeds: [3]\n", 4, "rows.a.seeds: some of the study's seeds"),
    "row and grid": ("grid: {lr: [0.1]}\nrows:\n  a:\n    lr: 1\n", 5, "row 'a' sets lr, which the grid varies"),
    "evaluation": ("rows:\n  a: {}\n  b: {eval_every: 2}\n", 4, "eval_every must be the same for all rows"),
    "evaluation at a rate": ("rows:\n  a:\n    noise:\n      0: {eval_every: 2}\n", 5, "eval_every must be the same"),
    "value at a rate": ("grid: {noise: [0.8]}\nrows:\n  a:\n    noise:\n      0.8:\n        lr: no\n", 7, "lr: "),
    "rate that no cell has": (
        "grid: {noise: [0.4, 0.8]}\nrows:\n  a:\n    noise:\n      0.5: {lr: 1}\n",
        6, "rows.a.noise.0.5: no cell has this rate (they have 0.4, 0.8)",
    ),
    "rate that is none": ("rows:\n  a:\n    noise: {high: {lr: 1}}\n", 4, "rows.a.noise.high", "noise: {0.8: {rho"),
    "values that are none": ("rows:\n  a:\n    noise: {0.0: 3}\n", 4, "rows.a.noise.0.0", "what holds at it"),
    "noise at a rate": ("rows:\n  a: {noise: {0.0: {noise_type: pair}}}\n", 3, "noise_type cannot be set for one"),
    "grid's field at a rate": (
        "grid: {noise: [0.8], lr: [1]}\nrows:\n  a: {noise: {0.8: {lr: 2}}}\n", 4, "row 'a' sets lr, which the grid"
    ),
    "a claim's row": (
        "rows: {a: {}}\nclaims:\n  - {text: x, kind: greater, rows: [a, b]}\n", 3, "number 1: no row 'b' (there are a)",
    ),
    "claims": ("rows: {a: {}}\nclaims:\n  - {nonsense: 1}\n", 3, "claims"),
}  # fmt: skip


def test_what_is_set_for_one_rate_is_kept_with_the_plan(write: Callable[..., Path], tmp_path: Path) -> None:
    """So that the row stays one row of the report."""
    text = BASE.replace("base: {", "base: {noise: {0.8: {batch: 64}}, ")
    rows = "rows:\n  a: {opt: sam}\n  b: {opt: sam, noise: {0.8: {rho: paper, lr: 0.2}}}\n"
    path = write(text + "grid: {noise: [0.4, 0.8]}\n" + rows)
    cells = plans.plan(path)
    assert {cell.row: cell.for_rate for cell in cells} == {"a": ("batch",), "b": ("batch", "lr", "rho")}
    plans.save(path, cells, tmp_path / "runs")
    kept = plans.load(tmp_path / "runs", path.stem)
    assert [cell.for_rate for cell in kept] == [cell.for_rate for cell in cells]
    variants = [cell["variant"] for cell in read_cells(tmp_path / "runs", path.stem)]
    assert variants == [""] * len(cells)


@pytest.mark.parametrize("name", ["table4-cpu"])
def test_rows_of_the_bundled_study_stay_whole(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its data: their digests are not needed here."""
    monkeypatch.setattr(plans.Digests, "__call__", lambda self, config: {"data": "d", "labels": "l"})
    path = bundled(name)
    cells = plans.plan(path)
    plans.save(path, cells, tmp_path)
    rows = list(study_file.read(path).rows)
    assert list(dict.fromkeys(cell["row"] for cell in read_cells(tmp_path, name))) == rows
    shared = [cell for cell in cells if cell.row == "SAM (paper's radius)" and cell.config.noise != 0.8]
    assert len(plans.runs(cells)) == len(cells) - len(shared) == len({cell.key for cell in cells})


def test_without_rows_the_grid_makes_them(write: Callable[..., Path]) -> None:
    cells = plans.plan(write(BASE + "grid: {opt: [sgd, sam], noise: [0.2, 0.4], lr: [0.1, 0.2]}\n"))
    found = [(cell.row, cell.config.opt, cell.config.lr) for cell in cells if cell.config.noise == 0.4]
    assert found == [(f"opt={opt}, lr={lr}", opt, lr) for opt in ("sgd", "sam") for lr in (0.1, 0.2)]
    assert len(cells) == 8
    assert [cell.row for cell in plans.plan(write(BASE + "grid: {noise: [0.2, 0.4]}\n"))] == ["all", "all"]
    with pytest.raises(UserError, match="grid"):
        plans.plan(write(BASE + "grid: {lr: 0.1}\n"))


def test_a_study_may_have_a_name(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(BASE + "name: my study\nrows: {a: {}}\n")
    assert study_file.study_name(path) == "my study"
    assert study_file.study_name(tmp_path / "gone.yaml") == "gone"
    assert plans.save(path, plans.plan(path), tmp_path / "store") == "my study"
    assert [cell.row for cell in plans.load(tmp_path / "store", "my study")] == ["a"]


def test_a_label_file_has_no_rate(write: Callable[..., Path]) -> None:
    cell = plans.plan(write(BASE + "rows: {a: {}}\n"))[0]
    own = dataclasses.replace(cell, config=cell.config.model_copy(update={"noise_type": "file:own.csv"}))
    assert own.label == "a | file:own.csv | seed 0"


def test_rows_share_a_run_and_name_their_own_seeds(write: Callable[..., Path]) -> None:
    rows = "rows:\n  a: {opt: sam}\n  b: {opt: sam, noise: {0.8: {rho: 0.05}}}\n  c: {seeds: [1]}\n"
    cells = plans.plan(write(BASE + "grid: {noise: [0.4, 0.8]}\n" + rows + "seeds: [0, 1]\n"))
    keys = {(c.row, c.config.noise, c.config.seed): c.key for c in cells}
    assert {seed for row, _, seed in keys if row == "c"} == {1}
    assert {seed for row, _, seed in keys if row == "b"} == {0, 1}
    assert keys["a", 0.4, 0] == keys["b", 0.4, 0]
    assert keys["a", 0.8, 0] != keys["b", 0.8, 0]


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_with_file_line_and_field(case: str, write: Callable[..., Path]) -> None:
    text, line, *words = FAULTS[case]
    path = write(BASE + text)
    with pytest.raises(UserError) as caught:
        plans.plan(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}"), message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("noise_seed: 7", "noise_seed"),
        ("noise_draw: bernoulli", "noise_draw"),
        ("train_subset: 300", "train_subset"),
        ("train_subset: 300, noise_draw: bernoulli", "train_subset, noise_draw"),
    ],
)
def test_rows_that_learn_from_other_labels_are_refused(row: str, field: str, write: Callable[..., Path]) -> None:
    path = write(BASE + f"grid: {{noise: [0.2, 0.4]}}\nrows:\n  a: {{}}\n  b: {{{row}}}\n")
    message = f"{path}, line 5: rows 'a' and 'b' learn from different labels at symmetric 0.2, seed 0: give them the"
    with pytest.raises(UserError, match="learn from") as caught:
        plans.plan(path)
    assert str(caught.value) == f"{message} same {field}, or put them in two studies"


def test_rows_may_differ_in_noise(write: Callable[..., Path]) -> None:
    """Other noise is another column of the table, and what the grid varies another table."""
    rows = "rows: {a: {noise: 0.2}, b: {noise: 0.4}, c: {noise_type: pair, noise: 0.2}}\n"
    assert len(plans.plan(write(BASE + "grid: {train_subset: [100, 200]}\n" + rows))) == 6


# includes


def test_included_base_and_rows_lie_below(write: Callable[..., Path]) -> None:
    write("base: {dataset: digits, model: resnet8, epochs: 5, lr: 0.3}\nrows: {SGD: {lr: 0.2}}\n", "deep/least.yaml")
    write("include: deep/least.yaml\nbase: {epochs: 4}\nrows: {SAM: {opt: sam, rho: 0.1}}\nseeds: [7]\n", "below.yaml")
    above = "include: below.yaml\nbase: {batch: 64}\nrows: {SAM: {rho: 0.2}, GCE: {method: gce}}\n"
    flat = """\
base: {dataset: digits, model: resnet8, epochs: 4, lr: 0.3, batch: 64}
rows: {SGD: {lr: 0.2}, SAM: {opt: sam, rho: 0.2}, GCE: {method: gce}}
"""
    cells = plans.plan(write(above))
    assert [(c.row, c.config.seed) for c in cells] == [("SGD", 0), ("SAM", 0), ("GCE", 0)], "seeds are not included"
    assert keys(cells) == keys(plans.plan(write(flat, "flat.yaml")))


def test_faults_in_included_files_are_named_there(write: Callable[..., Path], tmp_path: Path) -> None:
    below = write("base:\n  dataset: digits\nrows:\n  SAM: {opt: sam}\n  SGD:\n    lr: fast\n", "below.yaml")
    with pytest.raises(UserError, match="fast") as caught:
        plans.plan(write("include: below.yaml\n"))
    assert str(caught.value).startswith(f"{below}, line 6, row 'SGD': lr: ")
    write("sedes: [1]\n", "below.yaml")
    with pytest.raises(UserError, match=r"below\.yaml, line 1: sedes: there is no such option"):
        plans.plan(write("include: below.yaml\n"))


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ("rows: {a: {}}\ninclude: none.yaml\n", 2, "there is no file"),
        ("rows: {a: {}}\n\ninclude: [one.yaml]\n", 3, "the path of another study file was expected"),
        ('rows: {a: {}}\ninclude: "b\\nc.yaml"\n', 2, r"the path of another study file was expected, not 'b\nc.yaml'"),
        (f"rows: {{a: {{}}}}\ninclude: {'b' * 5000}\n", 2, "there is no file"),
        ("include: one.yaml\n", 1, "one.yaml includes this file in turn"),
        ("include: ../one/one.yaml\n", 1, "includes this file in turn"),
    ],
)
def test_bad_includes(text: str, line: int, fault: str, write: Callable[..., Path]) -> None:
    path = write(text, "one/one.yaml")
    with pytest.raises(UserError, match="include") as caught:
        plans.plan(path)
    assert str(caught.value).startswith(f"{path}, line {line}: include")
    assert fault in str(caught.value)


def test_a_circle_of_includes_is_refused(write: Callable[..., Path]) -> None:
    write("include: b.yaml\nrows: {x: {}}\n", "a.yaml")
    write("include: c.yaml\n", "b.yaml")
    last = write("base: {}\ninclude: a.yaml\n", "c.yaml")
    with pytest.raises(UserError, match="in turn") as caught:
        study_file.read(last.with_name("a.yaml"))
    assert str(caught.value).startswith(f"{last}, line 2")


# what is kept


def test_save_keeps_the_plan(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(STUDY + "published: sam-table4\n")
    cells = plans.plan(path, tmp_path / "data")
    assert plans.save(path, cells, tmp_path / "runs") == "one"
    kept = load_study(tmp_path / "runs", "one")
    assert kept["file"] == path.read_text()
    assert kept["published"] == "sam-table4"
    assert [c["key"] for c in kept["cells"]] == keys(cells)
    assert {c["row"] for c in kept["cells"]} == {"SGD", "SAM"}
    assert [c["noise"] for c in kept["cells"]] == [c.config.noise for c in cells]
    assert (kept["planned_seeds"], kept["added_seeds"], kept["claims"]) == ([3, 5], {}, [])
    assert str(tmp_path) not in json.dumps(kept["cells"]), "no paths of this machine"


def test_a_kept_plan_is_read_without_its_data(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(STUDY)
    cells = plans.plan(path)
    plans.save(path, cells, tmp_path)
    kept = plans.load(tmp_path, "one")
    assert [(c.key, c.row, c.label) for c in kept] == [(c.key, c.row, c.label) for c in cells]
    assert [c.config.recipe().optimizer_options for c in kept] == [c.config.recipe().optimizer_options for c in cells]
    for name in ("cpu-small", "precision-fp32"):  # plans of earlier versions
        assert keys(plans.load(REPORTS / "records", name))


def test_seeds_that_come_later_are_told_from_the_planned_ones(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds(*values: int) -> dict[str, Any]:
        path = write(BASE + f"rows: {{a: {{}}}}\nseeds: {list(values)}\n")
        plans.save(path, plans.plan(path), tmp_path)
        return load_study(tmp_path, "one")

    class Day(datetime.datetime):
        day_of_month = 1

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Day":
            return cls(2026, 11, cls.day_of_month, tzinfo=tz)

    monkeypatch.setattr(plans, "datetime", Day)
    assert seeds(3, 1, 2)["planned_seeds"] == [3, 1, 2]
    Day.day_of_month = 2
    kept = seeds(1, 2, 3, 4)
    assert (kept["planned_seeds"], kept["added_seeds"]) == ([3, 1, 2], {"4": "2026-11-02"})
    Day.day_of_month = 3
    kept = seeds(1, 9, 4)
    assert (kept["planned_seeds"], kept["added_seeds"]) == ([3, 1, 2], {"4": "2026-11-02", "9": "2026-11-03"})
    assert {cell["seed"] for cell in kept["cells"]} == {1, 9, 4}


def test_the_seeds_of_a_plan_without_note_were_planned(write: Callable[..., Path], tmp_path: Path) -> None:
    """Plans that an earlier version kept name only their cells."""
    path = write(BASE + "rows: {a: {}}\nseeds: [0, 1]\n")
    plans.save(path, plans.plan(path), tmp_path)
    kept = load_study(tmp_path, "one")
    for name in ("planned_seeds", "added_seeds", "claims"):
        del kept[name]
    write_json(study_path(tmp_path, "one"), kept)
    write(BASE + "rows: {a: {}}\nseeds: [0, 1, 2]\n")
    plans.save(path, plans.plan(path), tmp_path)
    kept = load_study(tmp_path, "one")
    assert kept["planned_seeds"] == [0, 1]
    assert list(kept["added_seeds"]) == ["2"]
