"""A real SLURM: a cluster of one node in a temporary folder, which the engine trains a study on."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.studies import state as states
from noisysam.studies.engines import slurm as slurm_engine
from noisysam.studies.engines.base import CellOutcome
from noisysam.studies.engines.slurm import Slurm
from noisysam.studies.plan import Cell
from noisysam.studies.sweep import TrainCell

pytestmark = pytest.mark.services

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATIENCE = 600.0  # seconds for what takes a few on a machine that does nothing else

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=2
ReturnToService=2
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

STUDY = """\
base: {{dataset: digits, model: resnet8, width: 0.25, epochs: {epochs}, train_subset: 200, noise: 0.4, precision: fp32,
       compile: "off"}}
rows:
{rows}
"""
EPOCHS = 400  # many more than a requeued job trains before KillWait ends it
SGD, SAM, BAD = "  SGD: {opt: sgd}", "  SAM: {opt: sam}", "  Bad: {opt: sgd, lr: 1.0e+30}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """munge, a controller and a node, all of them for this file alone; SLURM_CONF leads to them."""
    pytest.importorskip("submitit")
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no SLURM that could be started here: {', '.join(missing) or 'not root'}")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(2)))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in munge.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(plans.__file__).parents[2]))
        daemons = []
        try:
            for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
                with (folder / f"{command[0]}.out").open("wb") as out:
                    daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
                until(lambda: (folder / "munge.socket").exists())
            until(lambda: "idle" in told("sinfo", "--noheader", "--format=%T"))
            yield
            subprocess.run(["scancel", "--user=root"], check=False)
            until(lambda: not told("squeue", "--noheader"))
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)


def plan(folder: Path, epochs: int, *rows: str) -> list[Cell]:
    (folder / "one.yaml").write_text(STUDY.format(epochs=epochs, rows="\n".join(rows)))
    return plans.plan(folder / "one.yaml")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts ``noisysam sweep``; ends with the test."""
    started = []
    command = [sys.executable, "-m", "noisysam", "sweep", "one.yaml", "--store", "runs", "--no-track"]
    options = ["--engine", "slurm", "--jobs", "2", "--slurm", "time=10"]

    def start() -> subprocess.Popen[str]:
        heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background processes ignore it, and their own
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *options], cwd=tmp_path, **pipes))
        signal.signal(signal.SIGINT, heard)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def epochs(folder: Path, cell: Cell) -> int:
    return len(RunFolder(folder / "runs", cell.key).epochs)


def job_of(folder: Path, cell: Cell) -> str:
    """The SLURM job that trains a cell, from the environment of the process that holds its lock."""
    lock = folder / "runs" / cell.key / "lock"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(fd.resolve() == lock for fd in (process / "fd").iterdir()):
                found = dict(re.findall(rb"\0SLURM_([A-Z_]+)=(\d+)", (process / "environ").read_bytes()))
                if b"ARRAY_JOB_ID" in found:
                    return f"{int(found[b'ARRAY_JOB_ID'])}_{int(found[b'ARRAY_TASK_ID'])}"
                return str(int(found[b"JOB_ID"]))
        except OSError:
            continue
    raise AssertionError(f"nothing trains {cell.label}")


def is_whole(folder: Path, cell: Cell) -> bool:
    """Whether a cell ended with the bits of a run that nothing disturbed."""
    weights = [folder / store / cell.key / "weights.safetensors" for store in ("runs", "plain")]
    assert TrainCell(folder / "plain", threads=1)(cell) == CellOutcome(cell, "finished")
    return weights[0].read_bytes() == weights[1].read_bytes()


def test_a_study_with_a_failure_and_a_requeue(
    cluster: None, tmp_path: Path, driver: Callable[[], subprocess.Popen[str]]
) -> None:
    """An array; one cell diverges, one is requeued on its way and resumes to the same bits. Scripts and logs stay only
    for what failed."""
    bad, sam = plan(tmp_path, EPOCHS, BAD, SAM)
    process = driver()
    until(lambda: epochs(tmp_path, sam) >= 4)
    job = job_of(tmp_path, sam)
    subprocess.run(["scontrol", "requeue", job], check=True)
    until(lambda: "PENDING" in told("squeue", "--noheader", "--format=%T", f"--jobs={job}"))
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # SLURM waits two minutes
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert "1 of 2 cells failed" in err
    assert "diverged in epoch 1" in err
    assert (states.state(bad, tmp_path / "runs"), states.state(sam, tmp_path / "runs")) == ("failed", "finished")
    assert "Restarts=1" in told("scontrol", "show", "job", job)
    assert is_whole(tmp_path, sam)
    assert epochs(tmp_path, sam) == EPOCHS
    left = {path.name.partition("_")[2][:2] for path in (tmp_path / "runs" / "slurm").iterdir()}
    assert left == {"1_", "su"}, "the failed job's, which was the shorter and so the second, and the array's script"


def test_the_driver_is_stopped(cluster: None, tmp_path: Path, driver: Callable[[], subprocess.Popen[str]]) -> None:
    """Ctrl-C leaves the array at work and says how it is stopped; the same command waits for it."""
    (sgd,) = plan(tmp_path, 100, SGD)
    first = driver()
    until(lambda: epochs(tmp_path, sgd) >= 2)
    job = job_of(tmp_path, sgd)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, err
    assert f"SLURM goes on: scancel {job} stops it" in err.splitlines()[-1]
    assert job in told("squeue", "--noheader", "--format=%i").split()
    second = driver()
    out, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, err
    assert "noisysam report one" in out
    assert is_whole(tmp_path, sgd)
    assert epochs(tmp_path, sgd) == 100


def test_a_job_that_is_lost(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled from outside: told as failed, though no sacct can say so; the other cell is not concerned."""
    monkeypatch.setattr(slurm_engine, "QUEUE", 0.5)
    sgd, sam = plan(tmp_path, 2, SGD.replace("}", ", epochs: 5000}"), SAM)
    outcomes: list[CellOutcome] = []
    for outcome in Slurm(tmp_path / "runs" / "slurm").map(TrainCell(tmp_path / "runs", threads=1), [sgd, sam]):
        outcomes.append(outcome)
        if len(outcomes) == 1:
            until(lambda: epochs(tmp_path, sgd) >= 1)
            subprocess.run(["scancel", job_of(tmp_path, sgd)], check=True)
    assert outcomes[0] == CellOutcome(sam, "finished")
    assert (outcomes[1].cell, outcomes[1].state) == (sgd, "failed")
    assert "its job was lost" in str(outcomes[1].error)


def test_more_cells_than_an_array_holds(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_engine, "ARRAY", 2)
    cells = plan(tmp_path, 1, SGD, SAM, "  ASAM: {opt: asam}")
    outcomes = list(Slurm(tmp_path / "slurm").map(TrainCell(tmp_path / "runs", threads=1), cells))
    assert {outcome.cell.row for outcome in outcomes if outcome.state == "finished"} == {"SGD", "SAM", "ASAM"}
    assert not list((tmp_path / "slurm").iterdir())
