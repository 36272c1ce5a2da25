"""A network while it is trained: its optimizer, the moving averages of its weights, its step and its state."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from noisysam.core.network import Net
from noisysam.core.objective import Objective
from noisysam.optim import SharpnessAware


class WeightAverage:
    """A moving average of a network's weights, updated after each step that is not skipped.

    ``evaluated``: the average takes the place of the network in evaluations. It then covers batch norm's statistics
    and begins with the weights after the first step (as ``torch.optim.swa_utils.AveragedModel``); else it begins with
    the initial weights.
    """

    def __init__(self, net: Net, evaluated: bool) -> None:
        self.module: nn.Module = copy.deepcopy(net.module)
        self.evaluated = evaluated
        parameters = dict(self.module.named_parameters())
        self.weights = [parameters[name].requires_grad_(False) for name, _ in net.named]  # as ``Net.logits`` takes them
        self.module.requires_grad_(False)
        self.updates = torch.zeros((), device=net.device)
        source, target = _averaged(net.module, evaluated), _averaged(self.module, evaluated)
        self.source, self.target = [source[name] for name in target], list(target.values())

    @torch.no_grad()
    def update(self, decay: float, found_inf: Tensor) -> None:
        """Take in the present weights; nothing where the step was skipped."""
        share = torch.full_like(found_inf, 1 - decay)
        if self.evaluated:
            share = torch.where(self.updates == 0, 1.0, share)
        weight = share * (1 - found_inf)
        for average, value in zip(self.target, self.source, strict=True):
            average.lerp_(value, weight)
        self.updates += 1 - found_inf

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and the number of updates."""
        return {"n_averaged": self.updates, **{f"module.{k}": v for k, v in self.module.state_dict().items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back a ``state_dict``."""
        self.updates.copy_(state["n_averaged"])
        self.module.load_state_dict({k.removeprefix("module."): v for k, v in state.items() if k != "n_averaged"})


def _averaged(module: nn.Module, buffers: bool) -> dict[str, Tensor]:
    """The tensors of a network that an average covers, by name."""
    named = dict(module.named_parameters()) | (dict(module.named_buffers()) if buffers else {})
    return {name: value.detach() for name, value in named.items() if value.is_floating_point()}


class Learner:
    """One network, what moves it, and what is kept of it.

    ``ema``: decay of the average that is evaluated in place of the network (0: none); ``teacher``: whether an average
    is kept that the method may ask for.
    """

    def __init__(self, net: Net, optimizer: SharpnessAware, ema: float = 0.0, teacher: bool = False) -> None:
        self.net, self.optimizer, self.decay = net, optimizer, ema
        self.ema = WeightAverage(net, evaluated=True) if ema else None
        self.teacher = WeightAverage(net, evaluated=False) if teacher else None

    @property
    def reported(self) -> nn.Module:
        """The network that is evaluated: the average where there is one."""
        return self.net.module if self.ema is None else self.ema.module

    def set_momentum(self, momentum: float) -> None:
        """The momentum of SGD, or beta1 of Adam, from the next step on."""
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum

    def begin_step(self) -> None:
        """Before the first forward of a step."""
        self.net.statistics.begin()
        self.net.seed += 1

    def step(self, objective: Objective, rate: float, teacher_decay: float) -> Tensor:
        """One step at a learning rate; the mean loss at the unperturbed weights. A step whose gradient is not finite is
        skipped: weights, running statistics and averages stay as they were."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss: Tensor = self.optimizer.step(objective)
        self.net.statistics.commit(self.optimizer.found_inf)
        for average, decay in ((self.ema, self.decay), (self.teacher, teacher_decay)):
            if average is not None:
                average.update(decay, self.optimizer.found_inf)
        return loss

    def logits(self, inputs: Tensor, averaged: bool = False) -> Tensor:
        """Logits as it is trained, or at the method's average, without gradient."""
        if averaged and self.teacher is None:
            raise ValueError("the method asks for averaged weights: it must set teacher_decay")
        return self.net.logits(inputs, grad=False, weights=self.teacher.weights if averaged and self.teacher else None)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averages and the optimizer's state."""
        return {
            "network": self.net.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.weights,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a ``state_dict``."""
        self.net.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.teacher is not None:
            torch._foreach_copy_(self.teacher.weights, state["teacher"])
