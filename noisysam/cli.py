"""The command line. Parsing and printing only; nothing heavy is imported before a command runs.

Results go to stdout, progress and logs to stderr. Exit codes: 0, 1 for a run that failed, 2 for wrong usage, 130 after
Ctrl-C.
"""

import json
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import click

from noisysam import __version__
from noisysam.errors import RunFailed, UserError
from noisysam.flags import ConfigCommand, configured

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


@cli.command(cls=ConfigCommand, short_help="Train one configuration.")
@store_option
@tracked
@click.option("--experiment", default="noisysam", show_default=True, help="MLflow experiment")
@json_option
def run(store: Path, tracking_uri: str | None, no_track: bool, experiment: str, as_json: bool, **flags: Any) -> None:
    """Train one configuration; a finished one is shown as stored, an interrupted one resumes."""
    from noisysam.config import PRESETS, validate
    from noisysam.distributed import Ranks
    from noisysam.hardware import resolve_device
    from noisysam.outcome import run_name
    from noisysam.progress import Display, note
    from noisysam.sweep import tracker_for
    from noisysam.train import fit

    with Ranks.of_torchrun() as ranks:  # of several processes the first alone is seen
        config = validate(configured(flags))
        if not ranks.first:
            fit(config, store=store, ranks=ranks)
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
        uri = _store_uri(tracking_uri, no_track, experiment)
        try:
            result = fit(config, store=store, tracker=tracker_for(uri, experiment), watch=display, ranks=ranks)
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
    from noisysam.progress import duration, percent

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
    click.echo(
        f"  wrong labels learnt / put right      {percent(figures['memorised'])} / {percent(figures['recovered'])} %"
    )
    passes = f"{spent['gradient_evaluations']:.2f} gradient evaluations per image"
    click.echo(
        f"  {duration(spent['train_seconds'])} of training, {spent['images_per_second']:.0f} images/s, {passes}"
        f" ({spent['gradient_samples']:,} in all), {record['resolved']['precision']} on {record['resolved']['device']}"
    )


def _store_uri(tracking_uri: str | None, no_track: bool, experiment: str) -> str | None:
    """The tracking store, opened (created and migrated) before anything starts; None where tracking is off. A store
    that is away does not stop a training."""
    if no_track:
        return None
    from noisysam import tracking
    from noisysam.progress import note

    uri = tracking.default_uri(tracking_uri)
    try:
        tracking.open_store(uri, experiment)
    except RunFailed as error:
        note(f"noisysam: warning: {error}; training goes on, and `noisysam track --sync` sends the record later")
    return uri


@cli.command(short_help="SGD and SAM on real handwritten digits, in three minutes.")
@store_option
@tracked
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="runs at a time (Ray)")
@click.option("--reports", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
def demo(store: Path, tracking_uri: str | None, no_track: bool, jobs: int, reports: Path) -> None:
    """Train SGD and SAM on scikit-learn's digits at four noise rates, two seeds each; print the table."""
    from noisysam import engines, study

    path = bundled("demo")
    cells = study.plan(path)
    study.save(path, cells, store)
    uri = _store_uri(tracking_uri, no_track, "demo")
    # one thread: 8x8 images do not pay for more, and beside other work two threads can be twenty times slower
    with closing(engines.choose(None, store.absolute(), jobs, cpus=1)) as engine:
        _raise_failed(_train("demo", cells, store.absolute(), engine, uri))
    _report("demo", store, reports, as_json=False)
    if uri is not None:
        click.echo(
            f"\nSee the runs side by side:  noisysam ui{'' if tracking_uri is None else f' --tracking-uri {uri}'}"
        )


def bundled(name: str) -> Path:
    """A study that comes with noisysam, beside the package in a checkout or inside it when installed."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "experiments", here / "experiments"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UserError(f"no study file {name!r}: give the path of a YAML file")


@cli.command(short_help="Train a study of many runs.")
@click.argument("file")
@store_option
@tracked
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets, for every cell")
@click.option(
    "--engine", type=click.Choice(["inline", "ray", "slurm"]),
    help="inline: one run at a time, here; ray: many, each in a process of its own, here or on a cluster; slurm: a job "
    "array. On a cluster --store must be a folder that all machines share  [default: ray with --jobs, else inline]",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), help="runs at a time at most  [default: as many as there is room for]")
@click.option(
    "--cpus-per-run", "cpus", type=click.FloatRange(0, min_open=True),
    help="cores, and so threads, of a run  [default: 1; inline: all]",
)  # fmt: skip
@click.option(
    "--gpus-per-run", "gpus", type=click.FloatRange(0),
    help="GPUs of a run; with Ray a fraction packs several runs on one  [default: 1 where there are any]",
)  # fmt: skip
@click.option("--address", help="Ray cluster to join: auto, or host:port of its head")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="option of sbatch: partition=gpu; repeatable")
@click.option(
    "--only", multiple=True, metavar="FIELD=VALUE",
    help="cells with this row, or this value of a field: row=SAM, noise=0.8, seed=1; repeatable, all must fit",
)  # fmt: skip
@click.option("--shard", metavar="I/N", help="the I-th of N parts of the study, of about the same cost")
@click.option(
    "--limit-minutes", "limit", type=click.FloatRange(0, min_open=True),
    help="stop cleanly after this time, at the end of an epoch; the same command goes on",
)  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="try failed cells again, beyond the study's `retries`")
@click.option("--dry-run", is_flag=True, help="list the cells and what is left to do")
@click.option("--status", is_flag=True, help="how the study stands, from any terminal")
@click.option(
    "--search", "searched", metavar="FIELD=LOW:HIGH[:log]",
    help="tune a field for each row on noisy validation labels instead (Optuna); writes a tuned study file",
)  # fmt: skip
@click.option("--trials", type=click.IntRange(1), default=10, show_default=True, help="values that --search tries")
def sweep(
    file: str,
    store: Path,
    tracking_uri: str | None,
    no_track: bool,
    data_dir: Path | None,
    only: tuple[str, ...],
    shard: str | None,
    limit: float | None,
    retry_failed: bool,
    dry_run: bool,
    status: bool,
    searched: str | None,
    trials: int,
    **how: Any,
) -> None:
    """Train the cells of a study FILE (a YAML, or the name of a bundled study); finished cells are skipped.

    A run that fails is told at the end, with exit code 1; the others go on. Whatever stopped a sweep, the same command
    goes on with it, and several sweeps of one study may run at a time.
    """
    from noisysam import engines, study
    from noisysam import sweep as sweeps

    path = Path(file) if Path(file).suffix or Path(file).exists() else bundled(file)
    store = store.absolute()
    if status:
        _status(path.stem, sweeps.select(study.load(store, path.stem), only, shard), store)
        return
    plan = study.plan(path, data_dir)
    cells = sweeps.select(plan, only, shard)
    if dry_run:
        _list_cells(cells, store)
        return
    deadline = None if limit is None else time.time() + 60 * limit
    with closing(engines.choose(how.pop("engine"), store, **how)) as engine:
        if searched is not None:
            uri = _store_uri(tracking_uri, no_track, f"{path.stem}-search")
            _search(path, cells, store, engine, uri, searched, trials, deadline)
            return
        study.save(path, plan, store)
        uri = _store_uri(tracking_uri, no_track, path.stem)
        done = _train(path.stem, cells, store, engine, uri, study.read(path).retries, retry_failed, deadline)
    _raise_failed(done)
    if done.left:
        _note_left(done.left, len(cells))
    else:
        click.echo(f"noisysam report {path.stem}")


def _note_left(left: int, of: int) -> None:
    """Say that the time was up."""
    from noisysam.progress import note

    note(f"the time was up: {left} of {of} cells are left, the same command goes on with them")


def _status(name: str, cells: Sequence[Any], store: Path) -> None:
    from rich.console import Console

    from noisysam import board

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # nobody folds the lines of a file
    console.print(board.status(name, cells, store))


def _list_cells(cells: Sequence[Any], store: Path) -> None:
    from noisysam import sweep as sweeps
    from noisysam.progress import duration

    states = {cell.key: sweeps.state(cell, store) for cell in cells}
    for cell in cells:
        click.echo(f"{cell.key}  {'finished' if states[cell.key] == 'finished' else 'to do   '}  {cell.label}")
    left = sum(state != "finished" for state in states.values())
    seconds = sweeps.forecast(cells, store, states)
    cost = (
        "cost unknown until a cell of each row has run" if seconds is None else f"about {duration(seconds)} one by one"
    )
    click.echo(f"{len(cells)} cells, {left} to do" + (f": {cost}" if left else ""))


def _train(
    name: str,
    cells: Sequence[Any],
    store: Path,
    engine: Any,
    uri: str | None,
    retries: int = 0,
    retry_failed: bool = False,
    deadline: float | None = None,
    blind: bool = False,
) -> Any:
    """Train the unfinished cells, and tell what happens (``blind``: but no test accuracies); the sweep at its end."""
    from noisysam import board
    from noisysam import sweep as sweeps
    from noisysam.progress import note, percent
    from noisysam.records import RunFolder

    parent = _parent(uri, name)
    show = not engine.parallel and not sys.stderr.isatty()
    job = sweeps.TrainCell(store, uri, name, parent, engine.threads, show and not blind, deadline)
    running = sweeps.Sweep(cells, store, job, engine, retries, retry_failed, deadline)
    note(f"{name}: {len(cells)} cells, {running.left} to do")
    try:
        with board.live(name, running):
            for outcome in running.run():
                what = outcome.error or board.SAID[outcome.state]
                if outcome.state == "finished" and not blind:
                    record = RunFolder(store, outcome.cell.key).record or {}
                    what = f"{percent(record['results']['last'])} % at the last epoch"
                elif outcome.state == "again":
                    what += " (tried again)"
                note(f"[{running.finished}/{len(cells)}] {outcome.cell.label}: {what}")
    finally:
        if uri is not None:
            _sync(name, running, uri, parent)
    return running


def _parent(uri: str | None, name: str) -> str | None:
    """The study's run in MLflow; None without tracking, and where the store is away."""
    if uri is None:
        return None
    from noisysam import tracking

    try:
        return tracking.open_study(uri, name)
    except RunFailed:
        return None


def _sync(name: str, sweep: Any, uri: str, parent: str | None) -> None:
    """Send what did not get to MLflow, and end the study's run there."""
    from noisysam import tracking

    parent = parent or _parent(uri, name)
    if parent is None:
        return
    tracking.sync_study(sweep.store, {cell.key: cell.row for cell in sweep.cells}, uri, name, parent)
    counts = {"finished": sweep.finished, "failed": len(sweep.failed), "left": sweep.left}
    tracking.close_study(uri, parent, counts)


def _raise_failed(sweep: Any) -> None:
    if sweep.failed:
        first = next(iter(sweep.failed.values()))
        raise RunFailed(
            f"{len(sweep.failed)} of {len(sweep.cells)} cells failed, first {first.cell.label}: {first.error}"
        )


def _search(
    path: Path,
    cells: Sequence[Any],
    store: Path,
    engine: Any,
    uri: str | None,
    searched: str,
    trials: int,
    deadline: float | None,
) -> None:
    """Tune one field for each row; print what was found and write the tuned study beside the others here."""
    from noisysam import search, study
    from noisysam.progress import percent

    asked, retries = search.Range.parse(searched), study.read(path).retries
    rows = search.rows(path, cells, asked, store)

    def train(some: list[Any]) -> list[Any]:
        done = _train(f"{path.stem}-search", some, store, engine, uri, retries, deadline=deadline, blind=True)
        return list(done.failed.values())

    whole = search.search(rows, trials, store, engine.width(), train)
    found = [best for row in rows if (best := row.best()) is not None]
    for best in found:
        present = "" if best.present is None else f", {percent(best.present)} % as it is"
        accuracy = f"{percent(best.accuracy)} % on noisy validation labels{present}"
        click.echo(f"{best.row}: {asked.field} {best.value:g}, {accuracy}; {best.trials} trials")
    if not whole:
        left = sum(trials - len(row.trials("COMPLETE", "PRUNED")) for row in rows)
        _note_left(left, trials * len(rows))
    elif found:
        target = Path(f"{path.stem}-{asked.field.replace('.', '-')}.yaml")
        target.write_text(search.tuned(path, target, asked, found, cells))
        click.echo(f"noisysam sweep {target}")


@cli.command(short_help="Tables and figure of a study.")
@click.argument("study")
@store_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
@json_option
def report(study: str, store: Path, out: Path, as_json: bool) -> None:
    """Write the report of STUDY from its finished runs, and print its tables."""
    _report(study, store, out, as_json)


def _report(study: str, store: Path, out: Path, as_json: bool) -> None:
    from noisysam.report import report as write_report

    written = write_report(store, study, out)
    if as_json:
        click.echo(json.dumps({"study": study, "folder": str(out / study), "table": written.summary}))
        return
    click.echo(written.text)
    click.echo(f"written to {out / study}")


@cli.command("export", short_help="Copy a study's records out of the store.")
@click.argument("study")
@click.argument("target", type=click.Path(path_type=Path))
@store_option
@click.option("--weights", is_flag=True, help="the trained weights too")
def export(study: str, target: Path, store: Path, weights: bool) -> None:
    """Copy the finished runs of STUDY to the folder TARGET: records, label files, configurations, digests."""
    from noisysam.records import export_study

    click.echo(f"{export_study(store, study, target, weights)} finished runs of {study} are in {target}")


@cli.command("import", short_help="Take exported records into the store.")
@click.argument("source", type=click.Path(path_type=Path))
@store_option
def import_(source: Path, store: Path) -> None:
    """Take the exported runs in the folder SOURCE into the store; they are not run again."""
    from noisysam.records import import_study

    click.echo(f"{import_study(source, store)} new runs are in {store}")


@cli.group(short_help="Make, show and verify label files.")
def noise() -> None:
    """Noisy labels as files: made once, shared, verified."""


@noise.command("make")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path))
@click.option("--type", "kind", default="symmetric", show_default=True, help="see `noisysam list noise`")
@click.option("--rate", type=float, default=0.0, show_default=True, help="share of selected samples")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--draw", type=click.Choice(["exact", "bernoulli"]), default="exact", show_default=True)
@json_option
def noise_make(
    file: Path, dataset: str, data_dir: Path | None, kind: str, rate: float, seed: int, draw: str, as_json: bool
) -> None:
    """Draw noisy labels for a data set and write FILE (.npz) and a CSV beside it."""
    from noisysam import data
    from noisysam import noise as labels

    if file.suffix != ".npz":
        raise UserError(f"{file}: a label file ends in .npz")
    of = data.load(dataset, data_dir)
    noisy = labels.make(
        kind, of.train_labels.numpy(), of.classes, rate=rate, seed=seed, draw=draw,
        images=of.train_images.numpy() if kind == "instance" else None, superclasses=of.superclasses, data_dir=data_dir,
    )  # fmt: skip
    labels.save(noisy, file)
    _show_card(noisy.card(), as_json)


@noise.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def noise_show(file: Path, as_json: bool) -> None:
    """The card of a label file: rates, matrix, digests."""
    from noisysam import noise as labels

    _show_card(labels.load(file).card(), as_json)


def _show_card(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(card))
        return
    for name, value in card.items():
        if not isinstance(value, list):
            click.echo(f"{name:20} {value}")
    for name in (n for n, v in card.items() if isinstance(v, list)):
        click.echo(name)
        for row in card[name] if isinstance(card[name][0], list) else [card[name]]:
            click.echo("  " + " ".join(f"{v:6.3f}" for v in row))


@noise.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dataset", help="compare with this data set's labels")
@click.option("--data-dir", type=click.Path(path_type=Path))
def noise_verify(file: Path, dataset: str | None, data_dir: Path | None) -> None:
    """Check a label file against its digests, its definition and a data set."""
    from noisysam import data
    from noisysam import noise as labels

    clean = None if dataset is None else data.load(dataset, data_dir).train_labels.numpy()
    for line in labels.verify(file, clean):
        click.echo(f"ok  {line}")


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
@click.option("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(tracking_uri: str | None, host: str, port: int) -> None:
    """Serve the MLflow UI until Ctrl-C."""
    from noisysam import tracking

    tracking.ui(tracking.default_uri(tracking_uri), port, host)


@cli.command("list", short_help="Methods, optimizers, models, data sets, noise.")
@click.argument("what", type=click.Choice(["methods", "optimizers", "models", "datasets", "noise"]))
@click.option("--plugin", type=click.Path(path_type=Path), help="list what this Python file registers, too")
@json_option
def list_(what: str, plugin: Path | None, as_json: bool) -> None:
    """Every component of a kind: a line, its options and its source."""
    from noisysam import plugins
    from noisysam.listing import details, entries

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
    from noisysam.listing import diagnosis

    found = diagnosis(data_dir)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:20} {value}")


def _warn(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; those of libraries are theirs."""
    if issubclass(category, UserWarning):
        click.echo(f"noisysam: warning: {str(message).splitlines()[0]}", err=True)


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt("stopped; the last whole epoch is saved: the same command resumes")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every error is one line on stderr."""
    warnings.showwarning = _warn
    signal.signal(signal.SIGTERM, _stop)  # a scheduler's request ends a run as Ctrl-C does
    sys.exit(_run(arguments))


def _run(arguments: Iterable[str] | None) -> int:
    try:
        result = cli.main(list(arguments) if arguments is not None else None, "noisysam", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group without a command: its help
            click.echo(message, err=True)
            return error.exit_code
        return _fail(" ".join(message.split()), error.exit_code)
    except UserError as error:
        return _fail(str(error), 2)
    except RunFailed as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort) as error:
        return _fail(str(error.__cause__ or error) or "stopped", 130)  # click puts its own exception above ours
    except OSError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("NOISYSAM_TRACEBACK"):
            raise
        line = next(iter(str(error).splitlines()), "")
        return _fail(f"unexpected {type(error).__name__}: {line} (NOISYSAM_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"noisysam: {message.splitlines()[0] if message else 'failed'}", err=True)
    return code
