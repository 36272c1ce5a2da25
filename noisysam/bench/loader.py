"""Augmented batches a second: ours, torchvision's transforms in a DataLoader, kornia's batched augmentation.

Ours and kornia's run in this process with one thread; the DataLoader has its best number of workers beside it. On a
GPU the batches end there, and ours and kornia's are made there.
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
ROUND = 2.0  # seconds that each source gives batches in a round
ROUNDS = 10

Source = Iterator[Any]  # of batches


def measure(settings: Settings) -> Findings:
    """Images a second of each source under each policy."""
    device = devices.resolve_device("auto")
    data, rows = dataset(settings), 16 if settings.quick else BATCH
    table = [compare(policy, data, rows, device, settings) for policy in POLICIES]
    return Findings(
        {"Augmented images a second": table},
        {"rounds": settings.times(ROUNDS), "batch": rows, "data": data.name, "threads": 1},
    )


def compare(policy: str, data: Dataset, rows: int, device: torch.device, settings: Settings) -> Row:
    """One policy; kornia's column is empty where it is not installed."""
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
    """A function that draws batches for about ``whole`` seconds and returns images a second. What lay ready (two
    batches a worker) is drawn before the clock starts."""
    take(source, 2)
    count = max(2, round(whole * 3 / seconds(lambda: take(source, 3), device)))

    def rate() -> float:
        take(source, 2 * workers)
        return count * rows / seconds(lambda: take(source, count), device)

    return rate


def take(source: Source, count: int) -> None:
    """Draw so many batches and drop them."""
    for _ in itertools.islice(source, count):
        pass


def ours(data: Dataset, policy: str, rows: int, device: torch.device) -> Source:
    """Batches of our loader without end."""
    index = torch.arange(len(data.train_labels))
    loader = Loader(data, index, data.train_labels, rows=rows, policy=policy, device=device, seed=0)
    return itertools.chain.from_iterable(loader.epoch(0, number) for number in itertools.count())


def kornia_transform(policy: str, data: Dataset, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """kornia's counterpart of a policy, for float (n, 3, H, W) from 0 to 1; None where kornia is not installed."""
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
    """Batches gathered from uint8 images on the device, and transformed there."""
    images, labels = data.train_images.permute(0, 3, 1, 2).contiguous().to(device), data.train_labels.to(device)
    while True:
        for index in torch.randperm(len(images), device=device).split(rows)[: len(images) // rows]:
            with torch.no_grad():
                yield transform(images[index].float() / 255), labels[index]
