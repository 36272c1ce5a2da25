"""Methods with strong views or unlabelled samples: several epochs beside the authors' step."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
import math
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
        places_of = (part.fresh, part.trainable, part.frozen, part.schedule_epoch)
        parts.append((part.settings["epochs"], part.start, *places_of, part.settings.get("lr")))
    assert parts == [  # the new head is in no optimizer of the authors but the one of its own
        (20, "scratch", 0, None, 0, 0, None),
        (5, "continue", 1, 1, 0, None, 1e-4),
        (280, "continue", 0, None, 1, 20, None),
    ]
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


def fmix_by_code(draws: np.random.Generator, shape: tuple[int, int]) -> tuple[float, np.ndarray]:
    """utils/fmix.py sample_mask with alpha 1 and decay 3, its draws in the order that the method has them."""
    h, w = shape
    lam = draws.beta(1.0, 1.0)
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[: w // 2 + 1]
    freqs = np.sqrt(fx * fx + fy * fy)
    scale = np.ones(1) / (np.maximum(freqs, np.array([1.0 / max(w, h)])) ** 3)
    param = np.zeros((1, *freqs.shape, 2))
    param[0, :2] = draws.standard_normal((2, freqs.shape[1], 2))  # the code draws all rows and uses these
    spectrum = scale[..., None][None] * param
    spectrum = spectrum[:, 0] + 1j * spectrum[:, 1]
    mask = np.real(np.fft.irfftn(spectrum, shape, axes=(-2, -1)))[0, :h, :w]
    order = mask.reshape(-1).argsort()[::-1]
    number = math.ceil(lam * mask.size) if draws.random() > 0.5 else math.floor(lam * mask.size)
    flat = np.zeros(mask.size)
    flat[order[:number]] = 1
    return lam, flat.reshape(shape)


def css(losses: Tensor, labels: Tensor, rho: float) -> np.ndarray:
    """eval_train: of each class the smallest losses, ceil(n / K rho) of them."""
    prob, scaled = np.zeros(len(labels)), ((losses - losses.min()) / (losses.max() - losses.min())).numpy()
    for j in range(CLASSES):
        indices = np.where(labels.numpy() == j)[0]
        if len(indices):
            count = max(min(math.ceil(len(labels) / CLASSES * rho), len(indices)), 1)
            prob[indices[scaled[indices].argsort(kind="stable")[:count]]] = 1
    return prob


def soft(z: Tensor, targets: Tensor) -> Tensor:
    return -(F.log_softmax(z, 1) * targets).sum(1)


def test_promix() -> None:
    """Selections, guesses, mixtures, losses of both heads and both networks, and the mean predictions, at the start of
    the training, within the ramp, after it, and when agreed guesses are added."""
    count, width, rows = 40, 6, 8
    labels = some_labels(samples=count)
    options = {"first_share": 0.3, "last_share": 0.6, "tau": 0.6, "memory": 0.9, "debias": 0.8}
    method = begin("promix", labels, epochs=600, facts={"features": width}, **options)
    heads = [(head.weight.detach().double(), head.bias.detach().double()) for head in method.heads]
    method.auxiliary_optimizer()
    pi = torch.full((2, 2, CLASSES), 1 / CLASSES, dtype=torch.float64)  # network; reliable or not
    grown_late = guessed = 0
    for number in (10, 30, 60, 120, 400):
        redraw(method, number)
        judged = [2 * hot(labels) + some_logits(count, CLASSES, seed=number + k, scale=2.0) for k in range(2)]
        epoch(method, number, judged)
        lr = 0.05 * 1e-3 + (0.05 - 0.05 * 1e-3) * (1 + math.cos(math.pi * number / 600)) / 2
        close("promix", method.heads_optimizer.param_groups[0]["lr"], lr)
        ramp, ramp2 = min(1, number / 50), min(1, number / 100)
        prob = [css(F.cross_entropy(z, labels, reduction="none"), labels, 0.3 + 0.3 * ramp) for z in judged]
        for k in range(2):
            close("promix", method.small[k], prob[k])
        images = Images(labels, number, rows)
        for place, drawn in enumerate(method.batches(images)):
            seed = 10 * number + place
            redraw(method, seed)
            own, generator, index = np.random.default_rng(seed), torch.Generator().manual_seed(seed), drawn.index
            outputs = [some_logits(rows, 6, CLASSES, seed=seed + 5 * k, scale=3.0).float() for k in range(2)]
            outputs[1][: rows // 2, 0] = outputs[0][: rows // 2, 0]  # so that they agree on some
            features = [some_logits(rows, 6, width, seed=seed + 5 * k + 1).float() for k in range(2)]
            tasks = method.tasks(drawn, lambda k, x, outputs=outputs: outputs[k][:, 0])
            method.plan(tasks, outputs)
            y = hot(labels[index])
            p = [torch.softmax(z[:, 0].double(), 1) for z in outputs]
            match = p[0].argmax(1) == p[1].argmax(1)
            old = pi.clone()
            for k, task in enumerate(tasks):
                w_x = torch.from_numpy(prob[k])[index]
                w_x[(y * p[k]).sum(1) > 0.6] = 1
                pred = hot((outputs[k][:, 0] - 0.8 * old[k, 0].log()).argmax(1))
                target = y * w_x[:, None] + pred * (1 - w_x[:, None])
                chosen = w_x == 1
                if number > 600 - 250 and chosen.sum() / rows < 0.9:
                    new = (p[0].max(1).values > 0.6) & (p[1].max(1).values > 0.6) & match & ~chosen
                    most = int(rows * 0.9) - int(chosen.sum())
                    places_of_new = new.nonzero().flatten()
                    score = (p[0].max(1).values + p[1].max(1).values) / 2
                    taken = places_of_new[(-score[places_of_new]).sort()[1][:most]]
                    grown_late += len(taken)
                    chosen[taken] = True
                guessed += int((~chosen).sum())
                views, targets = [], []
                for _ in range(2):
                    lam = own.beta(4, 4)
                    lam = max(lam, 1 - lam)
                    mine = chosen.nonzero().flatten()
                    other = chosen_permutation(chosen.float(), generator)
                    weak = drawn.views[0]
                    views.append(lam * weak[mine] + (1 - lam) * weak[other])
                    targets.append(lam * target[mine] + (1 - lam) * target[other])
                    lam, mask = fmix_by_code(own, (2, 2))
                    other = chosen_permutation(chosen.float(), generator)
                    area = torch.from_numpy(mask).float()
                    views.append(area * weak[mine] + (1 - area) * weak[other])
                    targets.append((lam, target[mine], target[other]))
                assert task.forwards == (1,) * 6
                for v in range(4):
                    close("promix", task.inputs[mine, 2 + v], views[v])

                leaf = outputs[k].double().clone().requires_grad_()
                inner = features[k].double().clone().requires_grad_()
                weight, bias = (t.clone().requires_grad_() for t in heads[k])
                ph = inner @ weight.T + bias
                shift, doubt = 0.8 * old[k, 0].log(), 0.8 * old[k, 1].log()
                loss = torch.zeros((), dtype=torch.float64)
                for h, z in enumerate((leaf, ph)):
                    z = z + shift
                    cr, ce = soft(z[chosen, 1], target[chosen]).mean(), soft(z[chosen, 0], target[chosen]).mean()
                    mix = soft(z[mine, 2 + 2 * h], targets[2 * h]).mean()
                    lam, one, two = targets[2 * h + 1]
                    masked = lam * F.cross_entropy(z[mine, 3 + 2 * h], one.argmax(1))
                    masked = masked + (1 - lam) * F.cross_entropy(z[mine, 3 + 2 * h], two.argmax(1))
                    loss = loss + ce + ramp * (cr + mix + masked)
                beta = 0.1 * ramp2 if number < 100 else 0.0
                ptx = torch.softmax(outputs[k][:, 0].double() - doubt, 1) ** 2
                ptx = ptx / ptx.sum(1, keepdim=True)
                if (~chosen).any():
                    unrel = soft((ph + doubt)[~chosen, 0], ptx[~chosen]).mean()
                    loss = loss + beta * (unrel + ramp * soft((ph + doubt)[~chosen, 1], ptx[~chosen]).mean())
                expected = torch.autograd.grad(loss, [leaf, inner, weight, bias])
                ours, seen = outputs[k].clone().requires_grad_(), features[k].clone().requires_grad_()
                task.features = seen
                found = method.loss(ours, task).mean()
                close("promix", found, loss.detach())
                mine_grads = torch.autograd.grad(found, [ours, seen, *method.heads[k].parameters()])
                for got, due in zip(mine_grads, expected, strict=True):
                    close("promix", got, due)
                pi[k, 0] = 0.9 * pi[k, 0] + 0.1 * p[k][chosen].mean(0)
                if (~chosen).any():
                    pi[k, 1] = 0.9 * pi[k, 1] + 0.1 * p[k][~chosen].mean(0)
            close("promix", method.means, pi)
    assert grown_late > 5
    assert guessed > 20


def test_masks_of_fmix() -> None:
    """As the code's, and half of the image on average, at CIFAR's size."""
    from noisysam.methods.promix import fmix_mask

    areas = []
    for seed in range(50):
        lam, mask = fmix_mask(32, 32, np.random.default_rng(seed))
        expected = fmix_by_code(np.random.default_rng(seed), (32, 32))
        assert lam == expected[0]
        np.testing.assert_array_equal(mask, expected[1])
        assert abs(mask.mean() - lam) < 2 / 1024
        areas.append(mask.mean())
    assert 0.4 < np.mean(areas) < 0.6


def test_warmup_of_promix() -> None:
    labels = some_labels()
    method = begin("promix", labels, epochs=600, facts={"features": 6}, confidence_penalty=True)
    method.auxiliary_optimizer()
    epoch(method, 3)
    (drawn, *_) = method.batches(Images(labels, 3))
    for k, task in enumerate(method.tasks(drawn, None)):
        z = some_logits(8, CLASSES, seed=k)

        def objective(leaf: Tensor) -> Tensor:
            p = torch.softmax(leaf, 1)
            return F.cross_entropy(leaf, labels[drawn.index]) + (p * p.log()).sum(1).mean()

        leaf = z.clone().requires_grad_()
        found = method.loss(leaf, task).mean()
        (gradient,) = torch.autograd.grad(found, leaf)
        same_step("promix", (float(found.detach()), gradient, task), objective, z)
