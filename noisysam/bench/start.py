"""Start-up time: ``--help`` until it ends, and ``run`` until the end of its first training step, for new and resumed
runs. Each is timed as a separate process with one thread.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from noisysam.bench.measure import Findings, Row, Settings, estimate, interleaved
from noisysam.bench.runs import dataset
from noisysam.core.errors import RunFailed
from noisysam.data.datasets import ARRAYS
from noisysam.training.progress import note

ROUNDS = 5
COMMAND = [sys.executable, "-m", "noisysam"]
UNTIL_A_STEP = """
import os, sys
from noisysam import cli
from noisysam.training import progress

last = int(sys.argv.pop(1))

def step(self, stage, epoch, number, of):
    if epoch == last:
        print("step", flush=True)
        os._exit(0)

progress.Display.step = step
cli.main()
"""  # the real command, which ends itself in the first step of an epoch


def measure(settings: Settings) -> Findings:
    """Seconds of each case. ``cold``: with an empty compiler cache; ``warm``: with a full one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits = ["--dataset", "digits", "--model", "resnet8", "--epochs", "10"]
        cases: dict[str, Callable[[], float]] = {
            "--help": lambda: finished([*COMMAND, "--help"]),
            "run, digits, resnet8": new(folder, digits),
            "resume, digits, resnet8": resumed(folder, digits),
        }
        if not settings.quick:
            cifar = data_flags(settings, folder)
            short, eager = (
                [*cifar, "--train-subset", "1280"],
                ["--compile", "off"],
            )  # a short first epoch to resume after
            cases |= {
                "run, CIFAR-10, resnet32, not compiled": new(folder, [*cifar, *eager]),
                "run, CIFAR-10, resnet32, compiled, cold": new(folder, cifar, cold=True),
                "run, CIFAR-10, resnet32, compiled, warm": new(folder, cifar),
                "resume, CIFAR-10, resnet32, not compiled": resumed(folder, [*short, *eager]),
                "resume, CIFAR-10, resnet32, compiled, warm": resumed(folder, short),
            }
        for label, case in cases.items():
            note(f"  {label}")
            if "cold" not in label:
                case()  # warm up: file cache, tracking store
        found = interleaved(cases, settings.times(ROUNDS))
    rows: list[Row] = [{"command": label, "seconds": estimate(spent)} for label, spent in found.items()]
    facts = {
        "rounds": settings.times(ROUNDS),
        "data": "digits" if settings.quick else dataset(settings).name,
        "threads": 1,
        "tracking": "SQLite",
    }
    return Findings({"To the first training step": rows}, facts)


def data_flags(settings: Settings, folder: Path) -> list[str]:
    """The options for CIFAR-10, or for a file of generated images of its shape."""
    data = dataset(settings)
    if data.name != "generated":
        return ["--dataset", "cifar10", *(["--data-dir", str(settings.data_dir)] if settings.data_dir else [])]
    path = folder / "generated.npz"
    np.savez(path, **{key: getattr(data, key).numpy() for key in ARRAYS})
    return ["--dataset", f"npz:{path}"]


def new(folder: Path, arguments: Sequence[str], cold: bool = False) -> Callable[[], float]:
    """A new run, in its own store."""

    def once() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as store, tempfile.TemporaryDirectory(dir=folder) as empty:
            cache = empty if cold else str(folder / "compiled")
            return to_step(folder, Path(store), arguments, epoch=0, cache=cache)

    return once


def resumed(folder: Path, arguments: Sequence[str]) -> Callable[[], float]:
    """A run that was stopped in its second epoch (by the first call) and resumes there in every call."""
    store = Path(tempfile.mkdtemp(dir=folder))
    return lambda: to_step(folder, store, arguments, epoch=1, cache=str(folder / "compiled"))


def to_step(folder: Path, store: Path, arguments: Sequence[str], epoch: int, cache: str) -> float:
    """Seconds from the command to the end of the first step of an epoch."""
    places = ["--store", str(store), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    command = [sys.executable, "-c", UNTIL_A_STEP, str(epoch), "run", *arguments, *places]
    return finished(command, {"TORCHINDUCTOR_CACHE_DIR": cache}, said="step")


def finished(command: Sequence[str], environment: Mapping[str, str] | None = None, said: str | None = None) -> float:
    """Seconds until a command ends or prints the line ``said``; ``RunFailed`` if it fails."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    start = time.perf_counter()
    lines = ["it printed nothing"]
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == said:
                break
        spent = time.perf_counter() - start
    if process.returncode or said not in (None, lines[-1]):
        raise RunFailed(f"a command of the benchmark failed: {lines[-1]}")
    return spent
