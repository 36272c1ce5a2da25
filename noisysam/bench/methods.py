"""Time of an epoch of every method relative to cross-entropy, with SGD, in one process with one thread.

Each method runs one epoch of each of its trainings and is measured in the last one, after its warm-up: epoch 150 of
200. These are complete epochs of a real training on a small data set.
"""

from typing import Any

from noisysam.bench.measure import BATCH, Findings, Row, Settings, interleaved, median, ratio, seconds
from noisysam.bench.runs import dataset, part_of, trainer
from noisysam.data.datasets import Dataset
from noisysam.methods import METHODS, StageContext
from noisysam.runs.config import RunConfig, validate
from noisysam.training.progress import note
from noisysam.training.trainer import Trainer

EPOCHS, LATE = 200, 150
STEPS = 10  # in an epoch of cross-entropy
ROUNDS = 5
QUICK = ("ce", "elr", "co-teaching", "dividemix", "nts")


def measure(settings: Settings) -> Findings:
    """One row for every registered method."""
    names = [name for name in METHODS if not settings.quick or name in QUICK]
    batch, model, width = (8, "resnet8", 0.25) if settings.quick else (BATCH, "resnet20", 1.0)
    images, validation = STEPS * batch, batch
    data = part_of(dataset(settings), images + validation, batch)
    common = {
        "model": model,
        "width": width,
        "batch": batch,
        "epochs": EPOCHS,
        "noise": 0.4,
        "compile": "off",
        "val_fraction": validation / (images + validation),
    }
    begun = {}
    for name in names:
        note(f"  {name}")
        begun[name] = walked(validate({"method": name, **common}), data)
    epochs = {name: Late(run) for name, (run, _) in begun.items()}
    found = interleaved(epochs, settings.times(ROUNDS))
    rows: list[Row] = [
        {
            "method": f"`{name}`",
            "epoch over CE's": ratio(found[name], found["ce"]),
            "seconds": median(found[name]),
            "forwards": epochs[name].line["forward_samples"] / images,
            "backwards": epochs[name].line["gradient_samples"] / images,
            "trainings": len(begun[name][1]),
            "epochs in all, of 200": sum(begun[name][1]),
        }
        for name in names
    ]
    facts = {
        "rounds": settings.times(ROUNDS),
        "images": images,
        "data": data.name,
        "threads": 1,
        **common,
        "opt": "sgd",
    }
    return Findings({"Epoch over cross-entropy's": rows}, facts)


def walked(config: RunConfig, data: Dataset) -> tuple[Trainer, list[int]]:
    """A run in its last training, after one epoch of each; the length of each training in epochs."""
    run, lengths = trainer(config, data, begun=False), []
    context = StageContext(lambda which: run.evaluator.reported(run.reported))
    for number, stage in enumerate(run.method.stages(context)):
        run.begin_stage(number, stage)
        run.train_epoch(0)
        lengths.append(run.settings.epochs)
    return run, lengths


class Late:
    """Repeats an epoch after the warm-up and returns its time. ``line``: the measurements of the last one."""

    def __init__(self, run: Trainer) -> None:
        self.run = run
        self.train()

    def train(self) -> None:
        """Train the epoch."""
        self.line: dict[str, Any] = self.run.train_epoch(LATE)

    def __call__(self) -> float:
        """Seconds of the epoch."""
        return seconds(self.train, self.run.device)
