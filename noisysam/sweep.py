"""Sweeps: what is run of a study, in which order, and how it stands. Finished cells are not run again."""

import csv
import difflib
import errno
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from noisysam import checkpoint, methods, optim
from noisysam.config import RunConfig
from noisysam.data import Dataset
from noisysam.engines import Engine, Job, Outcome
from noisysam.errors import RunFailed, UserError
from noisysam.hardware import resolve_device, resolve_precision
from noisysam.records import RECORD_SCHEMA, RunFolder
from noisysam.study import Cell

POLL = 5.0  # seconds between two looks at cells that other processes train
HELD = "being trained by another process"  # what the lock of a run says
FAILURES = "failures.txt"  # in a run's folder: a line for each time that it failed, until it finishes
SAMPLE = 10  # finished cells of a row that a forecast looks at


# which cells


def select(cells: Sequence[Cell], only: Iterable[str] = (), shard: str | None = None) -> list[Cell]:
    """The cells that fit the 'field=value's of ``only``, where a field is ``row`` or one of the configuration (one of
    its values where a field is named several times), and of those the share of shard 'i/n'. Shards are disjoint,
    together they are everything, and each costs about the same."""
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
    dealt = sorted(chosen, key=lambda cell: -work(cell.config))[int(parts[1]) - 1 :: int(parts[2])]
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
    """``UserError`` where cells would be trained in several precisions, as ``auto`` does with small radii: no table
    would take them together. Cells whose device is not on this machine are not looked at."""
    found: dict[str, Cell] = {}
    for cell in cells:
        with suppress(UserError):
            found.setdefault(resolve_precision(cell.config, resolve_device(cell.config.device)), cell)
    if len(found) > 1:
        named = ", ".join(f"{precision} ({cell.label})" for precision, cell in sorted(found.items()))
        raise UserError(f"the study would mix precisions, which no report takes: {named}; set precision in its base")


# how they stand

HEAD = re.compile(rb'\{\s*"schema": (\d+),\s*"key": "\w+",\s*"status": "(\w+)"')


def state(cell: Cell, store: Path) -> str:
    """``finished``, ``failed``, ``running`` (as far as the record knows), ``interrupted``, or ``to do``. Reads the head
    and the end of the record alone. ``UserError`` for one that is damaged."""
    try:
        with (store / cell.key / "record.json").open("rb") as file:
            head = HEAD.match(file.read(200))
            file.seek(-min(2, file.seek(0, os.SEEK_END)), os.SEEK_END)
            whole = file.read() == b"}\n"
    except FileNotFoundError:
        return "to do"
    if head is not None and whole and int(head[1]) == RECORD_SCHEMA:
        return head[2].decode()
    return str((RunFolder(store, cell.key).record or {}).get("status", "to do"))


def finished(cell: Cell, store: Path) -> bool:
    """Whether a cell's result is in the store."""
    return state(cell, store) == "finished"


@dataclass(frozen=True)
class Standing:
    """How a cell stands: its ``state``, the last epoch that it wrote down, seconds since then, and why it failed."""

    cell: Cell
    state: str
    epoch: str = ""
    quiet: float | None = None
    error: str | None = None


def standing(cell: Cell, store: Path) -> Standing:
    """How a cell stands, from its records alone: nothing is locked."""
    found, folder = state(cell, store), RunFolder(store, cell.key)
    if found == "failed":
        return Standing(cell, found, error=reason((folder.record or {}).get("error")))
    if found != "running":
        return Standing(cell, found)
    path = folder.path / "epochs.csv"
    if not path.exists():
        return Standing(cell, found, "first epoch", time.time() - (folder.path / "record.json").stat().st_mtime)
    with path.open(newline="") as file:
        *_, line = csv.DictReader(file)
    stage, epoch = int(line["stage"]), int(line["epoch"]) + 1
    where = f"epoch {epoch}/{cell.config.epochs}"
    return Standing(cell, found, f"stage {stage + 1}, {where}" if stage else where, time.time() - path.stat().st_mtime)


def reason(error: str | None) -> str:
    """The line of an error that says what happened: of a traceback the last one."""
    lines = (error or "unknown").strip().splitlines()
    return lines[-1 if lines[0].startswith("Traceback") else 0]


# what they cost

IMAGES = 50_000  # of a training set, for the estimate alone


def work(config: RunConfig) -> float:
    """About how many forwards of one image a run takes (a backward counts as two): for orders and shares only."""
    forwards, backwards = optim.OPTIMIZERS[config.opt].cost(config.optimizer_options())
    networks = methods.compose(config.method).networks
    return config.epochs * (config.train_subset or IMAGES) * networks * (forwards + 2 * backwards)


def seconds(cells: Sequence[Cell], store: Path, states: Mapping[str, str]) -> dict[str, float]:
    """Seconds of training for a unit of ``work``, by row, from the first finished cells of each."""
    spent: dict[str, list[float]] = {}
    for cell in cells:
        if states[cell.key] == "finished" and len(spent.setdefault(cell.row, [])) < SAMPLE:
            cost = (RunFolder(store, cell.key).record or {})["cost"]
            spent[cell.row].append((cost["train_seconds"] + cost["eval_seconds"]) / work(cell.config))
    return {row: sum(rates) / len(rates) for row, rates in spent.items() if rates}


def forecast(cells: Sequence[Cell], store: Path, states: Mapping[str, str] | None = None) -> float | None:
    """Seconds of training that the unfinished cells will take, from finished ones with the same row; None where
    nothing like them has run."""
    states = states or {cell.key: state(cell, store) for cell in cells}
    left = [cell for cell in cells if states[cell.key] != "finished"]
    known = seconds(cells, store, states)
    if not left or any(cell.row not in known for cell in left):
        return None
    return sum(known[cell.row] * work(cell.config) for cell in left)


def longest_first(cells: Sequence[Cell], todo: Sequence[Cell], store: Path, states: Mapping[str, str]) -> list[Cell]:
    """The cells ``todo`` problem by problem (seed and noise, in the order of the study), so that rows that are compared
    are finished together; within a problem by the time that they are expected to take: by finished cells of their rows
    where there are any (of any row, else), and by ``work``."""
    known = seconds(cells, store, states)
    typical = sum(known.values()) / len(known) if known else 1.0
    problems = list(dict.fromkeys(map(_problem, cells)))
    return sorted(
        todo, key=lambda cell: (problems.index(_problem(cell)), -known.get(cell.row, typical) * work(cell.config))
    )


def _problem(cell: Cell) -> tuple[Any, ...]:
    return cell.config.seed, cell.config.noise_type, cell.config.noise


# running them


class Sweep:
    """The unfinished cells of a study on their way through an engine.

    A cell that another process trains is put aside and waited for at the end: the sweep is over when every cell is
    finished or has failed, whoever trained it. A failed cell is tried ``retries`` times more, over all sweeps together;
    ``retry_failed`` gives those of earlier sweeps a new start. From ``deadline`` (seconds since 1970) on nothing new is
    begun.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        store: Path,
        job: Job,
        engine: Engine,
        retries: int = 0,
        retry_failed: bool = False,
        deadline: float | None = None,
    ) -> None:
        cells = list({cell.key: cell for cell in reversed(cells)}.values())[::-1]  # rows may share a run
        self.cells, self.store, self.job, self.engine = cells, store, job, engine
        self.retries, self.deadline = retries, deadline
        states = {cell.key: state(cell, store) for cell in cells}
        left = [cell for cell in cells if states[cell.key] != "finished"]
        self.finished = len(cells) - len(left)
        for cell in cells:
            if states[cell.key] == "finished":
                _tidy(RunFolder(store, cell.key))
        failed = {cell.key for cell in left if states[cell.key] == "failed"}
        self.anew = failed if retry_failed else set()
        for key in self.anew:
            (store / key / FAILURES).unlink(missing_ok=True)
        self.queue = deque(longest_first(cells, left, store, states) if engine.parallel else left)
        self.flying: dict[str, Cell] = {}  # with the engine
        self.failed: dict[str, Outcome] = {}
        self.held: list[Cell] = []
        self._tries = dict.fromkeys(failed - self.anew, 1)  # failures, where no file says more
        self._news: list[Outcome] = []

    @property
    def left(self) -> int:
        """Cells that are neither finished nor failed."""
        return len(self.cells) - self.finished - len(self.failed)

    def run(self) -> Iterator[Outcome]:
        """Train the cells; every change of how one stands, as it happens. ``RunFailed`` where the store's disk is
        full: no cell has failed then, the same command goes on with them."""
        while self.queue or self.held:
            with closing(self.engine.map(self.job, self._next())) as outcomes:  # at once: the runs in flight are told
                for outcome in outcomes:
                    self._settle(outcome)
                    yield from self._told()
            yield from self._told()
            if self._over():
                return
            yield from self._wait()

    def _over(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline

    def _next(self) -> Iterator[Cell]:
        """The next cell that is still to do when the engine has room for it."""
        while self.queue and not self._over():
            cell = self.queue.popleft()
            if not self._elsewhere(cell):
                self.anew.discard(cell.key)
                self.flying[cell.key] = cell
                yield cell

    def _elsewhere(self, cell: Cell) -> bool:
        """Whether another process has trained the cell meanwhile, or trains it now."""
        found = state(cell, self.store)
        if found == "finished":
            self._settle(Outcome(cell, "finished"))
        elif found == "failed" and cell.key not in self.anew and max(1, self._failures(cell)) > self.retries:
            error = reason((RunFolder(self.store, cell.key).record or {}).get("error"))
            self._tell(Outcome(cell, "failed", f"{error} (--retry-failed tries it again)"))
        elif _is_held(RunFolder(self.store, cell.key)):
            self._settle(Outcome(cell, "held"))
        else:
            return False
        return True

    def _settle(self, outcome: Outcome) -> None:
        """What follows from the end of a cell."""
        cell = outcome.cell
        self.flying.pop(cell.key, None)
        if outcome.state == "finished":
            self.finished += 1
            (self.store / cell.key / FAILURES).unlink(missing_ok=True)
        elif outcome.state == "held":
            self.held.append(cell)
        elif outcome.state == "full":
            raise RunFailed(f"the disk of {self.store} is full: make room there, and the same command goes on")
        elif outcome.state == "failed":
            self._note_failure(cell, outcome.error or "")
            if self._failures(cell) <= self.retries:
                outcome = replace(outcome, state="again")
                self.queue.append(cell)
        self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.state == "failed":
            self.failed[outcome.cell.key] = outcome
        self._news.append(outcome)

    def _told(self) -> Iterator[Outcome]:
        while self._news:
            yield self._news.pop(0)

    def _wait(self) -> Iterator[Outcome]:
        """Until a cell that others hold is free; what they finish is told."""
        while self.held and not self.queue and not self._over():
            held, self.held = self.held, []
            for cell in held:
                if _is_held(RunFolder(self.store, cell.key)):
                    self.held.append(cell)
                else:
                    self.queue.append(cell)
            if not self.queue:
                time.sleep(POLL)
        yield from self._told()

    def _note_failure(self, cell: Cell, error: str) -> None:
        self._tries[cell.key] = self._failures(cell) + 1
        folder = self.store / cell.key
        if folder.exists():  # not where even the data were missing
            with (folder / FAILURES).open("a") as file:
                file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {error}\n")

    def _failures(self, cell: Cell) -> int:
        """How often the cell has failed, in this sweep and in earlier ones."""
        path = self.store / cell.key / FAILURES
        written = len(path.read_text().splitlines()) if path.exists() else 0
        return max(written, self._tries.get(cell.key, 0))


def _tidy(folder: RunFolder) -> None:
    """Remove what a process left beside a finished run that was killed just after it had finished it."""
    ended = (checkpoint.CURRENT, checkpoint.PREVIOUS, FAILURES)
    if any(path.name in ended or path.name.startswith(".") for path in folder.path.iterdir()):
        with suppress(UserError), folder.lock():  # which removes half-written files; not while a process is at it
            for name in ended:
                (folder.path / name).unlink(missing_ok=True)


def _is_held(folder: RunFolder) -> bool:
    """Whether a process trains this run. Leaves no trace where none ever did."""
    if not (folder.path / "lock").exists():
        return False
    try:
        with folder.lock():
            return False
    except UserError:
        return True


class TimeIsUp(KeyboardInterrupt):
    """Ends a run as Ctrl-C does, between two epochs."""


class Watch:
    """Passes a training on to ``display``, and ends it after an epoch once ``deadline`` has passed."""

    def __init__(self, display: Any, deadline: float | None) -> None:
        self.display, self.deadline = display, deadline

    def step(self, stage: int, epoch: int, number: int, of: int) -> None:
        if self.display is not None:
            self.display.step(stage, epoch, number, of)

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        if self.display is not None:
            self.display.epoch(stage, number, of, line)
        if self.deadline is not None and time.time() >= self.deadline and number + 1 < of:
            raise TimeIsUp


@dataclass(frozen=True)
class TrainCell:
    """The job of a sweep: train one cell, tracked where ``uri`` is given, as a child of the MLflow run ``parent``.
    Errors become the outcome's line."""

    store: Path
    uri: str | None = None
    experiment: str = "noisysam"
    parent: str | None = None
    threads: int | None = None
    show: bool = False
    deadline: float | None = None

    def __call__(self, cell: Cell, dataset: Dataset | None = None) -> Outcome:
        import torch

        from noisysam.progress import Display
        from noisysam.train import fit

        if self.deadline is not None and time.time() >= self.deadline:
            return Outcome(cell, "stopped")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache()))
        display = Display(cell.config, cpu=False) if self.show else None
        tracker = tracker_for(self.uri, self.experiment, cell.row, self.parent)
        watch = Watch(display, self.deadline)
        try:
            fit(cell.config, dataset=dataset, store=self.store, tracker=tracker, watch=watch)
        except TimeIsUp:
            return Outcome(cell, "stopped")
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            if _no_space(error):
                return Outcome(cell, "full", line)
            if isinstance(error, UserError) and HELD in line:
                return Outcome(cell, "held")
            known = isinstance(error, UserError | RunFailed)
            return Outcome(cell, "failed", line if known else f"{type(error).__name__}: {line}")
        finally:
            if display is not None:
                display.close()
        return Outcome(cell, "finished")

    def threads_of(self, cell: Cell) -> int:
        """Threads that the cell's run will use: those that it began with, else the job's own."""
        record = RunFolder(self.store, cell.key).record
        began = 0 if record is None else int(record.get("resolved", {}).get("threads", 0))
        return began or self.threads or 1

    def checkpoint(self, cell: Cell, dataset: Dataset | None = None) -> Any:
        """For submitit, when a job is preempted: the same call again, which resumes the run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, cell, dataset)


def _no_space(error: BaseException | None) -> bool:
    """Whether a full disk is what led to an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def compile_cache() -> Path:
    """Where all runs of this user keep compiled kernels, so that each is compiled once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisysam" / "inductor"


def tracker_for(
    uri: str | None, experiment: str, row: str | None = None, parent: str | None = None
) -> Callable[[RunFolder], Any] | None:
    """What ``fit`` takes to send its record to a tracking store; None where tracking is off."""
    if uri is None:
        return None
    from noisysam.tracking import Tracker

    return lambda folder: Tracker(folder, uri, experiment, parent, row)
