"""The README: its generated parts are fresh, its example works."""

import re
from pathlib import Path

from pydantic import Field
from torch import Tensor

import noisysam
from noisysam import listing
from noisysam.methods import METHODS, Method, Options
from noisysam.objective import Task

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_generated_parts_are_up_to_date() -> None:
    assert listing.generated(README, ROOT) == README, "run `make readme`"


def test_every_component_is_listed() -> None:
    for what in ("methods", "optimizers"):
        for entry in listing.entries(what):
            assert f"| `{entry['name']}` |" in README


def test_example_method_trains(tmp_path: Path) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "METHODS.register" in b)
    names = {"Field": Field, "Tensor": Tensor, "METHODS": METHODS, "Method": Method, "Options": Options, "Task": Task}
    try:
        exec(block, names)
        config = noisysam.RunConfig(
            dataset="digits", model="resnet8", width=0.5, method="mae", method_option={"scale": 0.5}, epochs=1
        )
        assert 0 <= noisysam.fit(config, store=tmp_path).last <= 1
    finally:
        METHODS._items.pop("mae", None)
