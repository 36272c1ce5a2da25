"""The process that sends records to MLflow, so that a slow, broken or hostile store cannot hold up training."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import requests

from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.record import RunFolder
from noisysam.tracking import sender, study
from noisysam.tracking.address import Warn
from noisysam.tracking.client import one_line
from noisysam.tracking.tracker import Tracker

BODY = 2**26  # bytes of one answer of a server, decompressed


def main(descriptor: str) -> None:
    """Answer requests until the other side closes the connection."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    bound_answers()
    connection = Connection(int(descriptor))

    def warn(message: str) -> None:
        connection.send(("warning", message))

    calls = Calls(warn)
    while True:
        try:
            name, arguments, seconds = connection.recv()
        except EOFError:
            return
        signal.alarm(seconds)  # its default action ends the process, whatever it waits for
        try:
            answer = "result", getattr(calls, name)(*arguments)
        except Exception as error:
            known = isinstance(error, UserError | RunFailed)
            answer = "exception", error if known else RunFailed(one_line(error))
        signal.alarm(0)
        connection.send(answer)


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which another process may replace."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def bound_answers() -> None:
    """Let requests refuse answers that are longer than ``BODY``; MLflow would read them into memory without limit."""
    original: Callable[..., Iterator[Any]] = requests.Response.iter_content

    def iter_content(self: requests.Response, *arguments: Any, **options: Any) -> Iterator[Any]:
        size = 0
        for chunk in original(self, *arguments, **options):
            size += len(chunk)
            if size > BODY:
                self.close()
                raise requests.exceptions.ContentDecodingError(f"the answer is longer than {BODY >> 20} MiB")
            yield chunk

    requests.Response.iter_content = iter_content  # type: ignore[method-assign]


class Calls:
    """What ``sender`` may ask for."""

    def __init__(self, warn: Warn) -> None:
        self.warn = warn
        self.tracker: tuple[tuple[Any, ...], Tracker] | None = None  # of the run that is being trained

    def track(
        self, store: Path, key: str, uri: str, experiment: str, parent: str | None, row: str | None, final: bool
    ) -> bool:
        """Send what is new of a run."""
        target = (store, key, uri, experiment, parent, row)
        if self.tracker is None or self.tracker[0] != target:
            tracker = Tracker(RunFolder(store, key), uri, experiment, parent, row, self.warn)
            self.tracker = target, tracker
        return self.tracker[1].sync(final)

    def open_study(self, uri: str, name: str) -> str:
        return study.open_study(uri, name)

    def open_rows(self, uri: str, name: str, parent: str, rows: Sequence[str]) -> dict[str, str]:
        return study.open_rows(uri, name, parent, rows)

    def close_study(self, uri: str, run_id: str, counts: dict[str, int]) -> None:
        study.close_study(uri, run_id, counts, self.warn)

    def sync_study(self, store: Path, rows: dict[str, str], uri: str, name: str, parent: str) -> tuple[int, int]:
        return study.sync_study(store, rows, uri, name, parent, self.warn)

    def send_report(self, uri: str, name: str, folder: Path, text: str) -> bool:
        return study.send_report(uri, name, folder, text, self.warn)

    def sync_store(self, store: Path, uri: str, experiment: str | None, keys: Sequence[str]) -> tuple[int, int]:
        """The alarm starts again with each record."""
        return study.sync_store(store, uri, experiment, self.warn, keys, lambda: signal.alarm(sender.REQUEST))
