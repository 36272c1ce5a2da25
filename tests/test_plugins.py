"""A user's own method from a file: trained, keyed by its content, listed; its faults in one line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from noisysam import cli, fit
from noisysam.core import plugins
from noisysam.core.errors import UserError
from noisysam.methods import METHODS
from noisysam.runs.config import RunConfig, validate

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
