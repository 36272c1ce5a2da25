"""Runs as the jobs of a SLURM array, through submitit."""

import getpass
import itertools
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from noisysam.core.errors import UserError
from noisysam.core.files import read_json, write_json
from noisysam.core.text import one_line
from noisysam.data.datasets import Dataset
from noisysam.studies.engines.base import CellOutcome, Job, Outcomes, State
from noisysam.studies.engines.ray import LOOK
from noisysam.studies.plan import Cell

# SLURM

REQUEUES = 100  # after the time limit; preemption does not count


AT_A_TIME = 256  # jobs of an array, where --jobs does not say


ARRAY = 1000  # jobs of an array in all: SLURM's own MaxArraySize is 1001


QUEUE = 30.0  # seconds between two looks at SLURM's queue


MINUTES = 24 * 60  # of a job, where --slurm time does not say


@dataclass(frozen=True)
class Recorded:
    """A job that writes its outcome as JSON to ``folder``: submitit's results are pickles, which are not read."""

    job: Job
    folder: Path

    def __call__(self, cell: Cell, dataset: Dataset | None = None) -> None:
        outcome = self.job(cell, dataset)
        write_json(self.path(cell), {"state": outcome.state, "error": outcome.error})

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"

    def checkpoint(self, cell: Cell, dataset: Dataset | None = None) -> Any:
        """For submitit, when a job is preempted: the same call again, which resumes the run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, cell, dataset)

    def outcome(self, cell: Cell, log: Path) -> CellOutcome:
        """The outcome of a job that has ended; ``log``: its output."""
        try:
            content = read_json(self.path(cell))
        except UserError:
            return CellOutcome(cell, "failed", f"its job ended without a result: see {log}")
        state: Any = content.get("state")
        error = content.get("error")
        if state not in get_args(State) or not isinstance(error, str | None):
            return CellOutcome(cell, "failed", f"its job left a damaged result: see {self.path(cell)}")
        return CellOutcome(cell, state, error)


@dataclass
class Slurm:
    """A SLURM job array through submitit, a job for each cell, at most ``jobs`` at a time. A job that is preempted, or
    whose time is up, is requeued and resumes. ``options``: what sbatch is to be told. ``folder``: scripts and logs, on
    a disk that all nodes see; those of finished runs are removed. ``cluster``: submitit's executor."""

    folder: Path
    jobs: int | None = None
    cpus: float = 1
    gpus: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    cluster: str = "slurm"
    parallel = True

    @property
    def threads(self) -> int:
        return int(self.cpus)

    def width(self) -> int:
        return self.jobs or AT_A_TIME

    def executor(self) -> Any:
        """submitit's executor, told what a job needs."""
        try:
            import submitit
        except ImportError:
            raise UserError("--engine slurm needs submitit: pip install 'noisysam[slurm]'") from None
        for flag, wanted in (("--cpus-per-run", self.cpus), ("--gpus-per-run", self.gpus or 0)):
            if wanted != int(wanted):
                raise UserError(f"{flag} {wanted:g}: SLURM hands out whole ones; --engine ray shares them")
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("--engine slurm: there is no sbatch on this machine; use the cluster's login node")
        executor = submitit.AutoExecutor(self.folder, self.cluster, slurm_max_num_timeout=REQUEUES)
        general = {"name": "noisysam", "cpus_per_task": int(self.cpus), "gpus_per_node": int(self.gpus or 0)}
        executor.update_parameters(
            timeout_min=minutes(self.options.get("time", str(MINUTES))), stderr_to_stdout=True, **general
        )
        if self.cluster == "slurm":
            known = type(executor._executor)._valid_parameters()
            options = {name.replace("-", "_"): value for name, value in self.options.items() if name != "time"}
            executor.update_parameters(
                slurm_array_parallelism=self.width(),
                slurm_setup=[f"export {name}_NUM_THREADS={int(self.cpus)}" for name in ("OMP", "MKL")],
                slurm_additional_parameters={n.replace("_", "-"): v for n, v in options.items() if n not in known},
                **{f"slurm_{name}": value for name, value in options.items() if name in known},
            )
        return executor

    def map(self, job: Job, cells: Iterable[Cell]) -> Outcomes:
        executor, left = self.executor(), iter(cells)
        while todo := list(itertools.islice(left, ARRAY)):
            yield from self._array(executor, job, todo)

    def _array(self, executor: Any, job: Job, todo: Sequence[Cell]) -> Outcomes:
        from submitit.core.utils import FailedJobError

        recorded = Recorded(job, self.folder)
        for cell in todo:
            recorded.path(cell).unlink(missing_ok=True)
        try:
            with executor.batch():
                tasks = [executor.submit(recorded, cell) for cell in todo]
        except FailedJobError as error:
            raise UserError(f"--engine slurm: sbatch refused ({one_line(error)})") from None
        for link in self.folder.glob(".submission_file_*"):  # to the script, which has a name by now
            if link.is_symlink():
                link.unlink(missing_ok=True)
        array = tasks[0].job_id.partition("_")[0]
        try:
            yield from self._results(recorded, dict(zip(tasks, todo, strict=True)))
        except KeyboardInterrupt:
            message = f"SLURM goes on: scancel {array} stops it, the same command waits for what runs"
            raise KeyboardInterrupt(message) from None
        if not any(self.folder.glob(f"{array}_*.out")):  # all have finished
            (self.folder / f"{array}_submission.sh").unlink(missing_ok=True)

    def _results(self, recorded: Recorded, waiting: dict[Any, Cell]) -> Outcomes:
        lost: set[Any] = set()
        looked = time.monotonic()
        while waiting:
            for task in [task for task in waiting if self._is_done(task)]:
                cell = waiting.pop(task)
                outcome = recorded.outcome(cell, task.paths.stdout)
                recorded.path(cell).unlink(missing_ok=True)
                if outcome.state == "finished":
                    for path in self.folder.glob(f"{task.job_id}_*"):
                        path.unlink(missing_ok=True)
                yield outcome
            if self.cluster == "slurm" and time.monotonic() - looked > QUEUE:
                absent = self._absent(waiting)
                for task in lost & absent:  # twice: a result may be on its way through the file system
                    yield CellOutcome(waiting.pop(task), "failed", f"its job was lost; see {task.paths.stdout}")
                lost, looked = absent, time.monotonic()
            time.sleep(LOOK)

    def _is_done(self, task: Any) -> bool:
        """Whether there is a result. Of SLURM's jobs submitit would ask sacct, which needs an accounting database."""
        if self.cluster != "slurm":
            return bool(task.done())
        with suppress(OSError):  # of another owner
            self.folder.chmod(self.folder.stat().st_mode)  # a network file system then looks again
        return bool(task.paths.result_pickle.exists())

    def _absent(self, tasks: Iterable[Any]) -> set[Any]:
        """Jobs that neither wait nor run and left no result; none where SLURM does not answer."""
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        there = set(found.stdout.split())
        return {task for task in tasks if found.returncode == 0 and task.job_id not in there}

    def close(self) -> None:
        pass


def minutes(text: str) -> int:
    """A time as sbatch takes it (minutes, H:M:S, days-hours, ...) in minutes, rounded up."""
    found = re.fullmatch(r"(\d+-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(f"--slurm time={text}: write it as minutes, H:M:S or days-H:M:S")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts.insert(0, 0)
    hours, mins, seconds = [*parts, 0, 0][:3]
    return (int((days or "0").rstrip("-")) * 24 + hours) * 60 + mins + (seconds > 0)
