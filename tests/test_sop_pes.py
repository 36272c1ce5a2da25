"""SOP and PES: the loss by numpy, own steps, the parts that each stage moves, the selection."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from noisysam import fit
from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods import METHODS, RunInfo
from noisysam.methods.pes import PES
from noisysam.methods.sop import SOP
from noisysam.runs.config import RunConfig
from noisysam.training.trainer import Trainer

FACTS = RunInfo(samples=7, classes=4, epochs=16, device=torch.device("cpu"))


def test_sop_starts_as_cross_entropy_and_learns_its_parameters(
    digits: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = SOP(SOP.Options(), FACTS)
    method.on_stage(torch.arange(7) % 4)
    z, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    hard = (torch.eye(4)[z.argmax(1)] - torch.eye(4)[y]).square().sum(1)
    expected = torch.nn.functional.cross_entropy(z, y, reduction="none") + hard
    torch.testing.assert_close(method.loss(z, Task(0, z, y, torch.arange(5))), expected, rtol=1e-3, atol=1e-3)

    found: list[SOP] = []
    begin = Trainer.begin_stage

    def noted(self: Trainer, number: int, stage: Any) -> None:
        begin(self, number, stage)
        assert isinstance(self.method, SOP)
        found.append(self.method)

    monkeypatch.setattr(Trainer, "begin_stage", noted)
    result = fit(digits(method="sop", opt="sam", noise=0.4, epochs=3, lr=0.1), store=tmp_path)
    assert result.record["status"] == "finished"
    assert float(found[0].u.detach().abs().max()) > 1e-6


def test_sop_publishes_by_noise() -> None:
    assert SOP.published("cifar10", "symmetric", 0.4) == {}
    assert SOP.published("cifar100", "symmetric", 0.4) == {"lr_u": 1.0, "lr_v": 10.0}
    assert SOP.published("cifar100", "asymmetric", 0.4) == {"lr_u": 0.1, "lr_v": 100.0}


def test_pes_stages() -> None:
    """Refinement is given in steps: at 100 steps an epoch 2,457 and 1,755 are 25 and 18 epochs."""
    method = PES(PES.Options(), dataclasses.replace(FACTS, steps=100))
    stages = list(method.stages(None))  # type: ignore[arg-type]
    assert [stage.settings["epochs"] for stage in stages] == [2, 25, 18, 13]
    assert [(stage.start, stage.fresh, stage.trainable, stage.frozen) for stage in stages] == [
        ("scratch", 0, None, 0), ("continue", 2, 2, 0), ("continue", 1, 1, 0), ("continue", 0, None, 2),
    ]  # fmt: skip
    assert stages[1].settings["lr"] == 1e-4
    assert "lr" not in stages[3].settings


def in_its_last_part(labels: Tensor) -> PES:
    method = PES(PES.Options(), FACTS)
    list(method.stages(None))  # type: ignore[arg-type]
    method.on_stage(labels)
    return method


def test_pes_selects_what_agrees_and_balances_its_classes() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    method = in_its_last_part(labels)
    predicted = torch.tensor([0, 0, 0, 1, 2, 2, 0])  # agree: three of class 0, one of 1, one of 2, none of 3
    method.on_epoch(0, lambda k, features=False, augmented=False: torch.eye(4)[predicted])
    assert method.selected.tolist() == [1, 1, 1, 1, 0, 1, 0]
    expected = torch.tensor([5 / 9, 5 / 3, 5 / 3, 0.0])
    torch.testing.assert_close(method.balance, expected)
    y = torch.tensor([0, 1, 3])
    (task,) = method.tasks(Batch(torch.zeros(3, 1), y, torch.tensor([0, 3, 6]), 0), None)  # type: ignore[arg-type]
    z = torch.randn(3, 4)
    plain = torch.nn.functional.cross_entropy(z, y, weight=expected)
    torch.testing.assert_close(method.loss(z, task).mean(), plain)


def test_pes_selects_by_the_mean_of_two_augmented_views() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    method, kinds = in_its_last_part(labels), []
    views = iter([torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0, 3.0, 0, 0]])])

    def predict(k: int, features: bool = False, augmented: bool = False) -> Tensor:
        kinds.append(augmented)
        return next(views).expand(7, 4)

    method.on_epoch(0, predict)
    assert kinds == [True, True]
    assert method.selected.tolist() == [0, 0, 1, 1, 0, 0, 0]  # the second is the surer


def test_pes_holds_what_was_drawn_anew_fixed(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The head and the last stage of the network are those of the refinement at the end of the last part."""
    options = {"first": 0.3, "second": 6, "third": 6}
    config = digits(method="pes", method_option=options, noise=0.4, epochs=4, train_subset=200, snapshots=1)
    folder = fit(config, store=tmp_path).folder
    refined, last = (load_file(folder / name) for name in ("snapshots/2-0.safetensors", "weights.safetensors"))
    moved = {n for n in last if "running" not in n and "tracked" not in n and not torch.equal(last[n], refined[n])}
    assert moved
    assert not any("head" in n or "stage3" in n for n in moved)


class Stop(Exception):
    """Pulls the plug."""


class Interrupt:
    """Ends a run after the first epoch of a stage."""

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        if (stage, number) == (self.stage, 0):
            raise Stop


@pytest.mark.parametrize("stage", [1, 3])
def test_pes_resumes_in_a_late_stage(stage: int, digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = {"first": 0.3, "second": 20, "third": 20}
    config = digits(method="pes", method_option=options, noise=0.4, epochs=4, train_subset=200)
    whole = fit(config, store=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(config, store=tmp_path / "parts", progress=Interrupt(stage))
    parts = fit(config, store=tmp_path / "parts")
    assert whole.record["results"] == parts.record["results"]


def test_both_are_registered() -> None:
    assert {"sop", "pes"} <= set(METHODS)
