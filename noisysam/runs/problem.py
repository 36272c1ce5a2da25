"""What a run learns from: its data, its noisy labels, what is held out, and so its key."""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from noisysam import data, models, noise
from noisysam.core.errors import UserError
from noisysam.core.files import file_digest
from noisysam.data.datasets import Dataset
from noisysam.noise.labels import NoisyLabels
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder


@dataclass(frozen=True, eq=False)
class Problem:
    """``noisy`` covers the whole training set (``chosen``: its place in the data set); ``train`` and ``val`` are
    places in it. Drawn before anything is held out, so the labels do not depend on the split."""

    dataset: Dataset
    noisy: NoisyLabels
    chosen: np.ndarray
    train: np.ndarray
    val: np.ndarray

    @property
    def digests(self) -> dict[str, str]:
        """Of the data set and of the labels: part of the key."""
        return {"data": self.dataset.digest, "labels": self.noisy.digest}

    def save_labels(self, folder: RunFolder) -> None:
        """Keep the label file in the store, once. It is written in the run's own folder, which is locked: others may
        write the same file at the same time, and what a killed process leaves there is removed."""
        path = folder.store / "labels" / f"{self.noisy.digest[:16]}.npz"
        if not path.exists():
            draft = folder.path / ".labels.npz"
            noise.save(self.noisy, draft)
            path.parent.mkdir(exist_ok=True)
            for suffix in (".csv", ".npz"):  # the .npz last: it says that both are there
                draft.with_suffix(suffix).replace(path.with_suffix(suffix))


def load_dataset(name: str, data_dir: Path | None, image_size: int | None = None) -> Dataset:
    """A data set, kept for the next run of the same process for as long as its files stay as they are."""
    if name.endswith(".npz") and ":" not in name:
        raise UserError(f"--dataset {name}: own data are given as npz:{name}")
    return _load_dataset(name, data_dir, image_size, data.changed(name))


@lru_cache(maxsize=2)
def _load_dataset(name: str, data_dir: Path | None, image_size: int | None, changed: int) -> Dataset:
    return data.load(name, data_dir, image_size)


def prepare(config: RunConfig, dataset: Dataset | None = None) -> Problem:
    """The problem that a configuration poses; ``dataset`` takes the place of the configured one."""
    dataset = dataset or load_dataset(config.dataset, config.data_dir, config.image_size)
    clean = dataset.train_labels.numpy()
    chosen = np.arange(len(clean))
    if config.train_subset is not None:
        chosen = data.balanced_subset(clean, config.train_subset, dataset.classes, config.subset_seed)
    noisy = noise_labels(config, dataset, chosen)
    facts = config.recipe().noise_facts
    if noisy.clean is None and facts:
        raise UserError(
            f"method {config.method} is told the noise {facts[0]}, but the correct training labels are not known: "
            f"give it as an option (`noisysam list methods`)"
        )
    train, val = data.split_validation(len(chosen), config.val_fraction, config.noise_seed)
    return Problem(dataset, noisy, chosen, train, val)


def weights_digest(config: RunConfig) -> dict[str, str]:
    """Of the weights that a run begins with, if it does: part of the key."""
    path = models.weights_file(config.model, config.pretrained)
    return {} if path is None else {"pretrained": _file_digest(path, *data.stamp(path))}


@lru_cache(maxsize=16)
def _file_digest(path: Path, changed: int, size: int) -> str:
    return file_digest(path)


def noise_labels(config: RunConfig, dataset: Dataset, chosen: np.ndarray) -> NoisyLabels:
    """The noisy labels of the chosen training images. Those that exist already cover the whole data set."""
    clean, given = dataset.train_labels.numpy(), dataset.noisy_labels
    whole = noise.brings_labels(config.noise_type)
    if given is not None and not whole and not config.noise:
        warnings.warn(f"{dataset.name} brings noisy labels: --noise-type given trains on them", stacklevel=2)
    index = np.arange(len(clean)) if whole else chosen
    noisy = noise.make(
        config.noise_type,
        clean[index],
        dataset.classes,
        rate=config.noise,
        seed=config.noise_seed,
        draw=config.noise_draw,
        images=dataset.train_images[index].numpy() if config.noise_type == "instance" else None,
        superclasses=dataset.superclasses,
        data_dir=config.data_dir,
        given=None if given is None else given.numpy(),
    )
    return noisy.take(chosen) if whole else noisy
