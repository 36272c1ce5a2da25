"""The SAM family: closed forms, independent recursions in numpy, another library, and laws that every member keeps."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from noisysam import models, optim
from noisysam.core.errors import UserError
from noisysam.core.network import Net, WithFeatures
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.optim import OPTIMIZERS, SGD, Radius, SharpnessAware
from noisysam.optim.base import global_norm

Array = npt.NDArray[np.float64]
MEMBERS = list(OPTIMIZERS)
WITH_RADIUS = [name for name in MEMBERS if issubclass(OPTIMIZERS[name].Options, Radius)]
WITH_CHUNKS = [name for name in MEMBERS if "m" in OPTIMIZERS[name].Options.model_fields]
NEEDS_ROWS = [name for name in MEMBERS if "rows" in OPTIMIZERS[name].requires]
PLAIN = [name for name in MEMBERS if name not in NEEDS_ROWS]


class Float64(Net):
    """A Net whose logits stay float64, for comparisons to the last digits."""

    def logits(
        self, inputs: Tensor, grad: bool, weights: Sequence[Tensor] | None = None, forwards: tuple[int, ...] = ()
    ) -> Tensor:
        self.forwards += len(inputs)
        with torch.set_grad_enabled(grad):
            if weights is not None:
                values = dict(zip([name for name, _ in self.named], weights, strict=True))
                found: Tensor = functional_call(self.module, values, (inputs,))
                return found
            found = self.forward(inputs)
            if isinstance(found, tuple):
                found, self.features = found
            return found


def cross_entropy(logits: Tensor, task: Task) -> Tensor:
    return F.cross_entropy(logits, task.labels, reduction="none")


class TwoLayers(nn.Module):
    """Two layers and tanh between them; with a norm of each row, or of each batch, or none."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.norm = {"none": nn.Identity(), "row": nn.LayerNorm(5), "batch": nn.BatchNorm1d(5)}[norm]
        self.head = nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def small_network(seed: int = 0, dtype: torch.dtype = torch.float32, norm: str = "none") -> nn.Module:
    torch.manual_seed(seed)
    return TwoLayers(norm).to(dtype)


def any_net(seed: int = 0, norm: str = "row", kind: type[Net] = Net, dtype: torch.dtype = torch.float32) -> Net:
    """A net that has all that a member may need: names, features, norm layers."""
    module = small_network(seed, dtype, norm)
    return kind(module, forward=WithFeatures(module))


def small_batch(step: int = 0, rows: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (rows,), generator=generator)


AT_ONCE = {"warmup": 0, "decay": 0.5, "flip": 0.25}  # so that a few steps show what a member does


def member(name: str, params: Any, **settings: Any) -> SharpnessAware:
    """A member on whole batches where nothing else is said, past its warm-up."""
    fields = OPTIMIZERS[name].Options.model_fields
    whole = {"m": "batch"} if name in WITH_CHUNKS else {}
    soon = {key: value for key, value in AT_ONCE.items() if key in fields}
    optimizer = OPTIMIZERS[name](params, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **whole, **soon, **settings})
    optimizer.on_epoch(8, 10, 12)
    return optimizer


def train(optimizer: SharpnessAware, net: Net, steps: Sequence[int]) -> None:
    """Steps on the batches of these numbers; draws of a step depend on its number alone."""
    for step in steps:
        optimizer.generator = torch.Generator().manual_seed(step)
        optimizer.step(Objective(net, small_task(step, net.params[0].dtype), cross_entropy))


def small_task(step: int, dtype: torch.dtype = torch.float32) -> Task:
    """The batch of this number; its rows are a training set of twelve."""
    x, y = small_batch(step, dtype=dtype)
    return Task(0, x, y, torch.arange(len(x)))


def bits(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# closed forms and recursions


@pytest.mark.parametrize("l2", ["descent", "loss"])
@pytest.mark.parametrize(("momentum", "nesterov", "clip"), [(0.0, False, None), (0.9, False, 0.3), (0.9, True, None)])
def test_sam_on_a_quadratic(momentum: float, nesterov: bool, clip: float | None, l2: Any) -> None:
    """L = w'Aw / 2: the gradient is A (w + rho Aw / |Aw|). With l2='loss' A becomes A + wd I in both evaluations."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    matrix, start, lr, rho, decay = root @ root.T, rng.normal(size=5), 0.05, 0.3, 0.1
    first, second = torch.tensor(start[:2], requires_grad=True), torch.tensor(start[2:], requires_grad=True)
    settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay, "clip": clip}
    optimizer = optim.SAM([first, second], lr=lr, l2=l2, rho=rho, m="batch", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = torch.cat([first, second])
        loss = w @ torch.tensor(matrix) @ w / 2
        loss.backward()
        return loss

    w, velocity = start.copy(), np.zeros(5)
    of_loss = matrix + decay * np.eye(5) if l2 == "loss" else matrix
    for _ in range(10):
        before = w @ matrix @ w / 2
        g = of_loss @ w
        g = of_loss @ (w + rho * g / np.linalg.norm(g))
        norm = np.linalg.norm(g)
        g = g * min(1.0, clip / norm) if clip else g
        g = g + decay * w if l2 == "descent" else g
        velocity = momentum * velocity + g
        w = w - lr * (g + momentum * velocity if nesterov else velocity)
        assert optimizer.step(closure).item() == pytest.approx(before, rel=1e-12)
        assert float(optimizer.norm) == pytest.approx(norm, rel=1e-12)
        np.testing.assert_allclose(torch.cat([first, second]).detach().numpy(), w, rtol=1e-11, atol=1e-13)


def test_j_sam_of_a_linear_network_is_sgd() -> None:
    """A linear network's Jacobian does not depend on the weights; SAM's step does differ."""
    results = {}
    for name in ("sgd", "j-sam", "sam"):
        torch.manual_seed(0)
        net = Float64(nn.Linear(6, 3).double())
        train(member(name, net.params), net, range(4))
        results[name] = torch.cat([p.detach().flatten() for p in net.params])
    torch.testing.assert_close(results["j-sam"], results["sgd"], rtol=1e-12, atol=1e-14)
    assert (results["sam"] - results["sgd"]).abs().max() > 1e-3


def test_m_sam_is_the_share_weighted_mean_of_its_chunks() -> None:
    net = Float64(small_network(2, torch.float64))
    x, y = small_batch(dtype=torch.float64)
    optimizer = member("sam", net.params, m=5)
    parts = []
    for start, stop in ((0, 5), (5, 10), (10, 12)):
        chunk = Objective(net, Task(0, x[start:stop], y[start:stop]), cross_entropy)
        parts.append([g * (stop - start) / 12 for g in optimizer.gradient(chunk, None)])
    optimizer.step(Objective(net, Task(0, x, y), cross_entropy))
    for p, pieces in zip(net.params, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(p.grad, sum(pieces), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_sam_against_pytorch_optimizer(norm: str) -> None:
    """The same weights over eight steps. Its decay is the base rule's, at w: l2='descent'; its norm is summed in
    float32, which sets the tolerance. With a plain closure batch norm moves in both passes, there as here."""
    theirs = pytest.importorskip("pytorch_optimizer").SAM
    left, right = (small_network(3, torch.float64, norm) for _ in range(2))
    rule = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    ours = optim.SAM(left.parameters(), rho=0.2, m="batch", l2="descent", **rule)
    other = theirs(right.parameters(), torch.optim.SGD, rho=0.2, **rule)
    for step in range(8):
        x, y = small_batch(step, dtype=torch.float64)
        ours.step(closure_of(left, ours, x, y))
        closure = closure_of(right, other, x, y)
        closure()
        other.step(closure)
    for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def closure_of(module: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        return loss

    return closure


# bfloat16


def naive_sam(module: nn.Module, x: Tensor, y: Tensor, rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """Both gradients of a SAM that perturbs in place and leaves autocast's cache of casts alone."""
    params = list(module.parameters())
    first = torch.autograd.grad(F.cross_entropy(module(x), y), params)
    with torch.no_grad():
        norm = global_norm(first)
        for p, g in zip(params, first, strict=True):
            p.add_(g, alpha=float(rho / norm))
    second = torch.autograd.grad(F.cross_entropy(module(x), y), params)
    return list(first), list(second)


def test_one_outer_autocast_is_no_trap() -> None:
    """Within one autocast, casts of weights are cached: a naive SAM's second gradient is its first. Ours differs."""
    x, y = small_batch(rows=32)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = naive_sam(small_network(), x, y, 0.5)
    assert same(first, second), "the trap is gone: torch no longer caches casts of weights"

    module, seen = small_network(), []
    optimizer = optim.SAM(module.parameters(), lr=0.1, rho=0.5, m="batch")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(module(x), y)
                loss.backward()
                seen.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
                return loss

            optimizer.step(closure)
    assert [len(grads) for grads in seen] == [4] * 4
    assert not any(same(seen[i], seen[i + 1]) for i in range(3)), "perturbation or step was not seen by the forward"
    exact = naive_sam(small_network(), x, y, 0.5)[1]
    assert cosine(seen[1], exact) > 0.99


def cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (left, right))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("outer", [False, True])
def test_bfloat16_keeps_the_direction_of_sam(outer: bool) -> None:
    """The gradient of SAM in bfloat16 lies along that of float32, also inside a user's autocast."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    found: dict[str, dict[str, list[Tensor]]] = {}
    for precision in ("fp32", "bf16"):
        for name in ("sgd", "sam"):
            net = Net(models.build("resnet8", 4, 1, seed=0).train(), precision)
            objective = Objective(net, Task(0, x, y), cross_entropy)
            with torch.autocast("cpu", torch.bfloat16, outer and precision == "bf16"):
                logits = net.logits(x, grad=False)
                assert logits.dtype == torch.float32
                grads = member(name, net.params, **({"rho": 0.1} if name == "sam" else {})).gradient(objective, None)
            found.setdefault(precision, {})[name] = grads
    assert cosine(found["bf16"]["sam"], found["fp32"]["sam"]) > 0.9
    # what SAM lives by is the difference of its two gradients: that, too, must survive
    change = {p: [a - b for a, b in zip(g["sam"], g["sgd"], strict=True)] for p, g in found.items()}
    assert cosine(change["bf16"], change["fp32"]) > 0.9


# laws of every member


@pytest.mark.parametrize("name", MEMBERS)
def test_null_setting_is_the_base_rule_bit_for_bit(name: str) -> None:
    cls = OPTIMIZERS[name]
    assert cls.null or issubclass(cls, SGD), "say with which options a step is the base's"
    base = "adamw" if name == "adamw" else "sgd"
    results = []
    for build in (partial(member, "sgd", base=base), partial(member, name, **cls.null)):
        net = any_net(4, "batch")
        train(build(net.named, weight_decay=0.01, clip=0.5), net, range(5))
        results.append(bits(net.params))
    assert same(*results)


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_base_rule_is_torchs(base: Any) -> None:
    """The rule at the bottom is torch.optim's own, reached by another way."""
    net, other = Net(small_network(5)), Net(small_network(5))
    if base == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(
            other.params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
        )
    else:
        rule = torch.optim.Adam if base == "adam" else torch.optim.AdamW
        reference = rule(other.params, lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
    optimizer = SGD(net.params, base=base, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    train(optimizer, net, range(4))
    for step in range(4):
        reference.step(Objective(other, Task(0, *small_batch(step)), cross_entropy))
    for a, b in zip(net.params, other.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Spy(Objective):
    """Notes how far the weights stand from ``origin`` at each evaluation; raises at evaluation ``fail_at``."""

    origin: list[Tensor]
    units: list[Tensor]
    distances: list[float]
    fail_at = 0

    def output(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        moved = [(p.detach() - o) / u for p, o, u in zip(self.params, self.origin, self.units, strict=True)]
        self.distances.append(float(global_norm(moved)))
        if len(self.distances) == self.fail_at:
            raise RuntimeError("stop")
        return super().output(*args, **kwargs)


def spy(net: Net, step: int = 9) -> Spy:
    objective = Spy(net, small_task(step, net.params[0].dtype), cross_entropy)
    objective.origin, objective.distances = bits(net.params), []
    objective.units = [torch.ones_like(p) for p in net.params]
    return objective


@pytest.mark.parametrize("name", MEMBERS)
def test_weights_are_restored_exactly(name: str) -> None:
    """To the bit, after the gradient and after an evaluation that raised; w + e - e would differ."""
    net = any_net(6)
    optimizer = member(name, net.named)
    train(optimizer, net, range(2))
    before = bits(net.params)
    objective = spy(net)
    optimizer.gradient(objective, None)
    assert same(net.params, before)
    for fail_at in range(1, len(objective.distances) + 1):
        broken = spy(net)
        broken.fail_at = fail_at
        with pytest.raises(RuntimeError, match="stop"):
            optimizer.gradient(broken, None)
        assert same(net.params, before)


WHOLE = {  # settings under which all of the perturbation is one step along the gradient
    "ncsam": {"gamma": 0.0}, "looksam": {"interval": 1}, "lookbehind": {"steps": 1}, "esam": {"beta": 1.0},
    "esam-inverse": {"beta": 1.0}, "ssam-f": {"sparsity": 0.0}, "cr-sam": {"probe": "random"},
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_RADIUS)
def test_radius(name: str) -> None:
    """The weights move by rho over all tensors together, in two param groups too; asam: in units of their sizes."""
    rho = 0.37
    net = any_net(7, kind=Float64, dtype=torch.float64)
    optimizer = member(name, [{"params": net.named[:2]}, {"params": net.named[2:]}], rho=rho, **WHOLE.get(name, {}))
    train(optimizer, net, range(2))
    objective = spy(net)
    if name == "asam":
        objective.units = [p.detach().abs() + 0.01 if "weight" in n else torch.ones_like(p) for n, p in net.named]
    optimizer.gradient(objective, None)
    at_w = [d for d in objective.distances if d == 0]
    assert at_w if optimizer.begins_at_w else not at_w
    away = [d for d in objective.distances if d > 0]
    assert away
    assert away == pytest.approx([rho] * len(away), rel=1e-10)


@pytest.mark.parametrize("mask", ["weight", "tensor"])
def test_radius_of_esam_is_that_of_its_mask(mask: str) -> None:
    """rho / beta over the drawn weights of the unit gradient; over the drawn tensors, all of rho / beta."""
    rho, net = 0.37, Float64(small_network(7, torch.float64))
    optimizer, objective = member("esam", net.params, rho=rho, mask=mask), spy(net)
    optimizer.generator = torch.Generator().manual_seed(5)
    optimizer.gradient(objective, None)
    expected = rho / 0.6
    if mask == "weight":
        draws, g = torch.Generator().manual_seed(5), spy(net).grad()
        expected *= float(global_norm([a * (torch.rand(a.shape, generator=draws) < 0.6) for a in g]) / global_norm(g))
        assert abs(expected - rho) > 0.01
    assert objective.distances[1:] == pytest.approx([expected] * 2, rel=1e-10)


class Poisoned(TwoLayers):
    """Answers nan in its n-th forward."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__("row")
        self.poison_at, self.calls = 0, 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        features = super().features(x)
        return features * torch.nan if self.calls == self.poison_at else features


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("name", MEMBERS)
def test_step_that_is_not_finite_is_skipped_whole(name: str, earlier: int, clip: float | None) -> None:
    """Whichever evaluation fails, also in the first step of all: weights, momentum and step count stay, it is counted,
    and training goes on as if the batch had not been; but a schedule in steps goes on with it."""

    def begin(clip: float | None) -> tuple[Poisoned, Net, SharpnessAware]:
        module = Poisoned(8)
        net = Net(module, forward=WithFeatures(module))
        return module, net, member(name, net.named, weight_decay=0.01, clip=clip)

    module, net, optimizer = begin(clip)
    train(optimizer, net, range(earlier))
    module.calls = 0
    train(optimizer, net, [99])
    evaluations = module.calls
    assert evaluations >= 1
    for poisoned in range(1, evaluations + 1):
        results = []
        for poison in (False, True):
            module, net, optimizer = begin(clip)
            train(optimizer, net, range(earlier))
            assert float(optimizer.skipped) == 0
            if poison:
                before, state = bits(net.params), copy.deepcopy(optimizer.base.state_dict()["state"])
                module.calls, module.poison_at = 0, poisoned
                train(optimizer, net, [99])
                assert float(optimizer.found_inf) == 1
                assert same(net.params, before)
                assert_same_state(optimizer.base.state_dict()["state"], state)
                module.poison_at = 0
            train(optimizer, net, [50, 51])
            assert float(optimizer.found_inf) == 0
            assert float(optimizer.skipped) == poison
            results.append(bits(net.params))
        assert same(*results) or name in ("looksam", "ssam-f")  # whose mask is made once an epoch


def assert_same_state(after: dict[int, Any], before: dict[int, Any]) -> None:
    """AdamW fills its state in its first step: what is new there must be zero."""
    for place, slots in after.items():
        for key, value in slots.items():
            old = before.get(place, {}).get(key)
            assert torch.equal(value, torch.zeros_like(value) if old is None else old)


@pytest.mark.parametrize("m", ["batch", 4])
@pytest.mark.parametrize("name", MEMBERS)
def test_passes_are_as_declared(name: str, m: Any) -> None:
    """Forwards and backwards of all rows, over two periods of whatever schedule in steps there is."""
    net = any_net()
    optimizer = member(name, net.named, **({"m": m} if name in WITH_CHUNKS else {}))
    train(optimizer, net, range(10))
    before = net.forwards, net.backwards
    train(optimizer, net, range(10, 20))
    counted = net.forwards - before[0], net.backwards - before[1]
    assert counted == tuple(round(10 * 12 * passes, 9) for passes in optimizer.cost(optimizer.options))


@pytest.mark.parametrize("name", [name for name in MEMBERS if OPTIMIZERS[name].begins_at_w is not False])
def test_batch_norm_learns_from_one_clean_forward(name: str) -> None:
    """Whatever a step evaluates, the running statistics after it are those after SGD's step on the same batch."""
    found = []
    for each in ("sgd", name):
        net = any_net(3, "batch")
        optimizer = member(each, net.named)
        net.statistics.begin()
        train(optimizer, net, [0])
        net.statistics.commit(optimizer.found_inf)
        found.append(bits([b for b in net.module.buffers() if b.is_floating_point()]))
    assert same(*found)
    assert not torch.equal(found[1][0], torch.zeros(5))


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in ("sgd", "saf")])
def test_no_member_falls_into_the_autocast_trap(name: str) -> None:
    """In bfloat16, inside a user's own autocast: what a member evaluates elsewhere than at w is seen there."""
    found = []
    for each in ("sgd", name):
        module = small_network(2, norm="row")
        net = Net(module, "bf16", forward=WithFeatures(module))
        optimizer = member(each, net.named)
        train(member("sgd", net.named), net, [0])
        with torch.autocast("cpu", torch.bfloat16):
            train(optimizer, net, range(1, 3))
        found.append(bits(net.params))
    assert not same(*found)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", MEMBERS)
def test_state_dict_continues_to_the_same_bits(name: str, base: Any) -> None:
    """Written, read without pickled code, loaded into a new optimizer; no perturbation in it; refused by others."""
    net = any_net(9)
    optimizer = member(name, net.named, base=base)
    train(optimizer, net, range(3))
    buffer = io.BytesIO()
    torch.save({"net": net.module.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)

    resumed = any_net(10)
    resumed.module.load_state_dict(saved["net"])
    other = member(name, resumed.named, base=base)
    other.load_state_dict(saved["optimizer"])
    for o, n in ((optimizer, net), (other, resumed)):
        for group in o.param_groups:
            group["lr"] = 0.03  # what a schedule does must reach the base rule
        train(o, n, range(3, 6))
    assert same(net.params, resumed.params)

    stranger = member("sgd" if name != "sgd" else "sam", resumed.named)
    with pytest.raises(UserError, match=f"'{name}'"):
        stranger.load_state_dict(saved["optimizer"])

    plain = member("adamw" if name == "adamw" else "sgd", net.named, base=base)
    train(plain, net, [0])
    assert sizes(saved["optimizer"]["base"]) == sizes(plain.state_dict()["base"])
    kept = {"ssam-f": {"mask"}, "saf": {"outputs"}}.get(name, set(OPTIMIZERS[name].keeps))
    assert set(saved["optimizer"]["memory"]) == kept


def sizes(state: Any) -> list[int]:
    return sorted(t.numel() for t in tensors(state))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def test_skipped_steps_are_part_of_the_state() -> None:
    module = Poisoned(0)
    module.poison_at = 1
    optimizer = member("sam", module.parameters())
    train(optimizer, Net(module), [0])
    other = member("sam", Poisoned(1).parameters())
    other.load_state_dict(optimizer.state_dict())
    assert float(other.skipped) == 1


# in anybody's loop


@pytest.mark.parametrize("name", PLAIN)
def test_plain_closure_and_torch_schedule(name: str) -> None:
    """The same weights as with an Objective, under a scheduler of torch's; the first evaluation's loss comes back."""
    net, module = any_net(11), small_network(11, norm="row")
    optimizer, plain = member(name, net.named, lr=0.2), member(name, module.named_parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(plain, step_size=2, gamma=0.1)
    losses = []
    for step in range(6):
        x, y = small_batch(0)
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * 0.1 ** (step // 2)
        for each in (optimizer, plain):
            each.generator = torch.Generator().manual_seed(step)
        expected = optimizer.step(Objective(net, Task(0, x, y), cross_entropy))
        losses.append(plain.step(closure_of(module, plain, x, y)).item())
        assert losses[-1] == pytest.approx(float(expected), rel=1e-6)
        assert plain.param_groups[0]["lr"] == pytest.approx(0.2 * 0.1 ** (step // 2))
        schedule.step()
    for a, b in zip(module.parameters(), net.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert losses[-1] < losses[0]


def test_param_groups_keep_their_own_settings() -> None:
    """Groups with their own rate and decay, as torch's SGD treats them; the perturbation spans all groups."""
    net, other = Net(small_network(12)), Net(small_network(12))
    settings = [{"lr": 0.2, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.0}]
    groups = [
        [{"params": n.params[i : i + 2], **s} for i, s in zip((0, 2), settings, strict=True)] for n in (net, other)
    ]
    train(optim.SAM(groups[0], momentum=0.9, rho=0.0, m="batch"), net, range(3))
    reference = torch.optim.SGD(groups[1], momentum=0.9)
    for step in range(3):
        reference.step(Objective(other, Task(0, *small_batch(step)), cross_entropy))
    for a, b in zip(net.params, other.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PLAIN)
def test_frozen_and_unused_weights(name: str) -> None:
    """A frozen weight, and one that the loss does not use, are left alone, decay or not, as torch's rules do."""
    module, unused = TwoLayers("row"), nn.Parameter(torch.ones(3))
    module.inner.weight.requires_grad_(False)
    frozen, used = module.inner.weight.clone(), module.head.weight.clone()
    optimizer = member(name, [*module.named_parameters(), ("unused", unused)], weight_decay=0.1, lr=0.01)
    for step in range(2):
        optimizer.step(closure_of(module, optimizer, *small_batch(step)))
    assert torch.equal(module.inner.weight, frozen)
    assert not torch.equal(module.head.weight, used)
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("name", PLAIN)
def test_weight_that_a_later_evaluation_does_not_use(name: str) -> None:
    """It was moved with the others, and is put back with them: with a rate of zero all weights stay, to the bit."""
    params = [("a.weight", nn.Parameter(torch.tensor([0.3]))), ("b.weight", nn.Parameter(torch.tensor([0.7])))]
    a, b = (p for _, p in params)
    optimizer, evaluations = member(name, params, lr=0.0), 0

    def closure() -> Tensor:
        nonlocal evaluations
        optimizer.zero_grad()
        loss = (a**2 + b**2).sum() if evaluations == 0 else (a**2).sum()
        evaluations += 1
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert (a.item(), b.item()) == (torch.tensor(0.3).item(), torch.tensor(0.7).item())


@pytest.mark.parametrize("options", [{}, {"m": "batch"}, {"m": 4}])
@pytest.mark.parametrize("name", NEEDS_ROWS)
def test_closure_where_rows_are_needed(name: str, options: dict[str, Any]) -> None:
    module = small_network()
    optimizer = member(name, module.parameters(), **(options if name in WITH_CHUNKS else {}))
    before = bits(list(module.parameters()))
    with pytest.raises(ValueError, match="losses of single rows"):
        optimizer.step(closure_of(module, optimizer, *small_batch()))
    assert same(list(module.parameters()), before)


def test_closure_cannot_be_cut_into_chunks() -> None:
    module = small_network()
    optimizer = optim.SAM(module.parameters(), lr=0.1, m=32)
    with pytest.raises(ValueError, match="m='batch'"):
        optimizer.step(closure_of(module, optimizer, *small_batch()))
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="return the loss"):
        optim.SAM(module.parameters()).step(lambda: None)


def test_transformation_comes_before_clipping() -> None:
    """A method's transformation gets the final gradient and the weights; the norm and the clip come after it."""
    net = Float64(small_network(14, torch.float64))
    optimizer = member("sam", net.params, clip=0.5)
    seen: list[bool] = []

    def ones(grads: list[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        seen.append(all(g.shape == p.shape for g, p in zip(grads, params, strict=True)))
        return [torch.ones_like(g) for g in grads]

    optimizer.transform_gradient = ones
    train(optimizer, net, [0])
    count = sum(p.numel() for p in net.params)
    assert seen == [True]
    assert float(optimizer.norm) == pytest.approx(math.sqrt(count))
    assert all(torch.allclose(p.grad, torch.tensor(0.5 / math.sqrt(count)).double()) for p in net.params)


@pytest.mark.parametrize("name", MEMBERS)
def test_transformation_covers_the_whole_step(name: str) -> None:
    """With all gradients transformed to zero no weight moves; halved, they make a step of half the length."""
    moves = []
    for factor in (0.0, 0.5, 1.0):
        net = any_net(14, dtype=torch.float64)
        optimizer = member(name, net.named, momentum=0.0, nesterov=False, lr=0.01)
        optimizer.transform_gradient = lambda grads, _, factor=factor: [g * factor for g in grads]
        before = bits(net.params)
        train(optimizer, net, [0])
        moves.append(torch.cat([(a - b).flatten() for a, b in zip(net.params, before, strict=True)]).detach())
    assert not moves[0].any()
    assert moves[2].norm() > 1e-4
    if name != "adamw":  # which does not see the length of a gradient
        torch.testing.assert_close(moves[1], moves[2] / 2, rtol=1e-6, atol=1e-12)


def test_wsam_clips_each_of_its_gradients() -> None:
    """The sharpness is the difference of the clipped gradients, so that it is no longer than twice the bound."""
    net = any_net(14, dtype=torch.float64)
    optimizer = member("wsam", net.named, momentum=0.0, nesterov=False, rho=2.0, gamma=0.9, clip=0.01)
    before = bits(net.params)
    train(optimizer, net, [0])
    move = global_norm([a.detach() - b for a, b in zip(net.params, before, strict=True)])
    assert float(move) <= 0.1 * (0.01 + 9 * 2 * 0.01)


def test_mask_is_not_made_from_a_step_that_was_skipped() -> None:
    """SSAM-F makes its mask in the first step of an epoch; if that one is not finite, the mask before it stays, which
    at first is all weights."""
    module = Poisoned(8)
    net = Net(module, forward=WithFeatures(module))
    optimizer = member("ssam-f", net.named)
    module.poison_at = 2  # the forward of the Fisher information
    train(optimizer, net, [0])
    assert float(optimizer.found_inf) == 1
    assert all(bool(mask.all()) for mask in optimizer.memory["mask"])
    train(optimizer, net, [1])
    assert float(optimizer.found_inf) == 0
    optimizer.on_epoch(1, 2, 8)
    train(optimizer, net, [2])
    kept = [mask.clone() for mask in optimizer.memory["mask"]]
    assert not all(bool(mask.all()) for mask in kept)
    optimizer.on_epoch(2, 3, 8)
    module.poison_at = module.calls + 2
    train(optimizer, net, [3])
    assert float(optimizer.found_inf) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, optimizer.memory["mask"], strict=True))


# in anybody's loop: options in param groups


def other_value(name: str, option: str, default: Any) -> Any:
    """A valid value that is not the default."""
    if option == "m":
        return 4
    if (name, option) == ("gc-sam", "high"):
        return 0.9
    return default + 1 if isinstance(default, int) else default / 2 or 0.25


NUMBERS = [
    (name, option)
    for name, cls in OPTIMIZERS.items()
    for option, value in cls.Options().model_dump().items()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_option_may_be_changed_in_the_param_groups(name: str, option: str) -> None:
    """As schedulers do it: from then on a step is that of an optimizer created with the new value."""
    value = other_value(name, option, OPTIMIZERS[name].Options.model_fields[option].default)
    results = []
    for created in (True, False):
        net = any_net(3)
        groups = [{"params": net.named[:2]}, {"params": net.named[2:]}]
        optimizer = member(name, groups, **({option: value} if created else {}))
        for group in optimizer.param_groups:
            assert group[option] == value or not created
            group[option] = value
        train(optimizer, net, range(2))
        results.append(bits(net.params))
    assert same(*results)


def test_radius_of_each_group() -> None:
    """L = w'Aw / 2: the gradient is A (w + rho_i (Aw)_i / |Aw|), with the norm over both groups."""
    matrix = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.5]], dtype=torch.float64)
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    first, second = start[:1].clone().requires_grad_(), start[1:].clone().requires_grad_()
    optimizer = optim.SAM([{"params": [first], "rho": 0.7}, {"params": [second]}], lr=0.1, momentum=0.0, rho=0.2)

    def closure() -> Tensor:
        w = torch.cat([first, second])
        loss = w @ matrix @ w / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    g = matrix @ start
    there = matrix @ (start + torch.tensor([0.7, 0.2, 0.2], dtype=torch.float64) * g / g.norm())
    torch.testing.assert_close(torch.cat([first, second]).detach(), start - 0.1 * there, rtol=1e-12, atol=1e-14)


def test_options_of_a_group_are_checked() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="optimizer sam: option rho"):
        optim.SAM([a], rho=-1.0)
    with pytest.raises(UserError, match="optimizer sam: option rho"):
        optim.SAM([{"params": [a], "rho": -1.0}])
    optimizer = optim.SAM([{"params": [a]}, {"params": [b], "ascent_steps": 2}])
    with pytest.raises(UserError, match="option ascent_steps must be the same in all param groups"):
        optimizer.step(lambda: (a + b).sum())


def test_extrapolation_takes_the_rate_of_each_group() -> None:
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = optim.ExtrapSGD(
        [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}], form="extragradient", momentum=0.0
    )

    def closure() -> Tensor:
        loss = (a**2 + b**2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert a.item() == pytest.approx(1 - 0.1 * (1 - 0.1))
    assert b.item() == pytest.approx(1 - 0.01 * (1 - 0.01))


def test_radius_of_gsam_follows_the_rate_up_to_rho() -> None:
    """Under OneCycleLR, whose peak is five times the rate at creation; a loaded state continues at the same radius."""
    net = any_net(7, kind=Float64, dtype=torch.float64)

    def begin() -> tuple[SharpnessAware, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = member("gsam", net.named, lr=0.02, rho=0.3, rho_min=0.1)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    optimizer, schedule = begin()
    radii = []
    for step in range(10):
        objective = spy(net)
        optimizer.gradient(objective, None)
        radii.append(objective.distances[-1])
        if step == 6:
            other, _ = begin()
            other.load_state_dict(optimizer.state_dict())
            objective = spy(net)
            other.gradient(objective, None)
            assert objective.distances[-1] == pytest.approx(radii[-1], rel=1e-12)
        optimizer.step(Objective(net, small_task(step, torch.float64), cross_entropy))
        schedule.step()
    assert max(radii) == pytest.approx(0.3, rel=1e-6)
    assert 0.1 <= radii[0] < 0.12
    assert radii[-1] < 0.11


# in anybody's loop: parameters come, go and change


def freeze(module: nn.Module, frozen: bool) -> None:
    for p in module.inner.parameters():  # type: ignore[union-attr]
        p.requires_grad_(not frozen)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", PLAIN)
def test_freezing_and_unfreezing(name: str, base: Any) -> None:
    """Between steps, as with torch's own rules: frozen weights rest, decay or not, and go on with their momentum."""
    module, other = small_network(12, norm="row"), small_network(12, norm="row")
    base = "adamw" if name == "adamw" else base
    optimizer = member(name, module.named_parameters(), base=base, weight_decay=0.1, **OPTIMIZERS[name].null)
    if base == "sgd":
        reference: Any = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    else:
        reference = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.1)
    for step, frozen in enumerate((True, True, False, False, True, False)):
        for each, rule in ((module, optimizer), (other, reference)):
            freeze(each, frozen)
            rule.step(closure_of(each, rule, *small_batch(step)))
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEMBERS)
def test_members_follow_their_parameters(name: str) -> None:
    """What a member remembers of frozen weights is kept, of new ones begun; a later state is loaded whole."""
    module = small_network(12, norm="row")
    freeze(module, True)
    optimizer = member(name, module.named_parameters())
    for step, frozen in enumerate((True, False, True, False)):
        freeze(module, frozen)
        before = bits(list(module.inner.parameters()))  # type: ignore[union-attr]
        train(optimizer, Net(module, forward=WithFeatures(module)), [step])
        assert float(optimizer.skipped) == 0
        assert same(before, list(module.inner.parameters())) == frozen  # type: ignore[union-attr]
    other = member(name, module.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert all(same(optimizer.memory[key], other.memory[key]) for key in optimizer.memory)


@pytest.mark.parametrize("name", PLAIN)
def test_added_param_group(name: str) -> None:
    """With a rate of its own, and options by default; perturbations span it at once."""
    module, other = small_network(12, norm="row"), small_network(12, norm="row")
    optimizer = member(name, list(module.named_parameters())[2:], **OPTIMIZERS[name].null)
    adam = isinstance(optimizer.base, torch.optim.AdamW)
    reference: Any = (
        torch.optim.AdamW(list(other.parameters())[2:], lr=0.1, weight_decay=0.0)
        if adam
        else torch.optim.SGD(list(other.parameters())[2:], lr=0.1, momentum=0.9, nesterov=True)
    )
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(module.named_parameters())[:2], "lr": 0.01})
            reference.add_param_group({"params": list(other.parameters())[:2], "lr": 0.01})
        for each, rule in ((module, optimizer), (other, reference)):
            each.zero_grad()
            rule.step(closure_of(each, rule, *small_batch(step)))
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(optimizer.params) == 6
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", PLAIN)
def test_cast_after_construction(name: str, steps: int) -> None:
    """``model.double()`` before the first step or between steps: state and memory follow, and no step is skipped."""
    module = small_network(3, norm="row")
    optimizer = member(name, module.named_parameters(), weight_decay=0.01)
    for step in range(steps + 2):
        if step == steps:
            module.double()
        x, y = small_batch(step, dtype=next(module.parameters()).dtype)
        optimizer.step(closure_of(module, optimizer, x, y))
    assert float(optimizer.skipped) == 0
    kept = [t for p, state in optimizer.state.items() for t in state.values() if t.shape == p.shape]
    assert {t.dtype for t in [*kept, *(t for ts in optimizer.memory.values() for t in ts)]} <= {torch.float64}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MEMBERS)
def test_copies_continue_alike(name: str, way: str) -> None:
    """A copy of a network with its optimizer, scheduler attached, goes on to the same bits and leaves the original."""
    net = any_net(3)
    optimizer = member(name, net.named)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, net, range(2))
    pair = (net.module, optimizer)
    module, twin = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = bits(net.params)
    other = Net(module, forward=WithFeatures(module))
    train(twin, other, range(2, 4))
    assert same(net.params, before)
    train(optimizer, net, range(2, 4))
    assert same(net.params, other.params)


def test_nothing_to_train() -> None:
    module = small_network()
    for p in module.parameters():
        p.requires_grad_(False)
    optimizer = optim.SAM(module.parameters(), lr=0.1)
    with pytest.raises(UserError, match="no parameter requires a gradient"):
        optimizer.step(closure_of(module, optimizer, *small_batch()))


# in anybody's loop: closures


def test_three_lines_of_anybody() -> None:
    """No option but the rate: m is the batch, momentum 0.9 and not Nesterov's, as torch's SGD has it."""
    module, other = small_network(5), small_network(5)
    reference = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    plain, sam = optim.SGD(module.parameters(), lr=0.1), optim.SAM(small_network(5).parameters(), lr=0.1)
    for step in range(3):
        for each, rule in ((module, plain), (other, reference)):
            rule.step(closure_of(each, rule, *small_batch(step)))
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert not sam.param_groups[0]["nesterov"]

    results = []
    for settings in ({}, {"m": "batch"}):
        module = small_network(5)
        sam = optim.SAM(module.parameters(), lr=0.1, **settings)
        for step in range(3):
            sam.step(closure_of(module, sam, *small_batch(step)))
        results.append(bits(list(module.parameters())))
    assert same(*results)


def test_settings_of_adamw() -> None:
    module, other = small_network(5), small_network(5)
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    ours, reference = optim.AdamW(module.parameters(), **settings), torch.optim.AdamW(other.parameters(), **settings)
    for step in range(4):
        for each, rule in ((module, ours), (other, reference)):
            rule.step(closure_of(each, rule, *small_batch(step)))
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="betas"):
        optim.SAM(module.parameters(), betas=(0.9, 0.99))


@pytest.mark.parametrize("name", PLAIN)
def test_closure_need_not_clear_gradients(name: str) -> None:
    """Gradients of one evaluation are never added to those of the next."""
    results = []
    for clears in (True, False):
        module = small_network(11, norm="row")
        optimizer = member(name, module.named_parameters())

        for step in range(3):
            optimizer.generator = torch.Generator().manual_seed(step)
            clearing = closure_of(module, optimizer, *small_batch(step))
            optimizer.step(clearing if clears else partial(loss_of, module, *small_batch(step)))
        results.append(bits(list(module.parameters())))
    assert same(*results)


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A closure that does not clear."""
    loss = F.cross_entropy(module(x), y)
    loss.backward()
    return loss


def test_grad_scaler() -> None:
    """Refused in one line that says what to do; a disabled one is no hindrance."""
    module = small_network()
    optimizer = optim.SAM(module.parameters(), lr=0.1)
    closure = closure_of(module, optimizer, *small_batch())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(closure())
    with pytest.raises(UserError, match="bfloat16") as caught:
        scaler.step(optimizer, closure)
    assert "\n" not in str(caught.value)
    before = bits(list(module.parameters()))
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer, closure)
    assert not same(before, list(module.parameters()))


@pytest.mark.parametrize("name", PLAIN)
def test_running_statistics_once(name: str) -> None:
    """Batch norm counts one batch per step, the first that is evaluated; flags are restored, also after an error."""
    module = small_network(3, norm="batch")
    first = copy.deepcopy(module.norm)
    optimizer = member(name, module.named_parameters())
    x, y = small_batch()
    outputs: list[Tensor] = []
    module.inner.register_forward_hook(lambda *args: outputs.append(args[2].detach().clone()))  # type: ignore[union-attr]

    def closure() -> Tensor:
        with optim.update_statistics_once(module, optimizer):
            loss = F.cross_entropy(module(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    first(outputs[0])
    assert torch.equal(module.norm.running_mean, first.running_mean)
    assert torch.equal(module.norm.running_var, first.running_var)
    optimizer.step(closure)
    assert int(module.norm.num_batches_tracked) == 2
    optimizer.evaluations = 2
    with suppress(RuntimeError), optim.update_statistics_once(module, optimizer):
        assert not module.norm.track_running_stats
        raise RuntimeError
    assert module.norm.track_running_stats


@pytest.mark.parametrize("name", MEMBERS)
def test_printed_passes_are_the_cost(name: str) -> None:
    cls = OPTIMIZERS[name]
    other = {
        option: other_value(name, option, cls.Options.model_fields[option].default)
        for n, option in NUMBERS
        if n == name
    }
    literals = {"probe": "random"} if name == "cr-sam" else {"form": "extragradient"} if name == "extrap-sgd" else {}
    for options in (cls.Options(), cls.Options(**other), cls.Options(**literals)):
        assert tuple(cls.cost(options)) == tuple(eval(text, {}, options.model_dump()) for text in cls.passes)


@pytest.mark.parametrize("name", MEMBERS)
def test_gradient_of_zero_moves_nothing(name: str) -> None:
    """At a stationary point the direction is zero, not nan."""
    net = any_net()
    optimizer = member(name, net.named, **(OPTIMIZERS[name].null if name in ("reg-sgd", "mesa") else {}))
    before = bits(net.params)
    for _ in range(2):
        optimizer.step(Objective(net, small_task(0), lambda logits, task: logits.sum(1) * 0))
    assert float(optimizer.found_inf) == 0
    assert same(net.params, before)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sam", {"rho": -1.0}, "rho"),
        ("sam", {"radius": 1.0}, "radius"),
        ("esam", {"gamma": 0.0}, "gamma"),
        ("sam", {"m": "some"}, "option m"),
        ("sam", {"m": 0}, "option m"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        optim.options(name, options)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flag_that_does_not_apply() -> None:
    with pytest.raises(UserError, match="--rho"):
        optim.options("sgd", {}, rho=0.1)
    with pytest.raises(UserError, match="--sam-m"):
        optim.options("msam", {}, m=8)
    with pytest.raises(UserError, match="--ascent-steps"):
        optim.options("asam", {}, ascent_steps=2)
    chosen = optim.options("sam", {}, rho=0.2, m="batch", ascent_steps=3).model_dump()
    assert chosen == {"rho": 0.2, "m": "batch", "ascent_steps": 3, "interval": 1}


def test_sam_on_spares_the_other_weights_their_first_gradient() -> None:
    """In its first evaluation only the norm layer's weights are in the graph; in the second, and after it, all are."""
    net = any_net()
    optimizer, seen = member("sam-on", net.named), []
    forward = net.module.forward

    def watched(x: Tensor) -> Tensor:
        seen.append([name for name, p in net.module.named_parameters() if p.requires_grad])
        out: Tensor = forward(x)
        return out

    net.module.forward = watched  # type: ignore[method-assign]
    net.forward = net.module
    train(optimizer, net, [0])
    every = [name for name, _ in net.named]
    assert seen == [["norm.weight", "norm.bias"], every]
    assert all(p.requires_grad for p in net.params)
