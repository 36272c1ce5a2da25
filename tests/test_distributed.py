"""One run over two processes: the same steps as one process takes, and no hang, no second voice, no torn record."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import TCPStore

from noisysam import cli, optim
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.network import Net
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.record import RunFolder
from noisysam.training.distributed import ProcessGroup
from noisysam.training.fit import fit

pytestmark = pytest.mark.slow

PATIENCE = 120.0  # seconds
MEASURED = ("time", "seconds", "per_second")  # endings of the columns that differ from run to run
Start = Callable[..., list[BaseProcess]]  # (work, *arguments) -> the two processes


def child(port: int, rank: int, log: Path, work: Callable[..., None], *arguments: Any) -> None:
    """One of two processes, as torchrun starts it; all that it says goes to a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    work(*arguments)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts two processes, forked from one that has imported torch and has one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "sklearn.datasets", "torchmetrics.classification"]  # what a first run imports
    context.set_forkserver_preload(
        ["noisysam.training.fit", "noisysam.studies.sweep", "noisysam.training.progress", *slow]
    )
    started: list[BaseProcess] = []
    stores: list[TCPStore] = []

    def both(work: Callable[..., None], *arguments: Any, logs: Path | None = None) -> list[BaseProcess]:
        logs = logs or tmp_path_factory.mktemp("logs")
        stores.append(TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
        pair = []
        for rank in range(2):
            own = (a[rank] if isinstance(a, tuple) else a for a in arguments)
            pair.append(context.Process(target=child, args=(stores[-1].port, rank, logs / f"{rank}", work, *own)))
            pair[-1].start()
        started.extend(pair)
        return pair

    yield both
    for process in started:
        process.kill()


def end(pair: list[BaseProcess]) -> tuple[int | None, int | None]:
    """The exit codes of both, which must end."""
    for process in pair:
        process.join(PATIENCE)
    return pair[0].exitcode, pair[1].exitcode


# the same steps


def small(**values: Any) -> RunConfig:
    """Five steps of 16 rows of digits."""
    machine = {"device": "cpu", "precision": "fp32", "compile": "off"}
    chosen = {"train_subset": 110, "batch": 16, "epochs": 1, "noise": 0.4, "val_fraction": 0.2, "lr": 0.05}
    return validate({"dataset": "digits", "model": "resnet8", "width": 0.25, **chosen, **machine, **values})


SAM = {"opt": "sam", "rho": 0.1}
TWO_AND_ONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of two processes, and of the one equal
    "m = batch is m = B / 2": ({**SAM, "sam_m": "batch"}, {**SAM, "sam_m": 8}),
    "m above B / 2 too": ({**SAM, "sam_m": 16, "clip": 0.5, "l2": "loss"},
                          {**SAM, "sam_m": 8, "clip": 0.5, "l2": "loss"}),
    "a smaller m is the same m": ({**SAM, "sam_m": 4, "bn": "both"}, {**SAM, "sam_m": 4, "bn": "both"}),
    "sgd has chunked statistics": ({"opt": "sgd", "ema": 0.9}, {"opt": "sam", "rho": 0.0, "sam_m": 8, "ema": 0.9}),
    "memory of the last steps": ({"opt": "looksam", "rho": 0.1}, {"opt": "looksam", "rho": 0.1, "sam_m": 8}),
    "steps after the base's": ({"opt": "lookbehind", "base_opt": "adamw"},
                               {"opt": "lookbehind", "base_opt": "adamw", "sam_m": 8}),
    "mixed over the whole batch": ({**SAM, "method": "mixup"}, {**SAM, "method": "mixup", "sam_m": 8}),
    "a method of two stages": ({**SAM, "method": "bootstrap"}, {**SAM, "method": "bootstrap", "sam_m": 8}),
}  # fmt: skip
SYNCED: dict[str, dict[str, Any]] = {  # settings in which one perturbation for all is exact
    "sam": {**SAM, "sam_m": "batch"},
    "two gradients": {"opt": "gsam", "sam_m": "batch"},
    "drawn": {"opt": "trace-sam", "opt_option": {"lam": "0.1"}},
}


def fits(two: tuple[Path, ...] | Path) -> None:
    """In two processes: every case above, the second process with a store of its own."""
    with ProcessGroup.of_torchrun() as processes:
        for name, (settings, _) in TWO_AND_ONE.items():
            fit(small(**settings), store=Path(str(two)) / name, processes=processes)
        for name, settings in SYNCED.items():
            config = small(**settings, norm="group", sync_perturbation=True)
            fit(config, store=Path(str(two)) / name, processes=processes)


@pytest.fixture(scope="module")
def stores(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Those of the two processes, after all cases."""
    both = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    assert end(start(fits, both)) == (0, 0)
    return both


def outcome(store: Path) -> tuple[dict[str, Tensor], list[dict[str, float]], dict[str, Any]]:
    """Weights and buffers, lines and record of the one run in a store."""
    from safetensors.torch import load_file

    (folder,) = [path.parent for path in store.glob("*/record.json")]
    with (folder / "epochs.csv").open(newline="") as file:
        kept = [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in csv.DictReader(file)]
    lines = [{k: float(v or "nan") for k, v in line.items()} for line in kept]
    weights = load_file(folder / "weights.safetensors")
    counts = [name for name in weights if name.endswith("num_batches_tracked")]  # of forwards: no part of the result
    for name in counts:
        del weights[name]
    return weights, lines, json.loads((folder / "record.json").read_text())


def assert_equal(found: Path, wanted: Path, rtol: float) -> None:
    """The same weights, running statistics, figures and counts, up to rounding."""
    (weights, lines, record), (weights_1, lines_1, record_1) = outcome(found), outcome(wanted)
    torch.testing.assert_close(weights, weights_1, rtol=rtol, atol=rtol / 10)
    assert len(lines) == len(lines_1)
    for line, line_1 in zip(lines, lines_1, strict=True):
        if record["config"]["opt"] != record_1["config"]["opt"]:  # sam of radius 0 has two passes, sgd one
            line_1 |= {name: line[name] for name in ("forward_samples", "gradient_samples")}
        assert line == pytest.approx(line_1, rel=10 * rtol, nan_ok=True)
    assert record["status"] == record_1["status"] == "finished"
    assert record["key"] != record_1["key"]
    if record["config"]["opt"] == record_1["config"]["opt"]:
        for name in ("steps", "gradient_samples", "forward_samples", "gradient_evaluations"):
            assert record["cost"][name] == pytest.approx(record_1["cost"][name]), name


@pytest.mark.parametrize("name", TWO_AND_ONE)
def test_two_processes_take_the_steps_of_one(name: str, stores: tuple[Path, Path], tmp_path: Path) -> None:
    fit(small(**TWO_AND_ONE[name][1]), store=tmp_path)
    assert_equal(stores[0] / name, tmp_path, rtol=1e-5)


@pytest.mark.parametrize("name", SYNCED)
def test_one_perturbation_for_the_whole_batch(name: str, stores: tuple[Path, Path], tmp_path: Path) -> None:
    fit(small(**SYNCED[name], norm="group"), store=tmp_path)
    assert_equal(stores[0] / name, tmp_path, rtol=1e-4)


def test_the_cases_differ(stores: tuple[Path, Path], tmp_path: Path) -> None:
    """One process with m = batch takes other steps: the equalities above say something."""
    fit(small(**SAM, sam_m="batch"), store=tmp_path)
    weights, two = outcome(tmp_path)[0], outcome(stores[0] / "m = batch is m = B / 2")[0]
    assert max(float((weights[n] - two[n]).abs().max()) for n in weights) > 1e-3


def test_the_first_process_alone_writes(stores: tuple[Path, Path]) -> None:
    assert not list(stores[1].rglob("*"))


# one step


def networks(out: Path) -> None:
    """In two processes: steps on rows of their own, one of them not finite in the second process."""
    with ProcessGroup.of_torchrun() as processes:
        torch.manual_seed(processes.rank)
        net = Net(
            nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        )
        processes.broadcast(net.module.state_dict().values())
        net.statistics.average = processes.average
        rule = optim.FSAM(net.params, lr=0.1, momentum=0.9, rho=0.1, m="batch")
        rule.average = processes.average
        kept = []
        for step in range(3):
            inputs = torch.randn(8, 1, 8, 8)
            inputs[3] *= float("inf") if (step, processes.rank) == (1, 1) else 1
            net.statistics.begin()
            task = Task(0, inputs, torch.arange(8) % 3)
            rule.step(Objective(net, task, lambda z, t: F.cross_entropy(z, t.labels, reduction="none")))
            net.statistics.commit(rule.found_inf)
            state = {**net.module.state_dict(), "mean": rule.memory["mean"][0], "skipped": rule.skipped}
            kept.append({n: t.clone() for n, t in state.items()})
        processes.same(t for state in kept for t in state.values())
        torch.save(kept, out / f"{processes.rank}")
        errors = []
        for fault in (
            lambda: processes.same([torch.ones(3), torch.full((2,), processes.rank)]),
            lambda: one_fails(processes),
        ):
            try:
                fault()
            except (UserError, RunFailed) as error:
                errors.append(repr(error))
        (out / f"{processes.rank}.json").write_text(json.dumps(errors))
        views = torch.arange(6.0).view(2, 3).t(), torch.full((), float(processes.rank), dtype=torch.float64)
        mean = processes.average(views)
        assert torch.equal(mean[0], views[0])
        assert mean[0].stride() == views[0].stride()
        assert mean[1].dtype == torch.float64
        assert mean[1] == 0.5
        shared = processes.share(lambda: {"rank": processes.rank, "tensor": torch.full((2,), 7.0), "none": None})
        assert shared["rank"] == 0
        assert shared["tensor"].tolist() == [7, 7]


def one_fails(processes: ProcessGroup) -> None:
    """The second process meets an error."""
    with processes.agreed():
        if processes.rank == 1:
            raise UserError("no such file")


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(start: Start, tmp_path: Path) -> None:
    assert end(start(networks, tmp_path)) == (0, 0)
    kept, other = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for one, two in zip(kept, other, strict=True):
        assert all(torch.equal(one[n], two[n]) for n in one)
    assert [float(state["skipped"]) for state in kept] == [0, 1, 1]
    before, skipped, after = kept
    for name in before:
        if name != "skipped" and "num_batches" not in name:
            assert torch.equal(before[name], skipped[name]), name
            assert not torch.equal(skipped[name], after[name]), name
            assert torch.isfinite(after[name]).all()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert "drifted apart" in said[0][0]
    assert said[0][1] == "UserError('no such file')"


# whole runs


LONG = {"dataset": "digits", "model": "resnet8", "width": "0.25", "noise": "0.4", "opt": "sam", "epochs": "8",
        "precision": "fp32", "ema": "0.9", "train-subset": "300", "batch": "64"}  # fmt: skip


def command(store: Path, **flags: str) -> list[str]:
    """The arguments of ``noisysam run``."""
    given = {name.replace("_", "-"): value for name, value in {**LONG, **flags}.items()}
    parts = [part for name, value in given.items() for part in (f"--{name}", value)]
    return ["run", *parts, "--no-track", "--store", str(store)]


def bits(store: Path) -> tuple[Any, ...]:
    """All of a finished run that must not depend on how often it was stopped."""
    weights, lines, record = outcome(store)
    (folder,) = [path.parent for path in store.glob("*/record.json")]
    assert not list(folder.glob("checkpoint*"))
    assert not list(folder.glob(".*"))
    return {n: t.numpy().tobytes() for n, t in weights.items()}, repr(lines), record["results"], record["key"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which torchrun has trained a run; what it said is beside it."""
    store = tmp_path_factory.mktemp("torchrun")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "noisysam"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command(store)], capture_output=True, text=True, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    (store / "out").write_text(done.stdout)
    (store / "err").write_text(done.stderr)
    return store


def test_torchrun(whole: Path, start: Start, tmp_path: Path) -> None:
    _, lines, record = outcome(whole)
    out, err = (whole / "out").read_text(), (whole / "err").read_text()
    assert out.count(f"run {record['key']}") == 1
    assert out.count("clean test accuracy") == 1
    assert err.count("an estimate of the duration follows") == 1
    assert record["digests"]["processes"] == "2"
    assert len(lines) == 8
    trained = (next(whole.glob("*/weights.safetensors"))).stat().st_mtime_ns
    assert end(start(cli.main, command(whole), logs=tmp_path)) == (0, 0)
    assert out in (tmp_path / "0").read_text()  # the stored result, and nothing trained
    assert (tmp_path / "1").read_text() == ""
    assert next(whole.glob("*/weights.safetensors")).stat().st_mtime_ns == trained


def own_lines(logs: Path) -> list[str]:
    """What noisysam said in both processes' last words; no traceback."""
    said = "".join((logs / f"{rank}").read_text() for rank in range(2))
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("noisysam: ")]


def lines_of(store: Path) -> int:
    """Epochs in the run's epochs.csv."""
    return sum(len(path.read_text().splitlines()) - 1 for path in store.glob("*/epochs.csv"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_brings_the_other_down(victim: int, whole: Path, start: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pair = start(cli.main, command(store), logs=tmp_path)
    began = time.monotonic()
    while lines_of(store) < 2:
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)
    pair[victim].kill()
    killed = time.monotonic()
    codes = end(pair)
    assert time.monotonic() - killed < 20
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    (line,) = own_lines(tmp_path)
    assert line.startswith("noisysam: another process of this run ended or hangs (")
    assert line.endswith("); the last whole epoch is saved: the same command resumes")
    (folder,) = [path.parent for path in store.glob("*/record.json")]
    record = RunFolder(store, folder.name).record
    assert record is not None
    assert record["status"] == ("running" if victim == 0 else "interrupted")
    assert 2 <= lines_of(store) < 8

    # another number of processes does not go on with it
    alone = validate({name.replace("-", "_"): value for name, value in LONG.items()})
    with pytest.raises(UserError, match=f"run {folder.name} is this one, begun with 2 processes: resume it so"):
        fit(alone, store=store)
    assert [path.name for path in store.glob("*/record.json")] == ["record.json"]

    stores = store, tmp_path / "elsewhere"  # the second process sees nothing of the first one's
    assert end(start(cli.main, tuple(command(path) for path in stores), logs=tmp_path)) == (0, 0)
    assert bits(store) == bits(whole)
    assert not stores[1].exists()


def test_a_run_of_one_process_is_not_resumed_by_two(start: Start, tmp_path: Path) -> None:
    class Stop:
        def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

        def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(validate({n.replace("-", "_"): v for n, v in LONG.items()}), store=tmp_path / "store", progress=Stop())
    assert end(start(cli.main, command(tmp_path / "store"), logs=tmp_path)) == (2, 2)
    (line,) = own_lines(tmp_path)
    assert "begun with one process: resume it so" in line


def test_asked_to_stop(start: Start, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pair = start(cli.main, command(store), logs=tmp_path)
    began = time.monotonic()
    while lines_of(store) < 2:
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)
    for process in pair:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
    assert 130 in end(pair)
    assert len(own_lines(tmp_path)) == 1
    assert end(start(cli.main, command(store), logs=tmp_path)) == (0, 0)
    assert bits(store) == bits(whole)


# refusals


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"method": "elr"}, "method elr needs one process, since it keeps or decides something that the other"),
        ({"lr": "1e10", "epochs": "2"}, "diverged in epoch"),
    ],
    ids=["refused", "diverged"],
)
def test_one_line_and_no_hang(flags: dict[str, str], said: str, start: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code = 2 if "method" in flags else 1
    assert end(start(cli.main, command(store, **flags), logs=tmp_path)) == (code, code)
    (line,) = own_lines(tmp_path)
    assert line.startswith(f"noisysam: {said}")
    records = [json.loads(path.read_text()) for path in store.glob("*/record.json")]
    assert [record["status"] for record in records] == ([] if code == 2 else ["failed"])


def test_processes_of_different_runs(start: Start, tmp_path: Path) -> None:
    commands = tuple(command(tmp_path / "store", seed=seed) for seed in "01")
    assert end(start(cli.main, commands, logs=tmp_path)) == (2, 2)
    (line,) = own_lines(tmp_path)
    assert line.startswith("noisysam: the processes do not train the same run")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "co-teaching"}, "method co-teaching needs one process"),
    ({"method": "bootstrap,elr"}, "method bootstrap,elr needs one process"),
    ({"method": "sop"}, "method sop needs one process"),
    ({"method": "pes"}, "method pes needs one process"),
    ({"method": "mentornet"}, "start it without torchrun"),
    ({"opt": "saf"}, "optimizer saf needs one process"),
    ({"opt": "ssam-f"}, "optimizer ssam-f needs one process"),
    ({"batch": 127}, "--batch 127 cannot be divided among 2 processes"),
    ({"opt": "sam", "sam_m": 48}, "--sam-m 48 does not divide the 64 rows of each of 2 processes"),
    ({"opt": "sam", "sync_perturbation": True}, "give --sam-m batch"),
    ({"opt": "sgd", "sync_perturbation": True}, "optimizer sgd has no perturbation that can be shared"),
    ({"opt": "esam", "sam_m": "batch", "sync_perturbation": True}, "esam has no perturbation that can be shared"),
    ({"device": "cpu:0"}, "several processes take cpu, or cuda without a number"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[" ".join(map(str, v.values())) for v, _ in REFUSED])
def test_refused(values: dict[str, Any], said: str) -> None:
    config = validate({"dataset": "digits", "device": "cpu", **values})
    for rank in range(2):
        with pytest.raises(UserError, match=said):
            ProcessGroup(rank, 2).check(config)


@pytest.mark.parametrize("method", ["ce", "gce", "cdr", "mixup", "bootstrap", "forward", "rog", "incv"])
@pytest.mark.parametrize("opt", ["sgd", "sam", "esam", "mesa", "vasso"])
def test_accepted(method: str, opt: str) -> None:
    config = validate({"dataset": "digits", "device": "cpu", "method": method, "opt": opt})
    for size in (1, 2, 4):
        ProcessGroup(0, size).check(config)


def test_one_process_has_no_perturbation_to_share(tmp_path: Path) -> None:
    config = validate({"opt": "sam", "sam_m": "batch", "sync_perturbation": True})
    with pytest.raises(UserError, match="--sync-perturbation is for several processes"):
        fit(config, store=tmp_path)


def test_rows() -> None:
    assert ProcessGroup().rows(7) is None
    slices = [ProcessGroup(rank, 3).rows(12) for rank in range(3)]
    assert [i for s in slices if s is not None for i in range(12)[s]] == list(range(12))
    with pytest.raises(UserError, match="a batch of 7 rows cannot be divided among 2 processes"):
        ProcessGroup(0, 2).rows(7)


def test_the_number_of_processes_is_in_the_key() -> None:
    config = small(opt="sam")
    assert config.key({"labels": "x", **ProcessGroup().digests()}) == config.key({"labels": "x"})
    keys = {config.key({"labels": "x", **ProcessGroup(size=n).digests()}) for n in (1, 2, 4)}
    assert len(keys) == 3
