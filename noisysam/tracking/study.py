"""The MLflow run of a study, and transfers of many records."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.record import RunFolder
from noisysam.tracking import pages
from noisysam.tracking.address import EXPERIMENT, Warn, shown, sqlite_path, to_warnings
from noisysam.tracking.client import identifier, locked, one_line, open_store, reach
from noisysam.tracking.rows import Rows, places, searches, view_tags
from noisysam.tracking.state import LAYOUT, is_complete, probed, sent
from noisysam.tracking.tracker import NOTE, STATUS, Tracker


def sync_store(
    store: Path,
    uri: str,
    experiment: str | None = None,
    warn: Warn = to_warnings,
    keys: Iterable[str] | None = None,
    step: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """Send every record of ``store``, or those with these ``keys``, that is not in the MLflow store yet; returns the
    numbers (sent, failed).

    A record is sent to the experiment that it was sent to before or that it names, else to ``experiment``. Runs that
    are being trained are skipped. ``step`` is called before each record.
    """
    done = failed = 0
    reached: dict[str, bool] = {}
    found = (path.parent.name for path in store.glob("*/record.json"))
    for key in sorted(found if keys is None else keys):
        step()
        folder = RunFolder(store, key)
        try:
            state = sent(folder)
            record: Mapping[str, Any] = folder.record or {}
            home = state.get("experiment") or record.get("experiment") or experiment or EXPERIMENT
            for name in (home, *state.get("shared", {})):
                tracker = Tracker(folder, uri, name)
                if name not in reached:
                    reached[name] = reach(uri, name, warn)
                if not reached[name]:
                    failed += not tracker.done
                else:
                    with contextlib.ExitStack() as held:
                        done += _hold(folder, held) and tracker._send(final=True)
        except Exception as error:  # go on with the other records
            warn(f"run {folder.key} was not sent: {one_line(error)}")
            failed += 1
            reached.clear()  # if the store is the reason, the next record finds out
    return done, failed


def open_study(uri: str, study: str) -> str:
    """Return the MLflow run of a study, in the experiment of the same name; the runs of its cells are its children. It
    is found by its tags or created, and set to RUNNING. Raises the exceptions of ``open_store``."""
    experiment_id = open_store(uri, study)
    try:
        with locked(sqlite_path(uri)):
            client = MlflowClient(tracking_uri=uri)
            found = _study_runs(client, experiment_id, study)
            if not found:
                tags = {"mlflow.runName": study, "noisysam.kind": "study", "noisysam.study": study}
                mine = identifier(client.create_run(experiment_id, tags=tags).info.run_id)
                found = _study_runs(client, experiment_id, study) or [mine]
                if found[0] != mine:  # another machine created one at the same time
                    client.delete_run(mine)
            client.update_run(found[0], status="RUNNING")
            return found[0]
    except Exception as error:
        raise RunFailed(f"MLflow store {shown(uri)} cannot be used: {one_line(error)}") from error


def _study_runs(client: MlflowClient, experiment_id: str, study: str) -> list[str]:
    runs = client.search_runs([experiment_id], "tags.`noisysam.kind` = 'study'")
    mine = [run.info for run in runs if run.data.tags["noisysam.study"] == study]
    return [str(info.run_id) for info in sorted(mine, key=lambda info: (info.start_time, info.run_id))]


def close_study(uri: str, run_id: str, counts: Mapping[str, int], warn: Warn = to_warnings) -> None:
    """End the run of a study and log how many of its cells are ``finished``, ``failed`` and ``left``. If the store
    cannot be reached, ``warn`` gets a line and the run stays open until the next sweep."""
    now = round(time.time() * 1000)
    status = "failed" if counts["failed"] else "finished" if not counts["left"] else "stopped"
    try:
        client = MlflowClient(tracking_uri=uri)
        client.log_batch(run_id, metrics=[Metric(f"cells_{name}", n, now, 0) for name, n in counts.items()])
        client.set_terminated(run_id, STATUS.get(status, "KILLED"), now)
    except Exception as error:
        warn(f"the study's run in MLflow stays open ({one_line(error)})")


def open_rows(uri: str, study: str, parent_run_id: str, names: Sequence[str]) -> dict[str, str]:
    """The MLflow run of each row of a study, created if needed: name -> identifier."""
    experiment_id = open_store(uri, study)
    try:
        with locked(sqlite_path(uri)):
            return Rows(MlflowClient(tracking_uri=uri), experiment_id, study, parent_run_id).open(names)
    except Exception as error:
        raise RunFailed(f"MLflow store {shown(uri)} cannot be used: {one_line(error)}") from error


def _write_rows(store: Path, rows: Mapping[str, str], uri: str, study: str, parent: str) -> dict[str, str]:
    """Bring the runs of all rows up to date, and the views of the experiment; returns them: name -> identifier."""
    experiment_id = open_store(uri, study)
    cells, client = places(store, study, rows), MlflowClient(tracking_uri=uri)
    single, tuned = len({cell.noise_type for cell in cells}) == 1, searches(store, study)
    names = list(dict.fromkeys([*(cell.row for cell in cells), *rows.values()]))
    with locked(sqlite_path(uri)):
        found = Rows(client, experiment_id, study, parent)
        found.open(names)
    for name in names:
        own = [cell for cell in cells if cell.row == name]
        if own:
            found.write(name, own, single, tuned.get(name))
    known = client.get_experiment(experiment_id).tags
    for tag, value in view_tags(cells).items():
        if known.get(tag) != value:
            client.set_experiment_tag(experiment_id, tag, value)
    return found.open(names)


def sync_study(
    store: Path, rows: Mapping[str, str], uri: str, study: str, parent_run_id: str, warn: Warn = to_warnings
) -> tuple[int, int]:
    """Bring the runs of the rows of a study up to date, and send those records of its cells (key -> row) that its
    experiment does not have yet, as children of their rows' runs: runs that were trained without the store, or for
    another study. ``parent_run_id``: the study's run. Returns the numbers of records (sent, failed)."""
    done = failed = 0
    parents: dict[str, str] = {}
    try:
        parents = _write_rows(store, rows, uri, study, parent_run_id)
    except Exception as error:
        failed = sum(not is_complete(f, uri, study) for f in _recorded(store, rows))
        warn(f"the rows of study {study} are not up to date in MLflow ({one_line(error)})")
        return 0, failed
    for folder in _recorded(store, rows):
        row = rows[folder.key]
        there = {"uri": shown(uri), "parent": parents[row], "status": "finished", "done": True, "layout": LAYOUT}
        if (there | probed(folder)).items() <= sent(folder, study).items():
            continue
        told: list[str] = []
        with contextlib.ExitStack() as held:
            if not _hold(folder, held):
                continue
            tracker = Tracker(folder, uri, study, parents[row], row, told.append)
            with contextlib.suppress(Exception):  # the whole transfer finds out
                if tracker.adopt():
                    done += 1
                    continue
            if tracker.sync(final=True):
                done += 1
                continue
        failed += 1
        if failed == 1:
            warn(told[0])
        if not reach(uri, study, lambda _: None):
            break
    return done, failed


def _recorded(store: Path, keys: Iterable[str]) -> list[RunFolder]:
    return [RunFolder(store, key) for key in keys if (store / key / "record.json").exists()]


def _hold(folder: RunFolder, held: contextlib.ExitStack) -> bool:
    """Add the run's lock to ``held``; False if another process trains the run."""
    try:
        held.enter_context(folder.lock())
    except UserError:
        return False
    return True


def send_report(uri: str, study: str, folder: Path, text: str, warn: Warn = to_warnings) -> bool:
    """Attach a study's report (``folder``: page, tables and figures; ``text``: the main tables) to the study's MLflow
    run; False if the store has none. ``warn`` gets a line if the store fails."""
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(study)
        runs = _study_runs(client, experiment.experiment_id, study) if experiment is not None else []
        if not runs:
            return False
        client.log_artifact(runs[0], str(folder / "report.html"))
        for part in (folder / name for name in ("tables", "figures", "details", "png")):
            if part.exists():
                client.log_artifacts(runs[0], str(part), part.name)
        client.set_tag(runs[0], pages.NOTE, f"The whole report: artifact `report.html`.\n\n{pages.note(text)}"[:NOTE])
        return True
    except Exception as error:
        warn(f"the report was not sent to MLflow ({one_line(error)})")
        return False
