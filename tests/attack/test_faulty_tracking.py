"""A tracking store that misbehaves neither holds up training nor changes its results."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import WAYS, serving
from mlflow import MlflowClient
from test_tracking import make_record

from noisysam.core.errors import RunFailed
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.tracking import Sender, sender
from noisysam.tracking.tracker import Tracker
from noisysam.training.fit import fit

pytestmark = pytest.mark.slow

MEASURED = {"time", "train_seconds", "eval_seconds", "log_seconds", "compile_seconds", "images_per_second"}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that has started, so that short runs meet the store; and a short wait at the end."""
    monkeypatch.setenv(sender.LIMIT, "2")
    monkeypatch.setattr(sender, "_silent", sender.Silent())
    start_worker()
    yield
    sender._stop()


def start_worker() -> None:
    sender._ask("sync_store", Path("nowhere"), "sqlite:///nowhere.db", None, [], wait=None, warn=print)


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
    waits: list[float] = []  # seconds for which training waited, epoch by epoch
    ends: list[float] = []

    class Timed(Sender):
        def sync(self, final: bool = False) -> bool:
            began = time.perf_counter()
            try:
                return super().sync(final)
            finally:
                (ends if final else waits).append(time.perf_counter() - began)

    with serving(way, tmp_path / "requests") as uri:
        result = fit(
            digits(epochs=25),
            store=tmp_path / "runs",
            tracker=lambda folder: Timed(folder, uri, "faulty", warn=warned.append),
        )
        assert (tmp_path / "requests").read_text().count("/api/"), "the store was asked while the run was trained"
    folder = RunFolder(tmp_path / "runs", result.key)
    assert result.record["status"] == "finished"
    assert lines(folder) == lines(untracked)
    assert (folder.path / "weights.safetensors").read_bytes() == (untracked.path / "weights.safetensors").read_bytes()
    whole = sum(sum(line[n] or 0.0 for n in ("train_seconds", "eval_seconds", "log_seconds")) for line in folder.epochs)
    share = sum(waits) / whole
    print(
        f"{way}: {60 * 25 / whole:.0f} epochs/min, {60 * 25 / (whole - sum(waits)):.0f} without tracking ({share:.2%})"
    )
    assert len(waits) == 25
    assert share < 0.05
    assert sum(ends) < 2 + 3, "the limit, and the end of a process on a busy machine"
    if way != "slow":
        (line,) = warned
        assert "noisysam sync" in line
        assert "\n" not in line


PAIRS = 3
LONGEST = 0.01  # processor seconds that tracking may take of an epoch: 5 % of one of 0.2 s; those here take 0.04 s


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("way", [*WAYS, "sound"])
def test_tracking_takes_no_time_from_training(
    way: str, tmp_path: Path, digits: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor seconds of the training process, of tracked and untracked runs in turn; other load on the machine moves
    the clock on the wall, which is only printed. The least of each kind is that with the least disturbance."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    wall: dict[bool, list[float]] = {False: [], True: []}
    with contextlib.ExitStack() as held:
        sound = f"sqlite:///{tmp_path}/mlflow.db"
        uri = sound if way == "sound" else held.enter_context(serving(way, tmp_path / "requests"))
        for number in range(2 * PAIRS + 1):
            tracked = number % 2 == 1
            store = tmp_path / f"runs-{number}"
            if tracked:  # as if it were the first one that meets the store
                monkeypatch.setattr(sender, "_silent", sender.Silent())
                start_worker()
            began = time.process_time()
            result = fit(
                digits(epochs=25),
                store=store,
                tracker=(lambda folder: Sender(folder, uri, "x", warn=lambda _: None)) if tracked else None,
            )
            seconds = time.process_time() - began
            if number:  # the first one imports what all need
                spent[tracked].append(seconds)
                lines = RunFolder(store, result.key).epochs
                parts = ("train_seconds", "eval_seconds", "log_seconds")
                wall[tracked].append(sum(line[part] or 0.0 for line in lines for part in parts))
    by_cpu, by_wall = ({t: 60 * 25 / min(s) for t, s in seconds.items()} for seconds in (spent, wall))
    print(
        f"{way}: {by_cpu[True]:.0f} tracked, {by_cpu[False]:.0f} untracked epochs a processor minute"
        f" ({by_cpu[True] / by_cpu[False] - 1:+.1%}); {by_wall[True]:.0f} and {by_wall[False]:.0f} a minute"
    )
    assert (min(spent[True]) - min(spent[False])) / 25 < LONGEST


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
def test_processes_of_a_sweep_wait_for_a_silent_store_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of Ray and of SLURM has a process of its own."""
    folder = finished(tmp_path)
    with serving("drip", tmp_path / "requests") as uri:
        assert not Sender(folder, uri, "drip", warn=print).sync(final=True)
        monkeypatch.setattr(sender, "_silent", sender.Silent())  # that of another process
        began = time.monotonic()
        assert not Sender(folder, uri, "drip", warn=print).sync(final=True)
        assert time.monotonic() - began < 1
        monkeypatch.setattr(sender, "SILENCE", 0)
        began = time.monotonic()
        assert not Sender(folder, uri, "drip", warn=print).sync(final=True)
        assert time.monotonic() - began > 1, "after a while it is asked again"
    local = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv(sender.LIMIT, "60")
    sender._silent.add(tmp_path, local)
    assert sender.open_study(local, "x", tmp_path)
    assert (tmp_path, local) not in sender._silent, "it has answered"
    assert len(list(tmp_path.glob(".silent-*"))) == 1, "the mark of the other store"


@pytest.mark.usefixtures("worker")
def test_the_end_of_a_sweep_has_one_limit(tmp_path: Path) -> None:
    """For opening the study's run, sending what is missing and closing it together."""
    store = tmp_path / "store"
    finished(store)
    with serving("drip", tmp_path / "requests") as uri:
        deadline, began = sender.Deadline(), time.monotonic()
        with pytest.raises(sender.NoAnswer):
            sender.open_study(uri, "x", store, deadline.left())
        assert sender.sync_study(store, {"ab": "SGD"}, uri, "x", "p" * 32, print, deadline.left()) == (0, 1)
        sender.close_study(uri, "p" * 32, {"finished": 1}, print, deadline.left())
        assert time.monotonic() - began < 2 + 4, "and the end of three processes on a busy machine"


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
    record = make_record("ab", status=status)
    folder.write(record)
    folder.write_epochs([{"stage": 0, "epoch": 0, "time": 1763836000.0, "test_accuracy": 0.5}])
    return folder
