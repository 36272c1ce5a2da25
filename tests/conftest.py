"""What several test files share: one thread, a tiny data set, a tiny configuration."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from noisysam.data.datasets import Dataset
from noisysam.runs.config import RunConfig


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """A run flushes them, for good; hypothesis would refuse to draw floats after it."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """A data set in memory: 4 classes of 8x8 images, each a pattern of its own under noise."""

    def make(train: int = 48, test: int = 16, channels: int = 1, pad: int = 1, seed: int = 0) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randint(40, 216, (4, 8, 8, channels), generator=generator)

        def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.arange(count) % 4
            noise = torch.randint(-40, 40, (count, 8, 8, channels), generator=generator)
            return (patterns[labels] + noise).to(torch.uint8), labels

        images, labels = draw(train)
        test_images, test_labels = draw(test)
        return Dataset("tiny", images, labels, test_images, test_labels, ("a", "b", "c", "d"), pad=pad, flip=False)

    return make


@pytest.fixture(scope="session")
def tiny(make_dataset: Callable[..., Dataset]) -> Dataset:
    """48 training and 16 test images of 8x8x1."""
    return make_dataset()


@pytest.fixture(scope="session")
def digits() -> Callable[..., RunConfig]:
    """A run of a second on the CPU: ``digits(opt="sam", ...)``."""

    def config(**values: Any) -> RunConfig:
        small: dict[str, Any] = {"train_subset": 60, "batch": 16, "epochs": 2, "noise": 0.4, "val_fraction": 0.2}
        machine = {"device": "cpu", "precision": "fp32", "compile": "off"}
        return RunConfig(dataset="digits", model="resnet8", **{**small, "width": 0.25, "lr": 0.05, **machine, **values})

    return config
