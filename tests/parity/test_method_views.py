"""Methods that learn from several views, by consistency, by contrast or as two pools, beside the authors' steps."""

# ruff: noqa: B023  (a reference is called within the turn that makes it)
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_harness import (
    CLASSES,
    batch,
    begin,
    close,
    epoch,
    hot,
    no_look,
    redraw,
    same_step,
    some_labels,
    some_logits,
    stages,
    step,
    visits,
)
from torch import Tensor


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(z, -1)).sum(-1)


def images(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def look_of(seed: int) -> Any:
    """Other forwards: logits that depend on the network, the images and whether weights are averaged."""

    def look(k: int, inputs: Tensor, averaged: bool = False) -> Tensor:
        turn = some_logits(16, CLASSES, seed=seed + 10 * k + 100 * averaged).to(inputs.dtype)
        return inputs.flatten(1) @ turn / 2

    return look


# Co-learning


def nt_xent(zis: Tensor, zjs: Tensor, temperature: float) -> Tensor:
    """losses/loss_ntxent.py: the positive first, then the negatives; a sum over 2 n, divided by it."""
    n = len(zis)
    z = torch.cat([zjs, zis])
    similarity = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=-1)
    loss = torch.zeros((), dtype=z.dtype)
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        negatives = torch.stack([similarity[i, j] for j in range(2 * n) if j not in (i, partner)])
        row = torch.cat([similarity[i, partner][None], negatives]) / temperature
        loss = loss - torch.log_softmax(row, 0)[0]
    return loss / (2 * n)


def pairwise(x: Tensor) -> Tensor:
    """losses/loss_utils.py: exp(-squared distance), the distance at least 1e-12 and that on the diagonal."""
    n = len(x)
    distance = ((x[:, None] - x[None]) ** 2).sum(2).clamp(min=1e-12)
    return torch.exp(-torch.where(torch.eye(n, dtype=torch.bool), torch.full_like(distance, 1e-12), distance))


def test_co_learning() -> None:
    """Mixed cross-entropy, the contrast of two views' projections, and the structure of the plain view's."""
    labels, name, weight_of_structure = some_labels(), "co-learning", 0.2
    method = begin(name, labels, facts={"features": 6}, alpha=5.0, temperature=0.5, structure=weight_of_structure)
    method.project.double()
    for visit, index in enumerate(visits(3)):
        redraw(method, visit)
        n = len(index)
        drawn = batch(index, labels, inputs=images(n, visit))
        drawn.views = [drawn.inputs, images(n, visit + 50), images(n, visit + 60)]
        lam = float(np.random.default_rng(visit).beta(5.0, 5.0))
        other = torch.randperm(n, generator=torch.Generator().manual_seed(visit))
        (task,) = method.tasks(drawn, no_look)
        for place, expected in enumerate([*drawn.views, lam * drawn.inputs + (1 - lam) * drawn.inputs[other]]):
            close(name, task.inputs[:, place], expected)
        assert tuple(task.forwards) == (1, 1, 1, 1)

        z = some_logits(n, 4, CLASSES, seed=visit, scale=0.5).requires_grad_()
        features = some_logits(n, 4, 6, seed=visit + 9, scale=0.5).requires_grad_()
        task.features = features
        leaves = [z, features, *method.parameters()]
        found = method.loss(z, task).mean()

        outs, out_1, out_2 = (method.project(features[:, view]) for view in range(3))
        y = hot(labels[index])
        supervised = (lam * cross_entropy(z[:, 3], y) + (1 - lam) * cross_entropy(z[:, 3], y[other])).mean()
        structure = -(pairwise(outs.detach()) * torch.log(pairwise(z[:, 0]) + 1e-12)).mean()
        expected = supervised + nt_xent(out_1, out_2, 0.5) + weight_of_structure * structure
        close(name, found, expected)
        for one, two in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            close(name, one, two)


# Jo-SRC


def js(p: Tensor, q: Tensor) -> Tensor:
    m = 0.5 * (p + q)
    return 0.5 * (p * p.log2() - p * m.log2()).sum(1) + 0.5 * (q * q.log2() - q * m.log2()).sum(1)


def test_jo_src() -> None:
    """Selected rows alone in the warm-up; then three kinds of targets, and the consistency with its sign."""
    labels, look, name, eps, tau, alpha = some_labels(), look_of(3), "jo-src", 0.3, 0.5, 0.4
    method = begin(name, labels, epochs=8, warmup=3, eps=eps, tau=tau, tau_last=0.9, alpha=alpha)
    assert method.teacher_decay == 0.99
    kinds = [0, 0, 0]
    for number in range(8):
        epoch(method, number)
        threshold = tau * number / 3 if number < 3 else (0.9 - tau) * (number - 3) / (8 - 3) + tau
        for visit, index in enumerate(visits(4)):
            n = len(index)
            drawn = batch(index, labels, inputs=images(n, visit))
            drawn.views = [drawn.inputs, images(n, visit + 50)]
            own = some_logits(n, CLASSES, seed=10 * number + visit)
            z = torch.stack([own, own + 0.7 * some_logits(n, CLASSES, seed=10 * number + visit + 500)], 1)
            z[:3] = z[:3] + 2 * hot(labels[index[:3]])[:, None]
            (found,) = step(method, drawn, [z], look)
            p1, p2 = torch.softmax(z[:, 0], 1), torch.softmax(z[:, 1], 1)
            given = torch.full((n, CLASSES), eps / (CLASSES - 1), dtype=torch.float64)
            given[torch.arange(n), labels[index]] = 1 - eps
            clean = 1 - js(p1, given) >= threshold
            soft = (
                torch.softmax(look(0, drawn.views[0], True), 1) + torch.softmax(look(0, drawn.views[1], True), 1)
            ) / 2
            agree = p1.argmax(1) == p2.argmax(1)
            kinds = [a + int(b.sum()) for a, b in zip(kinds, (clean, agree & ~clean, ~agree & ~clean), strict=True)]

            def objective(leaf: Tensor) -> Tensor:
                one, two = leaf[:, 0], leaf[:, 1]
                if number < 3:
                    losses = cross_entropy(one, given) + cross_entropy(two, given)
                    return losses[clean].mean() if clean.any() else 0 * losses.sum()
                target = given.clone()
                target[agree & ~clean] = soft[agree & ~clean]
                target[~agree & ~clean] = torch.softmax(soft[~agree & ~clean] / 10, 1)
                a, b = torch.softmax(one, 1), torch.softmax(two, 1)
                both = (a * a.log2() - a * b.log2()).sum(1) + (b * b.log2() - b * a.log2()).sum(1)
                sign = torch.where(~agree & ~clean, -1.0, 1.0)
                labelled = (cross_entropy(one, target) + cross_entropy(two, target)).mean()
                return (1 - alpha) * labelled + alpha * (both * sign).mean()

            same_step(name, found, objective, z)
    assert min(kinds) > 10


# DivideMix's kin


class Views:
    """An epoch whose batches have images of their own; notes the augmentations that it is asked for."""

    def __init__(self, labels: Tensor, number: int, rows: int = 4) -> None:
        self.labels, self.number, self.rows = labels, number, rows
        self.asked: list[str | None] = []

    def view(self, index: Tensor, policy: str | None = None) -> Tensor:
        self.asked.append(policy)
        return images(len(index), 100 * len(self.asked))

    def batch(self, index: Tensor, network: Any = None, views: int = 1, divided: bool = False) -> Any:
        drawn = [self.view(index) for _ in range(views)]
        return SimpleNamespace(
            inputs=drawn[0], labels=self.labels[index], index=index, epoch=self.number, network=network, views=drawn,
            divided=divided,
        )  # fmt: skip


def mixmatch(method: Any, one: Any, w: Tensor, look: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Guesses on the first two views, mixtures of the last two: images and targets in the order x, x2, u, u2."""
    k, n = one.network, len(one.index) // 2
    weak, strong = one.views[:2], one.views[2:]
    p = [torch.stack([torch.softmax(look(net, x), 1) for x in weak]).mean(0) for net in (k, 1 - k)]
    px = w[:, None] * hot(one.labels[:n]) + (1 - w[:, None]) * p[0][:n]
    pu = (p[0][n:] + p[1][n:]) / 2
    target_x, target_u = (t**2 / (t**2).sum(1, keepdim=True) for t in (px, pu))
    all_inputs = torch.cat([strong[0][:n], strong[1][:n], strong[0][n:], strong[1][n:]])
    all_targets = torch.cat([target_x, target_x, target_u, target_u])
    lam = float(np.random.default_rng(seed).beta(4.0, 4.0))
    lam, other = max(lam, 1 - lam), torch.randperm(4 * n, generator=torch.Generator().manual_seed(seed))
    return tuple(lam * a + (1 - lam) * a[other] for a in (all_inputs, all_targets))  # type: ignore[return-value]


def semi_loss(z: Tensor, target: Tensor, lambda_u: float) -> Tensor:
    """SemiLoss and the penalty; the first half of the rows is labelled."""
    half = len(z) // 2
    p = torch.softmax(z, 1)
    labelled = cross_entropy(z[:half], target[:half]).mean()
    guessed = ((p[half:] - target[half:]) ** 2).mean()
    prior = (1 / CLASSES * torch.log(1 / CLASSES / p.mean(0))).sum()
    return labelled + lambda_u * guessed + prior


@pytest.mark.parametrize("network", [0, 1])
def test_augdesc(network: int) -> None:
    """Two weak views guess and refine, two strong ones are learnt."""
    labels, look, name = some_labels(), look_of(6), "augdesc"
    method = begin(name, labels, warmup=2, ramp=4, lambda_u=20.0)
    method.epoch, method.progress = 3, 3.0
    method.clean[:] = torch.linspace(0.1, 0.9, 24)
    drawn = Views(labels, 3)
    for seed, index in enumerate(visits(3)):
        redraw(method, seed)
        one = method.drawn(drawn, index, network)
        assert drawn.asked[-4:] == [None, None, "auto-plain", "auto-plain"]
        (task,) = method.tasks(one, look)
        w = method.clean[1 - network][index[:4]].double()
        inputs, targets = mixmatch(method, one, w, look, seed)
        close(name, task.inputs, inputs)
        close(name, task.labels, targets)
        z = some_logits(16, CLASSES, seed=seed)
        close(name, method.loss(z, task).mean(), semi_loss(z, targets, 20.0 * (3.0 - 2) / 4))


def test_longremix() -> None:
    """In the first training samples that were clean in each of the last three epochs; the largest such set of the
    second half counts as clean in the second training, whatever the mixture says."""
    draws = np.random.default_rng(1)
    labels = torch.from_numpy(draws.integers(0, CLASSES, 200))
    wrong = torch.from_numpy(draws.random(200) < 0.3)
    method = begin("longremix", labels, epochs=9, warmup=3, confident=3)
    trainings = stages(method, no_look)

    def predictions(number: int) -> list[Tensor]:
        good = 4 * hot(torch.where(wrong, (labels + 1) % CLASSES, labels))
        return [(good + some_logits(200, CLASSES, seed=2 * number + k)).float() for k in range(2)]

    assert next(trainings).settings == {"schedule": "constant"}
    method.on_stage(labels)
    history: list[list[set[int]]] = [[], []]
    sets = []
    for number in range(9):
        redraw(method, number)
        epoch(method, number, predictions(number))
        if number < 1:
            assert method.first_division == 1
            continue
        for k in range(2):
            history[k].append(set((method.clean[k] > 0.5).nonzero().flatten().tolist()))
        if number < 3:
            continue
        for k in range(2):
            confident = set.intersection(*history[k][-3:])
            assert set(method.labelled(k).nonzero().flatten().tolist()) == confident
            if k == 0:
                sets.append(confident)
        assert 0 < len(sets[-1]) < len(history[0][-1])
    last = sets[-5:]  # half of nine epochs, rounded up
    largest = max(range(1, 6), key=lambda i: (len(last[-i]), -i))
    trusted = last[-largest]
    assert set(method.trusted.nonzero().flatten().tolist()) == trusted

    assert next(trainings).start == "scratch"
    method.on_stage(labels)
    for number in (3, 4):
        redraw(method, number)
        noise = [some_logits(200, CLASSES, seed=40 + number + k).float() for k in range(2)]
        epoch(method, number, noise)
        for k in range(2):
            assert all(float(method.clean[k, i]) == 1 for i in trusted)
            rest = [i for i in range(200) if i not in trusted]
            assert (method.clean[k][rest] < 1).any()
            assert torch.equal(method.labelled(k), method.clean[k] > 0.5)
    assert next(trainings, None) is None


def supcon(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SupConLoss with the identity as its mask, both views as anchors."""
    features = torch.stack([torch.nn.functional.normalize(x, dim=1) for x in (first, second)], 1)
    n = len(first)
    contrast = torch.cat(torch.unbind(features, 1))
    logits = contrast @ contrast.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(2 * n, dtype=logits.dtype)
    mask = torch.eye(n, dtype=logits.dtype).repeat(2, 2) * others
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("network", [0, 1])
def test_unicon(network: int) -> None:
    """Divergences of the mean prediction; as many of each class as the share below the mean allows; the losses."""
    draws, name = np.random.default_rng(2), "unicon"
    labels = torch.from_numpy(draws.choice(CLASSES, 60, p=[0.1, 0.15, 0.2, 0.25, 0.3]))
    method = begin(name, labels, warmup=1, ramp=4, facts={"features": 6})
    method.project.double()
    right = torch.from_numpy(draws.random((60, 1)) < 0.6)
    predictions = [some_logits(60, CLASSES, seed=k) + 3 * hot(labels) * right for k in range(2)]
    epoch(method, 3, predictions)
    out = (torch.softmax(predictions[0], 1) + torch.softmax(predictions[1], 1)) / 2
    y = hot(labels)
    m = (out + y) / 2

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * ((p + 1e-10) / (q + 1e-10)).log()).sum(1)

    distance = 0.5 * kl(out, m) + 0.5 * kl(y, m)
    class_len = int(float((distance < distance.mean()).sum()) / 60 * 60 / CLASSES)
    expected: set[int] = set()
    for c in range(CLASSES):
        of_class = [i for i in range(60) if labels[i] == c]
        expected |= set(sorted(of_class, key=lambda i: float(distance[i]))[:class_len])
    assert set(method.labelled(network).nonzero().flatten().tolist()) == expected
    assert 0 < len(expected) < 60
    counts = torch.bincount(labels[sorted(expected)], minlength=CLASSES)
    assert int(counts.max()) == class_len
    probability = distance.clone()
    probability[probability < 0.5] = 0
    close(name, method.clean[0], 1 - probability)
    assert 0 < int((distance >= 0.5).sum()) < 60

    look, drawn = look_of(8), Views(labels, 3)
    method.epoch, method.progress = 3, 3.0
    for seed in range(2):
        redraw(method, seed)
        index = torch.from_numpy(draws.permutation(60)[:8])
        one = method.drawn(drawn, index, network)
        (task,) = method.tasks(one, look)
        inputs, targets = mixmatch(method, one, 1 - probability[index[:4]], look, seed)
        stacked = torch.cat([inputs, one.views[2][4:], one.views[3][4:]]).unflatten(0, (6, 4)).transpose(0, 1)
        close(name, task.inputs, stacked)
        assert tuple(task.forwards) == (4, 1, 1)
        z = some_logits(24, CLASSES, seed=seed).requires_grad_()
        features = some_logits(24, 6, seed=seed + 5).requires_grad_()
        task.features = features.unflatten(0, (6, 4)).transpose(0, 1)
        leaves = [z, features, *method.project[network].parameters()]
        found = method.loss(z.unflatten(0, (6, 4)).transpose(0, 1), task).mean()
        f1, f2 = (method.project[network](features[start : start + 4]) for start in (16, 20))
        reference = semi_loss(z[:16], targets, 30.0 * (3.0 - 1) / 4) + 0.025 * supcon(f1, f2, 0.05)
        close(name, found, reference)
        for left, right in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(reference, leaves), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


class OneDimensional(torch.nn.Module):
    """train_cifar_getPrior.py oneD_CNN."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv1d(1, 16, 3, stride=1, padding=1)
        self.conv2 = torch.nn.Conv1d(16, 32, 3, stride=1, padding=1)
        self.conv3 = torch.nn.Conv1d(32, 32, 3, stride=1, padding=1)
        self.output = torch.nn.Linear(32 * epochs, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2, self.conv3):
            x = torch.relu(layer(x))
        return self.output(x.view(x.size(0), -1))


def prior_of(
    record: np.ndarray, record_easy: np.ndarray, easy: np.ndarray, intact: np.ndarray, r: float, net: Any
) -> Any:
    """The prior by a classifier of hard and noisy samples that ``net`` (length in epochs, network) gives."""
    n, order = len(record), np.argsort(record.mean(1))
    order_easy = np.argsort(record_easy.mean(1))
    train_index = order_easy[int(len(easy) * r * 0.5) : int(len(easy) * (0.5 + r * 0.5))]
    test_index = order[int(n * r * 0.5) : int(n * (0.5 + r * 0.5))]
    x, y = torch.tensor(record_easy[train_index]).float()[:, None], torch.tensor(intact[train_index]).long()
    length, network = net
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.99)
    for _ in range(length):
        for start in range(0, len(x), 256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[start : start + 256]), y[start : start + 256]).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        out = torch.softmax(network(torch.tensor(record[test_index]).float()[:, None]), 1)
    prob = np.zeros(n)
    prob[test_index] = out[:, 1]
    prob[order[int(n * (0.5 + r * 0.5)) :]] = 1
    return prob


def courses(method: Any, labels: Tensor, places: Tensor, epochs: int, seed: int) -> np.ndarray:
    """Train for some epochs on these places; what the authors record of it."""
    record = np.zeros((len(labels), epochs))
    skill = some_logits(len(labels), 1, seed=seed)
    for number in range(epochs):
        redraw(method, seed)
        epoch(method, number)
        given = method.injected
        for index in places.split(20):
            z = some_logits(len(index), CLASSES, seed=100 * seed + number + int(index[0]), scale=1.0)
            z = z + 0.4 * number * skill[index] * hot(given[index])
            (found,) = step(method, batch(index, labels), [z])
            assert found[2].network == 0
            close("pgdf", found[0], cross_entropy(z, hot(given[index])).mean())
            record[index, number] = torch.softmax(z, 1)[torch.arange(len(index)), given[index]]
    return record


def test_pgdf() -> None:
    """The courses of two trainings, easy samples, injected labels and classifiers; then weights, inverse, targets."""
    labels, rate, epochs, name = some_labels(samples=200), 0.3, 6, "pgdf"
    method = begin(name, labels, epochs=epochs, warmup=1, ramp=4, rate=rate, enhance=0.3, denoise=0.5, divide=0.7)
    trainings = stages(method, no_look)
    next(trainings)
    method.on_stage(labels)
    record = courses(method, labels, torch.arange(200), epochs, seed=1)
    close(name, method.recorded, record)

    next(trainings)
    method.on_stage(labels)
    redraw(method, 2)
    epoch(method, 0)
    easy = np.argsort(record.mean(1))[int(200 * (0.5 + rate * 0.5)) :]
    assert set(method.subset().tolist()) == set(easy.tolist())
    generator = torch.Generator().manual_seed(2)
    shuffled = torch.from_numpy(easy)[torch.randperm(len(easy), generator=generator)]
    changed = shuffled[: int(rate * len(easy))]
    noisy = labels.clone()
    noisy[changed] = torch.randint(CLASSES, changed.shape, generator=generator)
    assert torch.equal(method.injected, noisy)
    assert 5 < int((noisy != labels).sum()) <= len(changed)
    places = torch.from_numpy(np.sort(easy))
    again = courses(method, labels, places, epochs, seed=2)
    intact = (noisy == labels).numpy()[places].astype(int)

    next(trainings)
    method.on_stage(labels)
    redraw(method, 3)
    epoch(method, 0)
    seeds, priors = np.random.default_rng(3), []
    for length in (13, 14):
        with torch.random.fork_rng():
            torch.manual_seed(int(seeds.integers(2**31)))
            net = OneDimensional(epochs)
        priors.append(prior_of(record, again[places], places.numpy(), intact, rate, (length, net)))
    close(name, method.prior, np.stack(priors))
    assert not np.allclose(*priors)
    assert ((priors[0] > 0) & (priors[0] < 1)).sum() == 100

    exact, drawn = look_of(9), Views(labels, 0)

    def look(k: int, inputs: Tensor, **_: Any) -> Tensor:
        return exact(k, inputs).float()

    for number in (1, 3, 4, 5):
        predictions = [(some_logits(200, CLASSES, seed=70 + number + k) + 2 * hot(labels)).float() for k in range(2)]
        redraw(method, number)
        epoch(method, number, predictions)
        clean, inverse = [], []
        for k in range(2):
            m = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
            for i in places.tolist():
                m[labels[i]] += torch.softmax(predictions[k].double(), 1)[i]
            inverse.append((m / m.sum(1, keepdim=True)).inverse())
            clean.append(torch.from_numpy(priors[k]))
            if number > round(0.7 * epochs):  # half of it the mixture's, which is DivideMix's
                gmm = 2 * method.clean[k] - clean[k]
                assert ((gmm > -1e-5) & (gmm < 1 + 1e-5)).all()
                assert gmm[cross_entropy(predictions[k], hot(labels)).argmin()] > 0.9
                clean[k] = method.clean[k].double()
        close(name, method.clean, torch.stack(clean))
        assert torch.equal(method.labelled(0), clean[0] > 0.5)
        for network in (0, 1):
            w_all = clean[1 - network]
            chosen, rest = (w_all > 0.5).nonzero().flatten(), (w_all <= 0.5).nonzero().flatten()
            index = torch.cat([chosen[number : number + 4], rest[:4]])
            redraw(method, number)
            one = method.drawn(drawn, index, network)
            method.progress = float(number)
            (task,) = method.tasks(one, look)
            p = [
                torch.stack([torch.softmax(look(net, x).double(), 1) for x in one.views[:2]]).mean(0)
                for net in range(2)
            ]
            px, pu = p[network][:4], (p[0] + p[1])[4:] / 2
            if number > 3:
                px, pu = (torch.mm(q, inverse[network]).clamp(min=0) for q in (px, pu))
            w = w_all[index[:4], None]
            px = w * hot(labels[index[:4]]) + (1 - w) * px
            tx, tu = (q / q.sum(1, keepdim=True) for q in (px, pu))
            targets = torch.cat([tx, tx, tu, tu])
            lam = float(np.random.default_rng(number).beta(4.0, 4.0))
            other = torch.randperm(16, generator=torch.Generator().manual_seed(number))
            targets = max(lam, 1 - lam) * targets + min(lam, 1 - lam) * targets[other]
            z = some_logits(16, CLASSES, seed=number)
            w_hard = torch.cat([w, w]) ** 2 if number > 2 else 1.0
            expected = -(torch.log_softmax(z[:8], 1) * targets[:8] / w_hard).sum(1).mean()
            probs = torch.softmax(z, 1)
            expected = expected + 25.0 * (number - 1) / 4 * ((probs[8:] - targets[8:]) ** 2).mean()
            expected = expected + (1 / CLASSES * torch.log(1 / CLASSES / probs.mean(0))).sum()
            close(name, method.loss(z, task).mean(), expected)
