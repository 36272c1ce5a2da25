"""One device and no reading from it within a step, shown without a GPU: on torch's device of shapes ("meta"), where
tensors of two devices do not mix and no value can be read."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import AT_ONCE, OWN_OPTIONS

from noisysam.data.datasets import Dataset
from noisysam.methods import METHODS
from noisysam.optim import OPTIMIZERS
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import prepare
from noisysam.training import devices
from noisysam.training.trainer import Trainer

READ_FIRST = {"ssr": "SSR+ selects samples", "incv": "INCV divides the training set"}
ONE_FIRST = ("pgdf",)  # that train one of their networks in the first training

Configure = Callable[..., RunConfig]
SHAPES = torch.device("meta")


class HostGenerator(torch.Generator):
    """The host's, whatever device is asked for."""

    def __new__(cls, device: Any = None) -> "HostGenerator":
        return super().__new__(cls)


def update(rule: torch.optim.Optimizer) -> None:
    """In place of torch's fused update, which is for devices with numbers: it has all that it needs there."""
    if not hasattr(rule, "found_inf"):  # a method's own
        rule.found_inf = torch.zeros((), device=SHAPES)  # type: ignore[attr-defined]
    params = [p for group in rule.param_groups for p in group["params"] if p.grad is not None]
    assert params
    assert {t.device for p in params for t in (p, p.grad)} | {rule.found_inf.device} == {SHAPES}  # type: ignore[attr-defined, union-attr]


@pytest.fixture
def on_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are on the device of shapes; generators are the host's and autocast is off, as it has neither."""
    monkeypatch.setattr(devices, "resolve_device", lambda name: SHAPES)
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    for rule in (torch.optim.SGD, torch.optim.AdamW):
        monkeypatch.setattr(rule, "step", update)


@pytest.fixture(scope="module")
def images(make_dataset: Callable[..., Dataset]) -> Dataset:
    return make_dataset(train=64)


def steps(config: RunConfig, dataset: Dataset, store: Path) -> int:
    """The steps of a first epoch, each batch as the method draws it; what a method does between epochs is left out."""
    problem = prepare(config, dataset)
    run = Trainer(config, problem, devices.resolve(config, 0))
    run.begin_stage(0, next(run.method.stages(None)))  # type: ignore[arg-type]
    run.processes.average = lambda sums: [torch.tensor([1.0, 1.0, 1.0])]  # type: ignore[method-assign]  # read at the end
    found = run.train_epoch(0)
    return int(found["steps"])


@pytest.mark.usefixtures("on_shapes")
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_no_optimizer_mixes_devices_or_reads(opt: str, digits: Configure, images: Dataset, tmp_path: Path) -> None:
    config = digits(train_subset=None, val_fraction=0.25, opt=opt, opt_option=AT_ONCE.get(opt, {}))
    assert steps(config, images, tmp_path) == 3


@pytest.mark.usefixtures("on_shapes")
@pytest.mark.parametrize("method", METHODS)
def test_no_method_mixes_devices_or_reads(method: str, digits: Configure, images: Dataset, tmp_path: Path) -> None:
    if method in READ_FIRST:
        pytest.skip(f"{READ_FIRST[method]} before its first step")
    options = {"method_option": OWN_OPTIONS.get(method, {})}
    config = digits(train_subset=None, val_fraction=0.25, method=method, opt="sam", sam_m="batch", **options)
    assert steps(config, images, tmp_path) == 3 * (METHODS[method].networks if method not in ONE_FIRST else 1)


@pytest.mark.usefixtures("on_shapes")
def test_both_would_be_seen(
    digits: Configure, images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits(train_subset=None, val_fraction=0.25)
    cross_entropy = METHODS["ce"].loss
    monkeypatch.setattr(METHODS["ce"], "loss", lambda self, z, task: cross_entropy(self, z, task) * torch.ones(len(z)))
    with pytest.raises(RuntimeError, match="device"):
        steps(config, images, tmp_path)
    monkeypatch.setattr(METHODS["ce"], "loss", lambda self, z, task: cross_entropy(self, z, task) * z.mean().item())
    with pytest.raises(RuntimeError, match="item"):
        steps(config, images, tmp_path)
