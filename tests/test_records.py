"""Records on disk: strict JSON and CSV, whole or not at all, portable with digests."""

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import complete, trained_store

from noisysam.core import files
from noisysam.core.errors import DamagedFile, RunFailed, RunLocked, UserError
from noisysam.core.files import atomic, file_digest
from noisysam.runs import record as record_files
from noisysam.runs.record import RunFolder
from noisysam.runs.schema import RECORD_SCHEMA, RunRecord, parse
from noisysam.runs.transfer import ARCHIVE_SCHEMA, export_study, import_study

numbers = st.none() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
lines = st.lists(st.dictionaries(st.sampled_from("abcdef"), numbers, min_size=1), min_size=1, max_size=6)


REPORTS = Path(__file__).resolve().parents[1] / "reports"


# atomic files


def test_temporary_names_do_not_meet(tmp_path: Path) -> None:
    """Two processes with one number, in two containers, write the same file."""
    path = tmp_path / "file"
    with atomic(path) as one, atomic(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_atomic_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    for text in ("one", "two"):
        with atomic(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208


def test_atomic_keeps_the_old_content_on_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fault() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half of the ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fault()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


# JSON


def test_json_is_strict(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": (1, 2), "e": "nan", "f": None, "g": 1e-300}
    files.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    expected = {"a": None, "b": [1.5, None, {"c": None}], "d": [1, 2], "e": "nan", "f": None, "g": 1e-300}
    assert files.read_json(tmp_path / "x.json") == expected


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": 1} more'])
def test_faulty_json_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json") as caught:
        files.read_json(path)
    assert len(str(caught.value).splitlines()) == 1


# a run's folder


def test_a_record_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    assert folder.record is None
    assert folder.epochs == []
    assert folder.status is None
    record = complete({"key": "abc", "results": {"last": 0.1 + 0.2}, "of a later version": "ä\n'\""})
    folder.write(record)
    assert folder.record == record
    assert folder.status == "finished"
    assert folder.path == tmp_path / "abc"


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    folder.write(complete({"key": "abc", "schema": RECORD_SCHEMA + 1}))
    with pytest.raises(DamagedFile, match=rf"record\.json: schema: this version reads {RECORD_SCHEMA} \(got 2\)"):
        _ = folder.record


DAMAGE: dict[str, Any] = {
    "status: should be": {"status": "done"},
    "results.last: should be less": {"results": {"last": 1.5}},
    "out of range: test_accuracy_1": {"results": {"test_accuracy_1": 1.5}},
    "results.best_epoch: should be a valid integer": {"results": {"best_epoch": "3"}},
    "noise.flip_rate: should be less": {"noise": {"flip_rate": 2.0}},
    "noise.matrix.0: should be a valid array": {"noise": {"matrix": [0.5]}},
    "resolved.threads: should be greater": {"resolved": {"threads": -1}},
    "cost.train_seconds: should be a valid number": {"cost": {"train_seconds": "60"}},
    "oracle: should be a valid array": {"oracle": "no"},
    "config: should be": {"config": [1]},
    "a finished run has not ended": {"ended": None},
    "it is the record of run abd": {"key": "abd"},
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_record_names_its_file_and_field(fault: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    folder.write(complete({"key": "abc", **DAMAGE[fault]}))
    with pytest.raises(DamagedFile, match=rf"abc/record\.json: .*{re.escape(fault)}") as caught:
        _ = folder.record
    assert caught.value.path == folder.path / "record.json"
    assert len(str(caught.value).splitlines()) == 1
    with pytest.warns(UserWarning, match=r"record\.json"):
        assert folder.sound_record is None


@pytest.mark.parametrize("field", [name for name in complete({}) if name != "schema"])
def test_a_record_without_a_field_is_damaged(field: str, tmp_path: Path) -> None:
    record = complete({"key": "abc"})
    del record[field]
    folder = RunFolder(tmp_path, "abc")
    files.write_json(folder.path / "record.json", record)
    with pytest.raises(DamagedFile, match=f"{field}: missing"):
        _ = folder.record


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": 1} more', b"[" * 100_000])
def test_a_record_that_is_no_json_is_damaged(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    folder.path.mkdir()
    (folder.path / "record.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"record\.json"):
        _ = folder.record
    with pytest.raises(DamagedFile):
        _ = folder.status


def test_a_status_that_is_not_of_the_record_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    folder.write(complete({"key": "abc", "status": "running"}))
    status = (folder.path / "status.json").read_text()
    files.write_json(folder.path / "record.json", complete({"key": "abc"}))  # as an earlier version writes it
    for content in (status, "", "{}", status.replace("abc", "abd")):
        (folder.path / "status.json").write_text(content)
        assert folder.status == "finished"
    (folder.path / "record.json").unlink()
    assert folder.status is None


def test_the_committed_records_load(tmp_path: Path) -> None:
    found = [*REPORTS.glob("*/records/*/record.json")]
    lines = [path.read_bytes() for path in found]
    lines += [line for path in REPORTS.glob("records/runs.jsonl") for line in path.read_bytes().splitlines()]
    assert len(lines) > 200
    for line in lines:
        assert parse(RunRecord, line, tmp_path) == json.loads(line)


@pytest.mark.parametrize("text", ["a,b\n1\n", "a,b\n1,2,3\n", "a,a\n1,2\n", "a\nx\n", "a\n1e\n", "a\n\n"])
def test_damaged_epochs_name_their_file(text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    folder.path.mkdir()
    (folder.path / "epochs.csv").write_text(text)
    with pytest.raises(DamagedFile, match=r"epochs\.csv"):
        _ = folder.epochs


def test_a_plan_that_cannot_be_read_disables_nothing(tmp_path: Path) -> None:
    cell = {"row": "SGD", "noise": 0.4, "seed": 0, "key": "abc", "config": {}}
    plan = {"schema": RECORD_SCHEMA, "name": "s", "file": "", "cells": [cell, {**cell, "key": "abd"}]}
    files.write_json(record_files.study_path(tmp_path, "s"), plan)
    for name, content in (("evil", '{"cells": 3}'), ("half", "{"), ("list", "[]")):
        record_files.study_path(tmp_path, name).write_text(content)
    assert record_files.rows_of(tmp_path, "abc") == {"s": "SGD"}
    with pytest.raises(DamagedFile, match=r"evil\.json"):
        record_files.load_study(tmp_path, "evil")


@settings(max_examples=100, deadline=None)
@given(lines)
def test_epochs_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, Any]]) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("epochs"), "abc")
    folder.write_epochs(given)
    columns = list(dict.fromkeys(name for line in given for name in line))
    found = folder.epochs
    assert [list(line) for line in found] == [columns] * len(given)
    for line, read in zip(given, found, strict=True):
        for name in columns:
            wanted = line.get(name)
            assert read[name] == wanted
            assert type(read[name]) is type(wanted)


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path, "abc"), RunFolder(tmp_path, "abc")
    with one.lock():
        with pytest.raises(RunLocked, match="run abc is being trained by another process"), two.lock():
            pass
        with RunFolder(tmp_path, "abd").lock():
            pass
    with two.lock():
        pass


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    """However it ends: a lock is no file that somebody must remove."""
    code = (
        "import os, pathlib, signal\n"
        "from noisysam.runs.record import RunFolder\n"
        f"with RunFolder(pathlib.Path({str(tmp_path)!r}), 'abc').lock():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with RunFolder(tmp_path, "abc").lock():
        pass


def test_a_lock_clears_away_what_was_half_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "abc")
    folder.write(complete({"key": "abc"}))
    for name in (".record.json.12", ".epochs.csv.12", ".checkpoint.pt.12", "tracking.json"):
        (folder.path / name).write_text("half")
    with folder.lock():
        assert {p.name for p in folder.path.iterdir()} == {"record.json", "status.json", "tracking.json", "lock"}


# studies


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return trained_store(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def store(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A store with a study of three cells: one finished, one failed, one that has not run."""
    return Path(shutil.copytree(trained[0], tmp_path / "store"))


@pytest.fixture
def run(trained: tuple[Path, str]) -> str:
    """The key of the finished run."""
    return trained[1]


@pytest.fixture
def label(store: Path) -> str:
    """The label file of the store."""
    return next((store / "labels").glob("*.npz")).relative_to(store).as_posix()


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_study_records(store: Path) -> None:
    found = list(record_files.study_records(store, "s"))
    assert [cell["row"] for cell, _ in found] == ["SGD", "SAM", "GCE"]
    assert [record and record["status"] for _, record in found] == ["finished", "failed", None]
    with pytest.raises(UserError, match=r"no study 't' in .* \(known: s\)"):
        record_files.load_study(store, "t")


def test_export_takes_what_is_finished(store: Path, tmp_path: Path, run: str, label: str) -> None:
    assert export_study(store, "s", tmp_path / "out") == 1
    out = tmp_path / "out"
    files = {"runs.jsonl", "confusion.jsonl", f"epochs/{run}.csv.gz", f"predictions/{run}.npz", label}
    files.add("studies/s.json")
    assert tree(out) == {*files, "MANIFEST.json"}
    manifest = json.loads((out / "MANIFEST.json").read_text())
    assert manifest["schema"] == ARCHIVE_SCHEMA
    assert manifest["files"] == {name: file_digest(out / name) for name in files}
    assert export_study(store, "s", out, weights=True) == 1
    assert f"weights/{run}.safetensors" in tree(out)
    (store / run / "epochs.csv").unlink()
    with pytest.raises(RunFailed, match=r"epochs\.csv: missing"):
        export_study(store, "s", tmp_path / "again")


def test_import_gives_the_same_files(store: Path, tmp_path: Path, run: str, label: str) -> None:
    folder = RunFolder(store, run)
    results = {"trace": 0.1 + 0.2, "none": None}
    probe = {"schema": 1, "key": folder.key, "probe": "sharpness", "results": results}
    probe["weights"] = file_digest(folder.path / "weights.safetensors")
    files.write_json(folder.path / "probes" / "sharpness.json", probe)
    assert export_study(store, "s", tmp_path / "out", weights=True) == 1
    assert import_study(tmp_path / "out", tmp_path / "new") == 1
    parts = (
        "record.json",
        "status.json",
        "epochs.csv",
        "confusion.csv",
        "predictions.npz",
        "probes/sharpness.json",
        "weights.safetensors",
    )
    assert tree(tmp_path / "new") == {f"{folder.key}/{part}" for part in parts} | {label, "studies/s.json"}
    for name in tree(tmp_path / "new"):
        assert (tmp_path / "new" / name).read_bytes() == (store / name).read_bytes()
    assert import_study(tmp_path / "out", tmp_path / "new") == 0


def test_the_same_runs_give_the_same_archive(store: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_study(store, "s", tmp_path / name)
    for name in tree(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_archive_of_schema_1_is_still_read(store: Path, tmp_path: Path, run: str, label: str) -> None:
    """It holds a store's own files."""
    old = tmp_path / "old"
    names = [f"{run}/record.json", f"{run}/epochs.csv", label, "studies/s.json"]
    for name in names:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_bytes((store / name).read_bytes())
    record = json.loads((old / names[0]).read_text())
    del record["collapsed"]  # which needs confusion.csv, and came later
    files.write_json(old / names[0], record)
    manifest = {name: file_digest(old / name) for name in names}
    files.write_json(old / "MANIFEST.json", {"schema": 1, "files": manifest})
    assert import_study(old, tmp_path / "new") == 1
    assert tree(tmp_path / "new") == {*names, f"{run}/status.json"}
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (old / name).read_bytes()
    files.write_json(old / "MANIFEST.json", {"schema": 3, "files": manifest})
    with pytest.raises(UserError, match="schema 3; this version reads up to 2"):
        import_study(old, tmp_path / "new")


def test_a_run_does_not_lead_out_of_the_store(store: Path, tmp_path: Path, run: str) -> None:
    out = tmp_path / "out"
    export_study(store, "s", out)
    text = (out / "runs.jsonl").read_text().replace(run, "../" + run)
    (out / "runs.jsonl").write_text(text)
    manifest = json.loads((out / "MANIFEST.json").read_text())
    manifest["files"]["runs.jsonl"] = file_digest(out / "runs.jsonl")
    files.write_json(out / "MANIFEST.json", manifest)
    with pytest.raises(UserError, match=r"'\.\./[0-9a-f]+/record\.json' is no file of a store"):
        import_study(out, tmp_path / "new" / "store")
    assert not (tmp_path / "new").exists()


def test_import_keeps_what_is_there(store: Path, tmp_path: Path, run: str) -> None:
    """A finished run of the store stays as it is; one that is not finished gives way."""
    export_study(store, "s", tmp_path / "out")
    for status, taken in (("finished", 0), ("failed", 1), ("interrupted", 1)):
        own = RunFolder(tmp_path / status, run)
        own.write(complete({"key": own.key, "status": status, "mine": True}))
        assert import_study(tmp_path / "out", tmp_path / status) == taken
        assert own.record is not None
        assert own.record["status"] == "finished"
        assert ("mine" in own.record) == (not taken)
        assert (own.path / "epochs.csv").exists() == bool(taken)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("runs.jsonl", lambda path: path.write_text("{}")),
        ("epochs/*.csv.gz", lambda path: path.write_bytes(gzip.compress(b"epoch,train_loss"))),
        ("epochs/*.csv.gz", lambda path: path.unlink()),
        ("epochs/*.csv.gz", lambda path: (path.unlink(), path.mkdir())),
    ],
)
def test_import_takes_nothing_where_a_file_is_not_as_listed(
    name: str, damage: Callable[[Path], Any], store: Path, tmp_path: Path
) -> None:
    export_study(store, "s", tmp_path / "out")
    (path,) = (tmp_path / "out").glob(name)
    damage(path)
    with pytest.raises(UserError, match=path.name):
        import_study(tmp_path / "out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_studies_in_one_folder(store: Path, tmp_path: Path) -> None:
    plan = record_files.load_study(store, "s")
    files.write_json(record_files.study_path(store, "t"), {**plan, "name": "t"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("by hand")
    for name in ("s", "t"):
        export_study(store, name, tmp_path / "out")
    assert import_study(tmp_path / "out", tmp_path / "new") == 1
    assert {"studies/s.json", "studies/t.json"} < tree(tmp_path / "new")


def test_results_of_probes_go_along_without_their_pictures(store: Path, tmp_path: Path, run: str) -> None:
    """They are exported and taken; a finished run that is there already gets those that it lacks, and keeps its own."""
    place = store / run / "probes"
    for name in ("sharpness", "landscape"):
        files.write_json(place / f"{name}.json", {"schema": 1, "key": run, "probe": name, "results": {}})
    files.write_json(place / "old.json", {"schema": 0})  # of an earlier version: left behind
    (place / "sharpness-density.png").write_bytes(b"picture")
    export_study(store, "s", tmp_path / "out")
    assert {name for name in tree(tmp_path / "out") if "probes" in name} == {"probes.jsonl"}
    import_study(tmp_path / "out", tmp_path / "new")
    folder = RunFolder(tmp_path / "new", run)
    assert {path.name for path in (folder.path / "probes").iterdir()} == {"landscape.json", "sharpness.json"}
    own = {"schema": 1, "probe": "landscape", "mine": True}
    files.write_json(folder.path / "probes" / "landscape.json", own)
    (folder.path / "probes" / "sharpness.json").unlink()
    assert import_study(tmp_path / "out", tmp_path / "new") == 0
    assert [content["probe"] for content in folder.probes] == ["landscape", "sharpness"]
    assert folder.probes[0] == own
    assert RunFolder(store, "e" * 16).probes == []
