"""Sweeps: which cells are run, how they stand, how failed and held ones end, and what MLflow gets of it."""

import itertools
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from samples import STUDY as TINY_STUDY
from samples import complete

from noisysam import cli
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.files import write_json
from noisysam.data.datasets import Dataset
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder
from noisysam.runs.schema import RECORD_SCHEMA
from noisysam.studies import plan as plans
from noisysam.studies import selection
from noisysam.studies import state as states
from noisysam.studies import status as status_table
from noisysam.studies import sweep as sweeping
from noisysam.studies.engines.base import CellOutcome, Inline
from noisysam.studies.plan import Cell
from noisysam.studies.sweep import FAILURES, Sweep, TrainCell
from noisysam.training.fit import fit

STUDY = """\
base: {dataset: digits, model: resnet8, width: 0.25, epochs: 2, train_subset: 100}
grid:
  noise: [0.0, 0.2]
rows:
  SGD: {opt: sgd}
  SAM: {opt: sam}
seeds: [3, 5]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "one.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def cells(path: Path) -> list[Cell]:
    """Eight: seeds 3 and 5, noise 0 and 0.2, SGD and SAM."""
    return plans.plan(path)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def put(store: Path, cell: Cell, status: str = "finished", seconds: float = 1.0, error: str | None = None) -> None:
    """A record in the store as if the cell had run."""
    cost = {"train_seconds": seconds, "eval_seconds": seconds / 2}
    record = {"schema": RECORD_SCHEMA, "key": cell.key, "status": status, "cost": cost, "results": {"last": 0.5}}
    RunFolder(store, cell.key).write(complete({**record, "error": error}))


@dataclass
class Job:
    """Notes which cells it is given; fails those of a row, ``times`` times each."""

    store: Path
    fails: str = ""
    times: int = 10**9
    seen: list[Cell] = field(default_factory=list)

    def __call__(self, cell: Cell, dataset: Dataset | None = None) -> CellOutcome:
        self.seen.append(cell)
        if cell.row == self.fails and self.seen.count(cell) <= self.times:
            put(self.store, cell, "failed", error="diverged")
            return CellOutcome(cell, "failed", "diverged")
        put(self.store, cell)
        return CellOutcome(cell, "finished")

    def threads_of(self, cell: Cell) -> int:
        return 1


# which cells


def labels(cells: list[Cell]) -> set[str]:
    return {cell.label for cell in cells}


def test_only(cells: list[Cell]) -> None:
    assert selection.select(cells) == cells
    assert labels(selection.select(cells, ["row=SAM", "noise=0.20", "seed=3"])) == {"SAM | symmetric 0.2 | seed 3"}
    assert selection.select(cells, ["opt=sgd"]) == cells[::2]
    assert selection.select(cells, ["seed=5", "epochs=2"]) == cells[4:]


@pytest.mark.parametrize(
    ("only", "shard", "fault"),
    [
        (["SAM"], None, "--only SAM: write it as field=value"),
        (["nois=0.2"], None, "there is no field nois, did you mean noise"),
        (["row=sam"], None, r"no cell has it \(there are SGD, SAM\)"),
        (["row=SAM", "noise=0.4"], None, r"--only noise=0.4: no cell has it \(there are 0.0, 0.2\)"),
        ([], "3", "--shard 3: write it as i/n"),
        ([], "0/2", "i from 1 to n"),
        ([], "3/2", "i from 1 to n"),
    ],
)
def test_bad_selections(only: list[str], shard: str | None, fault: str, cells: list[Cell]) -> None:
    with pytest.raises(UserError, match=fault):
        selection.select(cells, only, shard)


@given(st.lists(st.sampled_from([1, 1, 2, 50]), min_size=1, max_size=40), st.integers(1, 12))
def test_shards_part_a_study(epochs: list[int], n: int) -> None:
    """Disjoint, complete, in the plan's order, as many cells in each as in any other, and none far above its share."""
    plan = [Cell("a", RunConfig(dataset="digits", epochs=e), f"{k:016x}") for k, e in enumerate(epochs)]
    shards = [selection.select(plan, shard=f"{i + 1}/{n}") for i in range(n)]
    assert sorted(cell.key for shard in shards for cell in shard) == [cell.key for cell in plan]
    assert all([cell.key for cell in shard] == sorted(cell.key for cell in shard) for shard in shards)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    loads = [sum(cell.config.epochs for cell in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(epochs)


def test_a_study_that_would_mix_precisions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("noisysam.training.devices.native_bf16", lambda device: True)
    path = tmp_path / "radii.yaml"
    base = {"dataset": "digits", "model": "resnet8", "epochs": 1, "opt": "sam"}
    path.write_text(yaml.safe_dump({"base": base, "grid": {"rho": [0.02, 0.1]}, "rows": {"SAM": {}}}))
    with pytest.raises(UserError, match=r"mix precisions.*bf16 \(SAM.*fp32 \(SAM.*set precision"):
        selection.check_precision(plans.plan(path))
    monkeypatch.chdir(tmp_path)
    assert cli._run(["sweep", "radii.yaml", "--no-track"]) == 2
    assert "mix precisions" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    for settings in ({"precision": "bf16"}, {"device": "cuda:99"}):
        path.write_text(yaml.safe_dump({"base": base | settings, "grid": {"rho": [0.02, 0.1]}, "rows": {"SAM": {}}}))
        selection.check_precision(plans.plan(path))


# how they stand


def test_states_of_records(cells: list[Cell], store: Path) -> None:
    assert states.state(cells[0], store) == "to do"
    for cell, status in zip(cells, ("finished", "failed", "interrupted", "running"), strict=False):
        put(store, cell, status)
        assert states.state(cell, store) == status
        assert states.finished(cell, store) == (status == "finished")
    other = complete({"key": cells[4].key})  # of a version that wrote no status
    write_json(store / cells[4].key / "record.json", other)
    assert states.state(cells[4], store) == "finished"
    write_json(store / cells[5].key / "record.json", {**other, "schema": RECORD_SCHEMA + 1})
    assert states.state(cells[5], store) == "damaged"
    put(store, cells[6])
    (store / cells[6].key / "record.json").write_text("{")  # its status still says finished
    assert states.state(cells[6], store) == "damaged"
    put(store, cells[7], "running")
    (store / cells[7].key / "status.json").write_text("")
    assert states.state(cells[7], store) == "running"


def test_status_reads_records_alone(
    path: Path, cells: list[Cell], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.save(path, cells, store)
    for cell in cells[:4]:
        put(store, cell, seconds=40.0)
    put(store, cells[4], "running")
    RunFolder(store, cells[4].key).write_epochs([{"stage": 0, "epoch": 0}, {"stage": 1, "epoch": 0}])
    put(store, cells[5], "failed", error="Traceback (most recent call last):\n  File ...\nValueError: no luck")
    put(store, cells[6], "running")
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*")}
    monkeypatch.setattr(RunFolder, "lock", None)
    console = Console(width=200, record=True)
    console.print(status_table.status("one", plans.load(store, "one"), store))
    shown = console.export_text()
    table = {line.split()[0]: line.split()[1:] for line in shown.splitlines()[1:4]}
    assert table["SGD"] == ["2", "2", "0", "0", "0", "0"]
    assert table["SAM"] == ["2", "0", "0", "1", "0", "1"]
    assert table["all"] == ["4", "2", "0", "1", "0", "1"]
    assert re.search(r"SGD \| symmetric 0 \| seed 5 +stage 2, epoch 1/2 +\d+ s ago", shown)
    assert re.search(r"SGD \| symmetric 0.2 \| seed 5 +first epoch", shown)
    assert "SAM | symmetric 0 | seed 5: ValueError: no luck" in shown
    assert "one: 8 cells, 4 to do: about 4 min one by one" in shown
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == before


def test_a_run_that_rows_share_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "base: {dataset: digits, model: resnet8, epochs: 2}\ngrid: {noise: [0.4, 0.8]}\n"
        "rows:\n  SAM: {opt: sam, rho: 0.1}\n  paper: {opt: sam, rho: 0.1, noise: {0.8: {rho: 0.05}}}\n"
    )
    cells, store = plans.plan(path), tmp_path / "runs"
    assert (len(cells), len(plans.runs(cells))) == (4, 3)
    plans.save(path, cells, store)
    put(store, cells[0], seconds=40.0)  # of both rows
    console = Console(width=200, record=True)
    console.print(status_table.status("two", cells, store))
    shown = console.export_text()
    table = {line.split()[0]: line.split()[1:] for line in shown.splitlines()[1:4]}
    assert table["all"] == ["1", "0", "0", "0", "0", "2"]
    assert "two: 4 cells (3 runs), 2 to do: about 2 min one by one" in shown
    assert states.forecast(cells, store) == pytest.approx(2 * 60.0)
    assert states.forecast([*cells, *cells], store) == pytest.approx(2 * 60.0)
    parts = [selection.select(cells, shard=f"{n}/2") for n in (1, 2)]
    assert not {c.key for c in parts[0]} & {c.key for c in parts[1]}
    assert {c.key for part in parts for c in part} == {c.key for c in cells}
    sweep = Sweep(cells, store, Job(store), Inline())
    assert (len(sweep.cells), sweep.finished, sweep.left) == (3, 1, 2)


def test_a_damaged_record_is_named_and_the_others_go_on(path: Path, cells: list[Cell], store: Path) -> None:
    plans.save(path, cells, store)
    for cell in cells[:3]:
        put(store, cell)
    place = store / cells[1].key / "record.json"
    place.write_text("{")
    console = Console(width=200, record=True)
    console.print(status_table.status("one", plans.load(store, "one"), store))
    shown = console.export_text()
    assert f"{cells[1].label}: {place}: cannot be read as JSON" in shown
    assert "one: 8 cells, 6 to do" in shown
    job = TrainCell(store)
    with pytest.warns(UserWarning, match=r"record\.json"):
        assert job.threads_of(cells[1]) == 1
    (outcome,) = Sweep([cells[1]], store, job, Inline()).run()
    assert outcome.state == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith(f"{place}: cannot be read as JSON")
    assert outcome.error.endswith(f"; delete {place.parent} to train the run again")
    assert Sweep(cells, store, job, Inline()).finished == 2


class Stop:
    """Ends a training after its first epoch, as Ctrl-C does."""

    def step(self, *_: object) -> None: ...

    def epoch(self, *_: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["", "{", '{"schema": 1}'])
def test_a_run_with_a_checkpoint_resumes_over_a_damaged_record(damage: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(TINY_STUDY)
    cell = plans.plan(tmp_path / "s.yaml")[0]
    whole = fit(cell.config, store=tmp_path / "whole")
    store = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        fit(cell.config, store=store, progress=Stop())
    (store / cell.key / "record.json").write_text(damage)
    with pytest.warns(UserWarning, match="the run resumes from its checkpoint"):
        assert [outcome.state for outcome in Sweep([cell], store, TrainCell(store), Inline()).run()] == ["finished"]
    record = RunFolder(store, cell.key).record
    assert record is not None
    assert record["results"] == json.loads((whole.folder / "record.json").read_text())["results"]
    assert [line["train_loss"] for line in RunFolder(store, cell.key).epochs] == [
        line["train_loss"] for line in RunFolder(tmp_path / "whole", cell.key).epochs
    ]


# what they will cost


def test_forecast(cells: list[Cell], store: Path) -> None:
    sgd, sam = cells[0::2], cells[1::2]
    assert states.forecast(cells, store) is None
    put(store, sgd[0], seconds=2.0)
    assert states.forecast(cells, store) is None, "nothing is known of the other row"
    put(store, sgd[1], seconds=4.0)
    put(store, sam[0], seconds=10.0)
    # 1.5 x mean(2, 4) for each of two, 1.5 x 10 for each of three
    assert states.forecast(cells, store) == pytest.approx(2 * 4.5 + 3 * 15)
    for cell in cells:
        put(store, cell)
    assert states.forecast(cells, store) is None


def test_forecast_goes_by_the_length_of_a_run(path: Path, store: Path) -> None:
    path.write_text(STUDY.replace("noise: [0.0, 0.2]", "epochs: [1, 4]").replace("epochs: 2, ", ""))
    cells = plans.plan(path)
    put(store, cells[0], seconds=2.0)
    for cell in cells:
        if cell.row == "SAM":
            put(store, cell)
    assert states.forecast(cells, store) == pytest.approx(3.0 * (4 + 1 + 4)), "epochs 4, 1, 4 are left"


def test_work_counts_gradients() -> None:
    """Of one image: a forward is one, a backward two; SAM takes two of each, two networks twice as much."""
    plain = RunConfig(dataset="digits", epochs=3, train_subset=10)
    assert states.relative_cost(plain) == 3 * 10 * 3
    assert states.relative_cost(plain.model_copy(update={"opt": "sam"})) == 2 * states.relative_cost(plain)
    assert states.relative_cost(plain.model_copy(update={"method": "co-teaching"})) == 2 * states.relative_cost(plain)


def test_the_longest_come_first(cells: list[Cell], store: Path) -> None:
    class Parallel(Inline):
        parallel = True

    job = Job(store)
    list(Sweep(cells, store, job, Parallel()).run())
    assert [cell.row for cell in job.seen] == 4 * ["SAM", "SGD"], "by their passes, where nothing has run"
    assert [cell.config.seed for cell in job.seen] == 4 * [cells[0].config.seed] + 4 * [cells[-1].config.seed]
    for cell in cells[2:]:
        (store / cell.key / "record.json").unlink()
    put(store, cells[0], seconds=50.0)  # SGD turned out to be slower
    job = Job(store)
    list(Sweep(cells, store, job, Parallel()).run())
    assert [cell.row for cell in job.seen] == 3 * ["SGD", "SAM"]
    twice = [*cells, *(replace(cell, row="shared") for cell in cells)]
    for cell in cells:
        (store / cell.key / "record.json").unlink()
    job = Job(store)
    list(Sweep(twice, store, job, Parallel()).run())
    assert sorted(cell.key for cell in job.seen) == sorted(cell.key for cell in cells), "rows that share a run"


# running


def run(cells: list[Cell], job: Any, store: Path, **how: Any) -> tuple[Sweep, list[CellOutcome]]:
    made = Sweep(cells, store, job, Inline(), **how)
    return made, list(made.run())


def test_finished_cells_are_skipped(cells: list[Cell], store: Path) -> None:
    for cell, status in zip(cells, ("finished", "interrupted", "running"), strict=False):
        put(store, cell, status)
    job = Job(store)
    made, outcomes = run(cells, job, store)
    assert job.seen == cells[1:], "in the plan's order"
    assert outcomes == [CellOutcome(cell, "finished") for cell in cells[1:]]
    assert (made.finished, made.left, made.failed) == (8, 0, {})
    assert run(cells, job, store)[1] == []


def test_a_failed_cell_does_not_stop_the_others(cells: list[Cell], store: Path) -> None:
    made, outcomes = run(cells, Job(store, fails="SAM"), store)
    assert [outcome.state for outcome in outcomes] == ["finished", "failed"] * 4
    assert (made.finished, made.left, len(made.failed)) == (4, 0, 4)


def test_failed_cells_of_earlier_sweeps(cells: list[Cell], store: Path) -> None:
    """They are told, not tried again, until that is asked for."""
    run(cells, Job(store, fails="SAM"), store)
    job = Job(store)
    made, outcomes = run(cells, job, store)
    assert job.seen == []
    assert outcomes[0].error == "diverged (--retry-failed tries it again)"
    assert len(made.failed) == 4
    made, outcomes = run(cells, job, store, retry_failed=True)
    assert job.seen == cells[1::2]
    assert {outcome.state for outcome in outcomes} == {"finished"}
    assert not list(store.rglob(FAILURES))


@pytest.mark.parametrize(("times", "retries", "tries"), [(1, 1, 2), (2, 1, 2), (2, 2, 3), (1, 0, 1)])
def test_retries(times: int, retries: int, tries: int, cells: list[Cell], store: Path) -> None:
    job = Job(store, fails="SAM", times=times)
    made, outcomes = run(cells, job, store, retries=retries)
    states = Counter(outcome.state for outcome in outcomes if outcome.cell.row == "SAM")
    ends_well = tries > times
    assert states == Counter({"again": 4 * (tries - 1), "finished" if ends_well else "failed": 4}) - Counter()
    assert Counter(cell.row for cell in job.seen) == {"SGD": 4, "SAM": 4 * tries}
    assert len(made.failed) == (0 if ends_well else 4)
    assert {cell.key for cell in job.seen[:8]} == {cell.key for cell in cells}, "the others come before a second try"


def test_retries_count_over_sweeps(cells: list[Cell], store: Path) -> None:
    """Two failures are within two retries, whichever sweep they happened in."""
    run(cells, Job(store, fails="SAM"), store, retries=1)
    lines = (store / cells[1].key / FAILURES).read_text().splitlines()
    assert len(lines) == 2
    assert all(line.endswith(" diverged") for line in lines)
    job = Job(store, fails="SAM")
    assert run(cells, job, store, retries=1)[0].failed
    assert job.seen == []
    run(cells, job, store, retries=3)
    assert job.seen == [*cells[1::2], *cells[1::2]], "two more"


def test_a_failure_outside_of_a_sweep_counts_as_one(cells: list[Cell], store: Path) -> None:
    put(store, cells[0], "failed", error="diverged")
    job = Job(store)
    run(cells[:1], job, store)
    assert job.seen == []
    run(cells[:1], job, store, retries=1)
    assert job.seen == cells[:1]


def test_held_cells_are_waited_for(cells: list[Cell], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is finished by its holder, one is given up by it, and trained here."""
    job = Job(store)
    locks = [RunFolder(store, cell.key).lock() for cell in cells[:2]]
    for cell, lock in zip(cells, locks, strict=False):
        lock.__enter__()
        put(store, cell, "running")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            put(store, cells[0])
            locks[0].__exit__(None, None, None)
        elif len(waits) == 4:
            locks[1].__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", sleep)
    made, outcomes = run(cells, job, store)
    assert [o.state for o in outcomes] == ["held", "held"] + 8 * ["finished"]
    assert [o.cell for o in outcomes] == [*cells[:2], *cells[2:], *cells[:2]]
    assert job.seen == [*cells[2:], cells[1]]
    assert (made.finished, made.left) == (8, 0)
    assert waits == 4 * [sweeping.POLL]


def test_what_another_sweep_finishes_or_fails_meanwhile_is_not_run(cells: list[Cell], store: Path) -> None:
    class Meanwhile(Job):
        def __call__(self, cell: Cell, dataset: Dataset | None = None) -> CellOutcome:
            put(store, cells[2])
            put(store, cells[3], "failed", error="out of memory")
            return super().__call__(cell)

    job = Meanwhile(store)
    made, outcomes = run(cells, job, store)
    assert cells[2] not in job.seen
    assert cells[3] not in job.seen
    assert made.finished == 7
    assert [o.error for o in made.failed.values()] == ["out of memory (--retry-failed tries it again)"]
    assert {o.cell.key for o in outcomes} == {cell.key for cell in cells}


def test_nothing_is_begun_after_the_deadline(cells: list[Cell], store: Path) -> None:
    class Slow(Job):
        def __call__(self, cell: Cell, dataset: Dataset | None = None) -> CellOutcome:
            time.sleep(0.02)
            return super().__call__(cell)

    job = Slow(store)
    made, outcomes = run(cells, job, store, deadline=time.time() + 0.05)
    assert 0 < len(outcomes) == len(job.seen) < 8
    assert made.left == 8 - len(job.seen)


def log_of_two_sweeps(cells: list[Cell], store: Path, log: Path, fails: str) -> None:
    """A sweep whose trainings lock their run as real ones do, and write down that they began."""

    def fit(config: RunConfig, *, store: Path, **_: Any) -> None:
        (cell,) = [c for c in cells if c.config == config]
        with RunFolder(store, cell.key).lock():
            if states.finished(cell, store):
                return
            put(store, cell, "running")
            with log.open("a") as file:
                file.write(f"{cell.label}\n")
            time.sleep(0.05)
            put(store, cell, "failed" if cell.row == fails else "finished", error="diverged")
            if cell.row == fails:
                raise RunFailed("diverged")

    from noisysam.training import fit as module

    module.fit = fit  # type: ignore[assignment]
    sweeping.POLL = 0.02
    made = Sweep(cells, store, TrainCell(store), Inline())
    list(made.run())
    assert made.left == 0
    assert made.finished == sum(cell.row != fails for cell in cells)


@pytest.mark.parametrize("fails", ["", "SAM"])
def test_two_sweeps_at_once_train_each_cell_once(fails: str, cells: list[Cell], store: Path, tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    processes = [context.Process(target=log_of_two_sweeps, args=(cells, store, log, fails)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().splitlines()) == sorted(labels(cells))


# the job


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RunFailed("diverged: no step\nmore"), ("failed", "diverged: no step")),
        (UserError("no such file"), ("failed", "no such file")),
        (ValueError("bad\nworse"), ("failed", "ValueError: bad")),
        (KeyError(), ("failed", "KeyError: ")),
        (sweeping.TimeIsUp(), ("stopped", None)),
    ],
)
def test_how_a_training_ends(
    error: BaseException, outcome: Any, cells: list[Cell], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("noisysam.training.fit.fit", fit)
    assert TrainCell(store)(cells[0]) == CellOutcome(cells[0], *outcome)


def test_ctrl_c_ends_a_sweep(cells: list[Cell], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("noisysam.training.fit.fit", fit)
    with pytest.raises(KeyboardInterrupt):
        run(cells, TrainCell(store), store)


def test_a_cell_is_trained(cells: list[Cell], store: Path) -> None:
    assert TrainCell(store)(cells[1]) == CellOutcome(cells[1], "finished")
    assert states.finished(cells[1], store)
    assert TrainCell(store).threads_of(cells[1]) == 1, "what it was trained with"
    assert TrainCell(store, threads=3).threads_of(cells[0]) == 3


def test_a_cell_that_another_process_trains_is_held(cells: list[Cell], store: Path) -> None:
    with RunFolder(store, cells[0].key).lock():
        assert TrainCell(store)(cells[0]) == CellOutcome(cells[0], "held")


def test_time_is_up_at_the_end_of_an_epoch(cells: list[Cell], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not of a stage's last; the run goes on from there."""
    assert TrainCell(store, deadline=time.time() - 1)(cells[0]) == CellOutcome(cells[0], "stopped")
    assert not store.exists(), "not even begun"
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(time=lambda: next(clock)))
    assert TrainCell(store, deadline=1.0)(cells[0]) == CellOutcome(cells[0], "stopped")
    assert states.state(cells[0], store) == "interrupted"
    assert [line["epoch"] for line in RunFolder(store, cells[0].key).epochs] == [0]
    clock = iter([0.0, 2.0])
    assert TrainCell(store, deadline=1.0)(cells[0]) == CellOutcome(cells[0], "finished")
    assert [line["epoch"] for line in RunFolder(store, cells[0].key).epochs] == [0, 1]


# commands


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs ``noisysam sweep one.yaml``; exit code, stdout and stderr."""
    monkeypatch.chdir(path.parent)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli._run(["sweep", "one.yaml", "--no-track", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings that take no time; those of SAM fail as often as the list has entries."""
    failures: list[str] = []

    def call(self: TrainCell, cell: Cell, dataset: Dataset | None = None) -> CellOutcome:
        if self.deadline is not None:
            time.sleep(0.05)
        if cell.row == "SAM" and failures:
            put(self.store, cell, "failed", error=failures[0])
            return CellOutcome(cell, "failed", failures.pop())
        put(self.store, cell)
        return CellOutcome(cell, "finished")

    monkeypatch.setattr(TrainCell, "__call__", call)
    return failures


def test_exit_codes_and_retries_of_the_command(says: Callable[..., Any], quick: list[str], path: Path) -> None:
    quick += ["diverged"] * 5
    code, out, err = says()
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("noisysam: 4 of 8 cells failed, first SAM | symmetric 0 | seed 3: diverged")
    assert says()[0] == 1, "told again"
    code, out, err = says("--retry-failed")
    assert code == 1
    assert "1 of 8 cells failed" in err
    path.write_text(STUDY + "retries: 1\n")
    code, out, err = says()
    assert (code, out) == (0, "noisysam report one\n")
    assert "1 to do" in err
    assert "[8/8]" in err


def test_limit_minutes_of_the_command(says: Callable[..., Any], quick: list[str]) -> None:
    code, out, err = says("--limit-minutes", "0.002")
    assert (code, out) == (0, "")
    assert re.search(r"time limit reached: \d of 8 cells are left; the same command continues", err)
    assert says()[:2] == (0, "noisysam report one\n")


def test_selected_cells_of_the_command(says: Callable[..., Any], quick: list[str], store: Path) -> None:
    code, out, _ = says("--only", "row=SAM", "--shard", "1/2")
    assert (code, out) == (0, "noisysam report one\n")
    assert len(list(store.glob("*/record.json"))) == 2
    assert len(json.loads((store / "studies" / "one.json").read_text())["cells"]) == 8, "the plan is kept whole"
    code, out, _ = says("--only", "row=SAM", "--dry-run")
    assert out.splitlines()[-1].startswith("4 cells, 2 to do")
    code, out, _ = says("--status", "--only", "noise=0")
    assert out.splitlines()[-1].startswith("one: 4 cells, 2 to do")
    assert says("--shard", "5/2")[0] == 2


def test_live_table(cells: list[Cell], store: Path) -> None:
    """What is shown while a sweep runs."""
    made = Sweep(cells, store, Job(store), Inline())
    shown: list[str] = []
    table = status_table._Board("one", made)

    class Peek(Job):
        def __call__(self, cell: Cell, dataset: Dataset | None = None) -> CellOutcome:
            put(self.store, cell, "running")
            RunFolder(self.store, cell.key).write_epochs([{"stage": 0, "epoch": 0}])
            console = Console(width=120, record=True)
            console.print(table())
            shown.append(console.export_text())
            return super().__call__(cell)

    made.job = Peek(store)
    list(made.run())
    assert len(shown) == 8
    for number, (cell, text) in enumerate(zip(cells, shown, strict=True)):
        assert text.startswith(f"one: {number} of 8 finished, 0 failed, {8 - number} to do")
        assert ("of training ahead" in text) == (number >= 2), "once both rows are known"
        assert re.search(re.escape(cell.label) + r" +epoch 1/2", text)
        assert text.count("epoch 1/2") == 1


# MLflow


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One migrated store for the whole module: migrating takes seconds."""
    from noisysam.tracking.client import open_store

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    open_store(uri, "first")
    return uri


def trained(store: Path, cell: Cell) -> None:
    """A record with what MLflow is told."""
    record = {"schema": RECORD_SCHEMA, "key": cell.key, "status": "finished", "name": cell.label, "oracle": []}
    record |= {"config": cell.config.model_dump(mode="json"), "resolved": {"device_name": "a CPU"}, "error": None}
    record |= {"noise": {"type": "symmetric", "rate": 0.2, "flip_rate": 0.2, "digest": "ab" * 32}}
    record |= {"environment": {"commit": "abc"}, "started": "2026-11-22T18:00:00+00:00"}
    record |= {"ended": "2026-11-22T18:05:00+00:00", "results": {"last": 0.5}, "cost": {"steps": 3}}
    RunFolder(store, cell.key).write(complete(record))
    RunFolder(store, cell.key).write_epochs([{"stage": 0, "epoch": 0, "time": 1763836000.0, "test_accuracy": 0.5}])


def children(uri: str, experiment: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runs of an experiment: those of studies by name, those of cells by key, each once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for r in client.search_runs([client.get_experiment_by_name(experiment).experiment_id]):
        if r.data.tags.get("noisysam.kind") == "row":
            continue
        of_study = r.data.tags.get("noisysam.kind") == "study"
        name = r.data.tags["noisysam.study" if of_study else "noisysam.key"]
        assert name not in found[0 if of_study else 1]
        found[0 if of_study else 1][name] = r
    return found


def test_a_study_has_a_parent_run(uri: str, cells: list[Cell], store: Path) -> None:
    from noisysam import tracking

    parent = tracking.open_study(uri, "one")
    assert tracking.open_study(uri, "one") == parent, "found again"
    (made,), _ = (list(runs.values()) for runs in children(uri, "one"))
    assert made.info.run_id == parent
    assert (made.info.status, made.data.tags["mlflow.runName"], made.data.tags["noisysam.study"]) == (
        "RUNNING", "one", "one",
    )  # fmt: skip
    tracking.close_study(uri, parent, {"finished": 7, "failed": 1, "left": 0})
    made = children(uri, "one")[0]["one"]
    assert made.info.status == "FAILED"
    assert made.data.metrics == {"cells_finished": 7, "cells_failed": 1, "cells_left": 0}
    assert tracking.open_study(uri, "one") == parent
    assert children(uri, "one")[0]["one"].info.status == "RUNNING", "open again"
    for counts, status in (({"finished": 7, "failed": 0, "left": 1}, "KILLED"), ({"left": 0, "failed": 0}, "FINISHED")):
        tracking.close_study(uri, parent, counts)
        assert children(uri, "one")[0]["one"].info.status == status


def test_shared_cells_are_children_in_each_study(uri: str, path: Path, cells: list[Cell], store: Path) -> None:
    from noisysam import tracking
    from noisysam.tracking.tracker import Tracker

    for name in ("left", "right"):
        plans.save(path.rename(path.with_name(f"{name}.yaml")), cells, store)
        path = path.with_name(f"{name}.yaml")
    for cell in cells[:2]:
        trained(store, cell)
    rows = {cell.key: cell.row for cell in cells}
    left, right = (tracking.open_study(uri, name) for name in ("left", "right"))
    parents = {
        name: tracking.open_rows(uri, name, of, ["SGD", "SAM"]) for name, of in (("left", left), ("right", right))
    }
    assert Tracker(RunFolder(store, cells[0].key), uri, "left", parents["left"]["SGD"], "SGD").sync(final=True)
    assert tracking.sync_study(store, rows, uri, "left", left) == (1, 0)
    assert tracking.sync_study(store, rows, uri, "right", right) == (2, 0)
    for name in ("left", "right"):
        runs = children(uri, name)[1]
        assert set(runs) == {cell.key for cell in cells[:2]}
        for key, r in runs.items():
            assert r.data.tags["mlflow.parentRunId"] == parents[name][rows[key]]
        assert {r.data.tags["noisysam.study"] for r in runs.values()} == {"left, right"}
        assert {r.data.metrics["final/last"] for r in runs.values()} == {50}
    assert tracking.sync_study(store, rows, uri, "left", left) == (0, 0), "nothing twice"
    assert tracking.sync_study(store, rows, uri, "right", right) == (0, 0)
    assert tracking.sync_store(store, uri) == (0, 0)
    trained(store, cells[2])
    (store / cells[0].key / "tracking.json").unlink()  # as if the store had been away
    assert tracking.sync_store(store, uri, "left") == (2, 0)
    assert set(children(uri, "left")[1]) == {cell.key for cell in cells[:3]}


def test_runs_of_a_sweep_without_parents_get_one(uri: str, path: Path, cells: list[Cell], store: Path) -> None:
    """Those of an earlier version of the suite, and those of a sweep whose store was away at its start."""
    from noisysam import tracking
    from noisysam.tracking.tracker import Tracker

    trained(store, cells[0])
    assert Tracker(RunFolder(store, cells[0].key), uri, "late").sync(final=True)
    run_id = children(uri, "late")[1][cells[0].key].info.run_id
    parent = tracking.open_study(uri, "late")
    assert tracking.sync_study(store, {cells[0].key: "SGD"}, uri, "late", parent) == (1, 0)
    made = children(uri, "late")[1][cells[0].key]
    row = tracking.open_rows(uri, "late", parent, ["SGD"])["SGD"]
    assert (made.info.run_id, made.data.tags["mlflow.parentRunId"]) == (run_id, row)


def test_a_store_that_is_away_is_told_once(cells: list[Cell], store: Path) -> None:
    from noisysam import tracking

    for cell in cells[:3]:
        trained(store, cell)
    told: list[str] = []
    nowhere = "http://127.0.0.1:9"
    assert tracking.sync_study(store, {c.key: c.row for c in cells}, nowhere, "one", "p" * 32, told.append) == (0, 3)
    assert len(told) == 1
    tracking.close_study(nowhere, "p" * 32, {"failed": 0, "left": 0}, told.append)
    assert "stays open" in told[1]
    assert cli.studies._parent(nowhere, "one", store) is None


# thousands of cells


@pytest.mark.slow
def test_planning_ten_thousand_cells(tmp_path: Path) -> None:
    """With 5,000 finished: what a sweep does before it begins. Under 5 s; the bound is generous, and of the processor's
    time, since other work may share it."""
    rows = "".join(f"  r{n}: {{opt: sam, rho: {0.001 * (n + 1):.3f}}}\n" for n in range(50))
    path = tmp_path / "large.yaml"
    path.write_text(
        f"base: {{dataset: digits, model: resnet8}}\ngrid: {{noise: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]}}\n"
        f"rows:\n{rows}seeds: {list(range(25))}\n"
    )
    store = tmp_path / "runs"
    first = plans.plan(path)
    assert len(first) == 10_000
    card = {"matrix": [[0.1] * 10] * 10}
    for cell in first[:5_000]:
        (store / cell.key).mkdir(parents=True)
        record = {"schema": RECORD_SCHEMA, "key": cell.key, "status": "finished", "noise": card}
        record |= {"config": cell.config.model_dump(mode="json"), "cost": {"train_seconds": 1, "eval_seconds": 1}}
        (store / cell.key / "record.json").write_text(json.dumps(complete(record), indent=1))
    times = [time.process_time()]
    cells = plans.plan(path)
    times.append(time.process_time())
    plans.save(path, cells, store)
    times.append(time.process_time())
    made = Sweep(cells, store, Job(store), Inline())
    times.append(time.process_time())
    assert made.left == 5_000
    assert states.forecast(cells, store) is not None
    times.append(time.process_time())
    plan, save, look, cost = (b - a for a, b in itertools.pairwise(times))
    print(f"plan {plan:.2f} s, save {save:.2f} s, look {look:.2f} s, forecast {cost:.2f} s")  # pytest -s shows it
    assert plan + save + look < 10
