"""The training set on the device, and what is drawn from it: epochs, batches, views."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from noisysam.core.rng import stream
from noisysam.data.augmentation import CUTOUT, augment, cutout, normalise
from noisysam.data.datasets import Dataset

PLAIN_ROWS = 500  # rows of a forward without gradient


@dataclass
class Batch:
    """What was drawn for one step: no clean labels. ``views``: further augmentations of the same rows (the first is
    ``inputs``); ``network``: the only one that learns from it, where networks take turns; ``divided``: whether a
    labelled half comes before an unlabelled one."""

    inputs: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    network: int | None = None
    views: list[Tensor] = field(default_factory=list)
    divided: bool = False


class Loader:
    """A part of a data set on the device; ``labels`` is a tensor that a stage may replace.

    Images are kept as uint8 with a zero border; a batch is one gather for crop and flip. Normalised with the training
    set's statistics. The incomplete last batch of an epoch is dropped, so that every step has the same shape.
    """

    def __init__(
        self,
        dataset: Dataset,
        index: Tensor,
        labels: Tensor,
        *,
        rows: int,
        policy: str,
        device: torch.device,
        seed: int,
    ) -> None:
        """``index``: which training images, in the order that ``labels`` (n,) has; ``rows``: of a batch."""
        self.pad, self.flip, self.policy = dataset.pad, dataset.flip, policy
        images = dataset.train_images[index]
        self.size = images.shape[1]
        self.images = F.pad(images, (0, 0, self.pad, self.pad, self.pad, self.pad)).to(device)
        self.labels = labels.to(device)
        self.rows = min(rows, len(labels))
        self.device, self.seed = device, seed
        self.mean, self.std = (torch.tensor(s, device=device) for s in dataset.channel_statistics())

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, stage: int, number: int, subset: Tensor | None = None) -> "Epoch":
        """An epoch over all samples, or over those of ``subset``."""
        return Epoch(self, stage, number, subset)

    def plain(self, index: Tensor | None = None) -> Iterator[Tensor]:
        """Normalised inputs without augmentation, in large batches, in order."""
        index = torch.arange(len(self), device=self.device) if index is None else index
        unused = torch.Generator(self.device)
        for part in index.split(PLAIN_ROWS):
            images = augment("none", self.images, part, size=self.size, pad=self.pad, flip=False, generator=unused)
            yield normalise(images, self.mean, self.std)

    def augmented(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Inputs as they are drawn for training, in large batches, in order."""
        assert generator is not None
        for part in torch.arange(len(self), device=self.device).split(PLAIN_ROWS):
            yield self.draw(part, generator)

    def draw(self, index: Tensor, generator: torch.Generator, policy: str | None = None) -> Tensor:
        """Some samples' images, augmented (None: by the run's policy) and normalised."""
        policy, size = policy or self.policy, self.size
        images = augment(policy, self.images, index, size=size, pad=self.pad, flip=self.flip, generator=generator)
        inputs = normalise(images, self.mean, self.std)
        return cutout(inputs, CUTOUT[policy], generator) if policy in CUTOUT else inputs


class Epoch:
    """One epoch's draws: order and augmentation come from streams of their own, so that they do not depend on what
    a method draws."""

    def __init__(self, loader: Loader, stage: int, number: int, subset: Tensor | None) -> None:
        self.loader, self.number, self.subset = loader, number, subset
        self.rows = loader.rows if subset is None else min(loader.rows, len(subset))
        self.order = stream(loader.seed, stage, number, "order", loader.device)
        self.crops = stream(loader.seed, stage, number, "augment", loader.device)
        self.extra = stream(loader.seed, stage, number, "augment", loader.device, part=1)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self.loader) if self.subset is None else len(self.subset)
        order = torch.randperm(n, generator=self.order, device=self.loader.device)
        if self.subset is not None:
            order = self.subset[order]
        for index in order[: n // self.rows * self.rows].split(self.rows):
            yield Batch(self.loader.draw(index, self.crops), self.loader.labels[index], index, self.number)

    def __len__(self) -> int:
        return (len(self.loader) if self.subset is None else len(self.subset)) // self.rows

    def batch(self, index: Tensor, network: int | None = None, views: int = 1, divided: bool = False) -> Batch:
        """A batch of chosen samples in several views, drawn apart from the plain epoch's crops."""
        drawn = [self.view(index) for _ in range(views)]
        return Batch(drawn[0], self.loader.labels[index], index, self.number, network, drawn, divided)

    def view(self, index: Tensor, policy: str | None = None) -> Tensor:
        """Chosen samples' images, drawn apart from the plain epoch's crops; ``policy``: of a strong view, None for the
        run's own."""
        return self.loader.draw(index, self.extra, policy)

    def cycle(self, pool: Tensor, rows: int, steps: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """``steps`` batches of ``rows`` indices from ``pool``, reshuffled each time it is used up."""
        turns = -(-rows * steps // len(pool))
        order = [pool[torch.randperm(len(pool), generator=generator, device=pool.device)] for _ in range(turns)]
        yield from torch.cat(order)[: rows * steps].split(rows)
