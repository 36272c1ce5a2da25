"""The training loop compared with a plain one, in images per second of the whole machine. The loops take turns.

The plain loop is one process that uses all cores as threads, with its fastest number of data-loading workers. Ours is
one process with one thread, and then as many such processes as there are cores, as ``sweep --jobs`` starts them; on a
GPU, 1, 2 and 4 processes share it. Each loop runs in its own process, which is started and compiled before any
measurement.
"""

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from noisysam.bench import plain
from noisysam.bench.measure import (
    BATCH,
    Findings,
    Row,
    Settings,
    estimate,
    interleaved,
    median,
    ratio,
    rounded,
    seconds,
)
from noisysam.bench.runs import dataset, part_of, trainer
from noisysam.core.errors import RunFailed, UserError
from noisysam.runs.config import validate
from noisysam.training import devices
from noisysam.training.progress import note

EPOCHS, IMAGES = 200, 50_000  # of the run that is counted in "runs an hour"
ROUND = 5.0  # seconds per loop and round
ROUNDS = 10


@dataclass(frozen=True)
class Case:
    """One network with one optimizer."""

    model: str
    opt: str
    width: float = 1.0
    batch: int = BATCH


Loop = Callable[[int], None]  # takes the given number of steps
Start = tuple[Loop, dict[str, Any]]  # and facts about it
Make = Callable[[Case, Settings], contextlib.AbstractContextManager[Start]]
Rates = dict[str, list[float]]  # images per second by round: of the plain loop, and of 1, 2, ... of our processes


def cases(settings: Settings) -> list[Case]:
    """The cases that are compared."""
    if settings.quick:
        return [Case("resnet8", opt, width=0.25, batch=16) for opt in ("sgd", "sam")]
    return [Case(model, opt) for model in ("resnet20", "resnet32", "resnet18") for opt in ("sgd", "sam")]


def measure(settings: Settings) -> Findings:
    """Compare both loops on every case. The ratios hold for images per second and for runs per hour."""
    plain.sam_class()  # raises now rather than after the first measurement if it is missing
    device = devices.resolve_device("auto")
    cores = 1 if settings.quick else devices.cores()
    counts = [1, 2, 4] if device.type == "cuda" else [1, 2] if settings.quick else sorted({1, cores})
    ratios: list[Row] = []
    rates: list[Row] = []
    for case in cases(settings):
        note(f"  {case.model} with {case.opt}")
        found, theirs, own = compare(case, settings, cores, counts)
        named = {"network": case.model, "optimizer": case.opt}
        ratios.append(named | ratio_row(found, counts))
        rates.append(named | rate_row(case, found, counts, settings.peak_tflops) | theirs | own)
    facts = {
        "rounds": settings.times(ROUNDS), "batch": cases(settings)[0].batch,
        "data": dataset(settings).name, "threads of the plain loop": cores,
        "threads of each of ours": 1, "m of sam": "batch", "run": f"{EPOCHS} epochs of {IMAGES} images, training alone",
    }  # fmt: skip
    return Findings({"Ours over the plain loop": ratios, "Images a second": rates}, facts)


def compare(case: Case, settings: Settings, cores: int, counts: Sequence[int]) -> tuple[Rates, Row, Row]:
    """Images per second of both loops on one case, and facts about the plain loop and about ours."""
    with contextlib.ExitStack() as held:

        def begin(make: Make, threads: int) -> tuple[Runner, dict[str, Any]]:
            runner = held.enter_context(contextlib.closing(Runner(make, case, settings, threads)))
            return runner, runner.answer()

        plainly, theirs = begin(plain_loop, cores)  # first and alone, because it tries numbers of workers
        begun = [begin(our_loop, 1) for _ in range(max(counts))]
        ours, own = [runner for runner, _ in begun], begun[0][1]

        def rate(runners: Sequence[Runner], alone: float) -> Callable[[], float]:
            steps = max(2, round((0.2 if settings.quick else ROUND) * alone))
            return lambda: together(runners, steps) * case.batch

        loops = {"plain": rate([plainly], theirs.pop("rate"))}
        alone = own.pop("rate")
        loops |= {str(n): rate(ours[:n], alone) for n in counts}
        return interleaved(loops, settings.times(ROUNDS)), theirs, own


def ratio_row(found: Rates, counts: Sequence[int]) -> Row:
    """Ratios of our loop to the plain one, and of several processes to one."""
    row: Row = {"one process": ratio(found["1"], found["plain"])}
    row |= {f"{n} at once": ratio(found[str(n)], found["plain"]) for n in counts[1:]}
    return row | {f"{n} at once / one": ratio(found[str(n)], found["1"]) for n in counts[1:]}


def rate_row(case: Case, found: Rates, counts: Sequence[int], peak_tflops: float | None) -> Row:
    """Images per second, runs per hour, operations, and the share of the device's peak if that is given."""
    operations, most = flops(case), found[str(counts[-1])]
    row: Row = {"plain": estimate(found["plain"]), "ours, one process": estimate(found["1"])}
    row |= {f"ours, {n} at once": estimate(found[str(n)]) for n in counts[1:]}
    row |= {"runs an hour, plain": per_hour(found["plain"]), "runs an hour, ours": per_hour(most)}
    row |= {"MFLOP an image": rounded(operations / 1e6)}
    if peak_tflops is not None:
        row["share of peak"] = estimate([rate * operations / (peak_tflops * 1e12) for rate in most])
    return row


def per_hour(rates: Sequence[float]) -> float:
    """Runs per hour at these images per second."""
    return rounded(3600 * median(rates) / (EPOCHS * IMAGES))


def flops(case: Case) -> float:
    """Operations per image in one step, counted by torch: forward and backward pass, twice for SAM."""
    from torch.utils.flop_counter import FlopCounterMode

    module = plain.network(case.model, case.width, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2 * (1 if case.opt == "sgd" else 2)


# processes


class Runner:
    """A loop in its own process that takes steps on request."""

    def __init__(self, make: Make, case: Case, settings: Settings, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, case, settings, threads))
        self.process.start()
        theirs.close()

    def tell(self, steps: int) -> None:
        """Start ``steps`` steps; ``answer`` returns when they are done."""
        self.connection.send(steps)

    def answer(self) -> Any:
        """Receive the next message of the process; the first one holds facts about its loop."""
        try:
            found = self.connection.recv()
        except EOFError:
            raise RunFailed("a process of the benchmark ended unexpectedly: is there enough memory?") from None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """End the process."""
        self.connection.close()  # which tells the process to end
        self.process.join()


def _serve(connection: Connection, make: Make, case: Case, settings: Settings, threads: int) -> None:
    """What the process of a ``Runner`` executes."""
    torch.set_num_threads(threads)
    try:
        with make(case, settings) as (loop, facts):
            connection.send(facts)
            while True:
                loop(connection.recv())
                connection.send(None)
    except (EOFError, BrokenPipeError):  # the parent has closed the connection
        return
    except (UserError, RunFailed) as error:
        connection.send(error)
    except Exception as error:
        connection.send(RunFailed(f"a loop of the benchmark failed: {type(error).__name__}: {error}".splitlines()[0]))


def together(runners: Sequence[Runner], steps: int) -> float:
    """Steps per second of all runners together, from the common start until the last one ends."""
    start = time.perf_counter()
    for runner in runners:
        runner.tell(steps)
    for runner in runners:
        runner.answer()
    return steps * len(runners) / (time.perf_counter() - start)


def alone(loop: Loop, device: torch.device, enough: float) -> float:
    """Steps per second of a loop that runs alone, after one warm-up step, measured over ``enough`` seconds."""
    first = seconds(lambda: loop(1), device)
    steps = max(2, math.ceil(enough / first))
    return steps / seconds(lambda: loop(steps), device)


@contextlib.contextmanager
def plain_loop(case: Case, settings: Settings) -> Iterator[Start]:
    """The plain loop, with the number of workers that was fastest in a short trial."""
    device = devices.resolve_device("auto")
    torch.backends.cudnn.benchmark = True
    enough = 0.1 if settings.quick else 3.0
    data, cores = dataset(settings), devices.cores()

    def trial(workers: int) -> tuple[float, Loop]:
        source = plain.batches(data, "standard", case.batch, workers, device)
        loop = plain.loop(plain.network(case.model, case.width, device), case.opt, source)
        loop(2)
        return alone(loop, device, enough), loop

    tried = {workers: trial(workers) for workers in ([0, 1] if settings.quick else plain.worker_counts(cores))}
    best = max(tried, key=lambda workers: tried[workers][0])
    rate, loop = tried[best]
    tried.clear()  # ends the workers of the other loaders
    yield loop, {"workers": best, "rate": rate}


@contextlib.contextmanager
def our_loop(case: Case, settings: Settings) -> Iterator[Start]:
    """Our loop, set up as for a long run; an epoch is cut to the requested number of steps."""
    whole = dataset(settings)
    values = {"model": case.model, "width": case.width, "opt": case.opt, "batch": case.batch, "epochs": EPOCHS}
    values |= {"sam_m": "batch"} if case.opt == "sam" else {}
    config = validate({**values, "val_fraction": 0.0, "compile": "off" if settings.quick else "auto"})
    with devices.settings(1, deterministic=False):
        begin = time.perf_counter()
        run = trainer(config, part_of(whole, len(whole.train_labels), 100))
        index = torch.arange(len(run.loader), device=run.device)
        epoch = 0

        def loop(steps: int) -> None:
            nonlocal epoch
            while steps:
                now = min(steps, len(index) // case.batch)
                run.method.subset = partial(index.narrow, 0, 0, now * case.batch)  # type: ignore[method-assign]
                run.train_epoch(epoch % EPOCHS)
                epoch, steps = epoch + 1, steps - now

        loop(2)
        before, compiling = time.perf_counter() - begin, devices.compile_seconds()
        rate = alone(loop, run.device, 0.1 if settings.quick else 3.0)
        compiled = "yes" if run.resolved["compile"] else "no"
        times = {"compiling, s": rounded(compiling), "until warm, s": rounded(before)}
        yield loop, {"rate": rate, "compiled": compiled, **times}
