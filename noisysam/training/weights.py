"""Weights of finished runs."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from noisysam import models
from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import Problem


def read_networks(path: Path, config: RunConfig, problem: Problem, device: torch.device) -> list[nn.Module]:
    """The networks in a file that ``RunFolder.write_weights`` wrote."""
    dataset = problem.dataset
    try:
        weights = load_file(path)
        modules: list[nn.Module] = []
        for k in sorted({int(name.partition(".")[0]) for name in weights}):
            channels, size = dataset.train_images.shape[3], dataset.size
            module = models.build(
                config.model, dataset.classes, channels, size=size, width=config.width, norm=config.norm
            )
            own = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(f"{k}.")}
            module.load_state_dict(own)
            modules.append(module.to(device).to(memory_format=torch.channels_last).eval())
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of this run's networks ({str(error).splitlines()[0]})") from None
    return modules
