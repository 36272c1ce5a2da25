"""Selection of cells for a sweep."""

import difflib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig
from noisysam.studies.plan import Cell, runs
from noisysam.studies.state import relative_cost
from noisysam.training.devices import resolve_device, resolve_precision

# which cells


def select(cells: Sequence[Cell], only: Iterable[str] = (), shard: str | None = None) -> list[Cell]:
    """The cells that match the 'field=value' conditions of ``only``, and of those the part of shard 'i/n'.

    A field is ``row`` or one of the configuration; several conditions on one field are alternatives. The shards are
    disjoint, together they contain all cells, and each costs about the same.
    """
    chosen = list(cells)
    wanted: dict[str, list[str]] = {}
    for text in only:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--only {text}: write it as field=value, such as row=SAM or noise=0.8")
        if name != "row" and name not in RunConfig.model_fields:
            near = difflib.get_close_matches(name, ["row", *RunConfig.model_fields], n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"--only {text}: there is no field {name}{hint}")
        if not any(_matches(_value(cell, name), value) for cell in cells):
            known = ", ".join(dict.fromkeys(str(_value(cell, name)) for cell in cells))
            raise UserError(f"--only {text}: no cell has it (there are {known})")
        wanted.setdefault(name, []).append(value)
    for name, values in wanted.items():
        chosen = [cell for cell in chosen if any(_matches(_value(cell, name), value) for value in values)]
    if not chosen:
        raise UserError(f"--only {' --only '.join(only)}: no cell has all of it")
    if shard is None:
        return chosen
    parts = re.fullmatch(r"(\d+)/(\d+)", shard)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise UserError(f"--shard {shard}: write it as i/n, such as 1/4, with i from 1 to n")
    dealt = sorted(runs(chosen), key=lambda cell: -relative_cost(cell.config))[int(parts[1]) - 1 :: int(parts[2])]
    mine = {cell.key for cell in dealt}
    return [cell for cell in chosen if cell.key in mine]


def _value(cell: Cell, name: str) -> Any:
    return cell.row if name == "row" else getattr(cell.config, name)


def _matches(value: Any, text: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


def check_precision(cells: Iterable[Cell]) -> None:
    """``UserError`` if cells would be trained in different precisions, which a report refuses: ``auto`` chooses fp32
    for small radii. Cells whose device is not on this machine are skipped."""
    found: dict[str, Cell] = {}
    for cell in cells:
        with suppress(UserError):
            found.setdefault(resolve_precision(cell.config, resolve_device(cell.config.device)), cell)
    if len(found) > 1:
        named = ", ".join(f"{precision} ({cell.label})" for precision, cell in sorted(found.items()))
        raise UserError(f"the study would mix precisions, which no report takes: {named}; set precision in its base")
