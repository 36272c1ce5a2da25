"""A run's record on disk: plain JSON and CSV, written before anything is sent anywhere.

Layout of a store (``--store``, default ``runs``)::

    runs/<key>/record.json       what the run is, how it stands, what came out (schema below)
    runs/<key>/epochs.csv        one line per epoch and stage
    runs/<key>/confusion.csv     test images by class and predicted class, at the end
    runs/<key>/weights.safetensors, checkpoint.pt, tracking.json
    runs/<key>/snapshots/<stage>-<epoch>.safetensors   where --snapshots asked for them
    runs/<key>/probes/<probe>.json                     what `noisysam probe` found, beside its pictures
    runs/labels/<digest>.npz     label files, shared by the runs that use them
    runs/studies/<name>.json     a study: its file's text and its cells, each with the key of its run
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from noisysam.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn
from noisysam.core.files import atomic, read_json, write_json

RECORD_SCHEMA = 1


PROBE_SCHEMA = 1  # of a probe's result


class RunFolder:
    """The folder of one run in a store."""

    def __init__(self, store: Path, key: str) -> None:
        self.store, self.key, self.path = store, key, store / key

    @property
    def record(self) -> dict[str, Any] | None:
        """The record, None where there is none yet."""
        path = self.path / "record.json"
        if not path.exists():
            return None
        record = read_json(path)
        if record.get("schema") != RECORD_SCHEMA:
            raise UserError(f"{path}: schema {record.get('schema')!r}; this version reads {RECORD_SCHEMA}")
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record."""
        write_json(self.path / "record.json", record)

    @property
    def epochs(self) -> list[dict[str, float | None]]:
        """The lines of epochs.csv: numbers, None where a value was not measured in that epoch."""
        path = self.path / "epochs.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{k: _number(v) for k, v in line.items()} for line in csv.DictReader(file)]

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
        """Keep the weights of the reported networks: the final ones, or those at the end of an epoch."""
        from safetensors.torch import save

        place = self.path / ("weights.safetensors" if epoch is None else f"snapshots/{stage}-{epoch}.safetensors")
        weights = {f"{k}.{n}": v.contiguous() for k, m in enumerate(networks) for n, v in m.state_dict().items()}
        with atomic(place) as temporary:
            temporary.write_bytes(save(weights, {"key": self.key}))  # so that a full disk is an OSError

    @property
    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Test images by class (rows) and predicted class (columns) at the end; None where it was not recorded."""
        path = self.path / "confusion.csv"
        return np.loadtxt(path, dtype=np.int64, delimiter=",", ndmin=2) if path.exists() else None

    def write_confusion(self, counts: npt.NDArray[np.int64]) -> None:
        """Replace confusion.csv."""
        with atomic(self.path / "confusion.csv") as temporary:
            temporary.write_text(confusion_text(counts))

    @property
    def probes(self) -> list[dict[str, Any]]:
        """What probes have found in the run, in the order of their names: the content of each file."""
        contents = map(read_json, sorted((self.path / "probes").glob("*.json")))
        return [content for content in contents if content.get("schema") == PROBE_SCHEMA]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, so that no second process trains it at the same time; ``UserError`` where one does."""
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"run {self.key} is being trained by another process: wait for it") from None
            for half in (*self.path.glob(".*"), *self.path.glob("snapshots/.*")):
                half.unlink()  # left by a process that was killed as it wrote
            yield


def find_run(store: Path, key: str) -> RunFolder:
    """The run whose key begins with ``key``; ``UserError`` where there is none, or more than one."""
    keys = [path.parent.name for path in store.glob("*/record.json") if path.parent.name.startswith(key)]
    if not keys:
        raise UserError(f"no run {key!r} in {store}: `noisysam report STUDY` lists the keys of a study's runs")
    if len(keys) > 1 and key not in keys:
        shown = ", ".join(sorted(keys)[:3]) + ", ..." * (len(keys) > 3)
        raise UserError(f"{key!r} is the beginning of {len(keys)} runs in {store}: {shown}; give more of it")
    return RunFolder(store, key if key in keys else keys[0])


def _number(text: str | None) -> float | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def confusion_text(counts: npt.NDArray[np.int64]) -> str:
    """The content of confusion.csv."""
    return "".join(",".join(map(str, row)) + "\n" for row in counts.tolist())


def study_path(store: Path, name: str) -> Path:
    """Where a store keeps the plan of a study."""
    return store / "studies" / f"{name}.json"


def study_names(store: Path) -> list[str]:
    """The studies of a store."""
    return sorted(path.stem for path in (store / "studies").glob("*.json"))


def load_study(store: Path, name: str) -> dict[str, Any]:
    """The plan of a study: ``name``, ``file`` (YAML text), ``cells`` [{row, noise, seed, key, config}]."""
    path = study_path(store, name)
    if not path.exists():
        known = ", ".join(study_names(store)) or "none"
        raise UserError(f"no study {name!r} in {store} (known: {known}); sweep or import it first")
    return read_json(path)


def study_records(store: Path, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each cell of a study with its record (None where it has not run)."""
    for cell in load_study(store, name)["cells"]:
        yield cell, RunFolder(store, cell["key"]).record
