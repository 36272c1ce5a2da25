"""Access to a tracking store of MLflow."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from noisysam.core.errors import RunFailed, UserError
from noisysam.tracking import pages
from noisysam.tracking.address import Warn, default_uri, shown, sqlite_path

__all__ = ["default_uri", "exists", "locked", "one_line", "open_store", "reach", "shown", "sqlite_path"]

KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then show training runs first


LOCK_WAIT = 30.0  # seconds to wait for another process that opens the same SQLite file


def open_store(uri: str, experiment: str) -> str:
    """Return the id of ``experiment``. The store and the experiment are created, and the store is migrated, if needed.

    A lock keeps several processes from migrating an SQLite store at the same time. Its artifacts lie in
    ``mlartifacts`` beside it. Raises ``UserError`` if the experiment was deleted, ``RunFailed`` if the store cannot be
    used.
    """
    path = sqlite_path(uri)
    try:
        with locked(path):
            if path is not None and not path.exists():
                _create(path)
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            wanted = KIND | pages.tags()
            if found is None:
                place = None if path is None else (path.parent / "mlartifacts" / quote(experiment, " ")).as_uri()
                try:
                    created = client.create_experiment(experiment, artifact_location=place, tags=wanted)
                    return identifier(created)
                except MlflowException:  # another machine may have created it in the meantime
                    found = client.get_experiment_by_name(experiment)
                    if found is None:
                        raise
            if found.name != experiment:
                raise RunFailed("it does not answer as MLflow does")
            for name in wanted.items() - found.tags.items():
                client.set_experiment_tag(found.experiment_id, *name)
            if found.lifecycle_stage != "deleted":
                return identifier(found.experiment_id)
    except Exception as error:  # sqlalchemy, requests and mlflow each raise their own
        raise RunFailed(f"MLflow store {shown(uri)} cannot be used: {one_line(error)}") from error
    raise UserError(f"MLflow experiment {experiment!r} was deleted: restore it, or give --experiment another name")


def _create(path: Path) -> None:
    """Create an SQLite store beside its place and rename it: a process that is killed while it creates the tables
    would leave a file that MLflow cannot use or repair."""
    new = path.with_name(f".{path.name}.new")
    for half in (new, new.with_name(f"{new.name}-journal")):
        half.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
    new.replace(path)


def identifier(value: object) -> str:
    """An identifier that the store gave; ``RunFailed`` if it is empty, as it is in an answer ``{}``."""
    if not value:
        raise RunFailed("it does not answer as MLflow does")
    return str(value)


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold the lock file beside an SQLite file; does nothing for other stores. ``RunFailed`` if another process holds
    it for too long."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    deadline = time.monotonic() + LOCK_WAIT
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RunFailed(f"another process has held {lock} for {LOCK_WAIT:g} s") from None
                time.sleep(0.05)
        yield


def reach(uri: str, experiment: str, warn: Warn) -> bool:
    """Whether the store and the experiment can be used; ``warn`` gets the reason if not."""
    try:
        open_store(uri, experiment)
    except (RunFailed, UserError) as error:
        warn(str(error))
        return False
    return True


def exists(client: MlflowClient, run_id: str) -> bool:
    """Whether the store has the run. A run that was deleted in MLflow's pages exists: it is not sent again."""
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, without credentials, or the exception's type if it has none."""
    lines = shown(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
