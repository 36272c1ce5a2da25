"""Data for the benchmark, and runs that are started but not finished."""

import torch

from noisysam.bench.measure import Settings
from noisysam.core.errors import UserError
from noisysam.data.datasets import CIFAR10_CLASSES, Dataset
from noisysam.methods import Stage
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import load_dataset, prepare
from noisysam.training import devices
from noisysam.training.trainer import Trainer


def dataset(settings: Settings) -> Dataset:
    """CIFAR-10 if it is found, else generated images of its shape; with ``quick``, a few generated images."""
    if settings.quick:
        return generated(512, 64)
    try:
        return load_dataset("cifar10", settings.data_dir)
    except UserError:
        return generated(50_000, 10_000)


def generated(train: int, test: int) -> Dataset:
    """Random images of CIFAR-10's shape, with labels 0, 1, ..., 9, 0, ..."""
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)

    def labels(n: int) -> torch.Tensor:
        return torch.arange(n) % len(CIFAR10_CLASSES)

    arrays = images(train), labels(train), images(test), labels(test)
    return Dataset("generated", *arrays, CIFAR10_CLASSES, pad=4, flip=True)


def part_of(whole: Dataset, train: int, test: int) -> Dataset:
    """The first images of a data set."""
    arrays = whole.train_images[:train], whole.train_labels[:train], whole.test_images[:test], whole.test_labels[:test]
    return Dataset(whole.name, *arrays, whole.class_names, pad=whole.pad, flip=whole.flip)


def trainer(config: RunConfig, data: Dataset, begun: bool = True) -> Trainer:
    """A trainer on ``data``; if ``begun``, in its first stage."""
    problem = prepare(config, data)
    made = Trainer(config, problem, devices.resolve(config, config.epochs * len(problem.train)))
    if begun:
        made.begin_stage(0, Stage())
    return made
