"""The benchmark: its statistics, that what it compares is the same work, and that every part runs."""

import contextlib
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noisysam import bench, models, optim
from noisysam.bench import growth, loader, loop, measure, memory, plain, runs, start, steps
from noisysam.bench.loop import Case, Runner
from noisysam.bench.measure import Settings
from noisysam.cli.catalogue import ledger
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.network import Net
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.methods import METHODS
from noisysam.training.trainer import Trainer

QUICK = Settings(quick=True)
CPU = torch.device("cpu")

# statistics and tables


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_estimate_is_the_median_within_its_interval(values: list[float]) -> None:
    found = measure.estimate(values)
    assert found["median"] == pytest.approx(np.median(values), rel=1e-3)
    assert min(values) * 0.999 <= found["low"] <= found["median"] <= found["high"] <= max(values) * 1.001


def test_interval_narrows_with_rounds() -> None:
    draws = np.random.default_rng(0).lognormal(size=400)
    few, many = measure.estimate(draws[:20]), measure.estimate(draws)
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 2
    assert many["low"] < 1 < many["high"]  # the median of this distribution


def test_ratio_pairs_rounds() -> None:
    """A machine that slows down by eight on the way does not show in the quotient."""
    slow = np.array([1.0, 2.0, 4.0, 8.0])
    assert measure.ratio(3 * slow, slow) == {"median": 3.0, "low": 3.0, "high": 3.0}


def test_cases_take_turns() -> None:
    seen: list[str] = []

    def case(name: str) -> Callable[[], float]:
        return lambda: seen.append(name) or len(seen)  # type: ignore[func-returns-value]

    found = measure.interleaved({"a": case("a"), "b": case("b")}, 3)
    assert seen == ["a", "b"] * 3
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_growth_finds_the_exponent(power: float) -> None:
    machine = iter([1.0] + [1.0] * 4 + [7.0] * 4 + [0.3] * 4)  # first use, then three rounds of different speed
    row = growth.grown(growth.Cost("cost", "runs", [10, 20, 40, 80], lambda n: next(machine) * n**power), rounds=3)
    assert row["p"]["median"] == pytest.approx(power, abs=1e-3)
    assert row["p"]["high"] - row["p"]["low"] < 1e-3
    assert row["seconds"] == pytest.approx([n**power for n in (10, 20, 40, 80)], rel=1e-3)


def test_tables_are_the_same_from_the_json() -> None:
    tables = {"A": [{"x": {"median": 1.965, "low": 0.02, "high": 1234.5}, "y": [10, 0.5]}, {"x": None, "z": 50_000}]}
    text = measure.markdown(tables)
    assert text == measure.markdown(json.loads(json.dumps(tables)))
    assert text.splitlines()[4].split("|")[1:-1] == [" 1.97 [0.02, 1,234] ", " 10, 0.50 ", " -      "]
    assert text.splitlines()[5].split("|")[1:-1] == [" -                  ", " -        ", " 50,000 "]


# the plain loop and ours do the same work


@pytest.mark.parametrize("model", ["resnet8", "resnet18", "preact-resnet18"])
def test_plain_network_is_ours_of_torch_layers(model: str) -> None:
    width = 0.125
    ours, theirs = models.build(model, 10, width=width), plain.network(model, width, CPU)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert {type(m).__module__.partition(".")[0] for m in theirs.modules() if not list(m.children())} <= {
        "torch",
        "noisysam",  # the parameter-free shortcut, of torch's slicing and padding
    }
    assert not any(isinstance(m, models.BatchNorm | models.LastActivation) for m in theirs.modules())
    assert all(p.is_contiguous() for p in theirs.parameters())
    x = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        torch.testing.assert_close(theirs.train(mode)(x), ours.train(mode)(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("opt", ["sgd", "sam"])
def test_plain_step_is_our_step(opt: str) -> None:
    """Same weights, same batches: after three steps the weights are the same."""
    torch.manual_seed(0)
    ours, theirs = models.build("resnet8", 10, width=0.25), plain.network("resnet8", 0.25, CPU)
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(3)]
    plain.loop(theirs, opt, iter(batches))(3)

    m = {"m": "batch"} if opt == "sam" else {}
    net = Net(ours)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    rule = optim.OPTIMIZERS[opt](net.named, **settings, **m)

    def loss(logits: torch.Tensor, task: Task) -> torch.Tensor:
        return F.cross_entropy(logits, task.labels, reduction="none")

    ours.train()
    for inputs, labels in batches:
        net.statistics.begin()
        rule.step(Objective(net, Task(0, inputs, labels), loss))
        net.statistics.commit(rule.found_inf)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("policy", loader.POLICIES)
def test_every_source_gives_augmented_batches(policy: str) -> None:
    data = runs.generated(64, 8)
    sources = {
        "ours": ((b.inputs, b.labels) for b in loader.ours(data, policy, 16, CPU)),
        "torchvision": plain.batches(data, policy, 16, 0, CPU),
    }
    batched = loader.kornia_transform(policy, data, CPU)
    if batched is not None:
        sources["kornia"] = loader.kornia_batches(data, batched, 16, CPU)
    spreads = []
    for source in sources.values():
        drawn = [next(source) for _ in range(5)]  # beyond the end of an epoch
        assert all(x.shape == (16, 3, 32, 32) and x.dtype == torch.float32 for x, _ in drawn)
        epoch = torch.cat([labels for _, labels in drawn[:4]])
        assert torch.bincount(epoch).tolist() == torch.bincount(data.train_labels).tolist()
        spreads.append(float(torch.cat([x for x, _ in drawn]).std()))
    if policy == "standard":  # normalised alike
        assert spreads == pytest.approx([spreads[0]] * len(spreads), rel=0.05)


@pytest.mark.parametrize(("cores", "tried"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (8, [0, 1, 2, 4, 8])])
def test_worker_counts(cores: int, tried: list[int]) -> None:
    assert plain.worker_counts(cores) == tried


def test_plain_sam_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"pip install 'noisysam\[bench\]'"):
        bench.run(["loop"], QUICK)


def test_our_loop_takes_the_steps_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Trainer] = []

    def remember(*arguments: Any) -> Trainer:
        begun.append(runs.trainer(*arguments))
        return begun[0]

    monkeypatch.setattr(loop, "trainer", remember)
    case = Case("resnet8", "sam", width=0.25, batch=16)
    with loop.our_loop(case, QUICK) as (take, facts):
        before = begun[0].learners[0].optimizer.steps
        take(3)
        take(40)  # more than an epoch of 512 images
        assert begun[0].learners[0].optimizer.steps - before == 43
        assert begun[0].recipe.optimizer_options.m == "batch"
    assert facts["compiled"] == "no"


def test_flops_are_those_of_the_convolutions() -> None:
    """A forward and two backwards of every layer, but for the first one's inputs; counted by hooks."""
    case, counts = Case("resnet8", "sgd", width=0.5), []
    module = plain.network(case.model, case.width, CPU)

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        positions = output.numel() / output.shape[1]
        counts.append(2 * positions * layer.weight.numel())

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    module(torch.zeros(1, 3, 32, 32).expand(2, -1, -1, -1))
    expected = (3 * sum(counts) - counts[0]) / 2
    assert loop.flops(case) == pytest.approx(expected)
    assert loop.flops(Case("resnet8", "sam", width=0.5)) == pytest.approx(2 * expected)


def test_rows_of_the_loop() -> None:
    found = {"plain": [100.0, 200.0], "1": [200.0, 400.0], "2": [450.0, 800.0]}
    ratios = loop.ratio_row(found, [1, 2])
    assert [ratios[name]["median"] for name in ("one process", "2 at once", "2 at once / one")] == [2.0, 4.25, 2.125]
    row = loop.rate_row(Case("resnet8", "sgd", width=0.25), found, [1, 2], peak_tflops=1.0)
    assert row["runs an hour, plain"] == pytest.approx(150 * 3600 / 1e7)
    assert row["share of peak"]["median"] == pytest.approx(625 * row["MFLOP an image"] * 1e6 / 1e12, rel=1e-3)


# memory

ENGLISH = re.compile(r"([\dK ()+]+) bytes? per sample")


@pytest.mark.parametrize("name", METHODS)
def test_sample_bytes_are_as_declared(name: str) -> None:
    said = ENGLISH.match(ledger(METHODS[name]).get("State", "none"))
    found = re.sub(r"(\d+) K", r"\1 * K", memory.sample_bytes(name)).replace("-", "0")
    for classes in (10, 100):
        declared = 0 if said is None else eval(re.sub(r"(\d+) (?=[K(])", r"\1 * ", said[1]), {"K": classes})
        assert eval(found, {"K": classes}) == declared


# processes


@contextlib.contextmanager
def _missing(case: Case, settings: Settings) -> Iterator[loop.Start]:
    raise UserError("pip install it")
    yield


@contextlib.contextmanager
def _sleeping(case: Case, settings: Settings) -> Iterator[loop.Start]:
    yield lambda count: sys.exit(3) if count == 13 else time.sleep(0.1 * count), {"rate": 10.0}


@pytest.mark.slow
def test_runners_work_at_the_same_time_and_their_failures_are_told() -> None:
    case = Case("resnet8", "sgd")
    with contextlib.ExitStack() as held:
        *two, bad = [
            held.enter_context(contextlib.closing(Runner(make, case, QUICK, 1)))
            for make in (_sleeping, _sleeping, _missing)
        ]
        with pytest.raises(UserError, match="pip install it"):
            bad.answer()
        assert [runner.answer() for runner in two] == [{"rate": 10.0}] * 2
        assert 12 < loop.together(two, 10) <= 20  # steps a second of both
        two[0].tell(13)
        with pytest.raises(RunFailed, match="ended unexpectedly"):
            two[0].answer()


def test_start_is_timed_until_the_line() -> None:
    script = "import sys, time; print('step', flush=True); time.sleep(1)"
    assert start.finished([sys.executable, "-c", script], said="step") < start.finished([sys.executable, "-c", script])


@pytest.mark.parametrize("script", ["print('step two')", "raise SystemExit('no such data')"])
def test_a_command_that_fails_is_told_in_one_line(script: str) -> None:
    with pytest.raises(RunFailed, match=r"failed: (step two|no such data)$"):
        start.finished([sys.executable, "-c", script], said="step")


# parts


def part(name: str, out: Path) -> dict[str, Any]:
    """Run a part at its quickest; its JSON, with what holds for all."""
    shown: list[str] = []
    bench.run([name], QUICK, out, shown.append)
    text = (out / f"{name}.json").read_text()
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert str(out) not in text
    found: dict[str, Any] = json.loads(text)
    assert shown == [measure.markdown(found["tables"])]
    assert found["part"] == name
    assert {"device", "cores", "memory_gib", "torch", "precision", "commit", "date"} <= set(found["machine"])
    assert found["settings"]["quick"]
    assert name in ("memory", "reports") or found["settings"]["rounds"] == 2
    assert all(rows for rows in found["tables"].values())
    return found


def test_unknown_part() -> None:
    with pytest.raises(UserError, match=r"'speed'.*loop, loader"):
        bench.run(["steps", "speed"], QUICK)


@pytest.mark.slow
def test_steps(tmp_path: Path) -> None:
    rows, speeds = part("steps", tmp_path)["tables"].values()
    assert [row["step over SGD's"] for row in rows] == ["`esam`", "`looksam`", "`sam`", "`sam m=32`"]
    assert all(row["resnet8 x 0.25, eager"]["low"] > 0 for row in rows)
    assert speeds[0]["images a second, sgd"] > 0


def test_every_optimizer_is_a_case() -> None:
    assert set(optim.OPTIMIZERS) <= set(steps.cases())


@pytest.mark.slow
def test_methods(tmp_path: Path) -> None:
    (rows,) = part("methods", tmp_path)["tables"].values()
    by_name = {row["method"].strip("`"): row for row in rows}
    assert by_name["ce"]["epoch over CE's"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert (by_name["ce"]["forwards"], by_name["ce"]["backwards"]) == (1, 1)
    assert (by_name["co-teaching"]["forwards"], by_name["co-teaching"]["backwards"]) == (2, 2)
    assert by_name["dividemix"]["forwards"] > 4  # past its warm-up


@pytest.mark.slow
def test_loader(tmp_path: Path) -> None:
    (rows,) = part("loader", tmp_path)["tables"].values()
    assert [row["policy"] for row in rows] == ["standard", "color", "rand"]


@pytest.mark.slow
def test_epoch(tmp_path: Path) -> None:
    found = {row["part"]: row["seconds"] for row in part("epoch", tmp_path)["tables"]["An epoch"]}
    assert list(found) == ["training", "evaluation", "epochs.csv", "checkpoint", "tracking", "checkpoint and tracking"]
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop", "memory", "start", "growth", "reports"])
def test_longer_parts(tmp_path: Path, name: str) -> None:
    part(name, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", bench.PARTS)
def test_parts_on_cuda(tmp_path: Path, name: str) -> None:
    assert part(name, tmp_path)["machine"]["device"] == torch.cuda.get_device_name()
