"""Access to a tracking store of MLflow."""

import contextlib
import fcntl
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from noisysam.core.errors import RunFailed, UserError
from noisysam.tracking import pages

EXPERIMENT = "noisysam"


KIND = {"mlflow.experimentKind": "custom_model_development"}  # the pages then show training runs first


Warn = Callable[[str], None]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def default_uri(given: str | None = None) -> str:
    """The store's address: ``given``, else MLFLOW_TRACKING_URI, else mlflow.db in the working directory. SQLite files
    get absolute paths, so that workers with another working directory find them."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def open_store(uri: str, experiment: str) -> str:
    """The id of ``experiment``, created where it is new, in a store that is created and migrated where it is not.

    The parent of a sweep calls this before its workers start: several processes must not migrate one database at the
    same time. An SQLite store keeps its artifacts in ``mlartifacts`` beside it. Raises ``UserError`` where the
    experiment was deleted and ``RunFailed`` where the store cannot be used.
    """
    path = sqlite_path(uri)
    try:
        with _locked(path):
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            wanted = KIND | pages.tags()
            if found is None:
                place = None if path is None else (path.parent / "mlartifacts" / quote(experiment, " ")).as_uri()
                try:
                    return str(client.create_experiment(experiment, artifact_location=place, tags=wanted))
                except MlflowException:  # another machine may have created it in the meantime
                    found = client.get_experiment_by_name(experiment)
                    if found is None:
                        raise
            for name in wanted.items() - found.tags.items():
                client.set_experiment_tag(found.experiment_id, *name)
    except Exception as error:  # sqlalchemy, requests and mlflow each raise their own
        raise RunFailed(f"MLflow store {shown(uri)} cannot be used: {_one_line(error)}") from error
    if found.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {experiment!r} was deleted: restore it, or give --experiment another name")
    return str(found.experiment_id)


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Hold the lock beside an SQLite file; does nothing for other stores."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reach(uri: str, experiment: str, warn: Warn) -> bool:
    try:
        open_store(uri, experiment)
    except (RunFailed, UserError) as error:
        warn(str(error))
        return False
    return True


def _exists(client: MlflowClient, run_id: str) -> bool:
    """Whether the store knows the run. One that was deleted in MLflow's pages counts: it is not brought back."""
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def shown(text: str) -> str:
    """Text whose addresses lack the name and password that they may carry."""
    return re.sub(r"//[^/@]*@", "//", text)


def _one_line(error: BaseException) -> str:
    lines = shown(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
