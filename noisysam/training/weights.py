"""Weights and predictions of finished runs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from noisysam import models
from noisysam.core.errors import UserError
from noisysam.core.files import atomic
from noisysam.data.datasets import read_npz
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import Problem

PREDICTIONS = "predictions.npz"  # in a run's folder: predicted classes of its training set


def read_networks(path: Path, config: RunConfig, problem: Problem, device: torch.device) -> list[nn.Module]:
    """The networks in a file that ``RunFolder.write_weights`` wrote."""
    dataset = problem.dataset
    try:
        weights = load_file(path)
        modules: list[nn.Module] = []
        for k in sorted({int(name.partition(".")[0]) for name in weights}):
            channels = dataset.train_images.shape[3]
            module = models.build(config.model, dataset.classes, channels, width=config.width, norm=config.norm)
            own = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(f"{k}.")}
            module.load_state_dict(own)
            modules.append(module.to(device).to(memory_format=torch.channels_last).eval())
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of this run's networks ({str(error).splitlines()[0]})") from None
    return modules


def write_predictions(path: Path, predicted: Mapping[str, Tensor]) -> None:
    """Keep the predicted classes (n,) of the training set, by epoch: 'last', 'selected' (on noisy validation)."""
    arrays = {name: classes.cpu().numpy().astype(np.uint16) for name, classes in predicted.items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_predictions(path: Path, samples: int, classes: int) -> dict[str, Tensor]:
    """What ``write_predictions`` wrote; ``UserError`` where it does not fit the problem."""
    found = {}
    for name, values in read_npz(path, ("last",), optional=("selected",)).items():
        if values.shape != (samples,) or values.dtype != np.uint16 or values.max(initial=0) >= classes:
            raise UserError(f"{path}: {name} is not a class for each of {samples} images")
        found[name] = torch.from_numpy(values.astype(np.int64))
    return found
