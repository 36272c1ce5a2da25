"""Methods that replace labels by what the network predicts: epochs of visits beside the authors' steps."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
from typing import Any

import numpy as np
import pytest
import torch
from method_harness import (
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
    stages,
    step,
)
from torch import Tensor

ROWS = 8


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(z, 1)).sum(1)


def weighted(z: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """torch's weighted mean of the cross-entropy, over the rows that are not left out (label -100)."""
    return torch.nn.functional.cross_entropy(z, labels, weight=weight)


def whole_epoch(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The places of an epoch's batches, and logits for each."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(SAMPLES))
    return [(index, some_logits(len(index), CLASSES, seed=100 * seed + k)) for k, index in enumerate(order.split(ROWS))]


def trainings(method: Any, labels: Tensor) -> Any:
    """The trainings of a method, each begun."""
    for stage in stages(method, lambda which: torch.zeros(SAMPLES, CLASSES)):
        method.on_stage(labels)
        yield stage


class Past:
    """prediction[:, count % window] of the authors; the mean over the window, of as many epochs as there were."""

    def __init__(self, window: int) -> None:
        self.window, self.kept = window, np.zeros((SAMPLES, window, CLASSES))

    def put(self, number: int, index: Tensor, z: Tensor) -> None:
        self.kept[index, number % self.window] = torch.softmax(z, 1)

    def mean(self, epochs: int) -> Tensor:
        return torch.from_numpy(self.kept.sum(1) / min(epochs, self.window))


@pytest.mark.parametrize("window", [10, 3])
def test_joint_optimization(window: int) -> None:
    """Labels are kept for 40 % of twelve epochs, then follow the mean of the last predictions; so does the second
    training, which is cross-entropy alone and half as long."""
    labels, alpha, beta, name = some_labels(), 1.2, 0.8, "joint-optimization"
    method = begin(name, labels, epochs=12, begin=0.4, retrain=0.5, window=window)
    soft, past = hot(labels), Past(window)
    parts = trainings(method, labels)
    first = next(parts)
    assert (first.start, first.settings["schedule"], first.labels) == ("scratch", "constant", None)
    for number in range(12):
        epoch(method, number)
        for index, z in whole_epoch(number):
            (found,) = step(method, batch(index, labels), [z])

            def objective(leaf: Tensor) -> Tensor:
                s = torch.softmax(leaf, 1)
                prior = -(torch.log(s.mean(0)) / CLASSES).sum() - np.log(CLASSES)  # a divergence in the paper
                entropy = -(torch.log_softmax(leaf, 1) * s).sum(1).mean()
                return cross_entropy(leaf, soft[index]).mean() + alpha * prior + beta * entropy

            same_step(name, found, objective, z)
            past.put(number, index, z)
        count = number + 1
        if count >= round(0.4 * 12):
            soft = past.mean(count)
    second = next(parts)
    assert (second.start, second.settings["epochs"]) == ("scratch", 6)
    for number in range(2):
        epoch(method, number)
        close(name, method.targets, soft)
        for index, z in whole_epoch(50 + number):
            (found,) = step(method, batch(index, labels), [z])
            same_step(name, found, lambda leaf: cross_entropy(leaf, soft[index]).mean(), z)
    assert next(parts, None) is None


@pytest.mark.parametrize("compatibility", ["code", "paper"])
def test_pencil(compatibility: str) -> None:
    """Cross-entropy up to begin; then the labels' logits, 10 for the given class, go down their own gradient; they
    stay where they are after end."""
    labels, rate = some_labels(), 60.0
    method = begin("pencil", labels, epochs=8, begin=0.25, end=0.75, lr_y=rate, compatibility=compatibility)
    y = 10 * hot(labels)
    number = 0
    for stage, length in zip(trainings(method, labels), (6, 2), strict=True):
        assert stage.settings["epochs"] == length
        assert stage.start == ("scratch" if length == 6 else "continue")
        for inner in range(length):
            epoch(method, inner)
            for index, z in whole_epoch(number):
                leaf, yy = z.clone().requires_grad_(), y[index].clone().requires_grad_()
                last = torch.softmax(yy, 1)
                p, log_p = torch.softmax(leaf, 1), torch.log_softmax(leaf, 1)
                if number < 2:
                    objective = cross_entropy(leaf, hot(labels[index])).mean()
                else:
                    objective = (p * (log_p - torch.log(last))).mean()
                    if number < 6:
                        lo = torch.nn.functional.cross_entropy(last, labels[index])
                        if compatibility == "paper":
                            lo = -torch.log(last.gather(1, labels[index][:, None])).mean()
                        objective = objective + 0.4 * lo - 0.1 * (p * log_p).mean()
                (gradient,) = torch.autograd.grad(objective, leaf, retain_graph=True)
                (found,) = step(method, batch(index, labels), [z])
                close("pencil", found[0], objective)
                close("pencil", found[1], gradient)
                if 2 <= number < 6:
                    y[index] -= rate * torch.autograd.grad(objective, yy)[0]
            close("pencil", method.z, y)
            number += 1
    assert number == 8
    assert (y - 10 * hot(labels)).abs().max() > 3, "labels hardly moved"


def test_adacorr() -> None:
    """The matrix A of each sample and its soft label, the retroactive loss of both, and labels by the ratio of the mean
    probabilities, which grows by 0.02 an epoch."""
    labels, name, window = some_labels(), "adacorr", 4
    method = begin(name, labels, epochs=11, window=window, retro=3 / 11, correct=4 / 11, interval=4 / 11, growth=0.22)
    past, current, eps, k = Past(window), labels.clone(), 1e-4, CLASSES
    matrix = torch.full((SAMPLES, k, k), 1 / k, dtype=torch.float64)
    for number in range(11):
        epoch(method, number)
        close(name, method.current, current)
        soft = hot(current) * (0.99 - 0.01 / (k - 1)) + 0.01 / (k - 1)
        for index, z in whole_epoch(number):
            (found,) = step(method, batch(index, labels), [z])

            def objective(leaf: Tensor) -> Tensor:
                loss = cross_entropy(leaf, hot(current[index])).mean()
                if number >= 3:
                    target = torch.einsum("nij,nj->ni", matrix[index], soft[index])
                    loss = loss + cross_entropy(leaf, target).mean()
                return loss

            same_step(name, found, objective, z)
            past.put(number, index, z)
        if number in (2, 6):
            matrix.fill_(eps)
            matrix[torch.arange(SAMPLES), current] = 0.9 - eps / (k - 1)
        if number >= 4:
            mean, delta = past.mean(number + 1), 1.2 + 0.02 * (number - 4 + 1)
            for i in range(SAMPLES):
                best = int(mean[i].argmax())
                if best != current[i] and mean[i, best] / mean[i, current[i]] > delta:
                    current[i] = best
    assert (current != labels).sum() > 5


def test_plc() -> None:
    """Ratios below the threshold give way to the most probable class; the threshold grows where none does."""
    labels, name, window = some_labels(), "plc", 5
    method = begin(name, labels, epochs=11, window=window, warmup=2 / 11, delta=0.05, step=0.3)
    past, current, delta, seen = Past(window), labels.clone(), 0.05, set()
    for number in range(11):
        epoch(method, number)
        close(name, method.current, current)
        close(name, method.delta, delta)
        seen.add(round(delta, 6))
        for index, z in whole_epoch(number % 3):
            (found,) = step(method, batch(index, labels), [z])
            same_step(name, found, lambda leaf: cross_entropy(leaf, hot(current[index])).mean(), z)
            past.put(number, index, z)
        if number >= 2:
            mean, corrected = past.mean(number + 1), 0
            for i in range(SAMPLES):
                if mean[i, current[i]] / mean[i].max() < delta:
                    current[i], corrected = int(mean[i].argmax()), corrected + 1
            if corrected < 0.001 * SAMPLES:
                delta = min(delta + 0.3, 0.9)
    assert (current != labels).sum() > 5
    assert len(seen) > 2


@pytest.mark.parametrize("negatives", [1, 6])
def test_nlnl(negatives: int) -> None:
    """Three epochs each of negative, selective negative and selective positive learning in one training, then two on
    pseudo-labels; the code's masks (-100), its class weights, and its normalisation by the rows that count."""
    labels, name, window = some_labels(), "nlnl", 2
    method = begin(name, labels, epochs=9, negatives=negatives, window=window, cut=0.05, pseudo=2 / 9)
    past, at_cut = Past(window), 0
    weight = torch.bincount(labels, minlength=CLASSES).double()
    weight = 1 / (weight / weight.max())
    parts = trainings(method, labels)
    assert next(parts).settings == {"schedule": "constant"}
    for number in range(9):
        epoch(method, number)
        for index, z in whole_epoch(number):
            redraw(method, number)
            turns = torch.randint(1, CLASSES, (ROWS, negatives), generator=torch.Generator().manual_seed(number))
            (found,) = step(method, batch(index, labels), [z])
            own = past.mean(max(1, number))[index, labels[index]]
            positive = labels[index].clone() if number >= 6 else torch.full((ROWS,), -100)
            negative = (labels[index][:, None] + turns) % CLASSES
            if 3 <= number < 6:
                negative[own < 1 / CLASSES] = -100
            if number >= 6:
                negative[:] = -100
                positive[own < 0.05] = -100
                at_cut += int((positive < 0).sum())

            if not (positive >= 0).any() and not (negative >= 0).any():  # the code divides by 0
                close(name, found[0], 0.0)
                continue

            def objective(leaf: Tensor) -> Tensor:
                s = (
                    torch.log(torch.clamp(1 - torch.softmax(leaf, 1), min=1e-5, max=1.0))
                    * weight[labels[index]][:, None]
                )
                total = torch.zeros((), dtype=torch.float64)
                if (positive >= 0).any():
                    total = total + weighted(leaf, positive, weight) * (positive >= 0).sum()
                if (negative >= 0).any():
                    parted = torch.nn.functional.nll_loss(s.repeat(negatives, 1), negative.t().contiguous().view(-1))
                    total = total + parted * (negative >= 0).sum()
                return total / ((positive >= 0).sum() + (negative[:, 0] >= 0).sum())

            same_step(name, found, objective, z)
        for index, z in whole_epoch(number):
            past.put(number, index, z)
    assert at_cut > 0

    assert next(parts).settings == {"epochs": 2}
    mean = past.mean(9)
    kept = mean[torch.arange(SAMPLES), labels] >= 0.05
    count = torch.bincount(labels[kept], minlength=CLASSES).double()
    weight = 1 / (count / count.max())
    weight[weight == float("inf")] = 0
    past = Past(window)
    for number in range(2):
        epoch(method, number)
        for index, z in whole_epoch(20 + number):
            (found,) = step(method, batch(index, labels), [z])
            masked = torch.where(kept[index], labels[index], -100)
            same_step(name, found, lambda leaf: weighted(leaf, masked, weight), z)
            past.put(number, index, z)

    assert next(parts).settings == {"epochs": 2}
    soft = past.mean(2)
    count = torch.bincount(soft.argmax(1), minlength=CLASSES).double()
    weight = 1 / (count / count.max())
    epoch(method, 0)
    close(name, method.targets, soft)
    for index, z in whole_epoch(30):
        (found,) = step(method, batch(index, labels), [z])
        own = weight[soft[index].argmax(1)]
        same_step(name, found, lambda leaf: (cross_entropy(leaf, soft[index]) * own).mean(), z)
    assert next(parts, None) is None
