"""A study's run in MLflow, and what is sent for many runs at once."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.record import RunFolder
from noisysam.tracking.client import EXPERIMENT, Warn, _locked, _one_line, _reach, _warn, open_store, shown, sqlite_path
from noisysam.tracking.tracker import NOTE, STATUS, Tracker, _probed, _sent


def sync_store(
    store: Path, uri: str, experiment: str | None = None, warn: Warn = _warn, keys: Iterable[str] | None = None
) -> tuple[int, int]:
    """Send every record of ``store``, or those with these ``keys``, that is not yet in the MLflow store; the numbers
    (sent, failed).

    A record goes to the experiment that it went to before, or that it names, else to ``experiment``. Runs that are
    being trained are left to their own tracker.
    """
    sent = failed = 0
    reached: dict[str, bool] = {}
    for key in sorted(keys or (path.parent.name for path in store.glob("*/record.json"))):
        folder = RunFolder(store, key)
        try:
            state, record = _sent(folder), folder.record or {}
            home = state.get("experiment") or record.get("experiment") or experiment or EXPERIMENT
            for name in (home, *state.get("shared", {})):
                tracker = Tracker(folder, uri, name)
                if name not in reached:
                    reached[name] = _reach(uri, name, warn)
                if not reached[name]:
                    failed += not tracker.done
                else:
                    with contextlib.ExitStack() as held:
                        sent += _hold(folder, held) and tracker._send(final=True)
        except Exception as error:  # one bad record does not keep the others back
            warn(f"run {folder.key} was not sent: {_one_line(error)}")
            failed += 1
            reached.clear()  # it may be the store: look again before the next one
    return sent, failed


def open_study(uri: str, study: str) -> str:
    """The MLflow run that stands for a study, in the experiment of its name; the runs of its cells are its children.
    Found by its tags, or created; open from now on. Raises as ``open_store`` does."""
    experiment_id = open_store(uri, study)
    try:
        with _locked(sqlite_path(uri)):
            client = MlflowClient(tracking_uri=uri)
            found = _study_runs(client, experiment_id, study)
            if not found:
                tags = {"mlflow.runName": study, "noisysam.kind": "study", "noisysam.study": study}
                mine = client.create_run(experiment_id, tags=tags).info.run_id
                found = _study_runs(client, experiment_id, study) or [mine]
                if found[0] != mine:  # another machine was quicker
                    client.delete_run(mine)
            client.update_run(found[0], status="RUNNING")
            return found[0]
    except Exception as error:
        raise RunFailed(f"MLflow store {shown(uri)} cannot be used: {_one_line(error)}") from error


def _study_runs(client: MlflowClient, experiment_id: str, study: str) -> list[str]:
    runs = client.search_runs([experiment_id], "tags.`noisysam.kind` = 'study'")
    mine = [run.info for run in runs if run.data.tags["noisysam.study"] == study]
    return [str(info.run_id) for info in sorted(mine, key=lambda info: (info.start_time, info.run_id))]


def close_study(uri: str, run_id: str, counts: Mapping[str, int], warn: Warn = _warn) -> None:
    """End the run of a study with how many of its cells are ``finished``, ``failed`` and ``left``. ``warn`` gets a line
    where the store is away: the run then stays open until the next sweep."""
    now = round(time.time() * 1000)
    status = "failed" if counts["failed"] else "finished" if not counts["left"] else "stopped"
    try:
        client = MlflowClient(tracking_uri=uri)
        client.log_batch(run_id, metrics=[Metric(f"cells_{name}", n, now, 0) for name, n in counts.items()])
        client.set_terminated(run_id, STATUS.get(status, "KILLED"), now)
    except Exception as error:
        warn(f"the study's run in MLflow stays open ({_one_line(error)})")


def sync_study(
    store: Path, rows: Mapping[str, str], uri: str, study: str, parent_run_id: str, warn: Warn = _warn
) -> tuple[int, int]:
    """Send the records of a study's cells (key -> row) to its experiment, as children of ``parent_run_id``, where they
    are not there yet: those that were trained without the store, or for another study. The numbers (sent, failed)."""
    sent = failed = 0
    for key, row in rows.items():
        folder = RunFolder(store, key)
        there = {"uri": shown(uri), "parent": parent_run_id, "status": "finished", "done": True} | _probed(folder)
        if there.items() <= _sent(folder, study).items() or not (folder.path / "record.json").exists():
            continue
        told: list[str] = []
        with contextlib.ExitStack() as held:
            if not _hold(folder, held):
                continue
            if Tracker(folder, uri, study, parent_run_id, row, told.append).sync(final=True):
                sent += 1
                continue
        failed += 1
        if failed == 1:
            warn(told[0])
        if not _reach(uri, study, lambda _: None):
            break
    return sent, failed


def _hold(folder: RunFolder, held: contextlib.ExitStack) -> bool:
    """Take the run's lock into ``held``; False where a process trains the run."""
    try:
        held.enter_context(folder.lock())
    except UserError:
        return False
    return True


def send_report(uri: str, study: str, folder: Path, text: str, warn: Warn = _warn) -> bool:
    """Hang a study's report (``folder``: its page, tables and figures; ``text``: its main tables) on the study's MLflow
    run; False where the store has none. ``warn`` gets a line where the store fails."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return False
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
        warn(f"the report was not sent to MLflow ({_one_line(error)})")
        return False
