"""Engines: what trains a study's cells, one by one here or many at a time. None of them is our own making.

An engine is ``map(job, cells) -> iterator of outcomes``, in the order in which cells end. A failed run is an outcome.
``cells`` may be lazy: a cell is taken when there is room for it.
"""

import getpass
import itertools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from noisysam.data import ARRAYS, Dataset, one_line
from noisysam.errors import RunFailed, UserError
from noisysam.hardware import cores
from noisysam.problem import load_dataset
from noisysam.study import Cell

State = Literal["finished", "failed", "again", "held", "stopped", "full"]


@dataclass(frozen=True)
class Outcome:
    """How a cell ended. ``finished``; ``failed``, for the reason in ``error``; ``again``: failed, and is tried again;
    ``held``: another process trains it; ``stopped``: the time was up, the same command goes on with it; ``full``: the
    store's disk is, which is no fault of the cell."""

    cell: Cell
    state: State
    error: str | None = None


Outcomes = Generator[Outcome, None, None]  # closing it stops what is in flight


class Job(Protocol):
    """Trains one cell, from ``dataset`` where it is given; never raises but for Ctrl-C."""

    def __call__(self, cell: Cell, dataset: Dataset | None = None) -> Outcome: ...

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


def choose(
    name: str | None,
    store: Path,
    jobs: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    address: str | None = None,
    slurm: Iterable[str] = (),
) -> Engine:
    """The engine that a command asks for; without a ``name`` Ray where it asks for several jobs or for a cluster."""
    options = dict(_pair(text) for text in slurm)
    name = name or ("ray" if address or (jobs or 1) > 1 else "slurm" if options else "inline")
    for flag, given, only in (("--address", address, "ray"), ("--slurm", options, "slurm")):
        if given and name != only:
            raise UserError(f"{flag} goes with --engine {only}")
    if name == "ray":
        return Ray(jobs, cpus or 1, gpus, address)
    if name == "slurm":
        return Slurm(store / "slurm", jobs, cpus or 1, gpus, options)
    if (jobs or 1) > 1 or gpus is not None:
        raise UserError("--engine inline trains one run at a time, on what --device says: use --engine ray")
    if cpus is not None and cpus != int(cpus):
        raise UserError(f"--cpus-per-run {cpus:g}: --engine inline takes whole cores")
    return Inline(None if cpus is None else int(cpus))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--slurm {text}: write it as key=value, such as partition=gpu")
    return name.removeprefix("--"), value


# Ray

LIVES = 10  # how often Ray starts a run anew whose process or node died; it resumes after its last whole epoch
LOOK = 2.0  # seconds between two looks at what the cluster holds
PATIENCE = 20.0  # seconds that runs have to end after Ctrl-C


@dataclass
class Ray:
    """Ray tasks: each run in a fresh process with ``cpus`` cores and ``gpus`` GPUs (fractions share one; None: one
    where there are any), at most ``jobs`` at a time (None: as many as fit), on this machine or on the cluster at
    ``address``. The data go through the object store: once to each machine, not to each process."""

    jobs: int | None = None
    cpus: float = 1
    gpus: float | None = None
    address: str | None = None
    parallel = True
    largest: float = 1  # cores of the largest machine
    _data: dict[tuple[str, Path | None], Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    def width(self) -> int:
        self.start()
        return self.slots

    def start(self) -> None:
        """Join the cluster, or start Ray here; ``UserError`` where that cannot be."""
        try:
            import ray
        except ImportError:
            raise UserError("--engine ray needs Ray: pip install 'noisysam[ray]', or --engine inline") from None
        if ray.is_initialized():
            return
        before = signal.getsignal(signal.SIGTERM)
        self._init(ray)
        if threading.current_thread() is threading.main_thread():  # Ray puts its own there, which ends at once
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if self.gpus is None:
            self.gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        largest = {name: max(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        for flag, wanted, name in (("--cpus-per-run", self.cpus, "CPU"), ("--gpus-per-run", self.gpus, "GPU")):
            if wanted > largest[name]:
                raise UserError(f"{flag} {wanted:g}: no machine of the cluster has more than {largest[name]:g}")
        self.largest = largest["CPU"]

    def _init(self, ray: Any) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: whatever else runs would starve the study
        quiet = {"log_to_driver": False, "logging_level": "warning", "configure_logging": False}
        if self.address is None:
            here = cores()
            jobs = self.jobs or max(1, int(here / self.cpus))
            if jobs * self.cpus > here:
                raise UserError(
                    f"--jobs {jobs} with --cpus-per-run {self.cpus:g} asks for {jobs * self.cpus:g} cores, this machine"
                    f" has {here}: lower one of them (--cpus-per-run {here / jobs:.2g} shares them)"
                )
            try:
                ray.init(address="local", num_cpus=here, include_dashboard=False, **quiet)
            except Exception as error:  # Ray's own, after half a minute: a machine that does too much else
                raise RunFailed(f"Ray did not start ({one_line(error)}): the same command tries again") from None
        else:
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"--address {self.address}: no Ray cluster answers ({one_line(error)}); one that was started with a"
                    " token (Ray's default) needs RAY_AUTH_MODE=token here, and that token"
                ) from None

    @property
    def slots(self) -> int:
        """Runs that the machines of this moment hold at a time."""
        import ray

        there = ray.cluster_resources()
        room = [there.get("CPU", 0) / self.cpus] + ([there.get("GPU", 0) / self.gpus] if self.gpus else [])
        return max(1, int(min(*room, *([self.jobs] if self.jobs else []), 1e6)))

    def map(self, job: Job, cells: Iterable[Cell]) -> Outcomes:
        left = iter(cells)
        cell = next(left, None)
        if cell is None:
            return
        self.start()
        with redirect_stdout(sys.stderr):  # where Ray says that a worker died; results alone go to stdout
            yield from self._run(job, cell, left)

    def _run(self, job: Job, first: Cell, left: Iterator[Cell]) -> Outcomes:
        import ray

        cell: Cell | None = first
        waiting: dict[Any, Cell] = {}
        try:
            while cell is not None or waiting:
                while cell is not None and len(waiting) < self.slots:
                    waiting[self._submit(job, cell)] = cell
                    cell = next(left, None)
                for ready in ray.wait(list(waiting), num_returns=1, timeout=LOOK)[0]:
                    yield self._outcome(ready, waiting.pop(ready))
        except (KeyboardInterrupt, GeneratorExit):
            for task in waiting:
                ray.cancel(task)  # as Ctrl-C in each: their records then say so
            ray.wait(list(waiting), num_returns=len(waiting), timeout=PATIENCE)
            raise

    def _submit(self, job: Job, cell: Cell) -> Any:
        import ray

        place = (cell.config.dataset, cell.config.data_dir)
        if place not in self._data:
            self._data[place] = ray.put(_arrays(load_dataset(*place)))
        threads = job.threads_of(cell)
        variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "RAY_DEDUP_LOGS": "0"}
        if not self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        task = ray.remote(
            # a run that began with more threads goes on with them, and needs their cores
            num_cpus=min(max(self.cpus, threads if threads > 1 else 0), self.largest),
            num_gpus=self.gpus,
            name=cell.label,
            max_calls=1,
            max_retries=LIVES,
            retry_exceptions=False,
            runtime_env={"env_vars": variables},
        )(_call)
        return task.remote(job, cell, self._data[place])

    def _outcome(self, ready: Any, cell: Cell) -> Outcome:
        import ray

        try:
            outcome: Outcome = ray.get(ready)
            return outcome
        except ray.exceptions.RayError as error:
            return Outcome(cell, "failed", f"its process died: {one_line(error)}")

    def close(self) -> None:
        if "ray" in sys.modules:
            self._data.clear()
            sys.modules["ray"].shutdown()


def _arrays(dataset: Dataset) -> dict[str, Any]:
    """A data set in parts that Ray shares without a copy."""
    parts = {name: getattr(dataset, name) for name in Dataset.__dataclass_fields__}
    return parts | {name: parts[name].numpy() for name in ARRAYS}


def _call(job: Job, cell: Cell, arrays: dict[str, Any]) -> Outcome:
    import torch

    with warnings.catch_warnings():  # the memory is shared and cannot be written to; nothing does
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(arrays[name]) for name in ARRAYS}
    return job(cell, Dataset(**{**arrays, **tensors}))


# SLURM

REQUEUES = 100  # after the time limit; preemption does not count
AT_A_TIME = 256  # jobs of an array, where --jobs does not say
ARRAY = 1000  # jobs of an array in all: SLURM's own MaxArraySize is 1001
QUEUE = 30.0  # seconds between two looks at SLURM's queue
MINUTES = 24 * 60  # of a job, where --slurm time does not say


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

        try:
            with executor.batch():
                tasks = [executor.submit(job, cell) for cell in todo]
        except FailedJobError as error:
            raise UserError(f"--engine slurm: sbatch refused ({one_line(error)})") from None
        for link in self.folder.glob(".submission_file_*"):  # to the script, which has a name by now
            if link.is_symlink():
                link.unlink(missing_ok=True)
        array = tasks[0].job_id.partition("_")[0]
        try:
            yield from self._results(dict(zip(tasks, todo, strict=True)))
        except KeyboardInterrupt:
            message = f"SLURM goes on: scancel {array} stops it, the same command waits for what runs"
            raise KeyboardInterrupt(message) from None
        if not any(self.folder.glob(f"{array}_*.out")):  # all have finished
            (self.folder / f"{array}_submission.sh").unlink(missing_ok=True)

    def _results(self, waiting: dict[Any, Cell]) -> Outcomes:
        from submitit.core.utils import UncompletedJobError

        lost: set[Any] = set()
        looked = time.monotonic()
        while waiting:
            for task in [task for task in waiting if self._is_done(task)]:
                cell = waiting.pop(task)
                try:
                    outcome = task.result()
                except UncompletedJobError as error:
                    outcome = Outcome(cell, "failed", f"its job ended: {one_line(error)}")
                if outcome.state == "finished":
                    for path in self.folder.glob(f"{task.job_id}_*"):
                        path.unlink(missing_ok=True)
                yield outcome
            if self.cluster == "slurm" and time.monotonic() - looked > QUEUE:
                absent = self._absent(waiting)
                for task in lost & absent:  # twice: a result may be on its way through the file system
                    yield Outcome(waiting.pop(task), "failed", f"its job was lost; see {task.paths.stdout}")
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
