"""Sections of a report that follow its verdicts: cost, tuning, learning curves, radii, confusion."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from noisysam.report import figures, robust, tables
from noisysam.report.document import Figure, Section, Table
from noisysam.report.tables import ReportCell, Summary, finished, place_name
from noisysam.runs.record import RunFolder

EQUAL_COST = 0.05  # rows whose gradient evaluations differ by no more of their number are matched in compute
MATRICES = 4  # heat maps in a figure at most


def shade(summaries: Sequence[Summary]) -> str:
    """What bars and bands of a figure show, if there are any."""
    return "; ± standard deviation over seeds" if any(s["sd"] for s in summaries) else ""


def cost(cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> Section:
    """Accuracy against gradient evaluations."""
    spent = figures.gradients(cells)
    rows = sorted(spent, key=lambda row: spent[row])
    frame = tables.layout(summaries).set_index("row").drop(columns=["m", "rho"])
    found = [[row, f"{spent[row]:.1f}", *frame.loc[row]] for row in rows]
    groups: list[list[str]] = []
    for row in rows:
        if groups and spent[row] <= (1 + EQUAL_COST) * spent[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return Section(
        "Cost",
        "Gradient evaluations per training image in the whole run, all stages and networks, and the last epoch's test"
        " accuracy (%). Rows of one list are matched in compute (within 5 %).",
        lines=[f"{spent[group[0]]:.0f}: {', '.join(group)}" for group in groups if len(group) > 1],
        tables=[Table("cost", pd.DataFrame(found, columns=["row", "gradient evaluations", *frame.columns]))],
        figures=[
            Figure("cost", "Test accuracy at the last epoch against gradient evaluations; the line joins the rows that"
                   " are better than every cheaper row.", figures.cost(cells, summaries))
        ],
    )  # fmt: skip


def tuning(cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> list[Section]:
    """Regret over the rates, the gain of oracles, the cost of a wrong rate, as far as the study has the rows."""
    found = [
        ("regret", "Regret: percentage points behind the best row at each rate, with one configuration for all rates"
         " (descriptive: the best row is chosen on the test set).", robust.regret(summaries)),
        ("oracle-gap", "Gain of oracle rows over blind rows with the same method and optimizer, in percentage points.",
         robust.oracle_gap(cells, summaries)),
        ("misspecified", "Effect of giving a method a wrong noise rate, in percentage points.",
         robust.misspecified(cells, summaries)),
    ]  # fmt: skip
    there = [Table(name, frame, text=text) for name, text, frame in found if frame is not None]
    return [Section("Robustness of the recipe", tables=there)] if there else []


def curves(cells: Sequence[ReportCell], epochs: figures.Curves) -> Section:
    drawn = figures.curves(cells, epochs)
    bands = ", bands of one standard deviation" if max(Counter(map(place_name, finished(cells))).values()) > 1 else ""
    caption = (
        f"Means over seeds{bands}, last stage: test accuracy, wrong labels memorised and recovered, and how well the"
        " loss tells wrong labels from right ones."
    )
    return Section("Learning curves", figures=[Figure(name, caption, drawing) for name, drawing in drawn])


def radii(cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> list[Section]:
    """A figure for each recipe that the study runs at three radii or more."""
    recipes: dict[str, dict[str, float]] = {}
    for cell in finished(cells):
        if isinstance(cell["rho"], int | float):
            name = f"{cell['opt']}" + ("" if cell["method"] == "ce" else f", {cell['method']}") + f", m {cell['m']}"
            recipes.setdefault(name, {})[cell["row"]] = float(cell["rho"])
    sweeps = {n: rows for n, rows in recipes.items() if len(set(rows.values())) == len(rows) >= 3}
    if not sweeps:
        return []
    radius = {row: rho for rows in sweeps.values() for row, rho in rows.items()}
    drawing = figures.radii(
        {name: [s for s in summaries if s["row"] in rows] for name, rows in sweeps.items()},
        lambda summary: radius[summary["row"]],
    )
    caption = f"Test accuracy at the last epoch against the radius{shade(summaries)}."
    return [Section("Radius", figures=[Figure("radius", caption, drawing)])]


def confusions(store: Path, cells: Sequence[ReportCell]) -> list[Section]:
    """Test confusion at the last epoch of the first rows, at the first noise and seed, if runs recorded it."""
    done = finished(cells)
    first = [c for c in done if (tables.column_name(c), c["seed"]) == (tables.column_name(done[0]), done[0]["seed"])]
    found: dict[str, Any] = {}
    for cell in first:
        counts = RunFolder(store, cell["key"]).confusion
        if counts is not None and len(found) < MATRICES:
            found[place_name(cell)] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if not found:
        return []
    caption = "Test images of each class (rows) by predicted class (columns), in percent, at the last epoch."
    drawing = figures.matrices(found, "predicted", "class", tables.classes(cells))
    return [Section("Confusion", figures=[Figure("confusion", caption, drawing, detail=True)])]
