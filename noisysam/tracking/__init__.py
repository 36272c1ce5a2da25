"""MLflow: this package alone imports it."""

import os

# Read by mlflow when it is imported. A server that is away costs a few seconds once, not minutes in every epoch.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")

from noisysam.tracking.client import default_uri, open_store, shown, sqlite_path
from noisysam.tracking.study import close_study, open_study, send_report, sync_store, sync_study
from noisysam.tracking.tracker import Tracker

__all__ = [
    "Tracker", "close_study", "default_uri", "open_store", "open_study", "send_report", "shown", "sqlite_path",
    "sync_store", "sync_study",
]  # fmt: skip
