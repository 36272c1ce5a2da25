"""Methods that correct labels or choose samples: mixtures, targets, schedules, choices; alone and through the loop."""

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
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from noisysam import fit, methods
from noisysam.core.task import Task
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Batch, Loader
from noisysam.methods import RunInfo, incv, m_dyr_h, o2u, selc
from noisysam.methods.base import StageContext
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import prepare
from noisysam.runs.record import RunFolder
from noisysam.training.run import Run

CPU = torch.device("cpu")
NAMES = {"m-dyr-h": m_dyr_h.DynamicBootstrap, "selc": selc.SELC, "o2u": o2u.O2U, "incv": incv.INCV}
Configure = Callable[..., RunConfig]


def make(name: str, samples: int = 12, classes: int = 3, epochs: int = 10, rate: float | None = None, **o: Any) -> Any:
    """A method at the start of a run, with seeded draws."""
    facts = RunInfo(samples=samples, classes=classes, epochs=epochs, device=CPU, rate=rate)
    method = methods.compose(name)(methods.options(name, o), facts)
    method.generator, method.rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
    return method


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def no_look(k: int, inputs: Tensor) -> Tensor:
    raise AssertionError("this method needs no look now")


def test_names() -> None:
    for name, cls in NAMES.items():
        assert methods.compose(name) is cls


# the Beta mixture


def drawn(n: int = 6000) -> tuple[Tensor, np.ndarray]:
    """Samples of 0.7 Beta(2, 12) + 0.3 Beta(8, 3), and which of them are from the second."""
    rng = np.random.default_rng(0)
    second = rng.random(n) < 0.3
    x = np.where(second, rng.beta(8, 3, n), rng.beta(2, 12, n)).clip(1e-3, 1 - 1e-3)
    return torch.from_numpy(x), second


def test_em_in_scipy() -> None:
    """Ten steps from the published start: densities by scipy, moments by numpy's weighted averages."""
    x = drawn(400)[0].numpy()
    a, b, w = np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([0.5, 0.5])
    for _ in range(10):
        joint = np.stack([w[k] * stats.beta.pdf(x, a[k], b[k]) for k in range(2)])
        r = joint / joint.sum(0)
        for k in range(2):
            mean = np.average(x, weights=r[k])
            variance = np.average((x - mean) ** 2, weights=r[k])
            a[k] = mean * (mean * (1 - mean) / variance - 1)
            b[k] = a[k] * (1 - mean) / mean
        w = r.sum(1) / len(x)
    found = m_dyr_h.fit_beta_mixture(torch.from_numpy(x))
    for value, expected in zip(found, (w, a, b), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-8)
    joint = np.stack([w[k] * stats.beta.pdf(x, a[k], b[k]) for k in range(2)])
    np.testing.assert_allclose(m_dyr_h.posterior(torch.from_numpy(x), *found).T, joint / joint.sum(0), rtol=1e-6)


def test_em_finds_the_mixture_that_was_drawn() -> None:
    x, second = drawn()
    weight, alpha, beta = m_dyr_h.fit_beta_mixture(x, steps=50)
    np.testing.assert_allclose(weight, [0.7, 0.3], atol=0.02)
    np.testing.assert_allclose(alpha, [2, 8], rtol=0.15)
    np.testing.assert_allclose(beta, [12, 3], rtol=0.15)

    def likelihood(w: Any, a: Any, b: Any) -> float:
        return float(
            np.log(sum(float(w[k]) * stats.beta.pdf(x.numpy(), float(a[k]), float(b[k])) for k in range(2))).mean()
        )

    assert likelihood(weight, alpha, beta) > likelihood([0.7, 0.3], [2, 8], [12, 3]) - 1e-3
    assert ((m_dyr_h.posterior(x, weight, alpha, beta)[:, 1] > 0.5).numpy() == second).mean() > 0.97


def test_losses_of_wrong_labels_are_found() -> None:
    """Whatever their scale; what lies beyond the 5th and 95th percentile is clipped, not lost."""
    x, second = drawn(2000)
    losses = (5 * x).float()
    losses[:3], second[:3] = 40.0, True  # outliers
    p = m_dyr_h.probability_noisy(losses)
    assert p.shape == losses.shape
    assert p.dtype == losses.dtype
    assert ((p > 0.5).numpy() == second).mean() > 0.97
    assert (p[:3] == p.max()).all()
    torch.testing.assert_close(m_dyr_h.probability_noisy(3 * losses + 2), p, rtol=1e-3, atol=1e-3)


def test_the_largest_losses_are_never_won_back() -> None:
    """A wide clean component has the heavier tail at 1: its posterior there alone would call those samples clean."""
    rng = np.random.default_rng(1)
    losses = torch.from_numpy(np.concatenate([rng.random(600), rng.normal(0.7, 0.03, 400).clip(0, 1)]))
    low, high = np.percentile(losses, [5, 95])
    scaled = ((losses - low) / (high - low)).clamp(1e-3, 1 - 1e-3)
    inner = scaled[(losses >= low) & (losses <= high)]
    weight, alpha, beta = m_dyr_h.fit_beta_mixture(inner)
    means = alpha / (alpha + beta)
    plain = m_dyr_h.posterior(scaled, weight, alpha, beta)[:, int(means.argmax())]
    assert plain[losses.argmax()] < plain.max() - 0.2, "choose other draws: the tail is not won back"
    p = m_dyr_h.probability_noisy(losses)
    above = scaled >= means.max()
    rising = p[above][scaled[above].argsort()]
    assert (rising.diff() >= 0).all()
    assert rising[-1] == plain[above].max()
    torch.testing.assert_close(p[~above], plain[~above])


@pytest.mark.parametrize(
    "losses",
    [
        torch.full((8,), 2.0),
        torch.tensor([0.0, 1.0, torch.nan]),
        torch.tensor([0.0, 1.0, torch.inf]),
        torch.tensor([1.0]),
        torch.tensor([0.0] * 98 + [9.0, 9.0]),  # the same from the 5th to the 95th percentile
    ],
)
def test_losses_that_cannot_be_divided_are_clean(losses: Tensor) -> None:
    assert torch.equal(m_dyr_h.probability_noisy(losses), torch.zeros_like(losses))


def test_components_without_width() -> None:
    """Clean samples fitted to the full, as late in a training: still divided."""
    losses = torch.tensor([0.0, 3.0, 0.0] * 20)
    torch.testing.assert_close(m_dyr_h.probability_noisy(losses), (losses > 1).float())


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.floats(0, 20, width=32), min_size=3, max_size=40), seed=st.integers(0, 9))
def test_probabilities_go_with_their_samples(values: list[float], seed: int) -> None:
    """In [0, 1], equal for equal losses, and in whatever order the samples come."""
    losses = torch.tensor(values)
    p = m_dyr_h.probability_noisy(losses)
    assert ((p >= 0) & (p <= 1)).all()
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(m_dyr_h.probability_noisy(losses[order]), p[order], rtol=1e-3, atol=1e-4)


# M-DYR-H


def a_batch(rows: int = 6) -> Batch:
    index = torch.arange(rows) + 2
    return Batch(normal(rows, 1, 4, 4, seed=3).float(), index % 3, index, epoch=0)


def look(k: int, inputs: Tensor) -> Tensor:
    return inputs.flatten(1)[:, :3]


def test_m_dyr_h_begins_as_mixup() -> None:
    """Plain mixup of weight Beta(32, 32) for 35 % of the epochs: no look, no fit, no penalty."""
    method, mixup, batch = make("m-dyr-h", epochs=20), make("mixup", alpha=32.0), a_batch()
    method.on_stage(batch.labels)

    def predict(k: int, features: bool = False) -> Tensor:
        raise AssertionError("no fit during the warm-up")

    method.epoch = 6
    method.on_epoch(6, predict)
    (task,), (expected,) = method.tasks(batch, no_look), mixup.tasks(batch, no_look)
    assert torch.equal(task.inputs, expected.inputs)
    assert torch.equal(task.labels, expected.labels)
    logits = normal(6, 3)
    method.plan([task], [logits])
    torch.testing.assert_close(method.loss(logits, task), mixup.loss(logits, expected))
    method.epoch = 7
    assert method.begun


def test_m_dyr_h_fits_each_epoch_on_the_given_labels() -> None:
    """Wrong labels of a confident network get the weight; the stage's labels count."""
    method, truth = make("m-dyr-h", samples=240, warmup=0.0), torch.arange(240) % 3
    labels = torch.where(torch.arange(240) % 5 == 0, (truth + 1) % 3, truth)
    method.on_stage(labels)
    assert torch.equal(method.noisy, torch.zeros(240))
    logits = 5 * F.one_hot(truth, 3) + normal(240, 3, scale=0.5)
    method.on_epoch(0, lambda k, features=False: logits.float())
    assert torch.equal(method.noisy > 0.5, labels != truth)
    method.on_epoch(1, lambda k, features=False: torch.full((240, 3), torch.nan))
    assert torch.equal(method.noisy, torch.zeros(240))


def bootstrapped() -> tuple[Any, Batch, Task]:
    method, batch = make("m-dyr-h", warmup=0.5), a_batch()
    method.on_stage(torch.arange(12) % 3)
    method.epoch = 5
    method.noisy.copy_(torch.linspace(0, 1, 12))
    (task,) = method.tasks(batch, look)
    return method, batch, task


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), penalty=st.floats(0, 3))
def test_m_dyr_h_rows_are_apart(seed: int, penalty: float) -> None:
    """At any weights: a part of the rows has the losses that it has in the whole; the tangent lies below the KL."""
    method, _, task = bootstrapped()
    method.options = method.options.model_copy(update={"penalty": penalty})
    at_w, moved = normal(6, 3, seed=seed), normal(6, 3, seed=seed + 1)
    method.plan([task], [at_w])
    whole = method.loss(moved, task)
    torch.testing.assert_close(method.loss(moved[2:5], task.take(slice(2, 5))), whole[2:5])
    cross_entropy = -(task.labels * moved.log_softmax(1)).sum(1).mean()
    kl = -math.log(3) - moved.softmax(1).mean(0).log().mean()
    assert float(whole.mean() - cross_entropy) <= penalty * float(kl) + 1e-9


# SELC


@settings(deadline=None, max_examples=30)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_selc_targets_stay_distributions(alpha: float, seed: int) -> None:
    method, index = make("selc", alpha=alpha, start=0.0), torch.arange(12)
    method.on_stage(index % 3)
    for visit in range(4):
        z = normal(12, 3, seed=seed + visit).float()
        method.plan([Task(0, z, index % 3, index)], [z])
    torch.testing.assert_close(method.targets.sum(1), torch.ones(12))
    assert (method.targets >= 0).all()


def test_selc_does_not_take_in_what_is_not_finite() -> None:
    method, index = make("selc", start=0.0), torch.tensor([0, 1])
    method.on_stage(torch.arange(12) % 3)
    before = method.targets.clone()
    bad = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 0.0, 0.0]])
    method.plan([Task(0, bad, index, index)], [bad])
    assert torch.equal(method.targets, before)


def test_selc_starts_a_stage_from_its_labels() -> None:
    """Also where those are distributions, of which it keeps a copy of its own."""
    method, soft = make("selc", start=0.0), normal(12, 3).softmax(1).float()
    method.on_stage(soft)
    z, index = torch.zeros(12, 3), torch.arange(12)
    given_labels = soft.clone()
    method.plan([Task(0, z, soft, index)], [z])
    torch.testing.assert_close(method.targets, 0.9 * given_labels + 0.1 / 3)
    assert torch.equal(soft, given_labels)


def test_published_options() -> None:
    """Of 200 epochs: 30 on CIFAR-10 with 40 %, 20 on CIFAR-100; nothing for what the authors did not try."""
    published = methods.compose("selc").published
    assert published("cifar10", "symmetric", 0.4) == {"start": 0.15}
    assert published("cifar100", "asymmetric", 0.4) == {"start": 0.1}
    assert published("cifar10", "symmetric", 0.5) == {}
    assert published("digits", "symmetric", 0.4) == {}
    assert methods.compose("incv").published("cifar10", "asymmetric", 0.4) == {"remove": 0.0}
    assert methods.compose("incv").published("cifar10", "symmetric", 0.4) == {}


# O2U-Net


def plans(method: Any) -> list[Any]:
    """The stages of a method whose networks predict nothing of interest."""
    return list(method.stages(StageContext(lambda which: torch.zeros(method.info.samples, method.info.classes))))


def test_o2u_schedule() -> None:
    """Three falling rates, then cycles that continue from the weights, then from scratch as the run was configured."""
    *first, a, b, c, d, e, f, last = plans(
        make("o2u", epochs=40, period=5, pretrain=0.5, cyclical=0.75, remove=0.4, lr=0.02)
    )
    assert [stage.start for stage in first] == ["scratch", "continue", "continue"]
    assert [(s.settings["lr"], s.settings["epochs"]) for s in first] == [(0.02, 5), (0.01, 5), (0.002, 10)]
    assert all(stage.settings["schedule"] == "constant" for stage in first)
    for cycle in (a, b, c, d, e, f):
        assert cycle.start == "continue"
        assert cycle.settings == {"schedule": "cosine", "warmup": 0.0, "lr": 0.02, "epochs": 5}
    assert (last.start, last.settings) == ("scratch", {})


@pytest.mark.parametrize(("remove", "kept"), [(0.0, 12), (0.25, 9), (0.99, 1)])
def test_o2u_keeps_at_least_one(remove: float, kept: int) -> None:
    method = make("o2u", remove=remove)
    method.on_stage(torch.arange(12) % 3)
    method.score.copy_(torch.arange(12.0).flip(0))
    assert method.kept().tolist() == list(range(12 - kept, 12))


def test_o2u_is_blind_with_a_rate() -> None:
    """None and multiples of the run's own rate are an oracle's."""
    for option, facts in ((None, ("rate",)), ("0.5x", ("rate",)), (0.2, ())):
        assert methods.noise_facts("o2u", methods.options("o2u", {"remove": option})) == facts
    method = make("o2u", rate=0.5, remove="0.5x")
    method.on_stage(torch.arange(12) % 3)
    assert len(method.kept()) == 9


# INCV


@pytest.mark.parametrize(("noise", "classes"), [(0.0, 10), (0.2, 10), (0.5, 10), (0.4, 2), (0.7, 100)])
def test_noise_from_agreement(noise: float, classes: int) -> None:
    agreement = (1 - noise) ** 2 + noise**2 / (classes - 1)
    assert incv.estimated_noise(agreement, classes) == pytest.approx(noise, abs=1e-6)


def test_noise_from_an_agreement_below_chance() -> None:
    assert incv.estimated_noise(0.05, 10) == pytest.approx(0.9)


def confident(classes: Tensor) -> Tensor:
    """Logits that predict these classes, each sample with a confidence of its own."""
    return F.one_hot(classes, 3) * (1 + torch.arange(len(classes))[:, None] / 10)


def test_a_division_by_hand() -> None:
    """Two iterations over twelve samples: what each training learns from, by sets."""
    labels, everything = torch.arange(12) % 3, set(range(12))
    predicted = torch.where(torch.arange(12) % 4 == 0, (labels + 1) % 3, labels)  # samples 0, 4, 8 are judged wrong
    wrong = {0, 4, 8}

    def after(trainings: int, remove: float | None) -> set[int]:
        found = incv.divide(labels, [confident(predicted)] * trainings, 2, remove).tolist()
        assert found == sorted(set(found))
        return set(found)

    first, second = after(0, 0.0), after(1, 0.0)
    assert len(first) == len(second) == 6
    assert first | second == everything
    selected = everything - wrong
    third, fourth = after(2, 0.0), after(3, 0.0)  # the candidates left are the three wrong ones
    assert sorted([len(third - selected), len(fourth - selected)]) == [1, 2]
    assert third & fourth == selected
    assert third | fourth == everything
    assert after(4, 0.0) == selected
    # as many of the largest losses held out go as were selected: all candidates are gone after one iteration
    assert after(2, 1.0) == after(3, 1.0) == selected
    assert after(0, None) == first


def test_discarding_takes_the_largest_losses() -> None:
    """Eight samples, all judged wrong but two; for each of those one candidate goes, the one judged worst."""
    labels = torch.zeros(8, dtype=torch.long)
    first = set(incv.divide(labels, [], 2, 1.0).tolist())
    second = sorted(set(range(8)) - first)
    logits = torch.zeros(8, 3)
    logits[:, 1] = torch.arange(1.0, 9.0)  # all wrong, the later the worse
    right = {second[0], min(first)}
    logits[list(right), 0] = 20.0
    third, fourth = (set(incv.divide(labels, [logits] * k, 2, 1.0).tolist()) for k in (2, 3))
    gone = {max(first), max(second)}
    assert third & fourth == right
    assert third | fourth == set(range(8)) - gone


def test_noise_is_estimated_from_the_first_half() -> None:
    """Agreement 3 of 4 at K = 3: e solves it, and floor(e / (1-e) * 3) = 0 go; with none right all is candidate."""
    labels = torch.zeros(8, dtype=torch.long)
    second = [i for i in range(8) if i not in incv.divide(labels, [], 1, None).tolist()]
    logits = torch.zeros(8, 3)
    logits[:, 1] = 1.0
    logits[second[:3], 0] = 2.0
    e = (1 - math.sqrt(1 - 1.5 * 0.25)) / 1.5
    assert int(e / (1 - e) * 3) == 0
    assert incv.divide(labels, [logits] * 2, 1, None).tolist() == second[:3]


def test_nothing_selected_means_all_samples() -> None:
    method, labels = make("incv", iterations=1), torch.arange(12) % 3
    run = method.stages(StageContext(lambda which: confident((labels + 1) % 3)))
    sizes = []
    for _ in run:
        method.on_stage(labels)
        sizes.append(None if method.subset() is None else len(method.subset()))
    assert sizes == [6, 6, None]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), trainings=st.integers(0, 6), remove=st.none() | st.floats(0, 2))
def test_divisions_only_select_what_was_agreed(seed: int, trainings: int, remove: float | None) -> None:
    """Whatever the predictions: distinct places, and for the last training those that some network confirmed."""
    labels = torch.randint(3, (20,), generator=torch.Generator().manual_seed(seed))
    judged = [normal(20, 3, seed=seed + k) for k in range(6)]
    learnt = incv.divide(labels, judged[:trainings], 3, remove)
    assert len(learnt.unique()) == len(learnt)
    if trainings == 6:
        agreed = torch.stack([z.argmax(1) == labels for z in judged]).any(0)
        assert agreed[learnt].all()


def test_halves_change_with_the_labels() -> None:
    one, other = (incv.divide(labels, [], 1, 0.0) for labels in (torch.arange(40) % 3, torch.arange(40) % 4))
    assert len(one) == len(other) == 20
    assert not torch.equal(one, other)


# through the loop

RUNS: dict[str, dict[str, Any]] = {
    "m-dyr-h": {"epochs": 4, "method_option": {"warmup": 0.5}},
    "selc": {"epochs": 4, "method_option": {"start": 0.5}},
    "o2u": {"epochs": 3, "method_option": {"period": 2, "cyclical": 1.5, "remove": 0.3, "lr": 0.05}},
    "incv": {"epochs": 3, "method_option": {"iterations": 1, "length": 1.0}},
}
STAGES = {"m-dyr-h": 1, "selc": 1, "o2u": 6, "incv": 3}
LENGTHS = {"m-dyr-h": [4], "selc": [4], "o2u": [1, 1, 1, 2, 2, 3], "incv": [3, 3, 3]}


@pytest.fixture(scope="module")
def images(make_dataset: Callable[..., Dataset]) -> Dataset:
    return make_dataset(train=64)  # 48 of them to train on


def configuration(digits: Configure, name: str, **values: Any) -> RunConfig:
    plain: dict[str, Any] = {"method": name, "train_subset": None, "val_fraction": 0.25, "batch": 16}
    return digits(**{**plain, **RUNS[name], **values})


class Stop(Exception):
    """Pulls the plug."""


class Interrupt:
    """Ends a run after an epoch."""

    def __init__(self, stage: int, epoch: int) -> None:
        self.at = (stage, epoch)

    def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        if (stage, number) == self.at:
            raise Stop


@pytest.fixture(scope="module")
def whole(
    images: Dataset, digits: Configure, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, list[Any]]]:
    """Each method's run, once, and what each of its epochs was drawn from."""
    found: dict[str, tuple[Run, list[Any]]] = {}

    def run(name: str) -> tuple[Run, list[Any]]:
        if name not in found:
            config, store = configuration(digits, name), tmp_path_factory.mktemp(name)
            problem = prepare(config, images)
            folder = RunFolder(store, config.key(problem.digests))
            problem.save_labels(folder)
            training = Run(config, problem, problem.digests, folder)
            drawn_from: list[Any] = []
            epoch = training.trainer.loader.epoch

            def note(stage: int, number: int, subset: Tensor | None = None) -> Any:
                drawn_from.append((stage, number, subset))
                return epoch(stage, number, subset)

            training.trainer.loader.epoch = note  # type: ignore[method-assign]
            training.fit()
            found[name] = training, drawn_from
        return found[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run(name: str, whole: Callable[[str], tuple[Run, list[Any]]]) -> None:
    run, _ = whole(name)
    expected = [(s, e) for s, length in enumerate(LENGTHS[name]) for e in range(length)]
    assert [(line["stage"], line["epoch"]) for line in run.lines] == expected
    assert all(math.isfinite(line["train_loss"]) and line["skipped_steps"] == 0 for line in run.lines)
    assert all(torch.isfinite(value).all() for value in run.trainer.method.state_dict().values())


def test_passes_of_m_dyr_h(whole: Callable[[str], tuple[Run, list[Any]]]) -> None:
    """After the warm-up each step looks at its rows once more, and each epoch at the whole set."""
    assert [line["forward_samples"] for line in whole("m-dyr-h")[0].lines] == [48, 48, 48 + 48 + 48, 48 + 48 + 48]


def test_selc_in_a_run_moves_every_target(whole: Callable[[str], tuple[Run, list[Any]]]) -> None:
    run, _ = whole("selc")
    assert (run.trainer.method.targets != F.one_hot(run.trainer.given, 4)).any(1).all()


@pytest.mark.parametrize(("name", "sizes"), [("o2u", [48] * 5 + [33]), ("incv", [24, 24])])
def test_stages_learn_from_their_parts(
    name: str, sizes: list[int], whole: Callable[[str], tuple[Run, list[Any]]]
) -> None:
    """Each epoch of a stage from the same samples."""
    run, drawn_from = whole(name)
    part = {s: subset for s, _, subset in drawn_from}
    for s, _, subset in drawn_from:
        assert subset is None if part[s] is None else torch.equal(subset, part[s])
    assert [48 if part[s] is None else len(part[s]) for s in range(len(sizes))] == sizes
    steps = {line["stage"]: line["steps"] for line in run.lines}
    assert all(steps[s] == (3 if p is None else max(1, len(p) // 16)) for s, p in part.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("o2u", {"period": 3, "cyclical": 0.5, "remove": 0.3, "lr": 0.05}),
        ("incv", {"iterations": 1, "length": 1.0}),
        ("m-dyr-h", {"warmup": 0.5}),
    ],
)
def test_wrong_labels_are_found(
    name: str, options: dict[str, Any], digits: Configure, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    """A few epochs on patterns that are easily learnt: what is trusted is far less often wrong than all is."""
    config = configuration(digits, name, method_option=options, epochs=8 if name == "m-dyr-h" else 6, batch=8)
    problem = prepare(config, make_dataset(train=320 if name == "m-dyr-h" else 160))
    folder = RunFolder(tmp_path, config.key(problem.digests))
    problem.save_labels(folder)
    run = Run(config, problem, problem.digests, folder)
    run.fit()
    wrong = torch.from_numpy(problem.noisy.take(problem.train).flipped)
    trusted = run.trainer.method.noisy < 0.5 if name == "m-dyr-h" else run.trainer.method.subset()
    assert len(wrong[trusted]) > 0.4 * len(wrong)
    assert wrong[trusted].double().mean() < 0.5 * wrong.double().mean()


def test_o2u_in_a_run_has_cycles(whole: Callable[[str], tuple[Run, list[Any]]]) -> None:
    """Three rates, then one that falls and springs back; each epoch of a cycle counted once."""
    rates = [line["learning_rate"] for line in whole("o2u")[0].lines]
    assert rates[:3] == [0.05, 0.025, 0.005]
    assert rates[3:5] == rates[5:7]
    assert rates[3] > rates[4]
    looked = [line["forward_samples"] - 16 * line["steps"] for line in whole("o2u")[0].lines]
    assert looked == [0, 0, 0, 0, 48, 48, 48, 0, 0, 0]


def test_incv_in_a_run_selects_by_its_own_predictions(whole: Callable[[str], tuple[Run, list[Any]]]) -> None:
    """The two halves are apart, and the last training has what each half's network confirms of the other."""
    run, drawn_from = whole("incv")
    part = {s: set(subset.tolist()) for s, _, subset in drawn_from}
    assert part[0] | part[1] == set(range(48))
    assert not part[0] & part[1]
    agreed = [
        set((run.stage_predictions[f"{s}/last"].argmax(1) == run.trainer.given).nonzero().flatten().tolist())
        for s in range(2)
    ]
    assert part[2] == (part[1] & agreed[0]) | (part[0] & agreed[1])


@pytest.mark.parametrize(
    ("name", "stage", "epoch"),
    [("m-dyr-h", 0, 2), ("selc", 0, 2), ("o2u", 1, 0), ("o2u", 4, 1), ("o2u", 5, 0), ("incv", 1, 2), ("incv", 2, 1)],
)
def test_a_run_that_is_taken_up_again(
    name: str,
    stage: int,
    epoch: int,
    whole: Callable[[str], tuple[Run, list[Any]]],
    digits: Configure,
    images: Dataset,
    tmp_path: Path,
) -> None:
    """Within a late stage, and between two: to the same bits."""
    config, (run, _) = configuration(digits, name), whole(name)
    with pytest.raises(Stop):
        fit(config, dataset=images, store=tmp_path, progress=Interrupt(stage, epoch))
    resumed = fit(config, dataset=images, store=tmp_path)
    left, right = (load_file(folder / "weights.safetensors") for folder in (run.folder.path, resumed.folder))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert resumed.record["results"] == run.record["results"]


@pytest.mark.parametrize("name", ["o2u,mixup", "incv,co-teaching"])
def test_stages_go_with_other_losses(name: str, digits: Configure, images: Dataset, tmp_path: Path) -> None:
    own = {"o2u,mixup": {"period": 1, "remove": 0.3}, "incv,co-teaching": {"iterations": 1, "forget_rate": 0.2}}
    config = configuration(digits, "incv", method=name, method_option=own[name], epochs=1)
    assert config.oracle() == []
    assert math.isfinite(fit(config, dataset=images, store=tmp_path).record["results"]["last"])


def test_a_subset_is_drawn_from(tiny: Dataset) -> None:
    """The places that these methods give are those that the loader's batches come from, also fewer than a batch."""
    loader = Loader(tiny, torch.arange(48), tiny.train_labels, rows=16, policy="none", device=CPU, seed=0)
    (batch,) = loader.epoch(0, 0, torch.tensor([3, 7, 40]))
    assert sorted(batch.index.tolist()) == [3, 7, 40]
