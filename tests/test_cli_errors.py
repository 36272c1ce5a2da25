"""Whatever a user gets wrong is told in one line that says what and where, with the right exit code."""

import json
import os
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noisysam import cli, data, noise
from noisysam.core.files import file_digest
from noisysam.data import datasets
from noisysam.runs.problem import load_dataset

RUN = ("run", "--dataset", "digits", "--model", "resnet8", "--epochs", "1", "--no-track")
LONGEST = 400  # characters of the line


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without the settings of whoever runs the tests, and with a network that is given up soon."""
    monkeypatch.chdir(tmp_path)
    for name in ("NOISYSAM_DATA_DIR", "NOISYSAM_STORE", "NOISYSAM_TRACEBACK", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 2.0)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the proxies of its first use, for all tests


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and returns the one line that it says."""

    def run(arguments: tuple[object, ...], code: int, *words: str) -> str:
        assert cli._run([str(a) for a in arguments]) == code
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        own = [line for line in lines if line.startswith("noisysam: ") and not line.startswith("noisysam: warning: ")]
        assert own == lines[-1:], captured.err
        line = own[0]
        assert len(line) <= LONGEST
        for word in words:
            assert word in line, line
        for boilerplate in ("Traceback", "validation error", "Usage:", "pydantic", "For further information", "Try '"):
            assert boilerplate not in captured.err
        return line

    return run


# flags: (what is added to a good command, words of the line)

FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown option": ("--frobnicate", ("No such option", "--frobnicate")),
    "nearly an option": ("--epoch 3", ("--epoch", "Did you mean", "--epochs")),
    "another program's option": ("--optimizer sam", ("No such option", "Did you mean", "--opt")),
    "another program's word": ("--arch resnet8", ("No such option", "Did you mean", "--model")),
    "another program's long option": ("--batch-size 8", ("Did you mean", "--batch")),
    "plugin twice": ("--plugin a.py --plugin b.py", ("--plugin is given twice",)),
    "capitals": ("--opt SAM", ("unknown optimizer 'SAM', did you mean 'sam'?",)),
    "npz as a name": ("--dataset own.npz", ("own.npz: own data are given as npz:own.npz",)),
    "no such method": ("--method mine", ("unknown method 'mine'", "one of your own needs --plugin FILE")),
    "extra argument": ("more", ("unexpected extra argument", "more")),
    "no value": ("--epochs", ("--epochs", "requires an argument")),
    "model": ("--model resnet33", ("unknown model 'resnet33', did you mean 'resnet34'?",)),
    "method": ("--method co-teachin", ("unknown method 'co-teachin', did you mean 'co-teaching'?",)),
    "part of a method": ("--method bootstrap,mixupp", ("unknown method 'mixupp', did you mean 'mixup'?",)),
    "empty part": ("--method bootstrap,", ("unknown method ''",)),
    "optimizer": ("--opt sma", ("unknown optimizer 'sma', did you mean 'sam'?",)),
    "dataset": ("--dataset digit", ("unknown dataset 'digit', did you mean 'digits'?",)),
    "dataset with a colon": ("--dataset digits:3", ("unknown dataset 'digits:3'",)),
    "noise type": ("--noise-type symetric", ("unknown noise type 'symetric', did you mean 'symmetric'?",)),
    "plugin": ("--plugin nowhere.py", ("--plugin nowhere.py", "no such file")),
    "preset": ("--preset forest", ("unknown preset 'forest'", "foret")),
    "schedule": ("--schedule exponential", ("--schedule", "'exponential'", "'cosine'")),
    "base rule": ("--base-opt adagrad", ("--base-opt", "'adagrad'", "'adamw'")),
    "no milestones": ("--schedule milestones", ("--schedule milestones", "--milestones", "100,150")),
    "milestones of another schedule": ("--milestones 10", ("--milestones", "--schedule milestones", "not cosine")),
    "milestones in words": ("--schedule milestones --milestones ten,20", ("--milestones", "number", "'ten'")),
    "milestones in disorder": ("--schedule milestones --milestones 20,10", ("--milestones", "ascending")),
    "milestone 0": ("--schedule milestones --milestones 0,10", ("--milestones", "greater than 0")),
    "period of another schedule": ("--period 5", ("--period", "--schedule restarts")),
    "final momentum of another schedule": ("--final-momentum 0.1", ("--final-momentum", "--schedule linear")),
    "minimum above the rate": ("--lr 0.1 --lr-min 0.2", ("--lr-min", "at most --lr", "0.1")),
    "no published recipe": ("--preset published --method mae", ("method mae", "no published recipe")),
    "published recipe of no rate": ("--preset published --method gce --noise much", ("--noise:", "number", "'much'")),
    "device": ("--device gpu", ("--device gpu", "cuda:N")),
    "missing device": ("--device cuda:7", ("--device cuda:7", "CUDA devices", "--device cpu")),
    "noise above 1": ("--noise 1.2", ("--noise:", "less than or equal to 1", "1.2")),
    "noise below 0": ("--noise -0.1", ("--noise:", "greater than or equal to 0")),
    "noise nan": ("--noise nan", ("--noise:", "finite")),
    "noise in percent": ("--noise 40%", ("--noise:", "number", "'40%'")),
    "noise with a comma": ("--noise 0,4", ("--noise:", "number", "'0,4'")),
    "lr 0": ("--lr 0", ("--lr:", "greater than 0")),
    "lr inf": ("--lr inf", ("--lr:", "finite")),
    "lr text": ("--lr fast", ("--lr:", "number", "'fast'")),
    "epochs 0": ("--epochs 0", ("--epochs:", "greater than or equal to 1")),
    "epochs 1.5": ("--epochs 1.5", ("--epochs:", "integer")),
    "batch 0": ("--batch 0", ("--batch:", "greater than or equal to 1")),
    "ema 1": ("--ema 1", ("--ema:", "less than 1")),
    "momentum nan": ("--momentum nan", ("--momentum:", "finite")),
    "weight decay": ("--weight-decay inf", ("--weight-decay:", "finite")),
    "warmup": ("--warmup -1", ("--warmup:", "greater than or equal to 0")),
    "clip": ("--clip 0", ("--clip:", "greater than 0")),
    "seed": ("--seed x", ("--seed:", "integer", "'x'")),
    "negative seed": ("--seed -1", ("--seed:", "greater than or equal to 0")),
    "width 0": ("--width 0", ("--width:", "greater than 0")),
    "width inf": ("--width inf", ("--width:", "finite")),
    "validation of all": ("--val-fraction 1", ("--val-fraction:", "less than 0.9")),
    "validation of none": ("--val-fraction 0.0001", ("validation fraction 0.0001", "1348", "none for validation")),
    "rho below 0": ("--opt sam --rho -1", ("rho", "greater than or equal to 0")),
    "rho nan": ("--opt sam --rho nan", ("rho", "finite")),
    "rho inf": ("--opt sam --rho inf", ("rho", "finite")),
    "rho text": ("--opt sam --rho big", ("--rho:", "number", "'big'")),
    "rho for sgd": ("--rho 0.1", ("--rho:", "optimizer sgd")),
    "m for sgd": ("--sam-m 32", ("--sam-m:", "optimizer sgd")),
    "m 0": ("--opt sam --sam-m 0", ("--sam-m:", "greater than or equal to 1")),
    "ascent steps for another": ("--opt asam --ascent-steps 2", ("--ascent-steps:", "optimizer asam")),
    "m for a member without": ("--opt saf --sam-m 8", ("--sam-m:", "optimizer saf")),
    "index of mixed rows": ("--opt saf --method mixup", ("optimizer saf", "mixup does not provide")),
    "classes of mixed rows": ("--opt ncsam --method mixup", ("optimizer ncsam", "distributions")),
    "classes of dividemix": ("--opt ncsam --method dividemix", ("optimizer ncsam", "distributions")),
    "several views": ("--opt mesa --method gjs", ("optimizer mesa", "gjs does not provide")),
    "same option": ("--method sce,mixup", ("sce and mixup do not combine", "option alpha")),
    "inherited hook": ("--method co-teaching+,gce", ("co-teaching+ and gce do not combine", "loss")),
    "no norm layers": ("--opt sam-on --norm none", ("optimizer sam-on", "--norm none")),
    "one draw": ("--opt frob-sam --opt-option n=1", ("optimizer frob-sam", "option n", "greater than or equal to 2")),
    "odd antithetic": ("--opt trace-sam --opt-option antithetic=yes", ("optimizer trace-sam", "option n must be even")),
    "one pair": (
        "--opt frob-sam --opt-option antithetic=yes",
        ("optimizer frob-sam", "option n must be 4 or more"),
    ),
    "form": ("--opt cr-sam --opt-option form=log", ("optimizer cr-sam", "option form", "'log'")),
    "low above high": ("--opt gc-sam --opt-option low=0.9", ("optimizer gc-sam", "option low", "option high")),
    "m text": ("--opt sam --sam-m two", ("--sam-m:", "integer")),
    "option without a value": ("--method gce --method-option q", ("--method-option 'q'", "key=value")),
    "option without a name": ("--method gce --method-option =1", ("--method-option '=1'", "key=value")),
    "unknown option of a method": (
        "--method gce --method-option z=1",
        ("method gce", "option z", "no such option (known: q)"),
    ),
    "text for a method's number": ("--method gce --method-option q=high", ("method gce", "option q", "number")),
    "method's number out of range": ("--method gce --method-option q=2", ("method gce", "option q", "equal to 1")),
    "method's choice": ("--method bootstrap --method-option teacher=first", ("option teacher", "'selected'")),
    "option of an optimizer": ("--opt-option rho=1", ("optimizer sgd", "option rho", "no such option (known: none)")),
    "smoothing that is not used": ("--method gce --label-smoothing 0.1", ("gce", "label smoothing")),
    "methods that clash": ("--method gce,elr", ("gce and elr do not combine", "loss")),
    "method twice": ("--method ce,ce", ("ce", "twice")),
    "l2 with adamw": ("--base-opt adamw --l2 loss", ("--l2 loss", "adamw")),
    "l2 with --opt adamw": ("--opt adamw --l2 loss", ("--l2 loss", "adamw")),
    "no split to select on": (
        "--method bootstrap --method-option teacher=selected --val-fraction 0",
        ("teacher=selected", "--val-fraction"),
    ),
    "subset too large": ("--train-subset 100000", ("100000", "class 0", "135")),
    "subset not balanced": ("--train-subset 1340", ("1340", "class 2", "133")),
    "subset too small": ("--train-subset 5", ("5 samples", "10 classes")),
    "rate for people's labels": ("--noise-type human:worse --noise 0.2", ("human", "leave --noise out")),
    "no set of people's labels": ("--noise-type human", ("human", "human:worse")),
    "unknown set of people's labels": ("--noise-type human:wors", ("'wors'", "worse")),
    "missing people's labels": ("--noise-type human:worse", ("CIFAR-10_human.pt", "cifar10n.npz")),
    "no label file": ("--noise-type file:", ("file:PATH",)),
    "missing label file": ("--noise-type file:none.npz", ("none.npz", "no such file")),
    "colon after a rate": ("--noise-type symmetric:0.2", ("takes nothing after a colon", "symmetric:0.2")),
    "missing npz": ("--dataset npz:none.npz", ("none.npz", "no such file")),
    "folder as npz": ("--dataset npz:.", ("not a file",)),
    "device as npz": ("--dataset npz:/dev/zero", ("/dev/zero", "not a file")),
    "device as label file": ("--noise-type file:/dev/zero", ("/dev/zero", "not a")),
    "batch": ("--batch 100000000", ("--batch:", "less than or equal to")),
    "huge batch": (f"--batch 1{'0' * 30}", ("--batch:", "too large")),
    "huge m": (f"--opt sam --sam-m 1{'0' * 12}", ("--sam-m:",)),
    "ascent without end": ("--opt sam --ascent-steps 1000000000", ("--ascent-steps:", "less than or equal to")),
    "huge rho": ("--opt sam --rho 1e300", ("rho", "at most 1e+30")),
    "huge rho as an option": ("--opt asam --opt-option rho=1e300", ("rho", "at most 1e+30")),
    "digits without end": (f"--epochs {'9' * 5000}", ("--epochs:", "too large")),
    "many digits": (f"--epochs {'9' * 4000}", ("--epochs:", "too large")),
    "huge seed": (f"--seed 1{'0' * 30}", ("--seed:", "too large")),
    "huge width": ("--width 1e6", ("--width 1e+06", "at most 1000")),
    "infinite width": ("--width 1e300", ("--width 1e+300", "at most 1000")),
    "large width": ("--width 300", ("--width 300", "parameters")),
    "null character": ("--dataset npz:a\0b", ("--dataset:", "control characters")),
    "null character in a folder": ("--data-dir a\0b", ("--data-dir:", "control characters")),
    "null character in a plugin": ("--plugin a\0b", ("--plugin:", "control characters")),
    "surrogate": ("--dataset npz:\udcff.npz", ("--dataset:", "invalid Unicode")),
    "escape in an option": ("--method gce --method-option q=\x1b[31m", ("--method-option:", "control characters")),
    "missing CIFAR": (
        "--dataset cifar10 --data-dir nowhere",
        ("not in nowhere", "cifar10.npz", "cifar-10-batches-py", "--dataset digits"),
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, fails: Callable[..., str], tmp_path: Path) -> None:
    flags, words = FLAGS[case]
    fails((*RUN, *flags.split(" ")), 2, *words)
    assert not (tmp_path / "runs").exists(), "a refused run leaves nothing behind"


def test_empty_values(fails: Callable[..., str]) -> None:
    fails((*RUN, "--noise", ""), 2, "--noise:", "number", "''")
    fails((*RUN, "--model", ""), 2, "unknown model ''")
    fails((*RUN, "--device", ""), 2, "--device", "cuda:N")


# other commands

COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown command": ("sweeep x.yaml", ("No such command 'sweeep'", "sweep")),
    "unknown list": ("list things", ("'things'", "methods", "noise")),
    "list of an unknown method": ("list methods elrr", ("unknown method 'elrr', did you mean 'elr'?",)),
    "report without a study": ("report", ("name the studies to report", "--all")),
    "unknown study": ("report nope", ("no study 'nope'", "runs", "sweep or import")),
    "study that leads out": ("report ../nope", ("no study '../nope'",)),
    "export of an unknown study": ("export nope out", ("no study 'nope'", "sweep or import")),
    "import of nothing": ("import nowhere", ("nowhere", "MANIFEST.json", "noisysam export")),
    "missing study file": ("sweep nope.yaml", ("nope.yaml", "no such file")),
    "no bundled study": ("sweep nope", ("no study named 'nope'", "YAML")),
    "no jobs": ("sweep nope.yaml --jobs 0", ("--jobs", "x>=1")),
    "noise show": ("noise show none.npz", ("none.npz", "no such file")),
    "noise make elsewhere": ("noise make labels.txt --dataset digits", ("labels.txt", ".npz")),
    "noise make rate": ("noise make l.npz --dataset digits --rate 2", ("noise rate 2.0", "between 0 and 1")),
    "noise make type": ("noise make l.npz --dataset digits --type pear", ("'pear', did you mean 'pair'?",)),
    "noise make seed": ("noise make l.npz --dataset digits --seed -1", ("--seed", "x>=0")),
    "noise verify without data": ("noise verify none.npz", ("none.npz", "no such file")),
    "ui port": ("ui --port 99999", ("--port", "99999")),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(case: str, fails: Callable[..., str]) -> None:
    arguments, words = COMMANDS[case]
    fails(tuple(arguments.split(" ")), 2, *words)


@pytest.mark.parametrize("group", [(), ("noise",)])
def test_a_group_alone_shows_its_help(group: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(group) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: noisysam")
    assert len(captured.err.splitlines()) > 5, "as a page, not as one line"


def test_a_store_that_cannot_be_written(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails((*RUN, "--store", tmp_path / "file"), 1, "file")


def test_a_fault_of_ours_is_one_line_too(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of a kind\nthat nobody expected")

    monkeypatch.setattr("noisysam.training.trainer.Trainer.train_epoch", broken)
    line = fails(RUN, 1, "unexpected ZeroDivisionError: of a kind", "NOISYSAM_TRACEBACK=1")
    assert "nobody" not in line
    (record,) = tmp_path.glob("runs/*/record.json")
    content = json.loads(record.read_text())
    assert content["error"] == "ZeroDivisionError: of a kind"
    assert "in broken" in content["traceback"], "the record keeps it"
    monkeypatch.setenv("NOISYSAM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli._run(RUN)


# study files

BASE = "base: {dataset: digits, model: resnet8, epochs: 1}\n"
STUDIES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("mapping",)),
    "list": ("- a\n- b\n", ("mapping with base, grid, rows and seeds",)),
    "word": ("study\n", ("mapping",)),
    "open bracket": (BASE + "rows: {a: [1\n", ("line 3", "not valid YAML")),
    "tab": ("base:\n\tlr: 0.1\n", ("line 2", "not valid YAML", "'\\t'")),
    "not text": (b"\xff\xfe\x00\x01", ("not valid YAML",)),
    "python object": ("rows: !!python/object/apply:os.getcwd []\n", ("not valid YAML", "line 1")),
    "no rows": (BASE, ("rows", "missing")),
    "empty rows": (BASE + "rows: {}\n", ("rows", "at least 1")),
    "rows as a list": (BASE + "rows: [a, b]\n", ("rows", "dictionary")),
    "row that is a number": (BASE + "rows: {a: 3}\n", ("rows.a", "dictionary", "3")),
    "unknown key": (BASE + "rows: {a: {}}\nsedes: [1]\n", ("sedes", "no such option")),
    "number as a key": (BASE + "rows: {a: {}}\n1: 2\n", ("string",)),
    "unknown field": (BASE + "rows: {a: {learning_rate: 1}}\n", ("row 'a'", "no field learning_rate")),
    "nearly a field": (BASE + "rows: {a: {epoch: 1}}\n", ("row 'a'", "no field epoch, did you mean epochs?")),
    "unknown field in the grid": (BASE + "grid: {nois: [0.1]}\nrows: {a: {}}\n", ("no field nois", "noise?")),
    "bad value": (BASE + "rows: {a: {lr: fast}}\n", ("row 'a'", "lr:", "number", "'fast'")),
    "bad name": (BASE + "rows: {a: {opt: sma}}\n", ("row 'a'", "'sma', did you mean 'sam'?")),
    "list as a value": (BASE + "rows: {a: {lr: [" + "1, " * 500 + "1]}}\n", ("row 'a'", "lr:", "number")),
    "bad option": (BASE + "rows: {a: {method: gce, method_option: {q: 2}}}\n", ("row 'a'", "gce", "option q")),
    "grid against row": (BASE + "grid: {noise: [0.1]}\nrows: {a: {noise: 0}}\n", ("row 'a' sets noise", "grid")),
    "grid of a number": (BASE + "grid: {noise: 0.1}\nrows: {a: {}}\n", ("grid.noise", "list")),
    "empty grid": (BASE + "grid: {noise: []}\nrows: {a: {}}\n", ("grid.noise", "at least 1")),
    "value twice in the grid": (
        BASE + "grid: {noise: [0.1, 0.1]}\nrows: {a: {}}\n",
        ("row 'a' has the same run twice",),
    ),
    "seeds of a row": (BASE + "rows: {a: {seeds: [1]}}\n", ("rows.a.seeds", "some of the study's seeds")),
    "row twice": (BASE + "rows:\n  a: {}\n  a: {lr: 0.2}\n", ("line 4", "'a' is given twice")),
    "no seeds": (BASE + "rows: {a: {}}\nseeds: []\n", ("seeds", "at least 1")),
    "seed twice": (BASE + "rows: {a: {}}\nseeds: [1, 1]\n", ("the same run twice", "seed 1")),
    "seed that is no number": (BASE + "rows: {a: {}}\nseeds: [one]\n", ("seeds.0", "integer", "'one'")),
    "negative seed": (BASE + "rows: {a: {}}\nseeds: [-1]\n", ("row 'a'", "seed:", "greater than or equal to 0")),
    "seed in a row": (BASE + "rows: {a: {seed: 3}}\n", ("seed", "under seeds")),
    "seed in the grid": (BASE + "grid: {seed: [0, 1]}\nrows: {a: {}}\n", ("seed", "under seeds")),
}


@pytest.mark.parametrize("dry", [("--dry-run",), ("--no-track",)], ids=["dry", "real"])
@pytest.mark.parametrize("case", STUDIES)
def test_studies(case: str, dry: tuple[str, ...], fails: Callable[..., str], tmp_path: Path) -> None:
    content, words = STUDIES[case]
    path = tmp_path / "study.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(("sweep", "study.yaml", *dry), 2, "study.yaml", *words)
    assert os.listdir(tmp_path) == ["study.yaml"], "a refused study leaves nothing behind"  # noqa: PTH208


def test_a_failed_cell_does_not_stop_the_others(fails: Callable[..., str], tmp_path: Path) -> None:
    rows = "rows: {bad: {lr: 1.0e+10}, good: {}}\n"
    (tmp_path / "study.yaml").write_text("base: {dataset: digits, model: resnet8, epochs: 3}\n" + rows)
    fails(("sweep", "study.yaml", "--no-track"), 1, "1 of 2 cells failed, first bad | symmetric 0 | seed 0: diverged")
    states = [json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/*/record.json")]
    assert sorted(states) == ["failed", "finished"]


# data


def arrays(**changes: Any) -> dict[str, Any]:
    """A good data set of 40 + 12 images in four classes, with changes; None leaves an array out."""
    rng = np.random.default_rng(0)
    found = {
        "train_images": rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8),
        "train_labels": np.arange(40) % 4,
        "test_images": rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8),
        "test_labels": np.arange(12) % 4,
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


DATA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing array": ({"test_labels": None}, ("lacks test_labels",)),
    "float images": ({"train_images": np.zeros((40, 8, 8, 1))}, ("train_images must be uint8", "float64")),
    "channels first": ({"train_images": np.zeros((40, 3, 8, 8), np.uint8)}, ("train_images", "(n, H, H, 1 or 3)")),
    "not square": ({"train_images": np.zeros((40, 8, 9, 1), np.uint8)}, ("train_images", "(40, 8, 9, 1)")),
    "no images": ({"train_images": np.zeros((0, 8, 8, 1), np.uint8), "train_labels": np.zeros(0, int)}, ("is empty",)),
    "other test size": ({"test_images": np.zeros((12, 9, 9, 1), np.uint8)}, ("(8, 8, 1)", "(9, 9, 1)")),
    "too few labels": ({"train_labels": np.arange(39) % 4}, ("train_labels has 39 entries for 40 images",)),
    "float labels": ({"train_labels": np.zeros(40)}, ("train_labels", "integers", "float64")),
    "negative labels": ({"train_labels": np.arange(40) % 4 - 1}, ("train_labels holds -1",)),
    "label out of range": ({"test_labels": np.arange(12) % 5}, ("test_labels holds 4", "0 to 3")),
    "class without samples": ({"train_labels": np.arange(40) % 4 * 2}, ("no sample of class 1",)),
    "one class": ({"train_labels": np.zeros(40, int), "test_labels": np.zeros(12, int)}, ("one class",)),
    "pickled labels": ({"train_labels": np.array([0, "b"] * 20, dtype=object)}, ("labels.npy holds Python objects",)),
    "class names": ({"class_names": np.arange(4)}, ("class_names", "strings")),
}


@pytest.mark.parametrize("case", DATA)
def test_own_data(case: str, fails: Callable[..., str], tmp_path: Path) -> None:
    changes, words = DATA[case]
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    fails((*RUN, "--dataset", "npz:own.npz"), 2, "own.npz", *words)


def test_damaged_data(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    good = path.read_bytes()
    middle = 400
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    for content, word in (
        (good[: len(good) // 2], "cut short"),
        (b"", "not an .npz file"),
        (b"train_images: none\n" * 20, "not an .npz file"),
        (flipped, "cannot be read"),
    ):
        path.write_bytes(content)
        fails((*RUN, "--dataset", "npz:own.npz"), 2, "own.npz", word)


def test_wrong_cifar(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    np.savez(tmp_path / "small" / "cifar10.npz", **arrays())
    fails((*RUN, "--dataset", "cifar10", "--data-dir", "small"), 2, "cifar10.npz", "(50000, 32, 32, 3)", "npz:FILE")
    (tmp_path / "torn" / "cifar-10-batches-py").mkdir(parents=True)
    words = ("torn/cifar-10-batches-py", "incomplete or damaged", "--dataset digits")
    fails((*RUN, "--dataset", "cifar10", "--data-dir", "torn"), 2, *words)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "CIFAR-10_human.pt").write_bytes(b"junk")
    fails((*RUN, "--noise-type", "human:worse", "--data-dir", "junk"), 2, "CIFAR-10_human.pt", "refused")


def test_two_classes_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", **arrays(train_labels=np.arange(40) % 2, test_labels=np.arange(12) % 2))
    two = (*RUN, "--dataset", "npz:two.npz", "--noise", "0.2")
    for more in ((), ("--noise-type", "symmetric-exclusive"), ("--noise-type", "pair"), ("--noise-type", "instance")):
        assert cli._run((*two, *more)) == 0
    capsys.readouterr()


def test_two_classes_have_no_map_of_asymmetric_noise(fails: Callable[..., str], tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", **arrays(train_labels=np.arange(40) % 2, test_labels=np.arange(12) % 2))
    words = ("asymmetric", "2 classes", "pair noise")
    fails((*RUN, "--dataset", "npz:two.npz", "--noise-type", "asymmetric", "--noise", "0.2"), 2, *words)


@pytest.mark.parametrize(
    "flags",
    ["--batch 5000", "--train-subset 20 --batch 64", "--train-subset 10 --val-fraction 0.8", "--noise 0",
     "--opt sam --sam-m 1000", "--width 0.01", "--warmup 100", "--eval-every 7", "--clip 0.001"],
)  # fmt: skip
def test_extreme_but_sound(flags: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli._run((*RUN, "--json", *flags.split(" "))) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["cost"]["steps"] >= 1
    assert 0 <= record["results"]["last"] <= 1


def test_a_data_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    first = load_dataset(f"npz:{path}", None)
    assert load_dataset(f"npz:{path}", None) is first
    np.savez(path, **arrays(train_labels=np.arange(40)[::-1] % 4))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert load_dataset(f"npz:{path}", None).digest != first.digest


# label files


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return data.load("digits").train_labels.numpy()


LABELS: dict[str, tuple[Callable[[np.ndarray], dict[str, Any]], tuple[str, ...]]] = {
    "wrong length": (lambda y: {"labels": y[:-1]}, ("1347 entries for 1348",)),
    "other clean labels": (lambda y: {"labels": y, "clean": np.roll(y, 1)}, ("clean labels differ", "another order")),
    "other clean length": (lambda y: {"labels": y, "clean": y[:5]}, ("clean labels (5,)", "(1348,)")),
    "out of range": (lambda y: {"labels": y + 5}, ("labels holds 14", "0 to 9")),
    "floats": (lambda y: {"labels": y / 1}, ("integers", "float64")),
    "no labels": (lambda y: {"noisy": y}, ("lacks labels", "noisy")),
    "pickled": (lambda y: {"labels": y.astype(object)}, ("labels.npy holds Python objects",)),
}


@pytest.mark.parametrize("case", LABELS)
def test_label_arrays(case: str, fails: Callable[..., str], tmp_path: Path, clean: np.ndarray) -> None:
    content, words = LABELS[case]
    np.savez(tmp_path / "labels.npz", **content(clean))
    fails((*RUN, "--noise-type", "file:labels.npz"), 2, "labels.npz", *words)


TABLES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "no header": ("labels.csv", "1,2\n2,3\n", ("first line", "noisy")),
    "a column without a name": ("labels.csv", "1\n2\n", ("2 entries for 1348",)),
    "a text": ("labels.txt", "1 2\n3 4\n", ("integer label",)),
    "a binary text": ("labels.txt", "\0\1", ("labels.txt",)),
    "a text as an array": ("labels.npy", "1\n", ("cannot be read",)),
    "empty": ("labels.csv", "", ("first line", "noisy")),
    "too short": ("labels.csv", "noisy\n1\n2\n", ("2 entries for 1348",)),
    "text": ("labels.csv", "noisy\n" + "cat\n" * 1348, ("column noisy", "integer")),
    "ragged": ("labels.csv", "index,noisy\n" + "1\n" * 1348, ("1 fields for 2 columns",)),
    "index": ("labels.csv", "index,noisy\n" + "0,1\n" * 1348, ("column index",)),
    "suffix": ("labels.dat", "1\n2\n", ("not an .npz file",)),
}


@pytest.mark.parametrize("case", TABLES)
def test_label_tables(case: str, fails: Callable[..., str], tmp_path: Path) -> None:
    name, content, words = TABLES[case]
    (tmp_path / name).write_text(content)
    fails((*RUN, "--noise-type", f"file:{name}"), 2, name, *words)


def test_saved_labels_that_were_changed(fails: Callable[..., str], tmp_path: Path, clean: np.ndarray) -> None:
    path = tmp_path / "labels.npz"
    noise.save(noise.make("symmetric", clean, 10, rate=0.3, seed=1), path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    fails((*RUN, "--noise-type", "file:labels.npz"), 2, "labels.npz", "cut short")
    path.write_bytes(good)
    with np.load(path) as archive:
        content = dict(archive)
    content["labels"][0] = (content["labels"][0] + 1) % 10
    np.savez(path, **content)
    for command in ((*RUN, "--noise-type", "file:labels.npz"), ("noise", "show", path), ("noise", "verify", path)):
        fails(command, 2, "labels.npz", "checksum")
    path.write_bytes(good)
    np.savez(tmp_path / "own.npz", **arrays())
    words = "it has clean labels (1348,), the data set (40,)"
    fails(("noise", "verify", path, "--dataset", "npz:own.npz"), 2, "labels.npz", words)


# records


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``noisysam export`` wrote of a study with one run."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "one.yaml").write_text(BASE + "rows: {a: {}}\n")
    assert cli._run(["sweep", f"{folder}/one.yaml", "--no-track", "--store", f"{folder}/store"]) == 0
    assert cli._run(["export", "one", f"{folder}/out", "--store", f"{folder}/store"]) == 0
    return folder


@pytest.fixture
def package(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A copy of the exported folder that a test may damage."""
    shutil.copytree(exported / "out", tmp_path / "package")
    capsys.readouterr()
    return tmp_path / "package"


def listed(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest."""
    manifest = json.loads((package / "MANIFEST.json").read_text())
    change(manifest)
    (package / "MANIFEST.json").write_text(json.dumps(manifest))


def test_damaged_packages(fails: Callable[..., str], package: Path, tmp_path: Path) -> None:
    record = package / "runs.jsonl"
    content, manifest = record.read_text(), (package / "MANIFEST.json").read_text()
    take = ("import", "package")

    record.write_text(content.replace('"last":', '"last":1'))
    fails(take, 2, "runs.jsonl", "differs from the digest")
    record.unlink()
    fails(take, 2, "runs.jsonl", "missing", "MANIFEST.json lists it")
    other = (content.replace('"finished"', '"failed"'), content.replace('"key":"', '"key":"0'))
    for fault in ('{"schema": 1}', "{", *other):
        record.write_text(fault)
        listed(package, lambda m: m["files"].update({record.name: file_digest(record)}))
        fails(take, 2, "package")
    record.write_text(content)
    (package / "MANIFEST.json").write_text(manifest)
    for outside in ("../outside.txt", "studies/../../outside.txt", str(tmp_path / "outside.txt")):
        listed(package, lambda m, outside=outside: m["files"].update({outside: "0"}))
        fails(take, 2, "MANIFEST.json", "outside.txt", "leads out of the folder")
        (package / "MANIFEST.json").write_text(manifest)
    for change, word in (
        (lambda m: m.update(schema=99), "schema 99"),
        (lambda m: m.pop("schema"), "schema None"),
        (lambda m: m.pop("files"), "lists no files"),
    ):
        listed(package, change)
        fails(take, 2, "MANIFEST.json", word)
        (package / "MANIFEST.json").write_text(manifest)
    (package / "MANIFEST.json").write_text("[]")
    fails(take, 2, "MANIFEST.json", "JSON object")
    (package / "MANIFEST.json").unlink()
    fails(take, 2, "no MANIFEST.json")
    assert not (tmp_path / "runs").exists(), "nothing is taken of a package with a fault"


def test_corrupt_records(fails: Callable[..., str], exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "store", tmp_path / "runs")
    (record,) = (tmp_path / "runs").glob("*/record.json")
    record.with_name("status.json").unlink()  # which says of a record of the same size that it is sound
    good = record.read_text()
    plan = tmp_path / "runs" / "studies" / "one.json"
    commands = ((RUN, 2), (("report", "one"), 2), (("sweep", exported / "one.yaml", "--no-track"), 1))
    for fault, word in (
        (good[: len(good) // 2], "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[1]", "should be an object"),
        (good.replace('"schema": 1', '"schema": 2'), "schema: this version reads 1"),
        ("{}", "schema: missing"),
    ):
        record.write_text(fault)
        for command, code in commands:
            fails(command, code, "record.json", word)
    record.write_text(good)
    plan.write_text("{")
    fails(("report", "one"), 2, "one.json", "cannot be read as JSON")


def test_a_report_of_nothing(fails: Callable[..., str], exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "store" / "studies", tmp_path / "runs" / "studies")
    fails(("report", "one"), 2, "study one", "no finished run")
