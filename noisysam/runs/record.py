"""The record of a run on disk: plain JSON and CSV, written before anything is sent anywhere.

Layout of a store (``--store``, default ``runs``)::

    runs/<key>/record.json       ``schema.RunRecord``
    runs/<key>/status.json       ``schema.RunStatus``, for commands that look at many runs
    runs/<key>/epochs.csv        one line per epoch and stage
    runs/<key>/confusion.csv     test images by class and predicted class, at the end
    runs/<key>/weights.safetensors, checkpoint.pt, tracking.json
    runs/<key>/snapshots/<stage>-<epoch>.safetensors   where --snapshots asked for them
    runs/<key>/probes/<probe>.json                     ``schema.ProbeResult``, beside its pictures
    runs/labels/<digest>.npz     label files, shared by the runs that use them
    runs/studies/<name>.json     ``schema.StudyPlan``
"""

import csv
import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from noisysam.core.errors import DamagedFile, RunLocked, UserError
from noisysam.core.files import atomic, read_file, read_json, write_json
from noisysam.runs.schema import PROBE_SCHEMA, RunRecord, RunStatus, Status, StudyPlan, read
from noisysam.runs.summary import collapsed

if TYPE_CHECKING:
    from torch import nn

    from noisysam.runs.schema import PlannedCell


class RunFolder:
    """The folder of one run in a store."""

    def __init__(self, store: Path, key: str) -> None:
        self.store, self.key, self.path = store, key, store / key

    @property
    def record(self) -> RunRecord | None:
        """The record, None where there is none yet; ``DamagedFile`` for one that cannot be read."""
        path = self.path / "record.json"
        if not path.exists():
            return None
        record = read(RunRecord, path)
        if record["key"] != self.key:
            raise DamagedFile(path, f"it is the record of run {record['key']}")
        return record

    @property
    def sound_record(self) -> RunRecord | None:
        """The record, None where there is none or it cannot be read, of which a warning names the file."""
        try:
            return self.record
        except DamagedFile as error:
            warnings.warn(str(error), stacklevel=2)
            return None

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record, then the status."""
        write_json(self.path / "record.json", record)
        self.write_status(record)

    def write_status(self, record: Mapping[str, Any]) -> None:
        """Replace the status, of the record that was just written."""
        status = {name: record[name] for name in ("schema", "key", "status")}
        size = (self.path / "record.json").stat().st_size
        write_json(self.path / "status.json", {**status, "size": size})

    @property
    def status(self) -> Status | None:
        """How the run stands, None where there is no record. ``DamagedFile`` where neither status nor record can be
        read. A status that does not describe the present record, such as one of an earlier version, is passed over."""
        try:
            size = (self.path / "record.json").stat().st_size
        except FileNotFoundError:
            return None
        try:
            found = read(RunStatus, self.path / "status.json")
        except DamagedFile:
            found = None
        if found is not None and found["key"] == self.key and found["size"] == size:
            return found["status"]
        record = self.record
        return None if record is None else record["status"]

    @property
    def epochs(self) -> list[dict[str, float | None]]:
        """The lines of epochs.csv: numbers, None where a value was not measured in that epoch; ``DamagedFile`` where
        they cannot be read."""
        return self.columns(None)

    def columns(self, only: Collection[str] | None) -> list[dict[str, float | None]]:
        """``epochs`` with these columns alone, as far as they are there."""
        path = self.path / "epochs.csv"
        if not path.exists():
            return []
        try:
            return read_epochs(read_file(path).decode(), only)
        except (ValueError, csv.Error) as error:
            raise DamagedFile(path, f"cannot be read ({error})") from None

    def write_epochs(self, lines: Sequence[Mapping[str, float | None]]) -> None:
        """Replace epochs.csv. Columns in the order in which they first appear."""
        columns = list(dict.fromkeys(name for line in lines for name in line))
        with atomic(self.path / "epochs.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for line in lines:
                writer.writerow({k: "" if v is None else repr(v) for k, v in line.items()})

    def write_weights(
        self, networks: "Sequence[nn.Module]", stage: int | None = None, epoch: int | None = None
    ) -> None:
        """Write the weights of the reported networks: the final ones, or those at the end of an epoch."""
        from safetensors.torch import save

        place = self.path / ("weights.safetensors" if epoch is None else f"snapshots/{stage}-{epoch}.safetensors")
        weights = {f"{k}.{n}": v.contiguous() for k, m in enumerate(networks) for n, v in m.state_dict().items()}
        with atomic(place) as temporary:
            temporary.write_bytes(save(weights, {"key": self.key}))  # so that a full disk is an OSError

    @property
    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Test images by class (rows) and predicted class (columns) at the end; None where it was not recorded,
        ``DamagedFile`` where it cannot be read."""
        path = self.path / "confusion.csv"
        if not path.exists():
            return None
        try:
            counts = np.loadtxt(io.BytesIO(read_file(path)), dtype=np.int64, delimiter=",", ndmin=2)
        except ValueError as error:
            raise DamagedFile(path, f"cannot be read ({error})") from None
        if counts.shape[0] != counts.shape[1] or not counts.size:
            raise DamagedFile(path, f"a square table was expected, not {counts.shape[0]} x {counts.shape[1]}")
        return counts

    @property
    def collapsed(self) -> bool | None:
        """Whether the predictions of the finished run fell to one class (``summary.collapsed``); None where that is not
        known. Records of earlier versions do not say it: it is then computed from confusion.csv."""
        record = self.sound_record
        if record is None or record["status"] != "finished":
            return None
        if "collapsed" in record:
            return record["collapsed"]
        try:
            counts = self.confusion
        except DamagedFile as error:
            warnings.warn(str(error), stacklevel=2)
            return None
        return None if counts is None else collapsed(counts)

    def write_confusion(self, counts: npt.NDArray[np.int64]) -> None:
        """Replace confusion.csv."""
        with atomic(self.path / "confusion.csv") as temporary:
            temporary.write_text(confusion_text(counts))

    @property
    def probes(self) -> list[dict[str, Any]]:
        """The results of probes of this run in the order of their names: the content of each file."""
        contents = map(read_json, sorted((self.path / "probes").glob("*.json")))
        return [content for content in contents if content.get("schema") == PROBE_SCHEMA]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, so that no second process trains it at the same time; ``RunLocked`` where one does. Removes
        temporary files that a killed process left."""
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunLocked(self.key) from None
            for half in (*self.path.glob(".*"), *self.path.glob("snapshots/.*")):
                half.unlink(missing_ok=True)
            yield


def find_run(store: Path, key: str) -> RunFolder:
    """The run whose key begins with ``key``; ``UserError`` where there is none, or more than one."""
    keys = [path.parent.name for path in store.glob("*/record.json") if path.parent.name.startswith(key)]
    if not keys:
        raise UserError(
            f"no run {key!r} in {store}: give a key, the name of a folder there, or its first digits; `noisysam sweep"
            " STUDY.yaml --dry-run` lists the keys of a study"
        )
    if len(keys) > 1 and key not in keys:
        shown = ", ".join(sorted(keys)[:3]) + ", ..." * (len(keys) > 3)
        raise UserError(f"{key!r} is the beginning of {len(keys)} runs in {store}: {shown}; give more digits")
    return RunFolder(store, key if key in keys else keys[0])


def read_epochs(text: str, only: Collection[str] | None = None) -> list[dict[str, float | None]]:
    """The lines of epochs.csv, of all columns or ``only`` of some; ``ValueError`` where they are not numbers, or do not
    fit the header."""
    header, *lines = csv.reader(text.splitlines()) if text else [[]]
    if len(set(header)) < len(header):
        raise ValueError("a column is given twice")
    if any(len(line) != len(header) for line in lines):
        raise ValueError("a line does not fit the header")
    places = [(name, place) for place, name in enumerate(header) if only is None or name in only]
    return [{name: _number(line[place]) for name, place in places} for line in lines]


def _number(text: str) -> float | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def confusion_text(counts: npt.NDArray[np.int64]) -> str:
    """The content of confusion.csv."""
    return "".join(",".join(map(str, row)) + "\n" for row in counts.tolist())


STUDY = r"\w[\w +.-]{0,99}"  # the name of a study


def study_path(store: Path, name: str) -> Path:
    """The file of a study's plan."""
    return store / "studies" / f"{name}.json"


def study_names(store: Path) -> list[str]:
    """The studies of a store."""
    return sorted(path.stem for path in (store / "studies").glob("*.json"))


def load_study(store: Path, name: str) -> StudyPlan:
    """The plan of a study."""
    path = study_path(store, name)
    if not path.exists():
        known = ", ".join(study_names(store)) or "none"
        raise UserError(f"no study {name!r} in {store} (known: {known}); sweep or import it first")
    return read(StudyPlan, path)


def rows_of(store: Path, key: str) -> dict[str, str]:
    """The row of a run in each study of the store that has it. A plan that cannot be read is passed over."""
    rows: dict[str, str] = {}
    for name in study_names(store):
        with suppress(DamagedFile):
            rows.update((name, cell["row"]) for cell in load_study(store, name)["cells"] if cell["key"] == key)
    return rows


def study_records(store: Path, name: str) -> "Iterator[tuple[PlannedCell, RunRecord | None]]":
    """Each cell of a study with its record, None where it has not run or its record cannot be read (with a
    warning)."""
    for cell in load_study(store, name)["cells"]:
        yield cell, RunFolder(store, cell["key"]).sound_record
