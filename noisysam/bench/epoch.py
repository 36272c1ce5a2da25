"""Time of the parts of an epoch: training, evaluation, record files, checkpoint, tracking in MLflow.

ResNet-32 on 10,000 images, one process with one thread, an SQLite file as tracking store. Each round is an epoch; its
parts are timed one after the other, in the order of a run.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from noisysam.bench.measure import BATCH, Findings, Row, Settings, median, ratio, seconds
from noisysam.bench.runs import dataset, part_of
from noisysam.methods import Stage
from noisysam.runs.config import validate
from noisysam.runs.problem import prepare
from noisysam.runs.record import RunFolder
from noisysam.tracking.client import open_store
from noisysam.tracking.tracker import Tracker
from noisysam.training import checkpoint
from noisysam.training.run import Run

IMAGES, EPOCHS = 10_000, 200
ROUNDS = 5
PARTS = ("training", "evaluation", "epochs.csv", "checkpoint", "tracking")


def measure(settings: Settings) -> Findings:
    """Seconds of each part, and relative to the training in the same epoch."""
    batch, model, width, images = (16, "resnet8", 0.25, 128) if settings.quick else (BATCH, "resnet32", 1.0, IMAGES)
    whole = dataset(settings)
    data = part_of(whole, images, len(whole.test_labels))
    values = {"model": model, "width": width, "batch": batch, "epochs": EPOCHS, "noise": 0.4, "val_fraction": 0.0}
    config = validate({**values, "compile": "off" if settings.quick else "auto"})
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        problem = prepare(config, data)
        record = RunFolder(Path(folder) / "runs", config.key(problem.digests))
        run = Run(config, problem, problem.digests, record)
        run.folder.write(run.record)
        run.trainer.begin_stage(0, Stage())
        uri = f"sqlite:///{folder}/mlflow.db"
        open_store(uri, "bench")
        tracker = Tracker(run.folder, uri, "bench")
        for epoch in range(1 + settings.times(ROUNDS)):  # the first one compiles and creates the MLflow run
            for name, spent in one(run, tracker, epoch).items():
                found[name].append(spent)
    found = {name: spent[1:] for name, spent in found.items()}
    found["checkpoint and tracking"] = [c + t for c, t in zip(found["checkpoint"], found["tracking"], strict=True)]
    rows: list[Row] = [
        {"part": name, "seconds": median(spent), "over the training": ratio(spent, found["training"])}
        for name, spent in found.items()
    ]
    facts = {
        "rounds": settings.times(ROUNDS),
        "images": images,
        "test images": len(data.test_labels),
        "model": model,
        "batch": batch,
        "data": data.name,
    }
    return Findings({"An epoch": rows}, {**facts, "threads": 1, "compiled": "yes" if run.resolved["compile"] else "no"})


def one(run: Run, tracker: Tracker, epoch: int) -> dict[str, float]:
    """Seconds of each part of an epoch."""
    trainer, device = run.trainer, run.trainer.device
    line: dict[str, Any] = {"stage": 0, "epoch": epoch, "time": time.time()}

    def train() -> None:
        line.update(trainer.train_epoch(epoch))

    def evaluate() -> None:
        line.update(trainer.measure())

    spent = [seconds(train, device), seconds(evaluate, device)]
    run.lines.append(line)
    spent.append(seconds(lambda: run.folder.write_epochs(run.lines)))
    spent.append(seconds(lambda: checkpoint.save(run.folder.path, run.state(epoch)), device))
    spent.append(seconds(tracker.sync))
    return dict(zip(PARTS, spent, strict=True))
