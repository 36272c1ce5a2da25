"""ELR+: the targets' recursion, mixing, the loss, and the averages that make the targets."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from noisysam import fit
from noisysam.methods import RunInfo
from noisysam.methods.elr_plus import ELRPlus
from noisysam.runs.config import RunConfig
from noisysam.training.trainer import Trainer

FACTS = RunInfo(samples=6, classes=3, epochs=10, device=torch.device("cpu"))


def method(**options: float) -> ELRPlus:
    made = ELRPlus(ELRPlus.Options(**options), FACTS)
    made.generator, made.rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    made.on_stage(torch.tensor([0, 1, 2, 0, 1, 2]))
    return made


def test_lambda_and_the_decay_grow_where_told() -> None:
    made = method()
    growth = [made.grown(0.5, progress) for progress in (0, 2, 5, 9)]
    assert growth == pytest.approx([math.exp(-5), math.exp(-5 * 0.6**2), 1, 1])
    assert made.grown(0.0, 0) == 1


def test_the_average_follows_each_step(
    digits: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins at the weights and moves by 1 - decay of the way, for both networks."""
    pairs: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
    step = Trainer.step

    def noted(self: Trainer, *args: object) -> int:
        before = [t.clone() for k in self.learners if k.teacher for t in k.teacher.weights]
        done = step(self, *args)  # type: ignore[arg-type]
        weights = [p.detach().clone() for k in self.learners for p in k.net.params]
        pairs.append((before, weights, [t.clone() for k in self.learners if k.teacher for t in k.teacher.weights]))
        return done

    monkeypatch.setattr(Trainer, "step", noted)
    config = digits(
        method="elr+", method_option={"ema": 0.75, "ema_ramp": 0.0}, opt="sam", sam_m="batch", epochs=1, noise=0.4
    )
    result = fit(config, store=tmp_path)
    assert result.record["status"] == "finished"
    for before, weights, after in pairs:
        for b, w, a in zip(before, weights, after, strict=True):
            torch.testing.assert_close(a, 0.75 * b + 0.25 * w, rtol=1e-5, atol=1e-7)
    assert not torch.equal(pairs[-1][2][0], pairs[-1][1][0])


def test_publishes_by_noise() -> None:
    assert ELRPlus.published("cifar10", "symmetric", 0.8) == {}
    assert ELRPlus.published("cifar10", "asymmetric", 0.4)["strength"] == 1.0
    assert ELRPlus.published("cifar100", "symmetric", 0.4)["strength"] == 7.0
