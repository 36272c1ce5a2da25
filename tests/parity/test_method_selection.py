"""Methods that choose rows, gradients or pools: several epochs beside the authors' choice and its loss."""

import math
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
    hot,
    redraw,
    same_step,
    some_labels,
    some_logits,
    stages,
    step,
    visits,
)
from sklearn.mixture import GaussianMixture
from torch import Tensor


def nll(z: Tensor, y: Tensor) -> Tensor:
    return z.logsumexp(1) - z[torch.arange(len(z)), y]


# two networks


def forget_rates(tau: float, epochs: int, schedule: str) -> np.ndarray:
    """The paper's tau min(e / 10, 1) from epoch 0; the code's linspace over ten, whose training begins at index 1."""
    if schedule == "paper":
        return np.array([tau * min(1.0, e / 10) for e in range(epochs)])
    rates = np.ones(epochs + 1) * tau
    rates[:10] = np.linspace(0, tau, 10)
    return rates[1:]


def pair(seed: int, rows: int) -> list[Tensor]:
    return [some_logits(rows, CLASSES, seed=seed), some_logits(rows, CLASSES, seed=seed + 500)]


@pytest.mark.parametrize("schedule", ["paper", "code"])
def test_co_teaching(schedule: str) -> None:
    """Each network learns from the rows of least loss for the other. The code divides its mean by their number once
    more; here it is the mean."""
    labels, rates = some_labels(), forget_rates(0.45, 14, schedule)
    method = begin("co-teaching", labels, forget_rate=0.45, schedule=schedule)
    for number in range(14):
        epoch(method, number)
        index = visits()[number % 5]
        z, y = pair(number, len(index)), labels[index]
        kept = int((1 - rates[number]) * len(index))
        for k, found in enumerate(step(method, batch(index, labels), z)):
            chosen = nll(z[1 - k], y).argsort()[:kept]
            same_step("co-teaching", found, lambda leaf, c=chosen, y=y: nll(leaf[c], y[c]).mean(), z[k])
    # 128 rows at epoch 9: 76 and 70
    assert int((1 - forget_rates(0.45, 14, "paper")[9]) * 128) == 76
    assert int((1 - forget_rates(0.45, 14, "code")[8]) * 128) == 70


@pytest.mark.parametrize("schedule", ["paper", "code"])
def test_co_teaching_plus(schedule: str) -> None:
    """After the warm-up only among rows that the networks predict differently: of those the least losses."""
    labels, rates = some_labels(), forget_rates(0.3, 14, schedule)
    method = begin("co-teaching+", labels, forget_rate=0.3, warmup=3, schedule=schedule)
    for number in range(14):
        epoch(method, number)
        index = visits(rows=16)[number % 5]
        z, y = pair(number, len(index)), labels[index]
        differ = torch.arange(len(index)) if number < 3 else (z[0].argmax(1) != z[1].argmax(1)).nonzero().flatten()
        kept = max(1, int((1 - rates[number]) * len(differ)))
        for k, found in enumerate(step(method, batch(index, labels), z)):
            chosen = differ[nll(z[1 - k], y)[differ].argsort()[:kept]]
            same_step("co-teaching+", found, lambda leaf, c=chosen, y=y: nll(leaf[c], y[c]).mean(), z[k])


@pytest.mark.parametrize("schedule", ["paper", "code"])
def test_jocor(schedule: str) -> None:
    """One joint loss picks the rows; its gradient reaches both networks."""
    labels, rates, weight = some_labels(), forget_rates(0.4, 14, schedule), 0.9
    method = begin("jocor", labels, forget_rate=0.4, strength=weight, schedule=schedule)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none").sum(1)

    for number in range(14):
        epoch(method, number)
        index = visits()[number % 5]
        z, y = pair(number, len(index)), labels[index]
        leaves = [v.clone().requires_grad_() for v in z]
        joint = (1 - weight) * (nll(leaves[0], y) + nll(leaves[1], y))
        joint = joint + weight * (divergence(*leaves) + divergence(*reversed(leaves)))
        chosen = joint.detach().argsort()[: int((1 - rates[number]) * len(index))]
        expected = torch.autograd.grad(joint[chosen].mean(), leaves)
        for found, gradient in zip(step(method, batch(index, labels), z), expected, strict=True):
            close("jocor", found[1], gradient)


def test_decoupling() -> None:
    """Sum over rows that differ, divided by the larger of their number and a tenth of the batch."""
    labels = some_labels()
    method = begin("decoupling", labels, warmup=1)
    for number in range(5):
        epoch(method, number)
        index = visits(rows=16)[number]
        z, y = pair(number, len(index)), labels[index]
        if number == 3:  # all the same but one
            z[1] = z[0].clone()
            z[1][0] = z[1][0].flip(0) if z[0][0].argmax() != 2 else z[1][0].roll(1)
        update = torch.ones(16, dtype=torch.float64) if number < 1 else (z[0].argmax(1) != z[1].argmax(1)).double()

        def objective(leaf: Tensor, y: Tensor = y, update: Tensor = update) -> Tensor:
            return (update * nll(leaf, y)).sum() / max(16 * 0.1, float(update.sum()))

        for k, found in enumerate(step(method, batch(index, labels), z)):
            same_step("decoupling", found, objective, z[k])


# DivideMix


class Pools:
    """An epoch, as a method that makes its own batches sees it."""

    rows = 4

    def __init__(self, labels: Tensor, number: int) -> None:
        self.labels, self.number = labels, number

    def __len__(self) -> int:
        return len(self.labels) // self.rows

    def __iter__(self) -> Any:
        for index in torch.arange(len(self.labels)).split(self.rows):
            yield batch(index, self.labels)

    def batch(self, index: Tensor, network: int | None = None, views: int = 1, divided: bool = False) -> Any:
        drawn = [torch.randn(len(index), 1, 4, 4, generator=torch.Generator().manual_seed(s)) for s in range(views)]
        return batch(index, self.labels, inputs=drawn[0], views=drawn, network=network, divided=divided)

    def cycle(self, pool: Tensor, rows: int, steps: int, generator: Any) -> Any:
        yield from pool.repeat(-(-rows * steps // len(pool)))[: rows * steps].split(rows)


def look(k: int, inputs: Tensor) -> Tensor:
    turn = some_logits(16, CLASSES, seed=k + 1).float()
    return inputs.flatten(1)[:, :16] @ turn / 4


@pytest.mark.parametrize("history", [1, 5])
def test_dividemix(history: int) -> None:
    """Both networks' mixtures on the (mean) scaled losses, pools by the other's, MixMatch with lambda_u by steps."""
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(draws.integers(0, CLASSES, 40))
    wrong = torch.from_numpy(draws.random(40) < 0.4)
    method = begin("dividemix", labels, warmup=2, ramp=4, lambda_u=25.0, history=history)
    past: list[list[np.ndarray]] = [[], []]
    for number in range(2, 9):
        predictions = [
            3 * hot(torch.where(wrong, (labels + 1) % CLASSES, labels)) + some_logits(40, CLASSES, seed=number + 50 * k)
            for k in range(2)
        ]
        redraw(method, number)
        seeds = np.random.default_rng(number)
        epoch(method, number, predictions)
        clean = []
        for k in range(2):
            losses = nll(predictions[k], labels).numpy()
            past[k].append((losses - losses.min()) / (losses.max() - losses.min()))
            values = np.stack(past[k])[-history:].mean(0).reshape(-1, 1)
            mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=int(seeds.integers(2**31)))
            clean.append(mixture.fit(values).predict_proba(values)[:, mixture.means_.argmin()])
            close("dividemix", method.clean[k], clean[k])
        drawn = Pools(labels, number)
        place = [0, 0]
        for one in method.batches(drawn):
            k, rows = one.network, len(one.index) // 2
            w = torch.from_numpy(clean[1 - k])
            assert (w[one.index[:rows]] > 0.5).all()
            assert (w[one.index[rows:]] <= 0.5).all()
            per_epoch = int((w > 0.5).sum()) // drawn.rows
            check_mixmatch(method, one, labels, w, number, place[k] / (per_epoch + 1))
            place[k] += 1
        assert place[0] > 0
        assert place[1] > 0


def check_mixmatch(method: Any, one: Any, labels: Tensor, w: Tensor, number: int, share: float) -> None:
    k, rows = one.network, len(one.index) // 2
    redraw(method, number)
    p = {j: [torch.softmax(look(j, v).double(), 1) for v in one.views] for j in (0, 1)}
    guess = (p[k][0] + p[k][1] + p[1 - k][0] + p[1 - k][1])[rows:] / 4
    trust = w[one.index[:rows], None]
    own = trust * hot(labels[one.index[:rows]]) + (1 - trust) * (p[k][0] + p[k][1])[:rows] / 2
    guess, own = (v**2 / (v**2).sum(1, keepdim=True) for v in (guess, own))
    target = torch.cat([own, own, guess, guess])
    weight = np.random.default_rng(number).beta(4.0, 4.0)
    weight = max(weight, 1 - weight)
    other = torch.randperm(4 * rows, generator=torch.Generator().manual_seed(number))
    target = weight * target + (1 - weight) * target[other]
    lambda_u = 25.0 * min(max((number + share - 2) / 4, 0.0), 1.0)

    def objective(leaf: Tensor) -> Tensor:
        supervised = -(leaf[: 2 * rows].log_softmax(1) * target[: 2 * rows]).sum(1).mean()
        unsupervised = ((leaf[2 * rows :].softmax(1) - target[2 * rows :]) ** 2).mean()
        mean = leaf.softmax(1).mean(0)
        return supervised + lambda_u * unsupervised + (1 / CLASSES * torch.log(1 / CLASSES / mean)).sum()

    z = some_logits(4 * rows, CLASSES, seed=number)
    (found,) = step(method, one, [z], look)
    same_step("dividemix", found, objective, z)


@pytest.mark.parametrize("penalty", [False, True])
def test_dividemix_warm_up(penalty: bool) -> None:
    """Cross-entropy, for asymmetric noise with the negative entropy of the predictions."""
    labels = some_labels()
    method = begin("dividemix", labels, warmup=2, confidence_penalty=penalty)
    for number in range(2):
        epoch(method, number)
        for one in method.batches(Pools(labels, number)):
            z, y = pair(number, len(one.index)), labels[one.index]

            def objective(leaf: Tensor, y: Tensor = y) -> Tensor:
                p = leaf.softmax(1)
                return nll(leaf, y).mean() + penalty * (p.log() * p).sum(1).mean()

            for k, found in enumerate(step(method, one, z)):
                same_step("dividemix", found, objective, z[k])


# PES


def last_part() -> Any:
    """PES in its last part."""
    labels = some_labels()
    method = begin("pes", labels)
    for _ in stages(method, lambda which: torch.zeros(SAMPLES, CLASSES)):
        method.on_stage(labels)
    return method, labels


def test_pes() -> None:
    """Selected: samples whose mean prediction over two augmented views is their label. Cross-entropy weighted by the
    mean count of the classes selected over each count, and divided by the batch's sum of weights."""
    method, labels = last_part()
    for number in range(3):
        views = [2 * hot(labels) + some_logits(SAMPLES, CLASSES, seed=10 * number + v) for v in range(2)]
        asked = iter(views)

        def predict(k: int, features: bool = False, augmented: bool = False, asked: Any = asked) -> Tensor:
            assert augmented
            return next(asked)

        method.epoch = number
        method.on_epoch(number, predict)
        p = (torch.softmax(views[0], 1) + torch.softmax(views[1], 1)) / 2
        confident = (p.argmax(1) == labels).nonzero().flatten()
        counts = np.bincount(labels[confident], minlength=CLASSES).astype(float)
        with np.errstate(divide="ignore"):
            weight = counts[counts != 0].mean() / counts
        weight[np.isinf(weight)] = 0
        assert 0 < len(confident) < SAMPLES
        for one in method.batches(Pools(labels, number)):
            assert set(one.index.tolist()) <= set(confident.tolist())
            z, y = some_logits(len(one.index), CLASSES, seed=number), labels[one.index]
            (found,) = step(method, one, [z])
            w = torch.from_numpy(weight)
            same_step("pes", found, lambda leaf, y=y, w=w: F.cross_entropy(leaf, y, weight=w), z)


def test_parts_of_pes() -> None:
    """25 of 200 epochs; Adam at 1e-4 for 2,457 steps on new layer4 and linear, then 1,755 on a new linear alone; then
    the 174 epochs that are left, without those two."""
    labels = torch.arange(45_000) % CLASSES
    method = begin("pes", labels, epochs=200, facts={"steps": 351})
    parts = list(stages(method, lambda which: torch.zeros(1, CLASSES)))
    assert [part.settings["epochs"] for part in parts] == [25, 7, 5, 174]
    assert [(part.fresh, part.trainable, part.frozen) for part in parts] == [
        (0, None, 0), (2, 2, 0), (1, 1, 0), (0, None, 2),
    ]  # fmt: skip
    assert parts[0].settings["schedule"] == "constant"  # 0.1 until epoch 100
    assert [part.start for part in parts] == ["scratch", "continue", "continue", "continue"]
    assert parts[1].settings["lr"] == parts[2].settings["lr"] == 1e-4
    assert parts[1].settings["weight_decay"] == 0.0


# SSR+


def test_ssr() -> None:
    """Relabelling, balanced votes, the even sampler and the loss with its three groups of images."""
    draws = np.random.default_rng(5)
    labels = torch.from_numpy(draws.integers(0, CLASSES, 60))
    method = begin("ssr", labels, k=12, theta_r=0.8, facts={"features": 6})
    for number in range(2):
        features = some_logits(60, 6, seed=number).float()
        predictions = 2 * some_logits(60, CLASSES, seed=number + 9).float()
        redraw(method, number)
        epoch(method, number, predictions, features)
        p = torch.softmax(predictions.double(), 1)
        modified = torch.where(p.max(1).values > 0.8, p.argmax(1), labels)
        unit = F.normalize(features.double(), dim=1)
        near = (unit @ unit.T).topk(12).indices
        shares = np.bincount(modified, minlength=CLASSES) + 1e-10
        score = hot(modified)[near].mean(1) / torch.from_numpy(shares / shares.sum())
        score = score / score.sum(1, keepdim=True)
        vote = score[torch.arange(60), modified]
        clean = (vote / score.max(1).values >= 1.0).nonzero().flatten()
        assert torch.equal(method.relabelled, modified)
        assert torch.equal(method.selected.nonzero().flatten(), clean)
        assert 0 < len(clean) < 60

        largest = int(np.bincount(modified[clean]).max())  # each class as often, by whole repeats and a random rest
        drawn = Pools(labels, number)
        first = torch.cat([one.index[: len(one.index) // 2] for one in method.batches(drawn)])
        assert len(first) >= 4
        per_class = torch.bincount(modified[clean], minlength=CLASSES)
        turn = first[: largest * int((per_class > 0).sum())]
        counts = torch.bincount(turn, minlength=60)
        assert set(turn.tolist()) <= set(clean.tolist())
        for c in range(CLASSES):
            of_class = counts[clean[modified[clean] == c]]
            whole = math.ceil(largest / max(1, int(per_class[c])))
            assert len(of_class) == 0 or int(of_class.max()) <= whole

        (one, *_) = method.batches(drawn)
        check_ssr_loss(method, one, modified, number)


def check_ssr_loss(method: Any, one: Any, modified: Tensor, seed: int) -> None:
    """Mixed images of two views of the selected rows, with their loss; -cos(h(f(u2)), f(u1)) of the others."""
    n = len(one.index) // 2
    redraw(method, seed)
    weight = np.random.default_rng(seed).beta(4.0, 4.0)
    weight = max(weight, 1 - weight)
    other = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))
    target = hot(modified[one.index[:n]]).repeat(2, 1)
    target = weight * target + (1 - weight) * target[other]
    images = torch.cat([view[:n] for view in one.views])
    images = weight * images + (1 - weight) * images[other]
    (task,) = method.tasks(one, look)
    close("ssr", torch.cat([task.inputs[:, 0], task.inputs[:, 1]]), images)
    for place in (0, 1):
        close("ssr", task.inputs[:, 2 + place], one.views[place][n:])
    assert tuple(task.forwards) == (2, 1, 1)  # encoder(mixed), encoder(u1), encoder(u2)
    z = some_logits(2 * n, CLASSES, seed=seed).float()
    features = some_logits(n, 4, 6, seed=seed).float()
    task.features = features
    stacked = torch.cat([z.unflatten(0, (2, n)).transpose(0, 1), torch.zeros(n, 2, CLASSES)], 1)
    found = method.loss(stacked, task).mean()
    supervised = -(z.double().log_softmax(1) * target).sum(1).mean()
    left, right = method.project(features[:, 2]), method.predict(method.project(features[:, 3]))
    consistency = -F.cosine_similarity(right, left.detach(), dim=-1).mean()
    close("ssr", found, supervised + consistency)


# CDR


def test_cdr() -> None:
    """The top share of |g w| over all weights of two and four dimensions keeps its gradient, times that share."""
    method = begin("cdr", rate=0.35, ramp=0)
    shapes = [(6, 3, 3, 3), (6,), (5, 6), (5,)]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        params, grads = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
        metric = torch.cat([(g * p).abs().flatten() for g, p in zip(grads, params, strict=True) if p.ndim in (2, 4)])
        share = 1 - 0.35
        threshold = metric.topk(int(share * len(metric))).values[-1]
        edited = method.transform_gradient([g.clone() for g in grads], params)
        for g, p, e in zip(grads, params, edited, strict=True):
            expected = g * ((g * p).abs() >= threshold) * share if p.ndim in (2, 4) else g
            close("cdr", e, expected)
