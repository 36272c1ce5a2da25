"""Studies: one YAML file, a grid of cells, each a run; finished cells are not run again."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from noisysam import records
from noisysam.config import RunConfig, explain, validate
from noisysam.errors import RunFailed, UserError
from noisysam.problem import prepare
from noisysam.records import RunFolder


class StudyFile(BaseModel):
    """What a study's YAML says. A cell's values are base, then grid, then row; later ones win."""

    model_config = ConfigDict(extra="forbid")

    base: dict[str, Any] = Field({}, description="values of every cell")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="fields that are crossed with the rows, each a list of values"
    )
    rows: dict[str, dict[str, Any]] = Field(min_length=1, description="named rows of the table, each with its values")
    seeds: list[int] = Field([0], min_length=1, description="seeds; the noise seed is the same number")
    published: str | None = Field(None, description="published table to print beside: sam-table4")


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


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``error`` is None, or one line."""

    cell: Cell
    error: str | None


class Job(Protocol):
    """Trains one cell in ``store`` and returns None, or the line that says why it failed."""

    def __call__(self, cell: Cell) -> str | None: ...


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path) -> StudyFile:
    """A study file; ``UserError`` names the file and the place."""
    try:
        content = yaml.load(path.read_text(), Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping with base, grid, rows and seeds was expected")
    try:
        return StudyFile.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, prefix='')}") from None


def plan(path: Path, data_dir: Path | None = None) -> list[Cell]:
    """Every cell of a study file, validated, in the order seed, grid, row, so that rows of one problem are adjacent."""
    study = read(path)
    if any("seed" in values for values in (study.base, study.grid, *study.rows.values())):
        raise UserError(f"{path}: seed stands in base, grid or a row: list the seeds under seeds instead")
    if any("eval_every" in values for values in (study.grid, *study.rows.values())):
        raise UserError(f"{path}: eval_every must be the same for all rows: set it in base")
    for row, values in study.rows.items():
        if twice := set(values) & set(study.grid):
            raise UserError(f"{path}: row {row!r} sets {', '.join(sorted(twice))}, which the grid varies")
    cells = []
    for seed in study.seeds:
        for point in itertools.product(*study.grid.values()):
            for row, values in study.rows.items():
                merged = {**study.base, **dict(zip(study.grid, point, strict=True)), **values, "seed": seed}
                if data_dir is not None:
                    merged["data_dir"] = data_dir
                config = validate(merged, where=f"{path}, row {row!r}: ")
                cells.append(Cell(row, config, config.key(prepare(config).digests)))
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.key in seen:
            raise UserError(f"{path}: rows {seen[cell.key].row!r} and {cell.row!r} are the same run ({cell.label})")
        seen[cell.key] = cell
    return cells


def save(path: Path, cells: Sequence[Cell], store: Path) -> str:
    """Keep the study's plan in the store, for the report and the export; returns its name, the file's stem."""
    content = {
        "schema": records.RECORD_SCHEMA,
        "name": path.stem,
        "file": path.read_text(),
        "published": read(path).published,
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
    records.write_json(records.study_path(store, path.stem), content)
    return path.stem


def finished(cell: Cell, store: Path) -> bool:
    """Whether a cell's result is in the store."""
    record = RunFolder(store, cell.key).record
    return record is not None and record["status"] == "finished"


def forecast(cells: Sequence[Cell], store: Path) -> float | None:
    """Seconds of training that the unfinished cells will take, from finished ones with the same row; None where
    nothing like them has run."""
    known: dict[str, list[float]] = {}
    for cell in cells:
        record = RunFolder(store, cell.key).record
        if record is not None and record["status"] == "finished":
            spent = record["cost"]
            known.setdefault(cell.row, []).append(spent["train_seconds"] + spent["eval_seconds"])
    left = [cell.row for cell in cells if not finished(cell, store)]
    if not left or any(row not in known for row in left):
        return None
    return sum(sum(known[row]) / len(known[row]) for row in left)


def inline(job: Job, cells: Sequence[Cell]) -> Iterator[Outcome]:
    """One cell after the other, in this process."""
    for cell in cells:
        yield Outcome(cell, job(cell))


def _call(job: Job, cell: Cell) -> str | None:
    return job(cell)


def ray_tasks(job: Job, cells: Sequence[Cell], jobs: int) -> Iterator[Outcome]:
    """``jobs`` cells at a time, each in a fresh process with one thread, as Ray tasks."""
    try:
        import ray
    except ImportError:
        raise UserError("--jobs needs Ray: pip install 'noisysam[ray]', or leave --jobs out") from None
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: whatever else runs would starve the study
    ray.init(
        num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level="warning", configure_logging=False
    )
    try:
        task = ray.remote(num_cpus=1, max_calls=1, max_retries=0, runtime_env={"env_vars": quiet})(_call)
        waiting = {task.remote(job, cell): cell for cell in cells}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(ready)
            try:
                yield Outcome(cell, ray.get(ready))
            except ray.exceptions.RayError as error:
                yield Outcome(cell, f"its process died: {str(error).splitlines()[0]}")
    finally:
        ray.shutdown()


def run(
    cells: Sequence[Cell], job: Job, store: Path, jobs: int = 1, done: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Train the unfinished cells; a failed one is an outcome, and the rest goes on."""
    left = [cell for cell in cells if not finished(cell, store)]
    outcomes = []
    for outcome in inline(job, left) if jobs == 1 else ray_tasks(job, left, jobs):
        outcomes.append(outcome)
        if done is not None:
            done(outcome)
    return outcomes


@dataclass(frozen=True)
class TrainCell:
    """The job of a sweep: train one cell, tracked where ``uri`` is given. Errors become the outcome's line."""

    store: Path
    uri: str | None = None
    experiment: str = "noisysam"
    threads: int | None = None
    show: bool = False

    def __call__(self, cell: Cell) -> str | None:
        import torch

        from noisysam.progress import Display
        from noisysam.train import fit

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        display = Display(cell.config, cpu=False) if self.show else None
        try:
            fit(cell.config, store=self.store, tracker=tracker_for(self.uri, self.experiment, cell.row), watch=display)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            known = isinstance(error, UserError | RunFailed)
            return lines[0] if known else f"{type(error).__name__}: {lines[0]}"
        finally:
            if display is not None:
                display.close()
        return None


def tracker_for(uri: str | None, experiment: str, row: str | None = None) -> Callable[[RunFolder], Any] | None:
    """What ``fit`` takes to send its record to a tracking store; None where tracking is off."""
    if uri is None:
        return None
    from noisysam.tracking import Tracker

    return lambda folder: Tracker(folder, uri, experiment, row=row)
