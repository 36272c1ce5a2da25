"""What the package offers to Python: names, and results as a table."""

import builtins
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import nn

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


def test_a_result_is_a_line_and_tables(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    result = noisysam.fit(digits(epochs=3), store=tmp_path)
    assert repr(result).startswith(f"Result({result.key}: sgd, symmetric 0.4, seed 0, digits resnet8; last ")
    assert len(repr(result)) < 150
    assert "memorised" in dir(result)
    curves = result.curves
    assert list(curves["epoch"]) == [0, 1, 2]
    assert curves["test_accuracy"].iloc[-1] == result.last
    (line,) = result.frame().to_dict("records")
    assert (line["key"], line["noise"], line["last"]) == (result.key, 0.4, result.last)
    other = noisysam.fit(digits(epochs=3, opt="sam"), store=tmp_path)
    assert pd.concat([result.frame(), other.frame()])["opt"].tolist() == ["sgd", "sam"]
    with pytest.raises(AttributeError, match="no result 'nonsense'"):
        _ = result.nonsense


class TwoLayers(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        import torch

        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


def test_an_own_network_is_recorded_by_its_name(digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    record = noisysam.fit(digits(epochs=1), network=TwoLayers, store=tmp_path).record
    assert record["model"] == {"name": "TwoLayers", "parameters": 64 * 16 + 16 + 160 + 10}
    assert record["name"].endswith("digits TwoLayers")


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress_in_a_notebook(
    with_tqdm: bool, monkeypatch: pytest.MonkeyPatch, digits: Callable[..., RunConfig], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Kernel:
        @staticmethod
        def get_ipython() -> Any:
            return type("ZMQInteractiveShell", (), {})()

    monkeypatch.setitem(sys.modules, "IPython", Kernel)
    if with_tqdm:
        pytest.importorskip("tqdm")
        import tqdm
        import tqdm.auto

        monkeypatch.setattr(tqdm.auto, "tqdm", tqdm.tqdm)  # its bar for notebooks needs a notebook
    else:
        original = builtins.__import__

        def without(name: str, *rest: Any, **options: Any) -> Any:
            if name.startswith("tqdm"):
                raise ImportError(name)
            return original(name, *rest, **options)

        monkeypatch.setattr(builtins, "__import__", without)
    noisysam.fit(digits(epochs=2), store=tmp_path)
    shown = "".join(capsys.readouterr())
    assert "stage 1" in shown
    assert "2/2" in shown
    assert "test" in shown
