"""A stage that is a finished run by itself: its predictions are taken from there and not trained again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noisysam import methods
from noisysam.core.environment import environment
from noisysam.core.errors import UserError
from noisysam.core.files import file_digest
from noisysam.methods import Stage
from noisysam.runs.config import RunConfig
from noisysam.runs.predictions import PREDICTIONS, read_predictions
from noisysam.runs.record import RunFolder
from noisysam.training.trainer import Trainer
from noisysam.training.weights import read_networks

SAME_BITS = ("numerics", "torch", "instruction_set")  # of the environment: what decides the bits of a training


@dataclass(frozen=True)
class FinishedStage:
    """A finished run that is a stage of another: its key, its epochs, the predicted classes of the training set at its
    'last' epoch and, where it is known, at the 'selected' one; the digest of the file that they are from."""

    key: str
    lines: list[dict[str, Any]]
    predictions: Mapping[str, Tensor]
    digest: str


def alone(config: RunConfig, stage: Stage) -> RunConfig:
    """The configuration of the run that is this stage by itself."""
    name = methods.without_stages(config.method)
    own = methods.compose(name).Options.model_fields
    options = {option: value for option, value in config.method_option.items() if option in own}
    return config.model_copy(update={**stage.settings, "method": name, "method_option": options})


def find(trainer: Trainer, stage: Stage, digests: Mapping[str, str], store: Path) -> FinishedStage | None:
    """The finished run in ``store`` that is this stage, trained to the same bits; None without one, or where its files
    are damaged."""
    config = alone(trainer.config, stage)
    folder = RunFolder(store, config.key(digests))
    try:
        record = folder.record
        if record is None or record["status"] != "finished" or not _same_bits(record, trainer):
            return None
        samples, classes = len(trainer.loader), trainer.problem.dataset.classes
        if (path := folder.path / PREDICTIONS).exists():
            found = read_predictions(path, samples, classes)
            predictions = {name: torch.from_numpy(values) for name, values in found.items()}
        elif (path := folder.path / "weights.safetensors").exists():
            modules = read_networks(path, config, trainer.problem, trainer.device)
            predictions = {"last": trainer.evaluator.reported(modules).argmax(1)}
        else:
            return None
        return FinishedStage(folder.key, folder.epochs, predictions, file_digest(path))
    except (UserError, KeyError):
        return None


def _same_bits(record: Mapping[str, Any], trainer: Trainer) -> bool:
    here, there = environment(), record["environment"]
    same = all(here[name] == there.get(name) for name in SAME_BITS) and not record.get("earlier_environments")
    return same and all(
        record["resolved"].get(name) == trainer.resolved[name] for name in ("device", "precision", "compile", "threads")
    )
