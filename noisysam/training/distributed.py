"""One large run over several processes, each with its rows of every batch. torchrun starts them::

    torchrun --nproc-per-node 2 -m noisysam run --noise 0.8 --opt sam

Every process draws the whole batch (order, crops and the method's draws come from the same named streams) and takes its
slice of B / R rows: rank r the rows from r B / R on. Gradients and batch norm's running statistics are averaged over
the processes, so that their networks stay equal to the last bit, which is checked after each epoch.

m is the number of rows that share one perturbation, as in one process, and never more than a process holds: each cuts
its rows into chunks of m. With m a divisor of B / R these are the chunks that one process cuts; from B / R on, and with
``batch``, a step is that of one process with m = B / R (arXiv 2010.01412, section 4.1). Any other m is refused. What a
member draws for a chunk comes from its process's own stream.

With ``sync_perturbation`` every gradient is averaged as soon as it is taken, that of the ascent too: a step is that of
one process with m = batch, but for batch norm, which sees the rows of its own process.

The first process alone measures, in whole, and writes; the others need not see its store. The number of processes is
part of the run's key. gloo carries tensors between CPUs, nccl between CUDA devices. Where something else than torchrun
starts the processes, ``ProcessGroup(rank, size, local)`` takes MASTER_ADDR and MASTER_PORT from the environment.
"""

import io
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from noisysam.core.errors import RunFailed, UserError
from noisysam.core.requirements import unmet
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.training import devices

T = TypeVar("T")


MEETING = timedelta(minutes=5)  # until all processes have started


PATIENCE = timedelta(minutes=30)  # for a process that measures, or compiles


LAST_WORDS = timedelta(seconds=30)  # for the first process to write down what went wrong


class ProcessLost(RunFailed):
    """Another process of the run ended before its time."""


@dataclass
class ProcessGroup:
    """The processes of one run, as one of them sees them; alone, all that it does is nothing.

    ``rank`` of ``size`` processes, the ``local``-th of its machine. Used as a context: the processes meet at its start;
    an error that several of them raise is told by one alone, the others leave by SystemExit.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def of_torchrun(cls) -> Self:
        """What torchrun has set in the environment; one process where it was not used."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def first(self) -> bool:
        """Whether this process measures, writes and speaks."""
        return self.rank == 0

    # meeting and parting

    def __enter__(self) -> Self:
        if self.size > 1:
            from torch.distributed.rendezvous import rendezvous

            if self.local < torch.cuda.device_count():
                torch.cuda.set_device(self.local)  # 'cuda' is then each process's own
            try:
                self.store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=MEETING))
                dist.init_process_group(store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
            except RuntimeError as error:
                raise RunFailed(f"the {self.size} processes did not find one another: {error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.size == 1:
            return
        if error is None:
            dist.destroy_process_group()
        elif not self._speaks(error):
            raise SystemExit(2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1)

    def _speaks(self, error: BaseException) -> bool:
        """Whether this process is the one that tells what went wrong: the first to come here."""
        if threading.current_thread() is threading.main_thread():  # torchrun now stops those that are left
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        everybody = isinstance(error, UserError | RunFailed) and not isinstance(error, ProcessLost)
        try:
            if everybody and not self.first:  # the first process meets it too, and may still be writing it down
                with suppress(dist.DistStoreError):  # it does not: the error was this process's alone
                    self.store.wait(["spoken"], LAST_WORDS)
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # whoever kept the store is gone: the first process, where torchrun does not
            return not everybody

    # what processes tell one another

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            kept = "the last whole epoch is saved: the same command resumes"
            raise ProcessLost(f"another process of this run ended or hangs ({reason}); {kept}") from None

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with self._waiting():
                dist.all_gather_object(found, value)
        return found

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """An error that one process meets within the block is everybody's after it."""
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        found = self.gather(None if own is None else (isinstance(own, UserError), str(own)))
        fault = next(filter(None, found), None)
        if fault is not None:
            user, message = fault
            raise own or (UserError if user else RunFailed)(message)

    def share(self, make: Callable[[], T], device: torch.device | str = "cpu") -> T:
        """What ``make`` returns in the first process, which alone calls it: tensors (to ``device``), numbers, strings,
        lists, dicts. Its error is everybody's."""
        if self.size == 1:
            return make()
        with self.agreed():
            value = make() if self.first else None
        content: list[Any] = [None]
        if self.first:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            content = [buffer.getvalue()]
        with self._waiting():
            dist.broadcast_object_list(content)
        shared: T = torch.load(io.BytesIO(content[0]), map_location=device, weights_only=True)
        return shared

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes, the same bits in all; by one message."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with self._waiting():
            dist.all_reduce(flat)
        parts = flat.div_(self.size).split([t.numel() for t in tensors])
        # as the tensors lie in memory: the fused rules take weights and gradients element by element
        return [torch.empty_like(t).copy_(part.view(t.shape)) for t, part in zip(tensors, parts, strict=True)]

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.size > 1:
            for t in tensors:
                with self._waiting():
                    dist.broadcast(whole := t.contiguous(), 0)
                t.copy_(whole)

    # what each process does

    def rows(self, of: int) -> slice | None:
        """The rows of this process, of a batch of so many; None: all of them."""
        if self.size == 1:
            return None
        if of % self.size:
            raise UserError(f"a batch of {of} rows cannot be divided among {self.size} processes: use another number")
        part = of // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def same(self, tensors: Iterable[Tensor]) -> None:
        """``RunFailed`` where the processes do not hold equal tensors."""
        if self.size > 1:
            sums = torch.stack([t.detach().double().sum() for t in tensors]).cpu().numpy().tobytes()
            if len(set(self.gather(sums))) > 1:
                raise RunFailed(
                    "the processes have drifted apart: the method or the optimizer keeps what its own rows showed, or"
                    " their devices differ; use one process"
                )

    # what can be run

    def digests(self) -> dict[str, str]:
        """What the number of processes adds to a run's key; nothing for one."""
        return {"processes": str(self.size)} if self.size > 1 else {}

    def check(self, config: RunConfig) -> None:
        """``UserError`` for a run that this number of processes cannot do."""
        if self.size > 1:
            _check_division(config, self.size)
            recipe = config.recipe()
            parts: dict[str, Any] = {"method": recipe.method, "optimizer": recipe.optimizer}
            fault = unmet(parts, {"one process": "start it without torchrun"})
            if fault is not None:
                raise UserError(fault)
            device = devices.resolve_device(config.device)
            if device.type not in ("cpu", "cuda") or ":" in config.device:
                raise UserError(f"--device {config.device}: several processes take cpu, or cuda without a number")
            if device.type == "cuda" and self.local >= torch.cuda.device_count():
                raise UserError(
                    f"process {self.local + 1} of this machine has no GPU of its own: start {torch.cuda.device_count()}"
                )
        elif config.sync_perturbation:
            raise UserError("--sync-perturbation is for several processes: start with torchrun, or give --sam-m batch")

    def check_begun(self, config: RunConfig, digests: Mapping[str, str], store: Path) -> None:
        """``UserError`` where another number of processes began this run and did not finish it. ``digests``: of the
        data and the network, without those of the processes."""
        for size in (n for n in range(1, config.batch + 1) if config.batch % n == 0 and n != self.size):
            folder = RunFolder(store, config.key({**digests, **ProcessGroup(size=size).digests()}))
            record = folder.record
            if record is not None and record["status"] in ("running", "interrupted"):
                began = f"{size} processes" if size > 1 else "one process"
                raise UserError(
                    f"run {folder.key} is this one, begun with {began}: resume it so, or delete {folder.path}"
                )


def _check_division(config: RunConfig, size: int) -> None:
    if config.batch % size:
        raise UserError(f"--batch {config.batch} cannot be divided among {size} processes: give a multiple")
    rows, chosen = config.batch // size, config.recipe().optimizer_options
    m: int | str = getattr(chosen, "m", "batch")
    if config.sync_perturbation:
        if not hasattr(chosen, "rho") or "rows" in config.recipe().optimizer.requires:
            raise UserError(f"--sync-perturbation: optimizer {config.opt} has no perturbation that can be shared")
        if m != "batch":
            raise UserError("--sync-perturbation is one perturbation for the whole batch: give --sam-m batch")
    elif isinstance(m, int) and m < rows and rows % m:
        raise UserError(f"--sam-m {m} does not divide the {rows} rows of each of {size} processes: give one that does")
