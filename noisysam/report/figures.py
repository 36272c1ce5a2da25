"""Figures of a report, the same bytes for the same figures."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from noisysam.records import atomic
from noisysam.report.tables import OWN_RATE, Summary

# Okabe and Ito's eight colours, which readers with any colour vision can tell apart; the lightest comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")


def accuracy(summaries: Sequence[Summary], path: Path) -> None:
    """Test accuracy (percent) against the noise rate: a panel for each noise type, a line for each row, bars of one
    standard deviation where there are several seeds. Labels that bring their own rate stand at the measured one."""
    rows = list(dict.fromkeys(s["row"] for s in summaries))
    kinds = list(dict.fromkeys(_kind(s) for s in summaries))
    figure = Figure(figsize=(1.5 + 4.5 * len(kinds), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for row, style in zip(rows, itertools.cycle(range(len(LINES) * len(COLOURS))), strict=False):
            here = [s for s in summaries if s["row"] == row and _kind(s) == kind and s["mean"] is not None]
            here.sort(key=_rate)
            panel.errorbar(
                [100 * _rate(s) for s in here],
                [100 * s["mean"] for s in here],
                yerr=[100 * (s["sd"] or 0.0) for s in here],
                label=row,
                color=COLOURS[style % len(COLOURS)],
                marker=MARKERS[style % len(MARKERS)],
                linestyle="none" if kind in OWN_RATE else LINES[style // len(COLOURS)],
                capsize=3,
                markersize=5,
            )
        panel.set_xlabel(f"{kind} noise: {'measured flip' if kind in OWN_RATE else 'nominal'} rate (%)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy at the last epoch (%)")
    panels[-1].legend(fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def _kind(summary: Summary) -> str:
    return str(summary["noise_type"]).partition(":")[0]


def _rate(summary: Summary) -> float:
    return float(summary["flip_rate"] if _kind(summary) in OWN_RATE else summary["noise"])
