"""Further commands: tracking, lists of components, this machine."""

import json
from pathlib import Path

import click

from noisysam.cli import completion
from noisysam.cli.base import cli, json_option, store_option
from noisysam.core.errors import RunFailed, UserError


@cli.command(short_help="Send missing records to MLflow.")
@click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
@store_option
def sync(tracking_uri: str | None, store: Path) -> None:
    """Send what is missing or incomplete in MLflow: each study of the store with its rows and cells, then the other
    records. Repeating it changes nothing."""
    from noisysam import tracking
    from noisysam.runs.record import study_names

    uri, store = tracking.default_uri(tracking_uri), store.absolute()
    of_studies = sum(_sync_study(store, study, uri) for study in study_names(store))
    others, failed = tracking.sync_store(store, uri)
    sent = of_studies + others
    click.echo(f"{sent} records sent, {failed} failed")
    if failed:
        raise RunFailed(f"{failed} records could not be sent; they are kept in {store}")


def _sync_study(store: Path, study: str, uri: str) -> int:
    """Send what MLflow lacks of a study that has begun; returns the number of records sent. Those that were not are
    left for the transfer of the whole store, which counts them."""
    from collections import Counter

    from noisysam import tracking
    from noisysam.studies import plan as plans
    from noisysam.studies.state import state

    try:
        cells = plans.runs(plans.load(store, study))
    except UserError as error:
        tracking.to_warnings(str(error))
        return 0
    states = Counter(state(cell, store) for cell in cells)
    if not states["finished"]:
        return 0
    try:
        parent = tracking.open_study(uri, study)
    except (RunFailed, UserError) as error:
        tracking.to_warnings(str(error))
        return 0
    rows = {cell.key: cell.row for cell in reversed(cells)}
    done, _ = tracking.sync_study(store, dict(reversed(rows.items())), uri, study, parent, wait=60.0 + 5 * len(rows))
    if not states["running"]:
        left = len(cells) - states["finished"] - states["failed"]
        tracking.close_study(uri, parent, {"finished": states["finished"], "failed": states["failed"], "left": left})
    return done


@cli.command(short_help="Show the runs in the MLflow web interface.")
@click.argument("study", required=False, shell_complete=completion.studies)
@click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--open/--no-open", "browser", default=True, show_default=True, help="open a browser, if there is one")
def ui(study: str | None, tracking_uri: str | None, host: str, port: int, browser: bool) -> None:
    """Serve the MLflow web interface until Ctrl-C; print and open the pages of STUDY (default: the newest one)."""
    from noisysam.tracking.client import default_uri
    from noisysam.tracking.server import serve

    serve(default_uri(tracking_uri), port, host, study, browser, click.echo)


KINDS = {
    "methods": "noise-robust methods, for --method",
    "optimizers": "SGD, AdamW and the SAM family, for --opt",
    "models": "networks, for --model",
    "datasets": "data sets, for --dataset",
    "noise": "kinds of label noise, for --noise-type",
    "probes": "measurements of trained networks, for `noisysam probe`",
    "claims": "kinds of claims of your own, for the study file",
}


@cli.command("list", short_help="List methods, optimizers, models, data sets, noise types or probes.")
@click.argument("what", type=click.Choice(list(KINDS)), required=False)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--plugin", "files", type=click.Path(path_type=Path), multiple=True,
              help="also list what this Python file registers; repeatable")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), help="length of the recipe of a method  [default: as published]")
@click.option("--dataset", default="cifar10", show_default=True, help="data set of that recipe")
@click.option("--noise-type", default="symmetric", show_default=True, help="noise type of that recipe")
@click.option("--noise", type=click.FloatRange(0, 1), default=0.4, show_default=True, help="noise rate of that recipe")
@json_option
def list_(
    what: str | None,
    names: tuple[str, ...],
    files: tuple[Path, ...],
    epochs: int | None,
    dataset: str,
    noise_type: str,
    noise: float,
    as_json: bool,
) -> None:
    """List the components of a kind, or those named, with their options and sources; without a kind, what can be
    listed.

    A method that is named comes with the recipe that its authors published, for this problem, at this length.
    """
    if what is None:
        click.echo(json.dumps(KINDS) if as_json else "\n".join(f"noisysam list {k:12} {v}" for k, v in KINDS.items()))
        return
    from noisysam.cli import recall
    from noisysam.cli.catalogue import details, entries, named, recipe, recipe_lines
    from noisysam.core import plugins

    for file in files:
        plugins.load(file)
    found = named(what, names) if names else entries(what) if files else recall.entries(what)
    if names and what == "methods":
        for entry in found:
            entry["recipe"] = recipe(entry["name"], dataset, noise_type, noise, epochs)
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo(f"no {what} of your own: --plugin FILE lists those of a file", err=True)
    for entry in found:
        click.echo(f"{entry['name']:20} {entry['summary']}  [{entry['source']}]")
        for line in details(entry):
            click.echo(f"{'':20} {line}")
        for option in entry.get("options", []):
            click.echo(f"{'':20}   {option['name']}={option['default']}  {option['description']}")
        for line in recipe_lines(entry["recipe"]) if "recipe" in entry else []:
            click.echo(f"{'':20} {line}")


@cli.command(short_help="Show versions, devices, data, and what `auto` selects.")
@click.option("--data-dir", type=click.Path(path_type=Path))
@json_option
def doctor(data_dir: Path | None, as_json: bool) -> None:
    """Show versions, devices, the data that were found, and what `auto` selects on this machine."""
    from noisysam.cli.catalogue import diagnosis

    found = diagnosis(data_dir)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:20} {value}")


@cli.command(short_help="Measure speed and memory on this machine.")
@click.argument("parts", nargs=-1, metavar="[PART...]")
@click.option("--rounds", type=click.IntRange(1), help="measurements per case  [default: depends on the part]")
@click.option("--out", type=click.Path(path_type=Path), help="folder for the JSON files  [default: reports/benchmarks]")
@click.option("--quick", is_flag=True, help="use tiny networks and data, as a test; writes no files without --out")
@click.option("--long", "large", is_flag=True, help="also measure the largest sizes")
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets")
@click.option(
    "--peak-tflops", type=click.FloatRange(0, min_open=True),
    help="peak performance of the device, to compute the share that is used",
)  # fmt: skip
def bench(
    parts: tuple[str, ...],
    rounds: int | None,
    out: Path | None,
    quick: bool,
    large: bool,
    data_dir: Path | None,
    peak_tflops: float | None,
) -> None:
    """Measure the named parts, or all of them: loop, loader, steps, methods, memory, epoch, start, growth,
    reports.

    Cases that are compared take turns, round by round, in one process. Nothing else should run at the same time.
    """
    from noisysam import bench as benchmarks
    from noisysam.bench.measure import Settings

    folder = Path("reports/benchmarks") if out is None and not quick else out
    benchmarks.run(parts, Settings(rounds, quick, large, data_dir, peak_tflops), folder, click.echo)
