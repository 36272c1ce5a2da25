"""A run that was stopped in any way ends with the same bits as one that was not.

``NOISYSAM_KILLS=20 pytest tests/test_resume.py`` is the long form: so many kills in each case.
"""

import contextlib
import csv
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from noisysam import cli
from noisysam.core.environment import environment
from noisysam.core.errors import UserError
from noisysam.core.files import file_digest, write_json
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.record import RunFolder, study_path
from noisysam.runs.transfer import export_study, import_study
from noisysam.training import checkpoint
from noisysam.training.fit import fit

KILLS = int(os.environ.get("NOISYSAM_KILLS", "2"))
MEASURED = ("time", "seconds", "per_second")  # endings of the columns that differ from run to run
PATIENCE = 120.0  # seconds
SMALL = {"dataset": "digits", "model": "resnet8", "noise": "0.4", "precision": "fp32"}
CASES = {
    "sgd": {"epochs": "8", "ema": "0.9"},
    "sam": {"epochs": "6", "opt": "sam", "train-subset": "600"},
    "bootstrap": {"epochs": "4", "method": "bootstrap"},
    "co-teaching": {"epochs": "4", "method": "co-teaching"},
    "dividemix": {"epochs": "4", "method": "dividemix", "method-option": "warmup=2", "train-subset": "400"},
}
LINES = {"sgd": 8, "sam": 6, "bootstrap": 8, "co-teaching": 4, "dividemix": 4}  # of epochs.csv, over all stages
QUICK = ("sam", "bootstrap")  # cases that `make test` kills
Spawn = Callable[..., BaseProcess]  # (arguments, log) -> a started process
LONG = {"epochs": "16"}  # long enough to be caught in its middle


def command(store: Path, **flags: str) -> list[str]:
    """The arguments of ``noisysam run`` for a small run."""
    given = {**SMALL, **{name.replace("_", "-"): value for name, value in flags.items()}}
    return ["run", *(part for name, value in given.items() for part in (f"--{name}", value)), "--no-track",
            "--store", str(store)]  # fmt: skip


def main(arguments: list[str], log: Path) -> None:
    """``noisysam``, with all that it says in a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    cli.main(arguments)


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Spawn:
    """Starts ``noisysam`` in a process of its own: forked, to save time, from one that has imported torch and has one
    thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "sklearn.datasets", "torchmetrics.classification"]  # what a first run imports
    context.set_forkserver_preload(
        ["noisysam.training.fit", "noisysam.studies.sweep", "noisysam.training.progress", *slow]
    )
    common = tmp_path_factory.mktemp("spawned") / "log"

    def start(arguments: list[str], log: Path = common) -> BaseProcess:
        process = context.Process(target=main, args=(arguments, log))
        process.start()
        return process

    return start


def folder_of(store: Path) -> Path | None:
    """The one run of a store."""
    found = [path.parent for path in store.glob("*/record.json")]
    return found[0] if found else None


def lines_of(store: Path) -> int:
    """Epochs that are in the run's epochs.csv."""
    folder = folder_of(store)
    if folder is None or not (folder / "epochs.csv").exists():
        return 0
    return len((folder / "epochs.csv").read_text().splitlines()) - 1


def status_of(store: Path) -> str:
    """What the run's record says of it."""
    folder = folder_of(store)
    assert folder is not None
    return str(json.loads((folder / "record.json").read_text())["status"])


def wait_for(store: Path, lines: int, ended: Callable[[], bool]) -> None:
    """Until epochs.csv has so many lines, or the process ended."""
    start = time.monotonic()
    while lines_of(store) < lines and not ended():
        assert time.monotonic() - start < PATIENCE, "no progress"
        time.sleep(0.002)


def bits(store: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was stopped."""
    folder = folder_of(store)
    assert folder is not None
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["error"] is None
    left = {"record.json", "status.json", "epochs.csv", "confusion.csv", "weights.safetensors", "lock"}
    assert {path.name for path in folder.iterdir()} - {"predictions.npz"} == left
    with (folder / "epochs.csv").open(newline="") as file:
        epochs = [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in csv.DictReader(file)]
    counts = {k: v for k, v in record["cost"].items() if k.endswith(("steps", "samples", "evaluations"))}
    weights = (folder / "weights.safetensors").read_bytes()
    return {"key": record["key"], "results": record["results"], "cost": counts, "epochs": epochs, "weights": weights}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit for bit, the small parts first."""
    for name in ("key", "epochs", "results", "cost"):
        assert found[name] == wanted[name], name
    assert found["weights"] == wanted["weights"], "weights.safetensors differ"  # no diff of bytes in the report


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_killed_again_and_again(case: str, tmp_path: Path, spawn: Spawn) -> None:
    whole = spawn(command(tmp_path / "whole", **CASES[case]))
    whole.join(PATIENCE)
    wanted = bits(tmp_path / "whole")
    assert len(wanted["epochs"]) == LINES[case]

    assert whole.exitcode == 0
    spent = json.loads(next((tmp_path / "whole").glob("*/record.json")).read_text())["cost"]
    epoch = (spent["train_seconds"] + spent["eval_seconds"]) / LINES[case]
    rng, store, killed = random.Random(case), tmp_path / "killed", []
    for turn in range(KILLS):  # one kill in each of so many parts of the run, at any moment of an epoch
        target = int(LINES[case] * (turn + rng.random()) / KILLS)
        process = spawn(command(store, **CASES[case]))
        wait_for(store, target, lambda process=process: process.exitcode is not None)
        time.sleep(rng.random() * epoch)
        process.kill()
        process.join(PATIENCE)
        killed.append(process.exitcode == -signal.SIGKILL)
    print(f"{case}: {sum(killed)} of {KILLS} killed")  # pytest -rP shows it
    assert killed[0], "the run ended before it was killed"
    last = spawn(command(store, **CASES[case]))
    last.join(PATIENCE)
    assert_same(bits(store), wanted)


def real(store: Path, **flags: str) -> "subprocess.Popen[str]":
    """A process as a person starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "noisysam", *command(store, **flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory, spawn: Spawn) -> dict[str, Any]:
    """What the real processes below must end with."""
    store = tmp_path_factory.mktemp("long")
    process = spawn(command(store, **LONG))
    process.join(PATIENCE)
    return bits(store)


@pytest.mark.slow
def test_a_real_process_is_killed(tmp_path: Path, long_run: dict[str, Any]) -> None:
    process = real(tmp_path, **LONG)
    wait_for(tmp_path, 2, lambda: process.poll() is not None)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert status_of(tmp_path) == "running"
    assert 2 <= lines_of(tmp_path) < len(long_run["epochs"])
    process = real(tmp_path, **LONG)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.startswith(f"run {long_run['key']}")
    assert_same(bits(tmp_path), long_run)


def test_a_process_is_asked_to_stop(tmp_path: Path, spawn: Spawn, long_run: dict[str, Any]) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    for number in (signal.SIGINT, signal.SIGTERM):
        before = lines_of(store)
        process = spawn(command(store, **LONG), log)
        wait_for(store, before + 2, lambda process=process: process.exitcode is not None)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(PATIENCE)
        assert process.exitcode == 130
        assert status_of(store) == "interrupted"
        assert before + 2 <= lines_of(store) < len(long_run["epochs"])
        said = log.read_text().splitlines()
        own = [line for line in said if line.startswith("noisysam: ")]
        assert own == [said[-1]] == ["noisysam: stopped after the last complete epoch; the same command resumes"]
        assert not any("Traceback" in line for line in said)
    process = spawn(command(store, **LONG), log)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert_same(bits(store), long_run)


def test_a_run_is_trained_by_one_process_at_a_time(
    tmp_path: Path,
    spawn: Spawn,
    long_run: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = spawn(command(tmp_path, **LONG))
    wait_for(tmp_path, 1, lambda: process.exitcode is not None)
    assert cli._run(command(tmp_path, **LONG)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last == f"noisysam: run {long_run['key']} is being trained by another process: wait for it"
    process.join(PATIENCE)
    assert_same(bits(tmp_path), long_run)


# damaged checkpoints


class Stop:
    """A watch that stops the run after an epoch."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        if number == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return validate({**SMALL, "epochs": 5, "train_subset": 600, "opt": "sam", "ema": 0.9})


@pytest.fixture(scope="module")
def stopped(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A store with a run that stopped after three of five epochs, and what the whole run gives."""
    folder = tmp_path_factory.mktemp("stopped")
    fit(config, store=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(config, store=folder / "part", progress=Stop(2))
    return folder / "part", bits(folder / "whole")


def flipped(content: bytes) -> bytes:
    """With one bit changed in the middle."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": flipped,
    "empty": lambda content: b"",
    "shorter than its digest": lambda content: content[:20],
    "other file": lambda content: b"something else entirely, and longer than the digest is\n" * 9,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("both", [False, True], ids=["current", "both"])
def test_damaged_checkpoints(
    damage: str, both: bool, config: RunConfig, stopped: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    part, wanted = stopped
    shutil.copytree(part, tmp_path, dirs_exist_ok=True)
    folder = folder_of(tmp_path)
    assert folder is not None
    names = [checkpoint.CURRENT, checkpoint.PREVIOUS][: 1 + both]
    for name in names:
        (folder / name).write_bytes(DAMAGE[damage]((folder / name).read_bytes()))
    with pytest.warns(UserWarning, match="is damaged") as caught:
        fit(config, store=tmp_path)
    said = [str(w.message) for w in caught if "is damaged" in str(w.message)]
    ends = ["falling back to the checkpoint before it", "starting over"][: 1 + both]
    assert said == [f"{folder / name} is damaged: {end}" for name, end in zip(names, ends, strict=True)]
    assert_same(bits(tmp_path), wanted)


def test_missing_checkpoints(config: RunConfig, stopped: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A kill between the two renames of a save leaves the previous one alone; a lone damaged one starts over."""
    part, wanted = stopped
    for name, leave in (("renamed", False), ("lone", True)):
        shutil.copytree(part, tmp_path / name)
        folder = folder_of(tmp_path / name)
        assert folder is not None
        if leave:
            (folder / checkpoint.PREVIOUS).unlink()
            (folder / checkpoint.CURRENT).write_bytes(b"")
            with pytest.warns(UserWarning, match="is damaged: starting over"):
                fit(config, store=tmp_path / name)
        else:
            (folder / checkpoint.CURRENT).rename(folder / checkpoint.PREVIOUS)
            (folder / f".{checkpoint.CURRENT}.4711").write_bytes(b"half of a checkpo")
            fit(config, store=tmp_path / name)
        assert_same(bits(tmp_path / name), wanted)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with monkeypatch.context() as older:
        older.setattr(checkpoint, "FORMAT", checkpoint.FORMAT - 1)
        checkpoint.save(tmp_path, {"epoch": 3, "key": "a"})
        assert checkpoint.load(tmp_path, torch.device("cpu"), "a") == {"epoch": 3, "key": "a"}
    with pytest.raises(UserError, match="another version"):
        checkpoint.load(tmp_path, torch.device("cpu"), "a")


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    import torch

    checkpoint.save(tmp_path, {"epoch": 2, "key": "a"})
    checkpoint.save(tmp_path, {"epoch": 3, "key": "b"})
    with pytest.warns(UserWarning, match="of run b, not of a: falling back"):
        assert checkpoint.load(tmp_path, torch.device("cpu"), "a") == {"epoch": 2, "key": "a"}


def test_a_checkpoint_is_read_without_running_its_code(tmp_path: Path) -> None:
    import hashlib
    import io

    import torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "evil",))

    buffer = io.BytesIO()
    torch.save({"state": Evil()}, buffer)
    content = buffer.getvalue()
    (tmp_path / checkpoint.CURRENT).write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.warns(UserWarning, match="damaged: starting over"):
        assert checkpoint.load(tmp_path, torch.device("cpu"), "a") is None
    assert not (tmp_path / "evil").exists()


# ends that are not a finish


def test_a_stop_before_the_first_epoch_promises_nothing(config: RunConfig, tmp_path: Path) -> None:
    class AtOnce(Stop):
        def step(self, stage: int, epoch: int, number: int, of: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="stopped before its first epoch was complete"):
        fit(config, store=tmp_path, progress=AtOnce(0))
    with pytest.raises(KeyboardInterrupt, match="after the last complete epoch; the same command resumes"):
        fit(config, store=tmp_path, progress=Stop(0))


def test_interrupted_record(stopped: tuple[Path, dict[str, Any]]) -> None:
    part, wanted = stopped
    record = RunFolder(part, wanted["key"]).record
    assert record is not None
    assert record["status"] == "interrupted"
    assert record["error"] is None
    assert record["results"] == {}
    assert record["cost"]["steps"] == sum(int(line["steps"]) for line in wanted["epochs"][:3])


def test_an_epoch_without_a_checkpoint_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained again, in another time: nobody may have heard of it when the disk fills in its checkpoint."""
    save = checkpoint.save

    def full(folder: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, state)

    class Listener:
        heard = 0

        def __init__(self, folder: RunFolder) -> None:
            self.folder = folder

        def sync(self, final: bool = False) -> bool:
            Listener.heard = len(self.folder.epochs)
            return True

    monkeypatch.setattr(checkpoint, "save", full)
    config = validate({name.replace("-", "_"): value for name, value in SMALL.items()} | {"epochs": 4})
    with pytest.raises(OSError, match="No space left"):
        fit(config, store=tmp_path, tracker=Listener)
    assert (status_of(tmp_path), Listener.heard) == ("interrupted", 2)
    monkeypatch.undo()
    fit(config, store=tmp_path, tracker=Listener)
    assert (status_of(tmp_path), Listener.heard) == ("finished", 4)


def test_a_diverging_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(command(tmp_path, epochs="3", lr="1e10")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("noisysam: diverged")
    folder = folder_of(tmp_path)
    assert folder is not None
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].startswith("diverged")
    assert record["results"] == {}
    assert 1 <= lines_of(tmp_path) <= 3
    assert not (folder / "weights.safetensors").exists()


def test_a_diverged_run_does_not_become_a_finished_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli._run(command(tmp_path, epochs="2", lr="1e10")) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("noisysam: diverged")


def test_a_run_that_ends_in_nan_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(command(tmp_path, epochs="1", lr="1e10")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("noisysam: diverged")


def test_a_request_to_stop_that_a_library_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal's exception is lost, as within torch.compile; the next step raises it again."""
    from noisysam.training.trainer import Trainer

    step = Trainer.step

    def swallowing(self: Trainer, *arguments: Any) -> int:
        if self.method.epoch == 1:
            with contextlib.suppress(KeyboardInterrupt):
                cli._stop(signal.SIGTERM, None)
        return step(self, *arguments)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(Trainer, "step", swallowing)
    try:
        config = RunConfig(
            dataset="digits", model="resnet8", width=0.25, train_subset=200, batch=32, epochs=4, compile="off"
        )
        with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
            fit(config, store=tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert status_of(tmp_path) == "interrupted"
    assert lines_of(tmp_path) == 1


# on another machine


def test_an_unfinished_run_goes_on_in_another_store(
    stopped: tuple[Path, dict[str, Any]], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, expected = stopped
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "archive"
    shutil.copytree(part, here)
    (key,) = (path.parent.name for path in here.glob("*/record.json"))
    cell = {"row": "SAM", "noise": 0.4, "seed": 0, "key": key, "config": config.model_dump(mode="json")}
    write_json(study_path(here, "s"), {"schema": 1, "name": "s", "file": "", "cells": [cell]})
    assert export_study(here, "s", archive) == 0
    assert not (archive / "checkpoints").exists()
    assert export_study(here, "s", archive, unfinished=True) == 0
    assert {path.name for path in (archive / "checkpoints").iterdir()} == {f"{key}.pt", f"{key}.json"}
    import_study(archive, there)
    assert not (there / key).exists()
    import_study(archive, there, unfinished=True)
    begun_on = environment()["cpu"]
    monkeypatch.setitem(environment(), "cpu", "another CPU")
    result = fit(config, store=there)
    assert bits(there) == expected
    assert [part["cpu"] for part in result.record["earlier_environments"]] == [begun_on]
    assert export_study(there, "s", archive, unfinished=True) == 1
    assert not list((archive / "checkpoints").iterdir())


def test_the_record_beside_a_checkpoint_is_checked(
    stopped: tuple[Path, dict[str, Any]], config: RunConfig, tmp_path: Path
) -> None:
    here, archive = tmp_path / "here", tmp_path / "archive"
    shutil.copytree(stopped[0], here)
    (key,) = (path.parent.name for path in here.glob("*/record.json"))
    cell = {"row": "SAM", "noise": 0.4, "seed": 0, "key": key, "config": config.model_dump(mode="json")}
    write_json(study_path(here, "s"), {"schema": 1, "name": "s", "file": "", "cells": [cell]})
    export_study(here, "s", archive, unfinished=True)
    record = archive / "checkpoints" / f"{key}.json"
    content = json.loads(record.read_text())
    write_json(record, {**content, "config": {**content["config"], "lr": 7.0}})
    manifest = json.loads((archive / "MANIFEST.json").read_text())
    manifest["files"][f"checkpoints/{key}.json"] = file_digest(record)
    write_json(archive / "MANIFEST.json", manifest)
    with pytest.raises(UserError, match="its configuration and digests are not those of its key"):
        import_study(archive, tmp_path / "there")
