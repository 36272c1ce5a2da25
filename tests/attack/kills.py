"""Kill runs at random moments, over all methods and optimizers: each must end with the bits of one that was left alone.

    python tests/attack/kills.py --kills 200 --seed 0

Every run is a fork of one process that has imported everything and has one thread. The runs are those of
``test_contract``, on digits. A process is killed by SIGKILL at a drawn step and a drawn time after it, so within a
step, an evaluation, or the writing of a checkpoint. Some runs are compiled, some are begun and resumed with other
numbers of threads, or with another ``--compile``: a run goes on with what its record says, so its bits are the same.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    # without spinning: two threads on a busy core would wait for each other
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import sklearn.datasets  # noqa: F401  (what a run imports late)
import torch
import torchmetrics.classification  # noqa: F401
from test_contract import AT_ONCE, COVER, EPOCHS, OWN_OPTIONS, RECIPES, RULES
from test_resume import bits

from noisysam.optim import OPTIMIZERS
from noisysam.runs.config import validate
from noisysam.runs.problem import load_dataset
from noisysam.studies import sweep  # noqa: F401
from noisysam.training.fit import fit

KILLS = 2  # of a case
TRIES = 5  # at a kill that comes too late
PATIENCE = 300.0  # seconds
SMALL: dict[str, Any] = {
    "dataset": "digits", "model": "resnet8", "width": 0.25, "train_subset": 60, "val_fraction": 0.2, "batch": 16,
    "epochs": 3, "noise": 0.4, "lr": 0.05, "device": "cpu", "precision": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run: method, and optimizer as ``test_contract`` calls it. ``threads`` and ``compile``: at its start, and when
    it is resumed."""

    method: str
    rule: str
    threads: tuple[int, int] = (1, 1)
    compile: tuple[str, str] = ("off", "off")

    def config(self, resumed: bool) -> Any:
        """The configuration at the start or at a resume."""
        options = {"opt_option": AT_ONCE.get(RULES[self.rule]["opt"], {}), **RULES[self.rule]}
        method = {"method": self.method, "method_option": OWN_OPTIONS.get(self.method, {})}
        epochs = {"epochs": EPOCHS.get(self.method, SMALL["epochs"])}
        return validate({**SMALL, **epochs, **method, **options, "compile": self.compile[resumed]})

    def __str__(self) -> str:
        told = {"threads": (self.threads, (1, 1)), "compile": (self.compile, ("off", "off"))}
        changed = [f"{name} {now[0]} then {now[1]}" for name, (now, usual) in told.items() if now != usual]
        return ", ".join([self.method, self.rule, *changed])


def cases(rng: random.Random, kills: int) -> list[Case]:
    """What is killed: every method, every optimizer, other threads, compiled runs; then pairs, to the number."""
    base = [Case(method, "sgd") for method in RECIPES]
    base += [Case("ce", rng.choice([r for r in RULES if RULES[r]["opt"] == opt])) for opt in OPTIMIZERS if opt != "sgd"]
    for method, rule in (("ce", "sam, m=8"), ("co-teaching", "sgd"), ("dividemix", "sgd")):
        base += [Case(method, rule, threads=(1, 2)), Case(method, rule, threads=(2, 1))]
    compiled = (("ce", "sgd"), ("ce", "sam, m=8"), ("elr", "sam"), ("co-teaching", "sgd"))
    base += [Case(method, rule, compile=("on", "on")) for method, rule in compiled]
    base += [Case("ce", "sam", compile=("on", "off")), Case("ce", "sam", compile=("off", "on"))]
    pairs = [Case(*pair) for pair in sorted(COVER) if Case(*pair) not in base]
    if kills < KILLS * len(base):
        return rng.sample(base, -(-kills // KILLS))
    return [*base, *rng.sample(pairs, min(len(pairs), -(-kills // KILLS) - len(base)))]


# processes


class Steps:
    """Writes a byte to ``out`` at each step."""

    def __init__(self, out: int) -> None:
        self.out = out

    def step(self, stage: int, epoch: int, number: int, of: int) -> None:
        os.write(self.out, b".")

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def forked(work: Callable[[int], object], log: Path) -> Iterator[tuple[int, int]]:
    """A process that does ``work`` with the writing end of a pipe; its number and the reading end. It is waited for."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(reading)
            work(writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    try:
        yield pid, reading
    finally:
        os.close(reading)


def train(case: Case, store: Path, resumed: bool) -> Callable[[int], object]:
    """The work of a process: one run."""

    def work(out: int) -> None:
        torch.set_num_threads(case.threads[resumed])
        fit(case.config(resumed), store=store, progress=Steps(out))

    return work


def whole(case: Case, store: Path, log: Path) -> tuple[int, float]:
    """Train a run without a kill; its steps and its seconds per step."""
    with forked(train(case, store, False), log) as (pid, reading):
        first, steps = 0.0, 0
        while read := os.read(reading, 2**16):
            first, steps = first or time.monotonic(), steps + len(read)
        seconds = time.monotonic() - first
        _, status = os.waitpid(pid, 0)
    if status:
        raise AssertionError(f"{case}: {log.read_text()[-2000:]}")
    return steps, seconds / max(1, steps)


def killed(case: Case, store: Path, log: Path, resumed: bool, steps: int, delay: float) -> bool:
    """Train until ``steps`` steps were taken in this process, and kill it after a while; whether it was still there."""
    with forked(train(case, store, resumed), log) as (pid, reading):
        seen = 0
        while seen < steps and (read := os.read(reading, steps - seen)):
            seen += len(read)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    if os.waitstatus_to_exitcode(status):
        raise AssertionError(f"{case}: {log.read_text()[-2000:]}")
    return False


# all of it


@dataclass
class Count:
    """What was done."""

    kills: int = 0
    late: int = 0
    by: Counter[str] = field(default_factory=Counter)


def attack(case: Case, folder: Path, rng: random.Random, count: Count) -> None:
    """Kill a run ``KILLS`` times, let it finish, and compare it with one that was left alone."""
    log = folder / "log"
    steps, seconds = whole(case, folder / "whole", log)
    wanted = bits(folder / "whole")
    done = attempt = 0
    store = folder / "killed"
    while done < KILLS:
        attempt += 1
        if attempt > TRIES * KILLS:
            raise AssertionError(f"{case}: every kill came too late")
        if not done:
            shutil.rmtree(store, ignore_errors=True)  # it had ended
        share = rng.random() / (KILLS - done)  # of the steps that are left to take, so that there is room for the next
        lines = len(list(store.glob("*/checkpoint.pt")))
        if killed(case, store, log, done > 0, 1 + int(share * (steps - 1)), rng.random() * seconds):
            done += 1
            count.by["with a checkpoint" if lines or list(store.glob("*/checkpoint.pt")) else "before the first"] += 1
        else:
            count.late += 1
            done = 0  # begin again
    with forked(train(case, store, True), log) as (pid, _):
        _, status = os.waitpid(pid, 0)
    assert status == 0, f"{case}: {log.read_text()[-2000:]}"
    found = bits(store)
    for part, value in wanted.items():
        assert found[part] == value, f"{case}: {part} differs from that of the run that was left alone"
    count.kills += done
    count.by["compiled"] += done * ("on" in case.compile)
    count.by["other threads"] += done * (case.threads != (1, 1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="runs under kill -9")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=1, help="number of the first run, to divide the work")
    parser.add_argument("--last", type=int, help="number of the last run")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load_dataset("digits", None)  # once, for all
    count, began = Count(), time.monotonic()
    drawn = list(enumerate(cases(random.Random(asked.seed), asked.kills), 1))
    chosen = [case for _, case in drawn[asked.first - 1 : asked.last]]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        for number, case in drawn[asked.first - 1 : asked.last]:
            place = Path(folder) / str(number)
            place.mkdir()
            attack(case, place, random.Random(f"{asked.seed}/{number}"), count)
            shutil.rmtree(place)
            print(f"[{number}/{len(drawn)}] {case}: the same bits", flush=True)
    found = ", ".join(f"{n} {what}" for what, n in sorted(count.by.items()) if n)
    methods, optimizers = {case.method for case in chosen}, {RULES[case.rule]["opt"] for case in chosen}
    of = f"{len(chosen)} runs of {len(methods)} methods and {len(optimizers)} optimizers"
    print(f"{count.kills} kills in {of} ({found}; {count.late} came too late): every run ended with the same bits")
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
