"""What the package offers to Python: names, and results as a table."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import noisysam
from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig


def test_every_public_name_is_there() -> None:
    assert {name for name in dir(noisysam) if not name.startswith("_")} == set(noisysam.__all__)
    for name in noisysam.__all__:
        assert getattr(noisysam, name) is not None
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = noisysam.nonsense


def test_nothing_heavy_is_imported_first() -> None:
    code = "import sys, noisysam; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pandas', 'mlflow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_results_of_a_store_are_a_table(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        noisysam.results(store=tmp_path)
    fitted = [noisysam.fit(digits(epochs=1, noise=0.4, opt=opt), store=tmp_path) for opt in ("sgd", "sam")]
    table = noisysam.results(store=tmp_path).set_index("key")
    assert set(table.index) == {result.key for result in fitted}
    for result in fitted:
        assert table.loc[result.key, "last"] == result.last
        assert table.loc[result.key, "noise"] == 0.4
    assert set(table["opt"]) == {"sgd", "sam"}
