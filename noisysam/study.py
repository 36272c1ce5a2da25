"""Studies: one YAML file becomes cells, each a run with its key. Everything is checked before anything starts.

What is run of it, and how, is in ``sweep``.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from noisysam import data, records
from noisysam.config import RunConfig, explain, validate
from noisysam.errors import UserError
from noisysam.problem import load_dataset, noise_labels

Values = dict[str, Any]
Place = tuple[Any, ...]  # where something stands in a file: ("rows", "SAM", "rho")


class StudyFile(BaseModel):
    """What a study's YAML says. A cell's values are base, then grid, then row; later ones win."""

    model_config = ConfigDict(extra="forbid")

    include: str | None = Field(
        None, description="another study file, by its path from this one: its base and rows lie below those given here"
    )
    base: Values = Field({}, description="values of every cell; as in a row, noise may be a mapping")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="fields that are crossed with the rows, each a list of values"
    )
    rows: dict[str, Values] = Field(
        min_length=1,
        description="named rows of the table, each with its values; noise may be a mapping from rates to the values"
        " that hold at that rate alone: SAM: {opt: sam, noise: {0.8: {rho: 0.05}}}; seeds may name those of the row",
    )
    seeds: list[int] = Field([0], min_length=1, description="seeds; the noise seed is the same number")
    retries: int = Field(0, ge=0, description="how often a failed run is tried again")
    published: str | list[str] | None = Field(
        None, description="published tables to print beside, such as sam-table4; a name or a list"
    )
    claims: list[Values] = Field([], description="what the report tests")


@dataclass(frozen=True)
class Cell:
    """One run of a study: its place in the table and its configuration."""

    row: str
    config: RunConfig
    key: str

    @property
    def label(self) -> str:
        """The cell in a few words."""
        c = self.config
        return f"{self.row} | {c.noise_type} {c.noise:g} | seed {c.seed}"


# reading


class Lines(dict[Place, tuple[Path, int]]):
    """File and line of each thing that a study's files say."""

    def at(self, file: Path, *places: Place) -> str:
        """'study.yaml, line 7', of the first of these places that is known, or of what holds it."""
        for place in places:
            if place in self:
                return "{}, line {}".format(*self[place])
        for place in places:
            for end in range(len(place) - 1, 0, -1):
                if place[:end] in self:
                    return "{}, line {}".format(*self[place[:end]])
        return str(file)


def read(path: Path) -> StudyFile:
    """A study file with what it includes; ``UserError`` names the file, the line and the field."""
    return _read(path)[0]


def _read(path: Path) -> tuple[StudyFile, Lines]:
    content, lines = _content(path)
    try:
        study = StudyFile.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{lines.at(path, error.errors()[0]['loc'])}: {explain(error, prefix='')}") from None
    if study.claims:
        from noisysam.report.claims import parse

        parse(study.claims, f"{lines.at(path, ('claims',))}: claims")
    return study, lines


def _content(path: Path, above: tuple[Path, ...] = ()) -> tuple[Values, Lines]:
    """What a file says, on top of the base and the rows of the file that it includes."""
    content, lines = _parse(path)
    name = content.get("include")
    if name is None:
        return content, lines
    where = f"{lines.at(path, ('include',))}: include"
    if not isinstance(name, str):
        raise UserError(f"{where}: the path of another study file was expected, not {name!r}")
    other = path.parent / name
    if not other.is_file():
        raise UserError(f"{where}: there is no file {other}")
    if other.resolve() in (*above, path.resolve()):
        raise UserError(f"{where}: {other} includes this file in turn")
    below, lines_below = _content(other, (*above, path.resolve()))
    for part in ("base", "rows"):
        if not isinstance(below.get(part, {}), dict):
            raise UserError(f"{lines_below.at(other, (part,))}: {part}: a mapping was expected")
        if isinstance(content.get(part, {}), dict):
            content[part] = _above(content.get(part, {}), below.get(part, {}), deep=part == "rows")
    return content, Lines({place: line for place, line in lines_below.items() if place[0] in ("base", "rows")} | lines)


def _above(values: Values, below: Values, deep: bool) -> Values:
    """Two mappings as one; ``deep``: those that both have under one name as well."""
    merged = {**below, **values}
    if deep:
        for name in set(values) & set(below):
            if isinstance(values[name], dict) and isinstance(below[name], dict):
                merged[name] = {**below[name], **values[name]}
    return merged


def _parse(path: Path) -> tuple[Values, Lines]:
    """One YAML file: its content, and where everything stands."""
    try:
        loader = yaml.SafeLoader(path.read_text())
        root = loader.get_single_node()
        if root is not None:
            _refuse_twice(root, set())
        content = None if root is None else loader.construct_document(root)
        lines = Lines({place: (path, line) for place, line in _places(loader, root)})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping with base, grid, rows and seeds was expected")
    for name in content:
        if name not in StudyFile.model_fields and isinstance(name, str):
            raise UserError(f"{lines.at(path, (name,))}: {name}: there is no such option")
    return content, lines


def _refuse_twice(node: yaml.Node, seen: set[int]) -> None:
    """Of a key that is given twice YAML would silently keep the last."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for number, (key, value) in enumerate(node.value):
            if key.value in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            _refuse_twice(value, seen)


DEEPEST = 5  # of the places in a study file: rows, name, noise, rate, field


def _places(loader: yaml.SafeLoader, node: yaml.Node | None, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """Every place below a node, with its line."""
    parts: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if len(place) < DEEPEST and isinstance(node, yaml.MappingNode):
        parts = [(loader.construct_object(k, deep=True), k, v) for k, v in node.value]
    elif len(place) < DEEPEST and isinstance(node, yaml.SequenceNode):
        parts = [(number, item, item) for number, item in enumerate(node.value)]
    for name, key, value in parts:
        yield (*place, name), key.start_mark.line + 1
        yield from _places(loader, value, (*place, name))


# planning


def plan(path: Path, data_dir: Path | None = None) -> list[Cell]:
    """Every cell of a study file, validated, in the order seed, grid, row, so that rows of one problem are adjacent."""
    study, lines = _read(path)
    own_seeds = _own_seeds(path, study, lines)
    _check(path, study, lines)
    digests, used = Digests(), set()
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
                cell = Cell(row, config, config.key(digests(config)))
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
    """The seeds of rows that name their own, which are taken out of the rows' values."""
    found = {}
    for row, values in study.rows.items():
        if "seeds" in values:
            own = found[row] = values.pop("seeds")
            if not isinstance(own, list) or not own or not set(own) <= set(study.seeds):
                where = lines.at(path, ("rows", row, "seeds"))
                raise UserError(f"{where}: rows.{row}.seeds: some of the study's seeds were expected, as a list")
    return found


class Where:
    """Where a cell's values stand, for the message that says what is wrong with one of them."""

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
        """The configuration, or a ``UserError`` with the line of the field at fault."""
        try:
            return validate(values)
        except UserError as error:
            cause, message = error.__context__, str(error)
            loc = cause.errors()[0]["loc"] if isinstance(cause, ValidationError) else ()
            if loc:
                field: str | None = str(loc[0])
                message = message.replace(f"--{field}".replace("_", "-"), str(field), 1)
            else:  # what the registries refuse: they name the value
                quoted = [name for name, value in values.items() if isinstance(value, str) and repr(value) in message]
                unknown = [name for name in values if name not in RunConfig.model_fields]
                field = next(iter([*unknown, *quoted]), None)
            raise UserError(f"{self(field)}, row {self.row!r}: {message}") from None


def _check(path: Path, study: StudyFile, lines: Lines) -> None:
    """What can be said before any cell is made."""
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
    """A cell's values but for its seed, and its noise rate as it was given."""
    base, of_base = split(study.base)
    own, of_row = split(study.rows[row])
    rate = {**base, **point, **own}.get("noise", 0.0)
    rate = rate if isinstance(rate, int | float) else None
    return {**base, **of_base.get(rate, {}), **point, **own, **of_row.get(rate, {})}, rate


def split(values: Values) -> tuple[Values, dict[Any, Values]]:
    """The values of base or of a row: those for all rates, and those for single ones."""
    special = values.get("noise")
    if not isinstance(special, dict):
        return values, {}
    return {name: value for name, value in values.items() if name != "noise"}, special


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _all_used(path: Path, study: StudyFile, lines: Lines, used: set[tuple[str, Any]]) -> None:
    """Values for a noise rate that no cell has are a slip of the pen."""
    layers: list[tuple[Place, Values, set[Any]]] = [(("base",), study.base, {rate for _, rate in used})]
    layers += [(("rows", row), values, {rate for r, rate in used if r == row}) for row, values in study.rows.items()]
    for place, values, rates in layers:
        for rate in split(values)[1]:
            if rate not in rates:
                found = ", ".join(f"{r:g}" for r in sorted(rates - {None}))
                there = (*place, "noise", rate)
                raise UserError(f"{lines.at(path, there)}: {_dotted(there)}: no cell has this rate (they have {found})")


class Digests:
    """Digests of data and labels, part of the keys; labels are drawn once for all cells that learn from them."""

    LABELS = ("noise_type", "noise", "noise_seed", "noise_draw")
    DATA = ("dataset", "data_dir", "train_subset", "subset_seed")

    def __init__(self) -> None:
        self.known: dict[Any, dict[str, str]] = {}
        self.splits: set[Any] = set()

    def __call__(self, config: RunConfig) -> dict[str, str]:
        """``{"data": ..., "labels": ...}``; ``UserError`` where there is no such data or no such split."""
        of_data = tuple(getattr(config, name) for name in self.DATA)
        problem = (*of_data, *(getattr(config, name) for name in self.LABELS))
        split = (*of_data, config.val_fraction)
        if problem not in self.known or split not in self.splits:
            dataset = load_dataset(config.dataset, config.data_dir)
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
        return self.known[problem]


def _unequal(first: Cell, cell: Cell) -> str:
    """Why two rows are no pair: what of their problem differs."""
    fields = ("dataset", "train_subset", "subset_seed", "noise_seed", "noise_draw")
    differ = [name for name in fields if getattr(first.config, name) != getattr(cell.config, name)]
    place = cell.label.partition(" | ")[2].replace(" |", ",")
    return (
        f"rows {first.row!r} and {cell.row!r} learn from different labels at {place}: give them the same"
        f" {', '.join(differ) or 'label file'}, or put them in two studies"
    )


# keeping


def save(path: Path, cells: Sequence[Cell], store: Path) -> str:
    """Keep the study's plan in the store, for the report and the export; returns its name, the file's stem.

    The seeds of the first plan stay the planned ones; seeds that the file got later are listed beside them, each with
    the day on which it was first seen.
    """
    study, place = read(path), records.study_path(store, path.stem)
    seeds = list(dict.fromkeys(cell.config.seed for cell in cells))
    earlier = records.read_json(place) if place.exists() else {}
    planned = earlier.get("planned_seeds") or list(dict.fromkeys(c["seed"] for c in earlier.get("cells", []))) or seeds
    added: dict[str, str] = earlier.get("added_seeds", {})
    today = datetime.now(UTC).date().isoformat()
    added |= {str(seed): today for seed in seeds if seed not in planned and str(seed) not in added}
    content = {
        "schema": records.RECORD_SCHEMA,
        "name": path.stem,
        "file": path.read_text(),
        "published": study.published,
        "claims": study.claims,
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
            }
            for c in cells
        ],
    }
    if content != earlier:
        records.write_json(place, content)
    return path.stem


def load(store: Path, name: str) -> list[Cell]:
    """The cells of a plan that is kept in the store, as they were when it was kept; nothing is checked again."""
    kept: Sequence[Mapping[str, Any]] = records.load_study(store, name)["cells"]
    return [Cell(c["row"], RunConfig.model_construct(**c["config"]), c["key"]) for c in kept]
