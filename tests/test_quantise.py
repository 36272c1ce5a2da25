"""The probe of quantisation: the grid, plain rounding, and ZSAQ's zero-shot SAM-SGA."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from noisysam import models
from noisysam.core.errors import UserError
from noisysam.probes import Subject, load
from noisysam.probes import quantise as q
from noisysam.probes.base import choices
from noisysam.runs.config import RunConfig
from noisysam.training.fit import fit


def options(**values: Any) -> q.QuantiseOptions:
    return q.QuantiseOptions(**values)


SHORT = options(iterations=80, batch=32)

weights = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    elements=st.floats(-10, 10, width=32),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A small network that has learnt the digits, in a second or two."""
    store = tmp_path_factory.mktemp("runs")
    machine: dict[str, Any] = {"device": "cpu", "precision": "fp32", "compile": "off"}
    config = RunConfig(
        dataset="digits", model="resnet8", width=0.25, epochs=6, batch=64, lr=0.1, noise=0.2, opt="sam", **machine
    )
    return load(store, fit(config, store=store).key, device="cpu")


@pytest.fixture(scope="module")
def digits_test(trained: Subject) -> tuple[Tensor, Tensor]:
    return trained.part("test", None)


def agreement(module: nn.Module, subject: Subject, inputs: Tensor) -> float:
    """The share of rows to which a network gives the trained one's class."""
    return float((subject.logits(inputs, [module]).argmax(1) == subject.logits(inputs).argmax(1)).float().mean())


def scales(weight: np.ndarray, bits: int) -> np.ndarray:
    """The step of each channel."""
    return np.abs(weight).reshape(len(weight), -1).max(1) / (2 ** (bits - 1) - 1)


@settings(deadline=None)
@given(weights, st.integers(2, 8))
def test_grid(weight: np.ndarray, bits: int) -> None:
    """Whole multiples of the channel's step, symmetric about 0, the nearest to each weight; the same once more."""
    found = q.quantise(torch.from_numpy(weight), bits)
    step = scales(weight, bits)[:, None, None]
    codes = np.divide(found.numpy(), step, out=np.zeros_like(weight), where=step > 1e-30)
    assert np.allclose(codes, np.round(codes), atol=1e-4)
    assert np.abs(codes).max() <= (2**bits - 1) // 2 + 1e-4
    assert (np.abs(found.numpy() - weight) <= step / 2 * (1 + 1e-5) + 1e-30).all()
    torch.testing.assert_close(q.quantise(-torch.from_numpy(weight), bits), -found)
    torch.testing.assert_close(q.quantise(found, bits), found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_levels_are_used(bits: int) -> None:
    """2^bits - 1 of them, in each channel by its own scale."""
    line = torch.linspace(-1, 1, 5001)
    found = q.quantise(torch.stack([line, 100 * line]), bits)
    for row, scale in zip(found, (1, 100), strict=True):
        levels = row.unique()
        assert len(levels) == 2**bits - 1
        torch.testing.assert_close(levels, scale * torch.linspace(-1, 1, 2**bits - 1))


def test_rounding_passes_gradients_straight_through() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pull = torch.arange(15.0).view(3, 5)
    (gradient,) = torch.autograd.grad((q.quantise(weight, 2) * pull).sum(), weight)
    assert torch.equal(gradient, pull)


def test_round_weights_of_convolutions_and_the_head_alone(trained: Subject) -> None:
    module = trained.modules[0]
    before = {n: v.clone() for n, v in module.state_dict().items()}
    rounded = q.round_weights(module, 3)
    matrices = {n for n, p in module.named_parameters() if p.ndim > 1}
    assert set(q.quantised_names(module)) == matrices
    for name, value in rounded.state_dict().items():
        if name in matrices:
            channels = value.flatten(1)
            assert max(len(c.unique()) for c in channels) <= 7
            torch.testing.assert_close(channels.abs().amax(1), before[name].flatten(1).abs().amax(1))
        else:
            assert torch.equal(value, before[name])
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_trains_as_it_is_rounded(trained: Subject, digits_test: tuple[Tensor, Tensor]) -> None:
    """The network that quantises in its forward gives what the rounded one gives."""
    inputs = digits_test[0][:20]
    module = trained.modules[0]
    torch.testing.assert_close(q.Quantised(module, 2)(inputs), q.round_weights(module, 2)(inputs))


def test_a_single_layer() -> None:
    layer = nn.Linear(4, 3)
    assert q.quantised_names(layer) == ["weight"]
    inputs = torch.randn(2, 4)
    torch.testing.assert_close(q.Quantised(layer, 4)(inputs), q.round_weights(layer, 4)(inputs))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 7, 5)])
def test_generated_images(shape: tuple[int, int, int]) -> None:
    """In an input's shape, each channel standardised; different noise, different images."""
    images = q.Generator(*shape)(torch.randn(16, q.LATENT, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (16, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(shape[0]), atol=1e-2, rtol=0)
    assert images.std(0).max() > 0.1


def test_statistics_in_numpy() -> None:
    """Of each layer's input, and of nothing after the block."""
    first, second = nn.BatchNorm2d(2, eps=0), nn.BatchNorm2d(2, eps=0)
    network = nn.Sequential(first, nn.ReLU(), second).double().eval()
    rng = np.random.default_rng(0)
    for layer in (first, second):
        for name in ("running_mean", "running_var"):
            layer.get_buffer(name).copy_(torch.from_numpy(rng.uniform(0.5, 2, 2)))
    x = rng.normal(size=(5, 2, 3, 3))

    def distance(layer: nn.Module, values: np.ndarray) -> float:
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
        running = (layer.get_buffer("running_mean").numpy(), layer.get_buffer("running_var").numpy())
        return float(((mean - running[0]) ** 2).mean() + ((np.sqrt(var) - np.sqrt(running[1])) ** 2).mean())

    with q._statistics(network) as distances:
        network(torch.from_numpy(x))
    middle = torch.relu(first(torch.from_numpy(x))).detach().numpy()
    assert torch.stack(distances).tolist() == pytest.approx([distance(first, x), distance(second, middle)])
    network(torch.from_numpy(x))
    assert len(distances) == 2


def test_discrepancy_in_numpy() -> None:
    """KL(teacher | student), less the penalty, which pulls at the generator alone."""
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(size=(6, 4)), nn.Linear(3, 4).double()
    images = torch.from_numpy(rng.normal(size=(6, 3))).requires_grad_()
    p, z = np.exp(teacher), np.exp(student(images).detach().numpy())
    p, z = p / p.sum(1, keepdims=True), z / z.sum(1, keepdims=True)
    target = torch.from_numpy(np.log(p))
    found = q.discrepancy(student, images, target, images.square().sum())
    assert found.item() == pytest.approx((p * np.log(p / z)).sum() / 6 - images.square().sum().item())
    (gradient,) = torch.autograd.grad(found, student.weight)
    np.testing.assert_allclose(gradient.numpy(), (z - p).T @ images.detach().numpy() / 6)


def test_8_bits_change_little_and_2_bits_much(trained: Subject, digits_test: tuple[Tensor, Tensor]) -> None:
    inputs, labels = digits_test
    assert float((trained.logits(inputs).argmax(1) == labels).float().mean()) > 0.7
    found = {bits: agreement(q.round_weights(trained.modules[0], bits), trained, inputs) for bits in (8, 4, 2)}
    assert found[8] > 0.95
    assert found[8] >= found[4] > found[2]
    assert found[2] < 0.7


@pytest.mark.slow
def test_zero_shot_brings_the_2_bit_network_closer(trained: Subject, digits_test: tuple[Tensor, Tensor]) -> None:
    """Without any image of the digits; the teacher stays as it was, and the same seed gives the same bits."""
    inputs = digits_test[0]
    teacher = trained.modules[0]
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    state = torch.get_rng_state()
    learnt = q.zero_shot(teacher, 2, inputs.shape[1:], SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert agreement(learnt, trained, inputs) > agreement(q.round_weights(teacher, 2), trained, inputs) + 0.1
    for name in q.quantised_names(learnt):
        weight = learnt.get_parameter(name)
        assert max(len(channel.unique()) for channel in weight.flatten(1)) <= 3
    again = q.zero_shot(teacher, 2, inputs.shape[1:], SHORT)
    assert all(torch.equal(v, learnt.state_dict()[n]) for n, v in again.state_dict().items())


def test_zero_shot_does_no_harm_where_rounding_does_little(
    trained: Subject, digits_test: tuple[Tensor, Tensor]
) -> None:
    inputs, teacher = digits_test[0], trained.modules[0]
    learnt = q.zero_shot(teacher, 4, inputs.shape[1:], options())
    assert agreement(learnt, trained, inputs) >= agreement(q.round_weights(teacher, 4), trained, inputs)


def test_probe(trained: Subject) -> None:
    """Accuracy before and after for each number of bits, and what was measured besides."""
    chosen = options(bits=(8, 2), iterations=3, batch=8, test_limit=100)
    found = json.loads(json.dumps(q.Quantise(chosen).run(trained), allow_nan=False))
    inputs, labels = trained.part("test", 100)
    assert found["rows"] == 100
    assert found["accuracy"] == pytest.approx(float((trained.logits(inputs).argmax(1) == labels).float().mean()))
    assert list(found["bits"]) == ["8", "2"]
    for bits, level in found["bits"].items():
        plain = q.round_weights(trained.modules[0], int(bits))
        assert level["plain_agreement"] == pytest.approx(agreement(plain, trained, inputs))
        assert {"plain_accuracy", "zero_shot_accuracy", "zero_shot_agreement"} < level.keys()


def test_probe_of_two_networks(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The method's own output of all its quantised networks; no zero-shot part where none is asked for."""
    subject = load(tmp_path, fit(digits(method="co-teaching"), store=tmp_path).key, device="cpu")
    found = q.Quantise(options(bits=(4,), iterations=0)).run(subject)
    inputs, labels = subject.part("test", None)
    both = subject.logits(inputs, [q.round_weights(module, 4) for module in subject.modules])
    (level,) = found["bits"].values()
    assert level["plain_accuracy"] == pytest.approx(float((both.argmax(1) == labels).float().mean()))
    assert level.keys() == {"plain_accuracy", "plain_agreement"}


def test_bits_from_the_command_line() -> None:
    assert choices(["quantise"], {"bits": "4,2"})["quantise"].model_dump()["bits"] == (4, 2)


@pytest.mark.parametrize("bits", [[1], [9], "all", "", []])
def test_bits_that_are_refused(bits: object) -> None:
    with pytest.raises(UserError, match="bits"):
        choices(["quantise"], {"bits": bits})


def test_without_batch_norm() -> None:
    """A network without norms has no statistics to keep to."""
    network = models.build("resnet8", 4, 1, width=0.125, norm="none").eval()
    learnt = q.zero_shot(network, 4, torch.Size((1, 8, 8)), options(iterations=2, batch=4))
    assert all(torch.isfinite(p).all() for p in learnt.parameters())
