"""Runs as Ray tasks."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noisysam.core.errors import RunFailed, UserError
from noisysam.core.text import one_line
from noisysam.data.datasets import ARRAYS, Dataset
from noisysam.runs.problem import load_dataset
from noisysam.studies.engines.base import CellOutcome, Job, Outcomes
from noisysam.studies.plan import Cell
from noisysam.training.devices import cores

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
    _data: dict[tuple[str, Path | None, int | None], Any] = field(default_factory=dict)

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

        place = (cell.config.dataset, cell.config.data_dir, cell.config.image_size)
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

    def _outcome(self, ready: Any, cell: Cell) -> CellOutcome:
        import ray

        try:
            outcome: CellOutcome = ray.get(ready)
            return outcome
        except ray.exceptions.RayError as error:
            return CellOutcome(cell, "failed", f"its process died: {one_line(error)}")

    def close(self) -> None:
        if "ray" in sys.modules:
            self._data.clear()
            sys.modules["ray"].shutdown()


def _arrays(dataset: Dataset) -> dict[str, Any]:
    """A data set in parts that Ray shares without a copy."""
    parts = {name: getattr(dataset, name) for name in Dataset.__dataclass_fields__}
    return parts | {name: parts[name].numpy() for name in ARRAYS}


def _call(job: Job, cell: Cell, arrays: dict[str, Any]) -> CellOutcome:
    import torch

    with warnings.catch_warnings():  # the memory is shared and cannot be written to; nothing does
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(arrays[name]) for name in ARRAYS}
    return job(cell, Dataset(**{**arrays, **tensors}))
