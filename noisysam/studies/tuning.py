"""Tune fields for the rows of a study, with the same number of trials for every row, on noisy validation labels.

A study file asks for it with ``search``, a command with ``--search``. As under AlgoPerf's rules for external tuning
(Dahl et al. 2023, arXiv 2306.07179, section 5.2.1) the values are quasi-random and known before the first of them is
tried: a shifted Halton sequence, whose first point is replaced by the row's present values. So rows with the same
ranges try the same values, an interrupted search continues with what is missing, and several machines share one.

A trial is an ordinary run for each point of the grid, at a seed that is none of the study's; its value is the mean
accuracy at the last epoch on the held-out images with their noisy labels, the kind of figure that the report's headline
is. Neither clean labels nor the test set are looked at, and no run of a trial is a seed of the row.
"""

import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import relpath
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from scipy.stats import qmc

from noisysam.core.errors import UserError
from noisysam.core.rng import random_uniforms
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.record import RunFolder
from noisysam.studies.engines.base import CellOutcome
from noisysam.studies.plan import Cell, Digests, plan, split
from noisysam.studies.state import state
from noisysam.studies.study_file import Lines, SearchSettings, StudyFile, read_lines

OVER = ("finished", "failed")  # states of runs that have ended


DIGITS = 4  # significant ones of a value that is tried


FIXED = ("seed", "noise", "noise_type", "noise_seed", "noise_draw", "train_subset", "subset_seed", "val_fraction",
         "epochs", "eval_every")  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Values of one field: ``lr=0.01:1:log``; an option as ``opt_option.rho`` or ``method_option.q``."""

    field: str
    low: float
    high: float
    log: bool

    @classmethod
    def parse(cls, text: str) -> "Range":
        """From 'FIELD=low:high' or 'FIELD=low:high:log'."""
        field, _, values = text.partition("=")
        low, _, rest = values.partition(":")
        high, _, log = rest.partition(":")
        try:
            found = cls(field, float(low), float(high), {"": False, "log": True}[log])
        except (ValueError, KeyError):
            raise UserError(f"--search {text}: write it as FIELD=low:high or FIELD=low:high:log") from None
        found.check(f"--search {text}")
        return found

    def check(self, where: str) -> None:
        """``UserError`` if nothing can be tried in the range."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"{where}: the first value must be below the second")
        if self.log and self.low <= 0:
            raise UserError(f"{where}: with log both values must be above 0")
        if self.field in FIXED:
            raise UserError(f"{where}: {self.field} is the same for all rows: values of it cannot be compared")

    def at(self, share: float) -> float:
        """The value at this share of the range (0: low, 1: high), before it is rounded."""
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def set(self, config: RunConfig, value: float) -> RunConfig:
        """The configuration with this value; ``UserError`` if the field does not accept it."""
        name, _, option = self.field.partition(".")
        values = config.model_dump()
        values[name] = {**values.get(name, {}), option: value} if option else value
        return validate(values, where=f"{self.field}: ")

    def get(self, config: RunConfig) -> float | None:
        """The value of a configuration if it lies within the range, else None."""
        name, _, option = self.field.partition(".")
        recipe = config.recipe()
        value = getattr(config, name, None) if not option else None
        if option or value is None or isinstance(value, str):
            chosen = recipe.method_options if name == "method_option" else recipe.optimizer_options
            value = getattr(chosen, option or name, None)
        inside = isinstance(value, int | float) and self.low <= value <= self.high
        return value if inside else None

    def rounded(self, config: RunConfig, value: float) -> float:
        """``value`` as it is tried: a whole number, or one of ``DIGITS`` digits."""
        return round(value) if self.whole(config) else float(f"{value:.{DIGITS}g}")

    def whole(self, config: RunConfig) -> bool:
        """Whether the field is an integer; ``UserError`` if it is not numeric."""
        name, _, option = self.field.partition(".")
        model: Any = RunConfig
        if option:
            recipe = config.recipe()
            owner = {"method_option": recipe.method, "opt_option": recipe.optimizer}.get(name)
            model = getattr(owner, "Options", None)
        field = getattr(model, "model_fields", {}).get(option or name)
        kinds = set() if field is None else _kinds(field.annotation)
        if not kinds & {int, float}:
            raise UserError(f"{self.field}: it takes no numbers here, or there is no such field")
        return float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    """The plain types of an annotation."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_kinds(part) for part in get_args(annotation)))
    return {annotation}


Values = dict[str, float]  # field -> value


@dataclass(frozen=True)
class Best:
    """The result of the trials of a row. ``present``: the accuracy of its present values, if they were tried."""

    row: str
    values: Values
    accuracy: float
    present: float | None
    trials: int


class Row:
    """The search for one row: ``cells`` at the seed of the trials, the ranges of the fields, the number of trials (0: a
    row that is not tuned)."""

    def __init__(self, name: str, cells: Sequence[Cell], ranges: Sequence[Range], trials: int, seed: int) -> None:
        self.name, self.cells, self.ranges = name, cells, ranges
        self.trials, self.seed = trials if ranges else 0, seed
        self.digests = Digests()
        self._points: list[Values] = []

    def check(self, where: str) -> None:
        """``UserError`` for what the row does not take, before anything runs."""
        for cell in self.cells:
            if self.ranges and not cell.config.val_fraction:
                raise UserError(f"{where}: row {self.name!r} holds nothing out: give val_fraction")
            for asked in self.ranges:
                for end in (asked.low, asked.high):
                    try:
                        asked.set(cell.config, asked.rounded(cell.config, end))
                    except UserError as error:
                        raise UserError(f"{where} {error} (row {self.name!r})") from None

    @property
    def points(self) -> list[Values]:
        """The values of each trial, in order."""
        if self.ranges and not self._points:
            config = self.cells[0].config
            shift = random_uniforms(len(self.ranges), "search", self.seed)
            shares = (qmc.Halton(len(self.ranges), scramble=False).random(self.trials) + shift) % 1
            points = [
                {
                    asked.field: asked.rounded(config, asked.at(float(share)))
                    for asked, share in zip(self.ranges, line, strict=True)
                }
                for line in shares
            ]
            present = {asked.field: value for asked in self.ranges if (value := asked.get(config)) is not None}
            self._points = [{**points[0], **present}, *points[1:]]
        return self._points

    def runs(self, number: int) -> list[Cell]:
        """The cells of a trial."""
        values = self.points[number]
        named = ", ".join(f"{field} {value:g}" for field, value in values.items())
        return [
            replace(tuned, row=f"{self.name}, {named}")
            for tuned in applied(self.cells, {self.name: values}, {self.name: self.ranges}, self.digests)
        ]

    def accuracy(self, number: int, store: Path) -> float | None:
        """Mean accuracy of a trial on noisy validation labels; None if one of its runs failed, or has not finished."""
        cells = self.runs(number)
        done = all(state(cell, store) == "finished" for cell in cells)
        return sum(accuracy(store, cell) for cell in cells) / len(cells) if done else None

    def ended(self, store: Path) -> int:
        """Trials whose runs have all finished or failed."""
        return sum(all(state(cell, store) in OVER for cell in self.runs(n)) for n in range(self.trials))

    def best(self, store: Path) -> Best | None:
        """The values with the highest accuracy, the first of equals; None if no trial has finished."""
        found = [self.accuracy(number, store) for number in range(self.trials)]
        known = [value for value in found if value is not None]
        if not known:
            return None
        chosen = found.index(max(known))
        config = self.cells[0].config
        present = all(asked.get(config) is not None for asked in self.ranges)
        return Best(self.name, self.points[chosen], max(known), found[0] if present else None, self.ended(store))


def applied(
    cells: Iterable[Cell],
    values: Mapping[str, Values],
    ranges: Mapping[str, Sequence[Range]],
    digests: Digests | None = None,
) -> list[Cell]:
    """The cells with the values of their rows in place of what they had."""
    digests = digests or Digests()
    found = []
    for cell in cells:
        config = cell.config
        for asked in ranges[cell.row] if values.get(cell.row) else ():
            config = asked.set(config, values[cell.row][asked.field])
        found.append(cell if config is cell.config else replace(cell, config=config, key=config.key(digests(config))))
    return found


def rows(path: Path, asked: Sequence[Range] = (), trials: int = 0, data_dir: Path | None = None) -> list[Row]:
    """The searches of the study at ``path``: those of its file, or of ``asked`` with this number of trials for each
    row. Empty if neither asks for any. ``UserError`` for what cannot be searched."""
    study, lines = read_lines(path)
    if study.search is None and not asked:
        return []
    if study.search is not None and asked:
        raise UserError(f"--search: {path} has a search of its own")
    settings = study.search or SearchSettings(trials=trials)
    if settings.seed in study.seeds:
        where = lines.at(path, ("search", "seed"), ("search",))
        raise UserError(f"{where}: search.seed: {settings.seed} is a seed of the study; trials need another one")
    cells = plan(path, data_dir, seeds=[settings.seed])
    found = []
    for name in study.rows:
        where, ranges = _asked(path, study, lines, settings, name) if not asked else ("--search", list(asked))
        row = Row(name, [cell for cell in cells if cell.row == name], ranges, settings.trials, settings.seed)
        _check_places(path, study, name, ranges, where)
        row.check(where)
        found.append(row)
    return found


def _asked(path: Path, study: StudyFile, lines: Lines, settings: SearchSettings, row: str) -> tuple[str, list[Range]]:
    """The ranges of a row, and where they stand."""
    where = lines.at(path, ("rows", row, "search"), ("search", "fields"), ("search",))
    fields = study.row_search(row, where)
    if fields is None:
        fields = settings.fields
        if not fields:
            raise UserError(f"{where}: row {row!r} has no fields to search: name some, or `search: {{}}` for no trials")
    ranges = [Range(field, values.low, values.high, values.log) for field, values in fields.items()]
    for each in ranges:
        each.check(f"{where}: search: {each.field}")
    return f"{where}: search", ranges


def _check_places(path: Path, study: StudyFile, row: str, ranges: Sequence[Range], where: str) -> None:
    special = [values for layer in (study.base, study.rows[row]) for values in split(layer)[1].values()]
    for asked in ranges:
        if any(asked.field.partition(".")[0] in values for values in (study.grid, *special)):
            raise UserError(f"{where} {asked.field}: {path} has it in the grid, or for single noise rates")


def trials(searched: Iterable[Row]) -> list[Cell]:
    """The runs of all trials, each once."""
    cells = (cell for row in searched for number in range(row.trials) for cell in row.runs(number))
    return list({cell.key: cell for cell in cells}.values())


def over(searched: Iterable[Row], store: Path) -> bool:
    """Whether all trials have ended."""
    return all(row.ended(store) == row.trials for row in searched)


def search(searched: Sequence[Row], store: Path, train: Callable[[list[Cell]], Iterable[CellOutcome]]) -> None:
    """Run the trials that are not in the store yet. ``train`` runs cells and returns those that failed."""
    cells = trials(searched)
    if any(state(cell, store) not in OVER for cell in cells):
        for outcome in train(cells):
            if state(outcome.cell, store) != "failed":  # not even begun, as where data are missing
                raise UserError(f"{outcome.cell.label}: {outcome.error}")


def accuracy(store: Path, cell: Cell) -> float:
    """Accuracy on the held-out images with their noisy labels at the last epoch: a share of 1."""
    return [v for line in RunFolder(store, cell.key).epochs if (v := line.get("val_accuracy")) is not None][-1]


def chosen(searched: Sequence[Row], cells: Sequence[Cell], store: Path) -> list[Cell]:
    """The cells of the study with the best values of their rows; ``UserError`` if all trials of a row failed."""
    values = {}
    for row in searched:
        best = row.best(store)
        if best is None and row.trials:
            raise UserError(f"row {row.name!r}: all {row.trials} trials of its search failed: change its ranges")
        values[row.name] = {} if best is None else best.values
    return applied(cells, values, {row.name: row.ranges for row in searched})


def facts(searched: Sequence[Row], store: Path) -> dict[str, Any]:
    """What the plan of a study keeps of its search: budget, fields, chosen values and runs of each row."""
    found: dict[str, Any] = {}
    for row in searched:
        best = row.best(store)
        found[row.name] = {
            "trials": row.trials,
            "seed": row.seed,
            "fields": {r.field: {"low": r.low, "high": r.high, "log": r.log} for r in row.ranges},
            "chosen": {} if best is None else best.values,
            "accuracy": None if best is None else best.accuracy,
            "runs": list(dict.fromkeys(cell.key for n in range(row.trials) for cell in row.runs(n))),
        }
    return found


def tuned(path: Path, target: Path, found: Sequence[Best], searched: Sequence[Row]) -> str:
    """A study file as YAML text: the study at ``path`` with the best values of its rows; for a file at ``target``."""
    study, _ = read_lines(path)
    changed: dict[str, Any] = {}
    for best in found:
        config = next(row.cells[0].config for row in searched if row.name == best.row)
        changed[best.row] = {}
        for field, value in best.values.items():
            name, _, option = field.partition(".")
            own = changed[best.row].get(name, getattr(config, name))
            changed[best.row][name] = {**own, option: value} if option else value
    content = study.model_dump(mode="json", exclude={"include", "base", "rows"}, exclude_defaults=True)
    content = {"include": relpath(path, target.parent), **content, "rows": changed}
    told = "".join(f"# {b.row}: {b.accuracy:.4f} over {b.trials} trials\n" for b in found)
    ranges = ", ".join(f"{r.field} from {r.low:g} to {r.high:g}" for r in searched[0].ranges)
    return (
        f"# Tuned for each row by accuracy on noisy validation labels at the last epoch, seed {searched[0].seed}:"
        f" {ranges}.\n{told}" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )
