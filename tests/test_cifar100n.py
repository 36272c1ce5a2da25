"""CIFAR-100 with the labels that people gave it (CIFAR-100N), by way of every command: where its files are at hand."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from noisysam import cli

DATA = Path(os.environ.get("NOISYSAM_DATA_DIR", "data"))
CIFAR100 = [DATA / "cifar100.npz", DATA / "cifar-100-python"]
STUDY = """\
base: {dataset: cifar100, train_subset: 2000, noise_type: "human:noisy", model: resnet8, width: 0.5, epochs: 1}
rows: {SGD: {}, SAM: {opt: sam}}
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(Path.exists, CIFAR100)), reason=f"no CIFAR-100 in {DATA}"),
    pytest.mark.skipif(not (DATA / "CIFAR-100_human.pt").exists(), reason=f"no CIFAR-100_human.pt in {DATA}"),
]


def test_sweep_report_suspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NOISYSAM_DATA_DIR", str(DATA.resolve()))
    monkeypatch.chdir(tmp_path)
    Path("people.yaml").write_text(STUDY)
    assert cli._run(["sweep", "people.yaml", "--no-track"]) == 0
    assert cli._run(["report", "people"]) == 0
    assert "human:noisy" in Path("reports/people/report.md").read_text()
    results = pd.read_csv("reports/people/results.csv")
    assert results["flip_rate"].between(0.36, 0.44).all()  # of 50,000 it is 0.402 (arXiv 2110.12088, Table 1)
    (key, *_) = results["key"]
    assert len(json.loads(Path(f"runs/{key}/record.json").read_text())["data"]["classes"]) == 100
    assert cli._run(["suspects", key]) == 0
    assert {"given", "predicted", "true", "wrong"} <= set(pd.read_csv(f"runs/{key}/suspects.csv"))
    assert "are wrong: precision" in capsys.readouterr().out
