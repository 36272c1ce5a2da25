"""A user's own method from a file: trained, keyed by its content, listed; its faults in one line."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noisysam import cli, data, fit, models, noise, optim, probes
from noisysam.cli import new
from noisysam.core import plugins
from noisysam.core.errors import UserError
from noisysam.methods import METHODS
from noisysam.runs.config import RunConfig, validate
from noisysam.studies.claims import CLAIM_KINDS

PLUGIN = '''
from noisysam.methods import METHODS, Method


@METHODS.register("{name}", source="a test")
class Half(Method):
    """Half of the cross-entropy."""

    def loss(self, logits, task):
        return {factor} * self.cross_entropy(logits, task.labels)

    @classmethod
    def published(cls, dataset, noise_type, noise):
        return {{}}
'''


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Callable[[str, float], Path]]:
    """Writes a plugin that registers a method; forgets the method afterwards."""
    names = []

    def write(name: str, factor: float) -> Path:
        path = tmp_path / f"{name}_{factor}.py"
        path.write_text(PLUGIN.format(name=name, factor=factor))
        names.append(name)
        return path

    yield write
    for name in names:
        METHODS._items.pop(name, None)


def test_own_method_trains_and_its_content_is_in_the_key(
    written: Callable[[str, float], Path], digits: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = written("half", 0.5)
    config = digits(plugin=path, method="half", epochs=1)
    result = fit(config, store=tmp_path / "runs")
    assert result.record["status"] == "finished"
    assert result.record["config"]["plugin"] == path.name
    moved = path.rename(tmp_path / "elsewhere.py")
    assert digits(plugin=moved, method="half", epochs=1).keyed() == config.model_copy(update={"plugin": moved}).keyed()
    METHODS._items.pop("half")
    other = digits(plugin=written("half", 0.25), method="half", epochs=1)
    assert other.keyed()["plugin"] != config.model_copy(update={"plugin": moved}).keyed()["plugin"]


def test_listed(written: Callable[[str, float], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = written("half-listed", 0.5)
    assert cli._run(["list", "methods", "--plugin", str(path)]) == 0
    assert "half-listed" in capsys.readouterr().out
    plugins.load(path)  # a second time is nothing


@pytest.mark.parametrize(
    ("content", "words"), [("import nowhere_at_all", "nowhere_at_all"), ("x = (", "SyntaxError"), ("1 / 0", "division")]
)
def test_faults_of_a_plugin_are_one_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        validate({"plugin": path})
    assert "broken.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_options_make_a_run_oracle() -> None:
    config = validate({"preset": "published", "method": "gce", "noise": 0.4})
    assert any("published" in reason for reason in config.oracle())
    assert config.keyed() != validate({"method": "gce", "noise": 0.4}).keyed()
    assert validate({"preset": "published", "method": "gce", "method_option": {"q": 0.5}}).method_option == {"q": 0.5}


# what is registered is checked at once

HEAD = """
from noisysam.data import DATASETS
from noisysam.methods.base import METHODS, Method
from noisysam.models import MODELS
from noisysam.noise.base import NOISE, Noise
from noisysam.optim.base import OPTIMIZERS, SharpnessAware
from noisysam.probes.base import PROBES, Probe
from noisysam.studies.claims import CLAIM_KINDS

"""

FAULTS = {
    "method, no class": ("@METHODS.register('x', source='s')\ndef f(logits, task): ...",
                         "method 'x': it must be a class that inherits from Method"),
    "method, loss": ("@METHODS.register('x', source='s')\nclass X(Method):\n def loss(self, logits): ...",
                     r"method 'x': loss must take \(self, logits, task\), it takes \(self, logits\)"),
    "method, plan": ("@METHODS.register('x', source='s')\nclass X(Method):\n def plan(self, logits): ...",
                     r"method 'x': plan must take \(self, tasks, logits\)"),
    "method, options": ("@METHODS.register('x', source='s')\nclass X(Method):\n class Options: ...",
                        "method 'x': Options must inherit"),
    "method, requires": ("@METHODS.register('x', source='s')\nclass X(Method):\n requires = ('luck',)",
                         "method 'x': 'luck' is no requirement"),
    "optimizer, gradient": ("@OPTIMIZERS.register('x', source='s')\nclass X(SharpnessAware):\n copies = 1\n"
                            " def gradient(self): ...", r"optimizer 'x': gradient must take \(self, objective, rows\)"),
    "optimizer, copies": ("@OPTIMIZERS.register('x', source='s')\nclass X(SharpnessAware):\n"
                          " def gradient(self, objective, rows): ...", "optimizer 'x': copies is missing"),
    "optimizer, null": ("@OPTIMIZERS.register('x', source='s')\nclass X(SharpnessAware):\n copies = 1\n"
                        " null = {'rho': 0}", "optimizer 'x': null names 'rho'"),
    "noise, make": ("@NOISE.register('x', source='s')\nclass X(Noise): ...", "noise type 'x': it must define make"),
    "data set": ("@DATASETS.register('x', source='s')\ndef f(): ...",
                 r"dataset 'x': the function must take \(data_dir\), it takes \(\)"),
    "model": ("@MODELS.register('x', source='s')\ndef f(classes): ...",
              r"model 'x': the function or class must take \(classes, channels, size\)"),
    "probe": ("@PROBES.register('x', source='s')\nclass X(Probe): ...", "probe 'x': it must define run"),
    "claim": ("@CLAIM_KINDS.register('x', source='s')\ndef f(gains): ...",
              r"claim kind 'x': the function must take \(gains, margin\)"),
    "name": ("@METHODS.register('x,y', source='s')\nclass X(Method): ...", "a name has letters"),
    "taken name": ("@METHODS.register('ce', source='s')\nclass X(Method): ...", "there is one of this name already"),
    "source": ("@METHODS.register('x', source='')\nclass X(Method): ...", "source= names the paper"),
    "revision": ("@METHODS.register('x', source='s', revision=0)\nclass X(Method): ...", "revision= is a number"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_keep_its_contract_is_refused_in_one_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(HEAD + content)
    with pytest.raises(UserError, match=words) as caught:
        plugins.load(path)
    assert str(caught.value).startswith(f"--plugin {path}: ")
    assert "\n" not in str(caught.value)
    assert not any("x" in registry for registry in REGISTRIES)


REGISTRIES: list[Any] = [
    METHODS, optim.OPTIMIZERS, noise.NOISE, data.DATASETS, models.MODELS, probes.PROBES, CLAIM_KINDS
]  # fmt: skip


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """Registries are afterwards as they were."""
    before = [dict(registry._items) for registry in REGISTRIES]
    yield
    for registry, items in zip(REGISTRIES, before, strict=True):
        registry._items = items
    plugins.load_installed.cache_clear()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("kind", new.KINDS)
def test_a_new_component_works_as_it_is_written(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["new", kind, f"my-{kind}", "--out", str(tmp_path)]) == 0
    component, test = tmp_path / f"my_{kind}.py", tmp_path / f"test_my_{kind}.py"
    assert f"try it: pytest {test}" in capsys.readouterr().out
    assert not [word for word in ("{name}", "{file}", "{Class}", "{function}") if word in component.read_text()]
    spec = importlib.util.spec_from_file_location(test.stem, test)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [f for name, f in inspect.getmembers(module, inspect.isfunction) if name.startswith("test_")]
    assert len(tests) >= 2
    for function in tests:
        function(**({"tmp_path": tmp_path / "store"} if inspect.signature(function).parameters else {}))
    assert any(f"my-{kind}" in registry for registry in REGISTRIES)
    assert cli._run(["new", kind, f"my-{kind}", "--out", str(tmp_path)]) == 2
    assert "it is there already" in capsys.readouterr().err


def test_a_new_component_needs_a_name_that_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../up", "7th", "a b", ""):
        assert cli._run(["new", "method", name, "--out", str(tmp_path)]) == 2
        assert "a name begins with a letter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "name"), [("method", "gce"), ("noise", "pair")])
def test_a_new_component_needs_a_name_that_is_not_taken(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(["new", kind, name, "--out", str(tmp_path)]) == 2
    assert f"{name!r}: there is a {kind} of this name already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# installed packages


def install(folder: Path, content: str) -> None:
    """A package 'third' that registers by an entry point."""
    (folder / "third.py").write_text(content)
    facts = folder / "third-1.5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.5\n")
    (facts / "entry_points.txt").write_text("[noisysam.plugins]\nown = third\n")


@pytest.mark.usefixtures("_forgotten")
def test_an_installed_package_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: Callable[..., RunConfig]
) -> None:
    install(tmp_path, PLUGIN.format(name="third", factor=0.5))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "third", raising=False)
    plugins.load_installed.cache_clear()
    config = digits(method="third", epochs=1)  # no --plugin
    assert "third" in METHODS
    assert plugins.load_installed() == {"third": "1.5"}
    assert config.recipe().revisions["method third"] == 1
    assert cli._run(["list", "methods"]) == 0
    del sys.modules["third"]


@pytest.mark.usefixtures("_forgotten")
def test_a_package_that_fails_stands_in_nobodys_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, "1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_installed.cache_clear()
    with (
        pytest.warns(UserWarning, match="plug-in own of third is left out: division by zero"),
        pytest.raises(UserError, match="unknown method 'third'"),
    ):
        validate({"method": "third"})
    assert validate({"method": "gce"}).method == "gce"


@pytest.mark.usefixtures("_forgotten")
def test_a_kind_of_claim_in_a_study(tmp_path: Path) -> None:
    """From the study file to its verdict: five seeds, all ahead."""
    from noisysam.report import claims as judged
    from noisysam.studies import study_file
    from noisysam.studies.claims import parse

    (tmp_path / "own.py").write_text(
        "from noisysam.studies.claims import CLAIM_KINDS\n"
        "@CLAIM_KINDS.register('all-ahead', source='a test')\n"
        "def f(gains, margin):\n"
        "    return (0.001 if min(gains) > margin else 1.0), (0.001 if max(gains) < margin else 1.0)\n"
    )
    study = tmp_path / "s.yaml"
    study.write_text(
        f"base: {{plugin: {tmp_path / 'own.py'}}}\nrows: {{A: {{}}, B: {{opt: sam}}}}\n"
        "claims: [{text: A is ahead, kind: all-ahead, rows: [A, B], margin: 1}]\n"
    )
    (claim,) = parse(study_file.read(study).claims, "claims")
    cells = [
        {"row": row, "noise_type": "symmetric", "noise": 0.4, "seed": seed, "status": "finished", "last": last,
         "oracle": "", "key": f"{row}{seed}", "labels": "same"}
        for seed in range(5) for row, last in (("A", 0.9), ("B", 0.8))
    ]  # fmt: skip
    (verdict,) = judged.judge_all([claim], cells, range(5))
    assert verdict.verdict == "supported"
    behind = [{**cell, "last": 1 - cell["last"]} for cell in cells]
    (verdict,) = judged.judge_all([claim], behind, range(5))
    assert verdict.verdict == "contradicted"
