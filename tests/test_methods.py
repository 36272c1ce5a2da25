"""The noise-robust methods: formulas in numpy, hand-checked cases, and what a method can see."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from noisysam import fit, methods
from noisysam.core.errors import UserError
from noisysam.core.task import Task
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Batch, Epoch, Loader
from noisysam.methods import METHODS, Method, RunInfo, Stage
from noisysam.methods.base import Forward, PredictTrainingSet, StageContext
from noisysam.methods.dividemix import probability_clean, scaled, sharpen
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.problem import prepare
from noisysam.training.run import Run
from noisysam.training.trainer import Trainer

CPU = torch.device("cpu")


def make(name: str, samples: int = 12, classes: int = 3, rate: float | None = None, **options: Any) -> Any:
    """A method at the start of a stage, with seeded draws."""
    facts = RunInfo(samples=samples, classes=classes, epochs=10, device=CPU, rate=rate)
    method = methods.compose(name)(methods.options(name, options), facts)
    method.generator, method.rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
    method.on_stage(torch.arange(samples) % classes)
    return method


def logits_of(rows: int, classes: int = 3, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def no_look(k: int, inputs: Tensor) -> Tensor:
    raise AssertionError("this method needs no look")


def batch_of(rows: int, classes: int = 3, start: int = 0) -> Batch:
    index = torch.arange(start, start + rows)
    inputs = torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return Batch(inputs, index % classes, index, epoch=0)


# losses

LOGITS = st.lists(st.floats(-8, 8), min_size=3, max_size=3)


@settings(deadline=None, max_examples=60)
@given(z=LOGITS, label=st.integers(0, 2), q=st.floats(0.01, 1))
def test_gce_in_numpy(z: list[float], label: int, q: float) -> None:
    """(1 - p^q) / q, and its gradient p^q (p - e_y)."""
    logits = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    loss = make("gce", q=q).loss(logits, Task(0, logits, torch.tensor([label])))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    p = softmax(np.array([z]))[0]
    assert float(loss.detach()) == pytest.approx((1 - p[label] ** q) / q, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient[0], p[label] ** q * (p - np.eye(3)[label]), rtol=1e-7, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(z=LOGITS, label=st.integers(0, 2))
def test_gce_lies_between_cross_entropy_and_absolute_error(z: list[float], label: int) -> None:
    """q -> 0 is cross-entropy, q = 1 is 1 - p_y; it falls with q between them."""
    logits, labels = torch.tensor([z], dtype=torch.float64), torch.tensor([label])
    task = Task(0, logits, labels)
    near, half, one = (float(make("gce", q=q).loss(logits, task)) for q in (1e-7, 0.5, 1.0))
    cross_entropy = float(make("ce").loss(logits, task))
    assert near == pytest.approx(cross_entropy, rel=1e-5, abs=1e-7)
    assert one == pytest.approx(1 - float(logits.softmax(1)[0, label]), rel=1e-9, abs=1e-12)
    assert one - 1e-9 <= half <= cross_entropy + 1e-9


def test_cross_entropy_takes_distributions_and_smoothing() -> None:
    logits, labels = logits_of(5), torch.tensor([0, 1, 2, 0, 1])
    facts = RunInfo(samples=5, classes=3, epochs=1, device=CPU, label_smoothing=0.3)
    method = METHODS["ce"](methods.options("ce", {}), facts)
    target = 0.7 * np.eye(3)[labels] + 0.1
    expected = -(target * np.log(softmax(logits.numpy()))).sum(1)
    np.testing.assert_allclose(method.loss(logits, Task(0, logits, labels)), expected, rtol=1e-12)
    soft = F.one_hot(labels, 3).double()
    np.testing.assert_allclose(method.loss(logits, Task(0, logits, soft)), expected, rtol=1e-12)


# ELR


def test_elr_over_three_visits() -> None:
    """t <- beta t + (1 - beta) p, p clamped and normalised; CE + lambda log(1 - <p, t>) with that t."""
    beta, strength = 0.7, 3.0
    elr = make("elr", beta=beta, strength=strength)
    index = torch.tensor([4, 9])
    t = np.zeros((2, 3))
    for visit in range(3):
        z = logits_of(2, seed=visit).float() * 4  # far enough that the clamp matters
        task = Task(0, z, torch.tensor([0, 2]), index)
        elr.plan([task], [z])
        p = softmax(z.double().numpy())
        clamped = p.clip(1e-4, 1 - 1e-4)
        t = beta * t + (1 - beta) * clamped / clamped.sum(1, keepdims=True)
        np.testing.assert_allclose(elr.targets[index], t, rtol=1e-5)
        expected = -np.log(p[[0, 1], [0, 2]]) + strength * np.log(1 - (clamped * t).sum(1))
        np.testing.assert_allclose(elr.loss(z, task), expected, rtol=1e-4, atol=1e-5)
    others = [i for i in range(12) if i not in (4, 9)]
    assert torch.equal(elr.targets[others], torch.zeros(10, 3))


@settings(deadline=None, max_examples=30)
@given(beta=st.floats(0, 0.99), visits=st.integers(1, 6), seed=st.integers(0, 100))
def test_elr_targets_are_part_of_a_convex_mean(beta: float, visits: int, seed: int) -> None:
    """Starting from 0, after n visits the target holds 1 - beta^n of mass, within the range of the predictions."""
    elr, index, seen = make("elr", beta=beta), torch.tensor([3]), []
    for visit in range(visits):
        z = logits_of(1, seed=seed + visit).float()
        elr.plan([Task(0, z, torch.tensor([0]), index)], [z])
        seen.append(z.softmax(1)[0])
    target, mass = elr.targets[3], 1 - beta**visits
    assert float(target.sum()) == pytest.approx(mass, abs=1e-5)
    low, high = torch.stack(seen).amin(0), torch.stack(seen).amax(0)
    assert (target >= mass * low - 1e-3).all()
    assert (target <= mass * high + 1e-3).all()


def test_elr_does_not_take_in_what_is_not_finite() -> None:
    elr, index = make("elr"), torch.tensor([0, 1])
    good = logits_of(2).float()
    elr.plan([Task(0, good, index, index)], [good])
    before = elr.targets.clone()
    bad = good.clone()
    bad[1, 0] = torch.nan
    elr.plan([Task(0, bad, index, index)], [bad])
    assert torch.equal(elr.targets, before)


# mixup


def test_mixup_by_its_own_draws() -> None:
    """One Beta weight and one permutation a batch, for inputs and labels alike."""
    mixup, batch = make("mixup", alpha=0.8), batch_of(6)
    (task,) = mixup.tasks(batch, no_look)
    weight = np.random.default_rng(2).beta(0.8, 0.8)
    other = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert 0.01 < weight < 0.99
    assert other.tolist() != list(range(6))
    torch.testing.assert_close(task.inputs, weight * batch.inputs + (1 - weight) * batch.inputs[other])
    hard = np.eye(3)[batch.labels]
    np.testing.assert_allclose(task.labels, weight * hard + (1 - weight) * hard[other], rtol=1e-6)
    assert task.index is None
    logits = logits_of(6).float()
    log_p = np.log(softmax(logits.double().numpy()))
    rows = np.arange(6)
    expected = -weight * log_p[rows, batch.labels] - (1 - weight) * log_p[rows, batch.labels[other]]
    np.testing.assert_allclose(mixup.loss(logits, task), expected, rtol=1e-5)


def test_mixup_draws_anew_each_batch() -> None:
    mixup = make("mixup")
    first, second = (mixup.tasks(batch_of(6), no_look)[0].labels for _ in range(2))
    assert not torch.equal(first, second)


# co-teaching


def test_coteaching_exchanges_small_losses() -> None:
    """Four rows, half of them kept: network 0 learns from the rows that are easy for network 1, and the reverse."""
    method = make("co-teaching", forget_rate=0.5, ramp=2)
    method.epoch = 2
    labels, index = torch.zeros(4, dtype=torch.long), torch.arange(4)
    margins = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 2.0]])  # of each network: larger is easier
    logits = [torch.stack([m, torch.zeros(4), torch.zeros(4)], 1) for m in margins]
    tasks = [Task(k, torch.zeros(4, 1), labels, index) for k in range(2)]
    method.plan(tasks, logits)
    assert tasks[0].plan["weight"].tolist() == [0, 0, 2, 2]  # rows / kept = 2
    assert tasks[1].plan["weight"].tolist() == [2, 2, 0, 0]
    for k, kept in ((0, [2, 3]), (1, [0, 1])):
        mean = method.loss(logits[k], tasks[k]).mean()
        torch.testing.assert_close(mean, F.cross_entropy(logits[k][kept], labels[kept]))


@pytest.mark.parametrize(
    ("epoch", "rows", "kept"), [(0, 128, 128), (5, 128, 96), (10, 128, 64), (50, 128, 64), (10, 1, 1), (1, 9, 8)]
)
def test_coteaching_ramp(epoch: int, rows: int, kept: int) -> None:
    """From all rows to half of them over ten epochs, and never none."""
    assert make("co-teaching", forget_rate=0.5, ramp=10).keep(rows, epoch) == kept


def test_coteaching_is_oracle_only_without_a_forget_rate() -> None:
    assert methods.noise_facts("co-teaching", methods.options("co-teaching", {})) == ("rate",)
    assert methods.noise_facts("co-teaching", methods.options("co-teaching", {"forget_rate": 0.2})) == ()
    assert make("co-teaching", rate=0.25).keep(100, 10) == 75


def test_coteaching_ranks_losses_that_are_not_finite_last() -> None:
    method = make("co-teaching", forget_rate=0.5, ramp=1)
    method.epoch = 1
    bad = torch.zeros(4, 3)
    bad[0, 0] = torch.nan
    tasks = [Task(k, torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)) for k in range(2)]
    method.plan(tasks, [bad, bad])
    assert all(float(t.plan["weight"][0]) == 0 for t in tasks)


# DivideMix


def test_division_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    losses = torch.tensor(np.concatenate([rng.normal(0.5, 0.1, 300), rng.normal(3.0, 0.3, 200)])).float()
    p = probability_clean(losses, seed=0)
    assert (p[:300] > 0.95).all()
    assert (p[300:] < 0.05).all()
    moved = (probability_clean(scaled(x), seed=0) for x in (losses, 7 * losses - 3))
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("losses", [torch.full((8,), 2.0), torch.tensor([0.0, 1.0, torch.nan]), torch.tensor([1.0])])
def test_nothing_to_divide(losses: Tensor) -> None:
    assert torch.equal(probability_clean(losses, seed=0), torch.ones_like(losses))


@settings(deadline=None, max_examples=40)
@given(z=LOGITS, temperature=st.floats(0.2, 1))
def test_sharpen(z: list[float], temperature: float) -> None:
    """A softmax at logits / T: a distribution, with its order kept, and the same at T = 1."""
    p = torch.tensor([z], dtype=torch.float64).softmax(1)
    torch.testing.assert_close(sharpen(p, temperature), (p.log() / temperature).softmax(1), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(sharpen(p, 1.0), p)


def divided(rows: int = 2) -> tuple[Any, Batch]:
    """DivideMix past its warm-up, and a batch of network 1 with two labelled and two unlabelled rows in two views."""
    method = make("dividemix", warmup=3, ramp=4, lambda_u=10.0, alpha=0.7)
    method.epoch, method.progress = 5, 5.0
    method.clean[0] = torch.linspace(0.1, 0.9, 12)
    method.clean[1] = torch.linspace(0.9, 0.2, 12)
    index = torch.tensor([8, 3, 1, 10])
    views = [torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    return method, Batch(views[0], index % 3, index, 5, network=1, views=views, divided=True)


def stub_look(k: int, inputs: Tensor) -> Tensor:
    """Logits from the first pixels, another mix of them for each network."""
    z = inputs.flatten(1)[:, :3]
    return z if k == 1 else z.flip(1) * 0.5


def divided_by_hand(batch: Batch, clean: Tensor) -> tuple[Any, Any]:
    """(inputs, targets), each (2 views, 4 rows, ...), before mixing; DivideMix, Algorithm 1, lines 13 to 22."""
    probability = [np.stack([softmax(stub_look(k, v).double().numpy()) for v in batch.views]) for k in range(2)]
    w = clean[0][batch.index[:2]].double().numpy()[:, None]  # the division of the other network
    refined = w * np.eye(3)[batch.labels[:2]] + (1 - w) * probability[1].mean(0)[:2]
    guessed = (probability[0].mean(0) + probability[1].mean(0))[2:] / 2
    target = np.concatenate([refined, guessed]) ** 2  # T = 0.5
    target /= target.sum(1, keepdims=True)
    return np.stack([v.numpy() for v in batch.views]), np.stack([target, target])


def test_dividemix_targets_by_hand() -> None:
    method, batch = divided()
    (task,) = method.tasks(batch, stub_look)
    inputs, targets = divided_by_hand(batch, method.clean)
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]  # labelled rows of both views first
    inputs, targets = (np.stack([a[view, row] for view, row in order]) for a in (inputs, targets))
    weight = np.random.default_rng(2).beta(0.7, 0.7)
    weight = max(weight, 1 - weight)
    other = torch.randperm(8, generator=torch.Generator().manual_seed(1)).numpy()
    np.testing.assert_allclose(task.inputs, weight * inputs + (1 - weight) * inputs[other], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(task.labels, weight * targets + (1 - weight) * targets[other], rtol=1e-5, atol=1e-6)
    assert task.network == 1
    assert task.index is None
    assert task.plan["labelled"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_dividemix_loss_in_numpy() -> None:
    """Lx + lambda_u Lu + KL(uniform || mean p), lambda_u half-way up its ramp; the objective is the mean over rows."""
    method, batch = divided()
    (task,) = method.tasks(batch, stub_look)
    logits = logits_of(8, seed=4)
    p, target = softmax(logits.numpy()), task.labels.double().numpy()
    supervised = -(target[:4] * np.log(p[:4])).sum(1).mean()
    unsupervised = ((p[4:] - target[4:]) ** 2).mean()
    prior = (1 / 3 * np.log(1 / 3 / p.mean(0))).sum()
    expected = supervised + 10.0 * (5 - 3) / 4 * unsupervised + prior
    assert float(method.loss(logits, task).mean()) == pytest.approx(expected, rel=1e-6)


def loader_of(dataset: Dataset, rows: int, labels: Tensor | None = None) -> Loader:
    given = dataset.train_labels if labels is None else labels
    index = torch.arange(len(given))
    return Loader(dataset, index, given, rows=rows, policy="standard", device=CPU, seed=0)


def test_pools_come_from_the_other_network(tiny: Dataset) -> None:
    """Network 0 learns from what network 1 holds for clean, and the reverse; each its own epoch over that pool."""
    method = make("dividemix", samples=48, classes=4, warmup=1)
    method.epoch = 1
    chosen = [torch.arange(48) % 3 == 0, torch.arange(48) < 20]  # as clean by network 0, by network 1
    for k in range(2):
        method.clean[k] = torch.where(chosen[k], 0.9, 0.1)
    batches = list(method.batches(loader_of(tiny, 5).epoch(0, 1)))
    assert [b.network for b in batches] == [0] * (20 // 5) + [1] * (16 // 5)
    for batch in batches:
        assert batch.divided
        assert len(batch.views) == 2
        assert not torch.equal(batch.views[0], batch.views[1])
        assert batch.inputs is batch.views[0]
        clean = chosen[1 - batch.network][batch.index]
        assert clean.tolist() == [True] * 5 + [False] * 5
        assert torch.equal(batch.labels, tiny.train_labels[batch.index])
    labelled = torch.cat([b.index[:5] for b in batches if b.network == 0])
    assert sorted(labelled.tolist()) == list(range(20))


def test_dividemix_warms_up_on_cross_entropy(tiny: Dataset) -> None:
    method = make("dividemix", samples=48, classes=4, warmup=2)

    def predict(k: int, features: bool = False) -> Tensor:
        raise AssertionError("no division during warm-up")

    method.on_epoch(1, predict)
    (batch, *rest) = method.batches(loader_of(tiny, 16).epoch(0, 1))
    assert len(rest) == 2
    tasks = method.tasks(batch, no_look)
    assert [t.network for t in tasks] == [0, 1]
    logits = logits_of(16, 4)
    for task in tasks:
        torch.testing.assert_close(method.loss(logits, task), F.cross_entropy(logits, batch.labels, reduction="none"))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_dividemix_with_an_empty_pool(value: float, tiny: Dataset) -> None:
    """Nothing labelled or nothing unlabelled: each network has an epoch of cross-entropy."""
    method = make("dividemix", samples=48, classes=4, warmup=1)
    method.epoch = 1
    method.clean.fill_(value)
    batches = list(method.batches(loader_of(tiny, 16).epoch(0, 1)))
    assert [b.network for b in batches] == [0, 0, 0, 1, 1, 1]
    (task,) = method.tasks(batches[4], no_look)
    assert task.network == 1
    logits = logits_of(16, 4)
    expected = F.cross_entropy(logits, batches[4].labels, reduction="none")
    torch.testing.assert_close(method.loss(logits, task), expected)


def test_a_small_labelled_pool_is_cycled(tiny: Dataset) -> None:
    method = make("dividemix", samples=48, classes=4, warmup=1)
    method.epoch = 1
    method.clean[:] = 0.0
    method.clean[:, :3] = 1.0
    batches = list(method.batches(loader_of(tiny, 8).epoch(0, 1)))
    assert [b.network for b in batches] == [0, 1]
    for batch in batches:
        assert len(batch.index) == 16
        assert set(batch.index[:8].tolist()) == {0, 1, 2}


def test_dividemix_divides_by_the_losses_of_each_network(tiny: Dataset) -> None:
    """Each network's own division from its losses on the given labels, drawn after the warm-up only."""
    method = make("dividemix", samples=48, classes=4, warmup=1)
    labels = tiny.train_labels.clone()
    wrong = torch.arange(48) % 4 == 1
    labels[wrong] = 3
    method.on_stage(labels)
    confident = 6 * F.one_hot(tiny.train_labels, 4).float() + 0.3 * torch.randn(
        48, 4, generator=torch.Generator().manual_seed(0)
    )
    method.on_epoch(1, lambda k, features=False: confident if k == 0 else torch.zeros(48, 4))
    assert ((method.clean[0] > 0.5) == ~wrong).all()
    assert torch.equal(method.clean[1], torch.ones(48))


def test_dividemix_reports_the_sum_of_logits() -> None:
    a, b = logits_of(3), logits_of(3, seed=1)
    torch.testing.assert_close(make("dividemix").outputs([a, b]), a + b)


def test_two_networks_report_their_mean_probability() -> None:
    a, b = logits_of(3), logits_of(3, seed=1)
    reported = make("co-teaching", forget_rate=0.1).outputs([a, b])
    torch.testing.assert_close(reported.softmax(1), (a.softmax(1) + b.softmax(1)) / 2, rtol=1e-5, atol=1e-6)


# bootstrap, through the loop


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of each stage that begins: the run, the labels it is given, and the networks that stand at that moment."""
    seen: list[dict[str, Any]] = []
    epoch = Run._epoch

    def note(self: Run, number: int) -> None:
        trainer = self.trainer
        if number == 0:
            before = seen[-1]["after"] if seen else []
            labels = trainer.loader.labels.clone()
            seen.append(
                {"run": self, "labels": labels, "networks": before, "selected": seen[-1]["best"] if seen else None}
            )
        epoch(self, number)
        seen[-1] |= {"after": copy.deepcopy(trainer.reported), "best": copy.deepcopy(self.selected)}

    monkeypatch.setattr(Run, "_epoch", note)
    return seen


def predictions(run: Trainer, module: torch.nn.Module, index: Tensor) -> Tensor:
    """Classes for training images, by hand: plain inputs, normalised, evaluation mode."""
    images = run.problem.dataset.train_images.float() / 255
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2), unbiased=False)
    inputs = ((images[index] - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return module.eval()(inputs).argmax(1)


@pytest.mark.parametrize("teacher", ["last", "selected"])
def test_bootstrap_trains_on_its_own_predictions(
    teacher: str, stages: list[Any], digits: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Stage 2 starts from new weights and learns stage 1's argmax; what is measured stays against the first labels."""
    config = digits(method="bootstrap", method_option={"teacher": teacher}, train_subset=100, epochs=4, lr=0.1)
    result = fit(config, store=tmp_path)
    first, second = stages
    whole = second["run"]
    run = whole.trainer
    train = torch.from_numpy(run.problem.chosen[run.problem.train])
    noisy = run.problem.noisy.take(run.problem.train)
    assert torch.equal(first["labels"], torch.from_numpy(noisy.labels))
    (module,) = second["networks"]
    at_last = predictions(run, module, train)
    if teacher == "selected":
        assert second["selected"]["epoch"] < 3, "choose another seed: the selected epoch should not be the last"
        module.load_state_dict(second["selected"]["networks"][0])
        assert not torch.equal(predictions(run, module, train), at_last)
    assert torch.equal(second["labels"], predictions(run, module, train))
    assert not torch.equal(second["labels"], first["labels"])
    assert not same_weights(module, run.learners[0].net.module)

    final = [line for line in whole.lines if line["stage"] == 1][-1]
    held = run.problem.noisy.take(run.problem.val)
    of_val = predictions(run, run.learners[0].net.module, torch.from_numpy(run.problem.chosen[run.problem.val])).numpy()
    assert final["val_accuracy"] == pytest.approx((of_val == held.labels).mean())
    of_train = predictions(run, run.learners[0].net.module, train).numpy()
    assert final["memorised"] == pytest.approx((of_train == noisy.labels)[noisy.flipped].mean())
    assert result.last == final["test_accuracy"]
    assert len(whole.lines) == 8


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_selected_teacher_needs_a_validation_split() -> None:
    with pytest.raises(UserError, match="--val-fraction"):
        validate({"method": "bootstrap", "method_option": {"teacher": "selected"}, "val_fraction": 0.0})


# composition


def test_bootstrap_and_mixup_combine(stages: list[Any], digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Two stages of mixed rows."""
    config = digits(method="bootstrap,mixup", method_option={"alpha": 8.0, "teacher": "last"}, epochs=1)
    result = fit(config, store=tmp_path)
    assert len(stages) == 2
    assert not torch.equal(stages[0]["labels"], stages[1]["labels"])
    assert result.record["method_options"] == {"alpha": 8.0, "teacher": "last"}
    method = stages[0]["run"].trainer.method
    (task,) = method.tasks(batch_of(6), no_look)
    assert task.labels.shape == (6, 10)


def test_mixup_reaches_both_networks() -> None:
    """Both learn from the same mixed rows, so that they can choose for each other."""
    method = make("co-teaching,mixup", forget_rate=0.5)
    left, right = method.tasks(batch_of(6), no_look)
    assert (left.network, right.network) == (0, 1)
    assert torch.equal(left.inputs, right.inputs)
    assert left.plan is not right.plan


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixup,dividemix", ("mixup", "dividemix")),
        ("dividemix,mixup", ("mixup", "dividemix")),
        ("gce,elr", ("gce", "elr")),
        ("elr,mixup", ("elr", "mixup")),
        ("mixup,mixup", ("mixup", "twice")),
        ("bootstrap,mixupp", ("mixupp", "mixup")),
    ],
)
def test_methods_that_do_not_combine(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        methods.compose(name)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_wrong_option_is_named() -> None:
    with pytest.raises(UserError, match="option beta"):
        methods.options("elr", {"beta": 2.0})
    with pytest.raises(UserError, match="option q"):
        methods.options("bootstrap,mixup", {"q": 0.5})


# what a method sees


class Noting(METHODS["co-teaching"]):  # type: ignore[misc]
    """Co-teaching that keeps everything it is ever given."""

    given: list[tuple[str, Any]] = []

    def stages(self, context: StageContext) -> Iterator[Stage]:
        self.given.append(("context", context))
        yield from super().stages(context)

    def on_stage(self, labels: Tensor) -> None:
        self.given += [("labels", labels), ("facts", self.info), ("method", self)]
        super().on_stage(labels)

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        self.given.append(("predictions", predict(0)))

    def batches(self, epoch: Epoch) -> Iterator[Batch]:
        self.given.append(("epoch", epoch))
        for batch in super().batches(epoch):
            self.given.append(("batch", batch))
            yield batch

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        self.given.append(("look", forward(0, batch.inputs)))
        tasks = super().tasks(batch, forward)
        self.given.append(("tasks", tasks))
        return tasks

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        self.given.append(("logits", logits))
        super().plan(tasks, logits)


def reachable(value: Any, where: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Every tensor and array that can be reached from a value through attributes, items and fields."""
    if id(value) in seen or value is None or isinstance(value, str | int | float | bool | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor | np.ndarray):
        yield where, torch.as_tensor(value)
        return
    if isinstance(value, FunctionType | MethodType | ModuleType | torch.Generator | np.random.Generator):
        return
    parts: dict[Any, Any] = {}
    if isinstance(value, dict):
        parts = value
    elif isinstance(value, list | tuple | set):
        parts = dict(enumerate(value))
    elif dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    parts = {**parts, **getattr(value, "__dict__", {})}
    for name, part in parts.items():
        yield from reachable(part, f"{where}.{name}", seen)


def test_no_clean_label_reaches_a_method(
    digits: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a method is given, walked to the last tensor: only noisy labels, where noisy and clean differ a lot."""
    monkeypatch.setitem(METHODS._items, "noting", Noting)
    Noting.given = []
    config = digits(method="noting", noise=0.8, noise_type="symmetric-exclusive", epochs=1)
    problem = prepare(config)
    fit(config, store=tmp_path)
    methods.compose.cache_clear()
    noisy = problem.noisy.take(problem.train)
    clean = torch.from_numpy(noisy.clean)
    assert noisy.flip_rate > 0.75

    found = [item for name, value in Noting.given for item in reachable(value, name, set())]
    assert {where.partition(".")[0] for where, _ in found} >= {"labels", "epoch", "batch", "tasks", "logits"}
    whole = [t for _, t in found if t.shape == clean.shape]
    assert whole, "the walk should find at least the noisy labels"
    assert any(torch.equal(t, torch.from_numpy(noisy.labels)) for t in whole)
    for where, tensor in found:
        for candidate, rows in classes_in(tensor, len(clean)):
            agreement = float((candidate == clean[rows]).float().mean())
            assert agreement < 0.6, f"{where} knows clean labels"

    for batch in (value for name, value in Noting.given if name == "batch"):
        assert torch.equal(batch.labels, torch.from_numpy(noisy.labels)[batch.index])
    everything = torch.from_numpy(problem.dataset.train_labels.numpy())
    assert not any(t.shape == everything.shape and torch.equal(t, everything) for _, t in found)


def classes_in(tensor: Tensor, samples: int) -> Iterator[tuple[Tensor, Any]]:
    """Readings of a tensor as one class for each training sample: as it is, and by the largest of each row."""
    if tensor.ndim == 1 and len(tensor) == samples:
        yield tensor.long(), slice(None)
    if tensor.ndim == 2 and len(tensor) == samples:
        yield tensor.argmax(1), slice(None)


def test_facts_hold_only_what_is_declared(stages: list[Any], digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The rate goes to a method that declares it, and the run is oracle; no fact to any other."""
    for options, oracle in (({}, True), ({"forget_rate": 0.3}, False)):
        config = digits(method="co-teaching", method_option=options, epochs=1)
        record = fit(config, store=tmp_path).record
        facts = stages[-1]["run"].trainer.method.info
        assert (facts.rate is not None) == oracle
        assert bool(record["oracle"]) == oracle
        assert facts.matrix is None
    assert stages[0]["run"].trainer.method.info.rate == pytest.approx(
        float(stages[0]["run"].trainer.problem.noisy.take(stages[0]["run"].trainer.problem.train).flip_rate)
    )
    assert math.isfinite(stages[0]["run"].trainer.method.info.rate)


def test_every_method_says_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert issubclass(method, Method)
        assert method.source
        assert method.__doc__
        assert method.name == name


# a first stage that another run has trained


@pytest.mark.parametrize(
    ("method", "options", "first"),
    [
        ("bootstrap", {}, {"opt": "sam"}),
        ("bootstrap", {"teacher": "selected"}, {"opt": "sam"}),
        ("bootstrap,mixup", {"alpha": 8.0}, {"opt": "sam", "method": "mixup", "method_option": {"alpha": 8.0}}),
        ("nts", {}, {"opt": "sam", "eval_every": 1}),
    ],
)
def test_a_stage_that_is_a_finished_run_is_not_trained_again(
    method: str, options: dict[str, Any], first: dict[str, Any], digits: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The result is, bit for bit, that of the run that trains both; what was spent is told apart."""
    common = {"epochs": 3, "noise": 0.4, "lr": 0.1, "opt": "sam", "eval_every": 2}
    config = digits(**common, method=method, method_option=options)
    both = fit(config, store=tmp_path / "both")
    alone = fit(digits(**{**common, **first}), store=tmp_path / "shared")
    shared = fit(config, store=tmp_path / "shared")
    weights = [load_file(result.folder / "weights.safetensors") for result in (both, shared)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert shared.record["results"] == both.record["results"]
    counts = ("steps", "forward_samples", "gradient_samples", "gradient_evaluations")
    assert [shared.record["cost"][name] for name in counts] == [both.record["cost"][name] for name in counts]
    reused = shared.record["reused"]
    assert (reused["stage"], reused["key"]) == (0, alone.key)
    assert reused["spent"]["steps"] == both.record["cost"]["steps"] - alone.record["cost"]["steps"]
    assert "reused" not in both.record


def test_a_stage_of_another_machine_is_trained_again(
    digits: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from noisysam.training import reuse

    fit(digits(epochs=2, noise=0.4), store=tmp_path)
    here = reuse.environment()
    monkeypatch.setattr(reuse, "environment", lambda: {**here, "instruction_set": "another"})
    assert "reused" not in fit(digits(epochs=2, noise=0.4, method="bootstrap"), store=tmp_path).record


def test_a_method_without_options_combines_in_either_order() -> None:
    for name in ("mae,mixup", "mixup,mae", "ce,bootstrap"):
        assert methods.options(name, {}) is not None


def test_a_loss_of_another_shape_is_told(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    class Mean(Method):
        """A loss that is already averaged."""

        def loss(self, logits: Tensor, task: Task) -> Tensor:
            return self.cross_entropy(logits, task.labels).mean()

    METHODS.register("mean-of-rows", source="a test")(Mean)
    try:
        with pytest.raises(UserError, match=r"one value for each of \d+ rows, .*leave out \.mean\(\)"):
            fit(digits(method="mean-of-rows"), store=tmp_path)
    finally:
        del METHODS._items["mean-of-rows"]
