"""Reports: every number recomputed with numpy from the records, what is lacking named, what does not fit refused."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from samples import complete, partial_store, trained_store

import noisysam
import noisysam.report as reports
from noisysam.core.errors import UserError
from noisysam.core.files import write_json
from noisysam.data.datasets import CIFAR10_CLASSES
from noisysam.report import document, figures, published, read_cells, report, summary_table
from noisysam.report.claims import judge_all
from noisysam.report.document import svg
from noisysam.report.frame import COLUMNS
from noisysam.report.glossary import GLOSSARY
from noisysam.report.sentences import sentences
from noisysam.report.statistics import share_interval
from noisysam.report.tables import classes, layout, remark, row_table, speed_remark
from noisysam.runs.record import RunFolder, study_path
from noisysam.studies.claims import Claim

ROWS = {
    "sgd": {"opt": "sgd", "epochs": 2},
    "sam": {"opt": "sam", "epochs": 2},
    "sam paper": {"opt": "sam", "epochs": 2, "rho": "paper"},
}
RATES, SEEDS = (0.2, 0.8), (0, 1, 2)
FIGURES = ("last", "last_ten", "selected", "best", "memorised", "recovered", "auroc")


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered, which takes most of the time of a report, except where bytes are compared."""
    if request.function is not test_same_records_same_bytes:
        monkeypatch.setattr(document, "svg", lambda drawing: "<svg/>")
        monkeypatch.setattr(document, "write_png", lambda path, drawing: None)


def key(row: str, noise: float, seed: int) -> str:
    return f"{row.replace(' ', '')}{noise:g}x{seed}"


def make_config(row: str, noise: float, seed: int) -> dict[str, Any]:
    common = {"dataset": "cifar10", "noise_type": "symmetric", "noise": noise, "seed": seed, "noise_seed": seed}
    steps = {
        "base_opt": "sgd",
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup": 2,
    }
    recipe = {"augment": "standard", "noise_draw": "exact", "batch": 128, "lr": 0.1, "sam_m": None, "rho": None}
    return {**common, **steps, **recipe, **ROWS[row]}


def make_record(row: str, noise: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([list(ROWS).index(row), round(10 * noise), seed])
    perturbs = row.startswith("sam")
    made = {
        "schema": 1,
        "key": key(row, noise, seed),
        "status": "finished",
        "config": make_config(row, noise, seed),
        "optimizer_options": {"rho": 0.05 if row == "sam paper" and noise == 0.8 else 0.1, "m": 32} if perturbs else {},
        "resolved": {"device": "cpu", "device_name": "a CPU", "precision": "fp32", "threads": 1},
        "oracle": ["rho per rate"] if row == "sam paper" else [],
        "revisions": {f"optimizer {ROWS[row]['opt']}": 1, "method ce": 1},
        "noise": {
            "flip_rate": 0.9 * noise + 0.001 * seed,
            "digest": f"{round(10 * noise)}{seed}" * 32,
            "matrix": [[1 - noise, noise], [noise, 1 - noise]],
        },
        "data": {"train": 100, "val": 10, "test": 50},
        "model": {"name": "resnet32", "parameters": 464154},
        "environment": {"commit": "abc1234"},
        "started": f"2026-11-2{seed + 1}T18:00:00+00:00",
        "ended": f"2026-11-2{seed + 2}T01:00:00+00:00",
        "results": {name: float(rng.random()) for name in FIGURES} | {"best_epoch": 1},
        "cost": {
            "gradient_evaluations": 2.0 if perturbs else 1.0,
            "gradient_samples": 400 if perturbs else 200,
            "images_per_second": 1000.0 + seed,
            "train_seconds": 60.0 * (seed + 1),
        },
        "error": None,
    }
    return complete(made)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three rows, two rates, three seeds; one cell missing, one failed, one without validation."""
    cells = []
    for seed in SEEDS:
        for noise in RATES:
            for row in ROWS:
                config = make_config(row, noise, seed)
                place = {"row": row, "noise_type": "symmetric", "noise": noise, "seed": seed}
                cells.append({**place, "key": key(row, noise, seed), "config": config})
                if (row, noise, seed) == ("sgd", 0.8, 2):
                    continue
                record = make_record(row, noise, seed)
                if (row, noise, seed) == ("sam", 0.8, 1):
                    trace = "Traceback (most recent call last):\n  File\nValueError: it broke\n"
                    record |= {"status": "failed", "results": {}, "error": trace}
                RunFolder(tmp_path, record["key"]).write(record)
    write_json(study_path(tmp_path, "toy"), {"schema": 1, "name": "toy", "file": "", "published": None, "cells": cells})
    return tmp_path


def edit(store: Path, name: str, **changes: Any) -> None:
    folder = RunFolder(store, name)
    record = folder.record
    assert record is not None
    folder.write(complete({**record, **changes}))


def values(row: str, noise: float, measure: str, seeds: tuple[int, ...] = SEEDS) -> np.ndarray[Any, Any]:
    return np.array([make_record(row, noise, seed)["results"][measure] for seed in seeds])


@pytest.mark.parametrize("measure", FIGURES)
def test_means_and_spreads(store: Path, measure: str) -> None:
    table = {(s["row"], s["noise"]): s for s in summary_table(read_cells(store, "toy"), measure)}
    assert list(table) == [(row, noise) for row in ROWS for noise in RATES]
    for (row, noise), summary in table.items():
        seeds = {("sgd", 0.8): (0, 1), ("sam", 0.8): (0, 2)}.get((row, noise), SEEDS)
        expected = values(row, noise, measure, seeds)
        assert summary["n"] == len(seeds)
        assert summary["mean"] == pytest.approx(expected.mean(), rel=1e-12)
        assert summary["sd"] == pytest.approx(expected.std(ddof=1), rel=1e-12)
        assert summary["flip_rate"] == pytest.approx(np.mean([0.9 * noise + 0.001 * seed for seed in seeds]))
    assert (table["sgd", 0.8]["missing"], table["sgd", 0.8]["failed"]) == (1, 0)
    assert (table["sam", 0.8]["missing"], table["sam", 0.8]["failed"]) == (0, 1)
    assert json.loads(json.dumps(list(table.values()))) == list(table.values())


def test_the_figure_names_its_bars_where_there_are_any(store: Path, tmp_path: Path) -> None:
    said = "noise rate; ± standard deviation over seeds."
    assert said in (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    plan = json.loads(study_path(store, "toy").read_text())
    write_json(study_path(store, "toy"), {**plan, "cells": [c for c in plan["cells"] if c["seed"] == 0]})
    assert said not in (report(store, "toy", tmp_path / "one").folder / "report.md").read_text()


def test_main_table_as_printed(store: Path, tmp_path: Path) -> None:
    text = (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    main = text.split("## Test accuracy at the last epoch (%)")[1].split("##")[0]
    printed_lines = [line for line in main.splitlines() if line.startswith("|")]
    lines = [
        [re.sub(r"\[\^r\d\]$", "", field.strip()) for field in line.strip("|").split("|")] for line in printed_lines
    ]
    assert lines[0] == ["row", "m", "rho", "20 %", "80 %"]

    def printed(row: str, noise: float, seeds: tuple[int, ...] = SEEDS, lacking: str = "") -> str:
        v = 100 * values(row, noise, "last", seeds)
        shown = f"{v.mean():.2f} ± {v.std(ddof=1):.2f} ({', '.join(f'{value:.2f}' for value in v)}{lacking})"
        means = {r: values(r, noise, "last", some.get((r, noise), SEEDS)).mean() for r in ROWS}
        return f"**{shown}**" if max(means, key=means.__getitem__) == row else shown

    some = {("sgd", 0.8): (0, 1), ("sam", 0.8): (0, 2)}
    assert lines[2] == ["sgd", "", "", printed("sgd", 0.2), printed("sgd", 0.8, (0, 1), "; 1 missing")]
    assert lines[3] == ["sam", "32", "0.1", printed("sam", 0.2), printed("sam", 0.8, (0, 2), "; 1 failed")]
    assert lines[4] == ["sam paper", "32", "0.1, 0.05", printed("sam paper", 0.2), printed("sam paper", 0.8)]


def test_report_says_what_was_run(store: Path, tmp_path: Path) -> None:
    result = report(store, "toy", tmp_path / "out")
    text = (result.folder / "report.md").read_text()
    seconds = sum(60.0 * (seed + 1) for row in ROWS for noise in RATES for seed in SEEDS) - 180 - 120
    for fact in (
        "`noisysam report toy`",
        "abc1234",
        "2026-11-21 to 2026-11-24",
        "a CPU",
        "fp32",
        "resnet32 (464,154 parameters)",
        "- Seeds: 0, 1, 2\n",
        "- Validation images: 10, with noisy labels\n",
        "- Test images: 50, with clean labels\n",
        "- Augmentation: standard\n",
        "- Momentum: 0.9 (Nesterov)\n",
        "- Weight decay: 0.0005\n",
        "- symmetric, exact draw: Selected samples get a label uniform over all K classes: the true flip rate",
        "16 finished, 1 failed, 1 missing",
        f"{seconds / 3600:.2f} hours",
        "fewer than five seeds are shown one by one",
        "best epoch on test (oracle)",
        "- sgd, symmetric 80 %, seed 2: missing\n",
        "- sam, symmetric 80 %, seed 1: failed, run `sam0.8x1`: ValueError: it broke\n",
        "[^r2]: sam, symmetric 20 %: seed 0 `sam0.2x0`, seed 1 `sam0.2x1`, seed 2 `sam0.2x2`",
        "72.00 to 72.20",
    ):
        assert fact in text
    assert "one seed" not in text
    assert "## Published" not in text
    assert "Test accuracy at the last epoch" in result.text
    assert "best epoch on test (oracle)" not in result.text
    assert result.summary == summary_table(read_cells(store, "toy"))


def test_row_table(store: Path) -> None:
    rows = row_table(read_cells(store, "toy")).set_index("row")
    assert list(rows["tag"]) == ["blind", "blind", "oracle: rho per rate"]
    assert list(rows["gradient evaluations per image"]) == ["1.00", "2.00", "2.00"]
    assert list(rows["options"]) == ["", "", ""]


def alone(store: Path) -> None:
    """Let the runs of a store have been trained one after the other."""
    for number, path in enumerate(sorted(store.glob("*/record.json"))):
        times = {"started": f"2026-11-22T{number:02}:00:00+00:00", "ended": f"2026-11-22T{number:02}:59:00+00:00"}
        edit(store, path.parent.name, **times)


def test_speeds_are_medians_of_runs_that_were_trained_alone(store: Path) -> None:
    """Where runs of a study overlapped on one kind of CPU, speeds are withheld, with the reason."""
    cells = read_cells(store, "toy")
    assert set(row_table(cells)["images/s"]) == set(row_table(cells)["training minutes"]) == {"withheld"}
    assert "those of 16 of 16 runs are withheld, since other runs of the study were trained" in speed_remark(cells)
    alone(store)
    cells = read_cells(store, "toy")
    rows = row_table(cells).set_index("row")
    assert rows.loc["sam", "training minutes"] == f"{np.median([1, 2, 3, 1, 3]):.1f}"
    assert rows.loc["sgd", "images/s"] == f"{np.median([1000, 1001, 1002, 1000, 1001]):.0f}"
    assert speed_remark(cells) == "Speeds and minutes are medians over the runs of a row."
    for seed, start in ((0, "2026-11-23T00:00:00+00:00"), (1, "2026-11-23T00:30:00+00:00")):
        edit(store, key("sgd", 0.2, seed), started=start, ended="2026-11-23T01:00:00+00:00")
    cells = read_cells(store, "toy")
    assert [cell["key"] for cell in cells if cell["beside_others"]] == [key("sgd", 0.2, 0), key("sgd", 0.2, 1)]
    assert row_table(cells).set_index("row").loc["sgd", "images/s"] == "1001"
    edit(store, key("sgd", 0.2, 1), resolved={"device": "cpu", "device_name": "another CPU"})
    assert not any(cell["beside_others"] for cell in read_cells(store, "toy"))


def test_options_of_a_row_are_shown_and_in_the_data(store: Path, tmp_path: Path) -> None:
    """Those of its components, settings in which rows differ, and the plug-in; several values where runs differ."""
    for seed in SEEDS:
        for noise, alpha in ((0.2, 8.0), (0.8, 16.0)):
            config = {**make_config("sam paper", noise, seed), "plugin": "mine.py", "lr": 0.05}
            options = {"rho": 0.1, "m": 32, "q": 0.7}
            edit(store, key("sam paper", noise, seed), config=config, method_options={"alpha": alpha, "none": None},
                 optimizer_options=options)  # fmt: skip
    rows = row_table(read_cells(store, "toy")).set_index("row")
    assert rows.loc["sam paper", "options"] == "alpha=8.0 or 16.0, q=0.7, lr=0.05, plugin=mine.py"
    assert rows.loc["sgd", "options"] == "lr=0.1"
    csv = pd.read_csv(report(store, "toy", tmp_path / "out").folder / "results.csv").set_index("key")
    frame = noisysam.results("toy", store).set_index("key")
    for table in (csv, frame):
        assert table.loc["sampaper0.8x1", "method_option.alpha"] == 16
        assert table.loc["sampaper0.8x1", "opt_option.q"] == 0.7
        assert table.loc["sampaper0.8x1", "plugin"] == "mine.py"
        assert np.isnan(table.loc["sgd0.2x0", "method_option.alpha"])
        assert "opt_option.rho" not in table  # it is the column rho


def test_columns_of_results_are_documented(store: Path, tmp_path: Path) -> None:
    """Of a trained store, of a report's CSV, and of the whole store; only what some runs lack may be missing."""
    (tmp_path / "trained").mkdir()
    folder, _ = trained_store(tmp_path / "trained")
    frames = [
        noisysam.results("s", folder),
        noisysam.results(store=folder),
        pd.read_csv(report(store, "toy", tmp_path / "out").folder / "results.csv"),
    ]
    patterns = {name.replace("NAME", "") for name in COLUMNS if name.endswith("NAME")}
    for frame in frames:
        named = {name for name in frame.columns if not name.startswith(tuple(patterns))}
        assert named <= set(COLUMNS)
    optional = {name for name in COLUMNS if name.startswith("test_accuracy_") or name.endswith("NAME")}
    assert set(frames[0].columns) >= set(COLUMNS) - optional


def test_the_page_explains_its_words(store: Path, tmp_path: Path) -> None:
    text = (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    section = text.split("## Glossary")[1].split("\n## ")[0]
    told = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text()
    for word in ("m", "rho", "blind", "oracle", "memorised", "recovered", "collapsed"):
        assert f"\n- {word}: " in section
    for word in GLOSSARY:
        assert f"\n{word}\n: " in told


def test_every_number_leads_to_its_run_in_markdown(store: Path, tmp_path: Path) -> None:
    text = (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    notes = dict(re.findall(r"(?m)^\[\^(r\d+)\]: (.*)$", text))
    assert len(notes) == len(ROWS) * len(RATES)
    assert set(re.findall(r"\[\^(r\d+)\](?!:)", text)) == set(notes)
    main = text.split("## Test accuracy at the last epoch (%)")[1].split("\n## ")[0]
    (line,) = [line for line in main.splitlines() if line.startswith("| sam  ")]
    (first, second) = re.findall(r"\[\^(r\d+)\]", line)
    assert notes[first] == "sam, symmetric 20 %: seed 0 `sam0.2x0`, seed 1 `sam0.2x1`, seed 2 `sam0.2x2`"
    assert notes[second].startswith("sam, symmetric 80 %: ")
    assert "[^" not in report(store, "toy", tmp_path / "out").text


def test_the_study_can_be_repeated_from_its_report(store: Path, tmp_path: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    write_json(study_path(store, "toy"), {**plan, "file": "include: base.yaml\nrows: {a: {}}\n"})
    versions = {"python": "3.11.7", "noisysam": "0.1.0", "torch": "2.9.0+cpu", "numpy": "2.1.0"}
    for seed in SEEDS:
        edit(store, key("sgd", 0.2, seed), environment={**versions, "commit": "fed4321+"})
    edit(store, key("sam", 0.2, 0), environment={**versions, "numpy": "2.2.0", "commit": "abc1234"})
    folder = report(store, "toy", tmp_path / "out").folder
    text = (folder / "report.md").read_text().split("## How to repeat this study")[1].split("\n## ")[0]
    assert "`git checkout abc1234`, the commit of 13 of 16 runs; others: fed4321+" in text
    assert "`noisysam sweep toy.yaml`" in text
    assert "it includes base.yaml, which has to lie beside it" in text
    assert (folder / "toy.yaml").read_text() == "include: base.yaml\nrows: {a: {}}\n"
    lines = (folder / "constraints.txt").read_text().splitlines()
    assert lines[1:] == ["# python 3.11.7", "torch==2.9.0", "numpy==2.1.0  # also 2.2.0"]
    from packaging.requirements import Requirement

    for line in lines[2:]:
        assert Requirement(line.partition("#")[0]).specifier


def test_facts_name_data_and_subset(store: Path, tmp_path: Path) -> None:
    config = {**make_config("sgd", 0.2, 0), "train_subset": 5000, "subset_seed": 3}
    edit(store, key("sgd", 0.2, 0), config=config)
    text = (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    assert f"- Digest of the data: {'d' * 16}\n" in text
    assert "- Subset: 5,000 images, as many of each class, drawn by seed 3; the whole training set\n" in text


def test_bars_of_many_rows_are_sorted() -> None:
    means = dict(zip("abcdefghij", (0.5, 0.2, 0.9, 0.1, 0.3, 0.8, 0.7, 0.6, 0.4, None), strict=True))
    summaries = [
        {"row": row, "noise_type": "symmetric", "noise": noise, "mean": mean, "sd": None}
        for row, mean in means.items() for noise in (0.2, 0.8)
    ]  # fmt: skip
    (panel,) = figures.accuracy(summaries).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == list("cfghaiebdj")


def test_lines_that_join_two_rates_say_so(store: Path, tmp_path: Path) -> None:
    said = "The lines join two rates; nothing was measured between them."
    assert said in (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    one = [s for s in summary_table(read_cells(store, "toy")) if s["noise"] == 0.2]
    assert not figures.two_rates(one)
    assert not figures.two_rates([*one, *({**s, "noise": noise} for s in one for noise in (0.4, 0.8))])
    assert figures.two_rates([*one, *({**s, "noise": 0.8} for s in one)])


def test_matrices_carry_the_names_of_their_classes(store: Path) -> None:
    panel = figures.matrices({"a": np.eye(3)}, "x", "y", ["cat", "a very long name of a class", "$dog_1$"]).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["cat", "a very long...", "\\$dog_1\\$"]
    assert [label.get_text() for label in figures.matrices({"a": np.eye(3)}, "x", "y").axes[0].get_xticklabels()] == [
        "0", "1", "2"
    ]  # fmt: skip
    cells = read_cells(store, "toy")
    assert classes(cells) == CIFAR10_CLASSES
    named = [{**cell, "classes": ["a", "b"]} for cell in cells]
    assert classes(named) == ("a", "b")
    assert classes([*cells, *named]) is None
    assert classes([{**cell, "dataset": "npz:x.npz"} for cell in cells]) is None


def test_csv_files_hold_every_figure(store: Path, tmp_path: Path) -> None:
    folder = report(store, "toy", tmp_path / "out").folder
    results = pd.read_csv(folder / "results.csv").set_index("key")
    assert len(results) == 18
    for name in FIGURES:
        assert results.loc["sampaper0.8x1", name] == make_record("sam paper", 0.8, 1)["results"][name]
    assert results["status"].value_counts().to_dict() == {"finished": 16, "failed": 1, "missing": 1}
    assert results.loc["sgd0.2x0", "train_seconds"] == 60.0
    table = pd.read_csv(folder / "table.csv")
    assert len(table) == len(ROWS) * len(RATES) * len(FIGURES)
    chosen = table[(table["row"] == "sam") & (table["noise"] == 0.2) & (table["measure"] == "memorised")]
    assert chosen["mean"].item() == pytest.approx(values("sam", 0.2, "memorised").mean())


def test_same_records_same_bytes(store: Path, tmp_path: Path) -> None:
    first, second = (report(store, "toy", tmp_path / name).folder for name in ("a", "b"))
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert {"report.html", "report.md", "results.csv", "table.csv", "tables/last.tex", "figures/accuracy.svg"} < set(
        names
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    edit(store, "sgd0.2x0", results={**make_record("sgd", 0.2, 0)["results"], "last": 0.0})
    third = report(store, "toy", tmp_path / "c").folder
    for name in ("report.html", "report.md", "results.csv", "table.csv", "tables/last.tex", "figures/accuracy.svg"):
        assert (first / name).read_bytes() != (third / name).read_bytes()


def test_one_seed_has_no_spread(store: Path, tmp_path: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    plan["cells"] = [cell for cell in plan["cells"] if cell["seed"] == 0]
    write_json(study_path(store, "single"), plan)
    result = report(store, "single", tmp_path / "out")
    assert all(summary["sd"] is None for summary in result.summary)
    text = (result.folder / "report.md").read_text()
    assert "one seed has no spread" in text
    assert "±" not in text


def test_what_is_not_there_is_named(store: Path) -> None:
    for seed in SEEDS:
        results = make_record("sgd", 0.2, seed)["results"]
        edit(store, key("sgd", 0.2, seed), results={**results, "selected": None})
        edit(store, key("sam", 0.2, seed), status="failed", results={})
    for seed in (0, 1):
        (store / key("sgd", 0.8, seed) / "record.json").unlink()
    fields = layout(summary_table(read_cells(store, "toy"), "selected")).set_index("row")
    assert fields.loc["sgd", "20 %"] == "not measured"
    assert fields.loc["sam", "20 %"] == "failed"
    assert fields.loc["sgd", "80 %"] == "missing"


def test_rows_that_the_grid_varies_are_split(store: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    for cell in plan["cells"]:
        if cell["row"] == "sam paper":
            cell["row"] = "sam"
    write_json(study_path(store, "grid"), plan)
    rows = list(dict.fromkeys(cell["row"] for cell in read_cells(store, "grid")))
    assert rows == ["sgd", "sam, rho=None", "sam, rho=paper"]


def test_noise_types_are_columns(store: Path, tmp_path: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    for cell in plan["cells"]:
        if cell["noise"] == 0.8:
            cell |= {"noise": 0.0, "config": {**cell["config"], "noise_type": "human:worse"}}
    write_json(study_path(store, "mixed"), plan)
    result = report(store, "mixed", tmp_path / "out")
    columns = list(layout(result.summary).columns)
    assert columns == ["row", "m", "rho", "human:worse", "symmetric 20 %"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resolved": {"precision": "bf16", "device_name": "a GPU", "threads": 1}}, "mixes precision: .*bf16 in run "),
        ({"revisions": {"optimizer sam": 2, "method ce": 1}}, "mixes revisions of optimizer sam: .*2 in run "),
        (
            {"noise": {"flip_rate": 0.2, "digest": "c" * 64}},
            "different labels at symmetric 20 %, seed 0: .*c{16} in run ",
        ),
    ],
)
def test_what_does_not_fit_in_one_table_is_refused(
    store: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    edit(store, "sam0.2x0", **changes)
    with pytest.raises(UserError, match=said + "sam0.2x0") as caught:
        report(store, "toy", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    edit(store, "sam0.2x0", status="failed")  # a run that gives no number may differ
    report(store, "toy", tmp_path / "out")


def test_five_seeds_have_an_interval_within_0_and_100() -> None:
    cells = [{"row": "a", "noise_type": "symmetric", "noise": 0.4, "status": "finished", "m": None, "rho": None,
              "flip_rate": 0.4, "machine": "", "last": value} for value in (1.0, 0.99, 1.0, 0.9, 1.0)]  # fmt: skip
    (summary,) = summary_table(cells)
    assert (summary["low"], summary["high"]) == share_interval(summary["values"])
    assert summary["high"] < 1
    assert layout([summary])["40 %"][0] == (
        f"97.80 ± 4.38 [{100 * summary['low']:.2f}, {100 * summary['high']:.2f}] (n=5)"
    )
    assert summary_table(cells[:4])[0]["low"] is None


def test_epochs_are_picked_only_from_runs_evaluated_often_enough(store: Path, tmp_path: Path) -> None:
    """From every tenth of the run on; of others neither table nor claim uses the selected or the best epoch."""
    for seed in SEEDS:
        for noise in RATES:
            config = {**make_config("sgd", noise, seed), "epochs": 40, "eval_every": 5 if noise == 0.2 else 4}
            if (store / key("sgd", noise, seed)).exists():
                edit(store, key("sgd", noise, seed), config=config)
    cells = [cell for cell in read_cells(store, "toy") if cell["row"] == "sgd" and cell["status"] == "finished"]
    assert {(cell["noise"], cell["selected"] is None, cell["best"] is None) for cell in cells} == {
        (0.2, True, True), (0.8, False, False)
    }  # fmt: skip
    assert all(cell["last"] is not None for cell in cells)
    text = (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    for title in ("at the epoch selected on noisy", "best epoch on test (oracle)"):
        said = text.split(f"## Test accuracy{' ' if title.startswith('at') else ', '}{title}")[1].split("\n## ")[0]
        assert "Left out, since they were evaluated less often than every tenth of the run: sgd." in said
        assert "| not measured" in said


def test_the_page_tells_the_result_first(store: Path, tmp_path: Path) -> None:
    text = (report(store, "toy", tmp_path / "out").folder / "report.md").read_text()
    heads = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert heads[:2] == ["In short", "Test accuracy at the last epoch (%)"]
    assert heads.index("Recipe and data") > heads.index("Learning curves")
    first = [line for line in text.split("## In short")[1].split("\n## ")[0].splitlines() if line]
    assert 3 <= len(first) <= 6
    assert first[0] == (
        "- 3 training recipes (sgd; sam; sam paper) are compared by clean test accuracy at the last epoch: 100 training"
        " images of cifar10 with label noise (symmetric 20 %, symmetric 80 %), resnet32 for 2 epochs, 3 seeds."
    )
    assert "oracle): sam paper." in first[-1]
    assert "2 of 18 runs are missing or failed." in first[-1]


def test_sentences_of_verdicts(store: Path) -> None:
    cells = [cell for cell in read_cells(store, "toy") if cell["row"] != "sam paper"]
    shift = {"sgd": 0.0, "sam": 0.1}
    for cell in cells:
        cell |= {"status": "finished", "train": 100, "dataset": "cifar10", "model": "resnet8", "epochs": 2}
        cell |= {"last": 0.5 + shift[cell["row"]] + 0.001 * cell["seed"], "labels": cell["seed"], "oracle": ""}
        cell["machine"] = ""
        cell["flip_rate"] = cell["noise"]
    asked = [
        Claim(text="sam is better than sgd at every noise rate", kind="greater", rows=("sam", "sgd")),
        Claim(text="sgd is better than sam", kind="greater", rows=("sgd", "sam")),
        Claim(text="the gain grows", kind="grows", rows=("sam", "sgd")),
    ]
    found = sentences(cells, summary_table(cells), judge_all(asked, cells, SEEDS))
    assert found[1:5] == [
        "Highest mean at 20 %: sam 60.1 % (sgd 50.1 %); at 80 %: sam 60.1 % (sgd 50.1 %).",
        "Supported: sam is better than sgd at every noise rate (+10.0 points at 20 %, +10.0 at 80 %).",
        "Contradicted: sgd is better than sam (-10.0 points at 20 %, -10.0 at 80 %).",
        "Undecided: the gain grows (+0.0 points per 10 % noise).",
    ]
    equal = [{**cell, "last": 0.5} for cell in cells]
    said = sentences(equal, summary_table(equal), judge_all(asked, equal, SEEDS))[1]
    assert said == "Highest mean at 20 %: sgd and sam 50.0 %; at 80 %: sgd and sam 50.0 %."
    one = [{**cell, "epochs": 1} for cell in cells]
    assert " for 1 epoch, 3 seeds." in sentences(one, summary_table(one), [])[0]
    assert remark("last_ten", one, False) == "Runs of fewer epochs: the mean of all."
    assert remark("last_ten", [{**cell, "epochs": 10} for cell in cells], False) == ""
    alone = [cell for cell in cells if cell["seed"] == 0]
    assert (
        "Undecided, as 3 seeds are needed: " in sentences(alone, summary_table(alone), judge_all(asked, alone, [0]))[2]
    )


def test_machines_are_told_apart(store: Path, tmp_path: Path) -> None:
    """Facts list CPU, instruction sets and numerics; fields with runs of several kinds of machine are marked."""
    text = (report(store, "toy", tmp_path / "one").folder / "report.md").read_text()
    assert "- Numerics revision: not recorded\n" in text
    assert "several kinds of machine" not in text
    told = {"commit": "abc", "cpu": "AMD EPYC", "instruction_set": "avx512_bf16 avx2", "numerics": "1"}
    edit(store, "sam0.2x0", environment=told)
    text = (report(store, "toy", tmp_path / "two").folder / "report.md").read_text()
    for fact in ("CPU: AMD EPYC", "Instruction sets: avx512_bf16 avx2", "Numerics revision: 1"):
        assert f"- {fact}\n" in text
    assert "(a: AMD EPYC, avx512_bf16 avx2, numerics revision 1; b: a CPU)" in text
    main = text.split("## Test accuracy at the last")[1].split("\n## ")[0]
    (line,) = [line for line in main.splitlines() if line.startswith("| sam  ")]
    fields = [re.sub(r"[*]*\[\^r\d\]$", "", field.strip()) for field in line.strip("|").split("|")]
    assert fields[3].endswith(") ab")
    assert fields[4].endswith(") b")


def test_claims_of_a_study_file_are_judged_alone(store: Path, tmp_path: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    cells = [{**c, "row": {"sgd": "SGD", "sam": "SAM"}.get(c["row"], c["row"])} for c in plan["cells"]]
    write_json(study_path(store, "toy"), {**plan, "cells": cells})
    assert "p (Holm over 3)" in report(store, "toy", tmp_path / "ours").text
    own = [{"text": "SAM wins", "kind": "greater", "rows": ["SAM", "SGD"]}]
    write_json(study_path(store, "toy"), {**plan, "cells": cells, "claims": own})
    text = report(store, "toy", tmp_path / "own").text
    assert "p (Holm over 1)" in text
    assert "SAM wins" in text


def test_a_study_without_results_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study 'other'"):
        report(store, "other", tmp_path)
    for path in store.glob("*/record.json"):
        path.unlink()
    with pytest.raises(UserError, match="no finished run"):
        report(store, "toy", tmp_path)


def test_learning_curves_are_means_with_bands_of_a_standard_deviation(store: Path) -> None:
    cells = [cell for cell in read_cells(store, "toy") if (cell["row"], cell["noise"]) == ("sgd", 0.2)]
    found = {cell["key"]: [0.1 * (cell["seed"] + 1) ** (epoch + 1) for epoch in range(3)] for cell in cells}
    lines = {
        key: figures.curve([{"stage": 0, "epoch": e, "test_accuracy": value} for e, value in enumerate(values)])
        for key, values in found.items()
    }
    ((_, figure),) = figures.curves(cells, lines)
    panel, other = figure.axes[0], figure.axes[1]
    expected, sd = 100 * np.mean([*found.values()], axis=0), 100 * np.std([*found.values()], axis=0, ddof=1)
    assert list(panel.lines[0].get_xdata()) == [1, 2, 3]
    assert list(panel.lines[0].get_ydata()) == pytest.approx(expected)
    (band,) = panel.collections
    for x in (1, 2, 3):
        edges = [y for at, y in band.get_paths()[0].vertices if at == x]
        assert (min(edges), max(edges)) == pytest.approx((expected[x - 1] - sd[x - 1], expected[x - 1] + sd[x - 1]))
    assert not other.collections
    assert not list(other.lines[0].get_xdata())  # what was not measured
    ((_, single),) = figures.curves(cells[:1], lines)
    assert not single.axes[0].collections


def test_what_a_report_keeps_of_a_run_is_small(store: Path) -> None:
    """So that one of 10,000 runs of 200 epochs fits into 1 GB: `noisysam bench reports --long` measures it."""
    cells = [cell for cell in read_cells(store, "toy") if cell["status"] == "finished"]
    folders = [RunFolder(store, cell["key"]) for cell in cells]
    line = dict.fromkeys(("stage", "epoch", "test_accuracy", "memorised", "recovered", "auroc", "train_loss"), 0.25)
    for folder in folders:
        folder.write_epochs([{**line, "stage": 0, "epoch": epoch} for epoch in range(200)])
    kept = [reports._epochs(store, folder.key) for folder in folders[:1]]  # what a first one imports
    tracemalloc.start()
    try:
        kept += [reports._epochs(store, folder.key) for folder in folders]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(folders) < 16_000
    assert len({id(cell["matrix"]) for cell in cells}) == len({cell["labels"] for cell in cells}) < len(cells)


def test_figure_shows_every_row_and_survives_many() -> None:
    for count, shown in ((5, 5), (20, 2)):  # lines of rows; beyond eight, a line of dots for each noise
        summaries = [
            {"row": f"row {i}", "noise_type": kind, "noise": 0.2, "flip_rate": 0.18, "mean": mean, "sd": None}
            for i in range(count)
            for kind, mean in (("symmetric", 0.5), ("human:worse", None))
        ]
        panel = figures.accuracy(summaries).axes[-1]
        assert len(panel.get_legend_handles_labels()[1]) == shown
        assert svg(figures.accuracy(summaries)).startswith("<?xml")


def test_published_table_stands_in_its_own_section(store: Path, tmp_path: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    write_json(study_path(store, "table4"), {**plan, "name": "table4", "published": ["sam-table4"]})
    write_json(study_path(store, "sweep"), {**plan, "published": "sam-table8"})
    four = (report(store, "table4", tmp_path / "out").folder / "report.md").read_text()
    section = four.split("## Published")[1].split("\n## ")[0]
    assert "26.2 % at 80 % points to labels that are drawn over all classes" in section
    assert "Foret et al. 2020, Table 4, arXiv 2010.01412" in section
    (huang,) = [line for line in section.splitlines() if line.startswith("| Huang")]
    number = huang.split("43.4 [")[1].split("]")[0]
    assert f"[{number}] doubtful: may be its value at 80 %" in section
    assert huang.count("[") == 2
    assert "rho 0.5" in (report(store, "sweep", tmp_path / "out").folder / "report.md").read_text()
    with pytest.raises(UserError, match="no published table 'sam-table5'"):
        published.layout("sam-table5")


def test_runs_of_an_earlier_revision_are_a_row_of_their_own(store: Path) -> None:
    edit(store, key("sgd", 0.2, 0), revisions={"method pes": 1, "optimizer sgd": 1})
    edit(store, key("sgd", 0.2, 1), revisions={"method of a plug-in": 1, "optimizer sgd": 1})
    rows = {cell["key"]: cell["row"] for cell in read_cells(store, "toy")}
    assert rows[key("sgd", 0.2, 0)].endswith(", earlier revision")
    assert not rows[key("sgd", 0.2, 1)].endswith("earlier revision")


def test_a_study_that_has_only_begun_reads_well(tmp_path: Path) -> None:
    """Of the study table4-cpu the first seed of some rows: what is missing is named, no claim is decided, and the
    paper's table stands beside row by row and gain by gain."""
    plan = yaml.safe_load((Path(__file__).parents[1] / "experiments" / "table4-cpu.yaml").read_text())
    means = {
        "SGD": (70.0, 50.0, 30.0, 20.0),
        "SAM": (80.0, 70.0, 60.0, 40.0),
        "SAM (paper's radius)": (80.0, 70.0, 60.0),
    }
    last = {
        (row, rate, 0): value / 100
        for row, values in means.items()
        for rate, value in zip((0.2, 0.4, 0.6, 0.8), values, strict=False)
    }
    partial_store(tmp_path, "table4-cpu", plan, last)
    result = report(tmp_path, "table4-cpu", tmp_path / "out")
    text = (result.folder / "report.md").read_text()
    short = text.split("## In short")[1].split("\n## ")[0]
    assert "77 of 88 runs are missing or failed." in short
    assert "Undecided, as 3 seeds are needed: SAM is better than SGD at every noise rate" in short
    verdicts = text.split("## Verdicts")[1].split("\n## ")[0]
    assert "8 of 24 cells have results; planned figures missing: symmetric 20 %, seed 1, 2, and at 3 more" in verdicts
    assert "supported" not in verdicts
    beside = text.split("Test accuracy (%) in the paper and here:")[1].split("The whole table")[0]
    lines = {
        line.split("|")[1].strip(): [f.strip() for f in line.split("|")[2:-1]]
        for line in beside.splitlines()
        if "|" in line
    }
    assert lines["SAM"] == ["95.1", "80.0", "93.4", "70.0", "90.5", "60.0", "77.9", "40.0"]
    assert lines["SAM (paper's radius); in the paper SAM"][-2:] == ["77.9", "missing"]
    assert lines["Bootstrap + SAM"][::2] == ["95.4", "94.2", "91.8", "79.9"]
    assert set(lines["Bootstrap + SAM"][1::2]) == {"missing"}
    assert lines["SAM over SGD"] == ["+10.3", "+10.0", "+24.6", "+20.0", "+42.3", "+30.0", "+51.7", "+20.0"]
    main = text.split("## Test accuracy at the last epoch (%)")[1].split("\n## ")[0]
    (line,) = [line for line in main.splitlines() if line.startswith("| Bootstrap + Mixup")]
    assert line.count("missing") == 4
    assert "- Bootstrap + Mixup, symmetric 80 %, seed 0: missing\n" in text
    for title in ("Test accuracy, mean of the last ten epochs (%)", "Rows"):  # rows without any run stand above alone
        table = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:] == list(means)
    effects = verdicts.split("with each seed's difference:")[1]
    numbers = {line.split("|")[1].strip() for line in effects.splitlines() if line.startswith("| ")}
    assert numbers == {"no.", "1", "2", "3"}  # of the claims whose rows have runs
    assert "## All noise rates and seeds together" not in text  # three rows
