"""Commands on runs: train one, compare some, look inside them."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from noisysam.cli.base import cli, json_option, store_option, store_uri, tracked
from noisysam.cli.options import ConfigCommand, ProbeCommand, configured, pairs


@cli.command(cls=ConfigCommand, short_help="Train one configuration.")
@store_option
@tracked
@click.option("--experiment", default="noisysam", show_default=True, help="MLflow experiment")
@json_option
def run(store: Path, tracking_uri: str | None, no_track: bool, experiment: str, as_json: bool, **flags: Any) -> None:
    """Train one configuration; a finished one is shown as stored, an interrupted one resumes."""
    from noisysam.runs.config import validate
    from noisysam.runs.presets import PRESETS
    from noisysam.runs.summary import run_name
    from noisysam.studies.sweep import tracker_for
    from noisysam.training.devices import resolve_device
    from noisysam.training.distributed import ProcessGroup
    from noisysam.training.fit import fit
    from noisysam.training.progress import Display, note

    with ProcessGroup.of_torchrun() as processes:  # of several processes the first alone is seen
        config = validate(configured(flags))
        if not processes.first:
            fit(config, store=store, processes=processes)
            return
        device = resolve_device(config.device)
        note(f"{run_name(config)}: a forecast follows the first steps")
        if config.preset is not None:
            preset = PRESETS[config.preset]
            unpublished = "; not published, and set by us:" * bool(preset.unpublished)
            note(f"preset {config.preset}: {preset.source}{unpublished}")
            for name, value in preset.unpublished.items():
                note(f"  {name}: {value}")
        display = Display(config, device.type == "cpu", " ".join(["noisysam", *map(shlex.quote, sys.argv[1:])]))
        uri = store_uri(tracking_uri, no_track, experiment)
        try:
            result = fit(
                config, store=store, tracker=tracker_for(uri, experiment), progress=display, processes=processes
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the last whole epoch is saved: the same command resumes") from None
        finally:
            display.close()
    if not as_json:
        show_result(result.record)
    else:
        click.echo(json.dumps({"key": result.key, "folder": str(result.folder), **result.record}))


def show_result(record: dict[str, Any]) -> None:
    """A run's figures, as a person reads them."""
    from noisysam.runs.measures import MEASURE
    from noisysam.training.progress import duration, percent

    figures, spent, noise = record["results"], record["cost"], record["noise"]
    flips = f"{percent(noise['flip_rate'])} % of the labels are wrong"
    click.echo(f"run {record['key']}: {record['name']}")
    click.echo(f"  {flips}; {'oracle: ' + '; '.join(record['oracle']) if record['oracle'] else 'blind'}")
    click.echo(f"  clean test accuracy, last epoch      {percent(figures['last'])} %")
    click.echo(f"  mean of the last ten epochs          {percent(figures['last_ten'])} %")
    if figures.get("selected") is not None:
        chosen = f"epoch {figures['selected_epoch'] + 1}"
        click.echo(f"  selected on noisy validation         {percent(figures['selected'])} %  ({chosen})")
    click.echo(
        f"  best on test (oracle)                {percent(figures['best'])} %  (epoch {figures['best_epoch'] + 1})"
    )
    for name in ("memorised", "recovered"):
        click.echo(f"  {MEASURE[name].short:36} {percent(figures[name])} %")
    passes = f"{spent['gradient_evaluations']:.2f} gradient evaluations per image"
    click.echo(
        f"  {duration(spent['train_seconds'])} of training, {spent['images_per_second']:.0f} images/s, {passes}"
        f" ({spent['gradient_samples']:,} in all), {record['resolved']['precision']} on {record['resolved']['device']}"
    )


@cli.command(short_help="Runs side by side, in the terminal.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@store_option
@json_option
def compare(runs: tuple[str, ...], store: Path, as_json: bool) -> None:
    """Where finished runs differ in their settings, and their figures; a RUN is a key, or the beginning of one.

    The figures of the second run and later carry their difference from the first.
    """
    from noisysam.runs import compare as comparison
    from noisysam.runs.record import find_run

    folders = [find_run(store, run) for run in runs]
    table = comparison.compare(folders)
    if as_json:
        click.echo(json.dumps(table.set_index("run").to_dict()))
    else:
        click.echo(table.to_markdown(index=False, disable_numparse=True))
        from noisysam.tracking.pages import comparison as comparison_page

        page = comparison_page(folders)
        if page is not None:
            click.echo(f"\nin MLflow, while `noisysam ui` serves: {page}")


@cli.command(cls=ProbeCommand, short_help="Look inside trained networks.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@store_option
@tracked
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto")
@click.option("--plugin", type=click.Path(path_type=Path), help="Python file that the runs were trained with")
@click.option("--option", multiple=True, metavar="KEY=VALUE", help="see `noisysam list probes`; repeatable")
@click.option("--out", type=click.Path(path_type=Path), help="draw the landscapes of the runs side by side, in here")
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
    """Probe the trained networks of finished RUNs (keys, or the beginnings of keys).

    Results are kept with each run, sent to its MLflow run and shown in the reports of its studies. What is there is
    not computed again.
    """
    from noisysam import probes
    from noisysam.core.errors import UserError
    from noisysam.probes import landscape
    from noisysam.training.progress import note

    if not names:
        raise UserError(f"name what to look at: {', '.join(f'--{name}' for name in probes.PROBES)}")
    if out is not None and "landscape" not in names:
        raise UserError("--out draws landscapes: give --landscape too")
    options = pairs("--option", option)
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        note(f"probing run {run}: {', '.join(names)}")
        written = probes.probe(store, run, names, options, **where)
        key = next(iter(written.values()))["key"]
        found[key] = written
        if not as_json:
            click.echo(f"run {key}: {next(iter(written.values()))['name']}")
            for name, content in written.items():
                for figure, value in content["scalars"].items():
                    click.echo(f"  {name}.{figure:40} {value:.4g}")
    if out is not None:
        own = {k: v for k, v in options.items() if k in probes.PROBES["landscape"].Options.model_fields}
        for path in landscape.compare(store, list(found), out, own, **where):
            note(f"written to {path}")
    if not no_track:
        from noisysam import tracking

        tracking.sync_store(store, tracking.default_uri(tracking_uri), keys=found)
    if as_json:
        click.echo(json.dumps(found))
