"""Methods with strong views or unlabelled samples: several epochs beside the authors' step."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_harness import (
    CLASSES,
    SAMPLES,
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


class Images:
    """An epoch whose images hold their sample's place in one channel and the number of the view in another."""

    def __init__(self, labels: Tensor, number: int, rows: int = 8, subset: Tensor | None = None) -> None:
        self.labels, self.number, self.rows, self.count, self.policies = labels, number, rows, 0, []
        places = torch.arange(len(labels)) if subset is None else subset
        self.rows = min(rows, len(places))
        self.order = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(number))]

    def __len__(self) -> int:
        return len(self.order) // self.rows

    def __iter__(self) -> Any:
        for index in self.order[: len(self) * self.rows].split(self.rows):
            yield Drawn(self.view(index, "plain"), self.labels[index], index, self.number)

    def view(self, index: Tensor, policy: str | None = None) -> Tensor:
        self.count += 1
        self.policies.append(policy)
        image = torch.stack([index.float(), torch.full((len(index),), float(self.count))], 1)
        return image[:, :, None, None].expand(-1, 2, 2, 2)

    def batch(self, index: Tensor, network: int | None = None, views: int = 1, divided: bool = False) -> Drawn:
        drawn = [self.view(index) for _ in range(views)]
        return Drawn(drawn[0], self.labels[index], index, self.number, network, drawn, divided)

    def cycle(self, pool: Tensor, rows: int, steps: int, generator: Any) -> Any:
        yield from pool.repeat(-(-rows * steps // len(pool)))[: rows * steps].split(rows)


def places(images: Tensor) -> Tensor:
    return images[..., 0, 0, 0].long()


def kl(weak: Tensor, strong: Tensor) -> Tensor:
    """kl_div of both codes, summed over the classes: the target is the weak view's prediction, detached."""
    target = torch.softmax(weak, 1).detach()
    return F.kl_div(torch.log_softmax(strong, 1), target, reduction="none").sum(1)


@pytest.mark.parametrize(("consistency", "balance"), [(0.9, 0.1), (0.5, 0.3)])
def test_sop_plus(consistency: float, balance: float) -> None:
    """The loss of SOP on the first half of the outputs, the entropy of the mean prediction, and the second half's
    divergence; u and v step at their own rates."""
    labels = some_labels()
    method = begin("sop+", labels, lr_u=3.0, lr_v=2.0, consistency=consistency, balance=balance)
    draws = np.random.default_rng(0)
    with torch.no_grad():
        method.u.copy_(torch.from_numpy(draws.normal(0, 0.5, method.u.shape)))
        method.v.copy_(torch.from_numpy(draws.normal(0, 0.5, method.v.shape)))
    u, v = (p.detach().double().clone().requires_grad_() for p in (method.u, method.v))
    images = Images(labels, 0)
    for visit, drawn in enumerate(method.batches(images)):
        index, z = drawn.index, some_logits(8, 2, CLASSES, seed=visit)

        def objective(leaf: Tensor) -> Tensor:
            y, output = hot(labels[index]), leaf[:, 0]
            plus = (u[index] ** 2 * y).clamp(0, 1)
            minus = (v[index] ** 2 * (1 - y)).clamp(0, 1)
            q = (torch.softmax(output, 1) + plus - minus.detach()).clamp(min=1e-4)
            q = F.normalize(q, p=1, eps=1e-4).clamp(1e-4, 1.0)
            loss = torch.mean(-torch.sum(y * q.log(), dim=-1))
            loss = loss + F.mse_loss(hot(output.detach().argmax(1)) + plus - minus, y, reduction="sum") / len(y)
            mean = q.mean(0).clamp(1e-4, 1.0)
            loss = loss + balance * -(mean.log() / CLASSES).sum()
            return loss + consistency * kl(output, leaf[:, 1]).mean()

        (found,) = step(method, drawn, [z])
        assert torch.equal(places(found[2].inputs), index[:, None].expand(-1, 2))
        assert found[2].forwards == ()
        expected = torch.autograd.grad(objective(z), [u, v])
        with torch.no_grad():
            reference = objective(z)
        close("sop+", found[0], reference)
        leaf = z.clone().requires_grad_()
        close("sop+", found[1], torch.autograd.grad(objective(leaf), leaf)[0])
        with torch.no_grad():
            for p, g, rate in zip((u, v), expected, (3.0, 2.0), strict=True):
                p -= rate * g
        close("sop+", method.u, u)
        close("sop+", method.v, v)
    assert images.policies == ["plain", "auto"] * 3


def test_cores2_consistency() -> None:
    """What CE - mean CE is above 0 for after 41 of 100 epochs loses its label; 0.9 times its divergence is added."""
    labels, judged = some_labels(), some_logits(SAMPLES, CLASSES, seed=3)
    method = begin("cores2-consistency", labels, epochs=1600)
    trainings = stages(method, lambda which: judged.float())
    first = next(trainings)
    method.on_stage(labels)
    assert first.settings["epochs"] == 41
    beta = np.concatenate([np.linspace(0, 0, 10), np.linspace(0, 2, 30), np.linspace(2, 2, 60)])
    for number in range(41):
        epoch(method, number)
        close("cores2-consistency", method.beta(), beta[number])
    assert method.subset() is None
    second = next(trainings)
    method.on_stage(labels)
    assert (second.start, dict(second.settings)) == ("scratch", {})
    margin = F.cross_entropy(judged, labels, reduction="none") + (torch.softmax(judged, 1) + 1e-8).log().mean(1)
    unsup, sup = (margin > 0).nonzero().flatten(), (margin <= 0).nonzero().flatten()
    assert 0 < len(sup) < SAMPLES
    for number in range(2):
        epoch(method, number)
        assert torch.equal(method.subset(), sup)
        images = Images(labels, number, rows=4, subset=sup)
        drawn_rows = []
        for visit, drawn in enumerate(method.batches(images)):
            z = some_logits(len(drawn.index), 3, CLASSES, seed=visit)
            (found,) = step(method, drawn, [z])
            labelled, weak, strong = places(found[2].inputs).T
            assert torch.equal(labelled, drawn.index)
            assert torch.equal(weak, strong)
            assert set(weak.tolist()) <= set(unsup.tolist())
            drawn_rows += weak.tolist()

            def objective(leaf: Tensor) -> Tensor:
                loss = F.cross_entropy(leaf[:, 0], labels[drawn.index])
                return loss + 0.9 * kl(leaf[:, 1], leaf[:, 2]).mean()

            same_step("cores2-consistency", found, objective, z)
        assert images.policies == ["plain", "auto", "auto", None] * len(images)
        assert drawn_rows[: len(unsup)] == unsup.tolist()[: len(drawn_rows)]


def look(k: int, inputs: Tensor) -> Tensor:
    turn = some_logits(8, CLASSES, seed=k + 1).float()
    return inputs.flatten(1) @ turn / 20


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_pes_semi(share: float) -> None:
    """20 of 300 epochs, 1,950 steps of a new linear with Adam, then epochs of the division by agreement; batches of
    which at most one half is unlabelled; class weights; MixMatch whose Beta changes at half of the training."""
    draws, n, rows = np.random.default_rng(1), 60, 10
    labels = torch.from_numpy(draws.integers(0, CLASSES - 1, n))  # a class is empty
    wrong = torch.from_numpy(draws.random(n) < share)
    method = begin("pes-semi", labels, epochs=300, lambda_u=15.0, facts={"steps": 390})
    parts = []
    for part in stages(method, lambda which: torch.zeros(n, CLASSES)):
        method.on_stage(labels)
        parts.append((part.settings["epochs"], part.start, part.fresh, part.trainable, part.settings.get("lr")))
    assert parts == [(20, "scratch", 0, None, None), (5, "continue", 1, 1, 1e-4), (280, "continue", 0, None, None)]
    for number in (0, 7, 200):
        views = [
            3 * hot(torch.where(wrong, (labels + 1) % (CLASSES - 1), labels)) + some_logits(n, CLASSES, seed=number + v)
            for v in (0, 50)
        ]
        asked = iter(views)
        method.epoch = number
        method.on_epoch(number, lambda k, features=False, augmented=False: next(asked).float())
        p = (torch.softmax(views[0], 1) + torch.softmax(views[1], 1)) / 2
        confident = (p.argmax(1) == labels).nonzero().flatten()
        unconfident = (p.argmax(1) != labels).nonzero().flatten()
        size = rows // 2 if len(unconfident) > len(confident) else int(len(unconfident) / n * rows)
        assert (len(unconfident) > len(confident)) == (share > 0.5)
        counts = np.bincount(labels[confident], minlength=CLASSES)
        with np.errstate(divide="ignore"):
            cw = counts[counts != 0].mean() / counts
        cw[np.isinf(cw)] = 0
        cw[cw > 3] = 3
        close("pes-semi", method.balance, cw)
        images = Images(labels, number, rows)
        for place, drawn in enumerate(method.batches(images)):
            redraw(method, place)
            own, generator = np.random.default_rng(place), torch.Generator().manual_seed(place)
            con = rows - size
            assert set(drawn.index[:con].tolist()) <= set(confident.tolist())
            assert set(drawn.index[con:].tolist()) <= set(unconfident.tolist())
            assert len(drawn.index) == rows
            z = some_logits(2 * rows, CLASSES, seed=place)
            (found,) = step(method, drawn, [z], look)
            x1, x2 = drawn.views
            pu = (torch.softmax(look(0, x1[con:]), 1) + torch.softmax(look(0, x2[con:]), 1)).double() / 2
            ptu = pu ** (1 / 0.5)
            targets = torch.cat([hot(drawn.labels[:con])] * 2 + [ptu / ptu.sum(1, keepdim=True)] * 2)
            inputs = torch.cat([x1[:con], x2[:con], x1[con:], x2[con:]])
            alpha = 0.75 if number + 20 >= 150 else 4
            weight = own.beta(alpha, alpha)
            weight = max(weight, 1 - weight)
            other = torch.randperm(2 * rows, generator=generator)
            mixed = weight * targets + (1 - weight) * targets[other]
            close("pes-semi", found[2].inputs, weight * inputs + (1 - weight) * inputs[other])
            ramp = 15.0 * np.clip((20 + number + place / len(images) - 20) / 16, 0, 1)

            def objective(leaf: Tensor) -> Tensor:
                lx = -torch.mean(F.log_softmax(leaf[: 2 * con], 1) * mixed[: 2 * con], 0)
                lu = torch.mean((torch.softmax(leaf[2 * con :], 1) - mixed[2 * con :]) ** 2)
                return torch.sum(lx * torch.from_numpy(cw)) + ramp * lu

            same_step("pes-semi", found, objective, z)


def chosen_permutation(chosen: Tensor, generator: torch.Generator) -> Tensor:
    """The order of the chosen rows that the method's draw gives: its keys, one for each row, sorted."""
    return (torch.rand(len(chosen), generator=generator) - chosen).argsort()[: int(chosen.sum())]


@pytest.mark.parametrize("hard", [1.0, 0.2])
def test_disc(hard: float) -> None:
    """Thresholds, clean, hard and corrected sets after each epoch; the losses of the sets and both mixups."""
    labels, momentum, count = some_labels(), 0.6, 2 * SAMPLES
    labels = labels.repeat(2)
    method = begin("disc", labels, start=2, momentum=momentum, hard=hard, sigma=0.2)
    prev = torch.full((2, count), 1 / count, dtype=torch.float64)
    probs = torch.zeros(2, count, CLASSES, dtype=torch.float64)
    clean = flags = torch.zeros(count, dtype=torch.bool)
    weak_labels, seen = labels.clone(), 0
    for number in range(5):
        redraw(method, number)
        epoch(method, number)
        if number:  # what the code does at the end of an epoch
            own = probs[:, torch.arange(count), labels]
            w_mask, s_mask = own[0] > prev[0], own[1] > prev[1]
            clean, selected = w_mask & s_mask, w_mask | s_mask
            flags = (w_mask & ~clean) | (s_mask & ~clean)
            ws_max, ws_label = ((probs[0] + probs[1]) / 2).max(1)
            correction = (ws_max > torch.minimum((prev[0] + prev[1]) / 2 + 0.2, torch.tensor(0.99))) & ~selected
            weak = correction | selected
            weak_labels[selected] = labels[selected]
            weak_labels[correction] = ws_label[correction]
            prev = momentum * prev + (1 - momentum) * probs.max(2).values
            close("disc", method.thresholds, prev)
            assert torch.equal(method.clean.bool(), clean)
            assert torch.equal(method.hard.bool(), flags)
            assert torch.equal(method.mixed.bool(), weak)
            assert torch.equal(method.corrected[weak], weak_labels[weak])
            seen += int(correction.sum() > 0)
        images = Images(labels, number)
        for place, drawn in enumerate(method.batches(images)):
            redraw(method, 10 * number + place)
            own_draws, generator = (
                np.random.default_rng(10 * number + place), torch.Generator().manual_seed(10 * number + place),
            )  # fmt: skip
            index, y = drawn.index, labels[drawn.index]
            z = some_logits(8, 2 if number < 2 else 4, CLASSES, seed=10 * number + place)
            (found,) = step(method, drawn, [z])
            probs[:, index] = torch.softmax(z[:, :2], 2).transpose(0, 1)
            if number < 2:
                both = lambda leaf: F.cross_entropy(leaf[:, 0], y) + F.cross_entropy(leaf[:, 1], y)  # noqa: E731
                same_step("disc", found, both, z)
                continue
            assert found[2].forwards == (2, 1, 1)
            rows = weak[index].nonzero().flatten()
            targets = []
            for view in range(2):
                lam = own_draws.beta(5.0, 5.0)
                lam = max(lam, 1 - lam)
                other = chosen_permutation(weak[index].float(), generator)
                assert set(other.tolist()) == set(rows.tolist())
                t = hot(weak_labels[index])
                targets.append(lam * t[rows] + (1 - lam) * t[other])
                image = drawn.views[view]
                mixed = lam * image[rows] + (1 - lam) * image[other]
                close("disc", found[2].inputs[rows, 2 + view], mixed)

            def objective(leaf: Tensor) -> Tensor:
                def gce(part: Tensor, t: Tensor) -> Tensor:
                    p = torch.softmax(part, 1).clamp(1e-7, 1.0)
                    return ((1 - (hot(t) * p).sum(1) ** 0.7) / 0.7).mean()

                loss, b_clean, b_hard = leaf.sum() * 0, clean[index], flags[index]
                if b_clean.any():
                    part = sum(F.cross_entropy(leaf[b_clean, v], y[b_clean]) for v in range(2))
                    loss = loss + part * b_clean.sum() / 8
                if b_hard.any():
                    part = sum(gce(leaf[b_hard, v], y[b_hard]) for v in range(2))
                    loss = loss + hard * part * b_hard.sum() / 8
                for view in range(2):
                    loss = loss - (F.log_softmax(leaf[rows, 2 + view], 1) * targets[view]).sum(1).mean()
                return loss

            same_step("disc", found, objective, z)
        assert images.policies == ["plain", "rand"] * 6
    assert seen, "no label was ever corrected"
