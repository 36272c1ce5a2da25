"""Commands for studies: demo, sweep, report, export and import."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from noisysam.cli import completion
from noisysam.cli.base import cli, json_option, store_option, store_uri, tracked
from noisysam.core import plugins
from noisysam.core.errors import RunFailed, UserError


@cli.command(short_help="Train SGD and SAM on handwritten digits, in about three minutes.")
@store_option
@tracked
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="runs at a time (uses Ray)")
@click.option("--reports", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
def demo(store: Path, tracking_uri: str | None, no_track: bool, jobs: int, reports: Path) -> None:
    """Train SGD and SAM on scikit-learn's digits at four noise rates with two seeds, and print a table."""
    from noisysam.studies import plan as plans
    from noisysam.studies.engines import choice

    path = bundled("demo")
    cells = plans.plan(path)
    plans.save(path, cells, store)
    uri = store_uri(tracking_uri, no_track)
    # one thread: 8x8 images do not gain from more, and on a busy machine two threads can be twenty times slower
    with closing(choice.choose(None, store.absolute(), jobs, cpus=1)) as engine:
        _raise_failed(_train("demo", cells, store.absolute(), engine, uri))
    _report("demo", store, reports, as_json=False, uri=uri)
    if uri is not None:
        click.echo(
            f"\nTo see the runs in MLflow:  noisysam ui{'' if tracking_uri is None else f' --tracking-uri {uri}'}"
        )


def bundled(name: str) -> Path:
    """The path of a study that is part of noisysam: beside the package in a checkout, inside it if installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "experiments", package / "experiments"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UserError(f"there is no study named {name!r}: give the path of a YAML file")


@cli.command(short_help="Train a study of many runs.")
@click.argument("file")
@store_option
@tracked
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets")
@click.option(
    "--engine", type=click.Choice(["inline", "ray", "slurm"]),
    help="inline: one run at a time, in this process; ray: several, each in its own process, on this machine or a "
    "cluster; slurm: a job array. On a cluster, --store must be a folder that all machines share  [default: ray with "
    "--jobs, else inline]",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), help="largest number of runs at a time  [default: as many as fit]")
@click.option(
    "--cpus-per-run", "cpus", type=click.FloatRange(0, min_open=True),
    help="cores, and therefore threads, per run  [default: 1; inline: all]",
)  # fmt: skip
@click.option(
    "--gpus-per-run", "gpus", type=click.FloatRange(0),
    help="GPUs per run; with Ray, a fraction places several runs on one GPU  [default: 1 if there are any]",
)  # fmt: skip
@click.option("--address", help="Ray cluster to connect to: auto, or HOST:PORT of its head node")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="option of sbatch, such as partition=gpu; repeatable")
@click.option(
    "--only", multiple=True, metavar="FIELD=VALUE",
    help="train only cells with this row or this value of a field: row=SAM, noise=0.8, seed=1; repeatable, and several "
    "values of one field are alternatives",
)  # fmt: skip
@click.option("--shard", metavar="I/N", help="train the I-th of N parts of about equal cost")
@click.option(
    "--limit-minutes", "limit", type=click.FloatRange(0, min_open=True),
    help="stop at the end of an epoch once this time is up; the same command continues",
)  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="retry failed cells, beyond the study's `retries`")
@click.option("--dry-run", is_flag=True, help="list the cells and estimate the remaining cost")
@click.option("--status", is_flag=True, help="show the state of the study; works from any terminal")
@click.option(
    "--search", "searched", metavar="FIELD=LOW:HIGH[:log]", multiple=True,
    help="tune a field for each row on noisy validation labels instead, and write a study file; repeatable",
)  # fmt: skip
@click.option("--trials", type=click.IntRange(1), default=10, show_default=True, help="values per row for --search")
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
    searched: tuple[str, ...],
    trials: int,
    **how: Any,
) -> None:
    """Train the cells of a study. FILE is a YAML file, or the name of a study that is part of noisysam.

    Finished cells are skipped and interrupted ones resume, so the same command continues a sweep that was stopped. A
    failed run does not stop the others; failures are listed at the end, with exit code 1. Several sweeps of one study
    may run at the same time. A study with a search trains its trials first.
    """
    from noisysam.studies import plan as plans
    from noisysam.studies import selection, study_file, tuning
    from noisysam.studies.engines import choice

    path = Path(file) if Path(file).suffix or Path(file).exists() else bundled(file)
    store = store.absolute()
    if status:
        name = study_file.study_name(path)
        _status(name, selection.select(plans.load(store, name), only, shard), store)
        return
    plan = plans.plan(path, data_dir)
    rows = tuning.rows(path, [tuning.Range.parse(text) for text in searched], trials, data_dir)
    if rows and tuning.over(rows, store):
        plan = tuning.chosen(rows, plan, store)
    cells = selection.select(plan, only, shard)
    if dry_run:
        _list_cells([*tuning.trials(rows), *([] if searched else cells)], store)
        return
    deadline = None if limit is None else time.time() + 60 * limit
    with closing(choice.choose(how.pop("engine"), store, **how)) as engine:
        uri = store_uri(tracking_uri, no_track)
        if rows:
            _search(path, rows, store, engine, uri, deadline)
            if not tuning.over(rows, store):
                return
            if searched:
                _write_tuned(path, rows, store)
                return
            plan = tuning.chosen(rows, plan, store)
            cells = selection.select(plan, only, shard)
        selection.check_precision(plan)
        name = plans.save(path, plan, store, tuning.facts(rows, store))
        done = _train(name, cells, store, engine, uri, study_file.read(path).retries, retry_failed, deadline)
    _raise_failed(done)
    if done.left:
        _note_left(done.left, len(cells))
    else:
        click.echo(f"noisysam report {shlex.quote(name)}")


def _note_left(left: int, of: int) -> None:
    """Report that the time limit was reached."""
    from noisysam.training.progress import note

    note(f"time limit reached: {left} of {of} cells are left; the same command continues")


def _status(name: str, cells: Sequence[Any], store: Path) -> None:
    from rich.console import Console

    from noisysam.studies import status

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # do not wrap lines in files and pipes
    console.print(status.status(name, cells, store))


def _list_cells(cells: Sequence[Any], store: Path) -> None:
    from noisysam.studies import state as states
    from noisysam.studies.status import extent
    from noisysam.training.progress import duration

    found = {cell.key: states.state(cell, store) for cell in cells}
    for cell in cells:
        click.echo(f"{cell.key}  {'finished' if found[cell.key] == 'finished' else 'to do   '}  {cell.label}")
    left = sum(state != "finished" for state in found.values())
    seconds = states.forecast(cells, store, found)
    cost = (
        "cost unknown until one cell of each row has run"
        if seconds is None
        else f"about {duration(seconds)} one by one"
    )
    click.echo(f"{extent(cells)}, {left} to do" + (f": {cost}" if left else ""))


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
    """Train the unfinished cells and report progress (with ``blind``, without test accuracies); returns the sweep."""
    from noisysam.runs.record import RunFolder
    from noisysam.studies import status
    from noisysam.studies import sweep as sweeping
    from noisysam.training.progress import note, percent

    parent = _parent(uri, name, store)
    show = not engine.parallel and not sys.stderr.isatty()
    parents = _row_parents(uri, name, parent, cells)
    job = sweeping.TrainCell(store, uri, name, parents, engine.threads, show and not blind, deadline)
    running = sweeping.Sweep(cells, store, job, engine, retries, retry_failed, deadline)
    note(f"{name}: {len(running.cells)} cells, {running.left} to do")
    try:
        with status.live(name, running):
            for outcome in running.run():
                what = outcome.error or status.SAID[outcome.state]
                if outcome.state == "finished" and not blind:
                    folder = RunFolder(store, outcome.cell.key)
                    record = folder.sound_record
                    last = None if record is None else record["results"]["last"]
                    what = f"{percent(last)} % at the last epoch" + ", collapsed to one class" * bool(folder.collapsed)
                elif outcome.state == "again":
                    what += " (will be retried)"
                note(f"[{running.finished}/{len(running.cells)}] {outcome.cell.label}: {what}")
    finally:
        if uri is not None:
            _sync(name, running, uri, parent)
    return running


def _parent(uri: str | None, name: str, store: Path, wait: float | None = None) -> str | None:
    """The study's run in MLflow; None if tracking is off or the store cannot be reached."""
    if uri is None:
        return None
    from noisysam import tracking
    from noisysam.training.progress import note

    try:
        return tracking.open_study(uri, name, store, wait)
    except (RunFailed, UserError) as error:
        note(f"noisysam: warning: {error}; `noisysam sync` sends the records later")
        return None


def _row_parents(uri: str | None, name: str, parent: str | None, cells: Sequence[Any]) -> dict[str, str]:
    """The runs of the study's rows in MLflow, by row; empty if tracking is off or the store cannot be reached."""
    if uri is None or parent is None:
        return {}
    from noisysam import tracking
    from noisysam.training.progress import note

    try:
        return tracking.open_rows(uri, name, parent, [cell.row for cell in cells])
    except (RunFailed, UserError) as error:
        note(f"noisysam: warning: {error}; `noisysam sync` sends the records later")
        return {}


def _sync(name: str, sweep: Any, uri: str, parent: str | None) -> None:
    """Send records that are missing in MLflow, and end the study's run there; all of it within one limit."""
    from noisysam import tracking

    deadline = tracking.Deadline()
    parent = parent or _parent(uri, name, sweep.store, deadline.left())
    if parent is None:
        return
    rows = {cell.key: cell.row for cell in sweep.cells}
    tracking.sync_study(sweep.store, rows, uri, name, parent, wait=deadline.left())
    counts = {"finished": sweep.finished, "failed": len(sweep.failed), "left": sweep.left}
    tracking.close_study(uri, parent, counts, wait=deadline.left())


def _raise_failed(sweep: Any) -> None:
    if sweep.failed:
        first = next(iter(sweep.failed.values()))
        raise RunFailed(
            f"{len(sweep.failed)} of {len(sweep.cells)} cells failed, first {first.cell.label}: {first.error}"
        )


def _search(path: Path, rows: Sequence[Any], store: Path, engine: Any, uri: str | None, deadline: float | None) -> None:
    """Train the trials of the rows and print the best values."""
    from noisysam.studies import study_file, tuning
    from noisysam.training.progress import percent

    name, retries = study_file.study_name(path), study_file.read(path).retries

    def train(some: list[Any]) -> list[Any]:
        done = _train(f"{name}-search", some, store, engine, uri, retries, deadline=deadline, blind=True)
        return list(done.failed.values())

    tuning.search(rows, store, train)
    for best in (best for row in rows if (best := row.best(store)) is not None):
        present = "" if best.present is None else f", {percent(best.present)} % with the present value"
        accuracy = f"{percent(best.accuracy)} % on noisy validation labels{present}"
        values = ", ".join(f"{field} {value:g}" for field, value in best.values.items())
        click.echo(f"{best.row}: {values}, {accuracy}; {best.trials} trials")
    left = sum(row.trials - row.ended(store) for row in rows)
    if left:
        _note_left(left, sum(row.trials for row in rows))


def _write_tuned(path: Path, rows: Sequence[Any], store: Path) -> None:
    """Write a study file with the best values of its rows to the working directory."""
    from noisysam.studies import tuning

    found = [best for row in rows if (best := row.best(store)) is not None]
    if found:
        fields = "-".join(asked.field.replace(".", "-") for asked in rows[0].ranges)
        target = Path(f"{path.stem}-{fields}.yaml")
        target.write_text(tuning.tuned(path, target, found, rows))
        click.echo(f"noisysam sweep {target}")


@cli.command(short_help="Write tables, figures and verdicts of studies.")
@click.argument("studies", metavar="[STUDY...]", nargs=-1, shell_complete=completion.studies)
@store_option
@tracked
@click.option("--all", "every", is_flag=True, help="every study of the store")
@click.option("--from", "archive", type=click.Path(path_type=Path), help="read an exported archive, not the store")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
@click.option("--plugin", type=click.Path(path_type=Path), help="Python file that registers kinds of claims")
@json_option
def report(
    studies: tuple[str, ...],
    store: Path,
    tracking_uri: str | None,
    no_track: bool,
    every: bool,
    archive: Path | None,
    out: Path,
    plugin: Path | None,
    as_json: bool,
) -> None:
    """Write the report of each STUDY (a name, or a study file) from its finished runs, and print its tables. The
    report is attached to the study's MLflow run, if there is one."""
    from noisysam import tracking
    from noisysam.runs.record import study_names
    from noisysam.runs.transfer import import_study

    if bool(studies) == every:
        raise UserError("name the studies to report, or give --all")
    if plugin is not None:
        plugins.load(plugin)
    uri = None if no_track or archive is not None else tracking.default_uri(tracking_uri)
    with TemporaryDirectory() as temporary:
        if archive is not None:
            store = Path(temporary)
            import_study(archive, store)
        for study in map(_named, studies) if studies else study_names(store):
            _report(study, store, out, as_json, uri)


def _named(study: str) -> str:
    """The name of a study that is given by its name or by its file."""
    from noisysam.studies.study_file import study_name

    return study_name(Path(study)) if Path(study).suffix in (".yaml", ".yml") else study


def _report(study: str, store: Path, out: Path, as_json: bool, uri: str | None) -> None:
    from noisysam.report import report as write_report

    written = write_report(store, study, out)
    if uri is not None:
        from noisysam import tracking

        tracking.send_report(uri, study, written.folder, written.text)
    if as_json:
        click.echo(json.dumps({"study": study, "folder": str(out / study), "table": written.summary}))
        return
    click.echo(written.text)
    click.echo(f"written to {out / study}")


@cli.command("export", short_help="Copy the records of a study to a folder.")
@click.argument("study", shell_complete=completion.studies)
@click.argument("target", type=click.Path(path_type=Path))
@store_option
@click.option("--weights", is_flag=True, help="include the trained weights")
@click.option("--unfinished", is_flag=True, help="include the checkpoints of unfinished runs, to go on elsewhere")
def export(study: str, target: Path, store: Path, weights: bool, unfinished: bool) -> None:
    """Copy the finished runs of STUDY to the folder TARGET: records, label files, configurations, digests."""
    from noisysam.runs.transfer import export_study

    study = _named(study)
    click.echo(
        f"{export_study(store, study, target, weights, unfinished)} finished runs of {study} were copied to {target}"
    )


@cli.command("import", short_help="Add exported records to the store.")
@click.argument("source", type=click.Path(path_type=Path))
@store_option
@click.option("--as", "name", metavar="NAME", help="another name for the study in the store")
@click.option("--plugin", type=click.Path(path_type=Path), help="Python file that the runs were trained with")
@click.option("--unfinished", is_flag=True, help="take checkpoints too, to go on with runs that were interrupted")
@click.option("--check", is_flag=True, help="verify the archive and list what it holds; import nothing")
def import_(source: Path, store: Path, name: str | None, plugin: Path | None, unfinished: bool, check: bool) -> None:
    """Add the exported runs in the folder SOURCE to the store. A sweep then skips them. Every file is verified before
    anything is written."""
    from noisysam.runs import transfer

    if check:
        for line in transfer.contents(source, store, plugin):
            click.echo(line)
        return
    click.echo(f"{transfer.import_study(source, store, name, plugin, unfinished)} new runs were added to {store}")
