"""Records in and out of a store."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from noisysam.core.errors import RunFailed, UserError

if TYPE_CHECKING:
    pass
from noisysam.core.files import atomic, file_digest, read_json, write_json
from noisysam.runs.record import RECORD_SCHEMA, RunFolder, load_study, study_path, study_records

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
