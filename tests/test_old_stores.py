"""Stores that an earlier layout of the code wrote: their records and studies load, what they interrupted goes on.

``fixtures/README.md`` says how they were made.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from noisysam import cli
from noisysam.core.environment import environment
from noisysam.report import report
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder, load_study, study_records

OLD = Path(__file__).parent / "fixtures" / "store-59c6fb1"
STUDY = "before_move"
INTERRUPTED = sorted(path.stem for path in (OLD / "ended").glob("*.safetensors"))
KEYS = sorted(path.parent.name for path in OLD.glob("runs/*/record.json"))
DECIDES_BITS = ("torch", "numerics", "cpu", "instruction_set")
TOLERANCE = 1e-4  # of the weights' norm; with other instruction sets 4e-8 was measured


@pytest.mark.parametrize("key", KEYS)
def test_records_load(key: str) -> None:
    folder = RunFolder(OLD / "runs", key)
    record = folder.record
    assert record is not None
    assert record["status"] == ("interrupted" if key in INTERRUPTED else "finished")
    assert len(folder.epochs) == {"bootstrap": 6}.get(record["config"]["method"], 2 if key in INTERRUPTED else 4)
    assert (folder.confusion is None) == (key in INTERRUPTED)
    config = RunConfig(**record["config"])
    assert (config.key(record["digests"]) == key) == (config.recipe().revisions == record["revisions"])


def test_the_study_loads(tmp_path: Path) -> None:
    """Its report shows what the two finished runs' records say."""
    assert load_study(OLD / "runs", STUDY)["file"] == (OLD / f"{STUDY}.yaml").read_text()
    found = {cell["row"]: record for cell, record in study_records(OLD / "runs", STUDY)}
    assert list(found) == ["SGD", "SAM", "ELR, SAM m=8", "Bootstrap", "SOP"]
    report(OLD / "runs", STUDY, tmp_path)
    text = (tmp_path / STUDY / "report.md").read_text()
    for row in ("SGD", "SAM"):
        record = found[row]
        assert record is not None
        assert f"{100 * record['results']['last']:.1f}" in text


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store, after a sweep of its study with today's code."""
    store = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(OLD / "runs", store)
    for key in set(KEYS) - set(INTERRUPTED):
        os.utime(store / key / "record.json", (0, 0))
    assert cli._run(["sweep", str(OLD / f"{STUDY}.yaml"), "--store", str(store), "--no-track"]) == 0
    return store


@pytest.mark.parametrize("key", KEYS)
def test_a_sweep_goes_on(key: str, swept: Path) -> None:
    """Finished runs are not trained again; interrupted ones resume from their checkpoints to the bits that the old code
    reached, or near them on a machine that computes otherwise."""
    old, now = RunFolder(OLD / "runs", key).record, RunFolder(swept, key).record
    assert old is not None
    assert now is not None
    if RunConfig(**old["config"]).recipe().revisions != old["revisions"]:
        pytest.skip(f"a component of {old['name']} has a new revision: it is trained anew, under another key")
    if key not in INTERRUPTED:
        assert (swept / key / "record.json").stat().st_mtime == 0
        return
    assert (now["status"], now["started"]) == ("finished", old["started"])
    before = RunFolder(OLD / "runs", key).epochs
    assert RunFolder(swept, key).epochs[: len(before)] == before
    wanted, found = weights(OLD / "ended" / f"{key}.safetensors"), weights(swept / key / "weights.safetensors")
    assert found.keys() == wanted.keys()
    if all(old["environment"][name] == environment()[name] for name in DECIDES_BITS):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    error = norm({name: found[name] - wanted[name] for name in wanted})
    assert error < TOLERANCE * norm(wanted)


def weights(path: Path) -> dict[str, Tensor]:
    """Weights and running statistics; batch norm's counters of batches, which nothing reads, apart."""
    return {name: value for name, value in load_file(path).items() if value.is_floating_point()}


def norm(values: dict[str, Tensor]) -> float:
    return float(torch.stack([value.square().sum() for value in values.values()]).sum().sqrt())
