"""Send the record of a run to a tracking store of MLflow.

The run's folder is the original and the store a copy of it. A transfer first asks the store what it has, so one that
was interrupted at any point is completed by the next, and nothing is stored twice.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from noisysam.core.files import read_json, write_json
from noisysam.runs.measures import MEASURE, MEASURES
from noisysam.runs.record import RunFolder, rows_of
from noisysam.runs.summary import COLLAPSED, noise_percent
from noisysam.tracking.address import Warn, to_warnings
from noisysam.tracking.client import exists, identifier, one_line, open_store
from noisysam.tracking.state import NAME, complete, is_complete, sent

STATUS = {"finished": "FINISHED", "failed": "FAILED"}  # anything else at the end of a run: KILLED


# Limits of MLflow: metrics and parameters of one batch, lengths of a parameter's value, a data set's digest and a tag.
METRICS, PARAMS, VALUE, DIGEST, NOTE = 1000, 100, 6000, 36, 5000


SEQUENCE = "epoch"  # a column that every line of epochs.csv has: its history tells which epochs the store has


UNSENT = {"time", "log_seconds"}  # sent as timestamp; known only after the transfer


MEASURED = {measure.column: measure for measure in MEASURES if measure.column}  # columns of epochs.csv


class Tracker:
    """Sends those parts of a run's record that a store does not have yet.

    Errors of the store are not raised: ``warn`` gets one line, and nothing is sent before the end of the run.
    ``parent_run_id`` is the parent of this run in MLflow, ``row`` its row in a study (default: taken from the studies
    in the folder of records).
    """

    def __init__(
        self,
        folder: RunFolder,
        uri: str,
        experiment: str,
        parent_run_id: str | None = None,
        row: str | None = None,
        warn: Warn = to_warnings,
    ) -> None:
        self.folder, self.uri, self.experiment = folder, uri, experiment
        self.parent_run_id, self.row, self.warn = parent_run_id, row, warn
        self._client: MlflowClient | None = None  # None until the run is found or created
        self._run_id = self._experiment_id = ""
        self._steps: set[int] = set()  # the epochs that the store has
        self._away = False

    def sync(self, final: bool = False) -> bool:
        """Send new epochs; with ``final``, also results, artifacts and status. Returns whether that succeeded."""
        if self._away and not final:
            return False
        try:
            self._send(final)
        except Exception as error:  # tracking must not end a run
            if not self._away:
                later = "the record is on disk; `noisysam sync` sends it later"
                self.warn(f"tracking of run {self.folder.key} stopped ({one_line(error)}): {later}")
            self._away = True
            with contextlib.suppress(Exception):
                if not sent(self.folder, self.experiment):  # keep the experiment for a later transfer
                    self._note({}, 0, done=False)
            return False
        self._away = False
        return True

    @property
    def done(self) -> bool:
        """Whether everything in the folder was sent to this store and experiment."""
        return is_complete(self.folder, self.uri, self.experiment, self.parent_run_id)

    def adopt(self) -> bool:
        """Give a run that was sent completely, but to another parent, its parent; whether there was such a run."""
        state = sent(self.folder, self.experiment)
        there = complete(self.folder, self.uri, self.experiment, self.folder.record or {}, len(self.folder.epochs))
        if self.parent_run_id is None or not there.items() <= state.items():
            return False
        client = MlflowClient(tracking_uri=self.uri)
        if not exists(client, state["run_id"]):
            return False
        client.set_tag(state["run_id"], "mlflow.parentRunId", self.parent_run_id)
        self._run_id, self._experiment_id = state["run_id"], state["experiment_id"]
        self._note(self.folder.record or {}, len(self.folder.epochs), done=True)
        return True

    def _send(self, final: bool) -> bool:
        """Send; False if there was nothing to send."""
        record, lines = self.folder.record, self.folder.epochs
        if record is None:
            return False
        if self._client is None:
            # before a client is made, which would migrate the store without the lock
            self._experiment_id = open_store(self.uri, self.experiment)
            client = MlflowClient(tracking_uri=self.uri)
            if final and self.done and exists(client, sent(self.folder, self.experiment).get("run_id", "")):
                return False
            self._run_id, self._steps = self._attach(client, self._experiment_id, record)
            self._client = client
        new = [step for step in range(len(lines)) if step not in self._steps]
        batch = (
            METRICS // max(1, *map(len, lines)) if lines else 1
        )  # whole epochs: a batch is stored completely or not at all
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
        home, earlier = sent(self.folder), sent(self.folder, self.experiment)
        state = complete(self.folder, self.uri, self.experiment, record, epochs, self.parent_run_id) | {"done": done}
        state |= {"run_id": self._run_id, "experiment_id": self._experiment_id}
        if "parent" in earlier:  # a later transfer need not know it
            state = {"parent": earlier["parent"], **state}
        if home.get("experiment", self.experiment) != self.experiment:
            state = {**home, "shared": {**home.get("shared", {}), self.experiment: state}}
        elif "shared" in home:
            state["shared"] = home["shared"]
        write_json(self.folder.path / NAME, state)

    def _attach(self, client: MlflowClient, experiment_id: str, record: Mapping[str, Any]) -> tuple[str, set[int]]:
        """Find or create the MLflow run of this key and send what is known at its start; returns the steps it has."""
        tags = {name: value for name, value in self._tags(record).items() if value is not None}
        found = client.search_runs([experiment_id], f"tags.`noisysam.key` = '{self.folder.key}'", max_results=1)
        run = found[0] if found else client.create_run(experiment_id, milliseconds(record["started"]), tags=tags)
        run_id = identifier(run.info.run_id)
        # MLflow refuses to change a parameter, and unkeyed ones (such as data_dir) may differ after a resume
        params = [Param(k, v) for k, v in _parameters(record).items() if k not in run.data.params]
        for start in range(0, len(params), PARAMS):
            client.log_batch(run_id, params=params[start : start + PARAMS])
        client.log_inputs(run_id, datasets=[self._dataset(record)])  # MLflow ignores one that it has
        if not found:
            return run_id, set()
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        client.update_run(run_id, status="RUNNING")
        return run_id, {metric.step for metric in client.get_metric_history(run_id, SEQUENCE)}

    def _tags(self, record: Mapping[str, Any]) -> dict[str, str | None]:
        rows = rows_of(self.folder.store, self.folder.key)
        row = self.row or ", ".join(dict.fromkeys(rows.values())) or None
        return {
            "mlflow.runName": run_title(record, row),
            "mlflow.parentRunId": self.parent_run_id,
            "noisysam.key": self.folder.key,
            "noisysam.oracle": "oracle: " + "; ".join(record["oracle"]) if record["oracle"] else "blind",
            "noisysam.commit": record["environment"]["commit"],
            "noisysam.noise_digest": record["noise"]["digest"],
            "noisysam.device": record["resolved"]["device_name"],
            "noisysam.study": ", ".join(rows) or None,
            "noisysam.row": row,
            "noisysam.cell": place_title(record, row),
            "noisysam.seed": str(record["config"]["seed"]),
        }

    def _dataset(self, record: Mapping[str, Any]) -> DatasetInput:
        """The data set with its noisy labels: name, digest, noise rate and path of the label file."""
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
        ended = milliseconds(record["ended"]) if record["ended"] else None  # None: the run was killed
        if record["status"] == "finished":
            values = {**record["results"], **record["cost"]}
            metrics = [
                Metric(f"final/{name}", _finite(MEASURE[name].scale * value if name in MEASURE else value), ended, 0)
                for name, value in values.items()
                if value is not None
            ]
            client.log_batch(self._run_id, metrics=metrics)
        for name in ("record.json", "epochs.csv", "weights.safetensors"):
            if (self.folder.path / name).exists():
                client.log_artifact(self._run_id, str(self.folder.path / name))
        if self.folder.collapsed:
            said = f"collapsed: at least {100 * COLLAPSED:g} % of the predictions are of one class"
            client.set_tag(self._run_id, "noisysam.collapsed", said)
        client.log_dict(self._run_id, record["noise"], "noise.json")
        if (self.folder.path / "probes").exists():
            client.log_artifacts(self._run_id, str(self.folder.path / "probes"), "probes")
            client.log_batch(self._run_id, metrics=list(_probe_metrics(self.folder)))
        client.set_terminated(self._run_id, STATUS.get(record["status"], "KILLED"), ended)


def _probe_metrics(folder: RunFolder) -> Iterator[Metric]:
    """The scalars of probes, with the time of their file: those of a repeated probe become the current values."""
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
    """The metrics of one epoch, with the time of the epoch, so that sending them again changes nothing."""
    time = round((line["time"] or 0) * 1000)
    found = []
    for name, value in line.items():
        if name not in UNSENT and value is not None:
            scale = MEASURED[name].scale if name in MEASURED else 1.0
            found.append(Metric(curve(name), _finite(scale * value), time, step))
    return found


def curve(column: str) -> str:
    """The metric of a column of epochs.csv. Those in percent are a group in MLflow's pages."""
    return f"percent/{column}" if column in MEASURED and MEASURED[column].percent else column


def place_title(record: Mapping[str, Any], row: str | None) -> str:
    """'SAM 80 %': what runs that differ in their seed alone have in common. ``row``: of a study."""
    config = record["config"]
    parts = [config.get("method", "ce"), config.get("opt", "sgd")]
    recipe = row or " ".join(part for part in parts if part != "ce")
    return f"{recipe} {noise_percent(config.get('noise_type', 'symmetric'), config.get('noise', 0.0))}"


def run_title(record: Mapping[str, Any], row: str | None) -> str:
    """'SAM 80 % #1': the short name of a run, the last number being its seed."""
    return f"{place_title(record, row)} #{record['config']['seed']}"


def _finite(value: float) -> float:
    """Replace infinities by nan, since MLflow stores infinities as very large numbers."""
    return float(value) if math.isfinite(value) else math.nan


def milliseconds(iso: str) -> int:
    """A time of a record as MLflow gives times."""
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
