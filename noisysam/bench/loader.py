"""Augmented batches per second: this package, torchvision's transforms in a DataLoader, kornia's batched augmentation.

This package and kornia run in one process with one thread; the DataLoader uses its fastest number of workers. On a GPU,
all batches end on the GPU, and this package and kornia also compute them there.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from noisysam.bench import plain
from noisysam.bench.measure import BATCH, Findings, Row, Settings, estimate, interleaved, ratio, seconds
from noisysam.bench.runs import dataset
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Loader
from noisysam.training import devices
from noisysam.training.progress import note

POLICIES = ("standard", "color", "rand")
ROUND = 2.0  # seconds per source and round
ROUNDS = 10

Source = Iterator[Any]  # of batches


def measure(settings: Settings) -> Findings:
    """Images per second of each source, for each augmentation policy."""
    device = devices.resolve_device("auto")
    data, rows = dataset(settings), 16 if settings.quick else BATCH
    table = [compare(policy, data, rows, device, settings) for policy in POLICIES]
    return Findings(
        {"Augmented images a second": table},
        {"rounds": settings.times(ROUNDS), "batch": rows, "data": data.name, "threads": 1},
    )


def compare(policy: str, data: Dataset, rows: int, device: torch.device, settings: Settings) -> Row:
    """Compare the sources for one policy; kornia's columns are empty if it is not installed."""
    note(f"  {policy}")
    whole = 0.05 if settings.quick else ROUND
    tried = {
        workers: drawing(plain.batches(data, policy, rows, workers, device), rows, workers, whole / 2, device)
        for workers in ([0, 1] if settings.quick else plain.worker_counts(devices.cores()))
    }
    best = max(tried, key=lambda workers: tried[workers]())
    theirs = tried[best]
    tried.clear()
    cases = {"ours": drawing(ours(data, policy, rows, device), rows, 0, whole, device), "torchvision": theirs}
    batched = kornia_transform(policy, data, device)
    if batched is not None:
        cases["kornia"] = drawing(kornia_batches(data, batched, rows, device), rows, 0, whole, device)
    found = interleaved(cases, settings.times(ROUNDS))
    kornia = found.get("kornia")
    return {
        "policy": policy, "ours": estimate(found["ours"]), "torchvision": estimate(found["torchvision"]),
        "workers": best, "kornia": kornia and estimate(kornia),
        "ours / torchvision": ratio(found["ours"], found["torchvision"]),
        "ours / kornia": kornia and ratio(found["ours"], kornia),
    }  # fmt: skip


def drawing(source: Source, rows: int, workers: int, whole: float, device: torch.device) -> Callable[[], float]:
    """A function that draws batches for about ``whole`` seconds and returns images per second. Batches that the workers
    have prefetched (two each) are drawn before the clock starts."""
    take(source, 2)
    count = max(2, round(whole * 3 / seconds(lambda: take(source, 3), device)))

    def rate() -> float:
        take(source, 2 * workers)
        return count * rows / seconds(lambda: take(source, count), device)

    return rate


def take(source: Source, count: int) -> None:
    """Draw ``count`` batches and discard them."""
    for _ in itertools.islice(source, count):
        pass


def ours(data: Dataset, policy: str, rows: int, device: torch.device) -> Source:
    """Endless batches of this package's loader."""
    index = torch.arange(len(data.train_labels))
    loader = Loader(data, index, data.train_labels, rows=rows, policy=policy, device=device, seed=0)
    return itertools.chain.from_iterable(loader.epoch(0, number) for number in itertools.count())


def kornia_transform(policy: str, data: Dataset, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """kornia's equivalent of a policy, for float images (n, 3, H, W) in [0, 1]; None if kornia is not installed."""
    try:
        import kornia.augmentation as k
    except ImportError:
        return None
    mean, std = (torch.tensor(s) for s in data.channel_statistics())
    size = data.train_images.shape[1]
    steps = [k.RandomCrop((size, size), padding=data.pad), k.RandomHorizontalFlip(p=0.5)]
    if policy == "color":
        steps.append(k.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2, p=1.0))
    if policy == "rand":
        steps.append(k.auto.RandAugment(n=2, m=9))
    transform: Callable[[Tensor], Tensor] = torch.nn.Sequential(*steps, k.Normalize(mean=mean, std=std)).to(device)
    return transform


def kornia_batches(data: Dataset, transform: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> Source:
    """Endless batches, gathered from uint8 images and transformed on the device."""
    images, labels = data.train_images.permute(0, 3, 1, 2).contiguous().to(device), data.train_labels.to(device)
    while True:
        for index in torch.randperm(len(images), device=device).split(rows)[: len(images) // rows]:
            with torch.no_grad():
                yield transform(images[index].float() / 255), labels[index]
