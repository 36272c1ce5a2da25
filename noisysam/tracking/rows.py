"""The runs of a study's rows in MLflow: between the run of the study and those of its cells.

A row's run has the mean and the standard deviation over seeds of each measure as metrics ``mean/...`` and ``sd/...``,
in percent where the measure is a share, with the noise rate in percent as their step, so that comparing the rows draws
accuracy against noise. A point is sent when all seeds of the plan have ended. ``last at 80`` is the mean so far at that
rate, a column of the table of rows.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from noisysam.core.errors import DamagedFile, UserError
from noisysam.noise.base import NOISE
from noisysam.runs import measures
from noisysam.runs.record import RunFolder, load_study
from noisysam.runs.schema import RunRecord
from noisysam.tracking import pages
from noisysam.tracking.client import identifier
from noisysam.tracking.tracker import STATUS, milliseconds

Point = tuple[str, int]  # a metric and its step


@dataclass(frozen=True)
class Place:
    """A cell of a study, with its record where it has finished. ``ended``: whether it finished or failed; ``rate``:
    None where the labels are noisy and nobody knows how much."""

    row: str
    key: str
    noise_type: str
    rate: float | None
    record: RunRecord | None
    ended: bool
    collapsed: bool


def places(store: Path, study: str, rows: Mapping[str, str]) -> list[Place]:
    """The cells of the study's plan in the store; without a plan those of ``rows`` (key -> row) that have records."""
    try:
        planned = [(c["row"], c["key"], c["config"]) for c in load_study(store, study)["cells"]]
    except UserError:
        records = {key: RunFolder(store, key).sound_record for key in rows}
        planned = [(rows[key], key, record["config"]) for key, record in records.items() if record is not None]
    return [_place(RunFolder(store, key), row, config) for row, key, config in planned]


def _place(folder: RunFolder, row: str, config: Mapping[str, Any]) -> Place:
    try:
        status = folder.status
    except DamagedFile:
        status = None
    record = folder.sound_record if status == "finished" else None
    noise_type, rate = config.get("noise_type", "symmetric"), config.get("noise", 0.0)
    kind = noise_type.partition(":")[0]
    if record is not None and kind in NOISE and NOISE[kind].brings_labels:
        rate = record["noise"]["flip_rate"]
    return Place(row, folder.key, noise_type, rate, record, status in ("finished", "failed"), bool(folder.collapsed))


def step(rate: float) -> int:
    """The step of a noise rate: percent."""
    return round(100 * rate)


def points(cells: Sequence[Place], prefix: str = "") -> dict[Point, tuple[float, int]]:
    """The points of one row's curves: (metric, step) -> value and time in milliseconds. Rates that wait for seeds are
    left out, and cells whose rate is not known. ``prefix``: of the metric's last part, where a study has several noise
    types."""
    found: dict[Point, tuple[float, int]] = {}
    for rate in sorted({step(cell.rate) for cell in cells if cell.rate is not None}):
        here = [cell for cell in cells if cell.rate is not None and step(cell.rate) == rate]
        records = [cell.record for cell in here if cell.record is not None]
        if not records or not all(cell.ended for cell in here):
            continue
        ended = max(milliseconds(str(record["ended"])) for record in records)
        for measure in measures.shown("table"):
            values = [v for record in records if (v := measure.value(record["results"])) is not None and v == v]
            if values:
                name = f"{prefix}{measure.name}"
                found[f"mean/{name}", rate] = measure.scale * fmean(values), ended
                if len(values) > 1:
                    found[f"sd/{name}", rate] = measure.scale * stdev(values), ended
    return found


def columns(cells: Sequence[Place]) -> dict[str, float]:
    """The columns of the table of rows with the means so far in percent, rounded as a table prints them."""
    single = len({cell.noise_type for cell in cells}) == 1
    found: dict[str, list[float]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.noise_type, cell.rate or 0.0)):
        values = found.setdefault(column(cell, single), [])
        if cell.record is not None:
            values.append(cell.record["results"]["last"])
    return {name: round(100 * fmean(values), 2) if values else float("nan") for name, values in found.items()}


def column(cell: Place, single: bool) -> str:
    """'last at 80', or 'last at pair 40' where a study has several noise types."""
    kind = "" if single else "".join(c if c.isalnum() or c in "_-. " else " " for c in cell.noise_type) + " "
    return f"last at {kind}{100 * cell.rate:.4g}" if cell.rate is not None else f"last at {kind}".strip()


class Rows:
    """The runs of a study's rows."""

    def __init__(self, client: MlflowClient, experiment_id: str, study: str, parent: str) -> None:
        self.client, self.experiment_id, self.study, self.parent = client, experiment_id, study, parent
        found = client.search_runs([experiment_id], "tags.`noisysam.kind` = 'row'", order_by=["attributes.start_time"])
        mine = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]
        self.runs: dict[str, Run] = {}
        for run in mine:  # the first one, where two machines created one at the same time
            self.runs.setdefault(run.data.tags["noisysam.row"], run)

    def open(self, names: Iterable[str]) -> dict[str, str]:
        """The run of each row, created where there is none: name -> identifier. The first of them is the newest, so
        that MLflow lists them in their order."""
        now = round(time.time() * 1000)
        for number, name in enumerate(dict.fromkeys(names)):
            if name not in self.runs:
                self._create(name, now - 1000 * number)
        return {name: str(run.info.run_id) for name, run in self.runs.items()}

    def _create(self, name: str, started: int) -> None:
        tags = {
            "mlflow.runName": name,
            "mlflow.parentRunId": self.parent,
            "mlflow.runType": "evaluation",  # the page of an experiment opens with the parents of such runs expanded
            "noisysam.kind": "row",
            "noisysam.study": self.study,
            "noisysam.row": name,
        }
        made = self.client.create_run(self.experiment_id, started, tags=tags)
        identifier(made.info.run_id)
        self.runs[name] = made

    def write(self, name: str, cells: Sequence[Place], single: bool, search: str | None = None) -> None:
        """Send what is new of a row. Where a point has changed, as with seeds that were added, the row gets a new run:
        MLflow would draw both values."""
        wanted: dict[Point, tuple[float, int]] = {}
        for kind in dict.fromkeys(cell.noise_type for cell in cells):
            prefix = "" if single else "".join(c if c.isalnum() or c in "_-." else "-" for c in kind) + "/"
            wanted |= points([cell for cell in cells if cell.noise_type == kind], prefix)
        there = self._history(name)
        if any(point not in wanted or abs(wanted[point][0] - value) > 1e-9 for point, value in there.items()):
            old = self.runs[name]
            self._create(name, old.info.start_time)
            self.client.delete_run(old.info.run_id)
            there = {}
        run = self.runs[name]
        metrics = [Metric(n, value, at, s) for (n, s), (value, at) in wanted.items() if (n, s) not in there]
        now, known = round(time.time() * 1000), run.data.metrics
        metrics += [
            Metric(n, value, now, 0)
            for n, value in columns(cells).items()
            if value == value and abs(known.get(n, -1.0) - value) > 1e-9
        ]
        if metrics:
            self.client.log_batch(run.info.run_id, metrics=metrics)
        for tag, value in _tags(cells, search).items():
            if run.data.tags.get(tag) != value:
                self.client.set_tag(run.info.run_id, tag, value)
        if all(cell.ended for cell in cells):
            self.client.set_terminated(run.info.run_id, STATUS["finished"])
        else:
            self.client.update_run(run.info.run_id, status="SCHEDULED")  # it waits for cells

    def _history(self, name: str) -> dict[Point, float]:
        """The points that the store has of a row."""
        run = self.runs[name]
        names = [n for n in run.data.metrics if n.startswith(("mean/", "sd/"))]
        return {(n, m.step): m.value for n in names for m in self.client.get_metric_history(run.info.run_id, n)}


def _tags(cells: Sequence[Place], search: str | None) -> dict[str, str]:
    """What the table of rows says beside the figures."""
    reasons = dict.fromkeys(r for cell in cells if cell.record is not None for r in cell.record["oracle"])
    fallen = sum(cell.collapsed for cell in cells)
    found = {"noisysam.oracle": f"oracle: {'; '.join(reasons)}" if reasons else "blind"}
    found |= {"noisysam.collapsed": f"{fallen} of {len(cells)} runs collapsed"} if fallen else {}
    return found | ({"noisysam.search": search} if search else {})


def searches(store: Path, study: str) -> dict[str, str]:
    """The budget of each row of a study that was tuned."""
    try:
        found = load_study(store, study).get("search", {})
    except UserError:
        return {}
    return {
        row: f"{s['trials']} trials" + "".join(f", {field} {value:g}" for field, value in s["chosen"].items())
        for row, s in found.items()
    }


def view_tags(cells: Sequence[Place]) -> dict[str, str]:
    """The views of a study's experiment, as its tags."""
    return pages.tags(list(columns(cells)))
