"""The MLflow run of a study, and transfers of many records."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.record import RunFolder
from noisysam.tracking.address import EXPERIMENT, Warn, shown, sqlite_path, to_warnings
from noisysam.tracking.client import identifier, locked, one_line, open_store, reach
from noisysam.tracking.state import probed, sent
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


def sync_study(
    store: Path, rows: Mapping[str, str], uri: str, study: str, parent_run_id: str, warn: Warn = to_warnings
) -> tuple[int, int]:
    """Send those records of a study's cells (key -> row) that its experiment does not have yet, as children of
    ``parent_run_id``: runs that were trained without the store, or for another study. Returns (sent, failed)."""
    done = failed = 0
    for key, row in rows.items():
        folder = RunFolder(store, key)
        there = {"uri": shown(uri), "parent": parent_run_id, "status": "finished", "done": True} | probed(folder)
        if there.items() <= sent(folder, study).items() or not (folder.path / "record.json").exists():
            continue
        told: list[str] = []
        with contextlib.ExitStack() as held:
            if not _hold(folder, held):
                continue
            if Tracker(folder, uri, study, parent_run_id, row, told.append).sync(final=True):
                done += 1
                continue
        failed += 1
        if failed == 1:
            warn(told[0])
        if not reach(uri, study, lambda _: None):
            break
    return done, failed


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
        client.set_tag(runs[0], "mlflow.note.content", f"The whole report: artifact `report.html`.\n\n{text}"[:NOTE])
        return True
    except Exception as error:
        warn(f"the report was not sent to MLflow ({one_line(error)})")
        return False
