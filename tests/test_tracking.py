"""Tracking: what arrives in a real SQLite store, that nothing arrives twice, and that a dead store stops nothing."""

import contextlib
import json
import math
import socket
import sqlite3
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from samples import complete

from noisysam import cli, tracking
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.files import write_json
from noisysam.runs.record import RunFolder
from noisysam.tracking import server, tracker
from noisysam.tracking import study as study_runs
from noisysam.tracking.client import default_uri, open_store
from noisysam.tracking.study import sync_store
from noisysam.tracking.tracker import Tracker

STARTED, ENDED = "2026-11-22T18:00:00+00:00", "2026-11-22T18:05:00+00:00"


def make_record(key: str, **changes: Any) -> dict[str, Any]:
    """A finished record as the training writes it, cut to what matters here."""
    made = {
        "schema": 1,
        "key": key,
        "status": "finished",
        "name": f"run {key}",
        "config": {
            "dataset": "cifar10",
            "noise": 0.8,
            "seed": 3,
            "rho": None,
            "method_option": {"beta": 0.7, "note": "x" * 7000},
        },
        "resolved": {"device": "cpu", "device_name": "a CPU", "precision": "fp32", "compile": False, "threads": 1},
        "oracle": [],
        "noise": {"type": "symmetric", "rate": 0.8, "flip_rate": 0.72, "digest": "ab" * 32},
        "environment": {"commit": "abc1234"},
        "started": STARTED,
        "ended": ENDED,
        "results": {"last": 0.41, "best": 0.44, "selected": None},
        "cost": {"train_seconds": 100.0, "steps": 30},
        "error": None,
        **changes,
    }
    return complete(made)


def make_epochs(count: int) -> list[dict[str, float | None]]:
    """Two stages; an evaluation in every second epoch; the last epoch's log_seconds not yet known."""
    lines: list[dict[str, float | None]] = []
    for step in range(count):
        line: dict[str, float | None] = {"stage": step // 3, "epoch": step % 3, "time": 1763836000.25 + step}
        line |= {"train_loss": 2.0 - 0.1 * step, "log_seconds": None if step == count - 1 else 0.5}
        lines.append(line | ({"test_accuracy": 0.1 * step} if step % 2 else {"test_accuracy": None}))
    return lines


def make_folder(store: Path, key: str = "00ff", epochs: int = 5, **changes: Any) -> RunFolder:
    folder = RunFolder(store, key)
    folder.write(make_record(key, **changes))
    folder.write_epochs(make_epochs(epochs))
    return folder


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One migrated store for the whole module (migrating takes seconds); each test has its own experiment."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    open_store(uri, "first")
    return uri


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def dead() -> str:
    """The address of a port that is closed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://user:secret@127.0.0.1:{port}"


def runs(uri: str, experiment: str) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def content(uri: str, experiment: str) -> dict[str, Any]:
    """All that the store has of each run, by key."""
    client, found = MlflowClient(tracking_uri=uri), {}
    for run in runs(uri, experiment):
        history = {
            name: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        files = sorted(a.path for a in client.list_artifacts(run.info.run_id))
        inputs = [(d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs]
        facts = (run.info.status, run.info.start_time, run.info.end_time)
        tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.user")}
        assert tags["noisysam.key"] not in found
        found[tags["noisysam.key"]] = (run.info.run_id, facts, history, run.data.params, tags, inputs, files)
    return found


def test_a_finished_run_arrives_whole(tmp_path: Path, uri: str, experiment: str) -> None:
    folder = make_folder(tmp_path)
    (folder.path / "weights.safetensors").write_bytes(b"weights")
    cells = [
        {"row": row, "key": key, "noise": 0.8, "seed": 3, "config": {}}
        for row, key in (("sam", "00ff"), ("sgd", "other"))
    ]
    write_json(tmp_path / "studies" / "table4.json", {"schema": 1, "file": "", "name": "table4", "cells": cells})
    assert Tracker(folder, uri, experiment, parent_run_id="p" * 32).sync(final=True)

    run_id, facts, history, params, tags, inputs, files = content(uri, experiment)["00ff"]
    milliseconds = [int(datetime.fromisoformat(t).timestamp() * 1000) for t in (STARTED, ENDED)]
    assert facts == ("FINISHED", *milliseconds)
    assert history["train_loss"] == [(s, 1763836000250 + 1000 * s, pytest.approx(2.0 - 0.1 * s)) for s in range(5)]
    assert [(s, v) for s, _, v in history["percent/test_accuracy"]] == [
        (1, pytest.approx(10)), (3, pytest.approx(30)),
    ]  # fmt: skip
    assert [v for _, _, v in history["stage"]] == [0, 0, 0, 1, 1]
    assert not {"time", "log_seconds"} & history.keys()
    assert history["final/last"] == [(0, milliseconds[1], pytest.approx(41))], "percent"
    assert history["final/steps"] == [(0, milliseconds[1], 30)]
    assert "final/selected" not in history
    assert params["method_option.beta"] == "0.7"
    assert params["method_option.note"] == "x" * 6000
    assert params["resolved.precision"] == "fp32"
    assert "rho" not in params
    expected = {"oracle": "blind", "commit": "abc1234", "noise_digest": "ab" * 32, "device": "a CPU", "seed": "3"}
    expected |= {"study": "table4", "row": "sam"}
    assert {name: tags[f"noisysam.{name}"] for name in expected} == expected
    assert (tags["mlflow.runName"], tags["mlflow.parentRunId"]) == ("sam 80 % #3", "p" * 32)
    assert inputs == [("cifar10", "ab" * 18, "training")]
    assert files == ["epochs.csv", "noise.json", "record.json", "weights.safetensors"]
    state = json.loads((folder.path / "tracking.json").read_text())
    assert {k: state[k] for k in ("uri", "run_id", "epochs_sent", "done")} == {
        "uri": uri,
        "run_id": run_id,
        "epochs_sent": 5,
        "done": True,
    }


def test_epochs_are_sent_as_they_come_in_one_call_each(
    tmp_path: Path, uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, epochs=1, status="running", ended=None, results={}, cost={})
    tracker = Tracker(folder, uri, experiment)
    assert tracker.sync()
    assert runs(uri, experiment)[0].info.status == "RUNNING"
    calls: list[int] = []
    log_batch = MlflowClient.log_batch

    def counted(self: MlflowClient, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        calls.append(len(metrics))
        log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    for epochs in (2, 3, 4):
        folder.write_epochs(make_epochs(epochs))
        assert tracker.sync()
    assert calls == [4, 3, 4]  # stage, epoch, train_loss, and test_accuracy where it was measured
    assert json.loads((folder.path / "tracking.json").read_text())["done"] is False
    assert [step for step, _, _ in content(uri, experiment)["00ff"][2]["train_loss"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_status(tmp_path: Path, uri: str, experiment: str, status: str, expected: str) -> None:
    assert Tracker(make_folder(tmp_path, status=status), uri, experiment).sync(final=True)
    assert runs(uri, experiment)[0].info.status == expected


def test_oracle_is_tagged_with_its_reasons(tmp_path: Path, uri: str, experiment: str) -> None:
    assert Tracker(make_folder(tmp_path, oracle=["a", "b"]), uri, experiment, row="mine").sync(final=True)
    tags = runs(uri, experiment)[0].data.tags
    assert (tags["noisysam.oracle"], tags["noisysam.row"]) == ("oracle: a; b", "mine")


def test_values_that_are_not_finite_stay_so(tmp_path: Path, uri: str, experiment: str) -> None:
    folder = make_folder(tmp_path)
    folder.write_epochs([{"stage": 0, "epoch": 0, "time": 1.0, "train_loss": math.inf, "train_nll": math.nan}])
    assert Tracker(folder, uri, experiment).sync(final=True)
    history = content(uri, experiment)["00ff"][2]
    assert math.isnan(history["train_loss"][0][2])
    assert math.isnan(history["train_nll"][0][2])


class Stop(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    "call", ["create_run", "log_batch", "log_inputs", "log_artifact", "set_terminated", "write_json"]
)
def test_an_interruption_anywhere_doubles_nothing(
    tmp_path: Path, uri: str, experiment: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call does its work and the process ends before anybody knows; a new process then sends the run."""
    folder = make_folder(tmp_path)
    with monkeypatch.context() as patch:
        where: Any = tracker if call == "write_json" else MlflowClient
        original = getattr(where, call)

        def cut(*args: Any, **kwargs: Any) -> None:
            if call != "write_json":
                original(*args, **kwargs)
            raise Stop("process ended")

        patch.setattr(where, call, cut)
        warned: list[str] = []
        assert not Tracker(folder, uri, experiment, warn=warned.append).sync(final=True)
        assert len(warned) == 1
    folder.write_epochs(make_epochs(5))
    assert Tracker(folder, uri, experiment).sync(final=True)
    (found,) = content(uri, experiment).values()
    assert found[1][0] == "FINISHED"
    assert [step for step, _, _ in found[2]["train_loss"]] == [0, 1, 2, 3, 4]
    assert all(len({s for s, _, _ in history}) == len(history) for history in found[2].values())
    assert len(found[5]) == 1


def test_an_epoch_that_is_trained_again_is_not_sent_again(tmp_path: Path, uri: str, experiment: str) -> None:
    """A run is cut off after sending epoch 4, before its checkpoint: the resumed run has another time for it."""
    running: dict[str, Any] = {"status": "running", "ended": None, "results": {}, "cost": {}}
    folder = make_folder(tmp_path, **running)
    assert Tracker(folder, uri, experiment).sync()
    (folder.path / "tracking.json").unlink()
    again = make_epochs(6)
    for line in again[4:]:
        line["time"] = 1763839999.0
    folder.write_epochs(again)
    folder.write(make_record("00ff"))
    assert Tracker(folder, uri, experiment).sync(final=True)
    history = content(uri, experiment)["00ff"][2]["train_loss"]
    assert [(step, time) for step, time, _ in history][3:] == [
        (3, 1763836003250),
        (4, 1763836004250),
        (5, 1763839999000),
    ]


def test_a_resumed_run_may_find_its_data_elsewhere(tmp_path: Path, uri: str, experiment: str) -> None:
    for place in ("here", "there"):
        config = {"dataset": "cifar10", "seed": 3, "data_dir": place}
        assert Tracker(make_folder(tmp_path, config=config, status="interrupted"), uri, experiment).sync(final=True)
        (tmp_path / "00ff" / "tracking.json").unlink()
    assert content(uri, experiment)["00ff"][3]["data_dir"] == "here"


def test_sync_store_sends_all_once(tmp_path: Path, uri: str, experiment: str) -> None:
    for key in ("a1", "b2", "c3"):
        make_folder(tmp_path, key)
    make_folder(tmp_path, "d4", experiment=experiment + " other")
    killed = make_folder(tmp_path, "e5", status="running", ended=None, results={}, cost={})
    alive = make_folder(tmp_path, "f6", status="running", ended=None, results={}, cost={})
    with alive.lock():
        assert sync_store(tmp_path, uri, experiment) == (5, 0)
    first = content(uri, experiment)
    assert {key: found[1][0] for key, found in first.items()} == {
        "a1": "FINISHED",
        "b2": "FINISHED",
        "c3": "FINISHED",
        "e5": "KILLED",
    }
    assert content(uri, experiment + " other").keys() == {"d4"}
    with alive.lock():
        assert sync_store(tmp_path, uri, experiment) == (0, 0)
    assert content(uri, experiment) == first

    killed.write(make_record("e5"))
    with alive.lock():
        assert sync_store(tmp_path, uri, experiment) == (1, 0)
    changed = content(uri, experiment)
    assert changed["e5"][0] == first["e5"][0]
    assert changed["e5"][1][0] == "FINISHED"
    assert {k: v for k, v in changed.items() if k != "e5"} == {k: v for k, v in first.items() if k != "e5"}


def test_a_store_that_was_lost_is_filled_again(tmp_path: Path, uri: str, experiment: str) -> None:
    folder = make_folder(tmp_path)
    assert sync_store(tmp_path, uri, experiment) == (1, 0)
    state = json.loads((folder.path / "tracking.json").read_text())
    assert sync_store(tmp_path, uri, experiment) == (0, 0)
    write_json(folder.path / "tracking.json", {**state, "run_id": "0" * 32})  # a run that the store does not know
    assert sync_store(tmp_path, uri, experiment) == (1, 0)
    assert len(runs(uri, experiment)) == 1


def test_one_faulty_record_does_not_keep_the_others_back(tmp_path: Path, uri: str, experiment: str) -> None:
    make_folder(tmp_path, "b2")
    (tmp_path / "a1").mkdir()
    (tmp_path / "a1" / "record.json").write_text("{")
    warned: list[str] = []
    assert sync_store(tmp_path, uri, experiment, warned.append) == (1, 1)
    assert len(warned) == 1
    assert "a1" in warned[0]


def test_a_dead_server_is_told_once_and_costs_little(tmp_path: Path, uri: str, experiment: str, dead: str) -> None:
    folder = make_folder(tmp_path)
    start = time.monotonic()
    tracker = Tracker(folder, dead, experiment)
    with pytest.warns(UserWarning, match="tracking of run 00ff stopped") as caught:
        assert [tracker.sync(), tracker.sync(), tracker.sync(), tracker.sync(final=True)] == [False] * 4
    assert time.monotonic() - start < 10
    (message,) = [str(w.message) for w in caught]
    assert "\n" not in message
    assert "secret" not in message
    assert json.loads((folder.path / "tracking.json").read_text())["done"] is False
    assert sync_store(tmp_path, uri) == (1, 0)  # later, somewhere else, to the experiment for which it was meant
    assert len(content(uri, experiment)["00ff"][2]["train_loss"]) == 5


def test_a_server_that_comes_back_gets_everything_at_the_end(
    tmp_path: Path, uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, epochs=2, status="running", ended=None, results={}, cost={})
    warned: list[str] = []
    tracker = Tracker(folder, uri, experiment, warn=warned.append)
    assert tracker.sync()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *args, **kwargs: 1 / 0)
        folder.write_epochs(make_epochs(3))
        assert not tracker.sync()
    folder.write_epochs(make_epochs(4))
    assert not tracker.sync()  # the store works again, but only the end asks
    folder.write(make_record("00ff"))
    assert tracker.sync(final=True)
    assert len(warned) == 1
    assert [step for step, _, _ in content(uri, experiment)["00ff"][2]["train_loss"]] == [0, 1, 2, 3]


def test_sync_store_counts_what_a_dead_server_keeps_back(tmp_path: Path, dead: str) -> None:
    for key in ("a1", "b2", "c3"):
        make_folder(tmp_path, key)
    warned: list[str] = []
    assert sync_store(tmp_path, dead, warn=warned.append) == (0, 3)
    assert len(warned) == 1


def test_a_store_that_was_half_created(tmp_path: Path) -> None:
    """As by a process that was killed: it is created anew, and its place is taken by a whole one alone."""
    new = tmp_path / ".mlflow.db.new"
    with contextlib.closing(sqlite3.connect(new)) as base:
        base.execute("create table experiments (routing_strategy text)")
        base.commit()
    assert open_store(f"sqlite:///{tmp_path}/mlflow.db", "e")
    assert not new.exists()


def test_open_store_is_safe_against_a_race(uri: str, tmp_path: Path) -> None:
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(open_store(uri, "race"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6
    assert len(set(ids)) == 1


def test_open_store_takes_the_experiment_that_another_machine_created(
    uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_store(uri, experiment)
    look, answers = MlflowClient.get_experiment_by_name, [True, False]
    monkeypatch.setattr(
        MlflowClient, "get_experiment_by_name", lambda self, name: None if answers.pop() is False else look(self, name)
    )
    answers.insert(0, True)
    assert open_store(uri, experiment) == expected


def test_artifacts_lie_beside_the_database(uri: str, experiment: str) -> None:
    open_store(uri, experiment)
    place = MlflowClient(tracking_uri=uri).get_experiment_by_name(experiment).artifact_location
    assert place == (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment).as_uri()


def test_faulty_stores_are_told_in_one_line(tmp_path: Path, uri: str, experiment: str) -> None:
    MlflowClient(tracking_uri=uri).delete_experiment(open_store(uri, experiment))
    with pytest.raises(UserError, match="was deleted"):
        open_store(uri, experiment)
    (tmp_path / "text.db").write_text("this is not a database, whatever its name may say" * 10)
    with pytest.raises(RunFailed, match="cannot be used") as caught:
        open_store(f"sqlite:///{tmp_path}/text.db", experiment)
    assert "\n" not in str(caught.value)


def test_probes_arrive_with_their_run(tmp_path: Path, uri: str, experiment: str) -> None:
    folder = make_folder(tmp_path)
    assert Tracker(folder, uri, experiment).sync(final=True)
    scalars = {"test.trace": 12.5, "test.lambda_max": 3.0}
    write_json(folder.path / "probes" / "sharpness.json", {"schema": 1, "scalars": scalars, "results": {}})
    (folder.path / "probes" / "density.svg").write_text("<svg/>")
    assert sync_store(tmp_path, uri, keys=["00ff"]) == (1, 0)
    run_id, _, history, *_, files = content(uri, experiment)["00ff"]
    assert {name: values[0][2] for name, values in history.items() if name.startswith("probe/")} == {
        "probe/sharpness.test.trace": 12.5, "probe/sharpness.test.lambda_max": 3.0,
    }  # fmt: skip
    assert "probes" in files
    listed = MlflowClient(tracking_uri=uri).list_artifacts(run_id, "probes")
    assert [a.path for a in listed] == ["probes/density.svg", "probes/sharpness.json"]
    assert sync_store(tmp_path, uri, keys=["00ff"]) == (0, 0)
    write_json(folder.path / "probes" / "sharpness.json", {"schema": 1, "scalars": scalars | {"test.trace": 8.0}})
    assert sync_store(tmp_path, uri) == (1, 0)
    (run,) = runs(uri, experiment)
    assert run.data.metrics["probe/sharpness.test.trace"] == 8.0


def test_short_names() -> None:
    def title(row: str | None, **config: Any) -> str:
        return tracker.run_title({"config": {"opt": "sam", "seed": 1, **config}}, row)

    assert title("SAM", noise=0.8, noise_type="symmetric") == "SAM 80 % #1"
    assert title("SAM", noise=0.0, noise_type="symmetric") == "SAM clean #1"
    assert title("ELR", noise=0.375, noise_type="pair") == "ELR pair 37.5 % #1"
    assert title(None, method="elr", noise=0.0, noise_type="human:worse") == "elr sam human:worse #1"
    assert title(None, method="ce", noise=0.2) == "sam 20 % #1"


# what an earlier layout sent: shares under other names, cells below the run of the study, no runs of rows


def sent_earlier(folder: RunFolder, uri: str, study: str, parent: str) -> str:
    """Send a run as version 0.1 did; returns its identifier."""
    client = MlflowClient(tracking_uri=uri)
    record, lines = folder.record, folder.epochs
    assert record is not None
    tags = {"mlflow.runName": record["name"], "mlflow.parentRunId": parent, "noisysam.key": folder.key}
    experiment_id = client.get_experiment_by_name(study).experiment_id
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    for step, line in enumerate(lines):
        time = round((line["time"] or 0) * 1000)
        values = {n: v for n, v in line.items() if n not in ("epoch", "time", "log_seconds") and v is not None}
        client.log_batch(run_id, metrics=[Metric(name, value, time, step) for name, value in values.items()])
    client.log_batch(run_id, metrics=[Metric("final_last", record["results"]["last"], 1, 0)])
    client.set_terminated(run_id)
    state = {"uri": uri, "experiment": study, "parent": parent, "status": "finished", "ended": record["ended"],
             "epochs_sent": len(lines), "done": True, "run_id": run_id, "experiment_id": experiment_id}  # fmt: skip
    write_json(folder.path / "tracking.json", state)
    return run_id


def study_of(store: Path, name: str, lasts: dict[tuple[str, float, int], float]) -> dict[str, str]:
    """A study with a finished run for each (row, noise, seed), none where the accuracy is NaN; its rows by key."""
    rows, cells = {}, []
    for number, ((row, noise, seed), last) in enumerate(lasts.items()):
        key = f"{name}{number}"
        config = {"dataset": "digits", "noise": noise, "noise_type": "symmetric", "seed": seed, "opt": row.lower()}
        if not math.isnan(last):
            make_folder(store, key, config=config, results={"last": last, "best": last})
        rows[key] = row
        cells.append({"row": row, "key": key, "noise": noise, "seed": seed, "config": config})
    write_json(store / "studies" / f"{name}.json", {"schema": 1, "file": "", "name": name, "cells": cells})
    return rows


def kinds(uri: str, study: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The run of a study, those of its rows by name, those of its cells by key."""
    found = runs(uri, study)
    (whole,) = [run for run in found if run.data.tags.get("noisysam.kind") == "study"]
    rows = {r.data.tags["noisysam.row"]: r for r in found if r.data.tags.get("noisysam.kind") == "row"}
    cells = {r.data.tags["noisysam.key"]: r for r in found if "noisysam.key" in r.data.tags}
    assert len(found) == 1 + len(rows) + len(cells), "nothing twice"
    return whole, rows, cells


def curve(uri: str, run: Any, name: str) -> list[Any]:
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, name)
    return [(m.step, pytest.approx(m.value)) for m in sorted(history, key=lambda m: m.step)]


def test_rows_of_a_study_draw_accuracy_against_noise(tmp_path: Path, uri: str) -> None:
    study, waiting = "rows", float("nan")
    lasts = {("SGD", 0.0, 0): 0.8, ("SGD", 0.0, 1): 0.9, ("SGD", 0.8, 0): 0.3, ("SGD", 0.8, 1): 0.2}
    lasts |= {("SAM", 0.0, 0): 0.85, ("SAM", 0.0, 1): 0.95, ("SAM", 0.8, 0): 0.5, ("SAM", 0.8, 1): waiting}
    rows = study_of(tmp_path, study, lasts)
    parent = study_runs.open_study(uri, study)
    opened = study_runs.open_rows(uri, study, parent, ["SGD", "SAM"])
    assert study_runs.sync_study(tmp_path, rows, uri, study, parent) == (7, 0)
    whole, found, cells = kinds(uri, study)
    assert whole.info.run_id == parent
    assert {name: run.info.run_id for name, run in found.items()} == opened
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent}
    assert all(run.data.tags["mlflow.parentRunId"] == opened[rows[key]] for key, run in cells.items())
    assert cells["rows2"].data.tags["mlflow.runName"] == "SGD 80 % #0"
    assert curve(uri, found["SGD"], "mean/last") == [(0, 85), (80, 25)]
    assert curve(uri, found["SGD"], "sd/last") == [(0, 5 * 2**0.5), (80, 5 * 2**0.5)]
    assert curve(uri, found["SAM"], "mean/last") == [(0, 90)], "80 % waits for a seed"
    assert found["SAM"].data.metrics["last at 80"] == pytest.approx(50), "the mean so far"
    assert (found["SGD"].info.status, found["SAM"].info.status) == ("FINISHED", "SCHEDULED")
    assert found["SGD"].info.start_time > found["SAM"].info.start_time, "listed in their order, the newest first"
    view = json.loads(MlflowClient(tracking_uri=uri).get_experiment_by_name(study).tags["mlflow.sharedViewState.table"])
    assert view["selectedColumns"][:2] == ["metrics.`last at 0`", "metrics.`last at 80`"]
    assert study_runs.sync_study(tmp_path, rows, uri, study, parent) == (0, 0)

    study_of(tmp_path, study, {**lasts, ("SAM", 0.8, 1): 0.4})
    assert study_runs.sync_study(tmp_path, rows, uri, study, parent) == (1, 0)
    later = kinds(uri, study)[1]
    assert later["SAM"].info.run_id == opened["SAM"]
    assert curve(uri, later["SAM"], "mean/last") == [(0, 90), (80, 45)]
    assert later["SAM"].data.metrics["last at 80"] == pytest.approx(45)
    assert later["SAM"].info.status == "FINISHED"

    rows = study_of(tmp_path, study, {**lasts, ("SAM", 0.8, 1): 0.4, ("SGD", 0.8, 2): 0.7})  # a seed that was added
    assert study_runs.sync_study(tmp_path, rows, uri, study, parent)[1] == 0
    _, found, cells = kinds(uri, study)
    assert curve(uri, found["SGD"], "mean/last") == [(0, 85), (80, 40)], "one point at each rate"
    assert all(r.data.tags["mlflow.parentRunId"] == found[rows[key]].info.run_id for key, r in cells.items())


def test_a_store_of_the_earlier_layout(tmp_path: Path, uri: str) -> None:
    """Its runs get what they lack, and nothing is there twice."""
    study = "old"
    rows = study_of(tmp_path, study, {("SGD", 0.0, 0): 0.8, ("SGD", 0.4, 0): 0.6})
    parent = study_runs.open_study(uri, study)
    before = {key: sent_earlier(RunFolder(tmp_path, key), uri, study, parent) for key in rows}
    assert study_runs.sync_study(tmp_path, rows, uri, study, parent) == (2, 0)
    _, found, cells = kinds(uri, study)
    assert {key: run.info.run_id for key, run in cells.items()} == before
    assert {run.data.tags["mlflow.parentRunId"] for run in cells.values()} == {found["SGD"].info.run_id}
    assert cells["old1"].data.tags["mlflow.runName"] == "SGD 40 % #0"
    assert curve(uri, cells["old0"], "train_loss") == [(s, 2.0 - 0.1 * s) for s in range(5)]
    assert curve(uri, cells["old0"], "stage") == [(s, s // 3) for s in range(5)]
    assert curve(uri, cells["old0"], "percent/test_accuracy") == [(1, 10), (3, 30)]
    assert curve(uri, cells["old0"], "final/last") == [(0, 80)]
    assert curve(uri, found["SGD"], "mean/last") == [(0, 80), (40, 60)]
    assert study_runs.sync_study(tmp_path, rows, uri, study, parent) == (0, 0)
    assert sync_store(tmp_path, uri) == (0, 0)


def test_the_command_sends_studies_with_their_rows(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of(tmp_path, "whole", {("SGD", 0.0, 0): 0.8, ("SAM", 0.0, 0): 0.9})
    make_folder(tmp_path, "alone")
    command = ["sync", "--store", str(tmp_path), "--tracking-uri", uri]
    assert cli._run(command) == 0
    assert capsys.readouterr().out == "3 records sent, 0 failed\n"
    whole, rows, cells = kinds(uri, "whole")
    assert (whole.info.status, set(rows), set(cells)) == ("FINISHED", {"SGD", "SAM"}, {"whole0", "whole1"})
    assert cli._run(command) == 0
    assert capsys.readouterr().out == "0 records sent, 0 failed\n"


def test_a_run_ends_with_its_page(tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path)
    assert Tracker(folder, uri, "noisysam").sync(final=True)
    (run,) = [run for run in runs(uri, "noisysam") if run.data.tags["noisysam.key"] == "00ff"]
    path = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    cli.runs._show_page(folder, uri, "noisysam", None)
    said = capsys.readouterr().out
    assert said == f"  MLflow: {path}  (while `noisysam ui` is running, at the address that it prints)\n"
    cli.runs._show_page(folder, "http://me:secret@server:5000/", "noisysam", None)
    assert capsys.readouterr().out == f"  MLflow: http://server:5000{path}\n"
    cli.runs._show_page(make_folder(tmp_path, "aa"), uri, "noisysam", None)
    assert capsys.readouterr().out == "", "it was not sent"


def test_views_are_tags_of_every_experiment(uri: str, experiment: str) -> None:
    client = MlflowClient(tracking_uri=uri)
    old = client.create_experiment(experiment)
    assert open_store(uri, experiment) == old  # one that was there before the views were
    found = client.get_experiment(old).tags
    view = json.loads(found["mlflow.sharedViewState.runs"])
    assert view["orderByKey"] == "metrics.`final/last`"
    assert "tags.`noisysam.row`" in view["selectedColumns"]


def test_the_report_hangs_on_the_run_of_its_study(tmp_path: Path, uri: str, experiment: str) -> None:
    for name in ("report.html", "tables/main.tex", "figures/accuracy.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert not tracking.send_report(uri, experiment, tmp_path, "| row |")  # nothing is known of the study
    parent = tracking.open_study(uri, experiment)
    text = "![figure](figures/accuracy.svg)\n| row [1, 2] (n=5) |"
    assert tracking.send_report(uri, experiment, tmp_path, text)
    client = MlflowClient(tracking_uri=uri)
    assert {a.path for a in client.list_artifacts(parent)} == {"report.html", "tables", "figures"}
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    assert note.endswith("| row \\[1, 2\\] (n=5) |"), "MLflow would take the interval for a link"
    assert "figure" not in note
    assert not tracking.send_report(f"sqlite:///{tmp_path}/none.db", experiment, tmp_path, "")
    assert not (tmp_path / "none.db").exists()


def test_default_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert default_uri() == "http://server:5000"
    assert default_uri("sqlite:///own.db") == f"sqlite:///{tmp_path}/own.db"
    assert default_uri("sqlite:////own.db") == "sqlite:////own.db"


def test_ui_starts_the_server_on_the_store(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    class Server:
        def __init__(self, command: list[str]) -> None:
            commands.append(command)

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(server.subprocess, "Popen", Server)
    open_store(uri, "one")
    said: list[str] = []
    assert server.serve(uri, port=5001, say=said.append) == 0
    assert said[0].startswith("one, runs: http://127.0.0.1:5001/#/experiments/")
    with pytest.raises(UserError, match="no study 'two' "):
        server.serve(uri, study="two")
    assert commands[0][:4] == [sys.executable, "-m", "mlflow", "server"]
    assert commands[0][commands[0].index("--backend-store-uri") + 1] == uri
    assert commands[0][commands[0].index("--port") + 1] == "5001"
    with pytest.raises(UserError, match="is a server already"):
        server.serve("http://server:5000")
    with pytest.raises(UserError, match="no MLflow store"):
        server.serve(f"sqlite:///{tmp_path}/none.db")
