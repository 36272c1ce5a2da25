"""Plans of studies: the cells of a YAML file, each a run with its key. All of them are validated before any run.

What is run of it, and how, is in ``sweep``.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from noisysam import data
from noisysam.core import files
from noisysam.core.errors import FieldError, UserError
from noisysam.runs import presets
from noisysam.runs import record as record_files
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.problem import load_dataset, noise_labels, weights_digest
from noisysam.runs.schema import RECORD_SCHEMA
from noisysam.runs.summary import noise_name
from noisysam.studies.study_file import Lines, Place, StudyFile, Values, read, read_lines


@dataclass(frozen=True)
class Cell:
    """One run of a study: its place in the table and its configuration. ``for_rate``: the fields that the study sets
    for single noise rates of this row, or a published recipe by the noise, which are no settings of their own."""

    row: str
    config: RunConfig
    key: str
    for_rate: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A short description of the cell."""
        c = self.config
        return f"{self.row} | {noise_name(c.noise_type, c.noise)} | seed {c.seed}"


# planning


def plan(path: Path, data_dir: Path | None = None, seeds: Sequence[int] | None = None) -> list[Cell]:
    """All cells of a study file, validated, ordered by seed, grid point and row, so that runs that are compared are
    adjacent. ``seeds``: in place of the study's. Values that a search is to find are those of the file."""
    study, lines = read_lines(path)
    own_seeds = _own_seeds(path, study, lines)
    for row in study.rows:
        study.row_search(row, lines.at(path, ("rows", row, "search")))
        study.rows[row].pop("search", None)
    if seeds is not None:
        study.seeds, own_seeds = list(seeds), {}
    _check(path, study, lines)
    digests, used = Digests(), set()
    for_rate = {row: _for_rate(study.base, values) for row, values in study.rows.items()}
    cells: list[Cell] = []
    seen: dict[tuple[str, str], Cell] = {}
    for number, seed in enumerate(study.seeds):
        for point in itertools.product(*study.grid.values()):
            here: dict[tuple[str, float], tuple[Cell, str]] = {}  # the first cell of each noise, with its labels
            for row in study.rows:
                if seed not in own_seeds.get(row, study.seeds):
                    continue
                values, rate = _values(study, row, dict(zip(study.grid, point, strict=True)))
                used.add((row, rate))
                values |= {"seed": seed} if data_dir is None else {"seed": seed, "data_dir": data_dir}
                where = Where(path, lines, row, rate, number)
                config = where.validate(values)
                apart = {*for_rate[row], *(presets.by_noise(values) - set(study.grid))}
                cell = Cell(row, config, config.key(digests(config)), tuple(sorted(apart)))
                if (row, cell.key) in seen:  # two rows may share a run: it is trained once
                    raise UserError(f"{where()}: row {row!r} has the same run twice ({cell.label})")
                seen[row, cell.key] = cell
                labels = digests(config)["labels"]
                first, known = here.setdefault((config.noise_type, config.noise), (cell, labels))
                if known != labels:
                    raise UserError(f"{where()}: {_unequal(first, cell)}")
                cells.append(cell)
    _all_used(path, study, lines, used)
    return cells


def _own_seeds(path: Path, study: StudyFile, lines: Lines) -> dict[str, list[int]]:
    """The seeds of rows that have their own list. The lists are removed from the values of the rows."""
    found = {}
    for row, values in study.rows.items():
        if "seeds" in values:
            own = found[row] = values.pop("seeds")
            if not isinstance(own, list) or not own or not set(own) <= set(study.seeds):
                where = lines.at(path, ("rows", row, "seeds"))
                raise UserError(f"{where}: rows.{row}.seeds: some of the study's seeds were expected, as a list")
    return found


class Where:
    """The file and line of each value of a cell, for error messages."""

    def __init__(self, path: Path, lines: Lines, row: str, rate: Any, seed: int) -> None:
        self.path, self.lines, self.row, self.rate, self.seed = path, lines, row, rate, seed

    def __call__(self, field: str | None = None) -> str:
        row: Place = ("rows", self.row)
        if field is None:
            return self.lines.at(self.path, row)
        places: list[Place] = [("seeds", self.seed)] if field == "seed" else []
        places += [(*row, "noise", self.rate, field), (*row, field), ("grid", field)]
        places += [("base", "noise", self.rate, field), ("base", field)]
        return self.lines.at(self.path, *(place for place in places if place in self.lines), row)

    def validate(self, values: Values) -> RunConfig:
        """The validated configuration; ``UserError`` names the line of an invalid field."""
        try:
            return validate(values)
        except FieldError as error:
            message = error.line(str(error.field))
            raise UserError(f"{self(error.field)}, row {self.row!r}: {message}") from None


def _check(path: Path, study: StudyFile, lines: Lines) -> None:
    """Validate what does not depend on single cells."""
    layers: list[tuple[Place, Values]] = [(("base",), study.base), (("grid",), study.grid)]
    layers += [(("rows", row), values) for row, values in study.rows.items()]
    for place, values in list(layers):
        if place == ("grid",) or not isinstance(values.get("noise"), dict):
            continue
        for rate, special in values["noise"].items():
            there = (*place, "noise", rate)
            if not isinstance(rate, int | float) or not isinstance(special, dict):
                raise UserError(
                    f"{lines.at(path, there)}: {_dotted(there)}: a rate and what holds at it were expected:"
                    " noise: {0.8: {rho: 0.05}}"
                )
            for field in set(special) & {"noise", "noise_type"}:
                raise UserError(f"{lines.at(path, (*there, field))}: {field} cannot be set for one noise rate")
            layers.append((there, special))
    for place, values in layers:
        if "seed" in values:
            raise UserError(
                f"{lines.at(path, (*place, 'seed'))}: seed stands in base, grid or a row: list the seeds under seeds"
                " instead"
            )
        if "eval_every" in values and place != ("base",):
            raise UserError(
                f"{lines.at(path, (*place, 'eval_every'))}: eval_every must be the same for all rows: set it in base"
            )
        if place[0] == "rows":
            for field in sorted(set(values) & set(study.grid)):
                if field != "noise" or not isinstance(values[field], dict):
                    raise UserError(
                        f"{lines.at(path, (*place, field))}: row {place[1]!r} sets {field}, which the grid varies"
                    )


def _values(study: StudyFile, row: str, point: Values) -> tuple[Values, Any]:
    """The values of a cell without its seed, and its noise rate as given in the file."""
    base, of_base = split(study.base)
    own, of_row = split(study.rows[row])
    rate = {**base, **point, **own}.get("noise", 0.0)
    rate = rate if isinstance(rate, int | float) else None
    return {**base, **of_base.get(rate, {}), **point, **own, **of_row.get(rate, {})}, rate


def split(values: Values) -> tuple[Values, dict[Any, Values]]:
    """The values of base or of a row: those for all noise rates, and those for single rates."""
    special = values.get("noise")
    if not isinstance(special, dict):
        return values, {}
    return {name: value for name, value in values.items() if name != "noise"}, special


def _for_rate(*layers: Values) -> tuple[str, ...]:
    """The fields that base or a row sets for single noise rates."""
    return tuple(sorted({field for layer in layers for values in split(layer)[1].values() for field in values}))


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _all_used(path: Path, study: StudyFile, lines: Lines, used: set[tuple[str, Any]]) -> None:
    """Reject per-rate values that match no cell."""
    layers: list[tuple[Place, Values, set[Any]]] = [(("base",), study.base, {rate for _, rate in used})]
    layers += [(("rows", row), values, {rate for r, rate in used if r == row}) for row, values in study.rows.items()]
    for place, values, rates in layers:
        for rate in split(values)[1]:
            if rate not in rates:
                found = ", ".join(f"{r:g}" for r in sorted(rates - {None}))
                there = (*place, "noise", rate)
                raise UserError(f"{lines.at(path, there)}: {_dotted(there)}: no cell has this rate (they have {found})")


class Digests:
    """Digests of data and labels, which are part of the keys. Labels are drawn once for all cells that use them."""

    LABELS = ("noise_type", "noise", "noise_seed", "noise_draw")
    DATA = ("dataset", "data_dir", "image_size", "train_subset", "subset_seed")

    def __init__(self) -> None:
        self.known: dict[Any, dict[str, str]] = {}
        self.splits: set[Any] = set()

    def __call__(self, config: RunConfig) -> dict[str, str]:
        """``{"data": ..., "labels": ...}``; ``UserError`` if the data set or the split does not exist."""
        of_data = tuple(getattr(config, name) for name in self.DATA)
        problem = (*of_data, *(getattr(config, name) for name in self.LABELS))
        split = (*of_data, config.val_fraction)
        if problem not in self.known or split not in self.splits:
            dataset = load_dataset(config.dataset, config.data_dir, config.image_size)
            clean, size = dataset.train_labels.numpy(), config.train_subset
            chosen = np.arange(len(clean))
            if size is not None:
                chosen = data.balanced_subset(clean, size, dataset.classes, config.subset_seed)
            if split not in self.splits:
                data.split_validation(len(chosen), config.val_fraction, config.noise_seed)
                self.splits.add(split)
            if problem not in self.known:
                labels = noise_labels(config, dataset, chosen).digest
                self.known[problem] = {"data": dataset.digest, "labels": labels}
        return {**self.known[problem], **weights_digest(config)}


def _unequal(first: Cell, cell: Cell) -> str:
    """The error message for two rows that have different labels at the same noise and seed."""
    fields = ("dataset", "train_subset", "subset_seed", "noise_seed", "noise_draw")
    differ = [name for name in fields if getattr(first.config, name) != getattr(cell.config, name)]
    place = cell.label.partition(" | ")[2].replace(" |", ",")
    return (
        f"rows {first.row!r} and {cell.row!r} learn from different labels at {place}: give them the same"
        f" {', '.join(differ) or 'label file'}, or put them in two studies"
    )


# keeping


def save(path: Path, cells: Sequence[Cell], store: Path, search: Mapping[str, Any] | None = None) -> str:
    """Write the plan of a study to the store and return its name, that of its file where the file gives none.

    The seeds of the first plan remain the planned seeds. Seeds that are added to the file later are listed separately,
    with the date on which they were first seen. ``search``: what ``tuning.facts`` says of the search for its rows.
    """
    study = read(path)
    name = study.name or path.stem
    place = record_files.study_path(store, name)
    seeds = list(dict.fromkeys(cell.config.seed for cell in cells))
    earlier = files.read_json(place) if place.exists() else {}
    planned = earlier.get("planned_seeds") or list(dict.fromkeys(c["seed"] for c in earlier.get("cells", []))) or seeds
    added: dict[str, str] = earlier.get("added_seeds", {})
    today = datetime.now(UTC).date().isoformat()
    added |= {str(seed): today for seed in seeds if seed not in planned and str(seed) not in added}
    content = {
        "schema": RECORD_SCHEMA,
        "name": name,
        "file": path.read_text(),
        "published": study.published,
        "claims": study.claims,
        **({"search": dict(search)} if search else {}),
        "planned_seeds": planned,
        "added_seeds": added,
        "cells": [
            {
                "row": c.row,
                "noise_type": c.config.noise_type,
                "noise": c.config.noise,
                "seed": c.config.seed,
                "key": c.key,
                "config": c.config.model_dump(mode="json", exclude={"data_dir"}),
                **({"for_rate": list(c.for_rate)} if c.for_rate else {}),
            }
            for c in cells
        ],
    }
    if content != earlier:
        files.write_json(place, content)
    return name


def load(store: Path, name: str) -> list[Cell]:
    """The cells of a plan in the store, as they were written; they are not validated again."""
    return [
        Cell(c["row"], RunConfig.model_construct(**c["config"]), c["key"], tuple(c.get("for_rate", ())))
        for c in record_files.load_study(store, name)["cells"]
    ]


def runs(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of each run: several rows may share a run."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.key, cell)
    return list(first.values())
