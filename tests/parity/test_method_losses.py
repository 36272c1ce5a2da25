"""Losses beside those that their authors released, over random logits and labels: values and gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from method_harness import (
    AUTHORS,
    CLASSES,
    batch,
    begin,
    close,
    epoch,
    hot,
    same_step,
    some_labels,
    some_logits,
    stages,
    step,
    visits,
)
from torch import Tensor

from noisysam import methods

LOG_ZERO = math.log(1e-4)


def test_every_method_has_a_reference() -> None:
    assert set(AUTHORS) == set(methods.METHODS)


def nll(z: Tensor, y: Tensor) -> Tensor:
    return z.logsumexp(1) - z[torch.arange(len(z)), y]


def p_of(z: Tensor, y: Tensor) -> Tensor:
    return (z - z.logsumexp(1, keepdim=True)).exp()[torch.arange(len(z)), y]


def reverse(z: Tensor, y: Tensor) -> Tensor:
    """The labels are clipped at 1e-4, the predictions at 1e-7."""
    return -(torch.softmax(z, 1).clamp(min=1e-7) * hot(y).clamp(min=1e-4).log()).sum(1)


def keras_log(z: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and their logarithms, clipped at Keras's epsilon."""
    p = torch.softmax(z, 1).clamp(1e-7, 1 - 1e-7)
    return p, p.log()


def boot_soft(z: Tensor, y: Tensor) -> Tensor:
    p, log_p = keras_log(z)
    return -((0.95 * hot(y) + 0.05 * p) * log_p).sum(1)


def boot_hard(z: Tensor, y: Tensor) -> Tensor:
    _, log_p = keras_log(z)
    return -((0.8 * hot(y) + 0.2 * hot(z.argmax(1))) * log_p).sum(1)


def generalised_smoothing(z: Tensor, y: Tensor, rate: float) -> Tensor:
    log_p = torch.log_softmax(z, 1)
    return (1 - rate) * nll(z, y) + rate * -log_p.mean(1)


def matrix() -> Tensor:
    off = torch.from_numpy(np.random.default_rng(3).uniform(size=(CLASSES, CLASSES)))
    found = 0.6 * torch.eye(CLASSES, dtype=torch.float64) + 0.4 * off / off.sum(1, keepdim=True)
    return found.float().double()


LOSSES: list[tuple[str, dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = [
    ("ce", {}, nll),
    ("gce", {"q": 0.7}, lambda z, y: (1 - p_of(z, y) ** 0.7) / 0.7),
    ("mae", {}, lambda z, y: 2 * (1 - p_of(z, y))),
    ("sce", {"alpha": 0.1, "beta": 1.0, "A": LOG_ZERO}, lambda z, y: 0.1 * nll(z, y) + reverse(z, y)),
    (
        "nce-rce",
        {"alpha": 10.0, "beta": 0.1, "A": LOG_ZERO},
        lambda z, y: 10 * nll(z, y) / -torch.log_softmax(z, 1).sum(1) + 0.1 * reverse(z, y),
    ),
    ("label-smoothing", {"rate": 0.6}, lambda z, y: generalised_smoothing(z, y, 0.6)),
    ("label-smoothing", {"rate": -4.0}, lambda z, y: generalised_smoothing(z, y, -4.0)),
    ("reed-soft", {}, boot_soft),
    ("reed-hard", {}, boot_hard),
    ("forward", {"matrix": "true"}, lambda z, y: -(hot(y) * (torch.softmax(z, 1) @ matrix()).log()).sum(1)),
    ("backward", {"matrix": "true"}, lambda z, y: -(hot(y) @ matrix().inverse() * torch.log_softmax(z, 1)).sum(1)),
]


@pytest.mark.parametrize(("name", "options", "loss"), LOSSES, ids=[f"{n}{i}" for i, (n, *_) in enumerate(LOSSES)])
def test_loss(name: str, options: dict[str, Any], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    labels = some_labels()
    method = begin(name, labels, facts={"matrix": matrix().float()} if "matrix" in options else {}, **options)
    for visit, index in enumerate(visits()):
        z = some_logits(len(index), CLASSES, seed=visit, scale=3.0)
        (found,) = step(method, batch(index, labels), [z])
        same_step(name, found, lambda leaf, index=index: loss(leaf, labels[index]).mean(), z)


@pytest.mark.parametrize("pi", [0.1, 0.5, 0.9])
def test_gjs(pi: float) -> None:
    """Two views: sum of w KL(d || m) over the label and both predictions, m clipped at 1e-7, over the scale."""
    labels = some_labels()
    method = begin("gjs", labels, pi=pi)
    weights = (pi, (1 - pi) / 2, (1 - pi) / 2)

    def divergence(z: Tensor, y: Tensor) -> Tensor:
        parts = [hot(y), torch.softmax(z[:, 0], 1), torch.softmax(z[:, 1], 1)]
        log_m = sum(w * d for w, d in zip(weights, parts, strict=True)).clamp(1e-7, 1.0).log()
        each = [w * (torch.xlogy(d, d) - d * log_m).sum(1) for w, d in zip(weights, parts, strict=True)]
        return -sum(each).mean() / ((1 - pi) * math.log(1 - pi))

    for visit, index in enumerate(visits()):
        z, images = some_logits(len(index), 2, CLASSES, seed=visit), torch.zeros(len(index), 1, 4, 4)
        (found,) = step(method, batch(index, labels, inputs=images, views=[images, images]), [z])
        same_step("gjs", found, lambda leaf, index=index: divergence(leaf, labels[index]), z)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_matrix_from_the_most_confident_samples(name: str) -> None:
    """models.py, NoiseEstimator without its filter: row i is the prediction at the largest p_i; rows are normalised."""
    labels, logits = some_labels(), some_logits(24, CLASSES).float()
    method = begin(name, labels, quantile=1.0)
    trainings = stages(method, lambda which: logits)
    for _ in range(2):
        next(trainings)
        method.on_stage(labels)
    p = torch.softmax(logits.double(), 1).numpy()
    estimated = np.stack([p[p[:, i].argmax()] for i in range(CLASSES)])
    estimated /= estimated.sum(1, keepdims=True)
    close(name, method.transition, estimated)


def test_gce_truncated() -> None:
    """Weighted loss less the loss at k; weights drawn anew where (epoch + 1) reaches the start, and every ten."""
    labels, q, k = some_labels(), 0.7, 0.5
    method = begin("gce-truncated", labels, start=20)
    bound, weight = (1 - k**q) / q, torch.ones(len(labels), dtype=torch.float64)
    for number in range(45):
        predictions = some_logits(24, CLASSES, seed=100 + number)
        epoch(method, number, predictions)
        if number + 1 >= 20 and (number + 1) % 10 == 0:
            weight = (bound > (1 - p_of(predictions, labels) ** q) / q).double()
        if number in (0, 18, 19, 20, 29, 30, 44):
            z, index = some_logits(8, CLASSES, seed=number), visits()[number % 5]
            (found,) = step(method, batch(index, labels), [z])

            def objective(leaf: Tensor, index: Tensor = index, weight: Tensor = weight) -> Tensor:
                return ((1 - p_of(leaf, labels[index]) ** q) / q * weight[index] - bound * weight[index]).mean()

            same_step("gce-truncated", found, objective, z)
