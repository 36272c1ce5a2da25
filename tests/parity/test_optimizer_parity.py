"""Every optimizer against its authors' step, written here from the paper or from what the authors' code computes.

Nothing of the package's own arithmetic is used: weights are one flat float64 vector, gradients come from autograd of a
network written out below, and each step is a few lines over vectors. Settings: ten steps in five epochs, two batches
of twelve rows to an epoch, momentum 0.9 (not Nesterov's), weight decay 5e-4, a learning rate that falls at each step.

Members with draws of their own get the same draws on both sides: the order of the draws is the package's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisysam.core.network import Net, WithFeatures
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.optim import OPTIMIZERS

STEPS, ROWS, SAMPLES, EPOCHS = 10, 12, 24, 5
LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
HIDDEN, INPUTS, CLASSES = 7, 6, 3

# the network, once as a module and once as a function of a flat vector


class Network(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(INPUTS, HIDDEN)
        if norm != "plain":
            self.norm = nn.LayerNorm(HIDDEN) if norm == "layer" else nn.BatchNorm1d(HIDDEN)
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return torch.tanh(self.norm(hidden) if hasattr(self, "norm") else hidden)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


SHAPES = {
    "plain": [(HIDDEN, INPUTS), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)],
    "layer": [(HIDDEN, INPUTS), (HIDDEN,), (HIDDEN,), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)],
}
SHAPES["batch"] = SHAPES["layer"]


@dataclass
class Authors:
    """The authors' side of a run: flat weights, the momentum buffer, this step's batch and what is kept."""

    norm: str
    o: dict[str, Any]
    w: Tensor
    v: Tensor
    lr: float = LR
    step: int = 0
    epoch: int = 0
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    y: Tensor = field(default_factory=lambda: torch.zeros(0))
    index: Tensor = field(default_factory=lambda: torch.zeros(0))
    draws: torch.Generator = field(default_factory=torch.Generator)
    kept: dict[Any, Any] = field(default_factory=dict)

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The vector's pieces in the shapes of the network's tensors."""
        shapes = SHAPES[self.norm]
        pieces = vector.split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def flags(self, *places: int) -> Tensor:
        """True in the tensors at these places."""
        count = len(SHAPES[self.norm])
        chosen = {place % count for place in places}
        parts = self.parts(self.w)
        return torch.cat([torch.full((p.numel(),), i in chosen) for i, p in enumerate(parts)])

    def hidden(self, w: Tensor, x: Tensor) -> Tensor:
        first, bias, *norm = self.parts(w)[:-2]
        h = F.linear(x, first, bias)
        if self.norm == "layer":
            h = F.layer_norm(h, (HIDDEN,), *norm)
        if self.norm == "batch":
            h = F.batch_norm(h, None, None, *norm, training=True)
        return torch.tanh(h)

    def logits(self, w: Tensor, x: Tensor | None = None) -> Tensor:
        return F.linear(self.hidden(w, self.x if x is None else x), *self.parts(w)[-2:])

    def losses(self, w: Tensor, rows: Any = slice(None), y: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self.logits(w, self.x[rows]), self.y[rows] if y is None else y, reduction="none")

    def loss(self, w: Tensor) -> Tensor:
        return self.losses(w).mean()

    def grad(self, w: Tensor, rows: Any = slice(None), y: Tensor | None = None) -> Tensor:
        return self.grad_of(lambda at: self.losses(at, rows, y).mean(), w)

    def grad_of(self, function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(w), w)
        return gradient

    def normal(self) -> Tensor:
        parts = self.parts(self.w)
        draws = [torch.randn(p.shape, generator=self.draws, dtype=torch.float64) for p in parts]
        return torch.cat([d.flatten() for d in draws])

    def uniform(self) -> Tensor:
        parts = self.parts(self.w)
        draws = [torch.rand(p.shape, generator=self.draws, dtype=torch.float64) for p in parts]
        return torch.cat([d.flatten() for d in draws])

    def descend(self, g: Tensor) -> None:
        """SGD with momentum and L2: what the authors give their gradient to."""
        self.v = MOMENTUM * self.v + (g + DECAY * self.w)
        self.w = self.w - self.lr * self.v


# plain rules


def sgd(s: Authors) -> None:
    s.descend(s.grad(s.w))


def adamw(s: Authors) -> None:
    """Loshchilov and Hutter, Algorithm 2: the decay is not part of the moments."""
    g, t = s.grad(s.w), s.step + 1
    s.v = 0.9 * s.v + 0.1 * g
    s.kept["square"] = 0.999 * s.kept.get("square", 0 * g) + 0.001 * g * g
    mean, square = s.v / (1 - 0.9**t), s.kept["square"] / (1 - 0.999**t)
    s.w = s.w - s.lr * (mean / (square.sqrt() + 1e-8) + DECAY * s.w)


def adam(s: Authors) -> None:
    """Kingma and Ba, Algorithm 1, on the gradient of the loss with its L2 term."""
    g, t = s.grad(s.w) + DECAY * s.w, s.step + 1
    s.v = 0.9 * s.v + 0.1 * g
    s.kept["square"] = 0.999 * s.kept.get("square", 0 * g) + 0.001 * g * g
    mean, square = s.v / (1 - 0.9**t), s.kept["square"] / (1 - 0.999**t)
    s.w = s.w - s.lr * mean / (square.sqrt() + 1e-8)


# SAM and other directions


def sam(s: Authors) -> None:
    g = s.grad(s.w)
    s.descend(s.grad(s.w + s.o["rho"] / (g.norm() + 1e-12) * g))


def sam_in_loss(s: Authors) -> None:
    """The released JAX code: L2 is a part of the loss of both evaluations, and no decay follows."""
    g = s.grad(s.w) + DECAY * s.w
    there = s.w + s.o["rho"] * g / g.norm()
    s.v = MOMENTUM * s.v + s.grad(there) + DECAY * there
    s.w = s.w - s.lr * s.v


def sam_chunks(s: Authors) -> None:
    """Gradients of ``rows / m`` chunks are accumulated, each at its own perturbation of several ascent steps."""
    rho, m = s.o["rho"], ROWS if s.o["m"] == "batch" else s.o["m"]
    total = torch.zeros_like(s.w)
    for start in range(0, ROWS, m):
        rows, delta = slice(start, start + m), torch.zeros_like(s.w)
        for _ in range(s.o["ascent_steps"]):
            g = s.grad(s.w + delta, rows)
            delta = delta + rho / (g.norm() + 1e-12) * g
            if delta.norm() > rho:
                delta = delta * (rho / delta.norm())
        total += s.grad(s.w + delta, rows) / (ROWS // m)
    s.descend(total)


def sam_random(s: Authors) -> None:
    z = s.normal()
    s.descend(s.grad(s.w + s.o["rho"] * z / z.norm()))


def asam(s: Authors) -> None:
    """Names with 'weight' are scaled, norm layers' too."""
    g = s.grad(s.w)
    t = torch.where(s.flags(0, 2, -2), s.w.abs() + s.o["eta"], 1.0)
    s.descend(s.grad(s.w + t * (t * g) * (s.o["rho"] / ((t * g).norm() + 1e-16))))


def sam_on(s: Authors) -> None:
    g = torch.where(s.flags(2, 3), s.grad(s.w), 0.0)
    s.descend(s.grad(s.w + g * (s.o["rho"] / (g.norm() + 1e-16))))


def f_sam(s: Authors) -> None:
    g = s.grad(s.w)
    if s.step == 0:
        d, s.kept["m"] = g, g
    else:
        d = g - s.o["sigma"] * s.kept["m"]
        s.kept["m"] = s.kept["m"] * s.o["decay"] + g * (1 - s.o["decay"])
    s.descend(s.grad(s.w + s.o["rho"] / (d.norm() + 1e-12) * d))


def f_sam_paper(s: Authors) -> None:
    """The mean is renewed first, then taken out."""
    g = s.grad(s.w)
    s.kept["m"] = s.o["decay"] * s.kept.get("m", 0 * g) + (1 - s.o["decay"]) * g
    d = g - s.o["sigma"] * s.kept["m"]
    s.descend(s.grad(s.w + s.o["rho"] * d / d.norm()))


def vasso(s: Authors) -> None:
    g, theta = s.grad(s.w), s.o["theta"]
    s.kept["d"] = (1 - theta) * s.kept["d"] + theta * g if s.step else g
    d = s.kept["d"]
    s.descend(s.grad(s.w + s.o["rho"] / (d.norm() + 1e-7) * d))


def msam(s: Authors) -> None:
    """Their optimizer holds the perturbed weights, and decays those; the perturbation goes against the momentum."""
    rho, inverse = s.o["rho"], s.kept.get("inverse", 0.0)
    held = s.kept.get("held", s.w)
    d = s.grad(held) + DECAY * held
    held = held + rho * inverse * s.v
    s.v = MOMENTUM * s.v + d
    held = held - s.lr * s.v
    s.w = held
    s.kept["inverse"] = 1 / (s.v.norm() + 1e-12)
    s.kept["held"] = held - rho * s.kept["inverse"] * s.v


def msam_adamw(s: Authors) -> None:
    rho, t = s.o["rho"], s.step + 1
    g = s.grad(s.w - rho * s.v / (s.v.norm() + 1e-12))
    s.v = 0.9 * s.v + 0.1 * g
    s.kept["square"] = 0.999 * s.kept.get("square", 0 * g) + 0.001 * g * g
    root = s.kept["square"].sqrt() / math.sqrt(1 - 0.999**t) + 1e-8
    s.w = s.w - s.lr / (1 - 0.9**t) * s.v / root


def ssam_f(s: Authors) -> None:
    """Fisher information of single samples; the (1 - sparsity) d largest are perturbed, by the whole gradient's norm.
    The mask is made before the epoch's first perturbation, as ours is; the code makes it after that."""
    if s.step % 2 == 0:
        fisher = sum(s.grad(s.w, slice(i, i + 1)) ** 2 for i in range(s.o["samples"]))
        assert isinstance(fisher, Tensor)
        keep = fisher.topk(int(len(fisher) * (1 - s.o["sparsity"]))).indices
        s.kept["mask"] = torch.zeros_like(fisher).scatter_(0, keep, 1.0)
    g = s.grad(s.w)
    s.descend(s.grad(s.w + s.o["rho"] / (g.norm() + 1e-7) * g * s.kept["mask"]))


def ncsam(s: Authors) -> None:
    """Epochs count from 1; the false labels are drawn at one rate and their loss is not smoothed (both: the ledger)."""
    epoch = s.epoch + 1
    g = s.grad(s.w)
    if epoch <= s.o["warmup"]:
        return s.descend(g)
    order = torch.randperm(ROWS, generator=s.draws)
    count = math.ceil(s.o["flip"] * ROWS)
    shift = torch.randint(1, CLASSES, (count,), generator=s.draws)
    chosen = order[:count].sort().values
    noise = s.grad(s.w, chosen, (s.y[chosen] + shift) % CLASSES)
    progress = epoch / EPOCHS
    scale = min(1.0, (3 - 2 * progress) * progress**2 * 2)
    e = s.o["rho"] / (g.norm() + 1e-12) * g
    return s.descend(s.grad(s.w + e + s.o["gamma"] * scale * noise))


# what is made of two gradients


def both(s: Authors) -> tuple[Tensor, Tensor]:
    g = s.grad(s.w)
    return g, s.grad(s.w + s.o["rho"] / (g.norm() + 1e-12) * g)


def gsam(s: Authors) -> None:
    """ProportionScheduler: the radius moves between its bounds as the rate does between 0 and its peak."""
    o, eps = s.o, 1e-12
    g = s.grad(s.w)
    radius = o["rho_min"] + (o["rho"] - o["rho_min"]) * s.lr / LR
    there = s.grad(s.w + radius / (g.norm() + eps) * g)
    cosine = (g @ there) / (there.norm() * g.norm() + eps)
    vertical = g - cosine * g.norm() * there / (there.norm() + eps)
    s.descend(there - o["alpha"] * vertical)


def looksam(s: Authors) -> None:
    """The part of SAM's gradient across the plain one is kept for the next k - 1 steps, at the plain one's length."""
    if s.step % s.o["interval"] == 0:
        g, there = both(s)
        s.kept["v"] = there - (there @ g / g.norm()) * g / g.norm()
        return s.descend(there)
    g = s.grad(s.w)
    return s.descend(g + s.o["alpha"] * g.norm() / s.kept["v"].norm() * s.kept["v"])


def clipped(g: Tensor, bound: float | None) -> Tensor:
    return g if bound is None else g * min(1.0, bound / (float(g.norm()) + 1e-6))


def wsam(s: Authors) -> None:
    """Both gradients are clipped before their difference is taken."""
    weight = s.o["gamma"] / (1 - s.o["gamma"])
    g, there = (clipped(each, s.o.get("clip")) for each in both(s))
    if s.o["decouple"]:
        s.descend(g)
        s.w = s.w - s.lr * weight * (there - g)
    else:
        s.descend(weight * there + (1 - weight) * g)


def stable_sam(s: Authors) -> None:
    g, there = both(s)
    s.descend(there * (g.norm() / (there.norm() + 1e-12)))


def saner(s: Authors) -> None:
    """Masked components are multiplied by a number that falls from 1; their 1e-8 in the ratio is left out."""
    g, there = both(s)
    epoch, final = s.epoch + 1, 1 - s.o["alpha"]
    factor = 1 - (1 - final) * epoch / s.o["warmup"] if epoch < s.o["warmup"] else final
    mask = (there / g > 0) & (there / g < 1)
    s.descend(there * mask * factor + there * ~mask)


def gc_sam(s: Authors) -> None:
    g, there = both(s)
    found = []
    for x, y in zip(s.parts(there), s.parts(g), strict=True):
        x, y = x.flatten(), y.flatten()
        cosine = (x / x.norm()) @ (y / y.norm())
        z = (x + y) / (x + y).norm()
        if s.o["low"] < cosine < s.o["high"] or (s.o["low"] <= 0 and cosine < s.o["high"]):
            x = (x @ z) * z
        elif cosine <= s.o["low"]:
            x = y
        found.append(x)
    s.descend(torch.cat(found))


def cr_sam(s: Authors) -> None:
    g = s.grad(s.w)
    e = s.o["rho"] / (g.norm() + 1e-12) * g
    worst, best = s.grad(s.w + e), s.grad(s.w - e)
    s.descend(worst + s.o["gamma"] * (worst + best - 2 * g) + s.o["beta"] * (worst - best))


def lookbehind(s: Authors) -> None:
    """Each of the k gradients is taken at the ascending weights and applied to the fast ones."""
    slow, ascending = s.w, s.w
    for _ in range(s.o["steps"]):
        g = s.grad(ascending)
        ascending = ascending + s.o["rho"] / (g.norm() + 1e-16) * g
        s.descend(s.grad(ascending))
    s.w = s.o["alpha"] * s.w + (1 - s.o["alpha"]) * slow


def esam(s: Authors) -> None:
    """Tensors are drawn, and only their gradients give the norm; rows strictly above the cut-off are kept, so that
    the one at it is lost. Their draw for a step is at the end of the step before it."""
    o = s.o
    draws = torch.rand(len(SHAPES[s.norm]), generator=s.draws)
    drawn = s.flags(*[i for i, u in enumerate(draws.tolist()) if u < o["beta"] or u == float(draws.min())])
    before = s.losses(s.w)
    g = torch.where(drawn, s.grad(s.w), 0.0)
    there = s.w + o["rho"] / (g.norm() + 1e-7) / o["beta"] * g
    rise = s.losses(there) - before
    cutoff = rise.topk(int(ROWS * o["authors' gamma"])).values[-1]
    s.descend(s.grad(there, rise > cutoff))


def esam_inverse(s: Authors) -> None:
    """Ours: each weight is drawn, and the rows of least rise are kept."""
    o = s.o
    parts = s.parts(s.w)
    draws = torch.cat([torch.rand(p.shape, generator=s.draws).flatten() for p in parts])
    g = s.grad(s.w)
    there = s.w + o["rho"] / o["beta"] / g.norm() * g * (draws < o["beta"])
    rise = s.losses(there) - s.losses(s.w)
    s.descend(s.grad(there, rise.argsort()[: math.ceil(o["gamma"] * ROWS)].sort().values))


# the chain rule at the logits, for each sample


def residual(s: Authors, w: Tensor, row: slice) -> Tensor:
    return torch.softmax(s.logits(w, s.x[row]), 1) - F.one_hot(s.y[row], CLASSES)


def perturbed(s: Authors, row: slice) -> Tensor:
    g = s.grad(s.w, row)
    return s.w + s.o["rho"] * g / g.norm()


def j_sam(s: Authors) -> None:
    """For each sample: the Jacobian at its perturbed weights, softmax minus label at w."""
    total = torch.zeros_like(s.w)
    for i in range(ROWS):
        row = slice(i, i + 1)
        r = residual(s, s.w, row).detach()
        total += s.grad_of(lambda w: (s.logits(w, s.x[row]) * r).sum(), perturbed(s, row)) / ROWS  # noqa: B023
    s.descend(total)


def l_sam(s: Authors) -> None:
    """The reverse: the Jacobian at w, softmax minus label at the perturbed weights."""
    total = torch.zeros_like(s.w)
    for i in range(ROWS):
        row = slice(i, i + 1)
        r = residual(s, perturbed(s, row), row).detach()
        total += s.grad_of(lambda w: (s.logits(w, s.x[row]) * r).sum(), s.w) / ROWS  # noqa: B023
    s.descend(total)


def reg_sgd(s: Authors) -> None:
    def loss(w: Tensor) -> Tensor:
        z, v = s.hidden(w, s.x), s.parts(w)[-2]
        return s.loss(w) + s.o["gamma_z"] * (z**2).sum(1).mean() + s.o["gamma_v"] * (v**2).sum()

    s.descend(s.grad_of(loss, s.w))


# outputs of earlier weights


def kl(s: Authors, w: Tensor, target: Tensor) -> Tensor:
    tau = s.o["tau"]
    log_q, p = torch.softmax(s.logits(w) / tau, 1).log(), torch.softmax(target / tau, 1)
    return F.kl_div(log_q, p, reduction="none").sum(-1).mean() * tau**2


def saf(s: Authors) -> None:
    """Logits are written to the slot of their epoch, and read from that of ``past`` epochs ago."""
    table = s.kept.setdefault("logits", torch.zeros(SAMPLES, s.o["past"] + 1, CLASSES, dtype=torch.float64))
    table[s.index, s.epoch % (s.o["past"] + 1)] = s.logits(s.w)
    target = table[s.index, (s.epoch - s.o["past"]) % (s.o["past"] + 1)]
    active = s.epoch > s.o["start"]
    s.descend(s.grad_of(lambda w: s.loss(w) + (s.o["lam"] * kl(s, w, target) if active else 0), s.w))


def mesa(s: Authors) -> None:
    """timm's ModelEmaV2: starts at the weights and moves after each step."""
    average = s.kept.setdefault("average", s.w)
    target, active = s.logits(average), s.epoch > s.o["start"]
    s.descend(s.grad_of(lambda w: s.loss(w) + (s.o["lam"] * kl(s, w, target) if active else 0), s.w))
    s.kept["average"] = s.o["decay"] * average + (1 - s.o["decay"]) * s.w


# looking ahead, and the universal class


def extrap_past(s: Authors) -> None:
    ahead = s.grad(s.w - s.o["scale"] * s.lr * s.kept.get("z", 0 * s.w))
    s.kept["z"] = ahead
    s.descend(ahead)


def extragradient(s: Authors) -> None:
    s.descend(s.grad(s.w - s.o["scale"] * s.lr * s.grad(s.w)))


def integral(s: Authors, draw: Callable[[], Tensor], psi: Any, psi_slope: Any, phi_slope: Any) -> None:
    """L + lam rho^2 phi(mean psi(d_i)), the chain rule as their ISAM class has it."""
    rho, n, here, g = s.o["rho"], s.o["n"], s.loss(s.w), s.grad(s.w)
    mean, change = torch.zeros(()), torch.zeros_like(g)
    for _ in range(n):
        there = s.w + rho * draw()
        d = (s.loss(there) - here) / rho**2
        mean = mean + psi(d) / n
        change = change + psi_slope(d) / n * (s.grad(there) - g)
    s.descend(g + s.o["lam"] * phi_slope(mean) * change)


def trace_sam(s: Authors) -> None:
    integral(s, s.normal, lambda d: d, lambda d: 1.0, lambda m: 1.0)


def det_sam(s: Authors) -> None:
    def cube() -> Tensor:
        return s.o["half"] * (2 * s.uniform() - 1)

    integral(s, cube, lambda d: torch.exp(-d / 2), lambda d: -torch.exp(-d / 2) / 2, lambda m: -2 / m**3)


def frob_sam(s: Authors) -> None:
    """lam / rho^2 times the sample covariance of loss and gradient over the draws."""
    rho, n, g = s.o["rho"], s.o["n"], s.grad(s.w)
    points = [s.w + rho * s.normal() for _ in range(n)]
    losses, grads = [s.loss(w) for w in points], [s.grad(w) for w in points]
    cross = torch.stack([a * b for a, b in zip(losses, grads, strict=True)]).sum(0)
    covariance = cross / (n - 1) - torch.stack(losses).sum() * torch.stack(grads).sum(0) / (n * (n - 1))
    s.descend(g + s.o["lam"] / rho**2 * covariance)


# the table


@dataclass
class Case:
    """A member, the authors' step, where that is from, and how near the weights must come (relative)."""

    name: str
    step: Callable[[Authors], None]
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    authors: dict[str, Any] = field(default_factory=dict)  # what their side is given besides
    norms: tuple[str, ...] = ("plain", "layer", "batch")
    rtol: float = 1e-10

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items() if k != "rho")])


WITHOUT_BATCH = ("plain", "layer")  # single rows, or averaged weights, have no batch statistics
R = {"rho": 0.3}
CASES = [
    Case("sgd", sgd, "torch.optim.SGD"),
    Case("adamw", adamw, "arXiv 1711.05101, Algorithm 2", norms=WITHOUT_BATCH),  # biases there have no gradient
    Case("sgd", adam, "arXiv 1412.6980, Algorithm 1", {"base": "adam"}),
    Case("sam", sam, "davda54/sam@3c3afdb sam.py", {"rho": 0.1}),
    Case("sam", sam, "davda54/sam@3c3afdb sam.py", {"rho": 0.5}),
    Case("sam", sam_in_loss, "google-research/sam@dae9904 sam_jax/training_utils/flax_training.py",
         {**R, "l2": "loss"}),
    *(
        Case("sam", sam_chunks, "tml-epfl/understanding-sam@306adde deep_nets/sam.py, train.py", {**R, **more})
        for more in ({"m": "batch", "ascent_steps": 4}, {"m": 4, "ascent_steps": 2}, {"m": 3, "ascent_steps": 1})
    ),
    Case("sam-random", sam_random, "arXiv 2010.01412, appendix C.5 (a control)", R),
    Case("asam", asam, "SamsungLabs/ASAM@f156a68 asam.py", {"rho": 0.5, "eta": 0.01}),
    Case("sam-on", sam_on, "mueller-mp/SAM-ON@8b8869a sam_on.py", R, norms=("layer", "batch")),
    Case("f-sam", f_sam, "nblt/F-SAM@2e2f989 utils.py", {**R, "sigma": 1.0, "decay": 0.6, "form": "released"}),
    Case("f-sam", f_sam_paper, "arXiv 2403.12350, Algorithm 1", {**R, "sigma": 1.0, "decay": 0.6}),
    Case("vasso", vasso, "BingcongLi/VaSSO@3524bad solver/vasso.py", {**R, "theta": 0.4}, rtol=1e-6),
    Case("msam", msam, "MarlonBecker/MSAM@780fa4f optimizer/msam.py", {**R, "l2": "loss"}),
    Case("msam", msam_adamw, "MarlonBecker/MSAM@780fa4f optimizer/adamW_msam.py",
         {**R, "base": "adamw", "lr": 0.01, "weight_decay": 0.0}),
    Case("ssam-f", ssam_f, "Mi-Peng/Sparse-Sharpness-Aware-Minimization@76974fd solver/sam.py",
         {**R, "sparsity": 0.4, "samples": 8}, norms=WITHOUT_BATCH, rtol=1e-6),
    Case("ncsam", ncsam, "xujiayuxu/CBNI-NCSAM@2c8da6c train_noise_CBN.py",
         {**R, "gamma": 0.5, "flip": 0.3, "warmup": 1}),
    Case("gsam", gsam, "juntang-zhuang/GSAM@a770275 gsam/gsam.py, scheduler.py", {**R, "alpha": 0.4, "rho_min": 0.05}),
    Case("looksam", looksam, "arXiv 2203.02714, Algorithm 1 (no code of the authors)",
         {**R, "interval": 3, "alpha": 0.5}),
    *(
        Case("wsam", wsam, "intelligent-machine-learning/dlrover@05e4f76 atorch/atorch/optimizers/wsam.py",
             {**R, "gamma": 0.8, **more}, rtol=1e-10 if "clip" not in more else 1e-5)
        for more in ({"decouple": True}, {"decouple": False}, {"decouple": True, "clip": 0.2},
                     {"decouple": False, "clip": 0.2})
    ),
    Case("stable-sam", stable_sam, "cltan023/stablesam2024@57264e7 sam.py", R),
    Case("saner", saner, "lhchau/saner@07fd303 optimizer/saner.py, utils/utils.py", {**R, "alpha": 0.5, "warmup": 3}),
    *(
        Case("gc-sam", gc_sam, "llcllc1997/GCSCoOp@1fcb977 Dassl.gcscoop.pytorch/dassl/optim/gcsam.py",
             {"rho": rho, "low": low, "high": high})
        for rho, low, high in ((0.1, 0.5, 0.8), (1.0, 0.5, 0.9), (1.0, 0.0, 0.7))
    ),
    Case("cr-sam", cr_sam, "TrustAIoT/CR-SAM@7f9fe3e utils/crsam.py",
         {**R, "gamma": 0.1, "beta": 0.05, "form": "released"}),
    *(
        Case("lookbehind", lookbehind, "chandar-lab/Lookbehind-SAM@ac7c5af lookbehind.py",
             {**R, "steps": k, "alpha": 0.5})
        for k in (1, 2, 5)
    ),
    Case("esam", esam, "dydjw9/Efficient_SAM@1e06840 utils/Esam.py",
         {**R, "beta": 0.6, "gamma": 5 / 12, "mask": "tensor"}, {"authors' gamma": 0.5}, rtol=1e-6),
    Case("esam-inverse", esam_inverse, "this project", {**R, "beta": 0.6, "gamma": 0.5}),
    Case("j-sam", j_sam, "arXiv 2405.03676 (no code of the authors)", {**R, "m": 1}, norms=WITHOUT_BATCH),
    Case("l-sam", l_sam, "arXiv 2405.03676 (no code of the authors)", {**R, "m": 1}, norms=WITHOUT_BATCH),
    Case("reg-sgd", reg_sgd, "arXiv 2405.03676, section 4 (no code of the authors)",
         {"gamma_z": 0.03, "gamma_v": 0.02}),
    Case("saf", saf, "AngusDujw/SAF@6e85600 SAF_train.py",
         {"lam": 0.3, "tau": 5.0, "start": 1, "past": 2, "form": "released"}),
    Case("mesa", mesa, "AngusDujw/SAF@6e85600 MESA_train.py",
         {"lam": 0.8, "tau": 5.0, "start": 1, "decay": 0.75, "form": "released"},
         norms=WITHOUT_BATCH),
    Case("extrap-sgd", extrap_past, "arXiv 2006.05720, Algorithm 1 (no code of the authors)",
         {"form": "past", "scale": 1.5}),
    Case("extrap-sgd", extragradient, "arXiv 2006.05720 (no code of the authors)",
         {"form": "extragradient", "scale": 1.5}),
    Case("trace-sam", trace_sam, "dbahri/universal_sam@0218d34 solver/sam.py", {"n": 2, "rho": 0.1, "lam": 1.0}),
    Case("det-sam", det_sam, "dbahri/universal_sam@0218d34 solver/sam.py",
         {"n": 2, "rho": 1.0, "lam": 1.0, "half": 0.05, "form": "released"}),
    Case("frob-sam", frob_sam, "dbahri/universal_sam@0218d34 solver/sam.py", {"n": 3, "rho": 0.1, "lam": 0.05}),
]  # fmt: skip


def batches() -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """(epoch, inputs, labels, indices) of each step; every epoch sees every sample once."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    found = []
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=generator)
        found += [(epoch, x[rows], y[rows], rows) for rows in order.split(ROWS)]
    return found


def cross_entropy(logits: Tensor, task: Task) -> Tensor:
    return F.cross_entropy(logits, task.labels, reduction="none")


def our_step(optimizer: Any, net: Net, x: Tensor, y: Tensor, index: Tensor) -> None:
    """One step: on a plain closure where that is enough, else on an objective."""
    if "rows" in optimizer.requires or getattr(optimizer.options, "m", "batch") != "batch":
        optimizer.step(Objective(net, Task(0, x, y, index), cross_entropy))
        return

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net.module(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def deviations(case: Case, norm: str) -> list[float]:
    """After each of ten steps, the largest difference between the weights of both sides, relative to the largest."""
    module = Network(norm).double()
    net = Net(module, forward=WithFeatures(module))
    given = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, **case.options}
    if "m" in OPTIMIZERS[case.name].Options.model_fields:
        given.setdefault("m", "batch")
    optimizer = OPTIMIZERS[case.name](module.named_parameters(), **given)

    start = torch.cat([p.detach().flatten() for p in module.parameters()])
    theirs = Authors(norm, {**given, **case.authors}, start, torch.zeros_like(start))
    found = []
    for step, (epoch, x, y, index) in enumerate(batches()):
        lr = given["lr"] * (1 - 0.06 * step)
        theirs.step, theirs.epoch, theirs.lr = step, epoch, lr
        theirs.x, theirs.y, theirs.index = x, y, index
        theirs.draws = torch.Generator().manual_seed(step)
        case.step(theirs)

        if step % 2 == 0:
            optimizer.on_epoch(epoch, EPOCHS, SAMPLES)
        optimizer.generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        our_step(optimizer, net, x, y, index)
        ours = torch.cat([p.detach().flatten() for p in module.parameters()])
        found.append(float((ours - theirs.w).abs().max() / theirs.w.abs().max()))
    assert float((theirs.w - start).norm()) > 0.1, "the weights hardly moved: the comparison shows nothing"
    return found


@pytest.mark.parametrize(("case", "norm"), [pytest.param(c, norm, id=f"{c}-{norm}") for c in CASES for norm in c.norms])
def test_authors_step(case: Case, norm: str) -> None:
    found = deviations(case, norm)
    assert max(found) <= case.rtol, f"{case.source}: {', '.join(f'{d:.1e}' for d in found)}"


def test_every_optimizer_is_compared() -> None:
    assert {case.name for case in CASES} == set(OPTIMIZERS)
