"""The plain loop for comparison, as public repositories write it: torchvision's transforms of PIL images in a
DataLoader, float32, the default memory format, torch's own layers and optimizers, the loss read in every step.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils import data

from noisysam import models
from noisysam.core.errors import UserError
from noisysam.data.datasets import Dataset
from noisysam.models.blocks import LastActivation


class Images(data.Dataset[tuple[Tensor, int]]):
    """Transformed PIL images with their labels, as torchvision.datasets.CIFAR10 returns them."""

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images: NDArray[np.uint8] = dataset.train_images.numpy()
        self.labels: list[int] = dataset.train_labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def transform(policy: str, dataset: Dataset) -> Callable[[Image.Image], Tensor]:
    """torchvision's equivalent of an augmentation policy."""
    from torchvision import transforms as t

    further = {
        "standard": [],
        "color": [t.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2)],
        "rand": [t.RandAugment()],
    }
    crop = [t.RandomCrop(dataset.train_images.shape[1], dataset.pad), t.RandomHorizontalFlip()]
    composed: Callable[[Image.Image], Tensor] = t.Compose(
        [*crop, *further[policy], t.ToTensor(), t.Normalize(*dataset.channel_statistics())]
    )
    return composed


def batches(
    dataset: Dataset, policy: str, rows: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches on the device; the workers are kept from one epoch to the next."""
    loader = data.DataLoader(
        Images(dataset, transform(policy, dataset)),
        batch_size=rows,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for inputs, labels in loader:
            yield inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def worker_counts(cores: int) -> list[int]:
    """The numbers of workers to try: 0, 1, 2, 4, ... and the number of cores."""
    return sorted({0, *(2**k for k in range(int(math.log2(cores)) + 1)), cores})


def network(name: str, width: float, device: torch.device) -> nn.Module:
    """The same architecture and weights, built from torch's own layers."""
    module = models.build(name, 10, width=width)
    for parent in list(module.modules()):
        for child_name, child in parent.named_children():
            if isinstance(child, models.BatchNorm):
                norm = nn.BatchNorm2d(child.num_features, child.eps)
                norm.load_state_dict(child.state_dict())
                setattr(parent, child_name, norm)
            elif isinstance(child, LastActivation):
                setattr(parent, child_name, nn.LeakyReLU(child.slope, True) if child.slope else nn.ReLU(True))
    return module.to(memory_format=torch.contiguous_format).to(device)


def sam_class() -> Callable[..., torch.optim.Optimizer]:
    """SAM of ``pytorch_optimizer``; ``UserError`` if that is not installed."""
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        raise UserError(
            "the plain loop needs pytorch_optimizer: pip install 'noisysam[bench]', or choose other parts than loop"
        ) from None
    found: Callable[..., torch.optim.Optimizer] = SAM
    return found


def optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """SGD of torch, or SAM of ``pytorch_optimizer`` around it."""
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), **settings)
    return sam_class()(module.parameters(), torch.optim.SGD, rho=0.1, **settings)


def loop(module: nn.Module, opt: str, source: Iterator[tuple[Tensor, Tensor]]) -> Callable[[int], None]:
    """A function that takes a given number of steps."""
    rule, criterion = optimizer(opt, module), nn.CrossEntropyLoss()
    module.train()

    def steps(count: int) -> None:
        total = 0.0
        for inputs, labels in (next(source) for _ in range(count)):

            def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                rule.zero_grad()
                loss: Tensor = criterion(module(inputs), labels)
                loss.backward()
                return loss

            loss = closure()
            if opt == "sgd":
                rule.step()
            else:
                rule.step(closure)  # type: ignore[arg-type]
            total += loss.item()

    return steps
