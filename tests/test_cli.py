"""What the commands print and leave behind when all is well; what goes wrong is in test_cli_errors.py."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.shell_completion import ShellComplete

import noisysam
from noisysam import cli
from noisysam import noise as labels
from noisysam.cli import recall
from noisysam.cli.base import cli as group
from noisysam.cli.catalogue import entries
from noisysam.cli.options import COMMON, GROUPS, OF_STORE
from noisysam.runs.config import RunConfig

TINY = ("--dataset", "digits", "--model", "resnet8", "--epochs", "2", "--train-subset", "300", "--noise", "0.4")
STUDY = """\
base: {dataset: digits, model: resnet8, epochs: 2, train_subset: 300, noise: 0.4}
rows: {SGD: {opt: sgd}, SAM: {opt: sam}}
"""


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must succeed, and returns what it prints to stdout."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = cli._run([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NOISYSAM_DATA_DIR", "NOISYSAM_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


# help


def imported_by(*arguments: str) -> tuple[set[str], float]:
    """The top-level modules that a command imports, and its seconds, in a process of its own."""
    code = (
        "import sys\nfrom noisysam import cli\ncode = cli._run(sys.argv[1:])\n"
        "print('\\n' + ' '.join(sorted({m.partition('.')[0] for m in sys.modules})), code)"
    )
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    *names, exit_code = run.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    return set(names), seconds


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("sweep", "--help"), ("noise", "-h")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    names, seconds = imported_by(*arguments)
    assert "click" in names
    assert not names & {"torch", "numpy", "mlflow", "pydantic", "sklearn", "pandas", "yaml", "rich"}
    print(f"{' '.join(arguments)}: {seconds:.2f} s")  # pytest -s or -rP shows it
    assert seconds < 1


def test_help_of_run_needs_no_torch() -> None:
    names, _ = imported_by("run", "--help")
    assert not names & {"torch", "mlflow", "sklearn", "pandas"}


def test_help_of_run_shows_every_field(says: Callable[..., str]) -> None:
    shown = " ".join(says("run", "--help-all").split())  # however wide the terminal is
    words = shown.replace("/", " ").split()
    for name, field in RunConfig.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        assert flag in words, flag
        assert field.description, name
        assert field.description.split()[0].strip(",;") in shown
    for default in ("[default: 200]", "[default: 0.1]", "[default: symmetric]", "[default: resnet32]"):
        assert default in shown


def test_help_of_run_is_short_and_in_groups(says: Callable[..., str]) -> None:
    shown = says("run", "--help")
    for heading in (*GROUPS.values(), OF_STORE):
        assert f"\n{heading}:\n" in says("run", "--help-all")
    assert "\nOptimizer:\n" in shown
    assert "noisysam run --noise 0.8 --opt sam" in shown
    assert "--sync-perturbation" not in shown
    assert len(shown.splitlines()) < 0.7 * len(says("run", "--help-all").splitlines())
    assert re.search(r"\d+ more options: noisysam run --help-all", shown)
    fields = list(RunConfig.model_fields)
    assert sorted(GROUPS, key=fields.index) == list(GROUPS)
    assert set(COMMON) - set(fields) == {"store", "tracking_uri", "no_track", "as_json", "help", "help_all"}


def test_every_command_has_help(says: Callable[..., str]) -> None:
    for name, command in cli.cli.commands.items():
        assert command.get_short_help_str(), name
        assert says(name, "--help").startswith(f"Usage: noisysam {name}")


def test_version(says: Callable[..., str]) -> None:
    assert noisysam.__version__ in says("--version")


# completion


def completed(*words: str) -> list[str]:
    """What the Tab key offers for the last word."""
    found = ShellComplete(group, {}, "noisysam", "_NOISYSAM_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("run", "--opt", "sam-"), ["sam-on", "sam-random"]),
        (("run", "--method", "vol"), ["volminnet"]),
        (("run", "--noise-type", "pai"), ["pair"]),
        (("run", "--dataset", "dig"), ["digits"]),
        (("run", "--model", "resnet11"), ["resnet110"]),
    ],
)
def test_names_of_components_are_completed(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*words) == offered


def test_studies_and_keys_are_completed(tmp_path: Path) -> None:
    for store, key in (("runs", "ab12"), ("other", "ab34")):
        for file in (f"{store}/{key}/record.json", f"{store}/studies/mine-{store}.json"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("{}")
    for command in ("compare", "probe", "suspects"):
        assert completed(command, "ab") == ["ab12"]
        assert completed(command, "--store", "other", "ab") == ["ab34"]
    for command in ("report", "export", "ui"):
        assert completed(command, "mi") == ["mine-runs"]
    assert completed("suspects", "zz") == []


# list, doctor


def test_list_alone_lists_what_can_be_listed(says: Callable[..., str]) -> None:
    found = [line.split()[2] for line in says("list").splitlines()]
    assert found == ["methods", "optimizers", "models", "datasets", "noise", "probes", "claims"]
    assert list(json.loads(says("list", "--json"))) == found


def test_a_list_without_entries_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["list", "claims"]) == 0
    assert "no claims of your own: --plugin FILE lists those of a file" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["methods", "optimizers", "models", "datasets", "noise"])
def test_lists(what: str, says: Callable[..., str]) -> None:
    found = entries(what)
    assert len(found) >= 3
    lines = says("list", what).splitlines()
    for entry in found:
        (line,) = [line for line in lines if line.startswith(f"{entry['name']} ")]
        assert entry["source"]
        assert line.endswith(f"[{entry['source']}]")
        assert entry["summary"] in line
        for option in entry.get("options", []):
            assert option["description"]
            assert any(f" {option['name']}={option['default']} " in other for other in lines)
    assert json.loads(says("list", what, "--json")) == json.loads(json.dumps(found))


def test_a_named_method_comes_with_its_recipe(says: Callable[..., str]) -> None:
    """Co-teaching's main.py at 200 epochs, and in a training of half the length."""
    whole = says("list", "methods", "co-teaching")
    assert whole.splitlines()[0].startswith("co-teaching ")
    assert "elr" not in whole
    for words in (
        "epochs=200",
        "base_opt=adam",
        "lr=0.001",
        "decay_from=80",
        "final_momentum=0.1",
        "bhanML/Co-teaching@",
    ):
        assert words in whole
    half = says("list", "methods", "co-teaching", "--epochs", "100")
    for words in ("epochs=100", "lr=0.001", "decay_from=40", "final_momentum=0.1", "ramp=5"):
        assert words in half
    assert "milestones=80+120" in says("list", "methods", "elr", "--dataset", "cifar100")
    assert "none" in says("list", "methods", "mae").splitlines()[-1]
    (found,) = json.loads(says("list", "methods", "pes", "--json", "--epochs", "30"))
    assert found["recipe"]["settings"]["milestones"] == [15, 22.5]


def test_doctor(says: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "cifar10.npz").touch()
    lines = says("doctor", "--data-dir", tmp_path).splitlines()
    for name in ("python", "torch", "mlflow", "device", "threads", "data folder"):
        assert any(line.startswith(name) for line in lines), name
    found = json.loads(says("doctor", "--data-dir", tmp_path, "--json"))
    assert found["data folder"] == str(tmp_path)
    assert found["data found"] == "cifar10.npz"


# run


def test_run_prints_its_figures_and_returns_the_stored_result(says: Callable[..., str], tmp_path: Path) -> None:
    shown = says("run", *TINY, "--no-track")
    (folder,) = [path.parent for path in tmp_path.glob("runs/*/record.json")]
    record = json.loads((folder / "record.json").read_text())
    assert shown.startswith(f"run {folder.name}: sgd, symmetric 0.4, seed 0, digits resnet8\n")
    assert f"{100 * record['results']['last']:.2f} %" in shown
    assert f"{100 * record['noise']['flip_rate']:.2f} % of the labels are wrong; blind" in shown
    assert "(oracle)" in shown
    assert "mean of the last 2 epochs " in shown
    before = (folder / "record.json").stat().st_mtime_ns
    assert says("run", *TINY, "--no-track") == shown
    assert (folder / "record.json").stat().st_mtime_ns == before
    assert (folder.parent / "labels" / f"{record['noise']['digest'][:16]}.npz").exists()
    with (folder / "epochs.csv").open(newline="") as file:
        assert [line["epoch"] for line in csv.DictReader(file)] == ["0", "1"]


def test_without_noise_nothing_is_said_to_be_right(says: Callable[..., str]) -> None:
    """Own labels may be wrong as they come."""
    shown = says("run", *TINY, "--noise", "0", "--epochs", "1", "--no-track")
    assert "no noise was added to the labels of the data set; blind" in shown
    assert "mean of the last" not in shown


def test_a_run_on_given_labels_leads_to_its_suspects(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dataset", "digits", "--model", "resnet8", "--epochs", "1", "--train-subset", "300", "--no-track")
    assert cli._run(["run", *flags, "--noise-type", "given", "--snapshots", "1"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"noisysam suspects [0-9a-f]{16} finds", captured.err)
    assert "epoch 1/1: loss" in captured.err
    assert "memorised" not in captured.err  # where nothing is known to be wrong


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch 500", "--batch 500: there are 270 training images, all in each step"),
        (
            "--batch 100 --opt sam --sam-m 48",
            "--sam-m 48 does not divide a batch of 100: the last chunk of a step has 4",
        ),
        ("--batch 100 --opt sam", None),  # 32 is nobody's wish
    ],
)
def test_sizes_that_do_not_fit_are_said(flags: str, said: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli._run(["run", *TINY, "--epochs", "1", "--no-track", *flags.split()]) == 0
    found = [str(w.message) for w in caught if str(w.message).startswith("--")]
    assert [message[: len(said or "")] for message in found] == ([said] if said else [])


def test_what_was_shown_before_needs_no_torch(
    says: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("run", *TINY, "--epochs", "1", "--no-track")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(noisysam.__file__).parents[1]))
    shown, listed = says(*command), says("list", "models")
    for again, expected in ((command, shown), (("list", "models"), listed)):
        names, seconds = imported_by(*again)
        assert not names & {"torch", "mlflow", "sklearn", "pandas"}
        assert says(*again) == expected
        print(f"{' '.join(again)}: {seconds:.2f} s")
    assert json.loads(says(*command, "--json"))["key"] in shown


def test_a_command_is_looked_up_again_when_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, labels = tmp_path / "own.npz", tmp_path / "l.csv"
    for path in (data, labels):
        path.write_text("1")
    given = {"dataset": f"npz:{data}", "noise_type": f"file:{labels}", "noise": None, "plugin": ()}
    note = recall._note(tmp_path, given)
    assert note is not None
    assert recall._note(tmp_path, dict(given)) == note
    assert recall._note(tmp_path, {**given, "seed": "1"}) != note
    recall.remember(tmp_path, given, "key")
    assert note.read_text() == "key"
    assert recall.finished(tmp_path, given) is None, "there is no such run"
    for path in (data, labels):
        path.write_text("22")
        note, before = recall._note(tmp_path, given), note
        assert note != before
    for uncertain in ({"plugin": ("x.py",)}, {"noise_type": "human:worse"}, {"dataset": "hf:x"}, {"model": "timm:x"},
                      {"pretrained": "x"}):  # fmt: skip
        assert recall._note(tmp_path, {**given, **uncertain}) is None
    monkeypatch.setattr(recall, "PACKAGE", tmp_path)
    assert recall._note(tmp_path, given) != note, "another code"


def test_run_as_json(says: Callable[..., str], tmp_path: Path) -> None:
    out = says("run", *TINY, "--no-track", "--json", "--opt", "sam", "--rho", "paper", "--store", tmp_path / "s")
    found = json.loads(out.splitlines()[-1])
    folder = tmp_path / "s" / found["key"]
    assert found == {"folder": str(folder), **json.loads((folder / "record.json").read_text())}
    assert found["status"] == "finished"
    assert found["config"]["opt"] == "sam"
    assert found["optimizer_options"]["rho"] == 0.1
    assert found["oracle"] == ["rho was chosen per noise rate on clean data (arXiv 2010.01412, C.1)"]


def test_the_store_may_come_from_the_environment(
    says: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOISYSAM_STORE", str(tmp_path / "elsewhere"))
    says("run", *TINY, "--no-track", "--epochs", "1")
    assert list((tmp_path / "elsewhere").glob("*/record.json"))
    assert not (tmp_path / "runs").exists()


def test_a_preset_says_what_is_not_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["run", "--preset", "foret", *TINY, "--no-track", "--epochs", "1", "--batch", "64"]) == 0
    told = capsys.readouterr().err
    assert "arXiv 2010.01412" in told
    assert "not as published" in told


# noise


def test_noise_round_trip(says: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    make = ("noise", "make", path, "--dataset", "digits")
    made = json.loads(says(*make, "--type", "pair", "--rate", "0.3", "--seed", "5", "--json"))
    assert made == json.loads(says(*make, "--noise-type", "pair", "--noise", "0.3", "--noise-seed", "5", "--json"))
    assert (made["type"], made["rate"], made["seed"], made["n"]) == ("pair", 0.3, 5, 1348)
    assert made["flip_rate"] == pytest.approx(0.3, abs=0.01)
    assert json.loads(says("noise", "show", path, "--json")) == made
    shown = says("noise", "show", path)
    assert made["digest"] in shown
    assert "matrix" in shown
    checks = says("noise", "verify", path, "--dataset", "digits").splitlines()
    assert len(checks) == 3
    assert all(line.startswith("ok  ") for line in checks)
    table = np.loadtxt(path.with_suffix(".csv"), delimiter=",", skiprows=1, dtype=int)
    assert table.shape == (1348, 3)

    # the same labels, drawn, from the file and from its table: the same results
    records = []
    flags = ("--dataset", "digits", "--model", "resnet8", "--epochs", "1", "--no-track", "--json", "--noise-seed", "5")
    np.save("labels.npy", table[:, 2])
    np.savetxt("labels.txt", table[:, 2], fmt="%d")
    np.savetxt("plain.csv", table[:, 2], fmt="%d")
    np.savetxt("named.csv", table[:, [0, 2]], fmt="%d", delimiter=",", header="index, label", comments="")
    files = [path, path.with_suffix(".csv"), "labels.npy", "labels.txt", "plain.csv", "named.csv"]
    for noise in (("--noise-type", "pair", "--noise", "0.3"), *(("--noise-type", f"file:{file}") for file in files)):
        records.append(json.loads(says("run", *flags, *noise)))
    assert {record["noise"]["digest"] for record in records} == {made["digest"]}
    assert all(record["results"] == records[0]["results"] for record in records)
    assert {record["key"] for record in records[1:]} == {records[1]["key"]} != {records[0]["key"]}


def test_a_matrix_of_many_classes_is_summarised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clean = np.repeat(np.arange(100), 20)
    labels.save(labels.make("pair", clean, 100, rate=0.25, seed=0), tmp_path / "l.npz")
    assert cli._run(["noise", "show", str(tmp_path / "l.npz")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) < 120
    assert "  diagonal, 100 classes: 0.750 to 0.750, median 0.750" in shown
    assert "  largest elsewhere: 99 -> 0 0.250, 98 -> 99 0.250, 97 -> 98 0.250, 96 -> 97 0.250, 95 -> 96 0.250" in shown
    assert "  100 classes: 0.250 to 0.250, median 0.250" in shown


# studies


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(STUDY)
    return path


def test_sweep_report_export_import(says: Callable[..., str], study: Path, tmp_path: Path) -> None:
    listed = says("sweep", study, "--dry-run").splitlines()
    assert [line.split()[1:4] for line in listed[:2]] == [["to", "do", "SGD"], ["to", "do", "SAM"]]
    assert listed[2].startswith("2 cells, 2 to do")
    assert not (tmp_path / "runs").exists()

    assert says("sweep", study, "--no-track").splitlines()[-1] == "noisysam report two"
    listed = says("sweep", study, "--dry-run").splitlines()
    assert [line.split()[1] for line in listed[:2]] == ["finished", "finished"]
    assert listed[2] == "2 cells, 0 to do"

    shown = says("report", study)
    assert shown == says("report", "two")
    assert "SGD" in shown
    assert "SAM" in shown
    assert (tmp_path / "reports" / "two" / "report.md").exists()
    table = json.loads(says("report", "two", "--json").splitlines()[-1])
    assert {line["row"] for line in table["table"]} == {"SGD", "SAM"}

    out = tmp_path / "package"
    assert says("export", "two", out, "--weights").startswith("2 finished runs of two")
    manifest = json.loads((out / "MANIFEST.json").read_text())["files"]
    keys = [line.split()[0] for line in listed[:2]]
    parts = ("epochs/{}.csv.gz", "weights/{}.safetensors")
    assert {part.format(key) for key in keys for part in parts} < set(manifest)
    assert says("import", out, "--store", tmp_path / "other").startswith("2 new runs")
    assert says("import", out, "--store", tmp_path / "other").startswith("0 new runs")
    for key in keys:
        for part in ("record.json", "epochs.csv", "confusion.csv", "weights.safetensors"):
            assert (tmp_path / "other" / key / part).read_bytes() == (tmp_path / "runs" / key / part).read_bytes()

    says("report", "--all", "--from", out, "--out", "again")
    for path in (tmp_path / "reports" / "two").rglob("*.*"):
        again = tmp_path / "again" / "two" / path.relative_to(tmp_path / "reports" / "two")
        assert again.read_bytes() == path.read_bytes()


def test_an_imported_run_is_not_trained_again(
    says: Callable[..., str], study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a training started")

    says("sweep", study, "--no-track", "--store", "first")
    says("export", "two", "package", "--store", "first")
    shown = says("run", *TINY, "--no-track", "--store", "first")
    says("import", "package", "--store", "second")
    shutil.rmtree(tmp_path / "first")
    monkeypatch.setattr("noisysam.training.run.Run.__init__", refuse)
    assert says("run", *TINY, "--no-track", "--store", "second") == shown
    assert says("sweep", study, "--no-track", "--store", "second") == "noisysam report two\n"
    assert says("report", "two", "--store", "second")
    monkeypatch.setenv("NOISYSAM_TRACEBACK", "1")
    with pytest.raises(AssertionError, match="a training started"):  # as it would have been with another seed
        cli._run(["run", *TINY, "--no-track", "--store", "second", "--seed", "1"])


def test_bundled_studies_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.studies.bundled("demo").name == "demo.yaml"
    assert cli.studies.bundled("table4").name == "table4.yaml"


@pytest.mark.services
def test_sweep_with_ray_gives_the_same_results(says: Callable[..., str], study: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    says("sweep", study, "--no-track", "--store", "inline")
    command = ["sweep", str(study), "--no-track", "--store", "ray", "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "noisysam", *command], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "noisysam report two\n"
    records = sorted(tmp_path.glob("inline/*/record.json"))
    assert len(records) == 2
    for path in records:
        other = tmp_path / "ray" / path.relative_to(tmp_path / "inline")
        one, two = json.loads(path.read_text()), json.loads(other.read_text())
        assert two["results"] == one["results"]
        assert (other.parent / "weights.safetensors").read_bytes() == (path.parent / "weights.safetensors").read_bytes()
