"""Figures of a report, the same bytes for the same figures. Lines differ in marker and dash as well as in colour."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from noisysam.report.claims import FEWEST, Effect, Verdict
from noisysam.report.tables import OWN_RATE, ReportCell, Summary, column_name, finished
from noisysam.runs import measures

# Okabe and Ito's eight colours, which readers with any colour vision can tell apart; the lightest comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
TOGETHER = len(COLOURS)  # lines in one panel; more can no longer be told apart
CLAIM = 70  # characters of a claim beside a line
FEW_CLASSES = 12  # whose numbers and names a matrix shows
CLASS = 14  # characters of the name of a class
NAMED = 12  # points in one panel that carry their names; more would cover each other

DRAWN = ("stage", "epoch", *(str(measure.column) for measure in measures.shown("curves")))  # columns of epochs.csv
Curve = Mapping[str, npt.NDArray[np.float64]]  # the epochs of a run's last stage, and what was measured in each
Curves = Mapping[str, Curve]  # key of a run -> its curve


def accuracy(summaries: Sequence[Summary]) -> Figure:
    """Test accuracy (percent) at the last epoch against the noise rate: a panel for each noise type, a line for each
    row, bands of one standard deviation where there are several seeds. Labels that bring their own rate are at the
    measured one. Many rows: a line of dots for each row, in the order of their means over the noises."""
    rows = list(dict.fromkeys(s["row"] for s in summaries))
    if len(rows) > TOGETHER or any(_kind(s) in OWN_RATE and s["flip_rate"] is None for s in summaries):
        return _dots(summaries, sorted(rows, key=_overall(summaries).__getitem__, reverse=True))
    kinds = list(dict.fromkeys(_kind(s) for s in summaries))
    figure, panels = panel_grid(1, len(kinds))
    for panel, kind in zip(panels, kinds, strict=True):
        for style, row in enumerate(rows):
            here = [s for s in summaries if s["row"] == row and _kind(s) == kind and s["mean"] is not None]
            here.sort(key=_rate)
            x, y = [100 * _rate(s) for s in here], np.array([100 * s["mean"] for s in here])
            sd = np.array([100 * (s["sd"] or 0.0) for s in here])
            own = {"linestyle": "none"} if kind in OWN_RATE else {}
            panel.plot(x, y, label=literal(row), **{**line_style(style), **own})
            if sd.any():
                panel.fill_between(x, y - sd, y + sd, color=COLOURS[style], alpha=0.15, linewidth=0)
        panel.set_xlabel(f"{literal(kind)} noise: {'measured flip' if kind in OWN_RATE else 'nominal'} rate (%)")
    panels[0].set_ylabel("test accuracy at the last epoch (%)")
    panels[-1].legend(fontsize="small")
    return figure


def _overall(summaries: Sequence[Summary]) -> dict[str, tuple[int, float]]:
    """Row -> the number of noises at which it has a mean, and the mean over them."""
    means: dict[str, list[float]] = {s["row"]: [] for s in summaries}
    for s in summaries:
        means[s["row"]] += [] if s["mean"] is None else [s["mean"]]
    return {row: (len(found), math.fsum(found) / max(len(found), 1)) for row, found in means.items()}


def two_rates(summaries: Sequence[Summary]) -> bool:
    """Whether lines of ``accuracy`` join no more than two rates, between which nothing was measured."""
    if len({s["row"] for s in summaries}) > TOGETHER:
        return False
    rates: dict[str, set[float]] = {}
    for s in summaries:
        if s["mean"] is not None and _kind(s) not in OWN_RATE:
            rates.setdefault(_kind(s), set()).add(s["noise"])
    return any(len(found) == 2 for found in rates.values())


def forest(verdicts: Sequence[Verdict]) -> Figure | None:
    """Each seed's difference, the mean and its interval for every effect of the claims that is in points, a line for
    each under its claim; None where there is none."""
    lines: list[tuple[str, Effect | None]] = []
    for number, verdict in enumerate(verdicts, 1):
        others = () if verdict.claim.kind == "grows" else verdict.others
        effects = [e for e in (*verdict.effects, *others) if e.unit == "points" and e.gains]
        if effects:
            lines.append((shorten(f"{number}. {verdict.text}", CLAIM, placeholder=" ..."), None))
            lines += [(shorten(effect.what, CLAIM, placeholder=" ..."), effect) for effect in effects]
    if not lines:
        return None
    figure, (panel,) = panel_grid(1, 1, width=9.0, height=0.9 + 0.24 * len(lines))
    for y, (_, effect) in enumerate(lines):
        if effect is None:
            continue
        gains = [gain for _, gain in effect.gains]
        panel.plot(gains, [y] * len(gains), "o", markersize=4, color=COLOURS[0], fillstyle="none", alpha=0.7)
        if effect.planned is not None:
            mean, low, high = effect.planned.mean, effect.planned.low, effect.planned.high
            panel.plot(mean, y, "|", color="black", markersize=9, markeredgewidth=2)
            if low is not None and high is not None and len(gains) >= FEWEST:
                panel.plot([low, high], [y, y], color="black", linewidth=1)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(lines)), [literal(name) for name, _ in lines], fontsize="small")
    for label, (_, effect) in zip(panel.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if effect else "bold")
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("difference in percentage points")
    return figure


def _dots(summaries: Sequence[Summary], rows: Sequence[str]) -> Figure:
    """A dot for each row and noise rate with bars of one standard deviation."""
    columns = list(dict.fromkeys(column_name(s) for s in summaries))
    figure, (panel,) = panel_grid(1, 1, width=7.5, height=0.9 + 0.24 * len(rows))
    for style, column in enumerate(columns):
        here = [s for s in summaries if column_name(s) == column and s["mean"] is not None]
        panel.errorbar(
            [100 * s["mean"] for s in here], [rows.index(s["row"]) for s in here],
            xerr=[100 * (s["sd"] or 0.0) for s in here], label=literal(column),
            linestyle="none", color=COLOURS[style % TOGETHER], marker=MARKERS[style % TOGETHER], markersize=5,
        )  # fmt: skip
    panel.set_yticks(range(len(rows)), [literal(row) for row in rows], fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel("test accuracy at the last epoch (%)")
    panel.legend(fontsize="small")
    return figure


def curves(cells: Sequence[ReportCell], epochs: Curves) -> list[tuple[str, Figure]]:
    """Learning curves, means over seeds with bands of one standard deviation: test accuracy, memorisation, recovery and
    detection over the epochs of the last stage, a line of panels for each noise. If there are more rows than one panel
    can show, they are split into several figures, each with the first row as reference and its own name."""
    rows = list(dict.fromkeys(cell["row"] for cell in finished(cells)))
    parts = [rows]
    if len(rows) > TOGETHER:
        parts = [[rows[0], *rows[i : i + TOGETHER - 1]] for i in range(1, len(rows), TOGETHER - 1)]
    names = [f"curves-{n}" for n in range(1, len(parts) + 1)] if len(parts) > 1 else ["curves"]
    return [(name, _curves(cells, epochs, part)) for name, part in zip(names, parts, strict=True)]


def _curves(cells: Sequence[ReportCell], epochs: Curves, rows: Sequence[str]) -> Figure:
    done = finished(cells)
    columns = list(dict.fromkeys(column_name(cell) for cell in done))
    drawn = measures.shown("curves")
    figure, panels = panel_grid(len(columns), len(drawn), width=3.4 * len(drawn), height=2.9 * len(columns))
    for panel, (column, measure) in zip(panels, itertools.product(columns, drawn), strict=True):
        for style, row in enumerate(rows):
            runs = [epochs[c["key"]] for c in done if c["row"] == row and column_name(c) == column]
            measured, scale = _by_epoch(runs, str(measure.column)), measure.scale
            x, y = [epoch + 1 for epoch in measured], np.array([scale * np.mean(v) for v in measured.values()])
            sd = np.array([scale * np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in measured.values()])
            panel.plot(x, y, label=literal(row), **line_style(style, marker=len(x) < 3))
            if sd.any():
                panel.fill_between(x, y - sd, y + sd, color=COLOURS[style % TOGETHER], alpha=0.15, linewidth=0)
        panel.set_title(f"{literal(column)}: {measure.label}", fontsize="small")
        if column == columns[-1]:
            panel.set_xlabel("epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def curve(lines: Sequence[Mapping[str, float | None]]) -> Curve:
    """What is drawn of the epochs of a run: those of its last stage, nan where a value was not measured."""
    last = max((line["stage"] or 0 for line in lines), default=0)
    stage = [line for line in lines if line["stage"] == last]
    found = {name: [line.get(name) for line in stage if line["epoch"] is not None] for name in DRAWN if name != "stage"}
    return {name: np.array([np.nan if v is None else v for v in values], float) for name, values in found.items()}


def _by_epoch(runs: Sequence[Curve], measure: str) -> dict[int, list[float]]:
    """Epoch -> the finite values of the runs that measured it."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for epoch, value in zip(run.get("epoch", ()), run.get(measure, ()), strict=True):
            if math.isfinite(value):
                values.setdefault(int(epoch), []).append(float(value))
    return dict(sorted(values.items()))


def cost(cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> Figure:
    """Test accuracy at the last epoch against gradient evaluations per training image in the whole run, a panel for
    each noise. The step line joins the rows that are better than every cheaper row; if there are many rows, only
    those have labels."""
    spent = gradients(cells)
    columns = list(dict.fromkeys(column_name(s) for s in summaries))
    figure, panels = panel_grid(1, len(columns))
    for panel, column in zip(panels, columns, strict=True):
        here = [s for s in summaries if column_name(s) == column and s["mean"] is not None and s["row"] in spent]
        points = sorted((spent[s["row"]], -100 * s["mean"], s["row"]) for s in here)
        panel.plot([x for x, _, _ in points], [-y for _, y, _ in points], "o", color=COLOURS[0], markersize=4)
        front, best = [], -math.inf
        for x, y, row in points:
            if -y > best:
                best = -y
                front.append((x, best, row))
        panel.plot(
            [x for x, _, _ in front], [y for _, y, _ in front], drawstyle="steps-post", color=COLOURS[1], linewidth=1
        )
        middle = math.sqrt(points[0][0] * points[-1][0]) if points else 0.0
        for x, y, row in [(x, -y, row) for x, y, row in points] if len(points) <= NAMED else front:
            side, shift = ("left", 4) if x <= middle else ("right", -4)  # names stay within the panel
            panel.annotate(
                literal(row), (x, y), xytext=(shift, 4), textcoords="offset points", fontsize="small", ha=side
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(literal(column), fontsize="small")
        panel.set_xlabel("gradient evaluations per training image")
        panel.margins(x=0.25, y=0.15)
    panels[0].set_ylabel("test accuracy at the last epoch (%)")
    return figure


def gradients(cells: Sequence[ReportCell]) -> dict[str, float]:
    """Row -> gradient evaluations per training image in a whole run, all stages; mean over its finished runs."""
    found: dict[str, list[float]] = {}
    for cell in finished(cells):
        if cell.get("gradient_samples") and cell.get("train"):
            found.setdefault(cell["row"], []).append(cell["gradient_samples"] / cell["train"])
    return {row: math.fsum(values) / len(values) for row, values in found.items()}


def radii(sweeps: Mapping[str, Sequence[Summary]], radius: Callable[[Summary], float]) -> Figure:
    """Test accuracy at the last epoch against the radius of the perturbation, a panel for each sweep, a line for each
    noise, bands of one standard deviation."""
    figure, panels = panel_grid(1, len(sweeps))
    for panel, (name, summaries) in zip(panels, sweeps.items(), strict=True):
        for style, column in enumerate(dict.fromkeys(column_name(s) for s in summaries)):
            here = [s for s in summaries if column_name(s) == column and s["mean"] is not None]
            here.sort(key=radius)
            x, y = [radius(s) for s in here], np.array([100 * s["mean"] for s in here])
            sd = np.array([100 * (s["sd"] or 0.0) for s in here])
            panel.plot(x, y, label=literal(column), **line_style(style))
            if sd.any():
                panel.fill_between(x, y - sd, y + sd, color=COLOURS[style % TOGETHER], alpha=0.15, linewidth=0)
        found = sorted({radius(s) for s in summaries})
        panel.set_xscale("symlog", linthresh=min((r for r in found if r > 0), default=0.1), linscale=0.5)
        if len(found) <= TOGETHER:
            panel.set_xticks(found, [f"{r:g}" for r in found])
            panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(literal(name), fontsize="small")
        panel.set_xlabel("radius rho")
        panel.legend(fontsize="small")
    panels[0].set_ylabel("test accuracy at the last epoch (%)")
    return figure


def matrices(
    named: Mapping[str, Sequence[Sequence[float]]], x: str, y: str, classes: Sequence[str] | None = None
) -> Figure:
    """Row-stochastic matrices as heat maps with shared colours, in percent; with numbers, and the names of the
    ``classes`` where they are known, if there are few."""
    across = min(4, len(named))
    down = -(-len(named) // across)
    figure, panels = panel_grid(down, across, width=3.6 * across, height=3.5 * down)
    for panel, (name, matrix) in zip(panels, named.items(), strict=False):
        values = 100 * np.array(matrix)
        image = panel.imshow(values, cmap="cividis", vmin=0, vmax=100)
        panel.set_title(literal(name), fontsize="small")
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.grid(False)
        if len(values) <= FEW_CLASSES:
            shown = classes if classes is not None and len(classes) == len(values) else range(len(values))
            labels = [literal(shorten(str(each), CLASS, placeholder="...")) for each in shown]
            panel.set_xticks(range(len(values)), labels, fontsize=7, rotation=90 if classes else 0)
            panel.set_yticks(range(len(values)), labels, fontsize=7)
            for i, j in itertools.product(range(len(values)), repeat=2):
                colour = "black" if values[i, j] > 50 else "white"
                panel.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=6, color=colour)
    for panel in panels[len(named) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=panels, label="%", shrink=0.8)
    return figure


def crossed(means: pd.DataFrame) -> Figure:
    """A heat map of means in percent with their numbers: methods by optimizers, empty where there is none."""
    width, height = 2.5 + 1.1 * len(means.columns), 1.4 + 0.32 * len(means)
    figure, (panel,) = panel_grid(1, 1, width=width, height=height)
    values = means.to_numpy(float)
    image = panel.imshow(values, cmap="cividis", aspect="auto")
    panel.grid(False)
    panel.set_xticks(range(len(means.columns)), [literal(name) for name in means.columns], fontsize="small")
    panel.set_yticks(range(len(means)), [literal(name) for name in means.index], fontsize="small")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            panel.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white")
    figure.colorbar(image, ax=panel, label="%")
    return figure


def profile(behind: Mapping[str, Sequence[float]]) -> Figure:
    """Performance profile (Dolan and More 2002): for each row the share of cells in which it is no more than so many
    points behind the best row of the cell. ``behind``: row -> points behind, of each cell."""
    figure, (panel,) = panel_grid(1, 1, width=7.5)
    worst = max(max(values) for values in behind.values())
    for style, (row, values) in enumerate(behind.items()):
        x = [0.0, *sorted(values), 1.05 * worst or 1.0]
        y = [100 * float(np.mean(np.asarray(values) <= at)) for at in x]
        panel.step(x, y, where="post", label=literal(row), **line_style(style, marker=False))
    panel.set_xlabel("percentage points behind the best row of a cell, at most")
    panel.set_ylabel("share of cells (%)")
    panel.set_ylim(-2, 102)
    panel.set_xlim(left=0)
    panel.legend(fontsize="small", loc="lower right")
    return figure


def panel_grid(
    down: int, across: int, width: float = 0.0, height: float = 4.2, **share: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``down`` x ``across`` panels with faint grids; the panels row by row. Sizes in inches; ``share``:
    matplotlib's ``sharex`` and ``sharey``."""
    figure = Figure(figsize=(width or 1.5 + 4.5 * across, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(down, across, squeeze=False, **share).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def line_style(number: int, marker: bool = True) -> dict[str, Any]:
    """Colour, dash and marker of a panel's line of this number, from 0."""
    i = number % TOGETHER
    return {
        "color": COLOURS[i],
        "marker": MARKERS[i] if marker else None,
        "linestyle": LINES[(number // TOGETHER + number) % len(LINES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def literal(name: str) -> str:
    """A name that matplotlib prints literally: no formulas, no hidden legend entries."""
    shown = " ".join(str(name).split()).replace("\\", "\\\\").replace("$", "\\$")
    return f" {shown}" if shown.startswith("_") else shown


def _kind(summary: Summary) -> str:
    return str(summary["noise_type"]).partition(":")[0]


def _rate(summary: Summary) -> float:
    return float(summary["flip_rate"] if _kind(summary) in OWN_RATE else summary["noise"])
