"""The interface of engines, and the engine that trains in this process.

An engine is ``map(job, cells) -> iterator of outcomes``, in the order in which cells end. A failed run is an outcome.
``cells`` may be lazy: a cell is taken when there is room for it.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from noisysam.data.datasets import Dataset
from noisysam.studies.plan import Cell

State = Literal["finished", "failed", "again", "held", "stopped", "full"]


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of a cell. ``finished``; ``failed``, for the reason in ``error``; ``again``: failed and is retried;
    ``held``: another process trains it; ``stopped``: the time was up, the same command goes on with it; ``full``: the
    store's disk is, which is no fault of the cell."""

    cell: Cell
    state: State
    error: str | None = None


Outcomes = Generator[CellOutcome, None, None]  # closing it stops what is in flight


class Job(Protocol):
    """Trains one cell, from ``dataset`` where it is given; never raises but for Ctrl-C."""

    def __call__(self, cell: Cell, dataset: Dataset | None = None) -> CellOutcome: ...

    def threads_of(self, cell: Cell) -> int:
        """Threads that the cell's run will use: those that it began with, else the job's own."""


class Engine(Protocol):
    """What all engines have in common."""

    @property
    def parallel(self) -> bool:
        """Whether several cells are trained at a time: the longest are then begun first."""

    @property
    def threads(self) -> int | None:
        """Threads of a run; None: all cores."""

    def width(self) -> int:
        """About how many runs there is room for at a time."""

    def map(self, job: Job, cells: Iterable[Cell]) -> Outcomes:
        """Train the cells."""

    def close(self) -> None:
        """Give back what the engine holds."""


@dataclass
class Inline:
    """One cell after the other, in this process."""

    threads: int | None = None
    parallel = False

    def width(self) -> int:
        return 1

    def map(self, job: Job, cells: Iterable[Cell]) -> Outcomes:
        for cell in cells:
            yield job(cell)

    def close(self) -> None:
        pass
