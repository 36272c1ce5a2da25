"""The state of cells and the remaining cost of a study."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisysam.core.errors import DamagedFile, UnknownName
from noisysam.core.text import last_line
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.studies.plan import Cell, runs

SAMPLE = 10  # finished cells of a row that a forecast looks at


# how they stand


def state(cell: Cell, store: Path) -> str:
    """``finished``, ``failed``, ``running`` (as far as the record knows), ``interrupted``, ``damaged`` (its record
    cannot be read), or ``to do``."""
    try:
        return RunFolder(store, cell.key).status or "to do"
    except DamagedFile:
        return "damaged"


def finished(cell: Cell, store: Path) -> bool:
    """Whether a cell's result is in the store."""
    return state(cell, store) == "finished"


@dataclass(frozen=True)
class CellStatus:
    """The status of a cell: its ``state``, the last recorded epoch, seconds since then, and the error if it failed."""

    cell: Cell
    state: str
    epoch: str = ""
    quiet: float | None = None
    error: str | None = None


def cell_status(cell: Cell, store: Path) -> CellStatus:
    """The status of a cell, read from its record without a lock."""
    found, folder = state(cell, store), RunFolder(store, cell.key)
    if found == "failed":
        record = folder.sound_record
        return CellStatus(cell, found, error=reason(None if record is None else record["error"]))
    if found == "damaged":
        return CellStatus(cell, found, error=damage(folder))
    if found != "running":
        return CellStatus(cell, found)
    path = folder.path / "epochs.csv"
    try:
        lines = folder.epochs
    except DamagedFile as error:
        return CellStatus(cell, found, str(error))
    if not lines:
        return CellStatus(cell, found, "first epoch", time.time() - (folder.path / "record.json").stat().st_mtime)
    stage, epoch = int(lines[-1].get("stage") or 0), int(lines[-1].get("epoch") or 0) + 1
    where = f"epoch {epoch}/{cell.config.epochs}"
    return CellStatus(
        cell, found, f"stage {stage + 1}, {where}" if stage else where, time.time() - path.stat().st_mtime
    )


def damage(folder: RunFolder) -> str:
    """The reason why a record cannot be read."""
    try:
        folder.record  # noqa: B018
    except DamagedFile as error:
        return str(error)
    return "its record can be read again"


def reason(error: str | None) -> str:
    """The error of a run, in one line."""
    return last_line(error or "") or "unknown"


# what they cost

IMAGES = 50_000  # of a training set, for the estimate alone


def relative_cost(config: RunConfig) -> float:
    """Approximate number of forward passes of single images in a run (a backward pass counts as two). Used to order and
    divide cells."""
    try:
        recipe = config.recipe()
    except UnknownName:  # of a plug-in, which is not run for an estimate
        return config.epochs * (config.train_subset or IMAGES) * 3
    forwards, backwards = recipe.optimizer.cost(recipe.optimizer_options)
    networks = recipe.method.networks
    return config.epochs * (config.train_subset or IMAGES) * networks * (forwards + 2 * backwards)


def seconds(cells: Sequence[Cell], store: Path, states: Mapping[str, str]) -> dict[str, float]:
    """Training seconds per unit of ``relative_cost`` for each row, from its first finished cells."""
    spent: dict[str, list[float]] = {}
    for cell in cells:
        if states[cell.key] == "finished" and len(spent.setdefault(cell.row, [])) < SAMPLE:
            record = RunFolder(store, cell.key).sound_record
            if record is not None:
                took = record["cost"]["train_seconds"] + record["cost"]["eval_seconds"]
                spent[cell.row].append(took / relative_cost(cell.config))
    return {row: sum(rates) / len(rates) for row, rates in spent.items() if rates}


def forecast(cells: Sequence[Cell], store: Path, states: Mapping[str, str] | None = None) -> float | None:
    """Estimated training seconds of the unfinished cells, from finished cells of the same rows; None if a row has no
    finished cell."""
    states = states or {cell.key: state(cell, store) for cell in cells}
    left = [cell for cell in runs(cells) if states[cell.key] != "finished"]
    known = seconds(cells, store, states)
    if not left or any(cell.row not in known for cell in left):
        return None
    return sum(known[cell.row] * relative_cost(cell.config) for cell in left)


def longest_first(cells: Sequence[Cell], todo: Sequence[Cell], store: Path, states: Mapping[str, str]) -> list[Cell]:
    """The cells ``todo`` problem by problem (seed and noise, in the order of the study), so that rows that are compared
    are finished together; within a problem by the time that they are expected to take: by finished cells of their rows
    where there are any (of any row, else), and by ``relative_cost``."""
    known = seconds(cells, store, states)
    typical = sum(known.values()) / len(known) if known else 1.0
    problems = list(dict.fromkeys(map(_problem, cells)))
    return sorted(
        todo,
        key=lambda cell: (problems.index(_problem(cell)), -known.get(cell.row, typical) * relative_cost(cell.config)),
    )


def _problem(cell: Cell) -> tuple[Any, ...]:
    return cell.config.seed, cell.config.noise_type, cell.config.noise
