"""Tracking with MLflow. Only this package imports mlflow, and training does so in a process of its own (``sender``)."""

import os

# Read by mlflow on import: no retries, and a timeout of each read from a server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")

from noisysam.tracking.address import default_uri, shown, sqlite_path, to_warnings
from noisysam.tracking.sender import (
    Deadline,
    Sender,
    close_study,
    limit,
    open_rows,
    open_study,
    send_report,
    sync_store,
    sync_study,
)

__all__ = [
    "Deadline", "Sender", "close_study", "default_uri", "limit", "open_rows", "open_study", "send_report", "shown",
    "sqlite_path", "sync_store", "sync_study", "to_warnings",
]  # fmt: skip
