"""The commands that look at finished runs and at this machine: compare, probe, bench."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from noisysam import cli

TINY = ("--dataset", "digits", "--model", "resnet8", "--width", "0.25", "--epochs", "1", "--train-subset", "200")
FEW = ("--option", "limit=20", "--option", "jacobian_limit=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SGD and a SAM run, tracked."""
    folder = tmp_path_factory.mktemp("looks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for opt in ("sgd", "sam"):
            assert (
                cli._run(["run", *TINY, "--noise", "0.4", "--opt", opt, "--tracking-uri", "sqlite:///mlflow.db"]) == 0
            )
    return folder


@pytest.fixture
def keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the SGD and the SAM run, in whose folder the test runs."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    records = [json.loads(path.read_text()) for path in folder.glob("runs/*/record.json")]
    return [r["key"] for r in sorted(records, key=lambda r: r["config"]["opt"], reverse=True)]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli._run(arguments)
        return (code, *capsys.readouterr())

    return run


def test_compare(says: Callable[..., tuple[int, str, str]], keys: list[str]) -> None:
    code, shown, _ = says("compare", *keys)
    assert code == 0
    assert ["opt", "sgd", "sam"] in [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert "/#/compare-runs?runs=" in shown
    told = json.loads(says("compare", *keys, "--json")[1])
    assert told[keys[1]]["opt"] == "sam"


def test_probe(says: Callable[..., tuple[int, str, str]], keys: list[str], folder: Path) -> None:
    code, shown, err = says("probe", keys[0][:8], "--mechanism", *FEW)
    assert code == 0, err
    assert shown.startswith(f"run {keys[0]}: ")
    assert "mechanism.last_layer_norm" in shown
    content = json.loads((folder / "runs" / keys[0] / "probes" / "mechanism.json").read_text())
    assert not list((folder / "runs" / keys[0] / "probes").glob("*.svg"))  # one moment alone is not drawn
    client = MlflowClient(tracking_uri="sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("noisysam")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`noisysam.key` = '{keys[0]}'")
    sent = {k.removeprefix("probe/mechanism."): v for k, v in run.data.metrics.items() if k.startswith("probe/")}
    assert sent == pytest.approx(content["scalars"])
    assert len(sent) > 5
    told = json.loads(says("probe", keys[0], "--mechanism", *FEW, "--json")[1].splitlines()[-1])
    assert told[keys[0]]["mechanism"] == content  # not computed again


def test_landscapes_side_by_side(says: Callable[..., tuple[int, str, str]], keys: list[str], tmp_path: Path) -> None:
    few = ("--option", "limit=20", "--option", "points=1", "--option", "grid=0", "--no-track")
    code, _, err = says("probe", *keys, "--landscape", *few, "--out", str(tmp_path / "pictures"))
    assert code == 0, err
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"landscape-line.png", "landscape-line.svg"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "choose at least one probe: --"),
        (("--mechanism", "--option", "depth=3"), "have no such option"),
        (("--mechanism", "--option", "depth"), "--option 'depth': write it as key=value"),
        (("--depth",), "No such option"),
    ],
)
def test_what_a_probe_is_not(
    says: Callable[..., tuple[int, str, str]], keys: list[str], arguments: tuple[str, ...], line: str
) -> None:
    code, shown, err = says("probe", keys[0], *arguments)
    assert (code, shown) == (2, "")
    assert line in err.splitlines()[-1]


def test_no_such_run(says: Callable[..., tuple[int, str, str]], keys: list[str]) -> None:
    for command in (("compare",), ("probe", "--mechanism")):
        code, _, err = says(*command, "zz")
        assert code == 2
        assert err.splitlines()[-1].startswith("noisysam: no run 'zz'")
        assert "give a key, the name of a folder there" in err


def test_bench(says: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, err = says("bench", "memory", "--quick")
    assert code == 0, err
    assert "Peak of a step, in copies of the weights" in shown
    assert not list(tmp_path.iterdir())
    assert says("bench", "memory", "--quick", "--out", "found")[0] == 0
    assert json.loads((tmp_path / "found" / "memory.json").read_text())["part"] == "memory"
    code, _, err = says("bench", "speed")
    assert code == 2
    assert "unknown part 'speed'" in err
