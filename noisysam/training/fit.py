"""``fit`` takes a configuration to its result."""

import errno
import hashlib
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from torch import nn

from noisysam.core import plugins
from noisysam.core.errors import DamagedFile, UserError
from noisysam.core.rng import stream_seed
from noisysam.data.datasets import Dataset
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import prepare, weights_digest
from noisysam.runs.record import RunFolder
from noisysam.runs.schema import RunRecord
from noisysam.training import checkpoint, devices
from noisysam.training.distributed import ProcessGroup
from noisysam.training.progress import NotebookProgress, in_notebook
from noisysam.training.result import Result
from noisysam.training.run import Run, SupportsSync
from noisysam.training.trainer import Factory, ProgressCallback


def fit(
    config: RunConfig,
    *,
    dataset: Dataset | None = None,
    network: Factory | None = None,
    store: Path = Path("runs"),
    tracker: Callable[[RunFolder], SupportsSync] | None = None,
    progress: ProgressCallback | None = None,
    processes: ProcessGroup | None = None,
) -> Result:
    """Train one configuration to its end and return its result.

    A finished run is returned as stored; an interrupted one resumes where it stopped, to the same bits. ``dataset``
    and ``network`` (seed -> module) take the place of the configured ones. In a notebook a bar shows the epochs, unless
    ``progress`` is given. Of several ``processes`` (which have met) each calls this; the first alone writes, tracks and
    reports progress. Raises ``RunFailed`` where the training diverges; its record stays.
    """
    processes = processes or ProcessGroup()
    if progress is None and in_notebook():
        progress = NotebookProgress()
    if not processes.first:
        tracker = progress = None
    with ExitStack() as held:
        with processes.agreed():
            if config.plugin is not None:  # a worker's process has not read it yet
                plugins.load(config.plugin)
            processes.check(config)
            problem = prepare(config, dataset)
            digests = {**problem.digests, **weights_digest(config)}
            if network is not None:
                digests["network"] = _network_digest(network(stream_seed(config.seed, 0, 0, "init")))
            folder = RunFolder(store, config.key({**digests, **processes.digests()}))
            if processes.first:
                processes.check_begun(config, digests, store)
                try:
                    held.enter_context(folder.lock())
                    problem.save_labels(folder)
                except OSError as error:  # a finished run can be read from a store that cannot be written
                    unwritable = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
                    if not unwritable or not finished(folder):
                        raise
        digests |= processes.digests()
        if len(set(processes.gather(folder.key))) > 1:
            raise UserError("the processes do not train the same run: give each the same data and the same version")
        record = processes.share(lambda: _begun(folder))
        if record is not None and record["status"] == "finished":
            if processes.first:
                with suppress(OSError):  # the store may be read-only
                    checkpoint.remove(folder.path)  # of a process that was killed before it did
            if tracker is not None:
                tracker(folder).sync(final=True)
            return Result(folder.key, folder.path, record)
        if processes.first:
            _warn_of_sizes(config, len(problem.train))
        run = Run(config, problem, digests, folder, network, tracker, progress, processes)
        try:
            with devices.settings(run.resolved["threads"], config.deterministic):
                return run.fit()
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt:  # of somebody who knows what it means
                raise
            raise KeyboardInterrupt(stopped(folder)) from None


def stopped(folder: RunFolder) -> str:
    """What is left of a run that was stopped."""
    if any((folder.path / name).exists() for name in (checkpoint.CURRENT, checkpoint.PREVIOUS)):
        return "stopped after the last complete epoch; the same command resumes"
    return "stopped before its first epoch was complete; the same command begins it again"


def _warn_of_sizes(config: RunConfig, images: int) -> None:
    """Warn of a batch that the data do not fill, and of a last chunk that is smaller than the others."""
    rows, m = min(config.batch, images), getattr(config.recipe().optimizer_options, "m", None)
    if config.batch > images:
        warnings.warn(
            f"--batch {config.batch}: there are {images} training images, all in each step; a smaller batch gives more"
            " steps an epoch",
            stacklevel=3,
        )
    asked = config.sam_m is not None or "m" in config.opt_option
    if asked and isinstance(m, int) and m < rows and rows % m:
        warnings.warn(
            f"--sam-m {m} does not divide a batch of {rows}: the last chunk of a step has {rows % m} rows", stacklevel=3
        )


def _begun(folder: RunFolder) -> RunRecord | None:
    """The record so far. A run whose record cannot be read resumes from its checkpoint, if it has one."""
    try:
        return folder.record
    except DamagedFile as error:
        if not (folder.path / checkpoint.CURRENT).exists():
            raise DamagedFile(error.path, f"{error.reason}; delete {folder.path} to train the run again") from None
        warnings.warn(f"{error}: the run resumes from its checkpoint", stacklevel=2)
        return None


def _network_digest(module: nn.Module) -> str:
    content = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        content.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def finished(folder: RunFolder) -> bool:
    """Whether a run is finished, by its record."""
    record = folder.record
    return record is not None and record["status"] == "finished"
