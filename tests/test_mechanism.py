"""The probe of mechanism: norms, Jacobians, what clean and flipped samples bring, what SANER shrinks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from noisysam import models
from noisysam.core.errors import UserError
from noisysam.probes import load
from noisysam.probes import mechanism as m
from noisysam.runs.config import RunConfig
from noisysam.training.fit import fit


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A ResNet-8 in float64 whose batch norms have running statistics of their own; evaluation mode."""
    net = models.build("resnet8", 4, 1, width=0.125, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return net.eval()


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and which are flipped: 10 rows of 8x8x1, 4 classes."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(10, 1, 8, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(10) % 4, torch.arange(10) >= 6


class Linear(nn.Module):
    """Logits x W' + b of flat inputs, as a network with features and head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4).double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(generator=generator)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def residuals(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """softmax(x W' + b) - onehot(y) in numpy, (n, K)."""
    z = np.exp(x @ weight.T + bias)
    return z / z.sum(1, keepdims=True) - np.eye(len(weight))[y]


def test_parameter_jacobian(network: nn.Module, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs = samples[0][:3]
    weights = {n: p.detach() for n, p in network.named_parameters()}
    full = jacrev(lambda w: functional_call(network, w, (inputs,)))(weights)
    expected = torch.stack([j.flatten(2).square().sum((1, 2)) for j in full.values()]).sum(0).sqrt()
    torch.testing.assert_close(m.parameter_jacobian_norms(network, inputs), expected)


def test_input_jacobian(network: nn.Module, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs = samples[0][:3]
    expected = torch.stack([jacrev(network)(x[None]).norm() for x in inputs])
    torch.testing.assert_close(m.input_jacobian_norms(network, inputs), expected)


def test_norms_of_a_linear_network() -> None:
    """Its Jacobians are its weight and its inputs."""
    net, x = Linear(), torch.randn(5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight = net.head.weight.detach()
    assert m.last_layer_norm(net) == pytest.approx(np.linalg.norm(weight.numpy()))
    torch.testing.assert_close(m.feature_norms(net, x), x.square().sum(1).sqrt())
    torch.testing.assert_close(m.input_jacobian_norms(net, x), weight.square().sum().sqrt().expand(5))
    torch.testing.assert_close(m.parameter_jacobian_norms(net, x), (4 * (x.square().sum(1) + 1)).sqrt())


def test_gradients_in_numpy() -> None:
    """Every figure of the loss, on a linear network, from the closed form of its gradient."""
    net, rho = Linear(), 0.3
    rng = np.random.default_rng(5)
    x, y, flipped = rng.normal(size=(11, 6)), rng.integers(0, 4, 11), np.arange(11) >= 7
    weight, bias = net.head.weight.detach().numpy().copy(), net.head.bias.detach().numpy().copy()

    def gradient(w: np.ndarray, b: np.ndarray, of: np.ndarray) -> np.ndarray:
        r = residuals(w, b, x[of], y[of]) / len(x[of])
        return np.concatenate([(r.T @ x[of]).ravel(), r.sum(0)])

    def moved(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = rho * direction / np.linalg.norm(direction)
        return weight + step[:24].reshape(4, 6), bias + step[24:]

    def ratio(norms: np.ndarray) -> float:
        return float(norms[~flipped].sum() / norms[flipped].sum())

    everyone = np.full(11, True)
    clean, wrong, whole = (gradient(weight, bias, of) for of in (~flipped, flipped, everyone))
    there = gradient(*moved(whole), everyone)
    rows = [np.arange(11) == i for i in range(11)]
    each = np.array([residuals(*moved(gradient(weight, bias, i)), x[i], y[i])[0] for i in rows])
    shrunk = (whole * there > 0) & (np.abs(there) < np.abs(whole))
    expected = {
        "gradient_norm": np.linalg.norm(whole),
        "gradient_norm_clean": np.linalg.norm(clean),
        "gradient_norm_flipped": np.linalg.norm(wrong),
        "gradient_share_clean": 7 / 11 * clean @ whole / (whole @ whole),
        "gradient_cosine": clean @ wrong / np.linalg.norm(clean) / np.linalg.norm(wrong),
        "logit_ratio": ratio(np.linalg.norm(residuals(weight, bias, x, y), axis=1)),
        "logit_ratio_perturbed": ratio(np.linalg.norm(residuals(*moved(whole), x, y), axis=1)),
        "logit_ratio_each": ratio(np.linalg.norm(each, axis=1)),
        "down_weighted": shrunk.mean(),
    }
    found = m.gradient_figures(net, torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(flipped), rho)
    assert found.pop("down_weighted_by_layer") == [("head", pytest.approx(shrunk.mean()))]
    assert found == pytest.approx(expected)
    assert 0 < expected["down_weighted"] < 1


def test_whole_gradient_of_a_deep_network(network: nn.Module, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    """More rows than one forward takes; the groups' shares make the whole."""
    inputs, labels, flipped = (s.repeat(14, *[1] * (s.ndim - 1)) for s in samples)
    assert len(inputs) > m.ROWS
    found = m.gradient_figures(network, inputs, labels, flipped, rho=0.1)
    loss = nn.functional.cross_entropy(network(inputs), labels)
    grads = torch.autograd.grad(loss, list(network.parameters()))
    assert found["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()))
    turned = m.gradient_figures(network, inputs, labels, ~flipped, rho=0.1)
    assert found["gradient_share_clean"] + turned["gradient_share_clean"] == pytest.approx(1)
    assert found["logit_ratio"] * turned["logit_ratio"] == pytest.approx(1)
    sizes: dict[str, int] = {}
    for name, p in network.named_parameters():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + p.numel()
    shares = dict(found["down_weighted_by_layer"])
    assert shares.keys() == sizes.keys()
    whole = sum(shares[layer] * size for layer, size in sizes.items()) / sum(sizes.values())
    assert found["down_weighted"] == pytest.approx(whole)


def test_down_weighted_by_hand() -> None:
    """Smaller with the same sign counts; larger, turned, equal and zero do not."""
    plain = [torch.tensor([1.0, 1, 1, 1, 0]), torch.tensor([-2.0])]
    sam = [torch.tensor([0.5, 2, -0.5, 1, 0]), torch.tensor([-1.0])]
    assert m.down_weighted(["a.weight", "b.bias"], plain, sam) == (2 / 6, {"a": 1 / 5, "b": 1.0})


def test_at_radius_0_sam_changes_nothing(network: nn.Module, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    found = m.gradient_figures(network, *samples, rho=0.0)
    assert found["down_weighted"] == 0
    assert found["logit_ratio_perturbed"] == pytest.approx(found["logit_ratio"])
    assert found["logit_ratio_each"] == pytest.approx(found["logit_ratio"])


def test_each_samples_own_perturbation_raises_the_weight_of_clean_ones() -> None:
    """1-SAM on the logistic model, clean samples fitted and flipped ones not (arXiv 2405.03676, section 3)."""
    net = Linear()
    inputs = torch.eye(4, 6, dtype=torch.float64).repeat(5, 1)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.weight[:, :4] = 2 * torch.eye(4)
        net.head.bias.zero_()
    flipped = torch.arange(20) >= 16
    labels = torch.where(flipped, (torch.arange(20) + 1) % 4, torch.arange(20) % 4)
    found = m.gradient_figures(net, inputs, labels, flipped, rho=0.3)
    assert found["logit_ratio_each"] > 1.05 * found["logit_ratio"]


def test_nothing_of_the_network_changes(network: nn.Module, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    before = {n: v.clone() for n, v in network.state_dict().items()}
    m.gradient_figures(network, *samples, rho=0.5)
    m.parameter_jacobian_norms(network, samples[0][:2])
    m.input_jacobian_norms(network, samples[0][:2])
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not network.training


def test_without_a_head() -> None:
    with pytest.raises(UserError, match="needs a network with features"):
        m.last_layer_norm(nn.Sequential(nn.Linear(2, 2)))


def probed(config: RunConfig, store: Path, **options: Any) -> dict[str, Any]:
    subject = load(store, fit(config, store=store).key, device="cpu")
    states = [{n: v.clone() for n, v in module.state_dict().items()} for module in subject.modules]
    results = m.Mechanism(m.MechanismOptions(limit=40, jacobian_limit=6, **options)).run(subject)
    for module, state in zip(subject.modules, states, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in module.state_dict().items())
    return json.loads(json.dumps(results, allow_nan=False))


@pytest.mark.slow
def test_over_the_snapshots_of_a_run(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Each snapshot once, the final weights last; the same figures in a second look."""
    config = digits(epochs=5, snapshots=2)
    found = probed(config, tmp_path)
    assert [moment["epoch"] for moment in found["moments"]] == [1, 3, 4]
    assert found["note"] == "snapshots and the final weights"
    assert found["rows"] == 40
    assert 0 < found["flipped"] < 40
    assert found == probed(config, tmp_path)
    subject = load(tmp_path, fit(config, store=tmp_path).key, device="cpu")
    head = subject.at(0, 1)[0].get_parameter("head.weight")
    norms = [moment["last_layer_norm"] for moment in found["moments"]]
    assert norms[0] == pytest.approx(head.norm().item())
    assert norms[0] != norms[1]
    assert probed(digits(epochs=4, snapshots=2), tmp_path)["moments"][-1]["epoch"] == 3


def test_without_snapshots_and_without_noise(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    found = probed(digits(noise=0), tmp_path)
    (line,) = found["moments"]
    assert "--snapshots" in found["note"]
    assert line["gradient_share_clean"] == pytest.approx(1)
    absent = ("feature_norm", "parameter_jacobian", "input_jacobian", "gradient_norm")
    assert all(line[f"{name}_flipped"] is None and line[f"{name}_clean"] > 0 for name in absent)
    assert line["logit_ratio"] is line["gradient_cosine"] is None


def test_of_the_second_network(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = digits(method="co-teaching")
    first, second = (probed(config, tmp_path, network=k)["moments"][0] for k in (0, 1))
    assert first["last_layer_norm"] != second["last_layer_norm"]
    with pytest.raises(UserError, match="2 networks"):
        probed(config, tmp_path, network=2)
