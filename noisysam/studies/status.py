"""The status of a study as a table, for ``--status`` and live during a sweep."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from noisysam.studies.plan import Cell, runs
from noisysam.studies.state import CellStatus, cell_status, forecast, relative_cost, seconds, state
from noisysam.studies.sweep import Sweep
from noisysam.training.progress import duration

SHOWN = 20  # running cells of a live table


REFRESH = 1.0  # seconds


SAID = {
    "finished": "finished",
    "failed": "failed",
    "again": "failed",
    "held": "being trained by another process: waited for at the end",
    "stopped": "stopped after a whole epoch",
}


STATES = ("finished", "running", "interrupted", "failed", "damaged", "to do")


def status(name: str, cells: Sequence[Cell], store: Path) -> Group:
    """The status of a study: the number of cells in each state by row, the progress of running cells, the errors of
    failed and damaged ones, and the remaining cost."""
    states = {cell.key: state(cell, store) for cell in cells}
    counts = {row: Counter(states[c.key] for c in cells if c.row == row) for row in dict.fromkeys(c.row for c in cells)}
    total = Counter(states.values())
    table = Table("row", *(Column(s, justify="right") for s in STATES), box=None, pad_edge=False)
    for row, count in {**counts, "all": total}.items():
        table.add_row(Text(row), *(str(count[s]) for s in STATES))
    parts: list[RenderableType] = [table]
    running = [cell_status(cell, store) for cell in runs(cells) if states[cell.key] == "running"]
    failed = [cell_status(cell, store) for cell in runs(cells) if states[cell.key] == "failed"]
    damaged = [cell_status(cell, store) for cell in runs(cells) if states[cell.key] == "damaged"]
    if running:
        parts += [Text("\nrunning"), _running(running)]
    if failed:
        parts += [Text("\nfailed"), *(Text(f"{s.cell.label}: {s.error}") for s in failed)]
    if damaged:
        parts += [Text("\ndamaged records"), *(Text(f"{s.cell.label}: {s.error}") for s in damaged)]
    left = len(states) - total["finished"]
    cost = forecast(cells, store, states)
    text = "" if not left else ": " + ("cost unknown until a cell of each row has run" if cost is None
                                       else f"about {duration(cost)} one by one")  # fmt: skip
    return Group(*parts, Text(f"\n{name}: {extent(cells)}, {left} to do{text}"))


def extent(cells: Sequence[Cell]) -> str:
    """'8 cells', or '8 cells (6 runs)' if rows share runs."""
    number = len(runs(cells))
    return f"{len(cells)} cells" + (f" ({number} runs)" if number < len(cells) else "")


def _running(standings: Sequence[CellStatus]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for s in standings:
        ago = "" if s.quiet is None else f"{duration(s.quiet)} ago"
        table.add_row(Text(s.cell.label), s.epoch, ago)
    return table


@contextmanager
def live(name: str, sweep: Sweep) -> Iterator[bool]:
    """Show a live table on stderr during the block. Yields whether it is shown: only on a terminal."""
    if not sys.stderr.isatty():
        yield False
        return
    board = _Board(name, sweep)
    with Live(get_renderable=board, console=Console(stderr=True), refresh_per_second=1 / REFRESH, transient=True):
        yield True


class _Board:
    """Renders the current table."""

    def __init__(self, name: str, sweep: Sweep) -> None:
        self.name, self.sweep, self.started = name, sweep, time.time()
        self.rates: dict[str, float] = {}
        self.known = -1  # finished cells when the rates were taken

    def __call__(self) -> Group:
        sweep = self.sweep
        if self.known != sweep.finished:
            self.known = sweep.finished
            states = {cell.key: state(cell, sweep.store) for cell in sweep.cells}
            self.rates = seconds(sweep.cells, sweep.store, states)
        flying = [cell_status(cell, sweep.store) for cell in list(sweep.flying.values())[: 5 * SHOWN]]
        running = [s for s in flying if s.state == "running"][:SHOWN]
        counts = f"{sweep.finished} of {len(sweep.cells)} finished, {len(sweep.failed)} failed, {sweep.left} to do"
        left = [*sweep.queue, *sweep.flying.values()]
        spent = f"{duration(time.time() - self.started)} so far"
        if left and all(cell.row in self.rates for cell in left):
            ahead = sum(self.rates[cell.row] * relative_cost(cell.config) for cell in left)
            spent += f", about {duration(ahead)} of training ahead, one by one"
        return Group(Text(f"{self.name}: {counts} ({spent})"), _running(running))
