"""Tracking as training and the commands use it: requests to a process of its own (``worker``).

Training never waits for a store. After an epoch the worker is asked to send what is new on disk, unless it is still
busy with the request before; at the end of a run the wait has a limit. A worker that does not answer in time is
killed, whatever it is doing: the record is on disk, and what was sent by then is completed later.
"""

import atexit
import hashlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import noisysam
from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.record import RunFolder
from noisysam.tracking.address import Warn, shown, sqlite_path, to_warnings
from noisysam.tracking.state import is_complete

LIMIT = "NOISYSAM_TRACK_TIMEOUT"  # environment variable: seconds to wait at the end, --track-timeout


DEFAULT_LIMIT = 30.0


STOPPING = 2.0  # seconds to wait if the run was interrupted


REQUEST = 60  # seconds that one request may take while training goes on, or one record of `noisysam sync`


LATER = "the record is on disk; `noisysam sync` sends the rest"


def limit() -> float:
    """Seconds to wait for the store at the end of a command."""
    return float(os.environ.get(LIMIT, DEFAULT_LIMIT))


class Worker:
    """A process that sends records to MLflow. It ends with this one, and each request has a deadline."""

    def __init__(self) -> None:
        self.connection, other = Pipe()
        root = str(Path(noisysam.__file__).resolve().parents[1])
        code = "import sys; sys.path.append(sys.argv[2]); from noisysam.tracking.worker import main; main(sys.argv[1])"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(other.fileno()), root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("NOISYSAM_TRACEBACK") else subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C is for this process
        )
        other.close()
        self.busy = False

    def request(self, name: str, *arguments: Any, seconds: float = REQUEST) -> None:
        """Ask for a function of the worker; it ends itself if that takes longer than ``seconds``."""
        self.connection.send((name, arguments, max(1, math.ceil(seconds))))
        self.busy = True

    def answer(self, wait: float | None, warn: Warn) -> tuple[bool, Any] | None:
        """The result (True) or the exception (False) of the request; None if there is none within ``wait`` seconds.
        ``EOFError`` if the worker has ended. Warnings of the worker go to ``warn``."""
        deadline = None if wait is None else time.monotonic() + wait
        while self.connection.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
            kind, value = self.connection.recv()
            if kind == "warning":
                warn(value)
            else:
                self.busy = False
                return kind == "result", value
        return None

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


_workers: list[Worker] = []  # the one of this process, if it was started


SILENCE = 3600  # seconds for which a store that did not answer in time is not waited for, by any process of a sweep


class Silent:
    """Which stores did not answer in time: not waited for again. Processes that share a folder of records, such as
    those of a sweep, know it of one another, so that a silent store costs a sweep one wait and not one for each run."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def __contains__(self, place: tuple[Path, str]) -> bool:
        mark = self._mark(*place)
        try:
            return place[1] in self.known or time.time() - mark.stat().st_mtime < SILENCE
        except OSError:
            return False

    def add(self, store: Path, uri: str) -> None:
        self.known.add(uri)
        with suppress(OSError):  # the store may be read-only
            self._mark(store, uri).touch()

    def discard(self, store: Path, uri: str) -> None:
        """It has answered."""
        self.known.discard(uri)
        with suppress(OSError):
            self._mark(store, uri).unlink(missing_ok=True)

    @staticmethod
    def _mark(store: Path, uri: str) -> Path:
        return store / f".silent-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


class NoAnswer(RunFailed):
    """The store did not answer in time."""


_silent = Silent()


def _worker() -> Worker:
    if _workers and _workers[0].process.poll() is not None:
        _stop()
    if not _workers:
        atexit.register(_stop)
        _workers.append(Worker())
    return _workers[0]


def _stop() -> None:
    while _workers:
        _workers.pop().kill()


class Sender:
    """Sends the record of one run to a store while the run is trained. The parameters are those of ``Tracker``."""

    def __init__(
        self,
        folder: RunFolder,
        uri: str,
        experiment: str,
        parent_run_id: str | None = None,
        row: str | None = None,
        warn: Warn = to_warnings,
    ) -> None:
        self.folder, self.uri, self.warn = folder, uri, warn
        self.experiment, self.parent_run_id = experiment, parent_run_id
        self.target = (folder.store.absolute(), folder.key, uri, experiment, parent_run_id, row)
        self._lost = False  # the worker did not answer in time: nothing is sent before the end of the run
        self._warned = False
        with suppress(UserError):  # of a damaged record, which the end of the run reports
            if (folder.store, uri) not in _silent and not self._is_complete():
                _worker()  # it starts up during the first epoch

    def sync(self, final: bool = False) -> bool:
        """Ask for a transfer of what is new. With ``final``, wait for it, but not longer than the limit. Returns
        whether tracking is known to have failed."""
        if final:
            return self._finish()
        if self._lost or (self.folder.store, self.uri) in _silent:
            return False
        try:
            worker = _workers[0] if _workers and _workers[0].busy else _worker()
            if worker.busy and worker.answer(0, self._say) is None:
                return True  # the next request covers this epoch too
            worker.request("track", *self.target, False)
        except (EOFError, OSError):
            self._lost = True
            self._give_up(f"no answer from {shown(self.uri)} within {REQUEST} s")
        return not self._lost

    def _finish(self) -> bool:
        try:
            record = self.folder.record
            status = None if record is None else record.get("status")
            if self._is_complete():
                return True
        except UserError as error:  # tracking must not end a run
            self._say(f"run {self.folder.key} was not sent: {error}")
            return False
        store = self.folder.store
        if (store, self.uri) in _silent:
            return False
        wait = limit() if status in ("finished", "failed") else min(limit(), STOPPING)
        try:
            found = _ask("track", *self.target, True, wait=wait, warn=self._say)
        except RunFailed as error:
            if isinstance(error, NoAnswer) and wait >= limit():
                _silent.add(store, self.uri)
            self._give_up(str(error))
            return False
        _silent.discard(store, self.uri)
        return bool(found)

    def _is_complete(self) -> bool:
        return is_complete(self.folder, self.uri, self.experiment, self.parent_run_id)

    def _give_up(self, reason: str) -> None:
        _stop()
        self._say(f"tracking of run {self.folder.key} stopped ({reason}): {LATER}")

    def _say(self, message: str) -> None:
        if not self._warned:
            self.warn(message)
        self._warned = True


def _ask(name: str, *arguments: Any, wait: float | None, warn: Warn) -> Any:
    """The result of a function of the worker; its exceptions are raised. ``RunFailed`` if there is no result within
    ``wait`` seconds (None: the worker's own deadline)."""
    deadline = math.inf if wait is None else time.monotonic() + wait

    def left() -> float | None:
        return None if wait is None else deadline - time.monotonic()

    if wait is not None and wait <= 0:
        raise NoAnswer("the time for the MLflow store is up")
    try:
        worker = _worker()
        if worker.busy and worker.answer(left(), warn) is None:
            raise EOFError
        worker.request(name, *arguments, seconds=REQUEST if wait is None else wait + 1)
        answer = worker.answer(left(), warn)
        if answer is None:
            raise EOFError
    except (EOFError, OSError):
        _stop()
        raise NoAnswer(f"no answer from the MLflow store within {REQUEST if wait is None else wait:.2g} s") from None
    except BaseException:  # Ctrl-C: nothing more is sent
        _stop()
        raise
    succeeded, value = answer
    if not succeeded:
        raise value
    return value


class Deadline:
    """One limit for several requests."""

    def __init__(self) -> None:
        self.end = time.monotonic() + limit()

    def left(self) -> float:
        """Seconds that are left of it."""
        return max(0.0, self.end - time.monotonic())


def open_study(uri: str, study: str, store: Path | None = None, wait: float | None = None) -> str:
    """``study.open_study`` in the worker, within ``wait`` seconds (default: the limit). ``store``: the folder of the
    sweep's records, whose runs are not to wait for a tracking store that does not answer now."""
    try:
        found = str(_ask("open_study", uri, study, wait=limit() if wait is None else wait, warn=to_warnings))
    except NoAnswer:
        if store is not None:
            _silent.add(store, uri)
        raise
    if store is not None:
        _silent.discard(store, uri)
    return found


def open_rows(uri: str, study: str, parent_run_id: str, names: Iterable[str]) -> dict[str, str]:
    """``study.open_rows`` in the worker, within the limit."""
    found: dict[str, str] = _ask("open_rows", uri, study, parent_run_id, list(names), wait=limit(), warn=to_warnings)
    return found


def close_study(
    uri: str, run_id: str, counts: Mapping[str, int], warn: Warn = to_warnings, wait: float | None = None
) -> None:
    """``study.close_study`` in the worker, within ``wait`` seconds (default: the limit)."""
    try:
        _ask("close_study", uri, run_id, dict(counts), wait=limit() if wait is None else wait, warn=warn)
    except RunFailed as error:
        warn(f"the study's run in MLflow stays open ({error})")


def sync_study(
    store: Path,
    rows: Mapping[str, str],
    uri: str,
    study: str,
    parent_run_id: str,
    warn: Warn = to_warnings,
    wait: float | None = None,
) -> tuple[int, int]:
    """``study.sync_study`` in the worker, within ``wait`` seconds (default: the limit); ``warn`` gets the number of
    records that are left."""
    wait = limit() if wait is None else wait
    try:
        done, failed = _ask("sync_study", store, dict(rows), uri, study, parent_run_id, wait=wait, warn=warn)
        _silent.discard(store, uri)
        return done, failed
    except RunFailed as error:
        folders = [RunFolder(store, key) for key in rows if (store / key / "record.json").exists()]
        left = sum(not is_complete(folder, uri, study) for folder in folders)
        if left:
            warn(f"{left} of {len(folders)} records are not in MLflow ({error}): `noisysam sync` sends them")
        return 0, left


def send_report(uri: str, study: str, folder: Path, text: str, warn: Warn = to_warnings) -> bool:
    """``study.send_report`` in the worker, within the limit."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return False
    try:
        return bool(_ask("send_report", uri, study, folder.absolute(), text, wait=limit(), warn=warn))
    except RunFailed as error:
        warn(f"the report was not sent to MLflow ({error})")
        return False


def sync_store(
    store: Path,
    uri: str,
    experiment: str | None = None,
    warn: Warn = to_warnings,
    keys: Iterable[str] | None = None,
    wait: float | None = None,
) -> tuple[int, int]:
    """``study.sync_store`` in the worker, with a deadline for each record, or for all of them (``wait``)."""
    chosen = list(keys if keys is not None else (path.parent.name for path in store.glob("*/record.json")))
    try:
        done, failed = _ask("sync_store", store.absolute(), uri, experiment, chosen, wait=wait, warn=warn)
        return done, failed
    except RunFailed as error:
        warn(f"{error}: {LATER}")
        return 0, len(chosen)
