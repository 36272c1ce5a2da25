"""Losses and loss correction: numpy formulas with gradients by central differences, identities, limits, choices."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from noisysam import fit, methods
from noisysam.core.errors import UserError
from noisysam.core.task import Task
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Batch, Loader
from noisysam.methods import METHODS, RunInfo, StageContext
from noisysam.methods.forward import anchors
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder

Array = NDArray[np.float64]
CPU = torch.device("cpu")
SMALL = settings(deadline=None, max_examples=40)


def make(name: str, samples: int = 8, classes: int = 3, matrix: Any = None, **options: Any) -> Any:
    """A method at the start of a stage; ``matrix`` (K, K): that of the noise, which it is told."""
    told = None if matrix is None else torch.as_tensor(matrix).float()
    facts = RunInfo(samples=samples, classes=classes, epochs=100, device=CPU, matrix=told)
    if matrix is not None:
        options["matrix"] = "true"
    method = methods.compose(name)(methods.options(name, options), facts)
    method.on_stage(torch.arange(samples) % classes)
    return method


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits_of(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy_matrix(classes: int, seed: int = 0) -> Array:
    """A row-stochastic matrix with a heavy diagonal."""
    off = np.random.default_rng(seed).uniform(0, 1, (classes, classes))
    matrix = 0.7 * np.eye(classes) + 0.3 * off / off.sum(1, keepdims=True)
    return matrix.astype(np.float32).astype(np.float64)


def no_look(k: int, inputs: Tensor) -> Tensor:
    raise AssertionError("this method needs no look")


# every loss in numpy


def entropy(p: Array) -> Array:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def gjs(z: Array, t: Array, pi: float) -> Array:
    p = softmax(z)
    mean = pi * t + (1 - pi) / 2 * (p[:, 0] + p[:, 1])
    parts = pi * entropy(t) + (1 - pi) / 2 * (entropy(p[:, 0]) + entropy(p[:, 1]))
    return (entropy(mean) - parts) / (-(1 - pi) * np.log(1 - pi))


def reverse(z: Array, t: Array, floor: float) -> Array:
    return -(softmax(z) * np.log(np.maximum(t, np.exp(floor)))).sum(1)


def cross_entropy(z: Array, t: Array) -> Array:
    return -(t * np.log(softmax(z))).sum(1)


Formula = Callable[[Array, Array], Array]  # (logits, target distributions) -> loss of each row
FORMULAS: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "gce": ("gce", {"q": 0.6}, lambda z, t: ((1 - softmax(z) ** 0.6) / 0.6 * t).sum(1)),
    "smoothing": (
        "label-smoothing",
        {"rate": 0.3},
        lambda z, t: 0.7 * cross_entropy(z, t) - 0.3 * np.log(softmax(z)).mean(1),
    ),
    "negative smoothing": (
        "label-smoothing",
        {"rate": -2.0},
        lambda z, t: 3 * cross_entropy(z, t) + 2 * np.log(softmax(z)).mean(1),
    ),
    "reed-soft": (
        "reed-soft",
        {"beta": 0.7},
        lambda z, t: -((0.7 * t + 0.3 * softmax(z)) * np.log(softmax(z))).sum(1),
    ),
    "mae": ("mae", {}, lambda z, t: np.abs(t - softmax(z)).sum(1)),
    "sce": (
        "sce",
        {"alpha": 0.4, "beta": 0.9, "A": -6.0},
        lambda z, t: 0.4 * cross_entropy(z, t) + 0.9 * reverse(z, t, -6.0),
    ),
    "nce-rce": (
        "nce-rce",
        {"alpha": 2.0, "beta": 0.5},
        lambda z, t: 2 * cross_entropy(z, t) / -np.log(softmax(z)).sum(1) + 0.5 * reverse(z, t, -4.0),
    ),
    "gjs": ("gjs", {"pi": 0.3}, lambda z, t: gjs(z, t, 0.3)),
    "forward": ("forward", {}, lambda z, t: -(t * np.log(softmax(z) @ noisy_matrix(z.shape[1]))).sum(1)),
    "backward": (
        "backward",
        {"cutoff": 0.0},
        lambda z, t: -(t @ np.linalg.inv(noisy_matrix(z.shape[1])) * np.log(softmax(z))).sum(1),
    ),
    "backward, floor": (
        "backward",
        {"cutoff": 0.0, "floor": 0.05},
        lambda z, t: -(t @ np.linalg.inv(noisy_matrix(z.shape[1])) * np.log(np.maximum(softmax(z), 0.05))).sum(1),
    ),
}


def case(name: str, classes: int) -> Any:
    method, options, _ = FORMULAS[name]
    told = {"matrix": noisy_matrix(classes)} if method in ("forward", "backward") else {}
    return make(method, classes=classes, **told, **options)


def drawn(name: str, classes: int, rows: int = 4) -> Tensor:
    return logits_of(rows, 2, classes) if name == "gjs" else logits_of(rows, classes)


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "distributions"])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula_in_numpy(name: str, classes: int, soft: bool) -> None:
    """Values and gradients, with classes and with distributions as labels."""
    method, formula = case(name, classes), FORMULAS[name][2]
    z = drawn(name, classes).requires_grad_()
    labels = logits_of(4, classes, seed=1).softmax(1) if soft else torch.tensor([0, 1, 1, classes - 1])
    target = (labels if soft else F.one_hot(labels, classes).double()).numpy()
    losses = method.loss(z, Task(0, z, labels))
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses.detach(), formula(z.detach().numpy(), target), rtol=2e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    np.testing.assert_allclose(gradient, slopes(formula, z.detach().numpy(), target), rtol=1e-5, atol=2e-6)


def slopes(formula: Formula, z: Array, target: Array) -> Array:
    """The gradient of the sum of the losses, by central differences."""
    found, step = np.zeros_like(z), 1e-5
    for place in np.ndindex(z.shape):
        left, right = z.copy(), z.copy()
        left[place], right[place] = z[place] - step, z[place] + step
        found[place] = (formula(right, target) - formula(left, target)).sum() / (2 * step)
    return found


@SMALL
@given(name=st.sampled_from(list(FORMULAS)), chosen=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_rows_stand_alone(name: str, chosen: list[int]) -> None:
    """The losses of some rows are those that they have in the whole batch."""
    method, z, rows = case(name, 3), drawn(name, 3, rows=6), torch.tensor(chosen)
    task = Task(0, z, torch.arange(6) % 3)
    torch.testing.assert_close(method.loss(z[rows], task.take(rows)), method.loss(z, task)[rows])


@pytest.mark.parametrize("name", FORMULAS)
def test_far_logits_keep_losses_and_gradients_finite(name: str) -> None:
    """A network that is wrong beyond float32's range of probabilities."""
    z = torch.zeros(2, 2, 3) if name == "gjs" else torch.zeros(2, 3)
    z[0, ..., 0], z[1, ..., 2] = 500.0, -500.0
    z.requires_grad_()
    loss = case(name, 3).loss(z, Task(0, z, torch.tensor([1, 2])))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


# identities and limits

LOGITS = st.lists(st.floats(-8, 8), min_size=3, max_size=3).map(lambda z: torch.tensor([z], dtype=torch.float64))
LABEL = st.integers(0, 2).map(lambda y: torch.tensor([y]))


def value(method: Any, z: Tensor, labels: Tensor) -> float:
    return float(method.loss(z, Task(0, z, labels)))


@SMALL
@given(z=LOGITS, label=LABEL)
def test_gce_from_cross_entropy_to_half_of_mae(z: Tensor, label: Tensor) -> None:
    """q -> 0 and q = 1."""
    assert value(make("gce", q=1e-7), z, label) == pytest.approx(value(make("ce"), z, label), rel=1e-5, abs=1e-7)
    assert 2 * value(make("gce", q=1.0), z, label) == pytest.approx(value(make("mae"), z, label), rel=1e-9, abs=1e-12)


@SMALL
@given(z=LOGITS, label=LABEL, rate=st.floats(0, 0.99))
def test_label_smoothing_is_torchs(z: Tensor, label: Tensor, rate: float) -> None:
    expected = float(F.cross_entropy(z, label, label_smoothing=rate))
    assert value(make("label-smoothing", rate=rate), z, label) == pytest.approx(expected, rel=1e-6)


@SMALL
@given(z=LOGITS, label=LABEL, rate=st.floats(-8, 0.99))
def test_label_smoothing_is_linear_in_its_rate(z: Tensor, label: Tensor, rate: float) -> None:
    """Negative rates go on where positive ones begin."""
    none, half = (value(make("label-smoothing", rate=r), z, label) for r in (0.0, 0.5))
    found = value(make("label-smoothing", rate=rate), z, label)
    assert found == pytest.approx(none + 2 * rate * (half - none), rel=1e-5, abs=1e-5)


def test_label_smoothing_after_a_warmup() -> None:
    method, z, labels = make("label-smoothing", rate=-1.0, warmup=3), logits_of(4, 3), torch.tensor([0, 1, 2, 0])
    plain = F.cross_entropy(z, labels, reduction="none")
    for epoch in range(5):
        method.epoch = epoch
        assert torch.allclose(method.loss(z, Task(0, z, labels)), plain) == (epoch < 3)


@SMALL
@given(z=LOGITS, label=LABEL, floor=st.floats(-12, -0.1))
def test_reverse_cross_entropy_is_mae(z: Tensor, label: Tensor, floor: float) -> None:
    """RCE = -A / 2 MAE, in both losses that have it."""
    expected = -floor / 2 * value(make("mae"), z, label)
    for name in ("sce", "nce-rce"):
        found = value(make(name, alpha=0.0, beta=1.0, A=floor), z, label)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


@SMALL
@given(z=LOGITS)
def test_symmetric_losses_sum_to_a_constant_over_labels(z: Tensor) -> None:
    """NCE to 1, MAE to 2 (K - 1): what makes them robust."""
    labels = [torch.tensor([k]) for k in range(3)]
    assert sum(value(make("nce-rce", beta=0.0), z, y) for y in labels) == pytest.approx(1)
    assert sum(value(make("mae"), z, y) for y in labels) == pytest.approx(4)


@SMALL
@given(z=LOGITS, label=LABEL, beta=st.floats(0, 1))
def test_reed_soft_adds_an_entropy(z: Tensor, label: Tensor, beta: float) -> None:
    expected = beta * value(make("ce"), z, label) + (1 - beta) * float(entropy(softmax(z.numpy()))[0])
    assert value(make("reed-soft", beta=beta), z, label) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_reed_soft_without_flow() -> None:
    """The same value; the gradient is cross-entropy's with the target held: p - target."""
    z, labels = logits_of(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 0])
    losses = make("reed-soft", beta=0.6, flow=False).loss(z, Task(0, z, labels))
    flowing = make("reed-soft", beta=0.6).loss(z, Task(0, z, labels))
    torch.testing.assert_close(losses, flowing)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    p = softmax(z.detach().numpy())
    np.testing.assert_allclose(gradient, p - (0.6 * np.eye(3)[labels] + 0.4 * p), rtol=1e-6, atol=1e-8)


def test_reed_hard_decides_at_the_planned_weights() -> None:
    """The predicted class is that of the plan, whatever the weights evaluated would predict."""
    method, labels, index = make("reed-hard", beta=0.8), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    planned, z = logits_of(4, 3), logits_of(4, 3, seed=5).requires_grad_()
    assert (planned.argmax(1) != z.argmax(1)).any()
    task = Task(0, z, labels, index)
    method.plan([task], [planned])
    losses = method.loss(z, task)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    target = 0.8 * np.eye(3)[labels] + 0.2 * np.eye(3)[planned.argmax(1)]
    np.testing.assert_allclose(losses.detach(), cross_entropy(z.detach().numpy(), target), rtol=1e-6)
    np.testing.assert_allclose(gradient, softmax(z.detach().numpy()) - target, rtol=1e-5, atol=1e-7)


# GJS


@SMALL
@given(z=LOGITS, label=LABEL)
def test_gjs_with_equal_views_from_cross_entropy_to_half_of_mae(z: Tensor, label: Tensor) -> None:
    views = torch.stack([z, z], 1)
    ce, mae = (value(make(name), z, label) for name in ("ce", "mae"))
    p, pi, gap = float(np.exp(-ce)), 1e-9, 1e-6
    assert value(make("gjs", pi=pi), views, label) == pytest.approx(ce, abs=1e-4 + 2 * pi / p)
    towards = mae / 2 + (1 - p + p * np.log(p)) / -np.log(gap)  # the limit is logarithmic
    assert value(make("gjs", pi=1 - gap), views, label) == pytest.approx(towards, abs=1e-4)


@SMALL
@given(left=LOGITS, right=LOGITS, label=LABEL, pi=st.floats(0.05, 0.95))
def test_gjs_is_a_divergence_to_the_mean_and_one_between_the_views(
    left: Tensor, right: Tensor, label: Tensor, pi: float
) -> None:
    """GJS(y, p1, p2) = JS(y, mean p) + (1 - pi) JS(p1, p2); the order of the views does not matter."""
    method = make("gjs", pi=pi)
    found = value(method, torch.stack([left, right], 1), label)
    mean = torch.stack([left, right]).softmax(2).mean(0).log()
    p = softmax(torch.cat([left, right]).numpy())
    between = entropy(p.mean(0)) - entropy(p).mean()
    expected = value(method, torch.stack([mean, mean], 1), label) + between / -np.log(1 - pi)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found == pytest.approx(value(method, torch.stack([right, left], 1), label), rel=1e-9)
    assert found >= -1e-9


def test_gjs_sees_each_row_twice(tiny: Dataset) -> None:
    """The first view is the crop of any other method, the second another one; they become one row's input."""
    labels = tiny.train_labels
    loader = Loader(tiny, torch.arange(48), labels, rows=16, policy="standard", device=CPU, seed=0)
    method = make("gjs", samples=48, classes=4)
    batches = list(method.batches(loader.epoch(0, 0)))
    for batch, plain in zip(batches, loader.epoch(0, 0), strict=True):
        (task,) = method.tasks(batch, no_look)
        assert task.inputs.shape == (16, 2, 1, 8, 8)
        assert torch.equal(task.inputs[:, 0], plain.inputs)
        assert not torch.equal(task.inputs[:, 0], task.inputs[:, 1])
        assert torch.equal(task.labels, labels[plain.index])
        assert torch.equal(task.index, plain.index)


# truncated GCE


def chosen_by(method: Any, logits: Tensor, epoch: int) -> list[bool]:
    method.on_epoch(epoch, lambda k: logits)
    return method.kept.tolist()


def sure_of(*probabilities: float) -> Tensor:
    """Logits (n, 2) with these probabilities of class 0."""
    p = torch.tensor(probabilities)
    return torch.stack([p.log(), (1 - p).log()], 1)


def test_truncated_gce_chooses_every_few_epochs() -> None:
    """Labels 0 1 0 1; those with p_y of at least k are kept, from the fourth epoch on and every second one."""
    method = make("gce-truncated", samples=4, classes=2, k=0.5, start=4, every=2)
    logits = sure_of(0.6, 0.6, 0.4, 0.4)
    for epoch in range(3):
        assert chosen_by(method, logits, epoch) == [True] * 4
    assert chosen_by(method, logits, 3) == [True, False, False, True]
    assert chosen_by(method, logits.flip(1), 4) == [True, False, False, True]
    assert chosen_by(method, logits.flip(1), 5) == [False, True, True, False]
    assert chosen_by(method, sure_of(0.3, 0.7, 0.3, 0.7), 7) == [False, True, True, False]  # nothing: the last choice
    assert chosen_by(method, torch.full((4, 2), torch.nan), 9) == [False, True, True, False]
    half = torch.full((4, 2), torch.nan)
    half[0] = logits[0]
    assert chosen_by(method, half, 11) == [True, False, False, False]
    method.on_stage(torch.tensor([0, 1, 0, 1]))
    assert method.kept.all()


def test_truncated_gce_in_numpy() -> None:
    """w (L_q - L_q(k)) and its gradient, w p^q (p - e_y); a row's weight goes by its place in the training set."""
    method = make("gce-truncated", q=0.7, k=0.4)
    method.kept[:] = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1])
    index, labels, z = torch.tensor([3, 0, 5, 6]), torch.tensor([0, 1, 2, 1]), logits_of(4, 3).requires_grad_()
    (task,) = method.tasks(Batch(torch.zeros(4, 1, 2, 2), labels, index, 0), no_look)
    losses = method.loss(z, task)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    kept, p, one = np.array([0.0, 1, 0, 1]), softmax(z.detach().numpy()), np.eye(3)[labels]
    own = (p * one).sum(1)
    np.testing.assert_allclose(losses.detach(), kept * ((1 - own**0.7) - (1 - 0.4**0.7)) / 0.7, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient, (kept * own**0.7)[:, None] * (p - one), rtol=1e-6, atol=1e-12)


@SMALL
@given(z=LOGITS, label=LABEL, k=st.floats(0.05, 0.95))
def test_truncated_gce_keeps_what_lowers_the_loss(z: Tensor, label: Tensor, k: float) -> None:
    """The choice minimises w (L_q - L_q(k)), so it is the truncated loss but for a constant."""
    method = make("gce-truncated", samples=2, k=k, start=1)
    method.labels = torch.cat([label, label])
    sure = 50 * F.one_hot(label, 3).double()  # so that something is kept
    method.on_epoch(0, lambda _: torch.cat([z, sure]))
    lq = value(make("gce"), z, label)
    task = Task(0, z, label, torch.tensor([0]), {"kept": method.kept[:1]})
    assert float(method.loss(z, task)) + method.bound() == pytest.approx(min(lq, method.bound()), rel=1e-6)


# correction by the transition matrix


@SMALL
@given(z=LOGITS, label=LABEL)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_correction_of_no_noise_is_cross_entropy(name: str, z: Tensor, label: Tensor) -> None:
    """As in the first of two trainings: value and gradient."""
    z = z.requires_grad_()
    losses = [make(name).loss(z, Task(0, z, label)), F.cross_entropy(z, label, reduction="none")]
    corrected, plain = (torch.autograd.grad(loss.sum(), z)[0] for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(corrected, plain, rtol=1e-9, atol=1e-9)


@SMALL
@given(z=LOGITS, label=st.integers(0, 2), seed=st.integers(0, 1000))
def test_backward_is_unbiased(z: Tensor, label: int, seed: int) -> None:
    """Its mean over the noisy labels of a class is the cross-entropy with that class; so is its gradient."""
    matrix, z = noisy_matrix(3, seed), z.requires_grad_()
    method = make("backward", matrix=matrix)
    each = method.loss(z.expand(3, 3), Task(0, z, torch.arange(3)))
    mean, plain = (torch.tensor(matrix[label]) * each).sum(), F.cross_entropy(z, torch.tensor([label]))
    torch.testing.assert_close(mean, plain, rtol=1e-5, atol=1e-5)
    slopes = (torch.autograd.grad(loss, z)[0] for loss in (mean, plain))
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5)


@SMALL
@given(z=LOGITS, seed=st.integers(0, 1000))
def test_forward_is_least_at_the_clean_posterior(z: Tensor, seed: int) -> None:
    """Labels drawn through T from a distribution p: no prediction is better than p."""
    matrix = noisy_matrix(3, seed)
    method, other = make("forward", matrix=matrix), logits_of(1, 3, seed=seed)
    noisy = z.softmax(1) @ torch.tensor(matrix)
    assert value(method, z, noisy) <= value(method, other, noisy) + 1e-9


def test_anchors_by_hand() -> None:
    """Row i is the prediction at the sample where class i is most probable, or at a quantile of that."""
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]])
    torch.testing.assert_close(anchors(p.log(), 1.0), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    torch.testing.assert_close(anchors(p.log(), 0.97), torch.tensor([[0.7, 0.3], [0.4, 0.6]]))
    torch.testing.assert_close(anchors(p.log(), 0.5), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(anchors(p[:1].log(), 0.97), torch.tensor([[0.9, 0.1], [0.9, 0.1]]))


@SMALL
@given(seed=st.integers(0, 1000))
def test_anchors_find_the_matrix(seed: int) -> None:
    """Exactly so, where the predictions are the noisy posteriors and every class has a pure sample."""
    matrix = torch.tensor(noisy_matrix(4, seed))
    clean = torch.cat([torch.eye(4, dtype=torch.float64), logits_of(50, 4, seed=seed).softmax(1)])
    torch.testing.assert_close(anchors((clean @ matrix).log(), 1.0), matrix)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_two_trainings_with_estimated_matrix(name: str) -> None:
    """The first with T = I, the second with the estimate of the chosen epoch; both from scratch on the noisy labels."""
    asked: list[str] = []
    logits = logits_of(40, 3).float()

    def predict(which: str) -> Tensor:
        asked.append(which)
        return logits

    method = make(name, samples=40, teacher="selected", quantile=1.0)
    stages = []
    for stage in method.stages(StageContext(predict)):
        method.on_stage(torch.arange(40) % 3)
        stages.append((stage.labels, method.subset(), stage.start, method.transition.clone()))
    assert asked == ["selected"]
    assert [s[:3] for s in stages] == [(None, None, "scratch")] * 2
    assert torch.equal(stages[0][3], torch.eye(3))
    torch.testing.assert_close(stages[1][3], anchors(logits, 1.0))
    again = make(name)
    again.load_state_dict(method.state_dict())  # a resumed run
    z, labels = logits_of(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(again.loss(z, Task(0, z, labels)), method.loss(z, Task(0, z, labels)))
    again.on_stage(labels)
    assert torch.equal(again.transition, torch.eye(3)), (
        "the checkpoint was written into what the next stage begins with"
    )


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_true_matrix_is_told_and_makes_the_run_oracle(name: str) -> None:
    assert methods.noise_facts(name, methods.options(name, {"matrix": "true"})) == ("matrix",)
    assert methods.noise_facts(name, methods.options(name, {})) == ()
    method = make(name, matrix=noisy_matrix(3))

    def refuse(which: str) -> Tensor:
        raise AssertionError("nothing is to be estimated")

    assert len(list(method.stages(StageContext(refuse)))) == 1
    np.testing.assert_allclose(method.transition, noisy_matrix(3))


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3])
def test_backward_with_labels_that_tell_two_classes_apart_no_more(gap: float) -> None:
    """T is singular, or nearly: weights stay bounded, and classes 0 and 1 share theirs; class 2 is still corrected."""
    matrix = np.array([[0.4 + gap, 0.4 - gap, 0.2], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]])
    method = make("backward", matrix=matrix)
    assert method.inverse.abs().max() < 10
    torch.testing.assert_close(method.inverse[:, 0], method.inverse[:, 1], rtol=0.02, atol=0.02)
    z = logits_of(1, 3)
    each = method.loss(z.expand(3, 3), Task(0, z, torch.arange(3)))
    mean = (torch.tensor(matrix) * each).sum(1)
    plain = -z.log_softmax(1)[0]
    expected = torch.stack([plain[:2].mean(), plain[:2].mean(), plain[2]])
    torch.testing.assert_close(mean, expected, rtol=0.02, atol=0.02)
    assert make("backward", matrix=np.full((3, 3), 1 / 3)).inverse.isfinite().all()  # labels tell nothing


def test_plain_inverse_on_demand() -> None:
    matrix = np.array([[0.504, 0.496], [0.496, 0.504]])
    np.testing.assert_allclose(
        make("backward", classes=2, matrix=matrix, cutoff=0.0).inverse, np.linalg.inv(matrix), 1e-4
    )
    assert make("backward", classes=2, matrix=matrix).inverse.abs().max() < 1


def test_forward_with_a_label_that_the_matrix_rules_out() -> None:
    """A large loss, not an infinite one, and no harm to the other labels."""
    method = make("forward", matrix=np.array([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]]))
    z = logits_of(3, 3).requires_grad_()
    loss = method.loss(z, Task(0, z, torch.tensor([0, 1, 2])))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    p = z.detach().softmax(1)
    torch.testing.assert_close(loss[:2].detach(), -torch.stack([p[0, 0] + p[0, 2], p[1, 1]]).log())


# through the real loop


def test_gjs_trains(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Twice the rows through the network, one step a batch; chunks of rows keep their views together."""
    for rule, passes in (({"opt": "sgd"}, 1), ({"opt": "sam", "sam_m": 8}, 2)):
        folder = fit(digits(method="gjs", epochs=1, **rule), store=tmp_path).folder
        (line,) = RunFolder(folder.parent, folder.name).epochs
        assert (line["steps"], line["skipped_steps"]) == (3, 0)
        assert line["forward_samples"] == line["gradient_samples"] == 2 * 48 * passes


def test_forward_and_truncated_gce_train(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name, options in (("forward", {}), ("gce-truncated", {"start": 2, "every": 1, "k": 0.05})):
        record = fit(digits(method=name, method_option=options), store=tmp_path).record
        assert record["status"] == "finished"
        assert not record["oracle"]


# what the authors chose, and what is refused


@pytest.mark.parametrize(
    ("name", "dataset", "noise_type", "noise", "options"),
    [
        ("gjs", "cifar10", "symmetric", 0.4, {"pi": 0.9}),
        ("gjs", "cifar100", "asymmetric", 0.2, {"pi": 0.5}),
        ("gjs", "cifar10", "symmetric", 0.3, {}),
        ("gjs", "digits", "symmetric", 0.4, {}),
        ("sce", "cifar100", "symmetric", 0.4, {"A": math.log(1e-4), "alpha": 6.0, "beta": 0.1}),
        ("nce-rce", "cifar100", "symmetric", 0.4, {"A": math.log(1e-4), "alpha": 10.0, "beta": 0.1}),
        ("nce-rce", "cifar10", "symmetric", 0.4, {"A": math.log(1e-4)}),
        ("gce-truncated", "cifar100", "symmetric", 0.4, {"start": 80}),
        ("backward", "cifar100", "pair", 0.4, {"quantile": 1.0}),
    ],
)
def test_published(name: str, dataset: str, noise_type: str, noise: float, options: dict[str, Any]) -> None:
    assert METHODS[name].published(dataset, noise_type, noise) == options
    methods.options(name, options)


@pytest.mark.parametrize(
    ("name", "option", "given"),
    [
        ("label-smoothing", "rate", 1.0),
        ("label-smoothing", "rate", float("nan")),
        ("reed-soft", "beta", 1.1),
        ("sce", "A", 0.0),
        ("gjs", "pi", 1.0),
        ("gce-truncated", "every", 0),
        ("forward", "matrix", "guess"),
        ("backward", "cutoff", 1.0),
    ],
)
def test_wrong_options_are_named(name: str, option: str, given: Any) -> None:
    with pytest.raises(UserError, match=f"option {option}"):
        methods.options(name, {option: given})


@pytest.mark.parametrize("name", ["bootstrap,forward", "backward,bootstrap", "gce-truncated,mixup", "gjs,mixup"])
def test_what_does_not_combine(name: str) -> None:
    with pytest.raises(UserError, match="do not combine"):
        methods.compose(name)


def test_soft_labels_of_mixed_rows() -> None:
    """Losses with a meaning for distributions combine with mixup."""
    for name in ("reed-hard,mixup", "forward,mixup", "label-smoothing,mixup"):
        method = make(name)
        z, labels = logits_of(4, 3), logits_of(4, 3, seed=2).softmax(1)
        task = Task(0, z, labels)
        if method.plan is not None:
            method.plan([task], [z])
        assert method.loss(z, task).shape == (4,)
