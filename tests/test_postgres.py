"""Many writers: eight processes that log at the same time, to a real ``mlflow server`` on PostgreSQL and to SQLite.
No metric may be lost or doubled, whatever the databases make of the rush."""

import contextlib
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noisysam.runs.measures import MEASURE, MEASURES
from noisysam.runs.record import RunFolder

pytestmark = pytest.mark.services

WRITERS, RUNS, EPOCHS = 8, 2, 5  # processes, runs of each, epochs of a run
PATIENCE = 600.0  # seconds for what takes a few on a machine that does nothing else

# Each process writes records as a training does, and sends every epoch as it ends; all begin at the same moment.
WRITER = """
import sys
import time
from pathlib import Path

from samples import COMPLETE, complete

from noisysam.runs.record import RunFolder
from noisysam.tracking.tracker import Tracker

number, store, uri, runs, epochs = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
(store / f"ready-{number}").touch()
while not (store / "go").exists():
    time.sleep(0.01)
for run in range(runs):
    folder = RunFolder(store, f"{number:08x}{run:08x}")
    record = complete({
        "key": folder.key, "status": "running", "name": f"run {folder.key}", "ended": None,
        "config": {**COMPLETE["config"], "seed": run},
    })
    folder.write(record)
    tracker, lines = Tracker(folder, uri, "rush", row=f"row {number}"), []
    for epoch in range(epochs):
        line = {"stage": 0, "epoch": epoch, "time": time.time()}
        lines.append(line | {f"metric_{k}": 100 * number + 10 * run + epoch + k / 10 for k in range(20)})
        folder.write_epochs(lines)
        tracker.sync()
    results = {**record["results"], "last": number / 10}
    record |= {"status": "finished", "ended": "2026-11-22T18:05:00+00:00", "results": results}
    folder.write(record)
    tracker.sync(final=True)
    print(int(tracker.done))
"""


def rush(store: Path, uri: str) -> None:
    """Eight writers at once; each must have sent all it has."""
    store.mkdir()
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    variables["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "120"  # so that a slow machine is not taken for a dead server
    command = [sys.executable, "-W", "always", "-c", WRITER]
    writers = [
        subprocess.Popen(
            [*command, str(number), str(store), uri, str(RUNS), str(EPOCHS)],
            env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(WRITERS)
    ]  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while len(list(store.glob("ready-*"))) < WRITERS and time.monotonic() < deadline:
        time.sleep(0.05)
    (store / "go").touch()
    for writer in writers:
        out, err = writer.communicate(timeout=PATIENCE)
        assert out.split() == ["1"] * RUNS, err


def rounded(value: float) -> float:
    """Rounded, since percent of a share may differ in the last bit."""
    return float(f"{value:.9g}")


def percent(column: str, value: float) -> tuple[str, float]:
    """The metric of a column, shares in percent."""
    shares = {measure.column for measure in MEASURES if measure.percent}
    return (f"percent/{column}", rounded(100 * value)) if column in shares else (column, rounded(value))


def compare(store: Path, runs: list[Any], metrics: list[Any]) -> None:
    """The database's own tables against the records. ``runs``: (key, id, status); ``metrics``: (id, name, step,
    value)."""
    keys = {f"{number:08x}{run:08x}" for number in range(WRITERS) for run in range(RUNS)}
    assert Counter(key for key, _, _ in runs) == Counter(keys)
    assert {status for _, _, status in runs} == {"FINISHED"}
    names = {run: key for key, run, _ in runs}
    there = Counter((names[run], name, rounded(value), step) for run, name, step, value in metrics)
    sent: Counter[Any] = Counter()
    for key in keys:
        folder = RunFolder(store, key)
        assert len(folder.epochs) == EPOCHS
        for step, line in enumerate(folder.epochs):
            sent.update((key, *percent(name, line[name]), step) for name in line if name != "time")
        record = folder.record
        assert record is not None
        for name, value in {**record["results"], **record["cost"]}.items():
            scale = MEASURE[name].scale if name in MEASURE else 1
            sent[key, f"final/{name}", rounded(scale * value), 0] += 1
    assert there == sent


RUN_ROWS = """select t.value, r.run_uuid, r.status from tags t join runs r on r.run_uuid = t.run_uuid
where t.key = 'noisysam.key'"""
METRIC_ROWS = "select run_uuid, key, step, value from metrics"


def test_eight_writers_on_sqlite(tmp_path: Path) -> None:
    """One file, no server: what one machine needs. The store is new: the writers also race to create it."""
    rush(tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as base:
        compare(tmp_path / "runs", base.execute(RUN_ROWS).fetchall(), base.execute(METRIC_ROWS).fetchall())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """The address of a database of a cluster that was made for this test."""
    pytest.importorskip("psycopg")
    found = [Path(shutil.which("initdb") or "/none").parent, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    programs = next((folder for folder in reversed(found) if (folder / "initdb").exists()), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    if os.geteuid() == 0 and "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    owner: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder, port = Path(f"/tmp/noisysam-pg-{os.getpid()}"), free_port()  # a socket's path must be short
    folder.mkdir()
    try:
        if owner:
            shutil.chown(folder, "postgres")
        made = ["--auth=trust", "--username=noisysam", "--no-sync", "-D", str(folder / "data")]
        subprocess.run([programs / "initdb", *made], check=True, capture_output=True, cwd=folder, **owner)
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)],
                stdout=log, stderr=log, cwd=folder, **owner,
            )  # fmt: skip
        try:
            until_ready([str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)])
            where = ["-h", "127.0.0.1", "-p", str(port), "-U", "noisysam"]
            subprocess.run([programs / "createdb", *where, "mlflow"], check=True, capture_output=True)
            yield f"postgresql+psycopg://noisysam@127.0.0.1:{port}/mlflow"
        finally:
            server.terminate()
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until_ready(command: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "PostgreSQL does not start"
        time.sleep(0.1)


@contextlib.contextmanager
def mlflow_server(backend: str, folder: Path) -> Iterator[str]:
    """The address of a tracking server on a database."""
    port, log = free_port(), folder / "server.log"
    where = ["--backend-store-uri", backend, "--artifacts-destination", (folder / "artifacts").as_uri()]
    where += ["--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    where += ["--uvicorn-opts", "--timeout-worker-healthcheck 120"]  # a slow machine's processes are not dead
    command = [sys.executable, "-m", "mlflow", "server", *where]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # starts faster
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def test_eight_writers_on_postgresql(postgres: str, tmp_path: Path) -> None:
    """What a cluster needs: a server of several processes before one database."""
    import psycopg

    with mlflow_server(postgres, tmp_path) as uri:
        rush(tmp_path / "runs", uri)
    with psycopg.connect(postgres.replace("+psycopg", "")) as base:
        compare(tmp_path / "runs", base.execute(RUN_ROWS).fetchall(), base.execute(METRIC_ROWS).fetchall())
