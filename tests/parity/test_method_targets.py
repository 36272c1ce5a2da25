"""Methods that keep targets, weights or averages of their own, or mix rows: several visits beside the authors' step."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
import math
from typing import Any

import numpy as np
import pytest
import torch
from method_harness import (
    AUTHORS,
    CLASSES,
    SAMPLES,
    batch,
    begin,
    close,
    epoch,
    hot,
    redraw,
    same_step,
    some_labels,
    some_logits,
    step,
    visits,
)
from scipy import stats
from torch import Tensor


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(z, 1)).sum(1)


def sigmoid_ramp(current: float, length: float) -> float:
    """shengliu66/ELR ELR_plus/utils/util.py sigmoid_rampup."""
    if not length:
        return 1.0
    phase = 1.0 - min(max(current, 0.0), length) / length
    return math.exp(-5.0 * phase * phase)


def test_elr() -> None:
    """The target takes the clamped, normalised prediction in before the loss sees it."""
    labels, beta, strength = some_labels(), 0.7, 3.0
    method, target = begin("elr", labels), torch.zeros(SAMPLES, CLASSES, dtype=torch.float64)
    for visit, index in enumerate(visits()):
        z = some_logits(len(index), CLASSES, seed=visit)
        p = torch.softmax(z, 1).clamp(1e-4, 1 - 1e-4)
        target[index] = beta * target[index] + (1 - beta) * p / p.sum(1, keepdim=True)
        (found,) = step(method, batch(index, labels), [z])
        close("elr", method.targets, target)

        def objective(leaf: Tensor, index: Tensor = index, target: Tensor = target) -> Tensor:
            p = torch.softmax(leaf, 1).clamp(1e-4, 1 - 1e-4)
            regulariser = (1 - (target[index] * p).sum(1)).log()
            return (cross_entropy(leaf, hot(labels[index])) + strength * regulariser).mean()

        same_step("elr", found, objective, z)


def test_selc() -> None:
    """The label as target up to the turning point; then targets move before the loss at each visit."""
    labels = some_labels()
    method, target = begin("selc", labels, epochs=10, start=0.3), hot(labels)
    for visit, index in enumerate(visits()):
        epoch(method, visit + 1)  # their epochs count from 1, and cross-entropy lasts up to es, inclusive
        z = some_logits(len(index), CLASSES, seed=visit)
        if visit + 2 > 3:
            target[index] = 0.9 * target[index] + 0.1 * torch.softmax(z, 1)
        (found,) = step(method, batch(index, labels), [z])
        same_step("selc", found, lambda leaf, i=index, t=target: cross_entropy(leaf, t[i]).mean(), z)
        close("selc", method.targets, target)


def test_sop() -> None:
    """Loss, and the steps of u and v by plain gradient descent at their own rates."""
    labels = some_labels()
    method = begin("sop", labels, lr_u=3.0, lr_v=2.0)
    draws = np.random.default_rng(0)
    with torch.no_grad():
        method.u.copy_(torch.from_numpy(draws.normal(0, 0.5, method.u.shape)))
        method.v.copy_(torch.from_numpy(draws.normal(0, 0.5, method.v.shape)))
    u, v = (p.detach().double().clone().requires_grad_() for p in (method.u, method.v))
    for visit, index in enumerate(visits()):
        z = some_logits(len(index), CLASSES, seed=visit)

        def objective(leaf: Tensor, index: Tensor = index) -> Tensor:
            y = hot(labels[index])
            plus = (u[index] ** 2 * y).clamp(0, 1)
            minus = (v[index] ** 2 * (1 - y)).clamp(0, 1)
            q = (torch.softmax(leaf, 1) + plus - minus.detach()).clamp(min=1e-4)
            q = (q / q.abs().sum(1, keepdim=True).clamp(min=1e-4)).clamp(1e-4, 1.0)
            squares = ((hot(leaf.detach().argmax(1)) + plus - minus - y) ** 2).sum() / len(y)
            return -(y * q.log()).sum(1).mean() + squares

        expected = torch.autograd.grad(objective(z), [u, v])
        reference = objective(z).detach()
        (found,) = step(method, batch(index, labels), [z])
        close("sop", found[0], reference)
        leaf = z.clone().requires_grad_()
        close("sop", found[1], torch.autograd.grad(objective(leaf), leaf)[0])
        with torch.no_grad():
            for p, g, rate in zip((u, v), expected, (3.0, 2.0), strict=True):
                p -= rate * g
        close("sop", method.u, u)
        close("sop", method.v, v)


def mixed(rows: int, alpha: float, seed: int, larger: bool = False) -> tuple[float, Tensor]:
    """The weight and the partners that a method draws first from this seed."""
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return max(weight, 1 - weight) if larger else weight, other


def test_mixup() -> None:
    labels = some_labels()
    method = begin("mixup", labels, alpha=0.8)
    for visit, index in enumerate(visits()):
        redraw(method, visit)
        weight, other = mixed(len(index), 0.8, visit)
        z, drawn = some_logits(len(index), CLASSES, seed=visit), batch(index, labels)
        (found,) = step(method, drawn, [z])
        close("mixup", found[2].inputs, weight * drawn.inputs + (1 - weight) * drawn.inputs[other])

        def objective(leaf: Tensor, y: Tensor = labels[index], w: float = weight, other: Tensor = other) -> Tensor:
            return (w * cross_entropy(leaf, hot(y)) + (1 - w) * cross_entropy(leaf, hot(y[other]))).mean()

        same_step("mixup", found, objective, z)


def look_of(seed: int):
    """Another forward: logits that depend on the network, the images and whether weights are averaged."""

    def look(k: int, inputs: Tensor, averaged: bool = False) -> Tensor:
        turn = some_logits(16, CLASSES, seed=seed + 10 * k + 100 * averaged).float()
        return 2 * inputs.flatten(1)[:, :16] @ turn / 4

    return look


@pytest.mark.parametrize("ramp", [0.0, 0.4])
def test_elr_plus(ramp: float) -> None:
    """Each network's targets follow the other's average on plain rows; labels and targets are mixed alike."""
    labels, beta, strength, steps, epochs = some_labels(), 0.9, 7.0, 3, 10
    method = begin("elr+", labels, epochs=epochs, beta=beta, strength=strength, ramp=ramp)
    history, look = torch.zeros(2, SAMPLES, CLASSES, dtype=torch.float64), look_of(0)
    for number in (0, 2, 5):
        epoch(method, number)
        indices = visits(steps)
        drawn_batches = method.batches(Epochs([batch(i, labels) for i in indices], number))
        for place, (index, drawn) in enumerate(zip(indices, drawn_batches, strict=True)):
            redraw(method, number)
            draws, generator = np.random.default_rng(number), torch.Generator().manual_seed(number)
            logits = [some_logits(len(index), CLASSES, seed=s) for s in (number, number + 50)]
            found = step(method, drawn, logits, look)
            for k in range(2):
                weight = draws.beta(1.0, 1.0)
                other = torch.randperm(len(index), generator=generator)
                p = torch.softmax(look(1 - k, drawn.inputs, averaged=True).double(), 1)
                history[k, index] = beta * history[k, index] + (1 - beta) * p / p.sum(1, keepdim=True)
                q = weight * history[k, index] + (1 - weight) * history[k, index][other]
                y = weight * hot(labels[index]) + (1 - weight) * hot(labels[index])[other]
                done = number * steps + place + 1  # steps, this one included
                growth = sigmoid_ramp(done, ramp * epochs * steps)

                def objective(leaf: Tensor, y: Tensor = y, q: Tensor = q, growth: float = growth) -> Tensor:
                    p = torch.softmax(leaf, 1).clamp(1e-4, 1 - 1e-4)
                    return cross_entropy(leaf, y).mean() + growth * strength * (1 - (q * p).sum(1)).log().mean()

                same_step("elr+", found[k], objective, logits[k])
                images = weight * drawn.inputs + (1 - weight) * drawn.inputs[other]
                close("elr+", found[k][2].inputs, images)
            close("elr+", method.targets, history)


def test_teacher_of_elr_plus() -> None:
    """The decay after step s of S ramp steps is 0.997 exp(-5 (1 - (s + 1) / S)^2): 0.0217 at 5,000 of 40,000."""
    labels, epochs, steps = some_labels(), 200, 350
    method = begin("elr+", labels, epochs=epochs, ema_ramp=40_000 / (epochs * steps))
    index = visits(1)[0]
    drawn = [batch(index, labels)] * steps
    for number, place in ((0, 0), (14, 99), (57, 49), (114, 349), (199, 0)):
        epoch(method, number)
        for at, one in enumerate(method.batches(Epochs(drawn, number))):
            if at == place:
                step(method, one, [some_logits(8, CLASSES)] * 2, look_of(0))
                done = number * steps + place + 1
                close("elr+", method.teacher_decay, 0.997 * sigmoid_ramp(done + 1, 40_000))
                break
    assert 0.997 * sigmoid_ramp(5_001, 40_000) == pytest.approx(0.0217, abs=1e-4)


class Epochs(list):  # type: ignore[type-arg]
    """The batches of one epoch."""

    def __init__(self, batches: list[Any], number: int) -> None:
        super().__init__(batches)
        self.number = number


@pytest.mark.parametrize("burn_in", [0.0, 0.3])
def test_mentornet(burn_in: float) -> None:
    """a <- decay a + (1 - decay) percentile of the batch's losses, the threshold; all rows count in the burn-in."""
    labels = some_labels()
    method, average = begin("mentornet", labels, percentile=0.7, decay=0.5, burn_in=burn_in), 0.0
    for visit, index in enumerate(visits()):
        epoch(method, visit)
        z = some_logits(len(index), CLASSES, seed=visit)
        losses = cross_entropy(z, hot(labels[index])).numpy()
        average = 0.5 * average + 0.5 * float(np.percentile(losses, 70, method="nearest"))
        weight = torch.from_numpy((losses <= average).astype(float) if visit >= burn_in * 10 else np.ones(len(losses)))
        (found,) = step(method, batch(index, labels), [z])
        close("mentornet", method.average, average)

        def objective(leaf: Tensor, y: Tensor = labels[index], weight: Tensor = weight) -> Tensor:
            return (weight * cross_entropy(leaf, hot(y))).mean()

        same_step("mentornet", found, objective, z)


def test_mentormix() -> None:
    """Partners by softmax(v); the larger share is the row's own where it counts; mixed rows are weighted again."""
    labels, look = some_labels(), look_of(4)
    method = begin("mentormix", labels, percentile=0.6, alpha=2.0, burn_in=0.0, second=True)
    first = second = 0.0
    for visit, index in enumerate(visits()):
        redraw(method, visit)
        draws, generator = np.random.default_rng(visit), torch.Generator().manual_seed(visit)
        drawn, y = batch(index, labels), hot(labels[index])
        losses = cross_entropy(look(0, drawn.inputs).double(), y).numpy()
        first = 0.5 * first + 0.5 * float(np.percentile(losses, 60, method="nearest"))
        v = torch.from_numpy((losses <= first).astype(np.float32))
        other = torch.multinomial(v.softmax(0), len(index), replacement=True, generator=generator)
        share = torch.from_numpy(draws.beta(2.0, 2.0, len(index)))
        share = torch.where(v >= 0.5, torch.maximum(share, 1 - share), torch.minimum(share, 1 - share))[:, None]
        target = share * y + (1 - share) * y[other]
        z = some_logits(len(index), CLASSES, seed=visit)
        (found,) = step(method, drawn, [z], look)
        wide = share[:, :, None, None]
        close("mentormix", found[2].inputs, wide * drawn.inputs + (1 - wide) * drawn.inputs[other])
        losses = cross_entropy(z, target).numpy()
        second = 0.5 * second + 0.5 * float(np.percentile(losses, 60, method="nearest"))
        weight = torch.from_numpy((losses <= second).astype(float))
        same_step("mentormix", found, lambda leaf, t=target, w=weight: (w * cross_entropy(leaf, t)).mean(), z)


def beta_mixture(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BetaMixture1D: ten steps of EM from (1, 2) and (2, 1), the M step by weighted moments."""
    a, b, w = np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([0.5, 0.5])
    for _ in range(10):
        r = np.stack([w[k] * stats.beta.pdf(x, a[k], b[k]) for k in range(2)]).clip(1e-12)
        r /= r.sum(0)
        for k in range(2):
            mean = (r[k] * x).sum() / r[k].sum()
            variance = (r[k] * (x - mean) ** 2).sum() / r[k].sum()
            a[k] = mean * (mean * (1 - mean) / variance - 1)
            b[k] = a[k] * (1 - mean) / mean
        w = r.sum(1) / r.sum()
    return a, b, w


def test_m_dyr_h() -> None:
    """Losses between the percentiles 5 and 95 make the mixture; labels yield to predictions by its posterior; the
    code's penalty, sum_k 1/K log(1/K / mean p_k), has the same value and gradient."""
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(draws.integers(0, CLASSES, 400))
    wrong = torch.from_numpy(draws.random(400) < 0.3)
    predictions = 3 * hot(torch.where(wrong, (labels + 1) % CLASSES, labels)) + some_logits(400, CLASSES, scale=0.8)
    method, look = begin("m-dyr-h", labels, warmup=0.1), look_of(2)
    epoch(method, 1, predictions)
    losses = cross_entropy(predictions, hot(labels)).numpy()
    low, high = np.percentile(losses, [5, 95])
    x = ((losses - low) / (high - low + 1e-6)).clip(1e-3, 1 - 1e-3)
    a, b, w = beta_mixture(x[(losses >= low) & (losses <= high)])
    joint = np.stack([w[k] * stats.beta.pdf(x, a[k], b[k]) for k in range(2)])
    posterior = joint[1] / joint.sum(0)
    place = np.argsort(x)
    top = place[np.argmax(posterior[place]) :]
    posterior[top] = posterior.max()  # their table does not fall again above its largest value
    close("m-dyr-h", method.noisy, posterior)
    for visit in range(3):
        redraw(method, visit)
        index = torch.from_numpy(draws.permutation(400)[:12])
        weight, other = mixed(12, 32.0, visit)
        drawn, z = batch(index, labels), some_logits(12, CLASSES, seed=visit)
        guess = look(0, drawn.inputs).argmax(1)
        trust = torch.from_numpy(posterior)[index]
        (found,) = step(method, drawn, [z], look)

        def objective(leaf: Tensor) -> Tensor:
            y = labels[index]

            def part(rows: Tensor) -> Tensor:
                own, own_guess, t = hot(y[rows]), hot(guess[rows]), trust[rows]
                return ((1 - t) * cross_entropy(leaf, own) + t * cross_entropy(leaf, own_guess)).mean()

            penalty = (1 / CLASSES * torch.log(1 / CLASSES / torch.softmax(leaf, 1).mean(0))).sum()
            return weight * part(torch.arange(12)) + (1 - weight) * part(other) + penalty

        same_step("m-dyr-h", found, objective, z)
        close("m-dyr-h", found[2].inputs, weight * drawn.inputs + (1 - weight) * drawn.inputs[other])


def test_sources_are_named() -> None:
    """Each with its commit, or the paper's number where its authors released nothing for it."""
    for source, _ in AUTHORS.values():
        assert "@" in source or "arXiv" in source or source.startswith("torch")
