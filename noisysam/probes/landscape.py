"""The loss around a network's weights, on a line and on a plane of filter-normalised directions."""

import itertools
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.probes.base import PARTS, PROBES, Options, Probe, Subject
from noisysam.training import metrics

STATEMENT = (
    "cross-entropy and accuracy of the reported outputs, float32; batch norm in evaluation mode, its running "
    "statistics held fixed; biases, and the weights of norms, are not moved"
)


class LandscapeOptions(Options):
    limit: int = Field(500, ge=1, description="training images, and test images")
    radius: float = Field(1.0, gt=0, description="how far it reaches; at 1 the step is as long as the filters are")
    points: int = Field(10, ge=1, description="points of the line on either side of the weights")
    grid: int = Field(4, ge=0, description="points of the plane on either side of them, along each axis; 0: no plane")
    seed: int = Field(0, ge=0, description="seed of the directions: the same for runs that are compared")


@PROBES.register("landscape", source="Li et al. 2018, arXiv 1712.09913, section 4")
class Landscape(Probe):
    """Loss and accuracy on a line and on a plane through the weights, along random filter-normalised directions.

    The line is the first axis of the plane. All networks that a method reports move together, each along its
    own directions; a classifier that the method fitted to features is not changed.

    Equation: l(w + a d1 + b d2), each filter of d is a Gaussian draw with the norm of the same filter of w.
    Code: tomgoldstein/loss-landscape (net_plotter.py, ignore='biasbn').
    Checked: directions filter by filter; the middle of the plane against the run's record.
    """

    Options = LandscapeOptions

    def run(self, subject: Subject) -> dict[str, Any]:
        """``line`` and ``plane``: coordinates, and loss and accuracy of each part in a list of as many dimensions."""
        o = self.options
        found: dict[str, Any] = {"statement": STATEMENT}
        found["line"] = surface(subject, o.limit, o.seed, [coordinates(o.radius, o.points)])
        if o.grid:
            found["plane"] = surface(subject, o.limit, o.seed, [coordinates(o.radius, o.grid)] * 2)
        return found


def coordinates(radius: float, points: int) -> list[float]:
    """``points`` on either side of 0, and 0 itself, from -radius to radius."""
    return [radius * k / points for k in range(-points, points + 1)]


def surface(subject: Subject, limit: int, seed: int, axes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Loss and accuracy of each part at the weights plus a combination of directions, one direction for each axis.

    ``coordinates``: the axes; of a part, ``loss`` and ``accuracy``: nested lists, indexed like the axes. The networks
    of the subject are not changed: copies are moved.
    """
    modules = [deepcopy(module) for module in subject.modules]
    generator = torch.Generator().manual_seed(seed)
    directions = [[filter_normalised(module, generator) for module in modules] for _ in axes]
    inputs, clean = subject.part("clean", limit)
    given = subject.part("noisy", limit)[1]
    test_inputs, test = subject.part("test", limit)
    values: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
    for point in itertools.product(*axes):
        for k, (module, origin) in enumerate(zip(modules, subject.modules, strict=True)):
            move(module, origin, [(step, along[k]) for step, along in zip(point, directions, strict=True)])
        logits, test_logits = subject.logits(inputs, modules), subject.logits(test_inputs, modules)
        for part, z, labels in (("clean", logits, clean), ("noisy", logits, given), ("test", test_logits, test)):
            loss, accuracy = metrics.negative_log_likelihood(z, labels), metrics.accuracy(z, labels)
            values[part].append((float(loss), float(accuracy)))
    found: dict[str, Any] = {"coordinates": [list(axis) for axis in axes]}
    for part, pairs in values.items():
        shaped = np.array(pairs).reshape(*map(len, axes), 2)
        found[part] = {"loss": shaped[..., 0].tolist(), "accuracy": shaped[..., 1].tolist()}
    return found


def filter_normalised(module: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """A random direction for each parameter; each filter has the norm of the same filter of the weights. A filter makes
    one output: a kernel of a convolution or a row of a linear layer. Biases and the weights of norms get zeros, as in
    the authors' code (tomgoldstein/loss-landscape, ignore='biasbn')."""
    directions = []
    for weight in module.parameters():
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.ndim > 1:
            over = tuple(range(1, weight.ndim))
            length = torch.linalg.vector_norm(drawn, dim=over, keepdim=True)
            drawn *= torch.linalg.vector_norm(weight.detach(), dim=over, keepdim=True) / length
        else:
            drawn.zero_()
        directions.append(drawn)
    return directions


@torch.no_grad()
def move(module: nn.Module, origin: nn.Module, steps: Sequence[tuple[float, Sequence[Tensor]]]) -> None:
    """Set the weights of ``module`` to those of ``origin`` plus the sum of step x direction."""
    for number, (weight, start) in enumerate(zip(module.parameters(), origin.parameters(), strict=True)):
        weight.copy_(start)
        for step, direction in steps:
            weight.add_(direction[number], alpha=step)
