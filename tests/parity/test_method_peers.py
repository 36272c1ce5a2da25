"""Methods that subtract a peer's loss, and what is built on it: sieve and covariance."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_harness import (
    CLASSES,
    SAMPLES,
    batch,
    begin,
    close,
    epoch,
    redraw,
    same_step,
    some_labels,
    some_logits,
    stages,
    step,
    visits,
)
from torch import Tensor


@dataclass
class Drawn:
    """A batch with views that may be put in place of others."""

    inputs: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    network: int | None = None
    views: list[Tensor] = field(default_factory=list)
    divided: bool = False


class OneEpoch(list):  # type: ignore[type-arg]
    """The batches of an epoch; a view of some samples is an image that holds their places."""

    def __init__(self, labels: Tensor, number: int) -> None:
        super().__init__(Drawn(torch.zeros(len(i), 1, 4, 4), labels[i], i, number) for i in visits())
        self.number, self.rows = number, 8

    def view(self, index: Tensor, policy: str | None = None) -> Tensor:
        return index[:, None, None, None].expand(-1, 1, 4, 4).float()


def stable(z: Tensor, y: Tensor, eps: float = 1e-5) -> Tensor:
    """CrossEntropyLossStable: the logarithm of the probabilities plus eps."""
    return F.nll_loss((torch.softmax(z, 1) + eps).log(), y, reduction="none")


def alpha_plan(dataset: str, sparse: bool) -> np.ndarray:
    """f_alpha of the runners of CIFAR-10 and CIFAR-100."""
    line = np.linspace
    if dataset == "cifar100":
        if sparse:
            return np.concatenate([line(0, 0, 110), line(0, 2, 20), line(2, 10, 70), line(10, 20, 50)])
        return np.concatenate([line(0, 0, 100), line(0.95, 0.95, 150)])
    ends = [(0, 1), (1, 2), (2, 5), (5, 10), (10, 20)] if sparse else [(0, 0.1), (1, 2), (2, 2.5), (2.5, 3.3), (3.3, 5)]
    return np.concatenate([line(0, 0, 20), *(line(*e, n) for e, n in zip(ends, (20, 50, 50, 100, 100), strict=True))])


@pytest.mark.parametrize(("dataset", "epochs"), [("cifar10", 300), ("cifar100", 250)])
@pytest.mark.parametrize("noise", ["asymmetric", "symmetric"])
def test_courses_of_peer(dataset: str, epochs: int, noise: str) -> None:
    from noisysam.methods import METHODS

    options = METHODS["peer"].published(dataset, noise, 0.4)
    method = begin("peer", epochs=epochs, **options)
    plan = alpha_plan(dataset, noise == "asymmetric")
    for number in range(epochs):
        method.epoch = number
        close("peer", method.alpha(), plan[number])


def peers(method: Any, labels: Tensor, number: int) -> Iterator[tuple[Drawn, Tensor]]:
    """Batches, whose images of peers are looked at, with the labels that the method draws next."""
    redraw(method, number)
    own = torch.Generator().manual_seed(number)
    for drawn in method.batches(OneEpoch(labels, number)):
        places, others = (torch.randint(len(labels), (len(drawn.index),), generator=own) for _ in range(2))
        assert torch.equal(drawn.views[1][:, 0, 0, 0].long(), places)
        yield drawn, labels[others]


@pytest.mark.parametrize("alpha", [0.0, 0.7, "uniform"])
def test_peer(alpha: float | str) -> None:
    """The learning rate is divided by 1 + alpha there, the loss here: the same step of plain gradient descent."""
    labels = some_labels()
    method = begin("peer", labels, epochs=300, alpha=alpha)
    for number in (0, 30, 45, 250):
        epoch(method, number)
        weight = alpha_plan("cifar10", False)[number] if isinstance(alpha, str) else alpha
        for drawn, others in peers(method, labels, number):
            z = some_logits(len(drawn.index), 2, CLASSES, seed=number)
            (found,) = step(method, drawn, [z])
            assert found[2].forwards == (1, 1)

            def objective(leaf: Tensor) -> Tensor:
                own, peer = stable(leaf[:, 0], labels[drawn.index]).mean(), stable(leaf[:, 1], others).mean()
                return (own - weight * peer) / (1 + weight)

            same_step("peer", found, objective, z)


# name -> activation and conjugate of runner.py, each with its minus sign
RUNNER = {
    "total-variation": (lambda x: -torch.mean(torch.tanh(x) / 2), lambda x: -torch.mean(torch.tanh(x) / 2)),
    "jensen-shannon": (
        lambda x: -torch.mean(-torch.log(1 + torch.exp(-x))) - np.log(2),
        lambda x: -torch.mean(x + torch.log(1 + torch.exp(-x))) + np.log(2),
    ),
    "pearson": (lambda x: -torch.mean(x), lambda x: -torch.mean(x * x / 4 + x)),
    "kl": (lambda x: -torch.mean(x), lambda x: -torch.mean(torch.exp(x - 1))),
    "jeffrey": (lambda x: -torch.mean(x), lambda x: -torch.mean(x + x * x / 4 + x * x * x / 16)),
}


@pytest.mark.parametrize("divergence", RUNNER)
def test_f_divergence(divergence: str) -> None:
    """240 epochs of stable cross-entropy, then 100 from their weights at a tenth of the rate."""
    labels = some_labels()
    method = begin("f-divergence", labels, epochs=340, divergence=divergence)
    activation, conjugate = RUNNER[divergence]
    trainings = stages(method, lambda which: torch.zeros(SAMPLES, CLASSES))
    first = next(trainings)
    method.on_stage(labels)
    index = visits()[0]
    z = some_logits(len(index), CLASSES)
    (found,) = step(method, batch(index, labels), [z])
    same_step("f-divergence", found, lambda leaf: stable(leaf, labels[index]).mean(), z)
    second = next(trainings)
    method.on_stage(labels)
    assert (first.settings["epochs"], second.settings["epochs"], second.settings["lr"]) == (240, 100, 0.01)
    assert (first.start, second.start) == ("scratch", "continue")
    for number in range(2):
        for drawn, others in peers(method, labels, number):
            z = some_logits(len(drawn.index), 2, CLASSES, seed=number)
            (found,) = step(method, drawn, [z])

            def objective(leaf: Tensor) -> Tensor:
                own = torch.softmax(leaf[:, 0], 1)[torch.arange(8), labels[drawn.index]]
                peer = torch.softmax(leaf[:, 1], 1)[torch.arange(8), others]
                return activation(own) - conjugate(peer)

            same_step("f-divergence", found, objective, z)


def test_cores2() -> None:
    """f_beta, the sieve after epoch 30, and the prior without what it left out in the epoch before."""
    labels = some_labels()
    method = begin("cores2", labels, epochs=100)
    beta = np.concatenate([np.linspace(0, 0, 10), np.linspace(0, 2, 30), np.linspace(2, 2, 60)])
    start = np.bincount(labels, minlength=CLASSES) / SAMPLES
    prior = torch.from_numpy(start)
    for number in range(100):
        epoch(method, number)
        close("cores2", method.beta(), beta[number])
        close("cores2", method.prior, prior)
        gone = np.zeros(CLASSES)
        if number not in (0, 9, 15, 29, 30, 31, 32, 33, 60):
            prior = torch.from_numpy(start)
            continue
        for visit, index in enumerate(visits(3)):
            z, y = some_logits(len(index), CLASSES, seed=10 * number + visit), labels[index]

            def objective(leaf: Tensor) -> Tensor:
                every = -(torch.softmax(leaf, 1) + 1e-8).log()
                loss = F.cross_entropy(leaf, y, reduction="none")
                v = torch.ones(len(y)) if number <= 30 else ((loss - every.mean(1)) <= 0).double().detach()
                loss = loss - beta[number] * (prior * every).sum(1)
                return (v * loss).sum() / v.sum() / (1 + beta[number])

            (found,) = step(method, batch(index, labels), [z])
            same_step("cores2", found, objective, z)
            margin = F.cross_entropy(z, y, reduction="none") + (torch.softmax(z, 1) + 1e-8).log().mean(1)
            if number > 30:
                gone += np.bincount(y[margin > 0], minlength=CLASSES)
        assert (gone.sum() > 0) == (number > 30)
        left = start * SAMPLES - gone
        prior = torch.from_numpy(left / left.sum())


def test_cores2_without_any_sample_that_passes() -> None:
    """The loss is zero, and so is its gradient."""
    labels = torch.zeros(SAMPLES, dtype=torch.long)
    method = begin("cores2", labels, epochs=10)
    epoch(method, 9)
    z = some_logits(8, CLASSES)
    z[:, 0] = -20.0
    ((loss, gradient, _),) = step(method, batch(torch.arange(8), labels), [z])
    assert loss == 0
    assert not gradient.any()


def seg_alpha(most: float) -> list[float]:
    """SegAlpha over [0, most, most] at [10, 40, 80], stepped after each of 100 epochs."""
    values, milestones, alpha, slopes, before = [0.0, most, most], [10, 40, 80], 0.0, [], (0.0, 0)
    for value, at in zip(values, milestones, strict=True):
        slopes.append((value - before[0]) / (at - before[1]))
        before = (value, at)
    found = []
    for number in range(100):
        found.append(alpha)
        turn = int(np.searchsorted(milestones, number, side="right"))
        alpha += slopes[turn] if turn < 3 else 0.0
    return found


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_cal(scale: float) -> None:
    """Both trainings: peer term by the prior (its square root first), guesses, T_mat and the covariance of each batch
    with the means of the epoch before."""
    draws = np.random.default_rng(4)
    labels = torch.from_numpy(draws.integers(0, CLASSES, SAMPLES))
    judged = 2 * some_logits(SAMPLES, CLASSES, seed=5)
    judged[:8, :] = 0
    judged[torch.arange(8), labels[:8]] = 30.0  # far likelier than the others
    method = begin("cal", labels, epochs=100, scale=scale, sieve_alpha=2.0)
    shares = np.bincount(labels, minlength=CLASSES) / SAMPLES
    root = np.sqrt(shares) / np.sqrt(shares).sum()
    trainings = stages(method, lambda which: judged.float())
    first = next(trainings)
    assert first.settings["epochs"] == 66
    method.on_stage(labels)
    alphas = seg_alpha(2.0)
    for number in range(66):
        epoch(method, number)
        close("cal", method.alpha(), alphas[number])
    for number in (0, 25, 65):
        epoch(method, number)
        z, index = some_logits(8, CLASSES, seed=number), visits()[number % 5]
        (found,) = step(method, batch(index, labels), [z])

        def sieving(leaf: Tensor) -> Tensor:
            peer = -((torch.softmax(leaf, 1) + 1e-5).log() * torch.from_numpy(scale * root)).sum(1).mean()
            return (stable(leaf, labels[index], 1e-8).mean() - alphas[number] * peer) / (1 + alphas[number])

        same_step("cal", found, sieving, z)
    assert next(trainings).start == "scratch"
    method.on_stage(labels)
    log_p = -(torch.softmax(judged, 1) + 1e-8).log()
    margin = log_p[torch.arange(SAMPLES), labels] - log_p.mean(1)
    guessed = torch.where(margin < -8.0, labels, judged.argmax(1))
    assert 8 <= int((margin < -8).sum()) < SAMPLES
    assert torch.equal(method.guessed, guessed)

    t_mat = torch.zeros(CLASSES, CLASSES, SAMPLES, dtype=torch.float64)  # (guess, label, sample)
    for i in range(CLASSES):
        for j in range(CLASSES):
            t_mat[i, j] = ((guessed == i) & (labels == j)).double()
    p_guess = t_mat.sum((1, 2)) / SAMPLES
    for i in range(CLASSES):
        members = (guessed == i).double()
        for j in range(CLASSES):
            t_mat[i, j] = (t_mat[i, j] - t_mat[i, j].sum() / members.sum().clamp(min=1)) * members
    means = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    alphas, prior = seg_alpha(1.0), torch.from_numpy(scale * shares)
    whole = [torch.arange(8), torch.arange(8, 16), torch.arange(16, 24)]
    for number in (0, 1, 2, 30):
        epoch(method, number)
        close("cal", method.alpha(), alphas[number])
        several = (t_mat > 0).sum((1, 2)) > 0  # a guess with one kind of label has no covariance
        close("cal", method.means[several], means[several])
        sums = torch.zeros_like(means)
        for visit, index in enumerate(whole):
            z = some_logits(8, CLASSES, seed=7 * number + visit)
            part = t_mat[:, :, index]
            indicator = (part > 0).sum(1, keepdim=True).double()  # 1 for the members of each guess

            def calibrated(leaf: Tensor) -> Tensor:
                every = -(torch.softmax(leaf, 1) + 1e-5).log()
                deviation = (every.T[None] - means[:, :, None]) * indicator
                count = indicator.sum(2).clamp(min=1)
                covariance = (((part * deviation).sum(2) / count).sum(1) * p_guess).sum()
                peer = (every * prior).sum(1).mean()
                base = stable(leaf, labels[index], 1e-8).mean()
                return (base - alphas[number] * peer - covariance) / (1 + alphas[number])

            (found,) = step(method, batch(index, labels), [z])
            same_step("cal", found, calibrated, z)
            sums += (-(torch.softmax(z, 1) + 1e-5).log().T[None] * indicator).sum(2)
        count = (t_mat > 0).sum((1, 2)).double().clamp(min=1)
        means = sums / count[:, None]
