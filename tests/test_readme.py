"""The README: its generated parts are fresh, its example works."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import Tensor

import noisysam
from noisysam import optim
from noisysam.cli import catalogue
from noisysam.core.objective import Objective
from noisysam.core.task import Rows, Task
from noisysam.methods import METHODS, Method, Options
from noisysam.optim import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "reports/optimizers.md", "reports/methods.md"])
def test_generated_parts_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text()
    assert catalogue.generated(text, (ROOT / page).parent) == text, "run `make readme`"


@pytest.mark.parametrize(
    ("page", "name", "item"),
    [("optimizers", name, item) for name, item in OPTIMIZERS.items()]
    + [("methods", name, item) for name, item in METHODS.items()],
)
def test_everything_is_in_a_ledger(page: str, name: str, item: object) -> None:
    """With its equation and how it is checked at least."""
    found = catalogue.ledger(item)
    assert {"Equation", "Checked"} <= set(found)
    lines = (ROOT / f"reports/{page}.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| `{name}`"))
    assert all(text.replace("|", "\\|") in row for text in found.values())


def test_every_component_is_listed() -> None:
    for what in ("methods", "optimizers"):
        for entry in catalogue.entries(what):
            assert f"| `{entry['name']}` |" in README


@pytest.mark.parametrize("name", ["backward-sam", "rms-sam"])
def test_example_optimizers_train(name: str, tmp_path: Path) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if name in b)
    names = {**vars(optim), **vars(optim.base), "torch": torch, "Objective": Objective, "Rows": Rows}
    try:
        exec(block, names)
        config = noisysam.RunConfig(
            dataset="digits", model="resnet8", width=0.5, opt=name, epochs=1, train_subset=500, precision="fp32"
        )
        assert noisysam.fit(config, store=tmp_path).last > 0.15
    finally:
        OPTIMIZERS._items.pop(name, None)


def test_example_method_trains(tmp_path: Path) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "METHODS.register" in b)
    names = {"Field": Field, "Tensor": Tensor, "METHODS": METHODS, "Method": Method, "Options": Options, "Task": Task}
    try:
        exec(block, names)
        config = noisysam.RunConfig(
            dataset="digits", model="resnet8", width=0.5, method="my-mae", method_option={"scale": 0.5}, epochs=1
        )
        assert 0 <= noisysam.fit(config, store=tmp_path).last <= 1
    finally:
        METHODS._items.pop("my-mae", None)
