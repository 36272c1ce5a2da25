"""Methods by optimizers: what each optimizer brings to each method, where a study trains several of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from noisysam.report import figures, statistics
from noisysam.report.document import Figure, Section, Table
from noisysam.report.tables import COVERAGE, RECIPE, ReportCell, column_name, finished, joined

FEWEST = 2  # methods that have several optimizers
Grid = dict[str, dict[str, list[ReportCell]]]  # method -> optimizer -> finished runs


def sections(cells: Sequence[ReportCell]) -> list[Section]:
    """A table and a heat map for each noise of a study with two methods or more under the same two optimizers or
    more."""
    places = list(dict.fromkeys(column_name(cell) for cell in finished(cells)))
    grids = {place: grid([cell for cell in finished(cells) if column_name(cell) == place]) for place in places}
    grids = {place: found for place, found in grids.items() if len(found) >= FEWEST}
    if not grids:
        return []
    frame = pd.concat({place: table(found) for place, found in grids.items()}, names=["noise"]).reset_index("noise")
    frame = frame.drop(columns="noise") if len(places) == 1 else frame
    caption = "Mean test accuracy at the last epoch of each method (rows) with each optimizer (columns), in percent."
    drawings = [
        Figure(f"crossed-{number}", f"{place}: {caption}", figures.crossed(means(found)))
        for number, (place, found) in enumerate(grids.items(), 1)
    ]
    text = (
        "The gain of an optimizer over the first one with the same method and recipe, in points (mean and 95 % t"
        " interval of the differences by seed), beside the wrong labels that the method learns with the first one."
    )
    return [Section("Methods by optimizers", text, tables=[Table("crossed", frame)], figures=drawings)]


def grid(cells: Sequence[ReportCell]) -> Grid:
    """The finished runs of each method by optimizer, those of the study's first optimizer first; methods that have one
    alone are left out. A method is named after its row with the first optimizer that it has."""
    first: dict[Any, str] = {}
    found: Grid = {}
    for cell in cells:
        recipe = (cell["method"], str(cell["method_options"]), *(str(cell[name]) for name in RECIPE))
        name = first.setdefault(recipe, cell["row"])
        found.setdefault(name, {}).setdefault(_optimizer(cell), []).append(cell)
    several = {name: runs for name, runs in found.items() if len(runs) > 1}
    order = list(dict.fromkeys(optimizer for runs in several.values() for optimizer in runs))
    return {name: {o: runs[o] for o in order if o in runs} for name, runs in several.items()}


def _optimizer(cell: ReportCell) -> str:
    radius = cell["rho"] and f"rho {cell['rho']}"
    return joined([cell["opt"], radius, cell["m"] and f"m {cell['m']}"])


def means(found: Grid) -> pd.DataFrame:
    """Mean accuracy in percent: methods by optimizers, NaN where there is none."""
    return pd.DataFrame(
        {
            name: {o: 100 * np.mean([c["last"] for c in runs]) for o, runs in each.items()}
            for name, each in found.items()
        }
    ).T


def table(found: Grid) -> pd.DataFrame:
    """A line for each method and optimizer."""
    lines = []
    for name, each in found.items():
        reference = {cell["seed"]: cell for cell in next(iter(each.values()))}
        for number, (optimizer, runs) in enumerate(each.items()):
            pairs = [(c["last"], reference[c["seed"]]["last"]) for c in runs if c["seed"] in reference]
            gain = _gain([100 * (a - b) for a, b in pairs]) if number and pairs else ""
            wrong = [c["memorised"] for c in runs if c["memorised"] is not None]
            lines.append(
                [
                    name if not number else "",
                    optimizer,
                    f"{100 * np.mean([c['last'] for c in runs]):.2f}",
                    gain,
                    f"{100 * np.mean(wrong):.2f}" if wrong else "",
                    f"{np.mean([c['gradient_evaluations'] for c in runs]):.0f}",
                    str(len(runs)),
                ]
            )
    columns = ["method", "optimizer", "accuracy (%)", "gain [95 %]", "wrong labels learnt (%)", "gradients", "n"]
    return pd.DataFrame(lines, columns=columns)


def _gain(values: Sequence[float]) -> str:
    estimate = statistics.estimate(values, (1 - COVERAGE) / 2)
    interval = "" if estimate.low is None else f" [{estimate.low:+.2f}, {estimate.high:+.2f}]"
    return f"{estimate.mean:+.2f}{interval}"
