"""Figures of what probes measured, of one run or of several side by side. They need no torch.

``named``: the results of a probe by the label of the run, in the order of the lines. Values that are not finite are
None in a file and are not drawn.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from noisysam.report.document import svg, write_png, write_text
from noisysam.report.figures import TOGETHER, line_style, literal, panel_grid

Named = Mapping[str, Mapping[str, Any]]


TITLES = {
    "clean": "training images, true labels",
    "noisy": "training images, labels as given",
    "test": "test images",
}


PLANES = 4  # runs in one figure at most


FLOOR = 1e-9  # of a density, as it is drawn


GRID, WIDTH = 256, 0.01  # points of a density, and its broadening as a share of the range of the eigenvalues


LEVELS = 12  # of the loss in a plane's contours


MECHANISM = {  # of a moment -> the panel's title
    "last_layer_norm": "last layer",
    "feature_norm_clean": "features, clean",
    "feature_norm_flipped": "features, flipped",
    "gradient_share_clean": "gradient share of clean",
    "parameter_jacobian_clean": "Jacobian by weights, clean",
    "parameter_jacobian_flipped": "Jacobian by weights, flipped",
    "input_jacobian_clean": "Jacobian by inputs, clean",
    "input_jacobian_flipped": "Jacobian by inputs, flipped",
    "logit_ratio": "residuals, clean to flipped",
    "logit_ratio_perturbed": "residuals, perturbed weights",
    "logit_ratio_each": "perturbed for each sample",
    "down_weighted": "share of down-weighted weights",
}


def densities(named: Named) -> Figure:
    """Spectral densities of the Hessian: a panel for each part, a line for each run."""
    figure, panels = panel_grid(1, len(TITLES), width=4 * len(TITLES), height=3.8, sharey=True)
    for panel, (part, title) in zip(panels, TITLES.items(), strict=True):
        for number, (name, results) in enumerate(named.items()):
            of = results[part]
            label = f"{literal(name)}: largest {of['lambda_max']:.3g}, trace {of['trace']:.3g}"
            panel.semilogy(*density(**of["density"]), label=label, **line_style(number, marker=False))
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("eigenvalue of the Hessian")
        panel.set_ylim(bottom=FLOOR)
        panel.legend(fontsize="x-small")
    panels[0].set_ylabel("density")
    return figure


def density(
    nodes: Sequence[float], weights: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A spectral density from its quadrature: Gaussians about the nodes; a grid, and the values on it."""
    at, of = np.array(nodes, dtype=np.float64), np.array(weights, dtype=np.float64)
    width = WIDTH * max(at.max() - at.min(), 1e-12)
    grid = np.linspace(at.min() - 5 * width, at.max() + 5 * width, GRID)
    bells = np.exp(-((grid[:, None] - at) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))
    return grid, bells @ of


def lines(named: Named) -> Figure:
    """Loss and accuracy along the line of a landscape: a column for each part, a line for each run."""
    figure, panels = panel_grid(2, len(TITLES), width=4 * len(TITLES), height=6, sharex=True, sharey="row")
    above, below = panels[: len(TITLES)], panels[len(TITLES) :]
    for (part, title), loss, accuracy in zip(TITLES.items(), above, below, strict=True):
        for number, (name, results) in enumerate(named.items()):
            steps, of, style = results["line"]["coordinates"][0], results["line"][part], line_style(number, False)
            loss.semilogy(steps, np.array(of["loss"], dtype=np.float64), label=literal(name), **style)
            accuracy.plot(steps, [100 * share for share in of["accuracy"]], **style)
        loss.set_title(title, fontsize="medium")
        accuracy.set_xlabel("step, in lengths of the filters")
    above[0].set_ylabel("cross-entropy")
    below[0].set_ylabel("accuracy (%)")
    figure.legend(*above[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    return figure


def planes(named: Named) -> Figure:
    """Contours of the loss in the plane of a landscape: a line of panels for each run; a part has the same levels in
    all runs."""
    across = len(TITLES)
    size = {"width": 3.9 * across, "height": 1.1 + 3.5 * len(named)}
    figure, flat = panel_grid(len(named), across, **size, sharex=True, sharey=True)
    panels = [flat[first : first + across] for first in range(0, len(flat), across)]
    for (part, title), column in zip(TITLES.items(), zip(*panels, strict=True), strict=True):
        surfaces = [np.array(results["plane"][part]["loss"], dtype=np.float64) for results in named.values()]
        losses = [np.ma.masked_invalid(surface) for surface in surfaces]
        low, high = min(z.min() for z in losses), max(z.max() for z in losses)
        levels = np.geomspace(max(low, 1e-6), max(high, low * 1.01, 1.01e-6), LEVELS)
        for panel, results, z in zip(column, named.values(), losses, strict=True):
            x, y = results["plane"]["coordinates"]
            shown = panel.contourf(
                x, y, z.T.clip(levels[0], levels[-1]), levels, cmap="cividis", norm=LogNorm(levels[0], levels[-1])
            )
            panel.contour(x, y, z.T, levels, colors="black", linewidths=0.4)
            panel.plot(0, 0, marker="+", color="white")
            panel.set_aspect("equal")
            panel.grid(False)
        column[0].set_title(title, fontsize="medium")
        column[-1].set_xlabel("step along the first direction")
        figure.colorbar(
            shown, ax=list(column), location="bottom", aspect=30, label="cross-entropy",
            ticks=levels[::3], format="%.2g", fraction=0.15 / len(named), pad=0.1 / len(named),
        )  # fmt: skip
    for (first, *_), name in zip(panels, named, strict=True):
        first.set_ylabel(f"{literal(name)}\nalong the second", fontsize="small")
    return figure


def mechanism(named: Named) -> Figure:
    """Norms and gradients over the epochs of the last stage: a panel for each quantity, a line for each run."""
    across = 4
    down = -(-len(MECHANISM) // across)
    figure, panels = panel_grid(down, across, width=3.4 * across, height=2.8 * down, sharex=True)
    for panel, (measure, title) in zip(panels, MECHANISM.items(), strict=True):
        for number, (name, results) in enumerate(named.items()):
            moments = results["moments"]
            moments = [m for m in moments if m["stage"] == moments[-1]["stage"] and m[measure] is not None]
            x, y = [m["epoch"] + 1 for m in moments], [m[measure] for m in moments]
            panel.plot(x, y, label=literal(name), **line_style(number))
        panel.set_title(title, fontsize="small")
    for panel in panels[-across:]:
        panel.set_xlabel("epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def quantised(named: Named) -> Figure:
    """Accuracy against the bits of a weight, with full precision on the right, by rounding and (if computed) after
    zero-shot training; a line for each run."""
    names = {"plain": "rounded", "zero_shot": "ZSAQ"}
    levels = [level for results in named.values() for level in results["bits"].values()]
    there = [kind for kind in names if all(f"{kind}_accuracy" in level for level in levels)]
    figure, panels = panel_grid(1, len(there), sharey=True)
    for panel, kind in zip(panels, there, strict=True):
        for number, (name, results) in enumerate(named.items()):
            bits = sorted(results["bits"], key=int)
            shares = [results["bits"][b][f"{kind}_accuracy"] for b in bits] + [results["accuracy"]]
            shown = [100 * share for share in shares]
            panel.plot([*bits, "full"], shown, label=literal(name), **line_style(number))
        panel.set_title(names[kind], fontsize="medium")
        panel.set_xlabel("bits of a weight")
    panels[0].set_ylabel("test accuracy (%)")
    panels[-1].legend(fontsize="small")
    return figure


def _has_plane(results: Mapping[str, Any]) -> bool:
    return "plane" in results


def _has_epochs(results: Mapping[str, Any]) -> bool:
    return len(results["moments"]) > 1


@dataclass(frozen=True)
class Picture:
    """What is drawn of a probe: ``has`` says whether a result has it; ``most``: runs in one figure."""

    name: str
    caption: str
    draw: Callable[[Named], Figure]
    has: Callable[[Mapping[str, Any]], bool] = bool
    most: int = TOGETHER


PICTURES = {
    "sharpness": [Picture("density", "Spectral densities of the Hessian.", densities)],
    "landscape": [
        Picture("line", "Loss and accuracy along one filter-normalised direction.", lines),
        Picture("plane", "The loss in the plane of two filter-normalised directions.", planes, _has_plane, PLANES),
    ],
    "mechanism": [Picture("epochs", "Norms and gradients over the epochs of the last stage.", mechanism, _has_epochs)],
    "quantise": [Picture("bits", "Test accuracy against the bits of a weight.", quantised)],
}


def draw(probe: str, named: Named) -> Iterator[tuple[Picture, Figure, int, int]]:
    """Each picture that the results of a probe allow: its figure, the number of runs in it, the number that have it."""
    for picture in PICTURES.get(probe, []):
        there = {name: results for name, results in named.items() if picture.has(results)}
        if there:
            some = dict(list(there.items())[: picture.most])
            yield picture, picture.draw(some), len(some), len(there)


def write(probe: str, named: Named, folder: Path) -> list[Path]:
    """Draw what a probe measured in some runs, as SVG and PNG in a folder; the paths."""
    paths = []
    for picture, figure, _, _ in draw(probe, named):
        path = folder / f"{probe}-{picture.name}.svg"
        write_text(path, svg(figure))
        write_png(path.with_suffix(".png"), figure)
        paths += [path, path.with_suffix(".png")]
    return paths
