"""Methods of several trainings: what each of them learns from, beside the authors' code. RoG: its classifier."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_harness import CLASSES, begin, close, epoch, hot, some_labels, some_logits, stages
from torch import Tensor


@pytest.mark.parametrize(("name", "asked"), [("bootstrap", "last"), ("nts", "selected")])
def test_labels_of_the_second_training(name: str, asked: str) -> None:
    """The predictions of the last epoch, or of the one best on noisy validation labels; from scratch."""
    which: list[str] = []
    logits = some_logits(24, CLASSES)

    def predict(epoch: str) -> Tensor:
        which.append(epoch)
        return logits

    first, second = stages(begin(name), predict)
    assert which == [asked]
    assert first.labels is None
    assert second.start == "scratch"
    close(name, second.labels, logits.argmax(1))


def places(method: Any, number: int, length: int) -> set[int]:
    """What an epoch draws from."""
    chosen = method.subset()
    return set(range(length)) if chosen is None else set(chosen.tolist())


def test_o2u() -> None:
    """Losses less their mean, summed over every epoch of the cycles; the share of the largest goes. The rate of the
    first training falls from 0.01 to 0.005 and 0.001 at a quarter and at half of it; cycles go on from its weights."""
    labels, length = some_labels(), 24
    method = begin("o2u", labels, epochs=8, period=2, cyclical=0.5, remove=0.3, seed=1)
    ends = [some_logits(length, CLASSES, seed=s) for s in range(40)]
    score, number, rates = np.zeros(length), 0, []
    for part in stages(method, lambda which: ends[number - 1]):
        method.on_stage(labels)
        settings = part.settings
        cyclical = settings.get("schedule") == "cosine"
        for inner in range(settings.get("epochs", 8)):
            epoch(method, inner, ends[number - 1])
            last = method.subset() if settings == {} else None
            if settings.get("schedule") == "constant":
                rates.append(settings["lr"])
            if cyclical:
                losses = nll(ends[number], labels).numpy()
                score += losses - losses.mean()
            number += 1
        assert part.start == ("scratch" if number == 2 or settings == {} else "continue")
    close("o2u", method.score, score)
    kept = np.argsort(score)[: int(0.7 * length)]
    assert set(last.tolist()) == set(kept.tolist())
    assert rates == [0.01] * 2 + [0.005] * 2 + [0.001] * 4


def nll(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("seed", range(3))
def test_incv(seed: int) -> None:
    """Two iterations: halves of the candidates; held-out samples whose label is predicted are selected, the largest
    losses discarded. The halves are those that the method draws."""
    length, draws = 200, np.random.default_rng(seed)
    labels = torch.from_numpy(draws.integers(0, CLASSES, length))
    wrong = torch.from_numpy(draws.random(length) < 0.35)
    judged = [
        2 * hot(torch.where(wrong, (labels + 1) % CLASSES, labels)) + some_logits(length, CLASSES, seed=seed * 9 + s)
        for s in range(4)
    ]
    method = begin("incv", labels, iterations=2, remove=0.4)
    number = 0
    learnt = []
    for _ in stages(method, lambda which: judged[number]):
        method.on_stage(labels)
        epoch(method, 0)
        learnt.append(places(method, 0, length))
        number = min(len(learnt) - 1, 3)
    assert len(learnt) == 5
    train, candidates, discarded = set(), set(range(length)), set()
    for turn in range(2):
        halves = [learnt[2 * turn] - train, learnt[2 * turn + 1] - train]
        assert halves[0] | halves[1] == candidates
        assert not halves[0] & halves[1]
        assert len(halves[0]) == len(candidates) // 2
        confirmed = set()
        for first, held in ((0, halves[1]), (1, halves[0])):
            held_list = np.array(sorted(held))
            p = torch.softmax(judged[2 * turn + first], 1).numpy()[held_list]
            y = labels.numpy()[held_list]
            cross_entropy = -np.log(p[np.arange(len(y)), y] + 1e-8)
            right = p.argmax(1) == y
            confirmed |= set(held_list[right].tolist())
            count = int(0.4 * right.sum())
            assert count > 0  # the code would discard everything
            discarded |= set(held_list[np.argsort(cross_entropy)[-count:]].tolist())
        train |= confirmed
        candidates -= confirmed | discarded
    assert learnt[4] == train


def test_noise_estimate_of_incv() -> None:
    """The code's e goes up by 0.001 until (1-e)^2 + e^2 / (K-1) falls to the agreement; ours solves it."""
    labels = torch.zeros(400, dtype=torch.long)
    method = begin("incv", labels, iterations=1)
    first = set()
    for right in (0.5, 0.7, 0.9):
        logits = torch.zeros(400, CLASSES)
        logits[:, 1] = torch.linspace(1, 2, 400)  # all wrong, each with a loss of its own
        method = begin("incv", labels, iterations=2)
        learnt: list[set[int]] = []

        def predict(which: str) -> Tensor:
            return logits

        for _ in stages(method, predict):
            method.on_stage(labels)
            epoch(method, 0)
            learnt.append(places(method, 0, 400))
            if len(learnt) == 2:
                first, second = learnt
                for half in (sorted(first), sorted(second)):
                    logits[half[: int(right * len(half))], 0] = 5.0
        ratio = 0.001
        while (1 - ratio) ** 2 + ratio**2 / (CLASSES - 1) > right and ratio < 1:
            ratio += 0.001
        discarded = min(2, ratio / (1 - ratio)) * right * 200
        gone = 400 - len(learnt[2] | learnt[3])
        wrong = (1 - right) * 200
        assert gone == pytest.approx(2 * min(wrong, discarded), abs=2 + 0.01 * 400)


def rog_by_code(x: np.ndarray, y: np.ndarray, share: float, draws: np.random.Generator) -> np.ndarray:
    """Means of a random share of each class and their pooled precision; of each class the share nearest by that; its
    mean; covariances pooled by the size of the classes; a uniform prior."""
    means, pooled, kept = [], np.zeros((x.shape[1],) * 2), 0
    for c in range(CLASSES):
        own = x[y == c]
        own = own[draws.permutation(len(own))[: int(share * len(own))]]
        means.append(own.mean(0))
        pooled += (own - means[c]).T @ (own - means[c])
        kept += len(own)
    precision = np.linalg.pinv(pooled / kept, hermitian=True)
    robust, pooled = [], np.zeros_like(pooled)
    for c in range(CLASSES):
        own = x[y == c]
        distance = np.einsum("id,de,ie->i", own - means[c], precision, own - means[c])
        near = own[np.argsort(distance)[: int(share * len(own))]]
        robust.append(near.mean(0))
        pooled += len(own) * np.cov(near, rowvar=False, bias=True)
    precision = np.linalg.pinv(pooled / len(x), hermitian=True)
    m = np.stack(robust)
    return x @ (m @ precision).T - 0.5 * np.diag(m @ precision @ m.T) + math.log(1 / CLASSES)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_rog(share: float) -> None:
    draws = np.random.default_rng(2)
    y = draws.integers(0, CLASSES, 400)
    x = 2 * np.eye(CLASSES, 7)[y] + draws.normal(size=(400, 7)) @ (np.eye(7) + 0.2)
    y = np.where(draws.random(400) < 0.3, draws.integers(0, CLASSES, 400), y)
    method = begin("rog", torch.from_numpy(y), share=share)
    method.on_evaluation(lambda k, features=False, **_: torch.from_numpy(x))
    found = method.outputs([torch.from_numpy(x)]).log_softmax(1)
    expected = torch.from_numpy(rog_by_code(x, y, share, np.random.default_rng(y))).log_softmax(1)
    close("rog", found, expected)
