"""Complete records for tests that care about a few of their fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.training.fit import fit

COMPLETE: dict[str, Any] = {
    "schema": 1,
    "key": "0" * 16,
    "status": "finished",
    "name": "sgd, symmetric 0.4, seed 0, digits resnet8",
    "config": {"dataset": "digits", "noise": 0.4, "method": "ce", "opt": "sgd", "seed": 0},
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
