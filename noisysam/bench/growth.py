"""How costs grow with the number of training samples, classes, epochs, and runs of a study or a store.

Each cost is measured at several sizes n. The exponent p of seconds ~ n^p is fitted to the logarithms in each round.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from noisysam import noise
from noisysam.bench.measure import BATCH, Findings, Row, Settings, estimate, interleaved, median, seconds
from noisysam.bench.runs import dataset, part_of
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Loader
from noisysam.report import report
from noisysam.runs import transfer
from noisysam.runs.config import validate
from noisysam.runs.problem import prepare
from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.tracking.client import open_store
from noisysam.tracking.study import sync_store
from noisysam.tracking.tracker import Tracker
from noisysam.training import devices
from noisysam.training.fit import fit
from noisysam.training.progress import note

ROUNDS = 3
RATE = 0.4

Timed = Callable[[int], float]  # size -> seconds


@dataclass(frozen=True)
class Cost:
    """A cost that grows with ``by``, measured at ``sizes``."""

    name: str
    by: str
    sizes: Sequence[int]
    seconds: Timed


def measure(settings: Settings) -> Findings:
    """Seconds at each size, and the exponent of each cost."""
    rounds = settings.times(ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        costs = [*of_data(settings), *of_epochs(settings, Path(folder)), *of_runs(settings, Path(folder))]
        rows = [grown(cost, rounds) for cost in costs]
    facts = {"rounds": rounds, "data": dataset(settings).name, "noise rate": RATE, "threads": 1}
    return Findings({"Seconds at n, and p of seconds ~ n^p": rows}, facts)


def grown(cost: Cost, rounds: int) -> Row:
    """The row of a cost."""
    note(f"  {cost.name}, by {cost.by}")
    cost.seconds(cost.sizes[0])  # warm up: load and build what the first use needs
    cases = {str(size): (lambda size=size: cost.seconds(size)) for size in cost.sizes}
    found = interleaved(cases, rounds)
    logs = np.log([found[str(size)] for size in cost.sizes])
    slopes = np.polyfit(np.log(cost.sizes), logs, 1)[0]
    times = [median(found[str(size)]) for size in cost.sizes]
    return {"cost": cost.name, "n": cost.by, "at": list(cost.sizes), "seconds": times, "p": estimate(slopes)}


# samples and classes


def of_data(settings: Settings) -> Iterator[Cost]:
    """Costs of noisy labels, of preparing a run, and of the loader."""
    data = dataset(settings)
    n = len(data.train_labels)
    sizes = [n // 8, n // 4, n // 2, n]
    images = data.train_images.numpy()

    def labels(kind: str, classes: int = 10) -> Timed:
        def timed(n: int) -> float:
            shown = images[:n] if kind == "instance" else None
            clean = np.arange(n) % classes
            return seconds(lambda: noise.make(kind, clean, classes, rate=RATE, images=shown))

        return timed

    def drawn(n: int) -> float:
        part = part_of(data, n, 1)
        device = devices.resolve_device("auto")
        rows = min(BATCH, n)
        loader = Loader(part, torch.arange(n), part.train_labels, rows=rows, policy="standard", device=device, seed=0)
        return seconds(lambda: [None for _ in loader.epoch(0, 0)], device)

    yield Cost("symmetric noise", "samples", sizes, labels("symmetric"))
    yield Cost("instance-dependent noise", "samples", sizes, labels("instance"))
    yield Cost("problem of a run: labels and split", "samples", sizes, lambda n: posed(data, n))
    yield Cost("augmented batches of an epoch", "samples", sizes, drawn)
    classes = [2, 4, 8] if settings.quick else [10, 30, 100, 300]
    yield Cost(f"symmetric noise on {n:,} labels", "classes", classes, lambda k: labels("symmetric", k)(n))


def posed(data: Dataset, n: int) -> float:
    """Seconds to prepare a run on the first n images."""
    part, config = part_of(data, n, 1), validate({"noise": RATE})
    return seconds(lambda: prepare(config, part))


# epochs


def finished_run(store: Path) -> RunFolder:
    """A real run of two epochs; its record and epochs are copied for all others."""
    small = {"dataset": "digits", "train_subset": 200, "model": "resnet8", "width": 0.25, "batch": 32, "epochs": 2}
    config = validate({**small, "noise": RATE, "noise_seed": 0, "compile": "off"})
    return RunFolder(store, fit(config, store=store).key)


def of_epochs(settings: Settings, folder: Path) -> Iterator[Cost]:
    """Costs of recording and sending one more epoch of a run that has n."""
    run = finished_run(folder / "epochs")
    given = run.epochs[-1]

    def lines(n: int) -> list[dict[str, float | None]]:
        return [{**given, "epoch": number} for number in range(n)]

    def sent(n: int) -> float:
        with tracked(folder) as uri:
            (run.path / "tracking.json").unlink(missing_ok=True)
            tracker = Tracker(run, uri, "bench")
            run.write_epochs(lines(n))
            tracker.sync()
            run.write_epochs(lines(n + 1))
            return seconds(tracker.sync)

    sizes = [5, 10] if settings.quick else [25, 50, 100, 200]
    yield Cost("epochs.csv after an epoch", "epochs", sizes, lambda n: seconds(lambda: run.write_epochs(lines(n))))
    yield Cost("sending an epoch to MLflow", "epochs", sizes, sent)


@contextmanager
def tracked(folder: Path) -> Iterator[str]:
    """A new tracking store; its address."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        uri = f"sqlite:///{place}/mlflow.db"
        open_store(uri, "bench")
        yield uri


# runs


def of_runs(settings: Settings, folder: Path) -> Iterator[Cost]:
    """Costs of planning, reporting, exporting, importing and sending a study of n runs."""
    sizes = [4, 8] if settings.quick else [100, 300, 1000, *([10_000] if settings.long else [])]
    given = finished_run(folder / "given")
    stores = {n: filled(folder / f"store-{n}", n, given) for n in sizes}

    def planned(n: int) -> float:
        return seconds(lambda: plans.plan(study_file(folder / f"store-{n}", n)))

    def reported(n: int) -> float:
        return seconds(lambda: report(stores[n], "bench", folder / "reports"))

    def exported(n: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as target:
            return seconds(lambda: transfer.export_study(stores[n], "bench", Path(target)))

    def imported(n: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as source, tempfile.TemporaryDirectory(dir=folder) as store:
            transfer.export_study(stores[n], "bench", Path(source))
            return seconds(lambda: transfer.import_study(Path(source), Path(store)))

    def synced(n: int, times: int = 1) -> float:
        for state in stores[n].glob("*/tracking.json"):
            state.unlink()
        with tracked(folder) as uri:
            return [seconds(lambda: sync_store(stores[n], uri, "bench")) for _ in range(times)][-1]

    yield Cost("planning a study", "runs", sizes, planned)
    yield Cost("report of a study", "runs", sizes, reported)
    yield Cost("export of a study", "runs", sizes, exported)
    yield Cost("import of a study", "runs", sizes, imported)
    yield Cost("sending a store to MLflow", "runs", sizes, synced)
    yield Cost("sending it again, nothing new", "runs", sizes, lambda n: synced(n, times=2))


def study_file(folder: Path, n: int) -> Path:
    """A study file of n cells: two rows, two learning rates, n / 4 seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {"dataset": "digits", "train_subset": 200, "model": "resnet8", "width": 0.25, "batch": 32, "epochs": 2}
    base |= {"noise": RATE, "noise_seed": 0}  # the labels of the run that is copied
    content = {"base": base, "grid": {"lr": [0.1, 0.2]}, "rows": {"SGD": {"opt": "sgd"}, "SAM": {"opt": "sam"}}}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**content, "seeds": list(range(n // 4))}))
    return path


def filled(store: Path, n: int, given: RunFolder) -> Path:
    """A store with a study of n finished runs: copies of one run with different keys and configurations."""
    path = study_file(store, n)
    cells = plans.plan(path)
    plans.save(path, cells, store)
    record, lines, confusion = given.record, given.epochs, given.confusion
    assert record is not None
    assert confusion is not None
    for cell in cells:
        own: Mapping[str, Any] = {
            **copy.deepcopy(record),
            "key": cell.key,
            "config": cell.config.model_dump(mode="json", exclude={"data_dir"}),
            "revisions": cell.config.recipe().revisions,
            "optimizer_options": cell.config.recipe().optimizer_options.model_dump(mode="json"),
        }
        RunFolder(store, cell.key).write(own)
        RunFolder(store, cell.key).write_epochs(lines)
        RunFolder(store, cell.key).write_confusion(confusion)
    shutil.copytree(given.store / "labels", store / "labels")
    return store
