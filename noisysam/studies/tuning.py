"""Tune one field for each row of a study: Optuna proposes values, accuracy on noisy validation labels is maximised.

Every row gets the same number of trials over the same range, the first at its present value. A trial is an ordinary run
for each point of the grid, at the study's first seed; its value is the mean accuracy at the last epoch on the held-out
images with their noisy labels, the kind of figure that the report's headline is. Neither clean labels nor the test set
are looked at.
"""

import hashlib
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.record import RunFolder
from noisysam.studies.engines.base import CellOutcome
from noisysam.studies.plan import Cell, Digests, split
from noisysam.studies.state import finished
from noisysam.studies.study_file import read

DIGITS = 4  # significant ones of a value that is tried


FIXED = ("seed", "noise", "noise_type", "noise_seed", "noise_draw", "train_subset", "subset_seed", "val_fraction",
         "epochs", "eval_every")  # fmt: skip


STARTUP = 5  # trials of a row before its results guide the next


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
        if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
            raise UserError(f"--search {text}: the first value must be below the second")
        if found.log and found.low <= 0:
            raise UserError(f"--search {text}: with log both values must be above 0")
        if found.field in FIXED:
            raise UserError(f"--search {text}: {field} is the same for all rows: values of it cannot be compared")
        return found

    def set(self, config: RunConfig, value: float) -> RunConfig:
        """The configuration with this value; ``UserError`` if the field does not accept it."""
        name, _, option = self.field.partition(".")
        values = config.model_dump()
        values[name] = {**values.get(name, {}), option: value} if option else value
        return validate(values, where=f"--search {self.field}: ")

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
            raise UserError(f"--search {self.field}: it takes no numbers here, or there is no such field")
        return float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    """The plain types of an annotation."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_kinds(part) for part in get_args(annotation)))
    return {annotation}


@dataclass(frozen=True)
class Best:
    """The result of the trials of a row. ``present``: the accuracy of its present value."""

    row: str
    value: float
    accuracy: float
    present: float | None
    trials: int


class Row:
    """The search for one row: its cells at the first seed of the study, and its trials in Optuna's database."""

    def __init__(self, name: str, cells: Sequence[Cell], asked: Range, database: Any) -> None:
        import optuna

        self.name, self.cells, self.asked = name, cells, asked
        self.digests = Digests()
        self.whole = asked.whole(cells[0].config)
        for cell in cells:
            asked.set(cell.config, self.rounded(asked.low))  # a field that the row does not take, before anything runs
            if not cell.config.val_fraction:
                raise UserError(f"--search: row {name!r} holds nothing out: give val_fraction")
        # a changed row or range is another search: their values do not compare
        what = [asked.field, asked.low, asked.high, asked.log, *sorted(cell.key for cell in cells)]
        title = f"{name}, {asked.field}, {hashlib.sha256(str(what).encode()).hexdigest()[:8]}"
        self.study = optuna.create_study(storage=database, study_name=title, direction="maximize", load_if_exists=True)
        if not self.study.trials:
            present = asked.get(cells[0].config)
            if present is not None:
                self.study.enqueue_trial({asked.field: present})

    def rounded(self, value: float) -> float:
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")

    def trials(self, *states: str) -> list[Any]:
        return [trial for trial in self.study.trials if not states or trial.state.name in states]

    def ask(self) -> Any:
        """Propose the next trial from those that have ended. An interrupted search proposes the same trials."""
        import optuna

        self.study.sampler = optuna.samplers.TPESampler(
            seed=len(self.trials("COMPLETE", "PRUNED", "RUNNING")), n_startup_trials=STARTUP, constant_liar=True
        )
        trial, asked = self.study.ask(), self.asked
        if self.whole:
            trial.suggest_int(asked.field, int(asked.low), int(asked.high), log=asked.log)
        else:
            trial.suggest_float(asked.field, asked.low, asked.high, log=asked.log)
        return trial

    def runs(self, trial: Any) -> list[Cell]:
        """The cells of a trial."""
        value = self.rounded(trial.params[self.asked.field])
        configs = [self.asked.set(cell.config, value) for cell in self.cells]
        return [Cell(f"{self.name}, {self.asked.field} {value:g}", c, c.key(self.digests(c))) for c in configs]

    def tell(self, number: int, accuracies: Sequence[float] | None) -> None:
        """Report the result of a trial; None if one of its runs failed, which counts as the worst result."""
        import optuna

        if accuracies is None:
            self.study.tell(number, state=optuna.trial.TrialState.PRUNED, skip_if_finished=True)
        else:
            self.study.tell(number, sum(accuracies) / len(accuracies), skip_if_finished=True)

    def best(self) -> Best | None:
        """The value with the highest accuracy, the first one of equals; None if no trial has ended."""
        done = self.trials("COMPLETE")
        if not done:
            return None
        chosen = max(done, key=lambda trial: trial.value)
        values = {self.rounded(trial.params[self.asked.field]): trial.value for trial in reversed(done)}
        present = self.asked.get(self.cells[0].config)
        return Best(
            self.name,
            self.rounded(chosen.params[self.asked.field]),
            chosen.value,
            None if present is None else values.get(self.rounded(present)),
            len(self.trials("COMPLETE", "PRUNED")),
        )


def rows(path: Path, cells: Sequence[Cell], asked: Range, store: Path) -> list[Row]:
    """The rows of the study at ``path`` with their trials so far, from the database of the study in the store."""
    study = read(path)
    special = [values for row in (study.base, *study.rows.values()) for values in split(row)[1].values()]
    if any(asked.field.partition(".")[0] in values for values in (study.grid, *special)):
        raise UserError(f"--search {asked.field}: {path} has it in the grid, or for single noise rates")
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("--search needs Optuna: pip install 'noisysam[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = cells[0].config.seed
    mine: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.config.seed == seed:
            mine.setdefault(cell.row, []).append(cell)
    log = store / "studies" / f"{path.stem}.search.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    database = JournalStorage(JournalFileBackend(str(log)))
    return [Row(row, own, asked, database) for row, own in mine.items()]


def search(
    searched: Sequence[Row], trials: int, store: Path, width: int, train: Callable[[list[Cell]], Iterable[CellOutcome]]
) -> bool:
    """Carry every row to ``trials`` trials, those that were cut off first; ``width`` runs at a time are kept busy by
    asking for several trials of a row at once. ``train`` runs cells and tells how they ended. False where it stopped
    before the end."""
    while True:
        asked: list[tuple[Row, Any]] = []
        for row in searched:
            asked += [(row, trial) for trial in row.trials("RUNNING")]
        if not asked:
            each = max(1, math.ceil(width / sum(len(row.cells) for row in searched)))
            for row in searched:
                for _ in range(min(each, trials - len(row.trials("COMPLETE", "PRUNED")))):
                    asked.append((row, row.ask()))
        if not asked:
            return True
        runs = {id(trial): row.runs(trial) for row, trial in asked}
        unique = {cell.key: cell for cells in runs.values() for cell in cells}
        failed = {outcome.cell.key for outcome in train(list(unique.values())) if outcome.state == "failed"}
        stopped = False
        for row, trial in asked:
            own = runs[id(trial)]
            if any(cell.key in failed for cell in own):
                row.tell(trial.number, None)
            elif all(finished(cell, store) for cell in own):
                row.tell(trial.number, [accuracy(store, cell) for cell in own])
            else:
                stopped = True
        if stopped:
            return False


def accuracy(store: Path, cell: Cell) -> float:
    """Accuracy on the held-out images with their noisy labels at the last epoch: a share of 1."""
    return [v for line in RunFolder(store, cell.key).epochs if (v := line.get("val_accuracy")) is not None][-1]


def tuned(path: Path, target: Path, asked: Range, found: Sequence[Best], cells: Sequence[Cell]) -> str:
    """A study file as YAML text: the study at ``path`` with the best values of its rows; for a file at ``target``."""
    study = read(path)
    name, _, option = asked.field.partition(".")
    changed: dict[str, Any] = {}
    for best in found:
        config = next(cell.config for cell in cells if cell.row == best.row)
        value: Any = {**getattr(config, name), option: best.value} if option else best.value
        changed[best.row] = {name: value}
    content = study.model_dump(mode="json", exclude={"include", "name", "base", "rows"}, exclude_defaults=True)
    content = {"include": relpath(path, target.parent), **content, "rows": changed}
    told = "".join(f"# {b.row}: {b.accuracy:.4f} over {b.trials} trials\n" for b in found)
    return (
        f"# {asked.field} of each row, by accuracy on noisy validation labels at the last epoch, seed"
        f" {cells[0].config.seed}, between {asked.low:g} and {asked.high:g}.\n{told}"
        + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )
