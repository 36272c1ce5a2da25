"""How sensitive a recipe is to its tuning: regret over the noise rates, the gain of knowing the noise, the cost of a
wrong rate. All from means over seeds at the last epoch; differences are in percentage points."""

import itertools
import re
from collections.abc import Sequence

import pandas as pd

from noisysam.report.tables import ReportCell, Summary, column_name, finished

RATE = re.compile(r"^(\d*\.?\d+)x$")  # a misspecified rate, such as 0.5x


def regret(summaries: Sequence[Summary]) -> pd.DataFrame | None:
    """How far each row, with one configuration for all rates, is behind the best row at each rate, and at worst.
    None for a single row or rate. Only rows with results at every rate."""
    means = _means(summaries)
    columns = list(dict.fromkeys(column for _, column in means))
    rows = [row for row in dict.fromkeys(row for row, _ in means) if all((row, c) in means for c in columns)]
    if len(columns) < 2 or len(rows) < 2:
        return None
    best = {c: max(means[row, c] for row in rows) for c in columns}
    lines = []
    for row in rows:
        behind = [100 * (best[c] - means[row, c]) for c in columns]
        lines.append((max(behind), [row, *(f"{b:.2f}" for b in behind), f"{max(behind):.2f}"]))
    return pd.DataFrame([line for _, line in sorted(lines, key=lambda x: x[0])], columns=["row", *columns, "worst"])


def oracle_gap(cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> pd.DataFrame | None:
    """The gain of an oracle row over each blind row of the same method and optimizer; None if there are none."""
    recipe = {c["row"]: (c["method"], c["opt"]) for c in finished(cells)}
    oracle = {c["row"] for c in finished(cells) if c["oracle"]}
    pairs = [(a, b) for a in recipe for b in recipe if recipe[a] == recipe[b] and a in oracle and b not in oracle]
    return _differences(summaries, pairs, ("oracle row", "blind row"))


def misspecified(cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> pd.DataFrame | None:
    """The loss of a method that is given a wrong noise rate (an option such as 0.5x) against the same method with the
    right rate; None if there is no such pair of rows."""
    told: dict[str, float] = {}
    rest: dict[str, object] = {}
    for cell in finished(cells):
        factors = {k: RATE.match(str(v)) for k, v in cell["method_options"].items()}
        options = {k: v for k, v in cell["method_options"].items() if not factors[k] and v is not None}
        told[cell["row"]] = next((float(m[1]) for m in factors.values() if m), 1.0)
        rest[cell["row"]] = (cell["method"], cell["opt"], options)
    pairs = [(a, b) for a, b in itertools.product(told, told) if told[a] != 1 == told[b] and rest[a] == rest[b]]
    return _differences(summaries, pairs, ("row with a wrong rate", "row with the right one"))


def _differences(
    summaries: Sequence[Summary], pairs: Sequence[tuple[str, str]], names: tuple[str, str]
) -> pd.DataFrame | None:
    """First row minus second at each noise."""
    means = _means(summaries)
    columns = list(dict.fromkeys(column for _, column in means))
    lines = []
    for a, b in pairs:
        found = [100 * (means[a, c] - means[b, c]) if {(a, c), (b, c)} <= means.keys() else None for c in columns]
        if any(f is not None for f in found):
            lines.append([a, b, *("" if f is None else f"{f:+.2f}" for f in found)])
    return pd.DataFrame(lines, columns=[*names, *columns]) if lines else None


def _means(summaries: Sequence[Summary]) -> dict[tuple[str, str], float]:
    return {(s["row"], column_name(s)): s["mean"] for s in summaries if s["mean"] is not None}
