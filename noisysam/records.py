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
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from noisysam.errors import RunFailed, UserError

if TYPE_CHECKING:
    from torch import nn

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
            np.savetxt(temporary, counts, fmt="%d", delimiter=",")

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


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` when the block ends well; durable before it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON atomically; what is not finite becomes null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``UserError`` with the fault."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return content


def study_path(store: Path, name: str) -> Path:
    """Where a store keeps the plan of a study."""
    return store / "studies" / f"{name}.json"


def load_study(store: Path, name: str) -> dict[str, Any]:
    """The plan of a study: ``name``, ``file`` (YAML text), ``cells`` [{row, noise, seed, key, config}]."""
    path = study_path(store, name)
    if not path.exists():
        known = sorted(p.stem for p in (store / "studies").glob("*.json"))
        raise UserError(f"no study {name!r} in {store} (known: {', '.join(known) or 'none'}); sweep or import it first")
    return read_json(path)


def study_records(store: Path, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each cell of a study with its record (None where it has not run)."""
    for cell in load_study(store, name)["cells"]:
        yield cell, RunFolder(store, cell["key"]).record


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


PORTABLE = ("record.json", "epochs.csv")  # of every run
AND_WHERE_THERE = ("confusion.csv", "probes/*.json")


def export_study(store: Path, name: str, target: Path, weights: bool = False) -> int:
    """Copy a study's plan, its finished records and their label files to ``target``, with digests in MANIFEST.json.

    Returns the number of finished runs. What probes found in them goes along, without the pictures; ``weights``: their
    trained weights too.
    """
    study, finished = load_study(store, name), 0
    labels: set[str] = set()
    for cell, record in study_records(store, name):
        if record is None or record["status"] != "finished":
            continue
        finished += 1
        labels.add(record["noise"]["digest"])
        folder = store / cell["key"]
        more = [p.relative_to(folder) for pattern in AND_WHERE_THERE for p in folder.glob(pattern)]
        for part in (*PORTABLE, *more, *(["weights.safetensors"] if weights else [])):
            _copy(folder / part, target / cell["key"] / part)
    for digest in labels:
        _copy(store / "labels" / f"{digest[:16]}.npz", target / "labels" / f"{digest[:16]}.npz")
    write_json(study_path(target, name), study)
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    manifest = {p.relative_to(target).as_posix(): file_digest(p) for p in files}
    write_json(target / "MANIFEST.json", {"schema": RECORD_SCHEMA, "files": manifest})
    return finished


def import_study(source: Path, store: Path) -> int:
    """Take exported records into a store, after checking every digest; what is there already stays, and gets the
    results of probes that it lacks. Returns the number of runs that are new."""
    manifest = source / "MANIFEST.json"
    if not manifest.exists():
        raise UserError(f"{source}: no MANIFEST.json; give a folder that `noisysam export` wrote")
    content = read_json(manifest)
    if content.get("schema") != RECORD_SCHEMA:
        raise UserError(f"{manifest}: schema {content.get('schema')!r}; this version reads {RECORD_SCHEMA}")
    if not isinstance(content.get("files"), dict):
        raise UserError(f"{manifest}: it lists no files")
    for name, digest in content["files"].items():
        path = source / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{manifest}: {name!r} leads out of the folder")
        if not path.is_file():
            raise UserError(f"{path}: missing, though MANIFEST.json lists it")
        if file_digest(path) != digest:
            raise UserError(f"{path}: its content differs from the digest in MANIFEST.json; export it again")
    new = 0
    keys = [name.split("/")[0] for name in content["files"] if name.endswith("/record.json")]
    for key in keys:
        given = RunFolder(source, key).record
        if given is None or given.get("key") != key or given.get("status") != "finished":
            raise UserError(f"{source / key}: holds no record of a finished run {key}; export it again")
    for key in keys:
        record = RunFolder(store, key).record
        if record is not None and record["status"] == "finished":
            continue
        new += 1
        names = [name for name in content["files"] if name.startswith(f"{key}/")]
        for name in sorted(names, key=lambda n: n.endswith("record.json")):  # the record last: it says finished
            _copy(source / name, store / name)
    for name in content["files"]:
        if (name.startswith("labels/") or "/probes/" in name) and not (store / name).exists():
            _copy(source / name, store / name)
        if name.startswith("studies/"):
            _copy(source / name, store / name)
    return new


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise RunFailed(f"{source}: missing")
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)
