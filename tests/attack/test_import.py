"""Archives made by hand to mislead: each is refused in one line that names the file, and nothing is written."""

import csv
import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from samples import trained_store
from test_untrusted import COUNTS, attack
from test_untrusted import refused as refused_in_time

from noisysam.core.errors import UserError
from noisysam.core.files import file_digest, read_json, write_json
from noisysam.noise import labels as label_files
from noisysam.runs.record import RunFolder, study_path
from noisysam.runs.transfer import LARGEST, contents, export_study, import_study
from noisysam.training import checkpoint

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A store, its archive with weights and the result of a probe, and the key of its run."""
    folder = tmp_path_factory.mktemp("made")
    store, key = trained_store(folder)
    weights = file_digest(store / key / "weights.safetensors")
    probe = {
        "schema": 1,
        "key": key,
        "probe": "sharpness",
        "name": "x",
        "weights": weights,
        "results": {},
        "scalars": {},
    }
    write_json(store / key / "probes" / "sharpness.json", probe)
    export_study(store, "s", folder / "archive", weights=True)
    return store, folder / "archive", key


@pytest.fixture
def archive(made: tuple[Path, Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "archive"))


@pytest.fixture
def key(made: tuple[Path, Path, str]) -> str:
    return made[2]


def sign(archive: Path) -> None:
    """A manifest that fits: its digests protect against accidents, not against people."""
    files = sorted(p for p in archive.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    listed = {p.relative_to(archive).as_posix(): file_digest(p) for p in files}
    write_json(archive / "MANIFEST.json", {"schema": 2, "files": listed})


def edit_lines(path: Path, change: Change) -> None:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        change(entry)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def edit_epochs(archive: Path, key: str, change: Callable[[list[dict[str, str]]], Any]) -> None:
    path = archive / "epochs" / f"{key}.csv.gz"
    lines = list(csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))
    change(lines)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    path.write_bytes(gzip.compress(out.getvalue().encode()))


def refused(archive: Path, target: Path, words: str) -> None:
    """Also in what is printed: one line."""
    for call in (contents, import_study):
        with pytest.raises(UserError) as caught:
            call(archive, target)
        message = str(caught.value)
        assert words in message, message
        assert len(message.splitlines()) == 1
        assert str(archive) in message
    assert not target.exists()


def setting(part: str, name: str, value: Any) -> Change:
    return lambda entry: entry[part].__setitem__(name, value)


RECORDS: dict[str, tuple[Change, str]] = {
    "a setting": (setting("config", "lr", 123.0), "its configuration and digests are those of run"),
    "a setting of the wrong type": (setting("config", "lr", "fast"), "lr"),
    "an unknown setting": (setting("config", "evil", 1), "there is no field evil"),
    "another method": (setting("config", "method", "gce"), "its configuration and digests are those of run"),
    "digest of the data": (setting("digests", "data", "0" * 64), "its configuration and digests are those of run"),
    "revision": (setting("revisions", "method ce", 9), "its configuration and digests are those of run"),
    "result": (setting("results", "last", 0.99), "results.last"),
    "result out of range": (setting("results", "last", 1.5), "results.last"),
    "result that is added": (setting("results", "gain", 0.5), "results: gain"),
    "result that is text": (setting("results", "best", "0.9"), "results.best"),
    "result that is missing": (lambda e: e["results"].pop("selected"), "results: selected"),
    "memorised": (setting("results", "memorised", 0.0), "results.memorised"),
    "cost": (setting("cost", "train_seconds", 1e-3), "cost.train_seconds"),
    "gradient evaluations": (setting("cost", "gradient_evaluations", 0.5), "cost.gradient_evaluations"),
    "flip rate": (setting("noise", "flip_rate", 0.1), "noise.flip_rate"),
    "type of noise": (setting("noise", "type", "pair"), "noise.type"),
    "digest of the noise": (setting("noise", "digest", "ab" * 32), "noise.digest"),
    "status": (lambda e: e.__setitem__("status", "failed"), "not the record of the finished run"),
    "path as key": (lambda e: e.__setitem__("key", "../../evil"), "'../../evil/record.json' is no file of a store"),
    "key": (lambda e: e.__setitem__("key", "0" * 16), "neither in the archive nor in the store"),
    "name as a list": (lambda e: e.__setitem__("name", ["x"]), "name"),
    "threads": (setting("resolved", "threads", -1), "resolved.threads"),
    "plugin": (setting("config", "plugin", "/etc/passwd"), "--plugin"),
    "schema": (lambda e: e.__setitem__("schema", 7), "schema"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_was_changed(case: str, archive: Path, tmp_path: Path) -> None:
    change, words = RECORDS[case]
    edit_lines(archive / "runs.jsonl", change)
    sign(archive)
    refused(archive, tmp_path / "store", words)


def test_an_oracle_cannot_pass_as_blind(tmp_path: Path) -> None:
    """A run that knew its noise, with the tag removed."""
    store, key = trained_store(tmp_path, "{opt: sam, rho: paper}")
    record = RunFolder(store, key).record
    assert record is not None
    assert record["oracle"]
    export_study(store, "s", tmp_path / "archive")
    edit_lines(tmp_path / "archive" / "runs.jsonl", lambda entry: entry.__setitem__("oracle", []))
    sign(tmp_path / "archive")
    refused(tmp_path / "archive", tmp_path / "new", "it says blind")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[-1].__setitem__("test_accuracy", "0.9"), "results."),
        (lambda lines: lines[0].__setitem__("test_accuracy", "1.1"), "test_accuracy 1.1"),
        (lambda lines: lines[0].__setitem__("epoch", "1"), "stage 0, epoch 1 follows"),
        (lambda lines: lines.pop(0), "follows stage 0"),
        (lambda lines: lines.pop(), "results"),
        (lambda lines: lines[0].__setitem__("train_loss", "lots"), "could not convert"),
        (lambda lines: [line.pop("time") for line in lines] and [line.pop("stage") for line in lines], "'stage'"),
        (lambda lines: lines[0].__setitem__("train_seconds", "0"), "cost."),
    ],
)
def test_epochs_that_were_changed(change: Any, words: str, archive: Path, key: str, tmp_path: Path) -> None:
    edit_epochs(archive, key, change)
    sign(archive)
    refused(archive, tmp_path / "store", words)


def test_epochs_that_are_missing_or_packed_to_burst(archive: Path, key: str, tmp_path: Path) -> None:
    path = archive / "epochs" / f"{key}.csv.gz"
    path.write_bytes(gzip.compress(bytes(LARGEST + 1), compresslevel=1))
    sign(archive)
    refused(archive, tmp_path / "store", "larger than 256 MiB")
    for content in (b"no gzip", path.read_bytes()[:1000]):
        path.write_bytes(content)
        sign(archive)
        refused(archive, tmp_path / "store", "cannot be unpacked")
    path.unlink()
    sign(archive)
    refused(archive, tmp_path / "store", "the epochs of the run are missing")


@pytest.mark.parametrize(
    "arrays",
    [
        {"last": np.zeros(3, np.uint16)},
        {"last": np.full(48, 99, np.uint16)},
        {"last": np.zeros(48)},
        {"other": np.ones(3)},
    ],
    ids=["length", "class", "type", "name"],
)  # fmt: skip
def test_predictions_fit_the_run(arrays: dict[str, Any], archive: Path, key: str, tmp_path: Path) -> None:
    path = archive / "predictions" / f"{key}.npz"
    assert path.exists()
    np.savez(path, **arrays)
    sign(archive)
    refused(archive, tmp_path / "store", f"{key}.npz")


def test_labels_are_known_by_their_content(archive: Path, tmp_path: Path) -> None:
    (path,) = (archive / "labels").glob("*.npz")
    noisy = label_files.load(path)
    other = label_files.NoisyLabels(noisy.clean, noisy.clean, noisy.classes, noisy.definition, noisy.transition)
    label_files.save(other, path)
    path.with_suffix(".csv").unlink()
    sign(archive)
    refused(archive, tmp_path / "store", "its content is not that of its name")
    path.write_bytes(b"labels")
    sign(archive)
    refused(archive, tmp_path / "store", "not an .npz file")
    path.unlink()
    sign(archive)
    refused(archive, tmp_path / "store", "neither in the archive nor in the store")


@pytest.mark.parametrize(
    "name",
    ["evil.py", "studies/.hidden.json", "studies/a/b.json", "studies/x.txt", "labels/x.npz", "epochs/x.csv",
     "probes/0123456789abcdef/x.json", "weights/../../x.safetensors", "epochs/../x.csv.gz", "tracking.json"],
)  # fmt: skip
def test_names_that_no_archive_has(name: str, archive: Path, tmp_path: Path) -> None:
    listed = read_json(archive / "MANIFEST.json")["files"]
    path = archive / name
    if ".." not in name:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
        listed[name] = file_digest(path)
    write_json(archive / "MANIFEST.json", {"schema": 2, "files": {**listed, name: listed.get(name, "")}})
    refused(archive, tmp_path / "store", "leads out" if ".." in name else "is no file of")


@pytest.mark.parametrize("name", ["/etc/passwd", "", "..", "a\0b"])
def test_names_that_lead_out(name: str, archive: Path, tmp_path: Path) -> None:
    write_json(archive / "MANIFEST.json", {"schema": 2, "files": {name: ""}})
    refused(archive, tmp_path / "store", "leads out of the folder")


@pytest.mark.parametrize("what", ["runs.jsonl", "studies"])
def test_links_are_refused(what: str, archive: Path, tmp_path: Path) -> None:
    (archive / what).rename(tmp_path / "elsewhere")
    (archive / what).symlink_to(tmp_path / "elsewhere")
    refused(archive, tmp_path / "store", "a link")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan["cells"][0].__setitem__("key", "../x"), "cells.0.key"),
        (lambda plan: plan["cells"][0]["config"].__setitem__("lr", 9.0), "its configuration is not that of run"),
        (lambda plan: plan["cells"][1].__setitem__("key", plan["cells"][0]["key"]), "its configuration is not that"),
        (lambda plan: plan["cells"][0].__setitem__("noise", 0.8), "noise and seed are not those"),
        (lambda plan: plan.__setitem__("name", "t"), "it is the plan of study 't'"),
        (lambda plan: plan.__setitem__("cells", 3), "cells: should be"),
        (lambda plan: plan.__setitem__("planned_seeds", ["x"]), "planned_seeds.0"),
        (lambda plan: plan.pop("file"), "file: missing"),
    ],
)
def test_plans_that_were_changed(change: Change, words: str, archive: Path, tmp_path: Path) -> None:
    path = study_path(archive, "s")
    plan = read_json(path)
    change(plan)
    write_json(path, plan)
    sign(archive)
    refused(archive, tmp_path / "store", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.__setitem__("claims", []), "claims"),
        (lambda plan: plan.__setitem__("planned_seeds", [0, 1]), "planned seeds"),
        (lambda plan: plan["cells"].pop(), "plan"),
        (lambda plan: plan["cells"][0].__setitem__("row", "Ours"), "plan"),
        (lambda plan: plan.__setitem__("published", ["sam-table4"]), "published tables"),
    ],
)
def test_a_study_of_the_store_is_not_replaced(
    change: Change, words: str, made: tuple[Path, Path, str], archive: Path, tmp_path: Path
) -> None:
    """What was written down beforehand stays; the other study may come under another name."""
    store = Path(shutil.copytree(made[0], tmp_path / "store"))
    path, kept = study_path(archive, "s"), study_path(store, "s").read_bytes()
    plan = read_json(path)
    change(plan)
    write_json(path, plan)
    sign(archive)
    with pytest.raises(UserError, match=f"has other {words} than study s in .*--as"):
        import_study(archive, store)
    assert any(f"has one with other {words}" in line for line in contents(archive, store))
    assert import_study(archive, store, "theirs") == 0
    assert study_path(store, "s").read_bytes() == kept
    assert read_json(study_path(store, "theirs")) == {**plan, "name": "theirs"}
    for name in ("../x", ".x", "", "a/b"):
        with pytest.raises(UserError, match="--as"):
            import_study(archive, store, name)


def test_the_same_study_may_come_again(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    store, archive, _ = made
    target = Path(shutil.copytree(store, tmp_path / "store"))
    assert import_study(archive, target) == 0
    lines = contents(archive, tmp_path / "none")
    assert lines[0] == f"1 finished runs, 1 of them not in {tmp_path / 'none'}"
    assert lines[-1] == "study s: 3 cells, 1 claims, planned seeds [0]"
    assert "as in" in contents(archive, target)[-1]
    assert not (tmp_path / "none").exists()


def test_a_result_of_a_probe_is_of_the_same_weights(
    made: tuple[Path, Path, str], archive: Path, key: str, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(made[0], tmp_path / "store"))
    shutil.rmtree(store / key / "probes")
    edit_lines(archive / "probes.jsonl", lambda entry: entry.__setitem__("weights", "0" * 64))
    sign(archive)
    with pytest.raises(UserError, match="it is of other weights"):
        import_study(archive, store)
    assert not (store / key / "probes").exists()
    assert import_study(made[1], store) == 0
    assert (store / key / "probes" / "sharpness.json").exists()
    (store / key / "weights.safetensors").unlink()  # without them: only beside the same record
    shutil.rmtree(store / key / "probes")
    assert import_study(made[1], store) == 0
    record = read_json(store / key / "record.json")
    RunFolder(store, key).write({**record, "started": "2026-01-01T00:00:00+00:00"})
    shutil.rmtree(store / key / "probes")
    with pytest.raises(UserError, match="it is of other weights"):
        import_study(made[1], store)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.__setitem__("probe", "../x"), "is no file of a store"),
        (lambda entry: entry.__setitem__("key", "0" * 16), "neither in the archive nor in the store"),
        (lambda entry: entry.__setitem__("results", []), "results: should be"),
        (lambda entry: entry.__setitem__("scalars", {"trace": "x"}), "scalars.trace"),
        (lambda entry: entry.__setitem__("schema", 9), "not the result of this probe"),
    ],
)
def test_results_of_probes_that_were_changed(change: Change, words: str, archive: Path, tmp_path: Path) -> None:
    edit_lines(archive / "probes.jsonl", change)
    sign(archive)
    refused(archive, tmp_path / "store", words)


@pytest.mark.parametrize("counts", [[[1]], "x", [[1, "x"]], [[-1] * 10] * 10, np.eye(10, dtype=int).tolist(), [], None])
def test_counts_that_were_changed(counts: Any, archive: Path, tmp_path: Path) -> None:
    edit_lines(archive / "confusion.jsonl", lambda entry: entry.__setitem__("counts", counts))
    sign(archive)
    refused(archive, tmp_path / "store", "counts")


def test_a_collapse_that_its_predictions_do_not_show(archive: Path, tmp_path: Path) -> None:
    edit_lines(archive / "runs.jsonl", lambda entry: entry.__setitem__("collapsed", not entry["collapsed"]))
    sign(archive)
    refused(archive, tmp_path / "store", "collapsed")


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, "\x00", '{"key": {"a": 1}}'])
@pytest.mark.parametrize("name", ["runs.jsonl", "probes.jsonl", "confusion.jsonl"])
def test_tables_that_are_none(name: str, text: str, archive: Path, tmp_path: Path) -> None:
    (archive / name).write_text(text + "\n")
    sign(archive)
    refused(archive, tmp_path / "store", "")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("count", COUNTS)
def test_any_change_of_a_record_is_refused_or_harmless(
    count: int, made: tuple[Path, Path, str], archive: Path, tmp_path: Path
) -> None:
    """A drawn value in a drawn place: an import ends in one line, or takes a record with the same key and results."""
    path, target, original = archive / "runs.jsonl", tmp_path / "store", (made[1] / "runs.jsonl").read_text()
    key, wanted = json.loads(original)["key"], json.loads(original)["results"]

    def check(change: Change) -> None:
        shutil.rmtree(target, ignore_errors=True)
        record = json.loads(original)
        change(record)
        path.write_text(json.dumps(record) + "\n")
        sign(archive)
        if refused_in_time(lambda: import_study(archive, target)):
            assert not target.exists()
        else:
            taken = RunFolder(target, key).record
            assert taken is not None
            assert (taken["key"], taken["results"]) == (key, wanted)
        assert {place.name for place in tmp_path.iterdir()} <= {"archive", "store"}

    attack(count, changes(json.loads(original)), check)


@st.composite
def changes(draw: st.DrawFn, record: dict[str, Any]) -> Change:
    """A value, or an entry of one, is replaced."""
    place, value = draw(st.sampled_from(sorted(record))), draw(values)
    if isinstance(record[place], dict) and record[place] and draw(st.booleans()):
        return setting(place, draw(st.sampled_from(sorted(record[place]))), value)
    return lambda entry: entry.__setitem__(place, value)


@st.composite
def damaged(draw: st.DrawFn, sound: dict[str, bytes]) -> tuple[str, bytes]:
    """A file of a run, with a part cut out or replaced, or of something else."""
    name = draw(st.sampled_from(sorted(sound)))
    content = sound[name]
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 40)))
    piece = draw(
        st.binary(max_size=8)
        | st.sampled_from([b"", b"null", b"NaN", b"1e999", b'"', b"[" * 5000, b"9" * 5000, b"-1", b"\xff", b"\0", b","])
    )
    return name, draw(st.just(content[:start] + piece + content[stop:]) | st.just(piece))


@pytest.mark.parametrize("count", COUNTS)
def test_files_of_a_run_that_are_damaged(count: int, made: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Whatever a store holds, it is read or named in one line; nothing is written."""
    folder = RunFolder(tmp_path, made[2])
    sound = {name: (made[0] / made[2] / name).read_bytes() for name in ("record.json", "status.json", "epochs.csv")}
    folder.path.mkdir()

    def check(file: tuple[str, bytes]) -> None:
        for name, content in (*sound.items(), file):
            (folder.path / name).write_bytes(content)
        for call in (lambda: folder.record, lambda: folder.status, lambda: folder.epochs):
            refused_in_time(call)
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(sound)

    attack(count, damaged(sound), check)


def test_pipes_in_a_store(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Reading one would never end."""
    store = Path(shutil.copytree(made[0], tmp_path / "store"))
    folder, checkpoints = RunFolder(store, made[2]), tmp_path / "checkpoints"
    checkpoints.mkdir()
    os.mkfifo(checkpoints / checkpoint.CURRENT)
    for name in ("record.json", "status.json", "epochs.csv", "confusion.csv", "weights.safetensors"):
        (folder.path / name).unlink()
        os.mkfifo(folder.path / name)
    for call in (
        lambda: folder.record,
        lambda: folder.epochs,
        lambda: folder.confusion,
        lambda: read_json(folder.path / "record.json"),
        lambda: file_digest(folder.path / "weights.safetensors"),
        lambda: checkpoint.load(checkpoints, torch.device("cpu"), made[2]),
    ):
        assert refused_in_time(call)
    assert refused_in_time(lambda: folder.status)
