"""Runs in MLflow: what a run's folder holds, sent to a tracking store. This module and ``ui`` alone import mlflow.

The folder is the truth and the store a copy of it. Each sending first asks the store what it has, so a sending that
was cut off, at whatever point, is completed and nothing is stored twice.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from noisysam.core.files import file_digest, read_json, write_json
from noisysam.runs.record import RunFolder
from noisysam.tracking.client import Warn, _exists, _one_line, _warn, open_store, shown

STATUS = {"finished": "FINISHED", "failed": "FAILED"}  # anything else at the end of a run: KILLED


# Limits of MLflow: of one batch, of a parameter's value, of a data set's digest, of a tag.
METRICS, PARAMS, VALUE, DIGEST, NOTE = 1000, 100, 6000, 36, 5000


SEQUENCE = "stage"  # a column of epochs.csv that every line has: its history says which epochs the store holds


UNSENT = {"epoch", "time", "log_seconds"}  # step, timestamp, and what is known only after the sending


class Tracker:
    """Sends the record of one run to a store, as far as it is not there yet.

    A store that fails never stops a run: ``warn`` gets one line, and nothing more is tried until the end of the run.
    ``parent_run_id`` is the MLflow run under which this one is shown, ``row`` its row in a study (else the one that
    the store's studies give it).
    """

    def __init__(
        self,
        folder: RunFolder,
        uri: str,
        experiment: str,
        parent_run_id: str | None = None,
        row: str | None = None,
        warn: Warn = _warn,
    ) -> None:
        self.folder, self.uri, self.experiment = folder, uri, experiment
        self.parent_run_id, self.row, self.warn = parent_run_id, row, warn
        self._client: MlflowClient | None = None  # None until the run is found or created
        self._run_id = self._experiment_id = ""
        self._steps: set[int] = set()  # the epochs that the store holds
        self._away = False

    def sync(self, final: bool = False) -> bool:
        """Send what is new; ``final``: the results, the artifacts and the status too. False where that failed."""
        if self._away and not final:
            return False
        try:
            self._send(final)
        except Exception as error:  # whatever happens here must not end a training
            if not self._away:
                later = "the record is on disk, `noisysam track --sync` sends it later"
                self.warn(f"tracking of run {self.folder.key} stopped ({_one_line(error)}): {later}")
            self._away = True
            with contextlib.suppress(Exception):
                if not _sent(self.folder, self.experiment):  # nothing arrived yet: keep where it belongs
                    self._note({}, 0, done=False)
            return False
        self._away = False
        return True

    @property
    def done(self) -> bool:
        """Whether all that the folder holds now was sent to this store and experiment."""
        sent = _sent(self.folder, self.experiment)
        return self._state(self.folder.record or {}, len(self.folder.epochs)).items() <= sent.items()

    def _state(self, record: Mapping[str, Any], epochs: int, done: bool = True) -> dict[str, Any]:
        """What tracking.json says once this much was sent (beside the run's id)."""
        facts: dict[str, Any] = {"status": record.get("status"), "ended": record.get("ended"), "epochs_sent": epochs}
        facts |= _probed(self.folder)
        parent = {} if self.parent_run_id is None else {"parent": self.parent_run_id}
        return {"uri": shown(self.uri), "experiment": self.experiment, **parent, **facts, "done": done}

    def _send(self, final: bool) -> bool:
        """Send; False where there was nothing to send."""
        record, lines = self.folder.record, self.folder.epochs
        if record is None:
            return False
        if self._client is None:
            # first: a client migrates too, without the lock
            self._experiment_id = open_store(self.uri, self.experiment)
            client = MlflowClient(tracking_uri=self.uri)
            if final and self.done and _exists(client, _sent(self.folder, self.experiment)["run_id"]):
                return False
            self._run_id, self._steps = self._attach(client, self._experiment_id, record)
            self._client = client
        new = [step for step in range(len(lines)) if step not in self._steps]
        batch = METRICS // max(1, *map(len, lines)) if lines else 1  # whole epochs: a batch is stored or it is not
        for start in range(0, len(new), batch):
            steps = new[start : start + batch]
            metrics = [metric for step in steps for metric in _epoch_metrics(lines[step], step)]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._steps.update(steps)
        if final:
            self._finish(self._client, record)
        self._note(record, len(lines), done=final)
        return True

    def _note(self, record: Mapping[str, Any], epochs: int, done: bool) -> None:
        home, earlier = _sent(self.folder), _sent(self.folder, self.experiment)
        state = {**self._state(record, epochs, done), "run_id": self._run_id, "experiment_id": self._experiment_id}
        if "parent" in earlier:  # whoever sends a record later need not know it
            state = {"parent": earlier["parent"], **state}
        if home.get("experiment", self.experiment) != self.experiment:
            state = {**home, "shared": {**home.get("shared", {}), self.experiment: state}}
        elif "shared" in home:
            state["shared"] = home["shared"]
        write_json(self.folder.path / "tracking.json", state)

    def _attach(self, client: MlflowClient, experiment_id: str, record: Mapping[str, Any]) -> tuple[str, set[int]]:
        """The run of this key, created where there is none, with what is known at its start; the steps it has."""
        tags = {name: value for name, value in self._tags(record).items() if value is not None}
        found = client.search_runs([experiment_id], f"tags.`noisysam.key` = '{self.folder.key}'", max_results=1)
        run = found[0] if found else client.create_run(experiment_id, _milliseconds(record["started"]), tags=tags)
        run_id = str(run.info.run_id)
        # MLflow refuses a second value, and a resumed run may have other unkeyed ones (where its data lie, ...).
        params = [Param(k, v) for k, v in _parameters(record).items() if k not in run.data.params]
        for start in range(0, len(params), PARAMS):
            client.log_batch(run_id, params=params[start : start + PARAMS])
        client.log_inputs(run_id, datasets=[self._dataset(record)])  # MLflow keeps one of each name and digest
        if not found:
            return run_id, set()
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        client.update_run(run_id, status="RUNNING")
        return run_id, {metric.step for metric in client.get_metric_history(run_id, SEQUENCE)}

    def _tags(self, record: Mapping[str, Any]) -> dict[str, str | None]:
        rows = {}  # the run's row in each study of the store that has it
        for path in sorted((self.folder.store / "studies").glob("*.json")):
            for cell in read_json(path)["cells"]:
                if cell["key"] == self.folder.key:
                    rows[path.stem] = str(cell["row"])
        return {
            "mlflow.runName": record["name"],
            "mlflow.parentRunId": self.parent_run_id,
            "noisysam.key": self.folder.key,
            "noisysam.oracle": "oracle: " + "; ".join(record["oracle"]) if record["oracle"] else "blind",
            "noisysam.commit": record["environment"]["commit"],
            "noisysam.noise_digest": record["noise"]["digest"],
            "noisysam.device": record["resolved"]["device_name"],
            "noisysam.study": ", ".join(rows) or None,
            "noisysam.row": self.row or ", ".join(dict.fromkeys(rows.values())) or None,
            "noisysam.seed": str(record["config"]["seed"]),
        }

    def _dataset(self, record: Mapping[str, Any]) -> DatasetInput:
        """The data set with these labels: its facts and the place of the label file, not its content."""
        noise = record["noise"]
        labels = self.folder.store / "labels" / f"{noise['digest'][:16]}.npz"
        dataset = Dataset(
            name=record["config"]["dataset"],
            digest=noise["digest"][:DIGEST],
            source_type="local",
            source=json.dumps({"uri": str(labels.absolute())}),
            profile=json.dumps({name: noise[name] for name in ("type", "rate", "flip_rate")}),
        )
        return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])

    def _finish(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        ended = _milliseconds(record["ended"]) if record["ended"] else None  # none: it was killed
        if record["status"] == "finished":
            values = {**record["results"], **record["cost"]}
            metrics = [Metric(f"final_{k}", _finite(v), ended, 0) for k, v in values.items() if v is not None]
            client.log_batch(self._run_id, metrics=metrics)
        for name in ("record.json", "epochs.csv", "weights.safetensors"):
            if (self.folder.path / name).exists():
                client.log_artifact(self._run_id, str(self.folder.path / name))
        client.log_dict(self._run_id, record["noise"], "noise.json")
        if (self.folder.path / "probes").exists():
            client.log_artifacts(self._run_id, str(self.folder.path / "probes"), "probes")
            client.log_batch(self._run_id, metrics=list(_probe_metrics(self.folder)))
        client.set_terminated(self._run_id, STATUS.get(record["status"], "KILLED"), ended)


def _sent(folder: RunFolder, experiment: str | None = None) -> dict[str, Any]:
    """What tracking.json says: of the first experiment that the run was sent to, with the others under ``shared``; or
    of ``experiment`` alone."""
    path = folder.path / "tracking.json"
    home = read_json(path) if path.exists() else {}
    if experiment is None or home.get("experiment") == experiment:
        return home
    shared: dict[str, Any] = home.get("shared", {}).get(experiment, {})
    return shared


def _probed(folder: RunFolder) -> dict[str, Any]:
    """What tracking.json says of the results of probes: a digest of each."""
    found = {path.stem: file_digest(path)[:16] for path in sorted((folder.path / "probes").glob("*.json"))}
    return {"probes": found} if found else {}


def _probe_metrics(folder: RunFolder) -> Iterator[Metric]:
    """The figures of probes; looked at anew, a network has new ones, which count from the file's time on."""
    for path in sorted((folder.path / "probes").glob("*.json")):
        for name, value in read_json(path).get("scalars", {}).items():
            yield Metric(f"probe/{path.stem}.{name}", _finite(value), round(path.stat().st_mtime * 1000), 0)


def _parameters(record: Mapping[str, Any]) -> dict[str, str]:
    flat = _flat(record["config"]) | _flat(record["resolved"], "resolved.")
    return {name: str(value)[:VALUE] for name, value in flat.items() if value is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _epoch_metrics(line: Mapping[str, float | None], step: int) -> list[Metric]:
    """The values of one epoch. Their time is the epoch's own, so that sending them again adds nothing."""
    time = round((line["time"] or 0) * 1000)
    values = {name: value for name, value in line.items() if name not in UNSENT and value is not None}
    return [Metric(name, _finite(value), time, step) for name, value in values.items()]


def _finite(value: float) -> float:
    """Infinities as nan, which MLflow stores as such; it would turn infinities into very large numbers."""
    return float(value) if math.isfinite(value) else math.nan


def _milliseconds(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
