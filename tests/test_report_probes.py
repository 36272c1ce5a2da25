"""Probes in a report: every figure recomputed with numpy from the stored results, pictures of what is there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import complete

from noisysam.core.files import write_json
from noisysam.report import probe_figures, probes, read_cells, report
from noisysam.report.document import section_markdown
from noisysam.runs.record import RunFolder, study_path
from noisysam.runs.schema import PROBE_SCHEMA, RECORD_SCHEMA

ROWS, RATES, SEEDS = ("sgd", "sam"), (0.2, 0.4), (0, 1)
PARTS = ("clean", "noisy", "test")
MOMENT = (
    "last_layer_norm", "feature_norm_clean", "feature_norm_flipped", "parameter_jacobian_clean",
    "parameter_jacobian_flipped", "input_jacobian_clean", "input_jacobian_flipped", "gradient_norm",
    "gradient_share_clean", "gradient_cosine", "logit_ratio", "logit_ratio_perturbed", "logit_ratio_each",
    "down_weighted",
)  # fmt: skip
BALL = ("lambda_max", "trace", "trace_standard_error", "worst_case", "one_step", "average_case", "loss",
        "gradient_norm")  # fmt: skip


def key(row: str, noise: float, seed: int) -> str:
    return f"{row}{noise:g}x{seed}"


def record(row: str, noise: float, seed: int) -> dict[str, Any]:
    config = {"dataset": "cifar10", "noise_type": "symmetric", "noise": noise, "seed": seed, "noise_seed": seed,
              "opt": row, "method": "ce", "epochs": 2}  # fmt: skip
    return complete({
        "schema": RECORD_SCHEMA, "key": key(row, noise, seed), "status": "finished", "config": config,
        "optimizer_options": {}, "resolved": {"device_name": "a CPU", "precision": "fp32", "threads": 1},
        "oracle": [], "revisions": {}, "data": {"train": 100}, "model": {"name": "resnet8", "parameters": 10},
        "noise": {"flip_rate": noise, "digest": f"{noise}{seed}", "matrix": [[1.0, 0.0], [0.0, 1.0]]},
        "environment": {"commit": "abc"}, "started": "2026-11-20T18:00", "ended": "2026-11-20T19:00",
        "results": {"last": 0.5, "selected": 0.5, "best": 0.5}, "error": None,
        "cost": {"gradient_samples": 200, "train_seconds": 60.0, "images_per_second": 10.0},
    })  # fmt: skip


def found(probe: str, row: str, noise: float, seed: int, moments: int = 3) -> dict[str, Any]:
    """Results as a probe writes them, with figures of its own for each run."""
    rng = np.random.default_rng([list(ROWS).index(row) if row in ROWS else 7, round(10 * noise), seed, len(probe)])

    def grid(*shape: int) -> Any:
        return rng.uniform(0.1, 2, shape).tolist()

    density = {"nodes": [4.0, 1.0, 0.0], "weights": [0.1, 0.2, 0.7]}
    part = {part: dict(zip(BALL, grid(8), strict=True)) | {"density": density} for part in PARTS}
    axis = [-1.0, 0.0, 1.0]

    def surface(axes: int) -> dict[str, Any]:
        shape = (3,) * axes
        return {"coordinates": [axis] * axes} | {p: {"loss": grid(*shape), "accuracy": grid(*shape)} for p in PARTS}

    def moment(n: int) -> dict[str, Any]:
        return {"stage": int(n > 0), "epoch": n, **dict(zip(MOMENT, grid(len(MOMENT)), strict=True))}

    levels = {str(bits): {"plain_accuracy": float(rng.random()), "zero_shot_accuracy": float(rng.random())}
              for bits in (8, 2)}  # fmt: skip
    return {"statement": f"what {probe} measures; batch norm in evaluation mode"} | {
        "sharpness": part,
        "landscape": {"line": surface(1), "plane": surface(2)},
        "mechanism": {"moments": [moment(n) for n in range(moments)]},
        "quantise": {"accuracy": float(rng.random()), "bits": levels},
    }[probe]


def look(store: Path, run: str, probe: str, results: dict[str, Any], **options: Any) -> None:
    content = {"schema": PROBE_SCHEMA, "probe": probe, "revision": 1, "options": {"rho": 0.1, **options}}
    write_json(store / run / "probes" / f"{probe}.json", {**content, "results": results})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two rows, two rates, two seeds; every probe on every run but one."""
    cells = []
    for seed in SEEDS:
        for noise in RATES:
            for row in ROWS:
                made = record(row, noise, seed)
                cells.append({"row": row, "noise": noise, "seed": seed, "key": made["key"], "config": made["config"]})
                RunFolder(tmp_path, made["key"]).write(made)
                for probe in ("sharpness", "landscape", "mechanism", "quantise"):
                    if (row, noise, seed) != ("sam", 0.4, 1):
                        look(tmp_path, made["key"], probe, found(probe, row, noise, seed))
    write_json(study_path(tmp_path, "toy"), {"schema": 1, "name": "toy", "file": "", "published": None, "cells": cells})
    return tmp_path


def text_of(store: Path) -> str:
    """The sections of the probes in Markdown, without the pictures being written."""
    cells = read_cells(store, "toy")
    anchors = {f"{cell['row']}, symmetric {100 * cell['noise']:g} %": "runs-1" for cell in cells}
    return "\n".join(section_markdown(section) for section in probes.sections(store, cells, anchors))


def table(text: str, title: str, which: int = 0) -> dict[tuple[str, ...], dict[str, str]]:
    """A table of a section: its lines by their fields before n."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    blocks = [block for block in section.split("\n\n") if block.startswith("|")]
    header, _, *lines = [[f.strip() for f in line.strip("|").split("|")] for line in blocks[which].splitlines()]
    cut = header.index("n")
    return {tuple(line[:cut]): dict(zip(header[cut:], line[cut:], strict=True)) for line in lines}


def printed(values: list[float], percent: bool = False) -> str:
    scale, form, spread = (100, ".2f", ".2f") if percent else (1, ".4g", ".2g")
    mean = format(scale * np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(scale * np.std(values, ddof=1), spread)}"


def test_tables_are_means_over_the_seeds(store: Path) -> None:
    text = text_of(store)
    sharp, norms, shares = (table(text, f"Probe: {p}", n) for p, n in
                            (("sharpness", 0), ("mechanism", 0), ("mechanism", 1)))  # fmt: skip
    bits = table(text, "Probe: quantise")
    for noise in RATES:
        for row in ROWS:
            seeds = (0,) if (row, noise) == ("sam", 0.4) else SEEDS
            place = (row, f"symmetric {100 * noise:g} %")

            def values(probe: str, *path: Any) -> list[float]:
                all_of = [found(probe, row, noise, seed) for seed in seeds]  # noqa: B023
                for step in path:
                    all_of = [one[step] for one in all_of]
                return all_of  # type: ignore[return-value]

            for part, title in probe_figures.TITLES.items():
                line = sharp[(*place, title)]
                assert line["n"] == str(len(seeds))
                assert line["largest eigenvalue"] == printed(values("sharpness", part, "lambda_max"))
                assert line["worst case"] == printed(values("sharpness", part, "worst_case"))
            last = ("mechanism", "moments", -1)
            assert norms[place]["Jacobian by inputs, flipped"] == printed(values(*last, "input_jacobian_flipped"))
            assert shares[place]["clean share (%)"] == printed(values(*last, "gradient_share_clean"), True)
            assert bits[place]["full (%)"] == printed(values("quantise", "accuracy"), True)
            assert bits[place]["2 bits, ZSAQ (%)"] == printed(
                values("quantise", "bits", "2", "zero_shot_accuracy"), True
            )
    assert list(bits) == [(row, f"symmetric {rate} %") for rate in (20, 40) for row in ROWS]
    for probe in ("sharpness", "landscape", "mechanism", "quantise"):
        assert f"Measured: what {probe} measures; batch norm in evaluation mode." in text
    assert "Options: rho 0.1." in text


@pytest.mark.slow
def test_a_report_shows_them_in_the_same_bytes(store: Path, tmp_path: Path) -> None:
    """Pictures and tables are there, and a number leads to its runs. Without probes none of it."""
    first, second = (report(store, "toy", tmp_path / name).folder for name in "ab")
    names = {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()}
    pictures = ("sharpness-density", "landscape-line", "landscape-plane", "mechanism-epochs", "quantise-bits")
    tables = ("sharpness", "mechanism-norms", "mechanism-gradients", "quantise")
    assert {*(f"details/{n}.svg" for n in pictures), *(f"tables/{n}.tex" for n in tables)} < names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    page = (first / "report.html").read_text()
    value = printed([found("quantise", "sgd", 0.2, seed)["accuracy"] for seed in SEEDS], True)
    anchor = page.split(f">{value}</a>")[0].rsplit('href="#', 1)[1].rstrip('"')
    entry = page.split(f'<li id="{anchor}">')[1].split("</li>")[0]
    assert all(key("sgd", 0.2, seed) in entry for seed in SEEDS)
    for path in store.glob("*/probes/*.json"):
        path.unlink()
    assert text_of(store) == ""


def test_other_options_stand_apart_and_what_is_broken_is_named(store: Path) -> None:
    look(store, key("sam", 0.4, 1), "quantise", found("quantise", "sam", 0.4, 1), rho=0.5)
    (store / key("sgd", 0.2, 1) / "probes" / "sharpness.json").write_text("{")
    text = text_of(store)
    assert list(table(text, "Probe: quantise-2")) == [("sam", "symmetric 40 %")]
    assert "Options: rho 0.5." in text
    assert f"- sgd, symmetric 20 %, seed 1, run `{key('sgd', 0.2, 1)}`" in text
    assert table(text, "Probe: quantise")["sgd", "symmetric 20 %"]["n"] == "1"


def test_without_flipped_samples_and_with_hostile_names(store: Path, tmp_path: Path) -> None:
    plan = json.loads(study_path(store, "toy").read_text())
    plan["cells"] = [cell | {"row": cell["row"].replace("sgd", "_<b>$\\frac{")} for cell in plan["cells"]]
    write_json(study_path(store, "toy"), plan)
    for path in store.glob("sgd*/probes/mechanism.json"):
        content = json.loads(path.read_text())
        moments = [m | {n: None for n in m if "flipped" in n} for m in content["results"]["moments"]]
        write_json(path, {**content, "results": {**content["results"], "moments": moments}})
    text = text_of(store)
    assert "<b>" not in text
    assert table(text, "Probe: mechanism")["_&lt;b>$\\frac{", "symmetric 20 %"]["features, flipped"] == ""
    named = {row: found("landscape", row, 0.2, 0) for row in ("_<b>$\\frac{", "sam")}
    for drawing in (probe_figures.lines(named), probe_figures.planes(named)):
        drawing.savefig(tmp_path / "drawn.png")


def test_pictures_show_the_figures() -> None:
    named = {row: found("mechanism", row, 0.2, 0) for row in ROWS}
    panel = probe_figures.mechanism(named).axes[0]
    for line, results in zip(panel.lines, named.values(), strict=True):
        assert list(line.get_xdata()) == [2, 3]  # of the last stage alone
        assert list(line.get_ydata()) == [m["last_layer_norm"] for m in results["moments"][1:]]
    levels = {row: found("quantise", row, 0.2, 0) for row in ROWS}
    plain, zero_shot = probe_figures.quantised(levels).axes
    for panel, kind in ((plain, "plain"), (zero_shot, "zero_shot")):
        for line, results in zip(panel.lines, levels.values(), strict=True):
            shares = [results["bits"][b][f"{kind}_accuracy"] for b in ("2", "8")] + [results["accuracy"]]
            assert list(line.get_ydata()) == pytest.approx([100 * share for share in shares])
    for of in levels.values():
        of["bits"] = {b: {"plain_accuracy": level["plain_accuracy"]} for b, level in of["bits"].items()}
    assert len(probe_figures.quantised(levels).axes) == 1
    label = (
        probe_figures.densities({"sgd": found("sharpness", "sgd", 0.2, 0)}).axes[2].get_legend_handles_labels()[1][0]
    )
    assert label.startswith(f"sgd: largest {found('sharpness', 'sgd', 0.2, 0)['test']['lambda_max']:.3g}")


def test_a_report_needs_no_torch() -> None:
    code = "import sys, noisysam.report.probes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
