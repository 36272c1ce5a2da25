"""Engines: what they train is what a plain call trains, and a lost process costs nothing but time."""

import builtins
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from noisysam.core.errors import UserError
from noisysam.data import ARRAYS
from noisysam.runs.problem import load_dataset
from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.studies import state as states
from noisysam.studies.engines import ray as ray_engine
from noisysam.studies.engines.base import CellOutcome, Inline
from noisysam.studies.engines.choice import choose
from noisysam.studies.engines.ray import Ray
from noisysam.studies.engines.slurm import Recorded, Slurm, minutes
from noisysam.studies.plan import Cell
from noisysam.studies.sweep import Sweep, TrainCell

STUDY = """\
base: {dataset: digits, model: resnet8, width: 0.25, epochs: 2, train_subset: 200, noise: 0.4, precision: fp32}
rows:
  SGD: {opt: sgd}
  SAM: {opt: sam}
"""


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    path = tmp_path / "one.yaml"
    path.write_text(STUDY)
    return plans.plan(path)


def weights(store: Path, cell: Cell) -> bytes:
    return (store / cell.key / "weights.safetensors").read_bytes()


# which engine


def test_choice(tmp_path: Path) -> None:
    assert choose(None, tmp_path) == Inline(None)
    assert choose(None, tmp_path, 1, cpus=1) == Inline(1)
    assert choose(None, tmp_path, 2) == Ray(2, 1, None, None)
    assert choose(None, tmp_path, address="auto", gpus=0.25, cpus=0.5) == Ray(None, 0.5, 0.25, "auto")
    slurm = choose("slurm", tmp_path, 8, 2, 1, slurm=["partition=gpu", "--time=1-0"])
    assert slurm == Slurm(tmp_path / "slurm", 8, 2, 1, {"partition": "gpu", "time": "1-0"})
    assert (Ray(cpus=0.5).threads, Ray(cpus=3).threads, Inline().threads, Inline(2).threads) == (1, 3, None, 2)


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({"name": "inline", "jobs": 2}, "--engine inline trains one run at a time"),
        ({"name": "inline", "gpus": 1}, "--engine inline trains one run at a time"),
        ({"name": None, "cpus": 1.5}, "--cpus-per-run 1.5: --engine inline takes whole cores"),
        ({"name": "slurm", "address": "auto"}, "--address goes with --engine ray"),
        ({"name": "ray", "slurm": ["partition=gpu"]}, "--slurm goes with --engine slurm"),
        ({"name": "slurm", "slurm": ["partition"]}, "--slurm partition: write it as key=value"),
    ],
)
def test_bad_choices(how: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        choose(store=tmp_path, **how)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-12:30:01", 2191)],
)
def test_times_of_slurm(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-1-2"])
def test_bad_times_of_slurm(text: str) -> None:
    with pytest.raises(UserError, match="write it as minutes"):
        minutes(text)


def test_without_the_extras(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name in ("ray", "submitit"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install 'noisysam\[ray\]'"):
        list(Sweep(cells, tmp_path, TrainCell(tmp_path), Ray(2)).run())
    with pytest.raises(UserError, match=r"--engine slurm needs submitit: pip install 'noisysam\[slurm\]'"):
        list(Sweep(cells, tmp_path, TrainCell(tmp_path), Slurm(tmp_path)).run())


# in this process


def test_inline_takes_a_cell_when_it_has_room(cells: list[Cell]) -> None:
    told: list[str] = []

    @dataclass
    class Job:
        def __call__(self, cell: Cell, dataset: Any = None) -> CellOutcome:
            told.append(f"trained {cell.row}")
            return CellOutcome(cell, "finished")

        def threads_of(self, cell: Cell) -> int:
            return 1

    def lazy() -> Iterator[Cell]:
        for cell in cells:
            told.append(f"taken {cell.row}")
            yield cell

    outcomes = list(Inline().map(Job(), lazy()))
    assert outcomes == [CellOutcome(cell, "finished") for cell in cells]
    assert told == ["taken SGD", "trained SGD", "taken SAM", "trained SAM"]


def test_data_that_come_along_are_the_same_data(cells: list[Cell], tmp_path: Path) -> None:
    """As Ray hands them over: read-only arrays. The key and every bit are those of a run that reads its data itself."""
    cell = cells[1]
    arrays = ray_engine._arrays(load_dataset("digits", None))
    for name in ARRAYS:
        arrays[name] = arrays[name].copy()
        arrays[name].flags.writeable = False
    before = {name: arrays[name].copy() for name in ARRAYS}
    assert ray_engine._call(TrainCell(tmp_path / "given"), cell, arrays) == CellOutcome(cell, "finished")
    assert TrainCell(tmp_path / "read")(cell) == CellOutcome(cell, "finished")
    assert weights(tmp_path / "given", cell) == weights(tmp_path / "read", cell)
    assert all((arrays[name] == before[name]).all() for name in ARRAYS)


def test_threads_and_the_compile_cache(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fit(*_: Any, **__: Any) -> None:
        seen.update(threads=torch.get_num_threads(), cache=os.environ["TORCHINDUCTOR_CACHE_DIR"])

    monkeypatch.setattr("noisysam.training.fit.fit", fit)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    TrainCell(tmp_path, threads=1)(cells[0])
    assert seen == {"threads": 1, "cache": str(tmp_path / "noisysam" / "inductor")}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    TrainCell(tmp_path)(cells[0])
    assert seen["cache"] == "/elsewhere"


# Ray


def test_cores_are_never_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_engine, "cores", lambda: 4)
    with pytest.raises(UserError, match=r"--jobs 3 with --cpus-per-run 2 asks for 6 cores, this machine has 4"):
        Ray(3, 2).start()
    with pytest.raises(UserError, match=r"lower one of them \(--cpus-per-run 0.5 shares them\)"):
        Ray(8).start()


KILLED = """
import sys
from pathlib import Path
from noisysam.studies.engines.ray import Ray
from noisysam.studies.plan import plan
from noisysam.studies.sweep import Sweep, TrainCell

path, store = Path(sys.argv[1]), Path(sys.argv[2])
made = Sweep(plan(path), store, TrainCell(store, threads=1), Ray(1))
outcomes = list(made.run())
made.engine.close()
for outcome in outcomes:
    print(outcome.state, outcome.error)
"""


@pytest.mark.services
def test_a_killed_worker_under_ray(cells: list[Cell], tmp_path: Path) -> None:
    """The run goes on in another process from its last whole epoch, to the same bits; nothing is told of it."""
    pytest.importorskip("ray")
    path, store = tmp_path / "one.yaml", tmp_path / "ray"
    path.write_text(STUDY.replace("epochs: 2", "epochs: 30").replace("  SGD: {opt: sgd}\n", ""))
    (cell,) = plans.plan(path)
    assert TrainCell(tmp_path / "whole", threads=1)(cell) == CellOutcome(cell, "finished")
    code = [sys.executable, "-c", KILLED, str(path), str(store)]
    process = subprocess.Popen(code, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    try:
        record, killed = store / cell.key / "epochs.csv", 0
        for lines in (3, 12):
            while process.poll() is None and (not record.exists() or len(record.read_text().splitlines()) < lines):
                time.sleep(0.01)
            for pid in holders(store / cell.key / "lock"):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert killed == 2
    assert out.splitlines() == ["finished None"]
    assert weights(store, cell) == weights(tmp_path / "whole", cell)
    assert len(RunFolder(store, cell.key).epochs) == 30


def holders(lock: Path) -> list[int]:
    """Processes that have a file open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(fd.resolve() == lock.resolve() for fd in (folder / "fd").iterdir()):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


# SLURM, on submitit's own executors


def test_no_slurm_here(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        list(Slurm(tmp_path).map(TrainCell(tmp_path), cells))
    with pytest.raises(UserError, match=r"--gpus-per-run 0.5: SLURM hands out whole ones"):
        list(Slurm(tmp_path, gpus=0.5).map(TrainCell(tmp_path), cells))


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps what it is given and refuses; the other commands are only there."""
    folder, kept = tmp_path / "bin", tmp_path / "script"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        (folder / name).write_text(f'#!/bin/sh\ncp "$1" {kept}\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return kept


def test_what_sbatch_is_told(cells: list[Cell], tmp_path: Path, fake_slurm: Path) -> None:
    pytest.importorskip("submitit")
    options = {"partition": "gpu", "time": "2:00:00", "nice": "10", "mem-per-cpu": "4G"}
    engine = Slurm(tmp_path / "logs", 1, 3, 2, options)
    with pytest.raises(UserError, match=r"sbatch refused .*invalid partition"):
        list(engine.map(TrainCell(tmp_path), cells))
    script = fake_slurm.read_text()
    told = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines() if line.startswith("#SBATCH --")
    )  # fmt: skip
    assert told["array"] == "0-1%1"
    assert (told["partition"], told["time"], told["nice"], told["mem-per-cpu"]) == ("gpu", "120", "10", "4G")
    assert (told["cpus-per-task"], told["gpus-per-node"], told["job-name"]) == ("3", "2", "noisysam")
    assert told["signal"].startswith("USR2@")
    assert "export OMP_NUM_THREADS=3" in script


@pytest.mark.slow
def test_jobs_of_submitit(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit's local executor: processes of their own, one of them preempted on its way, which is requeued and
    resumes; the scripts and logs of what is finished are gone."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path, store = tmp_path / "one.yaml", tmp_path / "runs"
    path.write_text(STUDY.replace("epochs: 2", "epochs: 30").replace("  SGD: {opt: sgd}\n", ""))
    (cell,) = plans.plan(path)
    bad = Cell("bad", cell.config.model_copy(update={"opt": "nonsense"}), "0" * 16)
    job = TrainCell(store, threads=1)
    preempted: list[int] = []

    def preempt() -> None:
        record = store / cell.key / "epochs.csv"
        while not record.exists() or len(record.read_text().splitlines()) < 4:
            time.sleep(0.01)
        for pid in holders(store / cell.key / "lock"):
            os.kill(pid, signal.SIGUSR2)  # what SLURM sends before it takes a node away
            preempted.append(pid)

    watcher = threading.Thread(target=preempt, daemon=True)
    watcher.start()
    engine = Slurm(store / "slurm", cluster="local")
    outcomes = {o.cell.row: o for o in engine.map(job, [bad, cell])}
    assert outcomes["SAM"] == CellOutcome(cell, "finished")
    assert outcomes["bad"].state == "failed"
    assert "nonsense" in str(outcomes["bad"].error)
    assert len(preempted) == 1
    assert TrainCell(tmp_path / "whole", threads=1)(cell) == CellOutcome(cell, "finished")
    assert weights(store, cell) == weights(tmp_path / "whole", cell)
    left = [file.name for file in (store / "slurm").iterdir()]
    assert left
    assert len({name.partition("_")[0] for name in left}) == 1, "those of the failed one stay"
    assert states.state(cell, store) == "finished"


def test_results_of_slurm_are_not_unpickled(cells: list[Cell], tmp_path: Path) -> None:
    """A job's outcome is JSON, and what is wrong with it is the cell's failure."""
    cell = cells[0]

    def job(cell: Cell, dataset: object = None) -> CellOutcome:
        return CellOutcome(cell, "failed", "diverged")

    recorded = Recorded(job, tmp_path)  # type: ignore[arg-type]
    log = tmp_path / "1_0.out"
    assert recorded.outcome(cell, log) == CellOutcome(cell, "failed", f"its job ended without a result: see {log}")
    recorded(cell)
    assert recorded.outcome(cell, log) == CellOutcome(cell, "failed", "diverged")
    for content in ("{", "[]", "{}", '{"state": "done"}', '{"state": ["finished"]}', '{"state": "failed", "error": 3}'):
        recorded.path(cell).write_text(content)
        assert recorded.outcome(cell, log).state == "failed"
