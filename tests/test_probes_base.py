"""The base of the probes: runs found and loaded as they were, parts that do not mix, results kept and reused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

from noisysam import methods
from noisysam.core.errors import UserError
from noisysam.core.files import read_json, write_json
from noisysam.data.datasets import Dataset
from noisysam.methods import Method, RunInfo
from noisysam.probes import PROBES, Probe, Subject, base, load, probe, scalars
from noisysam.runs.config import RunConfig
from noisysam.runs.record import find_run
from noisysam.training import metrics
from noisysam.training.fit import fit


@pytest.fixture(scope="module")
def trained(digits: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store with three runs, and the keys by method: plain, two networks, a classifier on features."""
    store = tmp_path_factory.mktemp("store")
    plain = fit(digits(epochs=3, snapshots=1, train_subset=200), store=store)
    others = {method: fit(digits(method=method), store=store).record for method in ("co-teaching", "rog")}
    return store, {"ce": plain.record, **others}


@pytest.fixture
def store(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(trained[0], tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="module")
def subject(trained: tuple[Path, dict[str, Any]]) -> Subject:
    return load(trained[0], trained[1]["ce"]["key"], device="cpu")


def one_line(caught: pytest.ExceptionInfo[UserError]) -> bool:
    return len(str(caught.value).splitlines()) == 1


# what is loaded is what was trained


@pytest.mark.parametrize("method", ["ce", "co-teaching", "rog"])
def test_a_loaded_run_measures_as_it_was_recorded(method: str, trained: tuple[Path, dict[str, Any]]) -> None:
    """Of co-teaching the figures are the mean of its networks; the ensemble is recorded too."""
    store, records = trained
    loaded = load(store, records[method]["key"], device="cpu")
    inputs, labels = loaded.part("test", None)
    each = [loaded.logits(inputs, [module]) for module in loaded.modules]
    expected = records[method]["results"]
    accuracy = np.mean([float(metrics.accuracy(z, labels)) for z in each])
    assert accuracy == pytest.approx(expected["last"], abs=1e-6)
    nll = np.mean([float(metrics.negative_log_likelihood(z, labels)) for z in each])
    assert nll == pytest.approx(expected["nll"], rel=1e-5)
    together = float(metrics.accuracy(loaded.logits(inputs), labels))
    assert together == pytest.approx(expected.get("test_accuracy_ensemble", expected["last"]), abs=1e-6)
    inputs, given = loaded.part("noisy", None)
    clean = loaded.part("clean", None)[1]
    shares = [metrics.memorisation(loaded.logits(inputs, [module]), given, clean) for module in loaded.modules]
    for name in shares[0]:
        assert np.mean([one[name] for one in shares]) == pytest.approx(expected[name], abs=1e-6)


def test_networks_are_ready_to_look_at(trained: tuple[Path, dict[str, Any]]) -> None:
    store, records = trained
    loaded = load(store, records["co-teaching"]["key"], device="cpu")
    assert len(loaded.modules) == 2
    for module in loaded.modules:
        assert not module.training
        assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())
    kernel = next(p for p in loaded.modules[0].parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_snapshots_lead_to_the_final_weights(subject: Subject) -> None:
    assert subject.snapshots() == [(0, 0), (0, 1), (0, 2)]
    first, last, final = subject.at(0, 0)[0], subject.at(0, 2)[0], subject.modules[0]
    assert all(torch.equal(a, b) for a, b in zip(last.state_dict().values(), final.state_dict().values(), strict=True))
    assert not torch.equal(next(first.parameters()), next(final.parameters()))
    with pytest.raises(UserError, match="no weights of stage 0, epoch 3"):
        subject.at(0, 3)


def test_snapshots_are_sorted_by_number(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / subject.folder.key / "snapshots").mkdir(parents=True)
    for name in ("0-10", "1-0", "0-9"):
        (tmp_path / subject.folder.key / "snapshots" / f"{name}.safetensors").touch()
    moved = base.Subject(**{**vars(subject), "folder": base.RunFolder(tmp_path, subject.folder.key)})
    assert moved.snapshots() == [(0, 9), (0, 10), (1, 0)]


# parts


def test_parts_do_not_mix(subject: Subject) -> None:
    """Every image is found again in the data set by its pixels; its labels are those of its part."""
    data, problem = subject.problem.dataset, subject.problem
    places = {image.numpy().tobytes(): i for i, image in enumerate(data.train_images)}
    mean, std = (np.array(s, dtype=np.float32) for s in data.channel_statistics())

    def pixels(inputs: torch.Tensor) -> list[bytes]:
        images = (inputs.permute(0, 2, 3, 1).numpy() * std + mean) * 255
        return [np.rint(image).astype(np.uint8).tobytes() for image in images]

    noisy = dict(zip(problem.chosen, problem.noisy.labels, strict=True))
    for limit in (None, 30):
        inputs, given = subject.part("noisy", limit)
        same, clean = subject.part("clean", limit)
        assert torch.equal(inputs, same)
        found = [places[p] for p in pixels(inputs)]
        assert set(found) <= set(problem.chosen[problem.train])  # nothing that was held out
        assert len(set(found)) == len(found) == (limit or len(problem.train))
        assert clean.tolist() == data.train_labels[found].tolist()
        assert given.tolist() == [noisy[i] for i in found]
        assert (given != clean).float().mean().item() == pytest.approx(problem.noisy.flip_rate, abs=0.05)
        test, labels = subject.part("test", limit)
        tests = {image.numpy().tobytes(): i for i, image in enumerate(data.test_images)}
        assert labels.tolist() == data.test_labels[[tests[p] for p in pixels(test)]].tolist()


def test_a_limited_part_is_balanced_and_fixed(subject: Subject) -> None:
    for part in ("clean", "test"):
        inputs, labels = subject.part(part, 50)
        counts = torch.bincount(labels, minlength=10)
        assert len(labels) == 50
        assert int(counts.max() - counts.min()) <= 2
        assert torch.equal(inputs, subject.part(part, 50)[0])


# finding


def test_a_run_is_found_by_the_beginning_of_its_key(trained: tuple[Path, dict[str, Any]]) -> None:
    store, records = trained
    key = records["ce"]["key"]
    assert find_run(store, key).key == find_run(store, key[:10]).key == key


def test_a_beginning_must_be_of_one_run(store: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    key = trained[1]["ce"]["key"]
    shutil.copytree(store / key, store / f"{key}0")
    with pytest.raises(UserError, match=r"beginning of 2 runs .*give more digits") as caught:
        find_run(store, key[:12])
    assert one_line(caught)
    assert find_run(store, key).key == key  # a whole key is meant as such
    with pytest.raises(UserError, match="beginning of 4 runs"):
        find_run(store, "")


@pytest.mark.parametrize("key", ["zzz", "..", "labels", "*"])
def test_an_unknown_key_is_said(key: str, store: Path) -> None:
    with pytest.raises(UserError, match="no run") as caught:
        load(store, key)
    assert one_line(caught)


# what cannot be probed


def spoil(store: Path, key: str, **changes: Any) -> None:
    record = read_json(store / key / "record.json")
    write_json(store / key / "record.json", {**record, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "running"}, "is not finished"),
        ({"digests": {"data": "0" * 64, "labels": "1" * 64}}, "was trained on data 0000000000000000"),
        ({"config.noise_seed": 7}, "was trained on labels"),
        ({"digests.network": "2" * 64}, "of the caller's own"),
        ({"config.plugin": "mine.py"}, "give it with --plugin"),
        ({"config.model": "resnet9"}, "unknown model 'resnet9'"),
        ({"config.width": 0.5}, "not the weights of this run's networks"),
    ],
)
def test_what_cannot_be_probed_is_said(
    changes: dict[str, Any], said: str, store: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    record = trained[1]["ce"]
    for name, value in changes.items():
        group, _, field = name.partition(".")
        spoil(store, record["key"], **{group: {**record[group], field: value} if field else value})
    with pytest.raises(UserError, match=said) as caught:
        load(store, record["key"], device="cpu")
    assert one_line(caught)


def test_weights_must_be_there_and_whole(store: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    key = trained[1]["ce"]["key"]
    path = store / key / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not the weights"):
        load(store, key, device="cpu")
    path.unlink()
    for attempt in (lambda: load(store, key), lambda: probe(store, key, ["counting"])):
        with pytest.raises(UserError, match="has no weights here"):
            attempt()


@pytest.mark.parametrize(("option", "known"), [({}, {"rate"}), ({"forget_rate": 0.3}, set())])
def test_a_method_is_told_only_what_it_declares(
    option: dict[str, Any], known: set[str], digits: Callable[..., RunConfig], tmp_path: Path, monkeypatch: Any
) -> None:
    """Of the noise a probed method knows as little as a trained one."""
    told = []
    kept = methods.METHODS["co-teaching"].__init__

    def listen(self: Method, options: Any, facts: RunInfo) -> None:
        told.append({name for name in ("rate", "matrix") if getattr(facts, name) is not None})
        kept(self, options, facts)

    monkeypatch.setattr(methods.METHODS["co-teaching"], "__init__", listen)
    key = fit(digits(method="co-teaching", method_option=option), store=tmp_path).key
    load(tmp_path, key, device="cpu")
    assert told == [known, known]


# probing


class CountingOptions(base.Options):
    limit: int = Field(5, ge=1)
    other: str = "x"


class Counting(Probe):
    name, source, revision = "counting", "none", 1
    Options = CountingOptions
    runs = 0

    def run(self, subject: Subject) -> dict[str, Any]:
        type(self).runs += 1
        return {
            "rows": len(subject.part("test", self.options.limit)[1]),
            "nothing": float("nan"),
            "share": 0.5,
        }


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setitem(PROBES._items, "counting", Counting)
    monkeypatch.setattr(Counting, "runs", 0)
    return Counting


def test_results_are_written_and_reused(
    counting: type[Counting], store: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    key = trained[1]["ce"]["key"]
    first = probe(store, key[:8], ["counting"], {"limit": "7"}, device="cpu")["counting"]
    assert first["results"] == {"rows": 7, "nothing": None, "share": 0.5}
    assert first["scalars"] == {"share": 0.5}
    assert (first["key"], first["options"], first["revision"]) == (key, {"limit": 7, "other": "x"}, 1)
    assert json.loads((store / key / "probes" / "counting.json").read_text()) == first
    assert find_run(store, key).probes == [first]

    def again(**options: Any) -> int:
        probe(store, key, ["counting"], {"limit": 7, **options}, device="cpu")
        return counting.runs

    assert again() == 1
    assert again(other="y") == 2
    assert again(other="y") == 2
    counting.revision = 2
    try:
        assert again(other="y") == 3
    finally:
        counting.revision = 1
    shutil.copy(store / key / "snapshots" / "0-0.safetensors", store / key / "weights.safetensors")
    assert again(other="y") == 4


def test_scalars_are_single_finite_figures() -> None:
    results = {
        "statement": "words",
        "rows": 7,
        "accuracy": 0.5,
        "shown": True,
        "nothing": float("nan"),
        "bounds": float("inf"),
        "none": None,
        "test": {"lambda_max": 3.0, "eigenvalues": [3.0, 2.0], "density": {"nodes": [1.0]}},
        "bits": {"8": {"plain": 0.25}, "2": {"plain": 0.125}},
        "moments": [{"norm": 1.0, "early": 1.0}, {"norm": 2.0, "by_layer": [("head", 0.5)], "cosine": None}],
        "lists": [],
    }
    assert scalars(results) == {
        "accuracy": 0.5,
        "test.lambda_max": 3.0,
        "bits.8.plain": 0.25,
        "bits.2.plain": 0.125,
        "norm": 2.0,
    }


def test_options_are_checked_before_anything_is_loaded(
    counting: type[Counting], store: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    key = trained[1]["ce"]["key"]
    for options, said in (
        ({"limt": 3}, r"--option limt: counting have no such option \(known: limit, other\)"),
        ({"limit": 0}, "probe counting: option limit: .*greater than or equal to 1"),
        ({"limit": "many"}, "probe counting: option limit"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            probe(store, key, ["counting"], options)
        assert one_line(caught)
    with pytest.raises(UserError, match="unknown probe 'countin', did you mean 'counting'"):
        probe(store, key, ["countin"])
    assert counting.runs == 0


def test_each_probe_takes_its_own_options(counting: type[Counting]) -> None:
    chosen = base.choices(["counting", "landscape"], {"limit": 3, "grid": 0})
    assert chosen["counting"].model_dump() == {"limit": 3, "other": "x"}
    assert (chosen["landscape"].limit, chosen["landscape"].grid) == (3, 0)  # type: ignore[attr-defined]


def test_a_run_on_own_data_needs_them_again(tiny: Dataset, digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The tiny data set stands in for digits; without it the digests do not agree."""
    result = fit(digits(train_subset=None), dataset=tiny, store=tmp_path)
    with pytest.raises(UserError, match="was trained on data"):
        load(tmp_path, result.key, device="cpu")


def test_networks_in_a_file_are_told_apart(trained: tuple[Path, dict[str, Any]]) -> None:
    store, records = trained
    one, two = load(store, records["co-teaching"]["key"], device="cpu").modules
    assert isinstance(one, nn.Module)
    assert not torch.equal(next(one.parameters()), next(two.parameters()))
