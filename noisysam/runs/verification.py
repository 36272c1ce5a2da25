"""Checks of an archive before anything of it is taken into a store.

An archive may come from a stranger. Every file is validated by name, type and range; keys, results and costs are
computed again from configurations, digests and epochs; label files are known by their content. What cannot be found
out without training is whether the epochs are those of a real training.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from noisysam.core.errors import DamagedFile, UserError
from noisysam.noise import labels as label_files
from noisysam.runs.config import RunConfig, key_of, validate
from noisysam.runs.measures import MEASURES
from noisysam.runs.predictions import PREDICTIONS, read_predictions
from noisysam.runs.record import STUDY, read_epochs
from noisysam.runs.schema import PROBE_SCHEMA, ProbeResult, RunRecord, StudyPlan, parse, read
from noisysam.runs.summary import collapsed, cost, results

RUN = r"[0-9a-f]{16}"
NAMES = re.compile(  # of the files that a store takes
    rf"{RUN}/(record\.json|epochs\.csv|confusion\.csv|predictions\.npz|weights\.safetensors|probes/[a-z][a-z0-9-]*\.json)"
    rf"|labels/{RUN}\.npz|studies/{STUDY}\.json"
)
TOLERANCE = 1e-9  # relative, of what is computed again: sums of another numpy


@dataclass(frozen=True)
class Archive:
    """What an archive holds for a store. ``files``: path in the store -> its content; ``places``: path in the store ->
    the file that it is in, or comes from; ``checkpoints``: those of unfinished runs by key."""

    source: Path
    files: Mapping[str, Callable[[], bytes]]
    places: Mapping[str, Path]
    plugin: Path | None = None
    configs: dict[str, RunConfig] = field(default_factory=dict)
    checkpoints: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def records(self) -> dict[str, RunRecord]:
        """The records by key."""
        keys = [name.partition("/")[0] for name in self.files if name.endswith("/record.json")]
        return {key: self._parse(RunRecord, f"{key}/record.json") for key in keys}

    @cached_property
    def unfinished(self) -> dict[str, RunRecord]:
        """The records of the runs that there are checkpoints of."""
        return {key: read(RunRecord, path.with_suffix(".json")) for key, path in self.checkpoints.items()}

    @cached_property
    def studies(self) -> dict[str, StudyPlan]:
        """The plans by name."""
        names = [name for name in self.files if name.startswith("studies/")]
        return {Path(name).stem: self._parse(StudyPlan, name) for name in names}

    @cached_property
    def probes(self) -> dict[str, ProbeResult]:
        """The results of probes by path."""
        return {name: self._parse(ProbeResult, name) for name in self.files if "/probes/" in name}

    def _parse(self, kind: Any, name: str) -> Any:
        return parse(kind, self.files[name](), self.places[name])

    def fault(self, name: str, reason: str) -> DamagedFile:
        return DamagedFile(self.places[name], f"{name}: {reason}" if self.places[name].name not in name else reason)


def verify(archive: Archive, store: Path) -> None:
    """``UserError`` names the first file that the archive should not hold, or that does not hold what it should.
    ``store``: whose label files count as known."""
    for name in archive.files:
        if not NAMES.fullmatch(name):
            raise UserError(f"{archive.source}: {name!r} is no file of a store")
    for name in archive.files:
        key = name.partition("/")[0]
        if key not in ("labels", "studies") and key not in archive.records and not (store / key).exists():
            raise archive.fault(name, "it belongs to a run that is neither in the archive nor in the store")
    for name in archive.files:
        if name.startswith("labels/") and not _labels(archive.places[name]).digest.startswith(Path(name).stem):
            raise archive.fault(name, "its content is not that of its name")
    for key in archive.records:
        _check_run(archive, key, store)
    for key in archive.checkpoints:
        _check_unfinished(archive, key)
    for name, found in archive.probes.items():
        if found["schema"] != PROBE_SCHEMA or name != f"{found['key']}/probes/{found['probe']}.json":
            raise archive.fault(name, "it is not the result of this probe for this run")
    for study in archive.studies:
        _check_study(archive, study)


def _check_run(archive: Archive, key: str, store: Path) -> None:
    name, record = f"{key}/record.json", archive.records[key]
    if record["key"] != key or record["status"] != "finished":
        raise archive.fault(name, f"it is not the record of the finished run {key}")
    config = _config(archive, name, record["config"])
    archive.configs[key] = config
    found = key_of(config, record["revisions"], record["digests"])
    if found != key:
        raise archive.fault(name, f"its configuration and digests are those of run {found}")
    if set(record["revisions"]) != set(config.recipe().revisions):
        raise archive.fault(name, "revisions: not those of its components")
    if config.oracle() and not record["oracle"]:
        raise archive.fault(name, f"oracle: it says blind, its configuration is not ({config.oracle()[0]})")
    recipe = config.recipe()
    if record["revisions"] == recipe.revisions:  # the defaults of an earlier revision may have been others
        for part, today in (("optimizer_options", recipe.optimizer_options), ("method_options", recipe.method_options)):
            _same(archive, name, part, cast(Mapping[str, Any], record)[part], today.model_dump(mode="json"))
    label = f"labels/{record['digests'].get('labels', '')[:16]}.npz"
    place = archive.places.get(label, store / label)
    if not place.exists():
        raise archive.fault(name, f"its label file {label} is neither in the archive nor in the store")
    labels = _labels(place)
    _same(archive, name, "noise", cast(Mapping[str, Any], record["noise"]), labels.card())
    if record["noise"]["digest"] != record["digests"]["labels"]:
        raise archive.fault(name, "noise.digest: not that of the labels")
    _check_epochs(archive, key, record)
    predictions = archive.places.get(f"{key}/{PREDICTIONS}")
    if predictions is not None:
        read_predictions(predictions, record["data"]["train"], labels.classes)
    if f"{key}/confusion.csv" in archive.files:
        _check_confusion(archive, f"{key}/confusion.csv", record)
    elif "collapsed" in record:
        raise archive.fault(name, "collapsed: it cannot be verified without confusion.csv")


def _check_unfinished(archive: Archive, key: str) -> None:
    """The record beside a checkpoint; the checkpoint itself is checked where the run is resumed."""
    path, record = archive.checkpoints[key].with_suffix(".json"), archive.unfinished[key]
    if not archive.checkpoints[key].is_file():
        raise DamagedFile(archive.checkpoints[key], "missing, though its record is there")
    if not re.fullmatch(RUN, key) or record["key"] != key or record["status"] == "finished":
        raise DamagedFile(path, f"it is not the record of the unfinished run {key}")
    if record["config"].get("plugin") and archive.plugin is None:
        raise DamagedFile(path, f"trained with {record['config']['plugin']}: give it with --plugin, if you trust it")
    plugin = archive.plugin if record["config"].get("plugin") else None
    config = validate({**record["config"], "plugin": plugin}, f"{path}: ")
    if key_of(config, record["revisions"], record["digests"]) != key:
        raise DamagedFile(path, "its configuration and digests are not those of its key")


def _config(archive: Archive, name: str, values: Mapping[str, Any]) -> RunConfig:
    """A configuration that was written down by its JSON."""
    if values.get("plugin") and archive.plugin is None:
        raise archive.fault(name, f"trained with {values['plugin']}: give it with --plugin, if you trust it")
    plugin = archive.plugin if values.get("plugin") else None
    return validate({**values, "plugin": plugin}, f"{archive.places[name]}: ")


def _labels(place: Path) -> label_files.NoisyLabels:
    return label_files.load(place)


def _same(archive: Archive, name: str, part: str, given: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare what both have."""
    for item in given:
        if item in found and not _equal(given[item], found[item]):
            raise archive.fault(name, f"{part}.{item}: {given[item]!r} is given, {found[item]!r} is found")


def _equal(a: Any, b: Any) -> bool:
    if a is None:  # what could not be measured
        return b is None or (isinstance(b, float) and math.isnan(b))
    if isinstance(a, float) and isinstance(b, int | float) and not isinstance(b, bool):
        return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))
    if isinstance(a, list) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _check_epochs(archive: Archive, key: str, record: RunRecord) -> None:
    """The epochs follow each other, their values are in range, and results and cost follow from them."""
    name = f"{key}/epochs.csv"
    if name not in archive.files:
        raise archive.fault(f"{key}/record.json", "the epochs of the run are missing")
    try:
        lines = read_epochs(archive.files[name]().decode())
        stage, epoch = 0, -1
        for line in lines:
            if (line["stage"], line["epoch"]) not in ((stage, epoch + 1), (stage + 1, 0)):
                raise ValueError(f"stage {line['stage']}, epoch {line['epoch']} follows stage {stage}, epoch {epoch}")
            stage, epoch = cast(int, line["stage"]), cast(int, line["epoch"])
            for m in MEASURES:
                value = line.get(m.column) if m.column else None
                if value is not None and not math.isnan(value) and not m.low <= value <= m.high:
                    raise ValueError(f"{m.column} {value} in stage {stage}, epoch {epoch}")
        found, spent = results(lines, stage), cost(lines)
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise archive.fault(name, f"no epochs of a finished run ({error})") from None
    given = cast(Mapping[str, Any], record["results"])
    if set(given) != set(found):
        raise archive.fault(
            f"{key}/record.json", f"results: {', '.join(set(given) ^ set(found))}: not as in its epochs"
        )
    _same(archive, f"{key}/record.json", "results", given, found)
    _same(archive, f"{key}/record.json", "cost", cast(Mapping[str, Any], record["cost"]), spent)


def _check_confusion(archive: Archive, name: str, record: RunRecord) -> None:
    try:
        counts = [[int(n) for n in line.split(",")] for line in archive.files[name]().decode().splitlines()]
    except ValueError as error:
        raise archive.fault(name, f"no counts ({error})") from None
    classes = record["noise"].get("classes") or len(record["noise"]["matrix"] or ())
    square = counts and all(len(row) == len(counts) == classes for row in counts)
    if not square or min(map(min, counts)) < 0 or sum(map(sum, counts)) != record["data"]["test"]:
        raise archive.fault(name, "not the counts of this run's test images by class and predicted class")
    if "collapsed" in record and record["collapsed"] != collapsed(np.array(counts)):
        raise archive.fault(name, f"the record says collapsed: {record['collapsed']}, its predictions do not")


def _check_study(archive: Archive, study: str) -> None:
    """Each cell of the plan has the configuration of its run, where the archive has the run."""
    name, plan = f"studies/{study}.json", archive.studies[study]
    if plan["name"] != study:
        raise archive.fault(name, f"it is the plan of study {plan['name']!r}")
    for row, search in plan.get("search", {}).items():
        if not all(re.fullmatch(RUN, key) for key in search["runs"]):
            raise archive.fault(name, f"search of row {row!r}: a run of it is no key")
    for cell in plan["cells"]:
        config, where = cell["config"], f"row {cell['row']!r}, seed {cell['seed']}"
        if not re.fullmatch(RUN, cell["key"]):
            raise archive.fault(name, f"{where}: {cell['key']!r} is no key")
        if (cell["noise"], cell["seed"]) != (config.get("noise"), config.get("seed")):
            raise archive.fault(name, f"{where}: noise and seed are not those of its configuration")
        run = archive.configs.get(cell["key"])
        if run is not None and _config(archive, name, config).keyed() != run.keyed():
            raise archive.fault(name, f"{where}: its configuration is not that of run {cell['key']}")
