"""The arithmetic of a training step is pinned: the same run ends with the same bits until ``NUMERICS`` is raised.

``fixtures/numerics.json`` holds the digest of the final weights for each combination of numerics revision, torch
version, CPU model and instruction set that has been measured.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from noisysam import fit
from noisysam.core.environment import environment
from noisysam.runs.config import RunConfig

TABLE = Path(__file__).parent / "fixtures" / "numerics.json"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("opt", ["sgd", "sam"])
def test_final_weights(opt: str, precision: str, digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text())
    run = f"{opt} {precision}"
    here = " | ".join(f"{name} {environment()[name]}" for name in ("numerics", "torch", "instruction_set", "cpu"))
    folder = fit(digits(opt=opt, precision=precision), store=tmp_path).folder
    content = hashlib.sha256()
    for name, value in sorted(load_file(folder / "weights.safetensors").items()):
        content.update(name.encode() + value.numpy().tobytes())
    found = content.hexdigest()[:16]
    if run not in table.get(here, {}):
        pytest.skip(f'not measured yet; add to {TABLE.name} under "{here}": "{run}": "{found}"')
    assert found == table[here][run], (
        f"the {run} run ends with other bits than before ({here}): find the change that did it, or, if it is meant, "
        f"raise NUMERICS in core/environment.py and measure again"
    )
