"""The group of the commands, and what several of them share."""

from pathlib import Path
from typing import Any

import click

from noisysam import __version__
from noisysam.core.errors import RunFailed

store_option = click.option(
    "--store", type=click.Path(path_type=Path), default=Path("runs"), envvar="NOISYSAM_STORE", show_default=True,
    help="folder of the runs' records",
)  # fmt: skip
tracking_options = [
    click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)"),
    click.option("--no-track", is_flag=True, help="do not send anything to MLflow"),
]
json_option = click.option("--json", "as_json", is_flag=True, help="one JSON object as the last line of stdout")


def tracked(command: Any) -> Any:
    """Add the options of tracking."""
    for option in reversed(tracking_options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def cli() -> None:
    """How well do neural networks survive wrong training labels? SAM, SGD and noise-robust methods, compared honestly.

    \b
    noisysam run --noise 0.8 --opt sam     one run
    noisysam sweep STUDY.yaml              a study; then: noisysam report STUDY
    noisysam ui                            the runs, side by side in MLflow
    """


def store_uri(tracking_uri: str | None, no_track: bool, experiment: str) -> str | None:
    """The tracking store, opened (created and migrated) before anything starts; None where tracking is off. A store
    that is away does not stop a training."""
    if no_track:
        return None
    from noisysam import tracking
    from noisysam.training.progress import note

    uri = tracking.default_uri(tracking_uri)
    try:
        tracking.open_store(uri, experiment)
    except RunFailed as error:
        note(f"noisysam: warning: {error}; training goes on, and `noisysam track --sync` sends the record later")
    return uri
