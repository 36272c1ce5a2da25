"""Complete records for tests that care about a few of their fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisysam.core.files import write_json
from noisysam.runs.record import RunFolder, study_path
from noisysam.studies import plan as plans
from noisysam.training.fit import fit

COMPLETE: dict[str, Any] = {
    "schema": 1,
    "key": "0" * 16,
    "status": "finished",
    "name": "sgd, symmetric 0.4, seed 0, digits resnet8",
    "config": {"dataset": "digits", "noise_type": "symmetric", "noise": 0.4, "method": "ce", "opt": "sgd", "seed": 0},
    "optimizer_options": {},
    "method_options": {},
    "resolved": {"device": "cpu", "device_name": "a CPU", "precision": "fp32", "compile": False, "threads": 1},
    "oracle": [],
    "digests": {"data": "d" * 64, "labels": "9" * 64},
    "revisions": {"method ce": 1, "optimizer sgd": 1},
    "noise": {"type": "symmetric", "rate": 0.4, "flip_rate": 0.36, "digest": "9" * 64,
              "matrix": [[0.6, 0.4], [0.4, 0.6]]},
    "data": {"name": "digits", "train": 100, "val": 10, "test": 50},
    "model": {"name": "resnet8", "parameters": 1000},
    "environment": {"commit": "abc1234"},
    "started": "2026-11-22T18:00:00+00:00",
    "ended": "2026-11-22T18:05:00+00:00",
    "results": {"last": 0.5, "last_ten": 0.5, "best": 0.5, "best_epoch": 0},
    "cost": {
        "train_seconds": 60.0, "eval_seconds": 1.0, "gradient_samples": 200, "gradient_evaluations": 1.0,
        "images_per_second": 100.0,
    },
    "error": None,
}  # fmt: skip


def complete(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A record with these fields, and what else a record has; parts are merged."""
    made = {**COMPLETE, **changes}
    for part in ("resolved", "noise", "data", "model", "results", "cost"):
        made[part] = {**COMPLETE[part], **changes.get(part, {})}
    return made


def partial_store(
    store: Path, name: str, plan: Mapping[str, Any], last: Mapping[tuple[str, float, int], float]
) -> None:
    """A store with a study of a study file's content, ``plan``, of which only the cells in ``last`` (row, noise, seed)
    have finished, with these accuracies."""
    cells = []
    for seed in plan["seeds"]:
        for noise in plan["grid"]["noise"]:
            for number, (row, values) in enumerate(plan["rows"].items()):
                if seed not in values.get("seeds", plan["seeds"]):
                    continue
                own = {field: value for field, value in values.items() if field not in ("seeds", "noise")}
                of_noise = {"noise_type": "symmetric", "noise": noise, "noise_draw": "exact", "noise_seed": seed}
                config = {**of_noise, "seed": seed, "method": "ce", "opt": "sgd", **plan["base"], **own}
                key = f"{number}x{noise:g}x{seed}"
                cells.append(
                    {"row": row, "noise_type": "symmetric", "noise": noise, "seed": seed, "key": key, "config": config}
                )
                if (row, noise, seed) in last:
                    labels = f"{round(10 * noise)}{seed}" * 32
                    card = {"rate": noise, "flip_rate": 0.9 * noise, "digest": labels}
                    results = {"last": last[row, noise, seed]}
                    record = {"key": key, "config": config, "noise": card, "results": results}
                    RunFolder(store, key).write(complete(record))
    content = {"schema": 1, "name": name, "file": "", "cells": cells, "planned_seeds": plan["seeds"],
               "published": plan.get("published"), "claims": plan.get("claims", [])}  # fmt: skip
    write_json(study_path(store, name), content)


STUDY = """\
base: {dataset: digits, model: resnet8, train_subset: 60, epochs: 2, batch: 16, width: 0.25, compile: "off"}
grid: {noise: [0.4]}
rows:
  SGD: {}
  SAM: {opt: sam, rho: 0.05}
  GCE: {method: gce}
claims:
  - {text: SAM is better than SGD, kind: greater, rows: [SAM, SGD]}
"""


def trained_store(folder: Path, first: str = "{}") -> tuple[Path, str]:
    """A store with study ``s`` of three cells: the first was trained, the second failed; the key of the first.

    ``first``: the values of the first row.
    """
    path, store = folder / "s.yaml", folder / "store"
    path.write_text(STUDY.replace("SGD: {}", f"SGD: {first}"))
    cells = plans.plan(path)
    plans.save(path, cells, store)
    fit(cells[0].config, store=store)
    RunFolder(store, cells[1].key).write(complete({"key": cells[1].key, "status": "failed", "error": "it broke"}))
    return store, cells[0].key
