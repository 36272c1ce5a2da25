"""Every optimizer against a recursion in numpy, written from the equation in its docstring.

``tests/parity`` compares with the authors' steps. This file covers what those lack: chunks of m rows, Nesterov momentum
and the forms and branches that no released code has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from noisysam.core.network import Net, WithFeatures
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.optim import OPTIMIZERS

Array = npt.NDArray[np.float64]
Arrays = list[Array]
Index = npt.NDArray[np.int64]

STEPS, ROWS, SAMPLES, EPOCHS = 10, 12, 30, 8  # two steps to an epoch: 5 epochs of 8, each without 6 of the samples
LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01

# what is optimized: once in torch, once in numpy


class Network(nn.Module):
    """tanh perceptron of one hidden layer, with a norm layer before the tanh where asked for."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5) if norm else nn.Identity()
        self.head = nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Float64(Net):
    """A Net whose logits stay float64, for comparisons to the last digits."""

    def logits(
        self, inputs: Tensor, grad: bool, weights: Sequence[Tensor] | None = None, forwards: tuple[int, ...] = ()
    ) -> Tensor:
        with torch.set_grad_enabled(grad):
            if weights is not None:
                values = {name: w for (name, _), w in zip(self.named, weights, strict=True)}
                return functional_call(self.module, values, (inputs,))
            logits, self.features = self.forward(inputs)
            return logits


def weighted_cross_entropy(logits: Tensor, task: Task) -> Tensor:
    return task.plan["weight"] * F.cross_entropy(logits, task.labels, reduction="none")


@dataclass
class Rows:
    """Some rows of a batch, as numpy knows them."""

    x: Array
    y: Index
    index: Index
    weight: Array  # of each row's loss

    def take(self, rows: Any, y: Index | None = None) -> "Rows":
        return Rows(self.x[rows], self.y[rows] if y is None else y, self.index[rows], self.weight[rows])


def batch(step: int, silent: tuple[int, ...]) -> Rows:
    """Two batches of each epoch's order; rows whose loss is nothing where ``silent``."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(SAMPLES, 6)), rng.integers(3, size=SAMPLES)
    order = np.random.default_rng(100 + step // 2).permutation(SAMPLES)
    index = order[:ROWS] if step % 2 == 0 else order[ROWS : 2 * ROWS]
    return Rows(x[index], y[index], index, np.where(np.isin(np.arange(ROWS), silent), 0.0, 1.0))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class Perceptron:
    """The network with softmax cross-entropy, forward and backward written out."""

    def __init__(self, w: Arrays, rows: Rows) -> None:
        self.w, self.rows = w, rows
        a = rows.x @ w[0].T + w[1]
        if len(w) == 6:  # a layer norm between
            centred = a - a.mean(1, keepdims=True)
            self.spread = np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
            self.normed = centred / self.spread
            a = self.normed * w[2] + w[3]
        self.h = np.tanh(a)
        self.z = self.h @ w[-2].T + w[-1]

    def losses(self) -> Array:
        return -self.rows.weight * np.log(softmax(self.z)[np.arange(len(self.z)), self.rows.y])

    def loss(self) -> float:
        return float(self.losses().mean())

    def residual(self) -> Array:
        """Derivative of the mean loss by the logits."""
        return self.rows.weight[:, None] * (softmax(self.z) - np.eye(3)[self.rows.y]) / len(self.z)

    def pull(self, dz: Array, dh: Array | float = 0.0) -> Arrays:
        """Derivatives by the weights from those by the logits and the hidden units."""
        da = (dz @ self.w[-2] + dh) * (1 - self.h**2)
        norm: Arrays = []
        if len(self.w) == 6:
            norm = [(da * self.normed).sum(0), da.sum(0)]
            dn = da * self.w[2]
            da = dn - dn.mean(1, keepdims=True) - self.normed * (dn * self.normed).mean(1, keepdims=True)
            da = da / self.spread
        return [da.T @ self.rows.x, da.sum(0), *norm, dz.T @ self.h, dz.sum(0)]

    def gradient(self) -> Arrays:
        return self.pull(self.residual())


def inner(a: Arrays, b: Arrays) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def length(a: Arrays) -> float:
    return math.sqrt(inner(a, a))


def times(a: Arrays, factor: float) -> Arrays:
    return [factor * x for x in a]


def plus(a: Arrays, b: Arrays, factor: float = 1.0) -> Arrays:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def product(a: Arrays, b: Sequence[npt.NDArray[Any]]) -> Arrays:
    return [x * y for x, y in zip(a, b, strict=True)]


def unit(a: Arrays) -> Arrays:
    return times(a, 1 / length(a) if length(a) else 0.0)


def along(a: Arrays, b: Arrays) -> Arrays:
    """The part of a along b."""
    return times(unit(b), inner(a, unit(b)))


def zeros(a: Arrays) -> Arrays:
    return [np.zeros_like(x) for x in a]


# the base rules


class Momentum:
    """v <- mu v + g; w <- w - lr (g + mu v), with decay in g."""

    def __init__(self, w: Arrays) -> None:
        self.w, self.lr, self.v = w, LR, zeros(w)

    def step(self, g: Arrays) -> None:
        g = plus(g, self.w, DECAY)
        self.v = plus(g, self.v, MOMENTUM)
        self.w = plus(self.w, plus(g, self.v, MOMENTUM), -self.lr)


class Adam(Momentum):
    """Decoupled decay, moments corrected for their start."""

    def __init__(self, w: Arrays) -> None:
        super().__init__(w)
        self.square, self.count = zeros(w), 0

    def step(self, g: Arrays) -> None:
        self.count += 1
        self.v = plus(times(self.v, MOMENTUM), g, 1 - MOMENTUM)
        self.square = plus(times(self.square, 0.999), product(g, g), 1 - 0.999)
        mean, square = 1 - MOMENTUM**self.count, 1 - 0.999**self.count
        ratio = [(v / mean) / (np.sqrt(s / square) + 1e-8) for v, s in zip(self.v, self.square, strict=True)]
        self.w = plus(self.w, plus(ratio, self.w, DECAY), -self.lr)


# the equations: each gives a step's gradient for a chunk


@dataclass
class Chunk:
    """What an equation sees: a chunk of rows in one step."""

    o: dict[str, Any]  # the member's options
    rows: Rows
    batch: Rows  # all rows of the step
    w: Arrays
    v: Arrays  # the base rule's momentum before this step
    lr: float
    step: int
    epoch: int
    draws: torch.Generator
    old: dict[str, Arrays]  # what was kept of earlier steps
    memo: dict[Any, Any]  # what is not kept as a mean over chunks
    seen: set[str]  # the branches taken
    new: dict[str, Arrays] = field(default_factory=dict)  # kept: the mean over chunks

    def net(self, w: Arrays | None = None) -> Perceptron:
        return Perceptron(self.w if w is None else w, self.rows)

    def grad(self, direction: Arrays | None = None, radius: float = 0.0) -> Arrays:
        """The gradient at w, or at w + radius direction."""
        return self.net(None if direction is None else plus(self.w, direction, radius)).gradient()

    def pair(self) -> tuple[Arrays, Arrays]:
        """The gradient g and SAM's, at w + rho g / |g|."""
        g = self.grad()
        return g, self.grad(unit(g), self.o["rho"])

    def normal(self) -> Arrays:
        return [torch.randn(a.shape, generator=self.draws, dtype=torch.float64).numpy() for a in self.w]


def sgd(c: Chunk) -> Arrays:
    return c.grad()


def sam(c: Chunk) -> Arrays:
    rho = c.o["rho"]
    if c.step % c.o.get("interval", 1):
        return c.grad()
    e = times(unit(c.grad()), rho)
    for _ in range(c.o.get("ascent_steps", 1) - 1):
        e = plus(e, unit(c.grad(e, 1)), rho)
        e = times(e, min(1.0, rho / length(e))) if length(e) else e
    return c.grad(e, 1)


def sam_random(c: Chunk) -> Arrays:
    return c.grad(unit(c.normal()), c.o["rho"])


def asam(c: Chunk) -> Arrays:
    scaled = (True, c.o["rule"] == "all", True, c.o["rule"] == "all")
    t = [np.abs(a) + c.o["eta"] if s else np.ones_like(a) for a, s in zip(c.w, scaled, strict=True)]
    g = c.grad()
    e = times(product(product(t, t), g), c.o["rho"] / length(product(t, g)))
    return c.grad(e, 1)


def sam_on(c: Chunk) -> Arrays:
    g = c.grad()
    return c.grad(unit([a if place in (2, 3) else 0 * a for place, a in enumerate(g)]), c.o["rho"])


def f_sam(c: Chunk) -> Arrays:
    g, old = c.grad(), c.old.get("m", zeros(c.w))
    m = plus(times(old, c.o["decay"]), g, 1 - c.o["decay"])
    if c.o["form"] == "released":
        c.new["m"] = m if c.step else g
        m = old
    else:
        c.new["m"] = m
    return c.grad(unit(plus(g, m, -c.o["sigma"])), c.o["rho"])


def vasso(c: Chunk) -> Arrays:
    g, theta = c.grad(), c.o["theta"]
    c.new["d"] = plus(times(c.old["d"], 1 - theta), g, theta) if c.step else g
    return c.grad(unit(c.new["d"]), c.o["rho"])


def msam(c: Chunk) -> Arrays:
    return c.grad(unit(c.v), -c.o["rho"])


def ssam_f(c: Chunk) -> Arrays:
    if c.memo.get("epoch") != c.epoch:  # the mask of an epoch is made at its first step
        rows = [c.batch.take(slice(i, i + 1)) for i in range(c.o["samples"])]
        fisher = np.mean([flat(Perceptron(c.w, row).gradient()) ** 2 for row in rows], axis=0)
        mask = np.zeros(len(fisher))
        mask[np.argsort(-fisher)[: int((1 - c.o["sparsity"]) * len(fisher))]] = 1
        c.memo.update(epoch=c.epoch, mask=mask)
    cuts = np.split(c.memo["mask"], np.cumsum([a.size for a in c.w])[:-1])
    mask_parts = [part.reshape(a.shape) for part, a in zip(cuts, c.w, strict=True)]
    return c.grad(product(unit(c.grad()), mask_parts), c.o["rho"])


def flat(a: Arrays) -> Array:
    return np.concatenate([x.ravel() for x in a])


def ncsam(c: Chunk) -> Arrays:
    g = c.grad()
    if c.epoch < c.o["warmup"]:
        return g
    n = len(c.rows.y)
    count = math.ceil(c.o["flip"] * n)
    chosen = torch.randperm(n, generator=c.draws).numpy()[:count]
    shift = torch.randint(1, 3, (count,), generator=c.draws).numpy()
    chosen = np.sort(chosen)
    false = c.rows.take(chosen, (c.rows.y[chosen] + shift) % 3)
    p = (c.epoch + 1) / EPOCHS
    c.seen.add("full" if 2 * p**2 * (3 - 2 * p) > 1 else "growing")
    s = min(1.0, 2 * p**2 * (3 - 2 * p))
    e = plus(times(unit(g), c.o["rho"]), Perceptron(c.w, false).gradient(), c.o["gamma"] * s)
    return c.grad(e, 1)


def gsam(c: Chunk) -> Arrays:
    g = c.grad()
    radius = c.o["rho_min"] + (c.o["rho"] - c.o["rho_min"]) * c.lr / LR
    there = c.grad(unit(g), radius)
    return plus(there, plus(g, along(g, there), -1), -c.o["alpha"])


def looksam(c: Chunk) -> Arrays:
    if c.step % c.o["interval"]:
        g = c.grad()
        return plus(g, unit(c.old["v"]), c.o["alpha"] * length(g))
    g, there = c.pair()
    c.new["v"] = plus(there, along(there, g), -1)
    return there


def wsam(c: Chunk) -> Arrays:
    g, there = c.pair()
    c.new["sharpness"] = times(plus(there, g, -1), c.o["gamma"] / (1 - c.o["gamma"]))
    return g if c.o["decouple"] else plus(g, c.new["sharpness"])


def stable_sam(c: Chunk) -> Arrays:
    g, there = c.pair()
    return times(unit(there), length(g))


def saner(c: Chunk) -> Arrays:
    g, there = c.pair()
    alpha = c.o["alpha"] * min(1.0, (c.epoch + 1) / c.o["warmup"])
    c.seen.add("full" if alpha == c.o["alpha"] else "growing")
    return [np.where((b / a > 0) & (b / a < 1), (1 - alpha) * b, b) for a, b in zip(g, there, strict=True)]


def gc_sam(c: Chunk) -> Arrays:
    g, there = c.pair()

    def constrained(x: Arrays, y: Arrays) -> Arrays:
        cosine = inner(unit(x), unit(y))
        if cosine >= c.o["high"]:
            c.seen.add("sam")
            return x
        if cosine <= c.o["low"]:
            c.seen.add("low")
            if c.o["low"] > 0:
                return y
        else:
            c.seen.add("between")
        return along(x, plus(x, y))

    if c.o["scope"] == "global":
        return constrained(there, g)
    return [constrained([a], [b])[0] for a, b in zip(there, g, strict=True)]


def cr_sam(c: Chunk) -> Arrays:
    rho, here, g = c.o["rho"], c.net().loss(), c.grad()
    v = unit(c.normal()) if c.o["probe"] == "random" else unit(g)
    above, below = (c.net(plus(c.w, v, sign * rho)) for sign in (1, -1))
    curvature = plus(plus(above.gradient(), below.gradient()), g, -2)
    slope = plus(above.gradient(), below.gradient(), -1)
    if c.o["form"] == "paper":  # the derivative of a logarithm, where there is one, above a floor
        curvature = times(curvature, over(above.loss() + below.loss() - 2 * here, c))
        rise = above.loss() - below.loss()  # of either sign: log |rise| has a gradient all the same
        c.seen.add("negative" if rise <= 0 else "divided")
        slope = times(slope, np.sign(rise) / max(abs(rise), c.o["floor"]))
    return plus(plus(c.grad(unit(g), rho), curvature, c.o["gamma"]), slope, c.o["beta"])


def over(difference: float, c: Chunk) -> float:
    c.seen.add("negative" if difference <= 0 else "floor" if difference < c.o["floor"] else "divided")
    return 1 / max(difference, c.o["floor"]) if difference > 0 else 0.0


def lookbehind(c: Chunk) -> Arrays:
    u = c.w
    for k in range(c.o["steps"]):
        u = plus(u, unit(c.net(u).gradient()), c.o["rho"])
        c.new[f"g{k}"] = c.net(u).gradient()
    return c.new["g0"]


def esam(c: Chunk) -> Arrays:
    here, beta = c.net(), c.o["beta"]
    g = here.gradient()
    if c.o["mask"] == "weight":
        masks = [(torch.rand(a.shape, generator=c.draws) < beta).numpy() for a in c.w]
        e = times(product(unit(g), masks), c.o["rho"] / beta)
    else:  # whole tensors, at least one; those not drawn have no part in the first gradient
        draws = torch.rand(len(c.w), generator=c.draws).numpy()
        drawn = [draw < beta or draw == draws.min() for draw in draws]
        c.seen.add("at least one" if (draws >= beta).all() else "some")
        e = times(unit([a * d for a, d in zip(g, drawn, strict=True)]), c.o["rho"] / beta)
    there = plus(c.w, e)
    rise = c.net(there).losses() - here.losses()
    if c.o.get("inverse"):
        rise = np.where(here.losses() == 0, -np.inf, -rise)
    kept = np.argsort(-rise, kind="stable")[: math.ceil(c.o["gamma"] * len(rise))]
    return Perceptron(there, c.rows.take(kept)).gradient()


def esam_inverse(c: Chunk) -> Arrays:
    c.o = {**c.o, "inverse": True}
    return esam(c)


def j_sam(c: Chunk) -> Arrays:
    here = c.net()
    return c.net(plus(c.w, unit(here.gradient()), c.o["rho"])).pull(here.residual())


def l_sam(c: Chunk) -> Arrays:
    here = c.net()
    return here.pull(c.net(plus(c.w, unit(here.gradient()), c.o["rho"])).residual())


def pulled_to(c: Chunk, target: Array, known: Array | float = 1.0) -> Arrays:
    """The gradient of L + lam KL(softmax(target / tau) || softmax(z / tau)), over the rows that are known."""
    here, tau = c.net(), c.o["tau"]
    slope = c.o["lam"] / tau * (tau**2 if c.o["form"] == "released" else 1)
    difference = softmax(here.z / tau) - softmax(target / tau)
    return here.pull(here.residual() + slope * np.reshape(known, (-1, 1)) * difference / len(here.z))


def saf(c: Chunk) -> Arrays:
    z = c.net().z
    for i, row in zip(c.rows.index, z, strict=True):
        c.memo[c.epoch, i] = row
    if c.epoch <= c.o["start"]:
        return c.grad()
    past = [(c.epoch - c.o["past"], i) for i in c.rows.index]
    known = np.array([float(key in c.memo) for key in past])
    c.seen.update("known" if k else "unknown" for k in known)
    return pulled_to(c, np.array([c.memo.get(key, np.zeros(3)) for key in past]), known)


def mesa(c: Chunk) -> Arrays:
    average = c.memo.setdefault("average", c.w)
    return pulled_to(c, c.net(average).z) if c.epoch > c.o["start"] else c.grad()


def reg_sgd(c: Chunk) -> Arrays:
    here = c.net()
    grads = here.pull(here.residual(), 2 * c.o["gamma_z"] * here.h / len(here.h))
    grads[2] = grads[2] + 2 * c.o["gamma_v"] * c.w[2]
    return grads


def extrap_sgd(c: Chunk) -> Arrays:
    z = c.old.get("z", zeros(c.w)) if c.o["form"] == "past" else c.grad()
    c.new["z"] = c.grad(z, -c.o["scale"] * c.lr)
    return c.new["z"]


def universal(c: Chunk, draw: Callable[[], Arrays], slope: Callable[[Array], Array]) -> Arrays:
    """The gradient of L + lam rho^2 R for ``slope``, the derivatives of R by the differences d."""
    rho, here, g = c.o["rho"], c.net().loss(), c.grad()
    draws: list[Arrays] = []
    for i in range(c.o["n"]):
        draws.append(times(draws[-1], -1) if c.o.get("antithetic") and i % 2 else draw())
    nets = [c.net(plus(c.w, t, rho)) for t in draws]
    slopes = slope(np.array([(net.loss() - here) / rho**2 for net in nets]))
    changes = [plus(net.gradient(), g, -1) for net in nets]
    for s, change in zip(slopes, changes, strict=True):
        g = plus(g, change, c.o["lam"] * s)
    return g


def trace_sam(c: Chunk) -> Arrays:
    return universal(c, c.normal, lambda d: np.ones_like(d) / len(d))


def det_sam(c: Chunk) -> Arrays:
    rate = 0.5 if c.o["form"] == "released" else 1.0

    def cube() -> Arrays:
        return [
            c.o["half"] * (2 * torch.rand(a.shape, generator=c.draws, dtype=torch.float64).numpy() - 1) for a in c.w
        ]

    return universal(c, cube, lambda d: 2 * rate * np.exp(-rate * d) / len(d) * np.exp(-rate * d).mean() ** -3)


def frob_sam(c: Chunk) -> Arrays:
    def slope(d: Array) -> Array:
        if not c.o.get("antithetic"):
            return (d - d.mean()) / (len(d) - 1)
        # the variance is that of the even parts of the pairs plus the mean square of the odd ones
        even, odd = (d[::2] + d[1::2]) / 2, (d[::2] - d[1::2]) / 2
        by_even, by_odd = (even - even.mean()) / (len(even) - 1), odd / len(odd)
        return np.stack([(by_even + by_odd) / 2, (by_even - by_odd) / 2], 1).ravel()

    return universal(c, c.normal, slope)


# what follows the base rule's step


def after_wsam(base: Momentum, before: Arrays, new: dict[str, Arrays], o: dict[str, Any], memo: Any) -> None:
    if o["decouple"]:
        base.w = plus(base.w, new["sharpness"], -base.lr)


def after_lookbehind(base: Momentum, before: Arrays, new: dict[str, Arrays], o: dict[str, Any], memo: Any) -> None:
    for k in range(1, o["steps"]):
        base.step(new[f"g{k}"])
    base.w = plus(before, plus(base.w, before, -1), o["alpha"])


def after_mesa(base: Momentum, before: Arrays, new: dict[str, Arrays], o: dict[str, Any], memo: Any) -> None:
    memo["average"] = plus(times(memo["average"], o["decay"]), base.w, 1 - o["decay"])


AFTER = {"wsam": after_wsam, "lookbehind": after_lookbehind, "mesa": after_mesa}


@dataclass
class Case:
    """A member under options of its own; ``branches`` are those that its equation must have taken in the end."""

    name: str
    equation: Callable[[Chunk], Arrays]
    options: dict[str, Any] = field(default_factory=dict)
    branches: set[str] = field(default_factory=set)
    silent: tuple[int, ...] = ()  # rows without weight
    rtol: float = 1e-9

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items() if k != "rho")])


R = {"rho": 0.4}
FORMS = ("paper", "released")
# Decays of f-sam, vasso and mesa are 3/8 and 3/4: they reach the device as float32, which must not show.
CASES = [
    Case("sgd", sgd),
    Case("adamw", sgd),
    Case("sam", sam, R),
    Case("sam", sam, {"rho": 0.4, "interval": 2, "ascent_steps": 3}),
    Case("sam-random", sam_random, R),
    *(Case("asam", asam, {"rho": 0.6, "eta": 0.05, "rule": rule}) for rule in ("weights", "all")),
    Case("sam-on", sam_on, R),
    *(Case("f-sam", f_sam, {"rho": 0.4, "sigma": 0.8, "decay": 0.75, "form": form}) for form in FORMS),
    Case("vasso", vasso, {"rho": 0.4, "theta": 0.375}),
    Case("msam", msam, R),
    Case("ssam-f", ssam_f, {"rho": 0.4, "sparsity": 0.3, "samples": 7}),
    Case("ncsam", ncsam, {"rho": 0.3, "gamma": 0.7, "flip": 0.25, "warmup": 2}, {"full", "growing"}),
    Case("gsam", gsam, {"rho": 0.5, "alpha": 0.3, "rho_min": 0.1}),
    Case("looksam", looksam, {"rho": 0.4, "interval": 3, "alpha": 0.6}),
    *(Case("wsam", wsam, {"rho": 0.4, "gamma": 0.7, "decouple": decouple}) for decouple in (True, False)),
    Case("stable-sam", stable_sam, R),
    Case("saner", saner, {"rho": 0.4, "alpha": 0.6, "warmup": 4}, {"full", "growing"}),
    *(
        Case("gc-sam", gc_sam, {"rho": rho, "low": low, "high": high, "scope": scope}, {"sam", "low", "between"})
        for rho, low, high, scope in ((1.0, 0.6, 0.78, "tensor"), (1.0, 0.6, 0.78, "global"), (3.0, 0.0, 0.3, "tensor"))
    ),
    *(
        Case("cr-sam", cr_sam, {**R, "gamma": 0.2, "beta": 0.05, "floor": 0.02, "form": form, "probe": probe}, branches)
        for form, probe, branches in (
            ("paper", "gradient", {"divided"}),
            ("paper", "random", {"divided", "floor", "negative"}),
            ("released", "gradient", set()),
            ("released", "random", set()),
        )
    ),
    Case("lookbehind", lookbehind, {"rho": 0.3, "steps": 3, "alpha": 0.4}),
    Case("esam", esam, {"rho": 0.4, "beta": 0.6, "gamma": 0.5, "mask": "weight"}),
    Case("esam", esam, {"rho": 0.4, "beta": 0.3, "gamma": 0.4, "mask": "tensor"}, {"some", "at least one"}),
    Case("esam-inverse", esam_inverse, {"rho": 0.4, "beta": 0.7, "gamma": 0.4, "mask": "weight"}, silent=(1, 4, 8)),
    Case("esam-inverse", esam_inverse, {"rho": 0.4, "beta": 0.5, "gamma": 0.9, "mask": "tensor"}, silent=(3, 7)),
    Case("j-sam", j_sam, R),
    Case("l-sam", l_sam, R),
    *(
        Case("saf", saf, {"lam": 0.7, "tau": 2.0, "start": start, "past": past, "form": form}, {"known", "unknown"})
        for form, start, past in (("paper", 1, 2), ("released", 0, 1))
    ),
    *(Case("mesa", mesa, {"lam": 0.8, "tau": 2.0, "start": 1, "decay": 0.75, "form": form}) for form in FORMS),
    Case("reg-sgd", reg_sgd, {"gamma_z": 0.03, "gamma_v": 0.02}, rtol=1e-6),  # it takes the features in float32
    *(Case("extrap-sgd", extrap_sgd, {"form": form, "scale": 1.5}) for form in ("past", "extragradient")),
    *(Case("trace-sam", trace_sam, {"n": 4, "rho": 0.1, "lam": 0.8, "antithetic": a}) for a in (False, True)),
    *(
        Case("det-sam", det_sam, {"n": 4, "rho": 0.7, "lam": 0.5, "half": 0.2, "form": form, "antithetic": a})
        for form in FORMS
        for a in (False, True)
    ),
    *(Case("frob-sam", frob_sam, {"n": 4, "rho": 0.1, "lam": 0.01, "antithetic": a}) for a in (False, True)),
]


def chunk_sizes(name: str) -> tuple[Any, ...]:
    """An uneven last chunk among them, weighted by its share."""
    return ("batch", 5, 1) if "m" in OPTIMIZERS[name].Options.model_fields else (None,)


@pytest.mark.parametrize(
    ("case", "m"), [pytest.param(c, m, id=f"{c}-{m or 'batch'}") for c in CASES for m in chunk_sizes(c.name)]
)
def test_recursion_in_numpy(case: Case, m: Any) -> None:
    """Ten steps of five epochs under a falling learning rate, with Nesterov momentum and decay."""
    module = Network(norm=case.name == "sam-on").double()
    net = Float64(module, forward=WithFeatures(module))
    rule: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    chunks = {} if m is None else {"m": m}
    optimizer = OPTIMIZERS[case.name](net.named, **rule, **chunks, **case.options)

    base = (Adam if case.name == "adamw" else Momentum)([p.detach().numpy().copy() for p in net.params])
    kept: dict[str, Arrays] = {}
    memo: dict[Any, Any] = {}
    seen: set[str] = set()
    draws = torch.Generator()
    size = m if isinstance(m, int) else ROWS
    for step in range(STEPS):
        epoch, rows = step // 2, batch(step, case.silent)
        base.lr = LR * (1 - 0.06 * step)
        draws.manual_seed(step)
        before, total, means = base.w, zeros(base.w), dict[str, Arrays]()
        for start in range(0, ROWS, size):
            part = rows.take(slice(start, start + size))
            c = Chunk(case.options, part, rows, base.w, base.v, base.lr, step, epoch, draws, kept, memo, seen)
            total = plus(total, case.equation(c), len(part.y) / ROWS)
            for key, new in c.new.items():
                means[key] = plus(means.get(key, zeros(new)), new, len(part.y) / ROWS)
        kept = {**kept, **means}
        base.step(total)
        if case.name in AFTER:
            AFTER[case.name](base, before, means, case.options, memo)

        if step % 2 == 0:
            optimizer.on_epoch(epoch, EPOCHS, SAMPLES)
        optimizer.generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = base.lr
        x, y, index, weight = (torch.from_numpy(a) for a in (rows.x, rows.y, rows.index, rows.weight))
        optimizer.step(Objective(net, Task(0, x, y, index, {"weight": weight}), weighted_cross_entropy))
        for p, a in zip(net.params, base.w, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=case.rtol, atol=1e-12)
    assert float(optimizer.skipped) == 0
    assert case.branches <= seen


def test_numpy_gradient_is_torchs() -> None:
    """The perceptron's backward, norm layer included, against autograd."""
    for norm in (False, True):
        module, rows = Network(norm).double(), batch(0, silent=(2,))
        weight, y = torch.from_numpy(rows.weight), torch.from_numpy(rows.y)
        losses = weight * F.cross_entropy(module(torch.from_numpy(rows.x)), y, reduction="none")
        ours = Perceptron([p.detach().numpy() for p in module.parameters()], rows)
        np.testing.assert_allclose(ours.losses(), losses.detach().numpy(), rtol=1e-12)
        for a, g in zip(ours.gradient(), torch.autograd.grad(losses.mean(), list(module.parameters())), strict=True):
            np.testing.assert_allclose(a, g.numpy(), rtol=1e-11, atol=1e-15)


def test_ascent_is_not_stretched_to_its_radius() -> None:
    """L = -w'Aw / 2 has its top at 0: the second step of ascent turns back, to less than rho."""
    matrix, start, rho = np.diag([1.0, 0.5]), np.array([0.3, 0.4]), 0.8
    first = -matrix @ start
    e = rho * first / np.linalg.norm(first)
    second = -matrix @ (start + e)
    e = e + rho * second / np.linalg.norm(second)
    assert 0.01 < np.linalg.norm(e) < 0.9 * rho
    w = torch.tensor(start, requires_grad=True)
    optimizer = OPTIMIZERS["sam"]([w], lr=LR, momentum=0.0, rho=rho, m="batch", ascent_steps=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -w @ torch.from_numpy(matrix) @ w / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(w.detach().numpy(), start + LR * matrix @ (start + e), rtol=1e-12)


def test_every_optimizer_has_a_recursion() -> None:
    assert {case.name for case in CASES} == set(OPTIMIZERS)
