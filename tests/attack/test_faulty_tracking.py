"""A tracking store that misbehaves neither holds up training nor changes its results."""

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import WAYS, serving
from mlflow import MlflowClient

from noisysam.core.errors import RunFailed
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.tracking import Sender, sender
from noisysam.tracking.tracker import Tracker
from noisysam.training.fit import fit

MEASURED = {"time", "train_seconds", "eval_seconds", "log_seconds", "compile_seconds", "images_per_second"}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that has started, so that short runs meet the store; and a short wait at the end."""
    monkeypatch.setenv(sender.LIMIT, "2")
    monkeypatch.setattr(sender, "_silent", set())
    sender._ask("sync_store", Path("nowhere"), "sqlite:///nowhere.db", [], wait=None, warn=print)
    yield
    sender._stop()


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in folder.epochs]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory, digits: Callable[..., RunConfig]) -> RunFolder:
    config = digits(epochs=25)
    result = fit(config, store=tmp_path_factory.mktemp("untracked"))
    return RunFolder(result.folder.parent, result.key)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("way", WAYS)
def test_a_faulty_server_changes_nothing(
    way: str, tmp_path: Path, digits: Callable[..., RunConfig], untracked: RunFolder
) -> None:
    warned: list[str] = []
    with serving(way, tmp_path / "requests") as uri:
        result = fit(
            digits(epochs=25),
            store=tmp_path / "runs",
            tracker=lambda folder: Sender(folder, uri, "faulty", warn=warned.append),
        )
        ended = time.monotonic()
        assert (tmp_path / "requests").read_text().count("/api/"), "the store was asked while the run was trained"
    folder = RunFolder(tmp_path / "runs", result.key)
    assert result.record["status"] == "finished"
    assert lines(folder) == lines(untracked)
    assert (folder.path / "weights.safetensors").read_bytes() == (untracked.path / "weights.safetensors").read_bytes()
    waits = [line["log_seconds"] or 0.0 for line in folder.epochs]
    assert statistics.median(waits) < 0.2
    assert max(waits) < 2, "a request takes seconds, and no epoch waits for it"
    assert time.monotonic() - ended < 2
    if way != "slow":
        (line,) = warned
        assert "track --sync" in line
        assert "\n" not in line


class Alternately:
    """Lets two runs train an epoch each in turn, so that both meet the same load of the machine."""

    def __init__(self) -> None:
        self.turn, self.over, self.changed = 0, False, threading.Condition()
        self.seconds: tuple[list[float], list[float]] = ([], [])

    def of(self, number: int) -> "Turn":
        return Turn(self, number)


class Turn:
    """The progress callback of one of the two runs."""

    def __init__(self, both: Alternately, number: int) -> None:
        self.both, self.number = both, number

    def step(self, *_: object) -> None: ...

    def wait(self) -> None:
        with self.both.changed:
            self.both.changed.wait_for(lambda: self.both.over or self.both.turn == self.number)

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        spent = line["train_seconds"] + line["eval_seconds"] + line["log_seconds"]
        self.both.seconds[self.number].append(spent)
        with self.both.changed:
            self.both.turn = 1 - self.number
            self.both.over = self.both.over or number + 1 == of
            self.both.changed.notify_all()
        self.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("way", WAYS)
def test_epochs_a_minute(way: str, tmp_path: Path, digits: Callable[..., RunConfig]) -> None:
    """Within 5 % of an untracked run, over all epochs."""
    config = digits(epochs=EPOCHS, train_subset=900, batch=32)
    both = Alternately()

    def train(number: int, uri: str) -> None:
        tracker = (lambda folder: Sender(folder, uri, "x", warn=lambda _: None)) if number else None
        both.of(number).wait()
        fit(config, store=tmp_path / str(number), tracker=tracker, progress=both.of(number))

    with serving(way, tmp_path / "requests") as uri:
        pid = sender._workers[0].process.pid
        threads = [threading.Thread(target=train, args=(number, uri)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        until(lambda: both.over, 600)
        used = cpu_seconds(pid) if alive(pid) else 0.0
        for thread in threads:
            thread.join()
    untracked, tracked = (60 * len(s) / sum(s) for s in both.seconds)
    print(
        f"{way}: {untracked:.1f} epochs/min untracked, {tracked:.1f} tracked ({tracked / untracked - 1:+.1%});"
        f" the worker used {used:.1f} s of CPU in {sum(map(sum, both.seconds)):.0f} s"
    )
    assert tracked > 0.95 * untracked


EPOCHS = 40


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.usefixtures("worker")
def test_the_end_has_a_limit(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    told: list[str] = []
    with serving("drip", tmp_path / "requests") as uri:
        one = Sender(folder, uri, "drip", warn=told.append)
        began = time.monotonic()
        assert one.sync()
        assert time.monotonic() - began < 1
        assert not one.sync(final=True)
        assert 1 < time.monotonic() - began < 6
        assert "no answer from the MLflow store within 2 s" in told[0]
        assert sender._workers == [], "the process that waited is gone"
        began = time.monotonic()
        assert not Sender(folder, uri, "drip", warn=told.append).sync(final=True)
        assert time.monotonic() - began < 1, "the next run of a sweep does not wait for the same store again"
    assert len(told) == 1


@pytest.mark.usefixtures("worker")
def test_a_request_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker ends by itself; the run goes on, and its end asks a new one."""
    folder = finished(tmp_path, status="running")
    told: list[str] = []
    with serving("drip", tmp_path / "requests") as uri:
        one = Sender(folder, uri, "drip", warn=told.append)
        one.sync()
        sender._workers[0].process.send_signal(signal.SIGALRM)  # what its alarm does after REQUEST seconds
        sender._workers[0].process.wait(10)
        assert not one.sync()
        assert not one.sync()
    (line,) = told
    assert f"within {sender.REQUEST} s" in line


@pytest.mark.usefixtures("worker")
def test_an_endless_answer_is_cut(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    told: list[str] = []
    with serving("endless", tmp_path / "requests") as uri, pytest.MonkeyPatch.context() as patch:
        patch.setenv(sender.LIMIT, "60")
        assert not Sender(folder, uri, "endless", warn=told.append).sync(final=True)
        status = Path(f"/proc/{sender._workers[0].process.pid}/status")
        if status.exists():
            (peak,) = (int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            assert peak * 1024 < 1.5 * 2**30
    assert "longer than 64 MiB" in told[0]


@pytest.mark.usefixtures("worker")
def test_what_is_not_mlflow_ends_no_run(tmp_path: Path) -> None:
    """``{}`` is neither an experiment nor one that was deleted."""
    told: list[str] = []
    with serving("empty", tmp_path / "requests") as uri:
        assert not Sender(finished(tmp_path), uri, "x", warn=told.append).sync(final=True)
        with pytest.raises(RunFailed, match="does not answer as MLflow"):
            sender.open_study(uri, "x")
    assert "does not answer as MLflow" in told[0]
    assert "deleted" not in told[0]


@pytest.mark.usefixtures("worker")
def test_a_held_lock_is_named(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    told: list[str] = []
    with (tmp_path / "mlflow.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        assert not Sender(folder, f"sqlite:///{tmp_path}/mlflow.db", "x", warn=told.append).sync(final=True)
    assert time.monotonic() - began < 6
    (line,) = told
    assert "within 2 s" in line


def test_a_damaged_state_heals(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = finished(tmp_path)
    for number, content in enumerate(DAMAGED):
        (folder.path / "tracking.json").write_text(content)
        experiment = "x" if number else "first"
        assert Tracker(folder, uri, experiment).sync(final=True), content
        state = json.loads((folder.path / "tracking.json").read_text())
        assert state["done"] is True
        assert state["experiment"] == experiment
        assert "shared" not in state
    client = MlflowClient(tracking_uri=uri)
    for experiment in ("first", "x"):
        found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        assert len(found) == 1, "the run is found by its key, not sent twice"


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Even if it is killed in the middle of a request: another process may train the run next."""
    with serving("drip", tmp_path / "requests") as uri:
        code = (
            "import sys, time; from pathlib import Path; from noisysam.runs.record import RunFolder;"
            "from noisysam.tracking import Sender, sender;"
            "Sender(RunFolder(Path(sys.argv[1]), 'ab'), sys.argv[2], 'x').sync();"
            "print(sender._workers[0].process.pid, flush=True); time.sleep(600)"
        )
        finished(tmp_path)
        parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), uri], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: "/api/" in (tmp_path / "requests").read_text(), 60)
        parent.kill()
        parent.wait()
        until(lambda: not alive(pid), 5)


DAMAGED = (
    "", "{", "[]", "null", '{"shared": 3}', '{"experiment": 5, "run_id": []}', '{"shared": {"x": [1]}, "done": true}',
    '{"experiment": "x", "done": true, "run_id": null}', '{"experiment": "x", "done": true}', chr(0) * 100,
)  # fmt: skip


RUN = ["run", "--dataset", "digits", "--model", "resnet8", "--width", "0.25", "--train-subset", "60", "--batch", "16"]


def command(uri: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "noisysam", *RUN, "--tracking-uri", uri, *more]


def test_sigterm_ends_a_run_within_seconds(tmp_path: Path) -> None:
    with serving("drip", tmp_path / "requests") as uri:
        run = subprocess.Popen(
            command(uri, "--epochs", "100000", "--compile", "off"),
            cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        until(lambda: "/api/" in (tmp_path / "requests").read_text(), 120)
        began = time.monotonic()
        run.terminate()
        _, err = run.communicate(timeout=60)
    assert time.monotonic() - began < 25, "two seconds for the store, and the end of a process on a busy machine"
    assert run.returncode == 130
    assert err.splitlines()[-1] == "noisysam: stopped after the last complete epoch; the same command resumes"
    (record,) = tmp_path.glob("runs/*/record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"


def until(reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def finished(store: Path, status: str = "finished") -> RunFolder:
    folder = RunFolder(store, "ab")
    record = {"schema": 1, "key": "ab", "status": status, "name": "a run", "config": {"dataset": "digits", "seed": 0}}
    record |= {"resolved": {"device_name": "a CPU"}, "oracle": [], "environment": {"commit": "abc"}, "error": None}
    record |= {"noise": {"type": "symmetric", "rate": 0.2, "flip_rate": 0.2, "digest": "ab" * 32}}
    record |= {
        "started": "2026-11-22T18:00:00+00:00",
        "ended": "2026-11-22T18:05:00+00:00",
        "results": {"last": 0.5},
        "cost": {},
    }
    folder.write(record)
    folder.write_epochs([{"stage": 0, "epoch": 0, "time": 1763836000.0, "test_accuracy": 0.5}])
    return folder
