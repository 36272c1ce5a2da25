"""Records in and out of a store, as an archive: a folder that holds each run once, whatever studies it is in.

    MANIFEST.json               schema, and the SHA-256 of every file
    runs.jsonl                  one line per run: its record
    confusion.jsonl             one line per run: test images by class and predicted class
    probes.jsonl                one line per result of a probe
    epochs/<key>.csv.gz         the epochs of a run
    labels/<digest>.npz         label files
    studies/<name>.json         plans of studies
    predictions/<key>.npz       predicted classes of the training set, from which another run may begin
    weights/<key>.safetensors   where they were asked for
    checkpoints/<key>.pt        of a run that is not finished, where they were asked for, with its record in <key>.json

Archives of schema 1 are a store's own files with a manifest; they can still be imported. An archive may come from a
stranger: ``verification`` checks all of it before anything is written.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from noisysam.core.errors import DamagedFile, RunFailed, UserError
from noisysam.core.files import atomic, file_digest, json_text, read_file, read_json, write_json
from noisysam.runs.predictions import PREDICTIONS
from noisysam.runs.record import STUDY, RunFolder, confusion_text, load_study, study_path, study_records
from noisysam.runs.schema import ProbeResult, RunRecord, StudyPlan
from noisysam.runs.verification import Archive, verify

ARCHIVE_SCHEMA = 2

LARGEST = 2**28  # bytes of a file that is read as a whole; weights may be larger

TABLES = ("confusion.jsonl", "probes.jsonl", "runs.jsonl")
FOLDERS = ("checkpoints", "epochs", "labels", "predictions", "studies", "weights")
CHECKPOINT = "checkpoint.pt"  # of a store's run

Entry = Mapping[str, Any]  # one line of a .jsonl file


def export_study(store: Path, name: str, target: Path, weights: bool = False, unfinished: bool = False) -> int:
    """Add a study's plan, its finished runs and their label files to the archive ``target``; ``weights``: the trained
    weights too; ``unfinished``: the checkpoints of the other runs too, to go on elsewhere. Returns the number of
    finished runs."""
    plan = load_study(store, name)
    records = {record["key"]: record for _, record in study_records(store, name) if record}
    for key in (key for row in plan.get("search", {}).values() for key in row["runs"]):  # by which rows were tuned
        trial = RunFolder(store, key).sound_record
        records |= {key: trial} if trial else {}
    done = [key for key, record in records.items() if record["status"] == "finished"]
    runs = {key: read_json(store / key / "record.json") for key in done}
    for key in records.keys() - runs.keys() if unfinished else ():
        if (store / key / CHECKPOINT).exists():
            _write(target / "checkpoints" / f"{key}.pt", _read(store / key / CHECKPOINT))
            _write(target / "checkpoints" / f"{key}.json", _read(store / key / "record.json"))
    for key, content in runs.items():
        folder, label = RunFolder(store, key), f"labels/{content['noise']['digest'][:16]}.npz"
        for suffix in ("pt", "json"):  # of an earlier export, when it was not finished
            (target / "checkpoints" / f"{key}.{suffix}").unlink(missing_ok=True)
        _write(target / "epochs" / f"{key}.csv.gz", gzip.compress(_read(folder.path / "epochs.csv"), mtime=0))
        _write(target / label, _read(store / label))
        if (folder.path / PREDICTIONS).exists():
            _write(target / "predictions" / f"{key}.npz", _read(folder.path / PREDICTIONS))
        if weights:
            _write(target / "weights" / f"{key}.safetensors", _read(folder.path / "weights.safetensors"))
    found = {key: RunFolder(store, key).confusion for key in runs}
    confusion = [{"key": key, "counts": counts.tolist()} for key, counts in found.items() if counts is not None]
    probes = [content for key in runs for content in RunFolder(store, key).probes]
    _merge(target / "runs.jsonl", runs.values())
    _merge(target / "confusion.jsonl", confusion)
    _merge(target / "probes.jsonl", probes)
    _write(study_path(target, name), _read(study_path(store, name)))
    listed = [target / table for table in TABLES]
    listed += [path for part in FOLDERS for path in sorted((target / part).glob("[!.]*"))]
    manifest = {p.relative_to(target).as_posix(): file_digest(p) for p in listed if p.is_file()}
    write_json(target / "MANIFEST.json", {"schema": ARCHIVE_SCHEMA, "files": manifest})
    return len(runs)


def import_study(
    source: Path, store: Path, name: str | None = None, plugin: Path | None = None, unfinished: bool = False
) -> int:
    """Take the runs of an archive into a store, after all of it was verified. Returns the number of runs that are new.

    A finished run of the store stays as it is, and gets the results of probes that it lacks. A study of the store stays
    as it is: one of the same name with another plan, other claims or other planned seeds is refused. ``name``: that the
    archive's only study gets here; ``plugin``: the file that its runs were trained with; ``unfinished``: take
    checkpoints too, of runs that the store does not have: what was trained up to there cannot be verified.
    """
    archive = open_archive(source, store, plugin)
    renamed = _renamed(archive, name)
    for study, plan in renamed.items():
        if study_path(store, study).exists() and (differ := _differences(load_study(store, study), plan)):
            raise UserError(
                f"study {study} of {source} has other {' and '.join(differ)} than study {study} in {store}: give it"
                " another name with --as"
            )
    there = {key: RunFolder(store, key).sound_record for key in archive.records}
    new = [key for key, record in there.items() if record is None or record["status"] != "finished"]
    probes = [path for path, probe in archive.probes.items() if not (store / path).exists()]
    for path in probes:
        if archive.probes[path]["key"] not in new:
            _check_weights(archive, path, store)
    for path in archive.files:
        if path.startswith("labels/") and not (store / path).exists():
            _write(store / path, archive.files[path]())
    for key in new:
        _take_run(archive, key, store)
    for path in probes:
        _write(store / path, archive.files[path]())
    for study, plan in renamed.items():
        place = study_path(store, study)
        if not place.exists():
            _write(place, archive.files[f"studies/{study}.json"]() if name is None else _json(cast(Entry, plan)))
    for key in archive.unfinished if unfinished else ():
        if key not in archive.records and not (store / key / "record.json").exists():
            folder, record = RunFolder(store, key), archive.unfinished[key]
            _write(folder.path / CHECKPOINT, archive.checkpoints[key].read_bytes())
            folder.write({**record, "status": "interrupted"})
    return len(new)


def contents(source: Path, store: Path, plugin: Path | None = None) -> list[str]:
    """What an archive holds, a line for each kind of thing and each study, after all of it was verified."""
    archive = open_archive(source, store, plugin)
    there = {key: RunFolder(store, key).sound_record for key in archive.records}
    new = sum(record is None or record["status"] != "finished" for record in there.values())
    counts = {
        "label files": sum(path.startswith("labels/") for path in archive.files),
        "results of probes": len(archive.probes),
        "files of weights": sum(path.endswith(".safetensors") for path in archive.files),
        "checkpoints of unfinished runs (--unfinished takes them)": len(archive.checkpoints),
    }
    lines = [f"{len(archive.records)} finished runs, {new} of them not in {store}"]
    lines += [f"{count} {what}" for what, count in counts.items() if count]
    for name, plan in archive.studies.items():
        seeds, claims = plan.get("planned_seeds") or [], plan.get("claims") or []
        line = f"study {name}: {len(plan['cells'])} cells, {len(claims)} claims, planned seeds {seeds}"
        if study_path(store, name).exists():
            differ = _differences(load_study(store, name), plan)
            line += f"; {store} has one with other {' and '.join(differ)}" if differ else f"; as in {store}"
        lines.append(line)
    return lines


def open_archive(source: Path, store: Path, plugin: Path | None = None) -> Archive:
    """A verified archive."""
    manifest = source / "MANIFEST.json"
    if not manifest.exists():
        raise UserError(f"{source}: no MANIFEST.json; give a folder that `noisysam export` wrote")
    content = read_json(manifest)
    schema, listed = content.get("schema"), content.get("files")
    if schema not in (1, ARCHIVE_SCHEMA):
        raise DamagedFile(manifest, f"schema {schema!r}; this version reads up to {ARCHIVE_SCHEMA}")
    if not isinstance(listed, dict):
        raise DamagedFile(manifest, "it lists no files")
    for name, digest in listed.items():
        path = _inside(source, name)
        if not path.is_file():
            raise DamagedFile(path, "missing, though MANIFEST.json lists it")
        if path.stat().st_size > LARGEST and path.suffix != ".safetensors":
            raise DamagedFile(path, f"larger than {LARGEST >> 20} MiB")
        if file_digest(path) != digest:
            raise DamagedFile(path, "its content differs from the digest in MANIFEST.json; export it again")
    archive = Archive(source, {}, {}, plugin)
    if schema == 1:
        for name in listed:
            _add(archive, name, source / name, (source / name).read_bytes)
    else:
        _unpack(archive, list(listed))
    verify(archive, store)
    return archive


def _inside(source: Path, name: str) -> Path:
    """A file of the archive: below its folder, and reached without links."""
    parts = Path(name).parts
    if "\0" in name or ".." in parts or Path(name).is_absolute() or not parts:
        raise DamagedFile(source / "MANIFEST.json", f"{name!r} leads out of the folder")
    path = source
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise DamagedFile(path, "a link; an archive holds files alone")
    return path


def _add(archive: Archive, name: str, place: Path, content: Callable[[], bytes]) -> None:
    if name in archive.files:
        raise DamagedFile(place, f"{name} is there twice")
    cast(dict[str, Any], archive.files)[name] = content
    cast(dict[str, Any], archive.places)[name] = place


def _unpack(archive: Archive, names: Iterable[str]) -> None:
    """The files of a store that an archive of today's schema holds."""
    source = archive.source
    for name in names:
        path, (part, _, rest) = source / name, name.partition("/")
        if part == "checkpoints" and rest.endswith((".pt", ".json")):
            archive.checkpoints[Path(rest).stem] = path.with_suffix(".pt")
            continue
        if part in ("labels", "studies"):
            _add(archive, name, path, path.read_bytes)
        elif part == "epochs" and rest.endswith(".csv.gz"):
            _add(archive, f"{rest.removesuffix('.csv.gz')}/epochs.csv", path, partial(_unzipped, path))
        elif part == "predictions" and rest.endswith(".npz"):
            _add(archive, f"{rest.removesuffix('.npz')}/{PREDICTIONS}", path, path.read_bytes)
        elif part == "weights" and rest.endswith(".safetensors"):
            _add(archive, f"{rest.removesuffix('.safetensors')}/weights.safetensors", path, path.read_bytes)
        elif name in TABLES:
            for entry in _entries(path):
                _add(archive, *_row(name, path, entry))
        else:
            raise UserError(f"{source}: {name!r} is no file of an archive")


def _row(table: str, path: Path, entry: Entry) -> tuple[str, Path, Callable[[], bytes]]:
    """The file of a store that a line of a table stands for."""
    key = entry.get("key")
    if table == "runs.jsonl":
        return f"{key}/record.json", path, partial(_json, entry)
    if table == "probes.jsonl":
        return f"{key}/probes/{entry.get('probe')}.json", path, partial(_json, entry)
    return f"{key}/confusion.csv", path, partial(_confusion, path, entry)


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError) as error:
        raise DamagedFile(path, f"cannot be unpacked ({error})") from None
    if len(content) > LARGEST:
        raise DamagedFile(path, f"larger than {LARGEST >> 20} MiB")
    return content


def _json(entry: Entry) -> bytes:
    return json_text(entry).encode()


def _confusion(path: Path, entry: Entry) -> bytes:
    try:
        return confusion_text(np.array(entry["counts"], dtype=np.int64)).encode()
    except (KeyError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise DamagedFile(path, f"no counts ({error})") from None


def _entries(path: Path) -> list[Entry]:
    """The lines of a table, each a JSON object."""
    try:
        found = [json.loads(line) for line in read_file(path).decode().splitlines()] if path.exists() else []
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read as JSON ({error})") from None
    if not all(isinstance(entry, dict) for entry in found):
        raise DamagedFile(path, "a JSON object was expected in each line")
    return found


def _renamed(archive: Archive, name: str | None) -> dict[str, StudyPlan]:
    """The archive's studies by the names that they get."""
    if name is None:
        return archive.studies
    if len(archive.studies) != 1:
        raise UserError(f"--as {name}: {archive.source} holds {len(archive.studies)} studies, not one")
    if not re.fullmatch(STUDY, name):
        raise UserError(f"--as {name}: no name of a study: letters, digits, spaces and _ + - . are")
    plan = next(iter(archive.studies.values()))
    return {name: cast(StudyPlan, {**plan, "name": name})}


def _differences(ours: StudyPlan, theirs: StudyPlan) -> list[str]:
    """What differs between two plans that have one name."""
    parts = {"cells": "plan", "published": "published tables", "planned_seeds": "planned seeds"}
    parts |= {part: part for part in ("claims", "search")}
    return [text for part, text in parts.items() if _part(ours, part) != _part(theirs, part)]


def _part(plan: StudyPlan, part: str) -> Any:
    if part != "cells":
        return plan.get(part) or []
    # ``for_rate``: an earlier version did not keep it
    return [{name: value for name, value in cell.items() if name != "for_rate"} for cell in plan["cells"]]


def _take_run(archive: Archive, key: str, store: Path) -> None:
    """Write a run, its record last: it says finished."""
    folder = RunFolder(store, key)
    with folder.lock() if (folder.path / "lock").exists() else nullcontext():
        for part in ("epochs.csv", "confusion.csv", PREDICTIONS, "weights.safetensors"):
            if f"{key}/{part}" in archive.files:
                _write(folder.path / part, archive.files[f"{key}/{part}"]())
            else:  # of an attempt that the store has
                (folder.path / part).unlink(missing_ok=True)
        _write(folder.path / "record.json", archive.files[f"{key}/record.json"]())
        folder.write_status(archive.records[key])


def _check_weights(archive: Archive, path: str, store: Path) -> None:
    """A probe's result goes into a finished run that was trained to the same weights."""
    probe: ProbeResult = archive.probes[path]
    folder = RunFolder(store, probe["key"])
    weights = folder.path / "weights.safetensors"
    if weights.exists():
        same = probe.get("weights") == file_digest(weights)
    else:
        same = _identity(folder.sound_record) == _identity(archive.records.get(probe["key"]))
    if not same:
        raise archive.fault(path, f"it is of other weights than those of run {probe['key']} in {store}")


def _identity(record: RunRecord | None) -> Any:
    return None if record is None else (record["results"], record["started"], record["ended"], record["environment"])


def _merge(path: Path, entries: Iterable[Entry]) -> None:
    """Put lines into a file in the order of their keys, each in the place of the one that was there before."""
    lines = {(entry["key"], entry.get("probe", "")): entry for entry in [*_entries(path), *entries]}
    if lines:
        text = [json.dumps(lines[place], separators=(",", ":"), allow_nan=False) for place in sorted(lines)]
        _write(path, ("\n".join(text) + "\n").encode())


def _read(path: Path) -> bytes:
    if not path.exists():
        raise RunFailed(f"{path}: missing")
    return read_file(path)


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)
