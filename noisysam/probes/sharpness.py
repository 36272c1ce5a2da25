"""Sharpness of the loss at a network's weights: curvature (its Hessian), and its increase within a ball.

The loss is the mean cross-entropy of one network, whatever loss it was trained with, as a function of all its weights
written as one vector. Batch norm is in evaluation mode: its running statistics are constants. All computations are in
float32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from noisysam.core.errors import UserError
from noisysam.probes.base import PARTS, PROBES, Options, Probe, Subject
from noisysam.training import metrics

CHUNK = 50  # rows whose graph is in memory at a time
ALL = slice(None)

STATEMENT = (
    "mean cross-entropy of one network over all its weights, float32; "
    "batch norm in evaluation mode, its running statistics held fixed"
)


class SharpnessOptions(Options):
    limit: int = Field(1000, ge=1, description="rows of each part for the loss within a ball")
    hessian_limit: int = Field(200, ge=1, description="rows of each part for the Hessian, which costs far more a row")
    draws: int = Field(4, ge=2, description="random vectors for trace and density, the width of the Lanczos block")
    steps: int = Field(6, ge=1, description="Lanczos steps; draws x steps products with the Hessian in all")
    top: int = Field(5, ge=1, description="largest eigenvalues that are kept")
    rho: float = Field(0.1, gt=0, description="radius of the ball (L2, over all weights)")
    m: int = Field(32, ge=1, description="rows that share one perturbation in the worst case")
    ascent: int = Field(5, ge=1, description="steps of projected ascent; the first is SAM's own")
    directions: int = Field(4, ge=2, description="random directions of the average case, each taken both ways")
    network: int = Field(0, ge=0, description="which of the method's networks")
    seed: int = Field(0, ge=0, description="seed of the random vectors and directions")


@PROBES.register(
    "sharpness", source="Foret et al. 2020, arXiv 2010.01412, sections 4.1 and 4.2; Ghorbani et al. 2019, 1901.10159"
)
class Sharpness(Probe):
    """Curvature of the loss (eigenvalues, trace, spectral density), and its increase within a ball.

    Equation: Hessian H of the mean cross-entropy l over the weights w (P of them), exact products by double backward:
    its largest eigenvalues, trace and density. Worst case, for each group of m rows: max l(w + e) - l(w) over
    |e| <= rho, by projected gradient ascent, the first step being SAM's own; the mean over the groups (m-sharpness).
    Average case: the mean of l(w + e) - l(w), e uniform on the sphere; rho^2 trace / (2 P) for a quadratic loss.
    Code: amirgholami/PyHessian (trace, density); google/spectral-density.
    Deviation: one block of vectors serves eigenvalues, trace and density. Foret et al. measured a network without batch
    norm; with it the loss does not change with the scale of the filters before it, so compare runs of one recipe only.
    Checked: exact Hessians of a small network; maxima of quadratics from their secular equation.
    """

    Options = SharpnessOptions

    def run(self, subject: Subject) -> dict[str, Any]:
        """Curvature of the loss and its increase within a ball, for each part."""
        o = self.options
        if o.network >= len(subject.modules):
            raise UserError(f"option network={o.network}: this run has {len(subject.modules)} networks, from 0 on")
        module = subject.modules[o.network]
        found: dict[str, Any] = {}
        for part in PARTS:
            if part == "noisy" and not subject.problem.noisy.flipped.any():
                found[part] = found["clean"]  # the same images with the same labels
                continue
            found[part] = self.curvature(Loss(module, *subject.part(part, o.hessian_limit)))
            found[part] |= self.ball(Loss(module, *subject.part(part, o.limit)))
        facts = {"statement": STATEMENT, "networks": len(subject.modules)}
        weights = Loss(module, *subject.part("test", 1)).weights
        facts |= {"parameters": len(weights), "weight_norm": float(weights.norm())}
        return {**facts, **found}

    def curvature(self, loss: "Loss") -> dict[str, Any]:
        """Of the Hessian: largest eigenvalues with their error bounds, smallest, trace, density."""
        o = self.options
        s = spectrum(loss.product, loss.weights, o.draws, o.steps, o.seed)
        return {
            "hessian_rows": len(loss.labels),
            "lambda_max": float(s.values[0]),
            "eigenvalues": s.values[: o.top].tolist(),
            "error_bounds": s.errors[: o.top].tolist(),
            "lambda_min": float(s.values[-1]),
            "trace": float(s.traces.mean()),
            "trace_standard_error": float(s.traces.std()) / math.sqrt(len(s.traces)),
            "density": {"nodes": s.values.tolist(), "weights": s.weights.tolist()},
        }

    def ball(self, loss: "Loss") -> dict[str, Any]:
        """Loss, accuracy and gradient at the weights, and the increase of the loss within ``rho``."""
        o, rows = self.options, len(loss.labels)
        value, slope = loss.gradient(loss.weights)
        one_step, worst = worst_case(loss, rows, o.rho, o.ascent, o.m)
        rises = average_case(loss, o.rho, o.directions, o.seed)
        return {
            "rows": rows,
            "loss": value,
            "accuracy": float(metrics.accuracy(loss.logits(), loss.labels)),
            "gradient_norm": float(slope.norm()),
            "one_step": one_step,
            "worst_case": worst,
            "average_case": float(rises.mean()),
            "average_case_standard_error": float(rises.std()) / math.sqrt(len(rises)),
        }


class Loss:
    """Mean cross-entropy of a network on some rows, as a function of its weights: one vector (P,).

    The network is in evaluation mode and is not changed: calls use the weights that they are given.
    """

    def __init__(self, module: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self.module, self.inputs, self.labels = module, inputs, labels
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    def value(self, weights: Tensor, rows: slice = ALL) -> float:
        """The loss at ``weights`` on some rows."""
        with torch.no_grad():
            return sum(part.item() for part in self._parts(weights, rows))

    def gradient(self, weights: Tensor, rows: slice = ALL) -> tuple[float, Tensor]:
        """The loss at ``weights`` on some rows, and its gradient (P,)."""
        weights = weights.detach().requires_grad_()
        value, slope = 0.0, torch.zeros_like(weights)
        for part in self._parts(weights, rows):
            value += part.item()
            slope += torch.autograd.grad(part, weights)[0]
        return value, slope

    def product(self, vectors: Tensor) -> Tensor:
        """The Hessian at the network's own weights times each column of ``vectors`` (P, b); exact, by double
        backward."""
        weights = self.weights.detach().requires_grad_()
        total = torch.zeros_like(vectors)
        for part in self._parts(weights, ALL):
            (slope,) = torch.autograd.grad(part, weights, create_graph=True)
            for column, vector in enumerate(vectors.unbind(1)):
                total[:, column] += torch.autograd.grad(slope, weights, vector, retain_graph=True)[0]
        return total

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of all rows, at the network's own weights."""
        return torch.cat([self.module(x) for x in self.inputs.split(CHUNK)])

    def _parts(self, weights: Tensor, rows: slice) -> Iterator[Tensor]:
        """The loss in summands, one for each chunk of rows."""
        inputs, labels = self.inputs[rows], self.labels[rows]
        pieces = weights.split([shape.numel() for shape in self.shapes.values()])
        own = {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
        for x, y in zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True):
            yield F.cross_entropy(functional_call(self.module, own, (x,)), y, reduction="sum") / len(labels)


@dataclass(frozen=True)
class Spectrum:
    """Estimates from a Krylov space of a symmetric matrix. ``values`` (n,): Ritz values, the largest first; ``errors``:
    each lies within so much of an eigenvalue; ``weights``: of the density at them, in sum 1; ``traces``: the
    independent estimates of the trace, one for each random vector."""

    values: Tensor
    errors: Tensor
    weights: Tensor
    traces: Tensor


def spectrum(product: Callable[[Tensor], Tensor], like: Tensor, draws: int, steps: int, seed: int) -> Spectrum:
    """Block Lanczos from ``draws`` Rademacher vectors, with full orthogonalisation, twice.

    ``product``: the matrix (P, P) times (P, draws); ``like`` (P,) gives size, device and type. One set of products
    serves three estimates: eigenvalues by Rayleigh and Ritz (Golub and Van Loan, 4th edition, section 10.3); the trace
    as the mean of v'Hv (Hutchinson 1990); the density by Gauss quadrature, the weight of a Ritz value being the mean
    squared part of a vector along its Ritz vector (Ghorbani et al. 2019, arXiv 1901.10159, section 2).
    """
    size = len(like)
    draws = min(draws, size)
    steps = min(steps, size // draws)
    generator = torch.Generator().manual_seed(seed)
    starts = (2 * torch.randint(2, (size, draws), generator=generator) - 1).to(like)
    block, head = torch.linalg.qr(starts)
    basis = block
    projected = torch.zeros((draws * steps, draws * steps), dtype=torch.float64)
    for end in range(draws, draws * steps + 1, draws):
        image = product(block)
        for _ in range(2):
            along = basis.T @ image
            image = image - basis @ along
            projected[:end, end - draws : end] += along.cpu()
        block, rest = torch.linalg.qr(image)
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]  # where nothing is left, any direction will do
        if end < draws * steps:
            basis = torch.cat((basis, block), 1)
    values, vectors = torch.linalg.eigh(projected, UPLO="U")
    parts = head.cpu().double().T @ vectors[:draws]  # of each vector along each Ritz vector
    traces = (parts.square() * values).sum(1)
    errors = (rest.cpu().double() @ vectors[-draws:]).norm(dim=0)
    return Spectrum(values.flip(0), errors.flip(0), parts.square().mean(0).flip(0) / size, traces)


def worst_case(loss: Loss, rows: int, radius: float, steps: int, m: int) -> tuple[float, float]:
    """m-sharpness after one step of ascent (SAM's own) and after the best of ``steps``: the rise of the loss of each
    group of m rows, averaged with the groups' shares of the rows (arXiv 2010.01412, section 4.1)."""
    one_step = worst = 0.0
    for first in range(0, rows, m):
        group = slice(first, min(first + m, rows))
        path = ascend(loss, group, radius, steps)
        share = (group.stop - group.start) / rows
        one_step += share * (path[1] - path[0])
        worst += share * (max(path) - path[0])
    return one_step, worst


def ascend(loss: Loss, rows: slice, radius: float, steps: int) -> list[float]:
    """The loss at the weights, and after each step of projected gradient ascent within the L2 ball: steps of length
    ``radius`` along the normalised gradient, each followed by the nearest point of the ball."""
    offset, path = torch.zeros_like(loss.weights), []
    for _ in range(steps):
        value, slope = loss.gradient(loss.weights + offset, rows)
        path.append(value)
        offset = offset + radius * F.normalize(slope, dim=0, eps=torch.finfo(slope.dtype).tiny)
        offset = offset * (radius / offset.norm()).clamp(max=1)
    return [*path, loss.value(loss.weights + offset, rows)]


def average_case(loss: Loss, radius: float, directions: int, seed: int) -> Tensor:
    """The rise of the loss of all rows on the sphere of ``radius``, one for each random direction: the mean of going
    there and going the opposite way, which cancels the slope (by far the larger part of a single rise)."""
    generator = torch.Generator().manual_seed(seed)
    value, rises = loss.value(loss.weights), []
    for _ in range(directions):
        direction = F.normalize(torch.randn(len(loss.weights), generator=generator, dtype=torch.float64), dim=0)
        offset = radius * direction.to(loss.weights)
        rises.append((loss.value(loss.weights + offset) + loss.value(loss.weights - offset)) / 2 - value)
    return torch.tensor(rises, dtype=torch.float64)
