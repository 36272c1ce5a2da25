"""Sweeps: train the unfinished cells of a study, in order."""

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from noisysam.core.errors import RunFailed, RunLocked, UserError
from noisysam.data.datasets import Dataset
from noisysam.runs.record import RunFolder
from noisysam.studies.engines.base import CellOutcome, Engine, Job
from noisysam.studies.plan import Cell, runs
from noisysam.studies.state import longest_first, reason, state
from noisysam.training import checkpoint

POLL = 5.0  # seconds between two looks at cells that other processes train


FAILURES = "failures.txt"  # in a run's folder: a line for each time that it failed, until it finishes


# running them


class Sweep:
    """Train the unfinished cells of a study with an engine.

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
        cells = runs(cells)
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
        self.failed: dict[str, CellOutcome] = {}
        self.held: list[Cell] = []
        self._tries = dict.fromkeys(failed - self.anew, 1)  # failures, where no file says more
        self._news: list[CellOutcome] = []

    @property
    def left(self) -> int:
        """Cells that are neither finished nor failed."""
        return len(self.cells) - self.finished - len(self.failed)

    def run(self) -> Iterator[CellOutcome]:
        """Train the cells and yield each outcome as it happens. ``RunFailed`` if the disk of the store is full: no cell
        has failed then, and the same command continues."""
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
        """Yield cells that still have to be trained, whenever the engine asks for one."""
        while self.queue and not self._over():
            cell = self.queue.popleft()
            if not self._elsewhere(cell):
                self.anew.discard(cell.key)
                self.flying[cell.key] = cell
                yield cell

    def _elsewhere(self, cell: Cell) -> bool:
        """Whether another process has trained the cell in the meantime or is training it now."""
        found = state(cell, self.store)
        if found == "finished":
            self._settle(CellOutcome(cell, "finished"))
        elif found == "failed" and cell.key not in self.anew and max(1, self._failures(cell)) > self.retries:
            record = RunFolder(self.store, cell.key).sound_record
            error = reason(None if record is None else record["error"])
            self._tell(CellOutcome(cell, "failed", f"{error} (--retry-failed tries it again)"))
        elif _is_held(RunFolder(self.store, cell.key)):
            self._settle(CellOutcome(cell, "held"))
        else:
            return False
        return True

    def _settle(self, outcome: CellOutcome) -> None:
        """Record the outcome of a cell."""
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

    def _tell(self, outcome: CellOutcome) -> None:
        if outcome.state == "failed":
            self.failed[outcome.cell.key] = outcome
        self._news.append(outcome)

    def _told(self) -> Iterator[CellOutcome]:
        while self._news:
            yield self._news.pop(0)

    def _wait(self) -> Iterator[CellOutcome]:
        """Poll until another process releases a cell."""
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
        """How often the cell has failed, in this and earlier sweeps."""
        path = self.store / cell.key / FAILURES
        written = len(path.read_text().splitlines()) if path.exists() else 0
        return max(written, self._tries.get(cell.key, 0))


def _tidy(folder: RunFolder) -> None:
    """Remove the files that a process left if it was killed right after it finished the run."""
    ended = (checkpoint.CURRENT, checkpoint.PREVIOUS, FAILURES)
    if any(path.name in ended or path.name.startswith(".") for path in folder.path.iterdir()):
        with suppress(RunLocked), folder.lock():  # which removes half-written files; not while a process is at it
            for name in ended:
                (folder.path / name).unlink(missing_ok=True)


def _is_held(folder: RunFolder) -> bool:
    """Whether a process is training this run. Creates no folder."""
    if not (folder.path / "lock").exists():
        return False
    try:
        with folder.lock():
            return False
    except RunLocked:
        return True


class TimeIsUp(KeyboardInterrupt):
    """Ends a run between two epochs, as Ctrl-C does."""


class StopAtDeadline:
    """Passes progress to ``display`` and ends the run after the first epoch that passes ``deadline``."""

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
    """The job of a sweep: train one cell. If ``uri`` is given, it is tracked as a child of the MLflow run of its row
    (``parents``). Errors are returned in the outcome."""

    store: Path
    uri: str | None = None
    experiment: str = "noisysam"
    parents: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    show: bool = False
    deadline: float | None = None

    def __call__(self, cell: Cell, dataset: Dataset | None = None) -> CellOutcome:
        import torch

        from noisysam.training.fit import fit
        from noisysam.training.progress import Display, note

        if self.deadline is not None and time.time() >= self.deadline:
            return CellOutcome(cell, "stopped")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache()))
        display = Display(cell.config, cpu=False) if self.show else None
        if self.show:
            note(f"{cell.label}: in training")
        tracker = tracker_for(self.uri, self.experiment, cell.row, self.parents.get(cell.row))
        progress = StopAtDeadline(display, self.deadline)
        try:
            fit(cell.config, dataset=dataset, store=self.store, tracker=tracker, progress=progress)
        except TimeIsUp:
            return CellOutcome(cell, "stopped")
        except RunLocked:
            return CellOutcome(cell, "held")
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            if _no_space(error):
                return CellOutcome(cell, "full", line)
            known = isinstance(error, UserError | RunFailed)
            return CellOutcome(cell, "failed", line if known else f"{type(error).__name__}: {line}")
        finally:
            if display is not None:
                display.close()
        return CellOutcome(cell, "finished")

    def threads_of(self, cell: Cell) -> int:
        """Threads that the run will use: the number with which it began, else that of the job."""
        record = RunFolder(self.store, cell.key).sound_record
        began = 0 if record is None else record["resolved"]["threads"]
        return began or self.threads or 1


def _no_space(error: BaseException | None) -> bool:
    """Whether an error was caused by a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def compile_cache() -> Path:
    """Folder of compiled kernels, shared by all runs of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisysam" / "inductor"


def tracker_for(
    uri: str | None, experiment: str, row: str | None = None, parent: str | None = None
) -> Callable[[RunFolder], Any] | None:
    """The ``tracker`` argument of ``fit``; None if tracking is off."""
    if uri is None:
        return None
    from noisysam.tracking import Sender

    return lambda folder: Sender(folder, uri, experiment, parent, row)
