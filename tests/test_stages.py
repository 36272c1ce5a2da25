"""What a method may ask of the loop beyond a loss: continued stages, frozen and fresh blocks, parameters of its own."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from noisysam import fit
from noisysam.core.errors import UserError
from noisysam.core.task import Task
from noisysam.methods import METHODS, Method, Stage, StageContext
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.training.trainer import Trainer

Configure = Callable[..., RunConfig]


class Refine(Method):
    """Trains, draws its last block anew and trains that alone, then all of it."""

    def stages(self, context: StageContext) -> Iterator[Stage]:
        yield Stage()
        yield Stage(start="continue", fresh=2, trainable=2, settings={"opt": "sgd"})
        yield Stage(start="continue", settings={"epochs": 1})


class Held(Method):
    """Trains, then all but the last two blocks; the second training draws from another part in each epoch."""

    asked = 0

    def stages(self, context: StageContext) -> Iterator[Stage]:
        yield Stage()
        yield Stage(start="continue", frozen=2)

    def subset(self) -> Tensor:
        Held.asked += 1
        return torch.arange(48) if self.epoch else torch.arange(32)


class Shifted(Method):
    """Cross-entropy at logits shifted by a vector that it learns, from the first evaluation alone."""

    def on_stage(self, labels: Tensor) -> None:
        self.shift = nn.Parameter(torch.zeros(self.info.classes, device=self.info.device))

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.shift], lr=0.5, momentum=0.9)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return self.cross_entropy(logits + self.shift, task.labels)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    METHODS.register("refine", source="a test")(Refine)
    METHODS.register("shifted", source="a test")(Shifted)
    METHODS.register("held", source="a test")(Held)
    yield
    for name in ("refine", "shifted", "held"):
        METHODS._items.pop(name)


class Stop(Exception):
    """Pulls the plug."""


class Interrupt:
    """Ends a run after an epoch of a stage."""

    def __init__(self, stop: tuple[int, int]) -> None:
        self.stop = stop

    def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        if (stage, number) == self.stop:
            raise Stop


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[dict[str, Tensor]]]:
    """The networks' weights before and after each stage's first epoch."""
    found: dict[int, list[dict[str, Tensor]]] = {}
    train = Trainer.train_epoch

    def noted(self: Trainer, epoch: int) -> dict[str, Any]:
        module = self.learners[0].net.module
        before = copy.deepcopy(module.state_dict())
        line = train(self, epoch)
        if epoch == 0:
            found[self.number] = [before, copy.deepcopy(module.state_dict())]
        return line

    monkeypatch.setattr(Trainer, "train_epoch", noted)
    return found


def blocks_that_differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    parameters = [n for n in left if "running" not in n and "tracked" not in n]
    return {n.removeprefix("blocks.").split(".")[0] for n in parameters if not torch.equal(left[n], right[n])}


def test_blocks_are_drawn_anew_and_trained_alone(
    digits: Configure, tmp_path: Path, seen: dict[int, list[dict[str, Tensor]]]
) -> None:
    record = fit(digits(method="refine", opt="sam", epochs=2), store=tmp_path).record
    assert record["status"] == "finished"
    every = {"stem", "stage1", "stage2", "stage3", "head"}
    assert blocks_that_differ(*seen[0]) == every
    assert blocks_that_differ(seen[0][1], seen[1][0]) >= {"stage3", "head"}
    assert blocks_that_differ(*seen[1]) == {"stage3", "head"}, "frozen blocks moved, or the others did not"
    assert blocks_that_differ(*seen[2]) == every


def test_frozen_blocks_stay_and_a_subset_is_asked_for_once_an_epoch(
    digits: Configure, tmp_path: Path, seen: dict[int, list[dict[str, Tensor]]]
) -> None:
    Held.asked = 0
    result = fit(digits(method="held", opt="sam", epochs=2), store=tmp_path)
    assert blocks_that_differ(*seen[1]) == {"stem", "stage1", "stage2"}
    assert Held.asked == 4
    assert [line["steps"] for line in RunFolder(tmp_path, result.key).epochs] == [2, 3, 2, 3]


def test_a_stage_is_never_changed() -> None:
    settings = {"epochs": 3}
    stage = Stage(settings=settings)
    settings["epochs"] = 5
    assert stage.settings == {"epochs": 3}
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.labels = torch.zeros(3)  # type: ignore[misc]
    with pytest.raises(TypeError):
        stage.settings["epochs"] = 4  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": "again"}, "'again'"),
        ({"fresh": 1}, "from scratch all are new"),
        ({"start": "continue", "fresh": -1}, "0 or more"),
        ({"trainable": 0}, "at least 1"),
        ({"trainable": 1, "frozen": 1}, "not both"),
        ({"settings": {"epochs": 0}}, "at least one epoch"),
        ({"settings": {"learning_rate": 0.1}}, "learning_rate: there is no such option"),
        ({"settings": {"batch": 64}}, "batch: there is no such option"),
        ({"settings": {"lr": "fast"}}, "lr: .* number"),
        ({"settings": {"lr": -1.0}}, "lr: .* greater than 0"),
        ({"settings": {"schedule": "exponential"}}, "schedule: "),
    ],
)
def test_stages_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**fields)


@pytest.mark.parametrize(
    ("method", "stop"),
    [("refine", stop) for stop in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))] + [("shifted", (0, n)) for n in (0, 1)],
)
def test_resume_in_any_stage(method: str, stop: tuple[int, int], digits: Configure, tmp_path: Path) -> None:
    config = digits(method=method, opt="sam", epochs=2)
    whole = fit(config, store=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(config, store=tmp_path / "parts", progress=Interrupt(stop))
    parts = fit(config, store=tmp_path / "parts")
    left, right = (load_file(r.folder / "weights.safetensors") for r in (whole, parts))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole.record["results"] == parts.record["results"]


@pytest.mark.parametrize("m", [8, "batch"])
@pytest.mark.parametrize("opt", ["sgd", "sam", "j-sam"])
def test_own_parameters_step_once_by_the_first_evaluation(
    opt: str, m: Any, digits: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of the shift is by the gradient at the unperturbed weights, whatever the optimizer evaluates."""
    steps: list[tuple[Tensor, Tensor]] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, closure: Any = None) -> Any:
        if self.param_groups[0]["lr"] == 0.5:
            (p,) = self.param_groups[0]["params"]
            assert p.grad is not None
            steps.append((p.detach().clone(), p.grad.clone()))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    chunks = {} if opt == "sgd" else {"sam_m": m}
    fit(digits(method="shifted", opt=opt, epochs=1, norm="group", **chunks), store=tmp_path / "own")
    first = steps[0][1].clone()
    number = len(steps)
    steps.clear()
    fit(digits(method="shifted", opt="sgd", epochs=1, norm="group", weight_decay=1e-5), store=tmp_path / "sgd")
    assert number == len(steps), "once a step"
    torch.testing.assert_close(first, steps[0][1], rtol=1e-4, atol=1e-6)
    assert steps[1][0].abs().max() > 0


def test_own_parameters_step_once_for_all_networks(
    digits: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two networks that both learn from a batch, by the sum of their gradients."""
    from noisysam.training import trainer

    made: list[trainer.Objective] = []
    seen: list[tuple[Tensor, int]] = []
    step = torch.optim.SGD.step

    class Noted(trainer.Objective):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def noted(self: torch.optim.SGD, closure: Any = None) -> Any:
        if self.param_groups[0]["lr"] == 0.5:
            grad = self.param_groups[0]["params"][0].grad
            torch.testing.assert_close(grad, made[-2].auxiliary_grads[0] + made[-1].auxiliary_grads[0])
            seen.append((grad.clone(), len(made)))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    monkeypatch.setattr(trainer, "Objective", Noted)
    monkeypatch.setattr(Shifted, "networks", 2)
    fit(digits(method="shifted", opt="sgd", epochs=1), store=tmp_path)
    assert [count for _, count in seen] == [2 * (n + 1) for n in range(len(seen))]
    assert len(seen) > 1
    assert seen[0][0].abs().max() > 0


def test_networks_without_blocks_are_refused(digits: Configure, tmp_path: Path) -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    with pytest.raises(UserError, match="named_blocks"):
        fit(digits(method="refine", epochs=1), network=network, store=tmp_path)
