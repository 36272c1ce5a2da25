"""Sharpness against exact Hessians, closed forms of quadratics, and a run of a second."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from noisysam.core.errors import UserError
from noisysam.probes import Subject, load
from noisysam.probes.sharpness import (
    Loss,
    Sharpness,
    SharpnessOptions,
    ascend,
    average_case,
    spectrum,
    worst_case,
)
from noisysam.report.probe_figures import density
from noisysam.runs.config import RunConfig
from noisysam.training.fit import fit


class Small:
    """A network of 95 weights with batch norm, 120 rows (more than one chunk), and its Hessian from torch's own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.module = nn.Sequential(*layers).double().eval()
        nn.init.uniform_(self.module[1].running_var, 0.5, 2)  # type: ignore[arg-type]
        nn.init.normal_(self.module[1].running_mean)  # type: ignore[arg-type]
        self.inputs, self.labels = torch.randn(120, 5, dtype=torch.float64), torch.randint(4, (120,))
        self.loss = Loss(self.module, self.inputs, self.labels)
        self.hessian = hessian(self.value, self.loss.weights)
        assert len(self.hessian) == 5 * 8 + 8 + 16 + 8 * 4 + 4

    def value(self, weights: Tensor, rows: slice = slice(None)) -> Tensor:
        named, place = {}, 0
        for name, p in self.module.named_parameters():
            named[name] = weights[place : place + p.numel()].reshape(p.shape)
            place += p.numel()
        return F.cross_entropy(functional_call(self.module, named, (self.inputs[rows],)), self.labels[rows])


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


class Quadratic:
    """b'e + e'He / 2, with the face of a ``Loss`` whose weights are zero."""

    def __init__(self, matrix: Tensor, linear: Tensor) -> None:
        self.matrix, self.linear, self.weights = matrix, linear, torch.zeros_like(linear)

    def value(self, weights: Tensor, rows: slice = slice(None)) -> float:
        return float(self.linear @ weights + weights @ self.matrix @ weights / 2)

    def gradient(self, weights: Tensor, rows: slice = slice(None)) -> tuple[float, Tensor]:
        return self.value(weights), self.linear + self.matrix @ weights


def quadratic(size: int = 20, linear: float = 1.0, low: float = 0.0) -> Any:
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(low, 9, size, dtype=torch.float64)
    return Quadratic(q * values @ q.T, linear * torch.randn(size, generator=generator, dtype=torch.float64))


# the loss as a function of its weights


def test_value_gradient_and_product_are_exact(small: Small) -> None:
    direction = torch.randn_like(small.loss.weights)
    there = small.loss.weights + 0.1 * direction
    for rows in (slice(None), slice(32, 64), slice(96, 120)):
        value, slope = small.loss.gradient(there, rows)
        assert value == pytest.approx(float(small.value(there, rows)), rel=1e-12)
        assert small.loss.value(there, rows) == pytest.approx(value, rel=1e-12)
        exact = torch.autograd.functional.jacobian(lambda w, rows=rows: small.value(w, rows), there)
        torch.testing.assert_close(slope, exact)
    vectors = torch.randn(len(direction), 3, dtype=torch.float64)
    torch.testing.assert_close(small.loss.product(vectors), small.hessian @ vectors)


# eigenvalues, trace, density


def test_eigenvalues_of_an_exact_hessian(small: Small) -> None:
    exact = torch.linalg.eigvalsh(small.hessian).flip(0)
    found = spectrum(small.loss.product, small.loss.weights, draws=4, steps=8, seed=0)
    torch.testing.assert_close(found.values[:5], exact[:5], rtol=1e-3, atol=0)
    assert float(found.values[0]) == pytest.approx(float(exact[0]), rel=1e-8)
    for value, error in zip(found.values, found.errors, strict=True):
        assert (exact - value).abs().min() <= error + 1e-9
    whole = spectrum(small.loss.product, small.loss.weights, draws=5, steps=20, seed=0)  # all 100 dimensions
    torch.testing.assert_close(whole.values, exact, rtol=1e-8, atol=1e-10)
    assert float(found.errors.max()) > float(whole.errors.max()) < 1e-8


def test_trace_within_its_standard_error(small: Small) -> None:
    """Hutchinson's estimates have the trace as their mean, and 2 sum of H_ij^2 over i != j as their variance."""
    traces = torch.cat([spectrum(small.loss.product, small.loss.weights, 50, 1, seed).traces for seed in range(8)])
    exact = float(small.hessian.trace())
    variance = 2 * float(small.hessian.square().sum() - small.hessian.diagonal().square().sum())
    error = float(traces.std()) / math.sqrt(len(traces))
    assert abs(float(traces.mean()) - exact) < 3 * error
    assert error == pytest.approx(math.sqrt(variance / 400), rel=0.15)


def test_density_has_the_moments_of_the_hessian(small: Small) -> None:
    """Its k-th moment is the mean of v'H^k v / P over the draws, exactly while k < 2 steps."""
    draws, steps, seed = 3, 4, 5
    found = spectrum(small.loss.product, small.loss.weights, draws, steps, seed)
    size = len(small.hessian)
    generator = torch.Generator().manual_seed(seed)
    vectors = (2 * torch.randint(2, (size, draws), generator=generator) - 1).double()
    for k in range(2 * steps):
        exact = (vectors * (torch.linalg.matrix_power(small.hessian, k) @ vectors)).sum() / draws / size
        assert float((found.weights * found.values**k).sum()) == pytest.approx(float(exact), rel=1e-8)
    assert float(found.weights @ found.values) * size == pytest.approx(float(found.traces.mean()), rel=1e-10)
    grid, values = density(found.values.tolist(), found.weights.tolist())
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-2)
    centre = np.trapezoid(values * grid, grid)
    assert centre == pytest.approx(float(found.weights @ found.values), abs=1e-2 * float(found.values[0]))


@given(
    size=st.integers(1, 12), rank=st.integers(0, 12), draws=st.integers(1, 6), steps=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_spectra_of_any_symmetric_matrix(size: int, rank: int, draws: int, steps: int, seed: int) -> None:
    """Also of one without full rank, where the Krylov space ends early: nothing leaves the range of the eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64)
    signs = torch.sign(torch.randn(min(rank, size), generator=generator, dtype=torch.float64))
    matrix = factor * signs @ factor.T
    exact = torch.linalg.eigvalsh(matrix)
    found = spectrum(lambda v: matrix @ v, exact, draws, steps, seed)
    assert float(found.weights.sum()) == pytest.approx(1)
    assert float(found.values[0]) <= float(exact[-1]) + 1e-9
    assert float(found.values[-1]) >= float(exact[0]) - 1e-9
    if len(found.values) == size:
        torch.testing.assert_close(found.values, exact.flip(0), rtol=0, atol=1e-9)


def test_float32_is_enough(small: Small) -> None:
    single = Loss(deepcopy(small.module).float(), small.inputs.float(), small.labels)
    found = spectrum(single.product, single.weights, 4, 10, seed=0)
    assert found.values.dtype == torch.float64
    exact = torch.linalg.eigvalsh(small.hessian).flip(0)
    torch.testing.assert_close(found.values[:5], exact[:5], rtol=1e-4, atol=0)


# within a ball


def largest(of: Any, radius: float) -> float:
    """The maximum over the ball from the secular equation: (l - H) e = b with l above all eigenvalues, |e| = radius."""
    values, vectors = np.linalg.eigh(of.matrix.numpy())
    parts = vectors.T @ of.linear.numpy()

    def excess(level: float) -> float:
        return float(np.linalg.norm(parts / (level - values))) - radius

    level = brentq(excess, values[-1] + 1e-9, values[-1] + 1e6)
    return of.value(torch.from_numpy(vectors @ (parts / (level - values))))


@pytest.mark.parametrize("radius", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("low", [0.0, -3.0])
def test_ascent_finds_the_maximum_of_a_quadratic(radius: float, low: float) -> None:
    of = quadratic(low=low)
    path = ascend(of, slice(None), radius, steps=300)
    assert max(path) == pytest.approx(largest(of, radius), rel=1e-5)
    unit = of.linear / of.linear.norm()
    assert path[0] == 0
    assert path[1] == pytest.approx(of.value(radius * unit), rel=1e-12)  # SAM's own point


def test_a_flat_point_does_not_rise() -> None:
    of = quadratic(linear=0.0)
    assert ascend(of, slice(None), 0.1, 3) == [0.0] * 4  # no gradient, no direction


def test_a_step_back_ends_inside_the_ball() -> None:
    """Where the loss bends down, the second step takes the first one back; it is not drawn out to the sphere."""
    of: Any = Quadratic(torch.tensor([[-8.0]]).double(), torch.ones(1).double())
    assert ascend(of, slice(None), 0.5, 3) == pytest.approx([0.0, -0.5, 0.0, -0.5])


def test_average_case_of_a_quadratic() -> None:
    """Each rise is that of the curvature alone, e'He / 2 (the slope cancels); their mean is rho^2 trace / (2 P)."""
    of = quadratic(linear=100.0)
    rises = average_case(of, 0.3, 2000, seed=0)
    values = torch.linalg.eigvalsh(of.matrix) * 0.3**2 / 2
    assert values[0] - 1e-9 <= rises.min() < rises.max() <= values[-1] + 1e-9
    error = float(rises.std()) / math.sqrt(len(rises))
    assert abs(float(rises.mean()) - float(values.mean())) < 3 * error < 0.1 * float(values.mean())


def test_groups_have_perturbations_of_their_own(small: Small) -> None:
    """By hand: each group's own normalised gradient, its own rise, the groups weighted by their rows."""
    rows, radius, weights = len(small.labels), 0.05, small.loss.weights
    expected = 0.0
    for first in range(0, rows, 50):  # 50, 50, 20
        group = slice(first, min(first + 50, rows))
        slope = torch.autograd.functional.jacobian(lambda w, group=group: small.value(w, group), weights)
        rise = small.value(weights + radius * slope / slope.norm(), group) - small.value(weights, group)
        expected += float(rise) * (group.stop - group.start) / rows
    one_step, worst = worst_case(small.loss, rows, radius, steps=4, m=50)
    assert one_step == pytest.approx(expected, rel=1e-9)
    assert worst >= one_step
    sharper = worst_case(small.loss, rows, radius, 4, m=5)
    whole = worst_case(small.loss, rows, radius, 4, m=1000)
    assert sharper[1] > worst > whole[1] > 0
    direct = ascend(small.loss, slice(None), radius, 4)
    assert whole == pytest.approx((direct[1] - direct[0], max(direct) - direct[0]), rel=1e-9)


# a run


OPTIONS = SharpnessOptions(limit=24, hessian_limit=10, draws=2, steps=2, top=3, m=8, ascent=2, directions=2)


@pytest.fixture(scope="module")
def subject(digits: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Subject:
    result = fit(digits(method="co-teaching"), store=tmp_path_factory.mktemp("store"))
    return load(result.folder.parent, result.key, device="cpu")


def state(subject: Subject) -> list[bytes]:
    return [v.numpy().tobytes() for m in subject.modules for v in m.state_dict().values()]


def test_a_run_is_measured_and_left_as_it_was(subject: Subject) -> None:
    before = state(subject)
    found = Sharpness(OPTIONS).run(subject)
    assert state(subject) == before
    assert all(p.grad is None for m in subject.modules for p in m.parameters())
    for part in ("clean", "noisy", "test"):
        of = found[part]
        assert of["rows"] == 24
        assert of["lambda_max"] == of["eigenvalues"][0] >= of["eigenvalues"][2]
        assert of["worst_case"] >= of["one_step"] > 0
        numbers = [v for v in of.values() if isinstance(v, float)]
        assert np.isfinite(numbers).all()
    assert found["clean"]["loss"] != found["noisy"]["loss"]
    assert found["networks"] == 2


def test_the_same_bits_again_and_of_another_network(subject: Subject) -> None:
    once = Sharpness(OPTIONS).run(subject)
    assert Sharpness(OPTIONS).run(subject) == once
    other = Sharpness(OPTIONS.model_copy(update={"network": 1})).run(subject)
    assert other["test"]["loss"] != once["test"]["loss"]
    with pytest.raises(UserError, match="network=2: this run has 2 networks"):
        Sharpness(OPTIONS.model_copy(update={"network": 2})).run(subject)


def test_batch_norm_keeps_its_running_statistics(subject: Subject) -> None:
    """The loss of a row does not depend on the rows beside it, as it would with batch statistics."""
    inputs, labels = subject.part("test", 20)
    whole = Loss(subject.modules[0], inputs, labels)
    alone = [Loss(subject.modules[0], inputs[i : i + 1], labels[i : i + 1]).value(whole.weights) for i in range(20)]
    assert whole.value(whole.weights) == pytest.approx(np.mean(alone), rel=1e-5)


def test_loss_and_accuracy_are_those_of_the_run(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Without noise the noisy part is the clean one; on all test images the record's figures come out."""
    result = fit(digits(noise=0.0, epochs=1), store=tmp_path)
    options = OPTIONS.model_copy(update={"limit": 10**6, "hessian_limit": 4, "ascent": 1, "m": 500})
    found = Sharpness(options).run(load(tmp_path, result.key, device="cpu"))
    assert found["test"]["accuracy"] == pytest.approx(result.last, abs=1e-6)
    assert found["test"]["loss"] == pytest.approx(result.nll, rel=1e-5)
    assert found["noisy"] == found["clean"]
