"""Addresses of MLflow tracking stores."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

EXPERIMENT = "noisysam"


Warn = Callable[[str], None]


def default_uri(given: str | None = None) -> str:
    """The address of the store: ``given``, else MLFLOW_TRACKING_URI, else mlflow.db in the working directory. Paths of
    SQLite files are made absolute, so that processes with another working directory use the same file."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def shown(text: str) -> str:
    """``text`` without the user names and passwords of addresses in it."""
    return re.sub(r"//[^/@]*@", "//", text)


def to_warnings(message: str) -> None:
    """Emit a Python warning: the default of functions that take ``warn``."""
    warnings.warn(message, stacklevel=3)
