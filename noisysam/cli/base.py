"""The command group, and options that several commands share."""

import os
from pathlib import Path
from typing import Any

import click

from noisysam import __version__

LIMIT = "NOISYSAM_TRACK_TIMEOUT"  # read by the processes that train: those of Ray and SLURM inherit it


def _set_limit(_: click.Context, __: click.Parameter, seconds: float | None) -> None:
    if seconds is not None:
        os.environ[LIMIT] = str(seconds)


store_option = click.option(
    "--store", type=click.Path(path_type=Path), default=Path("runs"), envvar="NOISYSAM_STORE", show_default=True,
    help="folder of the runs' records",
)  # fmt: skip
tracking_options = [
    click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)"),
    click.option("--no-track", is_flag=True, help="do not use MLflow"),
    click.option(
        "--track-timeout", type=click.FloatRange(0), envvar=LIMIT, expose_value=False,
        callback=_set_limit,
        help="seconds to wait for MLflow at the end  [default: 30]",
    ),
]  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON object as the last line of stdout")


def tracked(command: Any) -> Any:
    """Add the tracking options to a command."""
    for option in reversed(tracking_options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def cli() -> None:
    """Measure how well neural networks learn from wrong labels: SGD, SAM and noise-robust methods, compared fairly.

    \b
    noisysam run --noise 0.8 --opt sam     train one run
    noisysam sweep STUDY.yaml              train a study; then: noisysam report STUDY
    noisysam ui                            show the runs in MLflow
    """


def store_uri(tracking_uri: str | None, no_track: bool) -> str | None:
    """The address of the tracking store; None if tracking is off. It is opened in a process of its own."""
    if no_track:
        return None
    from noisysam import tracking

    return tracking.default_uri(tracking_uri)
