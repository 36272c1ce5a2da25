"""README and documentation: their generated parts are up to date, and their examples work."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import noisysam
from noisysam.cli import catalogue
from noisysam.core import plugins
from noisysam.methods import METHODS
from noisysam.optim import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "reports" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = [page for page in PAGES if re.search(r"<!-- (table|file|bench): ", page.read_text())]
SMALL: dict[str, Any] = {"dataset": "digits", "model": "resnet8", "width": 0.5, "epochs": 1, "train_subset": 500}


def examples(page: str) -> dict[str, str]:
    """The Python files that a page asks its reader to save: blocks that begin with ``# name.py``."""
    return dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What the examples register is not there for other tests."""
    before = {id(registry): dict(registry._items) for registry in (METHODS, OPTIMIZERS)}
    loaded = dict(plugins._loaded)
    yield
    for registry in (METHODS, OPTIMIZERS):
        registry._items.clear()
        registry._items.update(before[id(registry)])
    plugins._loaded.clear()
    plugins._loaded.update(loaded)


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert catalogue.generated(text, page.parent) == text, "run `make readme`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    ("page", "file", "recipe"),
    [
        ("README.md", "my_method.py", {"method": "my-mae"}),
        ("docs/extending.md", "my_method.py", {"method": "confidence-penalty", "method_option": {"beta": 0.2}}),
        ("docs/extending.md", "my_optimizer.py", {"opt": "backward-sam", "rho": 0.05}),
        ("docs/extending.md", "my_sharpness.py", {"opt": "rms-sam"}),
    ],
)
def test_examples_train(page: str, file: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(examples(page)[file])
    config = noisysam.RunConfig(**SMALL, **recipe, plugin=path, precision="fp32")
    result = noisysam.fit(config, store=tmp_path)
    assert result.record["status"] == "finished"
    assert result.record["cost"]["skipped_steps"] == 0


@pytest.mark.parametrize("name", ["method", "optimizer"])
def test_tests_of_the_examples_pass(name: str, tmp_path: Path) -> None:
    files = examples("docs/extending.md")
    for file in (f"my_{name}.py", f"test_my_{name}.py"):
        (tmp_path / file).write_text(files[file])
    names: dict[str, Any] = {"__file__": str(tmp_path / f"test_my_{name}.py")}
    exec(files[f"test_my_{name}.py"], names)
    tests = [test for key, test in names.items() if key.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
