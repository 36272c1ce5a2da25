"""Rows compared over all noise rates and seeds: mean rank, probability of improvement, performance profile.

The measures are those of rliable (Agarwal et al. 2021, arXiv 2108.13264), for paired cells: here all rows of a cell
share noise, labels and seed, so ranks and wins are taken within the cell, and a resampled seed is resampled for all
rows. (The library draws the runs of each row by themselves, and from NumPy's global state whatever seed it is given.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from noisysam.report import figures
from noisysam.report.document import Figure, Section, Table
from noisysam.report.tables import COVERAGE, INTERVALS, ReportCell, column_name, finished, joined

MANY = 5  # rows from which on they are ranked
CELLS = 4  # that each of them has at least
DRAWS = 5_000  # of the bootstrap

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """The last epoch's accuracies of rows that finished the same cells: ``scores`` (noises, seeds, rows); rows that
    lack one of these cells."""

    rows: tuple[str, ...]
    places: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: Array
    lacking: tuple[str, ...]


def block(cells: Sequence[ReportCell]) -> Block | None:
    """The first seeds, and the rows that finished all noises with them, that make the most cells; None where there are
    fewer than ``MANY`` rows, two noises or ``CELLS`` cells."""
    done = {(cell["row"], column_name(cell), cell["seed"]): cell["last"] for cell in finished(cells)}
    rows, seeds = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("row", "seed"))
    places = tuple(dict.fromkeys(place for _, place, _ in done))
    found: Block | None = None
    if len(places) < 2:
        return None
    for count in range(1, len(seeds) + 1):
        whole = [r for r in rows if all((r, p, s) in done for p in places for s in seeds[:count])]
        if len(whole) < MANY or len(places) * count < CELLS or (found and len(whole) * count < found.scores[0].size):
            continue
        scores = np.array([[[done[r, p, s] for r in whole] for s in seeds[:count]] for p in places])
        lacking = tuple(r for r in rows if r not in whole and any((r, p, s) in done for p in places for s in seeds))
        found = Block(tuple(whole), places, tuple(seeds[:count]), scores, lacking)
    return found


def ranks(scores: Array) -> Array:
    """Ranks of the rows within each cell, 1 for the highest score, their mean where some are equal: (..., rows)."""
    return np.asarray(stats.rankdata(-scores, axis=-1), np.float64)


def wins(scores: Array, reference: int) -> Array:
    """1 where a row is above the reference in a cell, 0 below, 1/2 where they are equal: (..., rows)."""
    return np.asarray((np.sign(scores - scores[..., [reference]]) + 1) / 2, np.float64)


def bootstrap(values: Array, level: float = (1 - COVERAGE) / 2, seed: int = 0) -> list[tuple[float, float] | None]:
    """Intervals of the means of ``values`` (strata, n, rows) with coverage 1 - 2 ``level``, by the stratified
    bootstrap: seeds are drawn within each stratum, for all rows at once, n - 1 of n, so that the variance of a
    stratum's mean is unbiased (McCarthy and Snowden 1985). The percentiles are those at which the normal law has the
    quantiles of Student's t (Hesterberg 2015, arXiv 1411.5279), with Satterthwaite's degrees of freedom. None for a row
    whose values are the same within each stratum: its draws have no spread, and say nothing of cells not seen."""
    strata, n, rows = values.shape
    rng = np.random.default_rng(seed)
    means = np.zeros((DRAWS, rows))
    for stratum in values:
        counts = rng.multinomial(n - 1, np.full(n, 1 / n), DRAWS)
        means += counts @ stratum / (n - 1) / strata
    spread = values.var(axis=1, ddof=1)
    found: list[tuple[float, float] | None] = []
    for row in range(rows):
        if not spread[:, row].any():
            found.append(None)
            continue
        freedom = spread[:, row].sum() ** 2 / (spread[:, row] ** 2 / (n - 1)).sum()
        tail = float(special.ndtr(special.stdtrit(freedom, level)))
        low, high = np.quantile(means[:, row], [tail, 1 - tail])
        found.append((float(low), float(high)))
    return found


def share_of_wins(won: float, cells: int, level: float = (1 - COVERAGE) / 2) -> tuple[float, float]:
    """Interval of the probability of improvement from ``won`` of ``cells`` (Clopper and Pearson 1934). The probability
    may differ between noise rates: wins then vary less than the binomial law says (Hoeffding 1956), and the interval
    covers more. It needs no draws, which would give no interval at all where every cell was won."""
    low = 0.0 if won <= 0 else float(stats.beta.ppf(level, won, cells - won + 1))
    high = 1.0 if won >= cells else float(stats.beta.ppf(1 - level, won + 1, cells - won))
    return low, high


def sections(cells: Sequence[ReportCell]) -> list[Section]:
    """The ranking of a study with many rows; nothing for one with few."""
    found = block(cells)
    if found is None:
        return []
    rows, strata, n = found.rows, len(found.places), len(found.seeds)
    ranked, reference = ranks(found.scores), _reference(cells, rows)
    won = wins(found.scores, reference).sum(axis=(0, 1))
    spans = bootstrap(ranked) if n >= INTERVALS else [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: ranked[..., row].mean())
    lines = []
    for row in order:
        line = [rows[row], f"{ranked[..., row].mean():.2f}{_span(spans[row])}"]
        line.append(f"{ranked[..., row].min():g} to {ranked[..., row].max():g}")
        if row == reference:
            line += ["", ""]
        else:
            share = share_of_wins(won[row], strata * n)
            line += [f"{won[row]:g} of {strata * n}", f"{won[row] / (strata * n):.2f}{_span(share)}"]
        lines.append(line)
    columns = ["row", "mean rank", "ranks", f"better than {rows[reference]} in", "probability of that [95 % interval]"]
    behind = 100 * (found.scores.max(axis=-1, keepdims=True) - found.scores)
    shown = order[: figures.TOGETHER]
    shown = shown if reference in shown else [*shown[:-1], reference]
    caption = (
        "Performance profiles: in which share of the cells a row is no more than so many points behind the best row of"
        f" the cell{'' if len(shown) == len(rows) else '; the first rows by mean rank, and the reference'}."
    )
    return [
        Section(
            "All noise rates and seeds together",
            _said(found, n),
            tables=[Table("ranks", pd.DataFrame(lines, columns=columns))],
            figures=[
                Figure("profile", caption, figures.profile({rows[r]: behind[..., r].ravel().tolist() for r in shown}))
            ],
        )
    ]


def _said(found: Block, n: int) -> str:
    span = f" It has no interval with fewer than {INTERVALS} seeds."
    if n >= INTERVALS:
        span = (
            " [ ] beside it is its 95 % interval by the stratified bootstrap over seeds; none where a row has one rank"
            " at each noise."
        )
    left = f" Left out, since they lack some of these cells: {'; '.join(found.lacking)}." if found.lacking else ""
    seeds = f"seed{'s' * (n > 1)} {joined(found.seeds)}"
    return (
        f"Descriptive: {len(found.rows)} rows within each of {found.scores[..., 0].size} cells"
        f" ({joined(found.places)}; {seeds}), in which all share labels and seed; rank 1 is the highest accuracy at the"
        f" last epoch.{span} The probability that a row is better in a new cell has an interval by Clopper and Pearson,"
        f" as if cells with the same seed were independent.{left}"
    )


def _reference(cells: Sequence[ReportCell], rows: Sequence[str]) -> int:
    """Plain SGD, if it is a row, else the first one."""
    plain = [cell["row"] for cell in finished(cells) if (cell["method"], cell["opt"]) == ("ce", "sgd")]
    return next((number for number, row in enumerate(rows) if row in plain), 0)


def _span(interval: tuple[float, float] | None) -> str:
    return (
        "" if interval is None or not all(map(math.isfinite, interval)) else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    )
