"""Commands around the runs: tracking, lists, this machine."""

import json
from pathlib import Path

import click

from noisysam.cli.base import cli, json_option, store_option
from noisysam.core.errors import RunFailed


@cli.command(short_help="Send records to MLflow that did not get there.")
@click.option("--sync", is_flag=True, required=True, help="send what is missing; twice changes nothing")
@click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
@store_option
def track(sync: bool, tracking_uri: str | None, store: Path) -> None:
    """Send every record of the store that MLflow has not, or not wholly."""
    from noisysam import tracking

    sent, failed = tracking.sync_store(store, tracking.default_uri(tracking_uri))
    click.echo(f"{sent} records sent, {failed} failed")
    if failed:
        raise RunFailed(f"{failed} records could not be sent; they stay in {store}")


@cli.command(short_help="Open the MLflow UI on the runs.")
@click.argument("study", required=False)
@click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--open/--no-open", "browser", default=True, show_default=True, help="in a browser, where there is one")
def ui(study: str | None, tracking_uri: str | None, host: str, port: int, browser: bool) -> None:
    """Serve the MLflow UI until Ctrl-C; print and open the pages of STUDY (default: the newest experiment)."""
    from noisysam.tracking.client import default_uri
    from noisysam.tracking.server import serve

    serve(default_uri(tracking_uri), port, host, study, browser, click.echo)


@cli.command("list", short_help="Methods, optimizers, models, data sets, noise, probes.")
@click.argument("what", type=click.Choice(["methods", "optimizers", "models", "datasets", "noise", "probes"]))
@click.option("--plugin", type=click.Path(path_type=Path), help="list what this Python file registers, too")
@json_option
def list_(what: str, plugin: Path | None, as_json: bool) -> None:
    """Every component of a kind: a line, its options and its source."""
    from noisysam.cli.catalogue import details, entries
    from noisysam.core import plugins

    if plugin is not None:
        plugins.load(plugin)
    found = entries(what)
    if as_json:
        click.echo(json.dumps(found))
        return
    for entry in found:
        click.echo(f"{entry['name']:20} {entry['summary']}  [{entry['source']}]")
        for line in details(entry):
            click.echo(f"{'':20} {line}")
        for option in entry.get("options", []):
            click.echo(f"{'':20}   {option['name']}={option['default']}  {option['description']}")


@cli.command(short_help="What this machine has, and what `auto` becomes on it.")
@click.option("--data-dir", type=click.Path(path_type=Path))
@json_option
def doctor(data_dir: Path | None, as_json: bool) -> None:
    """Check versions, devices, data and tracking."""
    from noisysam.cli.catalogue import diagnosis

    found = diagnosis(data_dir)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:20} {value}")


@cli.command(short_help="Speed and memory on this machine.")
@click.argument("parts", nargs=-1, metavar="[PART...]")
@click.option("--rounds", type=click.IntRange(1), help="how often each case is measured  [default: each part's own]")
@click.option("--out", type=click.Path(path_type=Path), help="folder of the JSON files  [default: reports/benchmarks]")
@click.option("--quick", is_flag=True, help="tiny networks and data, to see that it runs; writes nothing without --out")
@click.option("--long", "large", is_flag=True, help="the largest sizes too")
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets")
@click.option(
    "--peak-tflops", type=click.FloatRange(0, min_open=True), help="of the device, for the share that is used"
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
    """Measure the named PARTs, or all: loop, loader, steps, methods, memory, epoch, start, growth.

    What is compared is measured in turn, round by round, in one process. Nothing else should run meanwhile.
    """
    from noisysam import bench as benchmarks
    from noisysam.bench.measure import Settings

    folder = Path("reports/benchmarks") if out is None and not quick else out
    benchmarks.run(parts, Settings(rounds, quick, large, data_dir, peak_tflops), folder, click.echo)
