"""Two machines: a Ray head and a worker node that share a network and the study's store, and nothing else: each has its
own network, process, /tmp/ray and /dev/shm namespaces. One of them is lost on the way."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.studies import state as states
from noisysam.studies.engines.base import CellOutcome
from noisysam.studies.plan import Cell
from noisysam.studies.sweep import TrainCell

pytestmark = pytest.mark.services

PATIENCE = 1200.0  # seconds for what takes a few on a machine that does nothing else
HEAD, OTHER, PORT = "10.213.7.1", "10.213.7.2", 6379
STUDY = """\
base: {dataset: digits, model: resnet8, width: 0.25, epochs: 40, train_subset: 200, noise: 0.4, precision: fp32}
rows:
  SGD: {opt: sgd}
  SAM: {opt: sam}
  ASAM: {opt: asam}
"""
OWN = "mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && exec tail -f /dev/null"


@dataclass
class Machine:
    """A namespace of each kind, held by a process; with that process everything in it ends."""

    holder: subprocess.Popen[bytes]
    pid: int  # of the first process inside, as seen from here
    network: IO[bytes]  # kept, as the cable of a lost machine stays where it is

    @staticmethod
    def boot() -> "Machine":
        namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen(["unshare", *namespaces, "sh", "-c", OWN], stderr=subprocess.PIPE)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        deadline = time.monotonic() + 10
        while True:
            inside = children.read_text().split() if children.exists() else []
            if inside and Path(f"/proc/{inside[0]}/cmdline").read_bytes().startswith(b"tail"):
                return Machine(holder, int(inside[0]), Path(f"/proc/{inside[0]}/ns/net").open("rb"))
            if holder.poll() is not None or time.monotonic() > deadline:
                holder.kill()
                pytest.skip(f"no namespaces here: {holder.communicate()[1].decode().strip()}")
            time.sleep(0.02)

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Run a command inside."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *command]
        with log.open("wb") as out:
            return subprocess.Popen(enter, stdout=out, stderr=out, env=environment(log.parent), cwd=log.parent)

    def has(self, pid: int) -> bool:
        """Whether a process runs inside."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/ns/net").readlink() == Path(f"/proc/{self.pid}/ns/net").readlink()
        return False

    def lose(self) -> None:
        """As when the power goes."""
        self.holder.kill()
        self.holder.wait()


def environment(home: Path) -> dict[str, str]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-and-of-nothing-else"}
    paths = {"HOME": str(home), "PYTHONPATH": str(Path(plans.__file__).parents[2])}
    return {**os.environ, **token, **paths, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a cable between them."""
    pytest.importorskip("ray")
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"no network of its own can be made here: {', '.join(missing) or 'not root'}")
    Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray keeps its sockets; each machine lays its own over it
    with contextlib.ExitStack() as booted:
        pair = []
        for _ in range(2):
            pair.append(Machine.boot())
            booted.enter_context(pair[-1].network)
            booted.callback(pair[-1].lose)
        first, second = pair
        name = f"nsam{first.pid}"
        cable = ["ip", "link", "add", name, "netns", str(first.pid), "type", "veth"]
        subprocess.run([*cable, "peer", "name", name, "netns", str(second.pid)], check=True)
        for machine, address in ((first, HEAD), (second, OTHER)):
            inside = ["nsenter", f"--target={machine.pid}", "--net", "ip"]
            subprocess.run([*inside, "address", "add", f"{address}/24", "dev", name], check=True)
            subprocess.run([*inside, "link", "set", name, "up"], check=True)
        yield first, second


def until(reached: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def trained_in(machine: Machine, store: Path, cells: list[Cell]) -> list[Cell]:
    """The cells whose lock a process of the machine holds."""
    locks = {store / cell.key / "lock": cell for cell in cells}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if machine.has(int(process.name)):
            with contextlib.suppress(OSError):
                found += [locks[at] for fd in (process / "fd").iterdir() if (at := fd.readlink()) in locks]
    return found


def test_a_study_across_two_machines_one_of_which_is_lost(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    """Both train; what the lost one trained goes on in the other, from its last whole epoch, to the same bits."""
    first, second = machines
    file, store = tmp_path / "one.yaml", tmp_path / "runs"
    file.write_text(STUDY)
    cells = plans.plan(file)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    head = [*ray, "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false"]
    first.start(*head, log=tmp_path / "head.log")
    until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), tmp_path / "head.log")
    node = [*ray, f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}"]
    second.start(*node, log=tmp_path / "node.log")
    until(lambda: "Ray runtime started" in (tmp_path / "node.log").read_text(), tmp_path / "node.log")
    log = tmp_path / "sweep.log"
    command = [sys.executable, "-m", "noisysam", "sweep", str(file), "--store", str(store), "--no-track"]
    driver = first.start(*command, "--engine", "ray", "--address", f"{HEAD}:{PORT}", log=log)
    lost: list[Cell] = []

    def both_train() -> bool:
        assert driver.poll() is None, log.read_text()
        lost[:] = [c for c in trained_in(second, store, cells) if len(RunFolder(store, c.key).epochs) >= 3]
        return bool(lost) and bool(trained_in(first, store, cells))

    until(both_train, log)
    second.lose()
    assert [states.state(cell, store) for cell in lost] == ["running"]
    assert driver.wait(PATIENCE) == 0, log.read_text()
    told = [line for line in log.read_text().splitlines() if line.startswith("[")]
    assert len(told) == len(cells), "every cell ended once"
    for cell in cells:
        assert states.state(cell, store) == "finished"
        assert len(RunFolder(store, cell.key).epochs) == 40
    for cell in lost:
        assert TrainCell(tmp_path / "plain", threads=1)(cell) == CellOutcome(cell, "finished")
        weights = [folder / cell.key / "weights.safetensors" for folder in (store, tmp_path / "plain")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
