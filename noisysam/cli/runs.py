"""Commands for runs: train, compare, probe."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from noisysam.cli import completion
from noisysam.cli.base import cli, json_option, store_option, store_uri, tracked
from noisysam.cli.options import ConfigCommand, ProbeCommand, configured, pairs

if TYPE_CHECKING:
    from noisysam.runs.record import RunFolder


@cli.command(cls=ConfigCommand, short_help="Train one run.")
@store_option
@tracked
@click.option("--experiment", default="noisysam", show_default=True, help="name of the MLflow experiment")
@json_option
def run(store: Path, tracking_uri: str | None, no_track: bool, experiment: str, as_json: bool, **given: Any) -> None:
    """Train one run. If it has finished before, its stored result is shown; if it was interrupted, it resumes.

    \b
    noisysam run --dataset digits --noise 0.4              SGD on scikit-learn's digits, in seconds
    noisysam run --noise 0.8 --opt sam                     SAM on CIFAR-10, with 80 % of the labels drawn anew
    noisysam run --noise 0.4 --method elr --opt sam        a noise-robust method with SAM
    noisysam run --dataset npz:own.npz --noise-type file:labels.csv       own images, own noisy labels
    """
    from noisysam.cli import recall

    known = recall.finished(store, given)
    if known is not None and known.record is not None:
        uri = store_uri(tracking_uri, no_track)
        if uri is not None:
            from noisysam.tracking import Sender

            Sender(known, uri, experiment).sync(final=True)
        _told(known.record, known, as_json)
        if uri is not None and not as_json:
            _show_page(known, uri, experiment, tracking_uri)
        return
    from noisysam.runs.config import validate
    from noisysam.runs.presets import preset
    from noisysam.runs.problem import prepare
    from noisysam.runs.record import RunFolder
    from noisysam.runs.summary import run_name
    from noisysam.studies.sweep import tracker_for
    from noisysam.training.devices import resolve_device
    from noisysam.training.distributed import ProcessGroup
    from noisysam.training.fit import fit
    from noisysam.training.progress import Display, note

    with ProcessGroup.of_torchrun() as processes:  # of several processes, only the first one prints and tracks
        config = validate(configured(given))
        if not processes.first:
            fit(config, store=store, processes=processes)
            return
        device = resolve_device(config.device)
        prepare(config)  # whatever is wrong with the data is said before anything is promised
        note(f"{run_name(config)}: an estimate of the duration follows after the first steps")
        if config.preset is not None:
            recipe = preset(config.preset, config.model_dump())
            differs = "; not published, or not as published:" * bool(recipe.differs)
            note(f"preset {config.preset}: {recipe.source}{differs}")
            for name, value in recipe.differs.items():
                note(f"  {name}: {value}")
        display = Display(config, device.type == "cpu", " ".join(["noisysam", *map(shlex.quote, sys.argv[1:])]))
        uri = store_uri(tracking_uri, no_track)
        try:
            result = fit(
                config, store=store, tracker=tracker_for(uri, experiment), progress=display, processes=processes
            )
        finally:
            display.close()
    recall.remember(store, given, result.key)
    _told(result.record, RunFolder(store, result.key), as_json)
    if uri is not None and not as_json:
        _show_page(RunFolder(store, result.key), uri, experiment, tracking_uri)


def _told(record: Mapping[str, Any], folder: "RunFolder", as_json: bool) -> None:
    """Print the result of a run."""
    if as_json:
        click.echo(json.dumps({"folder": str(folder.path), **record}))
        return
    show_result(record, folder.collapsed)
    click.echo(f"noisysam compare {record['key']} RUN shows it beside another run", err=True)
    if record["config"].get("noise_type") == "given" and record["config"].get("snapshots"):
        click.echo(f"noisysam suspects {record['key']} finds labels that are probably wrong", err=True)


BLIND = "blind (neither method nor settings were told anything about the noise)"


def show_result(record: Mapping[str, Any], collapsed: bool | None = None) -> None:
    """Print the results of a run. ``collapsed``: whether its predictions fell to one class, if that is known."""
    from noisysam.runs.measures import EVALUATED_AT_THE_END, MEASURE
    from noisysam.runs.summary import COLLAPSED
    from noisysam.training.progress import duration, percent

    figures, spent, noise = record["results"], record["cost"], record["noise"]
    flips = f"{percent(noise['flip_rate'])} % of the labels are wrong"
    if noise["flip_rate"] is None:
        flips = "how many labels are wrong is not known"
    elif not noise["flip_rate"]:
        flips = "no noise was added to the labels of the data set"
    click.echo(f"run {record['key']}: {record['name']}")
    click.echo(f"  {flips}; {'oracle: ' + '; '.join(record['oracle']) if record['oracle'] else BLIND}")
    click.echo(f"  clean test accuracy, last epoch      {percent(figures['last'])} %")
    several = min(EVALUATED_AT_THE_END, record["config"].get("epochs", EVALUATED_AT_THE_END))
    if several > 1:
        click.echo(f"  {f'mean of the last {several} epochs':36} {percent(figures['last_ten'])} %")
    if figures.get("selected") is not None:
        chosen = f"epoch {figures['selected_epoch'] + 1}"
        click.echo(f"  selected on noisy validation         {percent(figures['selected'])} %  ({chosen})")
    click.echo(
        f"  best on test (oracle)                {percent(figures['best'])} %  (epoch {figures['best_epoch'] + 1})"
    )
    for name in ("memorised", "recovered"):
        value = figures.get(name)
        shown = "not measured" if value is None or value != value else f"{percent(value)} %"
        click.echo(f"  {MEASURE[name].short:36} {shown}")
    passes = f"{spent['gradient_evaluations']:.2f} gradient evaluations per image"
    if collapsed:
        click.echo(f"  collapsed: nearly all test images (at least {percent(COLLAPSED)} %) are predicted as one class")
    click.echo(
        f"  {duration(spent['train_seconds'])} of training, {spent['images_per_second']:.0f} images/s, {passes}"
        f" ({spent['gradient_samples']:,} in all), {record['resolved']['precision']} on {record['resolved']['device']}"
    )


def _show_page(folder: Any, uri: str, experiment: str, given: str | None) -> None:
    """Print where the run is in MLflow, if it was sent."""
    from noisysam.tracking.address import shown
    from noisysam.tracking.pages import run_page

    page = run_page(folder, experiment)
    if page is not None and uri.startswith("http"):
        click.echo(f"  MLflow: {shown(uri).rstrip('/')}{page}")
    elif page is not None:
        option = "" if given is None else f" --tracking-uri {shlex.quote(shown(uri))}"
        click.echo(f"  MLflow: {page}  (while `noisysam ui{option}` is running, at the address that it prints)")


@cli.command(short_help="Compare runs in the terminal.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...", shell_complete=completion.runs)
@store_option
@json_option
def compare(runs: tuple[str, ...], store: Path, as_json: bool) -> None:
    """Show the settings in which finished runs differ, and their results. RUN is a run key or a unique prefix of one.

    Results of the second and later runs include the difference from the first.
    """
    from noisysam.runs import compare as comparison
    from noisysam.runs.record import find_run

    folders = [find_run(store, run) for run in runs]
    table = comparison.compare(folders)
    if as_json:
        click.echo(json.dumps(table.set_index("run").to_dict()))
    else:
        click.echo(table.to_markdown(index=False, disable_numparse=True))
        click.echo("\nblind: neither method nor settings were told anything about the noise; oracle: they were")
        from noisysam.tracking.pages import comparison as comparison_page

        page = comparison_page(folders)
        if page is not None:
            click.echo(f"\nin MLflow, while `noisysam ui` is running: {page}")


@cli.command(cls=ProbeCommand, short_help="Measure properties of trained networks.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=completion.runs)
@store_option
@tracked
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto")
@click.option("--plugin", type=click.Path(path_type=Path), help="Python file that the runs were trained with")
@click.option("--option", multiple=True, metavar="KEY=VALUE", help="see `noisysam list probes`; may be repeated")
@click.option("--out", type=click.Path(path_type=Path), help="folder for figures of the runs side by side")
@json_option
def probe(
    runs: tuple[str, ...],
    names: tuple[str, ...],
    store: Path,
    tracking_uri: str | None,
    no_track: bool,
    option: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Probe the trained networks of finished runs. RUN is a run key or a unique prefix of one.

    Results are stored with the run, sent to its MLflow run and included in the reports of its studies. Results that
    exist are not computed again.
    """
    from noisysam import probes
    from noisysam.core.errors import UserError
    from noisysam.report import probe_figures
    from noisysam.training.progress import note

    if not names:
        raise UserError(f"choose at least one probe: {', '.join(f'--{name}' for name in probes.PROBES)}")
    options = pairs("--option", option)
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        note(f"probing run {run}: {', '.join(names)}")
        written = probes.probe(store, run, names, options, **where)
        key = next(iter(written.values()))["key"]
        found[key] = written
        for name, content in written.items():
            probe_figures.write(name, {content["name"]: content["results"]}, store / key / "probes")
        if not as_json:
            click.echo(f"run {key}: {next(iter(written.values()))['name']}")
            for name, content in written.items():
                for figure, value in content["scalars"].items():
                    click.echo(f"  {name}.{figure:40} {value:.4g}")
    if out is not None:
        for name in names:
            named = {f"{written[name]['name']} ({key[:8]})": written[name]["results"] for key, written in found.items()}
            for path in probe_figures.write(name, named, out):
                note(f"written to {path}")
    if not no_track:
        from noisysam import tracking

        tracking.sync_store(store, tracking.default_uri(tracking_uri), keys=found, wait=tracking.limit())
    if as_json:
        click.echo(json.dumps(found))
