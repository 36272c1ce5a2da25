"""Chaos: a study that is swept under Ray, while at random times workers and the driver are killed, the tracking server
stops, and the disk fills. At the end every cell must be there once, equal bit for bit to an undisturbed study, in the
store and in MLflow, and nothing else.

    python tests/chaos.py --work /tmp/chaos                                                # 200 runs, half an hour
    python tests/chaos.py --work /tmp/chaos --runs 8 --kills 3 --drivers 1 --outage 6      # a minute

The store lies on a small tmpfs of its own, which only root can mount: without, the disk is not filled.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.studies import state as states
from noisysam.studies.plan import Cell
from noisysam.tracking import tracker

STUDY = """\
base: {{dataset: digits, model: resnet8, width: 0.25, epochs: 4, train_subset: 300, val_fraction: 0.2, precision: fp32,
       device: cpu}}
grid:
  noise: [0.2, 0.6]
rows:
  SGD: {{opt: sgd}}
  SAM: {{opt: sam, sam_m: 32}}
  Bootstrap: {{method: bootstrap, opt: sgd}}
  ELR: {{method: elr, opt: sam}}
seeds: {seeds}
"""
OF_A_SEED = 8
MARK = "NOISYSAM_CHAOS"  # in the environment of every process that comes of this script
KEPT = {
    "record.json", "status.json", "epochs.csv", "confusion.csv", "weights.safetensors", "predictions.npz",
    "tracking.json", "lock",
}  # fmt: skip
# what differs between two runs of one configuration, with what is measured in seconds; whether a stage was taken from
# another run depends on which of them ended first
TIMED = {"started", "ended", "reused"}
LOOK = 0.1  # seconds between two looks
STUCK = 1800.0  # seconds without anything to wait for


class Fault(Exception):
    """What should not have happened, before the checks at the end."""


# what is disturbed


@dataclass
class Server:
    """An MLflow server on an SQLite file, with its children."""

    work: Path
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.database = self.work / "mlflow.db"

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.database}"]
        where += ["--artifacts-destination", (self.work / "artifacts").as_uri(), "--workers", "1"]
        with (self.work / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *where],
                stdout=log, stderr=log, start_new_session=True, cwd=self.work,
                env=environment(self.work) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # starts faster
            )  # fmt: skip

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(LOOK)
        raise Fault(f"the tracking server does not start: {self.work / 'server.log'}")

    def signal(self, number: int) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class Disk:
    """A tmpfs of ``megabytes``; an ordinary folder where it cannot be mounted."""

    path: Path
    megabytes: int
    small: bool = False

    def mount(self) -> None:
        self.path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={self.megabytes}m", "tmpfs", str(self.path)]
        self.small = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)

    def unmount(self) -> None:
        if self.small:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


@dataclass
class Driver:
    """The sweep's own process, which is started again when it has ended before its work was done."""

    work: Path
    file: Path
    store: Path
    uri: str
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [*noisysam("sweep", str(self.file)), "--engine", "ray", "--jobs", "2", "--store", str(self.store)]
        with (self.work / "driver.log").open("ab") as log:
            log.write(f"-- start {self.starts}\n".encode())
            self.process = subprocess.Popen(
                [*command, "--tracking-uri", self.uri],
                stdout=log, stderr=log, start_new_session=True, env=environment(self.work), cwd=self.work,
            )  # fmt: skip
        self.starts += 1

    @property
    def ended(self) -> int | None:
        """Its exit status; None while it works."""
        assert self.process is not None
        return self.process.poll()

    @property
    def last_words(self) -> str:
        return (self.work / "driver.log").read_text().rstrip().rpartition("\n")[2]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def noisysam(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "noisysam", *arguments]


def environment(work: Path) -> dict[str, str]:
    paths = [str(Path(plans.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, MARK: str(work), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def ours(work: Path) -> Iterator[int]:
    """The processes that came of this script, however deep, but for the dead."""
    mark = f"{MARK}={work}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            alive = "State:\tZ" not in (folder / "status").read_text()
            if alive and mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def workers(work: Path, names: set[str]) -> list[int]:
    """Processes of Ray that have a cell of the study as their task."""
    return [pid for pid in ours(work) if title(pid).removeprefix("ray::") in names]


# disturbing


@dataclass
class Chaos:
    """One study on its way, and what befalls it: ``done`` counts by kind."""

    asked: argparse.Namespace
    work: Path
    cells: list[Cell]
    driver: Driver
    server: Server
    disk: Disk
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)

    def plan(self) -> list[tuple[float, Callable[[], None]]]:
        """What happens, and how much of the study is finished when it does."""
        events = [self.worker] * self.asked.kills + [self.kill_driver] * self.asked.drivers
        events += [self.stop_server, self.kill_server] + ([self.fill_disk] if self.disk.small else [])
        self.random.shuffle(events)
        step = 0.9 / len(events)
        return [((k + self.random.random()) * step, event) for k, event in enumerate(events)]

    def run(self) -> None:
        """All of it; then the last start, of a study that is whole."""
        self.driver.start()
        for share, event in self.plan():
            self.until(lambda share=share: self.finished() >= share * len(self.cells))
            event()
        self.until(lambda: self.driver.ended == 0)
        self.driver.start()
        self.until(lambda: self.driver.ended is not None)
        if self.driver.ended != 0:
            raise Fault(f"the last start ended with {self.driver.ended}: {self.work / 'driver.log'}")

    def finished(self) -> int:
        return sum(states.finished(cell, self.driver.store) for cell in self.cells)

    def until(self, reached: Callable[[], bool], patience: float | None = None) -> bool:
        """Wait, ``patience`` seconds at most; start the driver again where it was killed. Whether it was reached."""
        deadline = time.monotonic() + (patience or STUCK)
        while time.monotonic() < deadline:
            if reached():
                return True
            if self.driver.ended not in (None, 0):
                if "Ray did not start" in self.driver.last_words:
                    self.done["failed starts of Ray"] += 1  # within half a minute, on a machine that does much else
                elif self.driver.ended > 0:
                    raise Fault(f"the driver ended with {self.driver.ended}: {self.work / 'driver.log'}")
                self.driver.start()
            if self.driver.ended == 0 and self.finished() == len(self.cells):
                return reached()
            time.sleep(LOOK)
        if patience is None:
            raise Fault("nothing goes on")
        return False

    def worker(self) -> None:
        """kill -9 for a process that trains: at any time of its life, mostly within its epochs."""
        names, store = {cell.label for cell in self.cells}, self.driver.store
        if self.random.random() < 0.3:
            found = lambda: workers(self.work, names)  # noqa: E731
        else:
            found = lambda: [pid for pid in workers(self.work, names) if holds_a_lock(pid, store)]  # noqa: E731
        while self.finished() < len(self.cells):  # it may have ended by itself
            self.until(lambda: bool(found()), 60)
            time.sleep(self.random.uniform(0, 0.6))
            for pid in self.random.sample(there := found(), min(1, len(there))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.done["workers killed"] += 1
                    return

    def kill_driver(self) -> None:
        """kill -9 for the driver, a little later; it is then started again."""
        names = {cell.label for cell in self.cells}
        self.until(lambda: bool(workers(self.work, names)), 60)
        time.sleep(self.random.uniform(0, 3))
        if self.driver.ended is None:
            self.driver.kill()
            self.done["drivers killed"] += 1
        self.driver.start()

    def stop_server(self) -> None:
        """The server answers nothing for a while."""
        self.server.signal(signal.SIGSTOP)
        end = time.monotonic() + self.asked.outage
        self.until(lambda: time.monotonic() > end)
        self.server.signal(signal.SIGCONT)
        self.done["server stopped"] += 1

    def kill_server(self) -> None:
        """The server is gone for a while."""
        self.server.stop()
        end = time.monotonic() + self.asked.outage / 2
        self.until(lambda: time.monotonic() > end)
        self.server.start()
        self.server.wait()
        self.done["server killed"] += 1

    def fill_disk(self) -> None:
        """No room for anything until the driver has given up."""
        self.disk.fill()
        deadline = time.monotonic() + 300
        while self.driver.ended is None and time.monotonic() < deadline:
            self.disk.fill()  # what was freed since
            time.sleep(LOOK)
        if self.driver.ended != 1:
            raise Fault(f"a full disk ended the driver with {self.driver.ended}, not 1")
        self.disk.free()
        self.driver.start()
        self.done["disk filled"] += 1


def holds_a_lock(pid: int, store: Path) -> bool:
    """Whether a process has the lock of one of the store's runs open."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if (at := link.readlink()).name == "lock" and at.is_relative_to(store):
                    return True
    return False


# checking


def check(chaos: Chaos, plain: Path) -> list[str]:
    """What is wrong with the study now that it should be whole."""
    store, cells = chaos.driver.store, chaos.cells
    return [
        *(f"{cell.label}: {states.state(cell, store)}" for cell in cells if not states.finished(cell, store)),
        *(f"{cell.label}: {what}" for cell in cells for what in unequal(store / cell.key, plain / cell.key)),
        *left_behind(store, cells, chaos.driver.file.stem),
        *(f"process {pid} is left: {title(pid)[:80]}" for pid in still(chaos.work, chaos.server)),
        *wrong_in_mlflow(chaos.server.database, store, cells),
    ]


def unequal(one: Path, other: Path) -> Iterator[str]:
    """In what two folders of one run differ, but for times."""
    got, wanted = [timeless(folder) if (folder / "record.json").exists() else {} for folder in (one, other)]
    if fields := [name for name in wanted | got if got.get(name) != wanted.get(name)]:
        yield f"its record differs in {', '.join(fields)}"
    for name in ("weights.safetensors", "confusion.csv"):
        if not (one / name).exists() or (one / name).read_bytes() != (other / name).read_bytes():
            yield f"its {name} differs"
    lines, expected = [
        [{k: v for k, v in line.items() if not is_time(k)} for line in RunFolder(path.parent, path.name).epochs]
        for path in (one, other)
    ]
    if lines != expected:
        yield f"its epochs.csv differs ({len(lines)} lines, {len(expected)} undisturbed)"


def is_time(name: str) -> bool:
    return name in ("time", "images_per_second") or name.endswith("_seconds")


def timeless(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "record.json").read_text())
    cost = {name: value for name, value in record["cost"].items() if not is_time(name)}
    return {name: value for name, value in record.items() if name not in TIMED} | {"cost": cost}


def left_behind(store: Path, cells: list[Cell], name: str) -> Iterator[str]:
    """Files that do not belong to a whole study, and locks that are held."""
    keys = {cell.key for cell in cells}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        folder, *rest = path.relative_to(store).parts
        fine = {
            "labels": path.suffix in (".npz", ".csv") and not path.name.startswith("."),
            "studies": path.name == f"{name}.json",
        }
        if not fine.get(folder, folder in keys and len(rest) == 1 and path.name in KEPT):
            yield f"{path.relative_to(store)} is left"
        if path.name == "lock":
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    yield f"{path.relative_to(store)} is held"
    for path in (store / "labels").glob("*"):
        if {path.with_suffix(s) for s in (".npz", ".csv")} - set(path.parent.iterdir()):
            yield f"{path.relative_to(store)} is half of two files"


def still(work: Path, server: Server) -> list[int]:
    """Processes that are left a while after the driver's end."""
    for _ in range(100):
        found = [pid for pid in ours(work) if server.process is None or os.getsid(pid) != server.process.pid]
        if not found:
            break
        time.sleep(LOOK)
    return found


def scale(column: str) -> float:
    """100 for a column of shares, which MLflow has in percent."""
    return tracker.MEASURED[column].scale if column in tracker.MEASURED else 1.0


def wrong_in_mlflow(database: Path, store: Path, cells: list[Cell]) -> Iterator[str]:
    """Cells without exactly one finished run in MLflow's own tables, and epochs that are not there exactly once."""
    with contextlib.closing(sqlite3.connect(database)) as base:
        tags = base.execute(
            "select t.value, r.run_uuid, r.status from tags t join runs r using (run_uuid)"
            " where t.key = 'noisysam.key' and r.lifecycle_stage = 'active'"
        ).fetchall()
        parents = base.execute("select count(*) from tags where key = 'noisysam.kind' and value = 'study'").fetchone()[
            0
        ]
        if parents != 1:
            yield f"MLflow has {parents} runs of the study"
        for cell in cells:
            found = [(run, status) for key, run, status in tags if key == cell.key]
            if [status for _, status in found] != ["FINISHED"]:
                yield f"{cell.label}: MLflow has {len(found)} runs of it ({', '.join(s for _, s in found)})"
                continue
            rows = base.execute("select key, step, value, is_nan from metrics where run_uuid = ?", found[0][:1])
            there = Counter(
                (n, s, None if nan else float(f"{v:.9g}")) for n, s, v, nan in rows if not n.startswith("final/")
            )
            lines = RunFolder(store, cell.key).epochs
            sent = Counter(
                (tracker.curve(name), step, float(f"{scale(name) * value:.9g}") if math.isfinite(value) else None)
                for step, line in enumerate(lines) for name, value in line.items()
                if value is not None and name not in ("time", "log_seconds")
            )  # fmt: skip
            if there != sent:
                doubled, lost = sum((there - sent).values()), sum((sent - there).values())
                yield f"{cell.label}: {doubled} metrics too many in MLflow, {lost} missing"


# all of it


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a study under kill -9, and what is left of it")
    parser.add_argument("--runs", type=int, default=200, help=f"rounded up to a multiple of {OF_A_SEED}")
    parser.add_argument("--kills", type=int, default=30, help="workers that are killed")
    parser.add_argument("--drivers", type=int, default=2, help="times that the driver is killed")
    parser.add_argument("--outage", type=float, default=60, help="seconds for which the tracking server stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; must not exist")
    asked = parser.parse_args(arguments)
    if shutil.which("mount") is None or os.geteuid() != 0:
        print("not root: the disk is not filled")
    try:
        import ray  # noqa: F401
    except ImportError:
        print("Ray is missing: pip install 'noisysam[ray]'")
        return 2
    work = asked.work.absolute()
    work.mkdir(parents=True)
    file, plain = work / "chaos.yaml", work / "undisturbed"
    file.write_text(STUDY.format(seeds=list(range(-(-asked.runs // OF_A_SEED)))))
    cells = plans.plan(file)
    disk, server = Disk(work / "store", 32 + len(cells) // 2), Server(work)
    driver = Driver(work, file, disk.path, server.uri)
    chaos = Chaos(asked, work, cells, driver, server, disk, random.Random(asked.seed))
    disk.mount()
    begun, faults = time.monotonic(), ["it was stopped"]
    try:
        server.start()
        undisturbed = [*noisysam("sweep", str(file)), "--engine", "inline", "--cpus-per-run", "1", "--no-track"]
        with (work / "undisturbed.log").open("wb") as log:
            subprocess.run(
                [*undisturbed, "--store", str(plain)], check=True, stdout=log, stderr=log, env=environment(work)
            )
        server.wait()
        before = time.monotonic()
        chaos.run()
        seconds = time.monotonic() - before
        faults = check(chaos, plain)
    except Fault as fault:
        faults, seconds = [str(fault)], time.monotonic() - begun
    finally:
        server.stop()
        for pid in list(ours(work)):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if faults:  # to be looked at
            shutil.copytree(disk.path, work / "faulty", ignore=shutil.ignore_patterns("filler"))
        disk.unmount()
    facts = {"runs": len(cells), **chaos.done, "starts of the driver": driver.starts, "seconds": round(seconds)}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    for line in itertools.islice(faults, 50):
        print(f"fault: {line}")
    print(f"{len(faults)} faults" if faults else "every cell once, equal to the undisturbed study, nothing left behind")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
