"""The leaderboard: runs of one problem side by side, numbers recomputed, names harmless, a newcomer's method in it."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import complete

from noisysam import cli
from noisysam.core import plugins
from noisysam.core.files import write_json
from noisysam.methods import METHODS
from noisysam.report import leaderboard
from noisysam.report.leaderboard import Run, problems
from noisysam.runs.record import RunFolder, study_path

CONFIG = {"dataset": "digits", "train_subset": None, "subset_seed": 0, "val_fraction": 0.1, "model": "resnet8",
          "width": 1.0, "norm": "batch", "epochs": 20, "noise_type": "symmetric", "noise_draw": "exact",
          "batch": 128, "lr": 0.1}  # fmt: skip
HOSTILE = "<script>alert(1)</script>"


def made(
    method: str = "ce", opt: str = "sgd", noise: float = 0.4, seed: int = 0, last: float = 0.5, **changes: Any
) -> Run:
    config = {**CONFIG, "method": method, "opt": opt, "noise": noise, "seed": seed, "noise_seed": seed}
    labels = changes.pop("labels", f"{round(10 * noise)}{seed}" * 32)
    record = {
        "key": hashlib.sha256(repr((method, opt, noise, seed, last, changes)).encode()).hexdigest()[:16],
        "config": {**config, **changes.pop("config", {})},
        "noise": {"type": "symmetric", "rate": noise, "digest": labels},
        "results": {"last": last},
        **changes,
    }
    row = f"{method} {opt}"
    return Run(complete(record), (("a study", row, ""),), f"runs/{record['key']}/record.json")  # type: ignore[arg-type]


def test_means_over_seeds_by_recipe_and_noise() -> None:
    values = {(opt, noise): np.random.default_rng([number, round(10 * noise)]).random(3)
              for number, opt in enumerate(("sgd", "sam")) for noise in (0.4, 0.8)}  # fmt: skip
    runs = [made("ce", opt, noise, seed, float(v), cost={"gradient_samples": 400 if opt == "sam" else 200})
            for (opt, noise), three in values.items() for seed, v in enumerate(three)]  # fmt: skip
    (board,) = problems(runs)
    assert board.columns == ("symmetric 40 %", "symmetric 80 %")
    lines = {line.name: line for line in board.lines}
    for (opt, noise), three in values.items():
        field = lines[opt].fields[0 if noise == 0.4 else 1]
        assert field is not None
        assert field.mean == pytest.approx(three.mean())
        assert field.text == f"{100 * three.mean():.2f} ± {100 * three.std(ddof=1):.2f} (n=3)"
    best = sorted(lines, key=lambda opt: -sum(values[opt, noise].mean() for noise in (0.4, 0.8)))
    assert [line.name for line in board.lines] == best
    assert (lines["sam"].evaluations, lines["sgd"].evaluations) == (4, 2)
    assert lines["sam"].seeds == "0, 1, 2"
    assert len(lines["sam"].runs) == 6
    assert problems([*runs, *runs]) == [board]  # a run of two stores counts once


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"epochs": 40}},
        {"config": {"train_subset": 50}},
        {"digests": {"data": "e" * 64}},
        {"model": {"name": "resnet8", "parameters": 2000}},
        {"resolved": {"precision": "bf16"}},
        {"data": {"train": 90}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_another_problem_is(changes: dict[str, Any]) -> None:
    assert len(problems([made(), made("ce", "sam", **changes)])) == 2


def test_recipes_options_and_knowledge() -> None:
    """Settings that differ make lines of their own and are shown; a rule by the noise is one recipe; an earlier
    revision is named; other labels are a column of their own."""
    (board,) = problems(
        [
            made(),
            made(config={"lr": 0.01}),
            made(
                "ce",
                "sam",
                0.4,
                optimizer_options={"rho": 0.1, "m": 32},
                config={"rho": "paper"},
                oracle=["rho per rate"],
            ),
            made(
                "ce",
                "sam",
                0.8,
                optimizer_options={"rho": 0.05, "m": 32},
                config={"rho": "paper"},
                oracle=["rho per rate"],
            ),
            made("gce", method_options={"q": 0.7, "none": None}),
            made("pes", revisions={"method pes": 0}),
            made(seed=1),
            made("gce", seed=1, labels="f" * 64, method_options={"q": 0.7}),
            made("ce", "sam", seed=1, optimizer_options={"rho": 0.1, "m": 32}),
        ]
    )
    assert board.columns == ("symmetric 40 %", "symmetric 40 %, other labels (ffffffff)", "symmetric 80 %")
    found = {(line.name, line.options, line.oracle) for line in board.lines}
    assert found == {
        ("sgd", "", "blind"),
        ("sgd", "lr=0.01", "blind"),
        ("sam", "rho=paper, m=32", "rho per rate"),
        ("sam", "rho=0.1, m=32", "blind"),
        ("gce, sgd", "q=0.7", "blind"),
        ("pes, sgd (earlier revision)", "", "blind"),
    }
    assert board.facts.endswith(" Where the options do not say otherwise: lr=0.1.")
    (gce,) = [line for line in board.lines if line.name == "gce, sgd"]
    assert [field is None for field in gce.fields] == [False, False, True]


def test_records_of_earlier_versions_are_the_same_recipes() -> None:
    """Fields and options that came later are at their defaults."""
    old = made("gce", "sam", method_options={}, optimizer_options={"rho": 0.1, "m": 32})
    new = made("gce", "sam", seed=1, method_options={"q": 0.7}, config={"sync_perturbation": False, "plugin": None},
               optimizer_options={"rho": 0.1, "m": 32, "ascent_steps": 1, "interval": 1})  # fmt: skip
    (board,) = problems([old, new])
    assert [(line.name, line.options, len(line.runs)) for line in board.lines] == [
        ("gce, sam", "q=0.7, rho=0.1, m=32", 2)
    ]


def test_a_seed_counts_once() -> None:
    """Of two runs of one recipe, noise and seed (other evaluations, another state of a plug-in) the latest."""
    runs = [made(last=0.4, ended="2026-11-23T00:00:00+00:00"), made(last=0.3, config={"eval_every": 5}), made(seed=1)]
    (board,) = problems(runs)
    (line,) = board.lines
    assert line.fields[0] is not None
    assert line.fields[0].values == (0.4, 0.5)
    assert len(line.runs) == 3


def test_the_best_recipes_come_first_whatever_they_lack() -> None:
    """By the distance from the mean of each column that a recipe has."""
    runs = [made(noise=0.4, last=0.5), made(noise=0.8, last=0.2), made("gce", noise=0.8, last=0.3),
            made("elr", noise=0.4, last=0.4), made("elr", noise=0.8, last=0.1)]  # fmt: skip
    (board,) = problems(runs)
    assert [line.name for line in board.lines] == ["gce, sgd", "sgd", "elr, sgd"]


def test_a_setting_does_not_hide_an_option_of_its_name() -> None:
    run = made("label-smoothing", method_options={"warmup": 15}, config={"warmup": 2.0})
    others = [made(seed=seed, config={"warmup": 0.0}) for seed in range(3)]
    (board,) = problems([run, *others])
    assert {line.options for line in board.lines} == {"rate=0.1, warmup=15, --warmup=2", ""}


def test_the_page_is_one_harmless_file() -> None:
    run = made(config={"method": HOSTILE, "opt": HOSTILE, "noise_type": HOSTILE}, method_options={HOSTILE: HOSTILE},
               oracle=[HOSTILE], environment={"commit": HOSTILE, "cpu": HOSTILE})  # fmt: skip
    run = Run(run.record, ((HOSTILE, HOSTILE, HOSTILE),), "runs/a/record.json")
    text = leaderboard.page(problems([run]))
    assert text.count("<script") == 1
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text
    assert text.count("&lt;script&gt;alert(1)") >= 9
    assert not re.findall(r"<[^>]*\son\w+=", text)
    for outside in ("http:", "https:", "url(", "@import", "<link", "<iframe", "src="):
        assert outside not in text
    assert leaderboard.page(problems([run])) == text


@pytest.fixture
def _forget() -> Iterator[None]:
    yield
    METHODS._items.pop("half-ce", None)
    plugins._loaded.clear()


def noisysam(*words: object) -> None:
    assert cli._run([str(word) for word in words]) == 0


@pytest.mark.usefixtures("_forget")
def test_a_newcomers_method_is_in_it_after_a_sweep_and_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one machine a study with an own method is swept and exported; on another, whose store has a run of the same
    problem, it is imported: both are in one table, with links to their records."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from noisysam.methods import METHODS, Method\n\n\n"
        '@METHODS.register("half-ce", source="a test")\n'
        "class Half(Method):\n"
        '    """Half of the cross-entropy."""\n\n'
        "    def loss(self, logits, task):\n"
        "        return 0.5 * self.cross_entropy(logits, task.labels)\n"
    )
    base = (
        'base: {dataset: digits, model: resnet8, train_subset: 60, epochs: 1, batch: 16, width: 0.25, compile: "off"}\n'
    )
    grid = "grid: {noise: [0.4]}\n"
    Path("theirs.yaml").write_text(base + grid + "rows: {SGD: {}}\n")
    Path("own.yaml").write_text(base + grid + "rows: {My method: {method: half-ce, plugin: mine.py}}\n")
    noisysam("sweep", "theirs.yaml", "--no-track", "--store", "runs")
    noisysam("sweep", "own.yaml", "--no-track", "--store", "elsewhere")
    noisysam("export", "own", "archive", "--store", "elsewhere")
    noisysam("import", "archive", "--plugin", "mine.py", "--store", "runs")
    noisysam("leaderboard", "--store", "runs")
    text = Path("reports/leaderboard.html").read_text()
    assert text.count("<table>") == 1
    assert "<td>half-ce, sgd</td>" in text
    assert "My method (own)" in text
    assert "SGD (theirs)" in text
    links = re.findall(r'href="([^"]*)"', text)
    assert len(links) == 2
    assert all((Path("reports") / link).resolve().is_file() for link in links)
    noisysam("leaderboard", "own", "--store", "runs", "--out", "own.html")
    assert "SGD (theirs)" not in Path("own.html").read_text()
    noisysam("leaderboard", "archive", "--plugin", "mine.py", "--out", "archive.html")
    assert "half-ce" in Path("archive.html").read_text()


def test_what_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "runs"
    store.mkdir()
    assert cli._run(["leaderboard", "--store", str(store)]) == 2
    assert "there is no finished run in" in capsys.readouterr().err
    assert cli._run(["leaderboard", "unknown", "--store", str(store)]) == 2
    assert "no study 'unknown'" in capsys.readouterr().err


def test_tuning_is_read_from_the_study(tmp_path: Path) -> None:
    run = made()
    RunFolder(tmp_path, run.record["key"]).write(run.record)
    cell = {"row": "SGD", "noise": 0.4, "seed": 0, "key": run.record["key"], "config": run.record["config"]}
    search = {"trials": 8, "seed": 1000, "fields": {}, "chosen": {"lr": 0.05}, "accuracy": 0.5, "runs": []}
    plan = {"schema": 1, "name": "s", "file": "", "cells": [cell], "search": {"SGD": search}}
    write_json(study_path(tmp_path, "s"), plan)
    (board,) = problems(leaderboard.read_runs(tmp_path, lambda key, studies: f"{studies[0]}/{key}"))
    (line,) = board.lines
    assert line.tuning == "8 trials: lr 0.05"
    assert line.runs[0][2] == f"s/{run.record['key']}"
    (alone,) = problems([made()])
    assert alone.lines[0].tuning == "none recorded"
