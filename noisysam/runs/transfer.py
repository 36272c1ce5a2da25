"""Records in and out of a store, as an archive: a folder that holds each run once, whatever studies it is in.

    MANIFEST.json               schema, and the SHA-256 of every file
    runs.jsonl                  one line per run: its record
    confusion.jsonl             one line per run: test images by class and predicted class
    probes.jsonl                one line per result of a probe
    epochs/<key>.csv.gz         the epochs of a run
    labels/<digest>.npz         label files
    studies/<name>.json         plans of studies
    weights/<key>.safetensors   where they were asked for

Archives of schema 1 are a store's own files with a manifest; they can still be imported.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from noisysam.core.errors import RunFailed, UserError
from noisysam.core.files import atomic, file_digest, json_text, read_json, write_json
from noisysam.runs.record import RunFolder, confusion_text, load_study, study_path, study_records

ARCHIVE_SCHEMA = 2

Entry = dict[str, Any]  # one line of a .jsonl file
Given = dict[str, Callable[[], bytes]]  # path in a store -> the content that an archive has for it


def export_study(store: Path, name: str, target: Path, weights: bool = False) -> int:
    """Add a study's plan, its finished runs and their label files to the archive ``target``; ``weights``: the trained
    weights too. Returns the number of finished runs."""
    study = load_study(store, name)
    done = [record for _, record in study_records(store, name) if record and record["status"] == "finished"]
    runs = {record["key"]: record for record in done}
    for key, record in runs.items():
        folder, label = RunFolder(store, key), f"labels/{record['noise']['digest'][:16]}.npz"
        _write(target / "epochs" / f"{key}.csv.gz", gzip.compress(_read(folder.path / "epochs.csv"), mtime=0))
        _write(target / label, _read(store / label))
        if weights:
            _write(target / "weights" / f"{key}.safetensors", _read(folder.path / "weights.safetensors"))
    found = {key: RunFolder(store, key).confusion for key in runs}
    confusion = [{"key": key, "counts": counts.tolist()} for key, counts in found.items() if counts is not None]
    probes = [content for key in runs for content in RunFolder(store, key).probes]
    _merge(target / "runs.jsonl", runs.values())
    _merge(target / "confusion.jsonl", confusion)
    _merge(target / "probes.jsonl", probes)
    write_json(study_path(target, name), study)
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    manifest = {p.relative_to(target).as_posix(): file_digest(p) for p in files}
    write_json(target / "MANIFEST.json", {"schema": ARCHIVE_SCHEMA, "files": manifest})
    return len(done)


def import_study(source: Path, store: Path) -> int:
    """Take the runs of an archive into a store, after checking every digest. A finished run of the store stays as it
    is, and gets the results of probes that it lacks. Returns the number of runs that are new."""
    given = _given(source)
    keys = [name.split("/")[0] for name in given if name.endswith("/record.json")]
    for key in keys:
        record = json.loads(given[f"{key}/record.json"]())
        if record.get("key") != key or record.get("status") != "finished":
            raise UserError(f"{source}: run {key}: no record of a finished run; export it again")
    new = 0
    for key in keys:
        record = RunFolder(store, key).record
        if record is not None and record["status"] == "finished":
            continue
        new += 1
        names = [name for name in given if name.startswith(f"{key}/")]
        for name in sorted(names, key=lambda n: n.endswith("record.json")):  # the record last: it says finished
            _write(store / name, given[name]())
    for name, content in given.items():
        extra = name.startswith("labels/") or "/probes/" in name
        if name.startswith("studies/") or (extra and not (store / name).exists()):
            _write(store / name, content())
    return new


def _given(source: Path) -> Given:
    """What an archive holds for a store, after checking its files against the manifest."""
    manifest = source / "MANIFEST.json"
    if not manifest.exists():
        raise UserError(f"{source}: no MANIFEST.json; give a folder that `noisysam export` wrote")
    content = read_json(manifest)
    schema, files = content.get("schema"), content.get("files")
    if schema not in (1, ARCHIVE_SCHEMA):
        raise UserError(f"{manifest}: schema {schema!r}; this version reads up to {ARCHIVE_SCHEMA}")
    if not isinstance(files, dict):
        raise UserError(f"{manifest}: it lists no files")
    _check_inside(manifest, files)
    for name, digest in files.items():
        path = source / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though MANIFEST.json lists it")
        if file_digest(path) != digest:
            raise UserError(f"{path}: its content differs from the digest in MANIFEST.json; export it again")
    if schema == 1:
        return {name: (source / name).read_bytes for name in files}
    given = _unpacked(source, files)
    _check_inside(manifest, given)
    return given


def _check_inside(manifest: Path, names: Iterable[str]) -> None:
    for name in names:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{manifest}: {name!r} leads out of the folder")


def _unpacked(source: Path, files: Iterable[str]) -> Given:
    """The files of a store that an archive of today's schema holds; other files are of no concern."""
    given: Given = {}
    for name in files:
        path, (part, _, rest) = source / name, name.partition("/")
        if part in ("labels", "studies"):
            given[name] = path.read_bytes
        elif part == "epochs":
            given[f"{rest.removesuffix('.csv.gz')}/epochs.csv"] = partial(_unzipped, path)
        elif part == "weights":
            given[f"{rest.removesuffix('.safetensors')}/weights.safetensors"] = path.read_bytes
    for entry in _entries(source / "runs.jsonl"):
        given[f"{entry['key']}/record.json"] = partial(_json, entry)
    for entry in _entries(source / "probes.jsonl"):
        given[f"{entry['key']}/probes/{entry['probe']}.json"] = partial(_json, entry)
    for entry in _entries(source / "confusion.jsonl"):
        given[f"{entry['key']}/confusion.csv"] = partial(_confusion, entry)
    return given


def _unzipped(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def _json(entry: Entry) -> bytes:
    return json_text(entry).encode()


def _confusion(entry: Entry) -> bytes:
    return confusion_text(np.array(entry["counts"], dtype=np.int64)).encode()


def _entries(path: Path) -> list[Entry]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _merge(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Put lines into a file in the order of their keys, each in the place of the one that was there before."""
    lines = {(entry["key"], entry.get("probe", "")): entry for entry in [*_entries(path), *entries]}
    if lines:
        text = [json.dumps(lines[place], separators=(",", ":"), allow_nan=False) for place in sorted(lines)]
        _write(path, ("\n".join(text) + "\n").encode())


def _read(path: Path) -> bytes:
    if not path.exists():
        raise RunFailed(f"{path}: missing")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)
