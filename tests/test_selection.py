"""Methods that select rows or gradients: hand-checked selections, formulas in numpy, and runs of an epoch or two."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noisysam import fit, methods
from noisysam.core.errors import UserError
from noisysam.core.task import Task
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Batch
from noisysam.methods import RunInfo
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.record import RunFolder

CPU = torch.device("cpu")
INF, NAN = math.inf, math.nan


def make(name: str, rate: float | None = None, epochs: int = 10, classes: int = 3, **options: Any) -> Any:
    """A method at the start of a stage, with seeded draws."""
    facts = RunInfo(samples=12, classes=classes, epochs=epochs, device=CPU, rate=rate)
    method = methods.compose(name)(methods.options(name, options), facts)
    method.generator, method.rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
    method.on_stage(torch.arange(12) % classes)
    return method


def draws(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(labels: Tensor) -> list[Task]:
    return [Task(k, torch.zeros(len(labels), 1), labels, torch.arange(len(labels))) for k in range(2)]


def cross_entropies(z: Tensor, labels: Tensor) -> np.ndarray:
    z = z.double().numpy()
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels.numpy()]


def predicting(classes: Sequence[int], losses: Sequence[float] | None = None, count: int = 3) -> Tensor:
    """Logits with these predictions; with ``losses``, in the order of the losses on label 0."""
    z = 2.0 * F.one_hot(torch.tensor(classes), count).double()
    if losses is not None:  # the wanted order of losses, without a change of any prediction
        z[:, 1:] += 0.1 * torch.tensor(losses)[:, None].double()
    return z


# decoupling

LABELS = torch.tensor([0, 0, 0, 0])


@pytest.mark.parametrize(
    ("left", "right", "floor", "expected"),
    [
        ([0, 1, 2, 0], [0, 2, 2, 1], 0.1, [0, 2, 0, 2]),
        ([0, 1, 2, 0], [0, 1, 2, 1], 0.0, [0, 0, 0, 4]),
        ([0, 1, 2, 0], [0, 1, 2, 1], 0.5, [0, 0, 0, 2]),
        ([0, 1, 2, 0], [1, 2, 0, 1], 1.0, [1, 1, 1, 1]),
        ([0, 1, 2, 0], [0, 1, 2, 0], 0.0, [0, 0, 0, 0]),
        ([0, 1, 2, 0], [0, 1, 2, 0], 0.1, [0, 0, 0, 0]),
    ],
)
def test_decoupling_weighs_disagreements(
    left: list[int], right: list[int], floor: float, expected: list[float]
) -> None:
    """rows / max(rows that differ, floor of the rows) for those that differ; nothing where none do."""
    method, tasks = make("decoupling", warmup=2, floor=floor), pair(LABELS)
    method.epoch = 2
    method.plan(tasks, [predicting(left), predicting(right)])
    assert tasks[0].plan["weight"].tolist() == expected
    assert tasks[1].plan["weight"].tolist() == expected
    z = draws(4, 3).requires_grad_()
    loss = method.loss(z, tasks[0]).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(loss.detach()) == pytest.approx((np.array(expected) * cross_entropies(z.detach(), LABELS)).mean())
    p = z.detach().softmax(1).numpy()
    np.testing.assert_allclose(gradient, np.array(expected)[:, None] * (p - np.eye(3)[LABELS]) / 4, atol=1e-12)


def test_decoupling_warms_up_on_all_rows() -> None:
    method, tasks = make("decoupling", warmup=2), pair(LABELS)
    method.epoch = 1
    method.plan(tasks, [predicting([0, 0, 0, 0])] * 2)
    assert tasks[0].plan["weight"].tolist() == [1, 1, 1, 1]


# co-teaching+


def coteaching_plus(left: Tensor, right: Tensor, labels: Tensor = LABELS, **options: Any) -> list[list[float]]:
    """The rows' weights for each network, past the warm-up and the ramp."""
    method, tasks = make("co-teaching+", **{"warmup": 3, "ramp": 1, "classes": left.shape[1], **options}), pair(labels)
    method.epoch = 3
    method.plan(tasks, [left, right])
    return [t.plan["weight"].tolist() for t in tasks]


def test_coteaching_plus_exchanges_small_losses_among_disagreements() -> None:
    """Rows 0, 1, 3, 4 differ and half of them are kept: for each network those that are easy for the other one."""
    left = predicting([1, 1, 0, 1, 1], [1, 2, 0, 3, 4])
    right = predicting([2, 2, 0, 2, 2], [3, 1, 0, 4, 2])
    labels = torch.zeros(5, dtype=torch.long)
    first, second = coteaching_plus(left, right, labels, forget_rate=0.5)
    assert first == [0, 2.5, 0, 0, 2.5]  # losses 1 and 2 of the right network
    assert second == [2.5, 2.5, 0, 0, 0]


def test_coteaching_plus_with_few_or_no_disagreements() -> None:
    left, right = predicting([0, 1, 1, 0], [0, 1, 2, 3]), predicting([0, 2, 2, 0], [0, 1, 2, 3])
    first, second = coteaching_plus(left, right, forget_rate=0.9)  # a tenth of two rows: one
    assert first == second == [0, 4, 0, 0]
    first, second = coteaching_plus(left, left, forget_rate=0.5)
    assert first == second == [0, 0, 0, 0]


def test_coteaching_plus_with_two_classes_and_rate_zero() -> None:
    """K = 2: where they differ, one of them is right; with nothing to forget every such row counts."""
    left, right = predicting([0, 1, 1, 0], count=2), predicting([1, 1, 0, 0], count=2)
    first, second = coteaching_plus(left, right, forget_rate=0.0)
    assert first == second == [2, 0, 2, 0]


def test_coteaching_plus_ranks_losses_that_are_not_finite_last() -> None:
    left, right = predicting([1, 1, 1, 0]), predicting([2, 2, 2, 0])
    right[1] = torch.tensor([NAN, NAN, 1.0])  # of these rows the argmax is the nan, class 0
    first, _ = coteaching_plus(left, right, forget_rate=0.3)  # 2 of 3
    assert first == [2, 0, 2, 0]


@pytest.mark.parametrize("epoch", [1, 5])
@pytest.mark.parametrize("rate", [0.0, 0.37, 0.5])
def test_coteaching_plus_is_coteaching_in_the_warm_up_and_where_all_rows_differ(epoch: int, rate: float) -> None:
    left = draws(9, 3)
    right = left.roll(1, 1)  # no row has the same argmax
    labels = torch.arange(9) % 3
    weights = []
    for name, options in (("co-teaching", {}), ("co-teaching+", {"warmup": 2})):
        method, tasks = make(name, forget_rate=rate, ramp=4, **options), pair(labels)
        method.epoch = epoch
        method.plan(tasks, [left, right])
        weights.append(torch.stack([t.plan["weight"].double() for t in tasks]))
    torch.testing.assert_close(*weights)
    assert rate == 0 or 0 in weights[0]


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 12), rate=st.floats(0, 0.99), seed=st.integers(0, 999))
def test_coteaching_plus_objective_is_a_mean(rows: int, rate: float, seed: int) -> None:
    """Weights sum to the number of rows, or are all zero; those that agree have none."""
    left, right = draws(rows, 3, seed=seed), draws(rows, 3, seed=seed + 1000)
    differ = left.argmax(1) != right.argmax(1)
    for weight in coteaching_plus(left, right, torch.zeros(rows, dtype=torch.long), forget_rate=rate):
        assert sum(weight) == pytest.approx(rows if differ.any() else 0, rel=1e-5)
        assert not torch.tensor(weight)[~differ].any()


# JoCoR


def joint(left: Tensor, right: Tensor, labels: Tensor, strength: float) -> Tensor:
    """The joint loss of each row (n,), by torch's own divergence."""
    p, q = left.log_softmax(1), right.log_softmax(1)
    apart = sum(F.kl_div(a, b, reduction="none", log_target=True).sum(1) for a, b in ((p, q), (q, p)))
    supervised = sum(F.cross_entropy(z, labels, reduction="none") for z in (left, right))
    return (1 - strength) * supervised + strength * apart


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("rate", "kept"), [(0.0, 8), (0.4, 4), (0.95, 1)])
def test_jocor_has_the_gradients_of_the_joint_loss(strength: float, rate: float, kept: int) -> None:
    """Small losses of the sum of both networks; each network's gradient is its part of the joint one."""
    labels, logits = torch.arange(8) % 3, [draws(8, 3).requires_grad_(), draws(8, 3, seed=1).requires_grad_()]
    method, tasks = make("jocor", strength=strength, forget_rate=rate, ramp=1), pair(labels)
    method.epoch = 1
    method.plan(tasks, [z.detach() for z in logits])
    losses = joint(*logits, labels, strength)
    chosen = losses.argsort()[:kept]
    expected = torch.autograd.grad(losses[chosen].mean(), logits)
    for task, z, gradient in zip(tasks, logits, expected, strict=True):
        assert sorted(task.plan["weight"].nonzero().flatten().tolist()) == sorted(chosen.tolist())
        (found,) = torch.autograd.grad(method.loss(z, task).mean(), z)
        torch.testing.assert_close(found, gradient)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), strength=st.floats(0, 1))
def test_jocor_loss_in_numpy(seed: int, strength: float) -> None:
    labels, logits = torch.tensor([0, 1]), [draws(2, 2, seed=seed), draws(2, 2, seed=seed + 1000)]
    method, tasks = make("jocor", strength=strength, forget_rate=0.0, classes=2), pair(labels)
    method.plan(tasks, logits)
    p, q = (np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True) for z in logits)
    apart = (p * np.log(p / q) + q * np.log(q / p)).sum(1)
    expected = (1 - strength) * -np.log(p[[0, 1], labels]) + strength * apart
    np.testing.assert_allclose(method.loss(logits[0], tasks[0]), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(  # chunks of rows have the losses of the whole
        method.loss(logits[0][1:], tasks[0].take(slice(1, 2))), expected[1:], rtol=1e-9, atol=1e-12
    )


def test_jocor_takes_distributions() -> None:
    labels, logits = torch.tensor([0, 1, 2]), [draws(3, 3), draws(3, 3, seed=1)]
    method, hard, soft = make("jocor", forget_rate=0.3, ramp=1), pair(labels), pair(F.one_hot(labels, 3).double())
    for tasks in (hard, soft):
        method.plan(tasks, logits)
    torch.testing.assert_close(method.loss(logits[0], hard[0]), method.loss(logits[0], soft[0]))


def test_published_options_of_the_selecting_methods() -> None:
    def published(name: str, *noise: Any) -> dict[str, Any]:
        return methods.compose(name).published(*noise)

    code = {"schedule": "code"}
    assert published("co-teaching", "cifar10", "pair", 0.45) == code
    assert published("jocor", "cifar10", "symmetric-exclusive", 0.8) == {**code, "strength": 0.65}
    assert published("jocor", "cifar10", "symmetric-exclusive", 0.5) == code
    assert published("jocor", "cifar10", "asymmetric", 0.4) == {**code, "forget_rate": 0.2}
    assert published("jocor", "cifar100", "asymmetric", 0.4) == {**code, "forget_rate": 0.2, "strength": 0.85}
    assert published("co-teaching+", "cifar100", "pair", 0.45) == {**code, "warmup": 5}
    assert published("mentormix", "cifar10", "symmetric", 0.8) == {"alpha": 4, "percentile": 0.2, "second": True}
    assert published("mentormix", "cifar100", "symmetric", 0.4) == {"alpha": 8, "percentile": 0.5, "second": False}
    assert published("mentormix", "cifar10", "pair", 0.4) == published("mentormix", "digits", "symmetric", 0.4) == {}
    for name in ("jocor", "co-teaching+", "mentormix"):  # they are options
        for dataset in ("cifar10", "cifar100"):
            for rate in (0.0, 0.2, 0.4, 0.6, 0.8):
                for kind in ("symmetric", "asymmetric"):
                    methods.options(name, published(name, dataset, kind, rate))


@pytest.mark.parametrize(
    ("name", "options", "headline"),
    [
        ("co-teaching", {"forget_rate": 0.3}, "mean"),
        ("co-teaching+", {"forget_rate": 0.3, "warmup": 1}, "mean"),
        ("jocor", {"forget_rate": 0.3}, "mean"),
        ("decoupling", {"warmup": 0}, "mean"),
        ("dividemix", {"warmup": 1}, "ensemble"),
        ("elr+", {}, "ensemble"),
    ],
)
def test_the_headline_is_the_authors(
    name: str, options: dict[str, Any], headline: str, digits: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Their mean where the authors report single networks, else the ensemble; the record has all of them."""
    result = fit(digits(method=name, method_option=options, epochs=3, noise=0.2), store=tmp_path)
    for line in RunFolder(tmp_path, result.key).epochs:
        mean = (line["test_accuracy_1"] + line["test_accuracy_2"]) / 2
        expected = mean if headline == "mean" else line["test_accuracy_ensemble"]
        assert line["test_accuracy"] == pytest.approx(expected, abs=1e-9)
    assert {"test_accuracy_1", "test_accuracy_2", "test_accuracy_ensemble"} <= result.record["results"].keys()
    assert result.last == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["co-teaching+", "jocor", "cdr"])
def test_oracle_only_without_a_rate(name: str) -> None:
    option = "rate" if name == "cdr" else "forget_rate"
    assert methods.noise_facts(name, methods.options(name, {})) == ("rate",)
    assert methods.noise_facts(name, methods.options(name, {option: "0.5x"})) == ("rate",)
    assert methods.noise_facts(name, methods.options(name, {option: 0.2})) == ()


# NTS


def test_nts_is_bootstrap_with_the_selected_teacher(
    digits: Callable[..., RunConfig], tiny: Dataset, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"train_subset": None, "val_fraction": 0.25, "epochs": 2, "noise": 0.25}
    nts = fit(digits(method="nts", **small), dataset=tiny, store=tmp_path)
    options = {"teacher": "selected"}
    bootstrap = fit(digits(method="bootstrap", method_option=options, **small), dataset=tiny, store=tmp_path)
    assert len(nts.record["results"]) > 0
    assert nts.record["results"] == bootstrap.record["results"]
    assert nts.key != bootstrap.key


def test_any_epoch_may_be_the_teacher(digits: Callable[..., RunConfig], tiny: Dataset, tmp_path: Path) -> None:
    small: dict[str, Any] = {"train_subset": None, "val_fraction": 0.25, "epochs": 12, "noise": 0.25}
    run = fit(digits(method="nts", eval_every=12, **small), dataset=tiny, store=tmp_path)
    lines = RunFolder(tmp_path, run.key).epochs
    measured = [(line["stage"], line["epoch"]) for line in lines if line["val_accuracy"] is not None]
    assert measured == [(0, epoch) for epoch in range(12)] + [(1, epoch) for epoch in range(2, 12)]


def test_nts_needs_a_validation_split() -> None:
    with pytest.raises(UserError, match="--val-fraction"):
        validate({"method": "nts", "val_fraction": 0.0})
    assert validate({"method": "nts"}).method == "nts"


# MentorNet


def losing(losses: Sequence[float]) -> Tensor:
    """Logits of two classes with these cross-entropies on label 0."""
    loss = torch.tensor(losses, dtype=torch.float64)
    return torch.stack([-loss, torch.log1p(-torch.exp(-loss))], 1)


def test_mentornet_when_no_row_counts() -> None:
    """From an average of 0 and without a burn-in: zero loss and zero gradient, not nan."""
    method = make("mentornet", percentile=0.0, decay=0.9, burn_in=0.0, classes=2)
    z, task = losing([1.0, 2.0, 3.0]).requires_grad_(), Task(0, torch.zeros(3, 1), torch.zeros(3).long())
    method.plan([task], [z.detach()])
    loss = method.loss(z, task).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(loss.detach()) == 0
    assert not gradient.any()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_mentornet_does_not_take_in_what_is_not_finite(bad: float) -> None:
    method, labels = make("mentornet", percentile=1.0, burn_in=0.0, classes=2), torch.zeros(3).long()
    method.plan([Task(0, torch.zeros(3, 1), labels)], [losing([1.0, 2.0, 3.0])])
    before = method.average.clone()
    z = losing([1.0, 0.5, 3.0])
    z[2] = torch.tensor([-bad, 0.0])
    task = Task(0, torch.zeros(3, 1), labels)
    method.plan([task], [z])
    assert torch.equal(method.average, before)
    assert float(before) == 1.5
    assert task.plan["weight"].tolist() == [1, 1, 0]


# MentorMix

ROWS = Batch(draws(6, 1, 2, 2).float(), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6), epoch=0)
UNMIXED = draws(6, 3, seed=5).float()


def look(k: int, inputs: Tensor) -> Tensor:
    assert k == 0
    assert torch.equal(inputs, ROWS.inputs)
    return UNMIXED


def test_mentormix_without_the_second_weighting_plans_nothing() -> None:
    method = make("mentormix", second=False)
    assert method.plan is None
    (task,) = method.tasks(ROWS, look)
    z = draws(6, 3, seed=7)
    expected = -(task.labels.double().numpy() * np.log(z.softmax(1).numpy())).sum(1)
    np.testing.assert_allclose(method.loss(z, task), expected, rtol=1e-6)


@pytest.mark.parametrize(("burn_in", "least"), [(1.0, 0.5), (0.0, 0.0)])
def test_mentormix_where_all_rows_count_or_none(burn_in: float, least: float) -> None:
    """All: each row keeps the larger part of itself. None (the average begins at 0): the smaller one."""
    method = make("mentormix", burn_in=burn_in, percentile=0.0, decay=0.99, alpha=1.0)
    (task,) = method.tasks(ROWS, look)
    rest = [i for i in range(6) if float(task.labels[i].max()) < 1]  # mixed with another class
    own = task.labels[rest, ROWS.labels[rest]]
    assert len(rest) >= 2
    assert ((own >= least) & (own <= least + 0.5)).all()
    torch.testing.assert_close(task.labels.sum(1), torch.ones(6))


# CDR


def test_cdr_keeps_the_critical_share() -> None:
    """Of all ranked weights, or of each tensor's, the largest |g w|; biases are not ranked."""
    params = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0]), torch.tensor([[10.0, 20.0]])]
    grads = [torch.tensor([[4.0, -1.0], [1.0, 0.1]]), torch.tensor([0.1, 0.2]), torch.tensor([[1.0, -1.0]])]
    # worth: 4, 2, 3, 0.4 and 10, 20
    method = make("cdr", rate=0.5, ramp=0, scale=False)
    across = method.transform_gradient(grads, params)
    assert [g.tolist() for g in across] == [[[4, 0], [0, 0]], pytest.approx([0.1, 0.2]), [[1, -1]]]
    method = make("cdr", rate=0.5, ramp=0, scale=False, within="tensor")
    inside = method.transform_gradient(grads, params)
    assert [g.tolist() for g in inside] == [[[4, 0], [1, 0]], pytest.approx([0.1, 0.2]), [[0, -1]]]
    scaled = make("cdr", rate=0.5, ramp=0).transform_gradient(grads, params)
    assert [g.tolist() for g in scaled] == [[[2, 0], [0, 0]], pytest.approx([0.1, 0.2]), [[0.5, -0.5]]]


@pytest.mark.parametrize(("ramp", "epoch", "share"), [(4, 0, 1.0), (4, 1, 0.85), (4, 4, 0.4), (4, 9, 0.4), (0, 0, 0.4)])
def test_cdr_leaves_out_more_and_more(ramp: int, epoch: int, share: float) -> None:
    method = make("cdr", rate=0.6, ramp=ramp)
    method.epoch = epoch
    params, grads = [draws(20, 5)], [draws(20, 5, seed=1)]
    (edited,) = method.transform_gradient(grads, params)
    worth = np.abs((params[0] * grads[0]).numpy()).flatten()
    kept = np.argsort(worth)[len(worth) - round(100 * share) :]
    expected = np.zeros(100)
    expected[kept] = share * grads[0].numpy().flatten()[kept]
    np.testing.assert_allclose(edited.flatten(), expected, rtol=1e-12)


@pytest.mark.parametrize("within", ["network", "tensor"])
def test_cdr_at_rate_zero_changes_nothing(within: str) -> None:
    params, grads = [draws(3, 2), draws(4), torch.zeros(2, 2).double()], [draws(3, 2, seed=1), draws(4), draws(2, 2)]
    edited = make("cdr", rate=0.0, ramp=0, within=within).transform_gradient(grads, params)
    assert all(torch.equal(a, b) for a, b in zip(edited, grads, strict=True))


def test_cdr_keeps_at_least_one_weight_and_ranks_nothing_without_matrices() -> None:
    method = make("cdr", rate=0.9, ramp=0, within="tensor", scale=False)
    (edited,) = method.transform_gradient([torch.tensor([[1.0, 3.0, 2.0]])], [torch.ones(1, 3)])
    assert edited.tolist() == [[0, 3, 0]]
    (edited,) = make("cdr", rate=0.9, ramp=0).transform_gradient([torch.ones(3)], [torch.ones(3)])
    assert edited.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_cdr_does_not_hide_what_is_not_finite(bad: float) -> None:
    grads, params = [torch.tensor([[bad, 1.0, 2.0, 3.0]])], [torch.tensor([[0.0, 1.0, 1.0, 1.0]])]
    (edited,) = make("cdr", rate=0.5, ramp=0).transform_gradient(grads, params)
    assert not torch.isfinite(edited).all()


# through the loop

AT_ONCE: dict[str, dict[str, Any]] = {
    "decoupling": {"warmup": 1},
    "co-teaching+": {"warmup": 1, "ramp": 1},
    "jocor": {"ramp": 1},
    "mentornet": {"burn_in": 0.5},
    "mentormix": {"burn_in": 0.5},
    "cdr": {"ramp": 1},
}


class Seen:
    """Watches a run's losses for what the contract forbids."""

    def __init__(self, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, cls = 0, methods.compose(method)
        loss = cls.loss

        def watched(this: Any, logits: Tensor, task: Task) -> Tensor:
            self.calls += 1
            before = {name: value.clone() for name, value in this.state_dict().items()}
            first = loss(this, logits, task)
            assert first.shape == (len(logits),)
            assert torch.equal(first, loss(this, logits, task))
            assert all(torch.equal(value, before[name]) for name, value in this.state_dict().items())
            return first

        monkeypatch.setattr(cls, "loss", watched)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("method", AT_ONCE)
def test_an_epoch_before_and_one_after_the_warm_up(
    method: str,
    classes: int,
    digits: Callable[..., RunConfig],
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step is finite and the losses are pure, with chunks of rows and perturbed weights; K = 2 too."""
    dataset = tiny
    if classes == 2:
        labels, test = tiny.train_labels % 2, tiny.test_labels % 2
        dataset = dataclasses.replace(tiny, train_labels=labels, test_labels=test, class_names=("a", "b"))
    seen = Seen(method, monkeypatch)
    config = digits(
        method=method, method_option=AT_ONCE[method], train_subset=None, val_fraction=0.0, batch=12, opt="sam", sam_m=8
    )
    result = fit(config, dataset=dataset, store=tmp_path)
    lines = RunFolder(tmp_path, result.key).epochs
    assert seen.calls > 0
    assert [line["skipped_steps"] for line in lines] == [0, 0]
    assert all(math.isfinite(line["train_loss"]) for line in lines)
    assert lines[0]["gradient_norm"] > 0


def test_interrupted_mentormix_keeps_its_averages(
    digits: Callable[..., RunConfig], tiny: Dataset, tmp_path: Path
) -> None:
    """State is in the checkpoint: a run taken up again ends like one that was not interrupted."""

    class Stop(Exception):
        pass

    class Interrupt:
        def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

        def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
            if number == 0:
                raise Stop

    config = digits(method="mentormix", method_option={"burn_in": 0.0}, train_subset=None, val_fraction=0.0)
    whole = fit(config, dataset=tiny, store=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(config, dataset=tiny, store=tmp_path / "parts", progress=Interrupt())
    assert fit(config, dataset=tiny, store=tmp_path / "parts").record["results"] == whole.record["results"]


def test_mentormix_looks_once_at_each_row(digits: Callable[..., RunConfig], tiny: Dataset, tmp_path: Path) -> None:
    """Its forward on unmixed rows is counted; the plan's is the first evaluation, where all rows have one."""
    config = digits(method="mentormix", train_subset=None, val_fraction=0.0, epochs=1)
    (line,) = RunFolder(tmp_path, fit(config, dataset=tiny, store=tmp_path).key).epochs
    assert (line["forward_samples"], line["gradient_samples"]) == (2 * 48, 48)
