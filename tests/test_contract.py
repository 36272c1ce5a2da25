"""Every method with every kind of optimizer, through the real loop: state once, pure losses, counted passes, resume."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from noisysam import fit
from noisysam.core.requirements import REQUIREMENTS
from noisysam.core.task import Task
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Batch
from noisysam.methods import METHODS, RunInfo, compose
from noisysam.methods import options as method_options
from noisysam.optim import OPTIMIZERS
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import prepare
from noisysam.runs.record import RunFolder
from noisysam.training.run import Run
from noisysam.training.trainer import Trainer

ROWS, SAMPLES, STEPS = 16, 48, 3
FORGET = {"forget_rate": 0.3, "ramp": 1}
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "dividemix": {"warmup": 1, "ramp": 1},
    "co-teaching": FORGET,
    "co-teaching,mixup": FORGET,
    "co-teaching+": {**FORGET, "warmup": 1},
    "decoupling": {"warmup": 1},
    "jocor": FORGET,
    "mentornet": {"burn_in": 0.5},
    "mentormix": {"burn_in": 0.5},
    "cdr": {"rate": 0.3, "ramp": 1},
    "o2u": {"period": 2, "remove": 0.0},
    "incv": {"iterations": 1, "length": 1.0},
    "pes": {"first": 0.5, "second": 1, "third": 1},
    "ssr": {"k": 5},
    "joint-optimization": {"begin": 0.5, "retrain": 1.0},
    "pencil": {"begin": 0.0},
    "nlnl": {"all": 0.0, "selective": 0.5, "pseudo": 1.0},
    "adacorr": {"retro": 0.5, "correct": 0.0},
    "co-learning": {"strong": "standard"},
    "jo-src": {"warmup": 1},
    "augdesc": {"warmup": 1, "ramp": 1, "strong": "standard"},
    "longremix": {"warmup": 1, "ramp": 1, "confident": 1},
    "pgdf": {"warmup": 1, "ramp": 1, "strong": "standard", "rate": 0.3, "enhance": 0.0, "denoise": 0.0, "divide": 0.0},
    "unicon": {"warmup": 1, "ramp": 1, "strong": "standard"},
    "f-divergence": {"first": 0.5},
    "t-revision": {"estimate": 0.5},
    "cal": {"sieve": 0.5},
    "sop+": {"strong": "standard"},
    "cores2-consistency": {"length": 1.0, "stop": 0.5, "strong": "standard"},
    "pes-semi": {"first": 0.5, "second": 1},
    "disc": {"start": 1, "strong": "standard"},
    "promix": {"warmup": 0.5, "ramp": 0.5, "strong": "standard"},
}
OF_TRAINING = (  # what they decide depends on the steps taken before
    "o2u", "incv", "forward", "backward", "pes", "t-revision", "cal", "cores2-consistency", "pes-semi",
)  # fmt: skip
EPOCHS = {  # over stages of several lengths
    "pes": 4, "o2u": 6, "f-divergence": 2, "t-revision": 5, "cal": 3, "cores2-consistency": 3, "pes-semi": 3,
    "pencil": 2,
}  # fmt: skip
DIVIDE = {"dividemix": 4, "augdesc": 4, "longremix": 4, "pgdf": 4, "unicon": 6}  # images that a labelled row leads to
VIEWS: dict[str, Callable[[dict[str, Any]], int]] = {  # of a row, where they change within a run
    "f-divergence": lambda line: 1 + line["stage"],
    "cores2-consistency": lambda line: 1 + 2 * line["stage"],
    "disc": lambda line: 2 + 2 * (line["epoch"] == 1),
    "promix": lambda line: 1 + 5 * (line["epoch"] == 1),
    "unicon": lambda line: 1,  # in the warm-up
}
CHOOSE = {
    ("incv", 0),
    ("incv", 1),
    ("incv", 2),
    ("pes", 3),
    ("cores2-consistency", 1),
    ("pes-semi", 2),
    ("pgdf", 0),
    ("pgdf", 1),
}  # stages
RECIPES = [*METHODS, "bootstrap,mixup", "co-teaching,mixup"]
AT_ONCE: dict[str, dict[str, Any]] = {  # so that two epochs of three steps show what a member does
    "looksam": {"interval": 3},
    "ncsam": {"warmup": 0, "flip": 0.25},
    "saner": {"warmup": 1},
    "saf": {"start": 0, "past": 1},
    "mesa": {"start": 0, "decay": 0.9},
}
CHUNKED = [name for name in OPTIMIZERS if "m" in OPTIMIZERS[name].Options.model_fields]
RULES: dict[str, dict[str, Any]] = {  # how an optimizer is called: on whole batches, or on chunks of 8 rows
    **{name: {"opt": name, **({"sam_m": "batch"} if name in CHUNKED else {})} for name in OPTIMIZERS},
    **{f"{name}, m=8": {"opt": name, "sam_m": 8} for name in CHUNKED},
}
KINDS = ("sgd", "sam", "sam, m=8", "esam", "j-sam", "msam")  # whole or not, beginning at w or not, by rows or not
PAIRS = [(method, rule) for method in RECIPES for rule in KINDS]
PAIRS += [("elr", rule) for rule in RULES if rule not in KINDS]
PAIRS += [("co-teaching", rule) for rule in ("saf", "mesa", "saner, m=8", "f-sam", "looksam")]
COVER = {  # what `make test` runs: each method whole and by chunks, each optimizer with and without a plan
    *((method, rule) for method in RECIPES for rule in ("sgd", "sam, m=8")),
    *(("ce", name) for name in OPTIMIZERS),
    *(("elr", f"{name}, m=8" if name in CHUNKED else name) for name in OPTIMIZERS),
    ("co-teaching", "saf"),  # two networks with an optimizer's own memory of each sample
    ("co-teaching", "looksam"),  # and with a direction kept from step to step
    ("dividemix", "j-sam"),  # rows that are mixed, perturbed a part at a time
    ("elr", "msam"),  # a plan, and a first evaluation that is not at w
    ("cdr", "wsam, m=8"),  # the method transforms a gradient of which the optimizer keeps a part
    ("sop", "esam"),  # the method's own parameters, and gradients of a part of the rows
}
SPLIT = [
    pytest.param(*pair, marks=() if pair in COVER else pytest.mark.slow)
    for pair in [*PAIRS, *sorted(COVER - set(PAIRS))]
]
NOT_REPEATABLE = {"time", "train_seconds", "eval_seconds", "log_seconds", "images_per_second"}

Configure = Callable[..., RunConfig]


def configuration(digits: Configure, method: str, rule: str, **values: Any) -> RunConfig:
    plain: dict[str, Any] = {"train_subset": None, "val_fraction": 0.25, "batch": ROWS}
    options = {"opt_option": AT_ONCE.get(RULES[rule]["opt"], {})}
    settings = {**plain, **options, **RULES[rule], **values}
    return digits(method=method, method_option=OWN_OPTIONS.get(method, {}), **settings)


@pytest.fixture(scope="module")
def images(make_dataset: Callable[..., Dataset]) -> Dataset:
    return make_dataset(train=64)  # 48 of them to train on


def training(config: RunConfig, dataset: Dataset, store: Path) -> Run:
    """A run before its first step, as ``fit`` makes it."""
    problem = prepare(config, dataset)
    folder = RunFolder(store, config.key(problem.digests))
    problem.save_labels(folder)
    return Run(config, problem, problem.digests, folder)


def snapshot(method: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.named_buffers()}


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def forward(module: torch.nn.Module, task: Task) -> Tensor:
    """Logits of a task's rows, of each of their views where they have several."""
    if task.inputs.ndim == 4:
        return module(task.inputs)
    parts = task.inputs.split(task.forwards or task.inputs.shape[1], 1)
    return torch.cat([module(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in parts], 1)


class Witness:
    """Watches a run step by step and checks what the contract says."""

    def __init__(self, run: Trainer) -> None:
        self.run, self.method, self.plans, self.losses = run, run.method, 0, 0
        self.written: dict[str, Tensor] = {}
        self.loss, self.plan, self.step = run.method.loss, run.method.plan, run.step
        run.step = self.checked_step  # type: ignore[method-assign]
        run.method.loss = self.checked_loss  # type: ignore[method-assign]
        if self.plan is not None:
            run.method.plan = self.checked_plan

    def draws(self) -> list[Any]:
        assert self.method.generator is not None
        return [
            self.method.generator.get_state().tolist(),
            self.method.rng.bit_generator.state,
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
        ]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for learner in self.run.learners for p in learner.net.params]

    def checked_step(self, batch: Batch, rate: float, sums: Tensor) -> int:
        """State is written once, by the plan; no other part of a step touches it."""
        self.at_w, self.plans_before, before = self.weights(), self.plans, snapshot(self.method)
        self.written = before
        steps = self.step(batch, rate, sums)
        assert self.plans - self.plans_before == (self.plan is not None)
        assert equal(snapshot(self.method), self.written), "state was written outside of the plan"
        return steps

    def checked_plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """The plan sees every network at its unperturbed weights, before any of them moved, and no graph."""
        self.plans += 1
        assert all(torch.equal(a, b) for a, b in zip(self.weights(), self.at_w, strict=True)), "weights moved"
        for task, z in zip(tasks, logits, strict=True):
            assert not z.requires_grad
            with torch.no_grad():
                clean = forward(copy.deepcopy(self.run.learners[task.network].net.module), task)
            assert torch.equal(clean, z), "the plan's logits are not those at the unperturbed weights"
        assert self.plan is not None
        self.plan(tasks, logits)
        self.written = snapshot(self.method)

    def checked_loss(self, logits: Tensor, task: Task) -> Tensor:
        """Called twice it gives the same bits; it writes nothing and draws nothing."""
        self.losses += 1
        state, draws, plan = snapshot(self.method), self.draws(), copy.copy(task.plan)
        plan = {k: v.clone() if isinstance(v, Tensor) else v for k, v in plan.items()}
        first = self.loss(logits, task)
        second = self.loss(logits, task)
        assert torch.equal(first, second)
        assert first.shape == (len(logits),)
        assert equal(snapshot(self.method), state), "the loss wrote state"
        assert self.draws() == draws, "the loss drew a random number"
        assert equal(task.plan, plan), "the loss changed the plan"
        return first


def passes(method: str, rule: str, line: dict[str, Any]) -> tuple[float, float]:
    """Rows that an epoch should have put through forward and backward, from how the method works."""
    name = RULES[rule]["opt"]
    member = OPTIMIZERS[name]
    forwards, backwards = member.cost(member.Options(**AT_ONCE.get(name, {})))
    saved = member.begins_at_w and RULES[rule].get("sam_m") != 8
    if name == "mesa" and line["epoch"] == 0:
        forwards -= 1
    if name == "ssam-f":  # its Fisher information, once an epoch, from a batch's worth of rows
        forwards, backwards = forwards + 1 / STEPS, backwards + 1 / STEPS
    plans = compose(method).plan is not None
    if method in DIVIDE and line["epoch"] == 1:
        # for each labelled row of a batch it looks at four rows itself, at two with the other network
        rows, images = line["steps"] * ROWS, DIVIDE[method]
        looks = SAMPLES * 2 + rows * 6
        return looks + rows * images * (forwards + (plans and not saved)), rows * images * backwards
    rows = line["steps"] * ROWS * VIEWS.get(method, lambda line: compose(method).views)(line)
    aside = ASIDE.get(method, lambda line: 0)(line)
    return round(rows * (forwards + (plans and not saved)) + aside, 9), round(rows * backwards, 9)


# rows that a method puts through forward beside its tasks in an epoch: looks, and passes over the training set
ASIDE: dict[str, Callable[[dict[str, Any]], int]] = {
    "mentormix": lambda line: STEPS * ROWS,
    "elr+": lambda line: 2 * STEPS * ROWS,
    "m-dyr-h": lambda line: (SAMPLES + STEPS * ROWS) * (line["epoch"] == 1),
    "o2u": lambda line: SAMPLES * ((line["stage"], line["epoch"]) == (2, 1)),
    "ssr": lambda line: 2 * SAMPLES,
    "promix": lambda line: (2 * SAMPLES + 2 * STEPS * ROWS) * (line["epoch"] == 1),
    "jo-src": lambda line: 2 * STEPS * ROWS * (line["epoch"] == 1),
}


class Stop(Exception):
    """Pulls the plug."""


class Interrupt:
    """Ends a run after the first epoch of its last stage."""

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def step(self, stage: int, epoch: int, number: int, of: int) -> None: ...

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        if (stage, number) == (self.stage, 0):
            raise Stop


@pytest.mark.parametrize(("method", "rule"), SPLIT)
def test_contract(method: str, rule: str, digits: Configure, images: Dataset, tmp_path: Path) -> None:
    """One watched run, and the same one interrupted and taken up again."""
    config = configuration(digits, method, rule)
    run = training(config, images, tmp_path / "whole")
    witness = Witness(run.trainer)
    result = run.fit()
    stages = run.lines[-1]["stage"] + 1
    assert len(run.lines) == EPOCHS.get(method, 2 * stages)
    assert witness.losses > 0
    for line in run.lines:
        assert line["skipped_steps"] == 0
        assert math.isfinite(line["train_loss"])
        if (method, line["stage"]) in CHOOSE:  # as many rows, and steps, as it chose samples
            continue
        if method not in DIVIDE or line["epoch"] != 1:
            assert line["steps"] == STEPS * compose(method).networks
        assert (line["forward_samples"], line["gradient_samples"]) == passes(method, rule, line)

    with pytest.raises(Stop):
        fit(config, dataset=images, store=tmp_path / "parts", progress=Interrupt(stages - 1))
    resumed = fit(config, dataset=images, store=tmp_path / "parts")
    assert resumed.key == result.key
    left, right = (load_file(r.folder / "weights.safetensors") for r in (result, resumed))
    assert equal(left, right)
    assert repeatable(result.folder) == repeatable(resumed.folder)
    assert resumed.record["results"] == RunFolder(tmp_path / "whole", result.key).record["results"]


def repeatable(folder: Path) -> list[dict[str, str]]:
    """epochs.csv without its clock; nan as text, so that it equals itself."""
    lines = RunFolder(folder.parent, folder.name).epochs
    return [{k: repr(v) for k, v in line.items() if k not in NOT_REPEATABLE} for line in lines]


@pytest.mark.parametrize("method", [method for method in RECIPES if method not in OF_TRAINING])
def test_state_after_one_step_does_not_depend_on_the_optimizer(
    method: str, digits: Configure, images: Dataset, tmp_path: Path
) -> None:
    """One step on the whole training set from the same weights: the buffers are those that sgd's one forward writes."""
    written = {}
    for rule in KINDS:
        config = configuration(digits, method, rule, batch=SAMPLES, epochs=1)
        run = training(config, images, tmp_path)
        run.fit()
        written[rule] = snapshot(run.trainer.method)
    for rule in KINDS:
        assert equal(written[rule], written["sgd"]), rule
    if method == "elr":
        assert (written["sgd"]["targets"].sum(1) > 0).all()


def test_weights_do_depend_on_the_optimizer(digits: Configure, images: Dataset, tmp_path: Path) -> None:
    """The pairs above are different trainings, not one under several names."""
    results = []
    for rule in RULES:
        folder = fit(configuration(digits, "ce", rule), dataset=images, store=tmp_path).folder
        results.append(torch.cat([v.flatten().float() for v in load_file(folder / "weights.safetensors").values()]))
    for i, left in enumerate(results):
        assert not any(torch.equal(left, right) for right in results[:i])


@pytest.mark.parametrize("method", METHODS)
def test_options_have_published_defaults_and_words(method: str) -> None:
    """A method can be built with nothing said, and each option says what it is."""
    chosen = method_options(method, {})
    compose(method)(chosen, RunInfo(samples=4, classes=2, epochs=1, device=torch.device("cpu"), rate=0.5))
    assert all(field.description for field in type(chosen).model_fields.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_say_what_they_are(name: str) -> None:
    member = OPTIMIZERS[name]
    assert member.source
    assert member.__doc__
    assert all(passes >= 1 for passes in member.cost(member.Options()))
    assert set(member.requires) <= set(REQUIREMENTS)
    assert set(member.null) <= set(member.Options.model_fields)
    assert all(field.description for field in member.Options.model_fields.values())


def reachable(value: Any, seen: set[int]) -> Iterator[Tensor | np.ndarray]:
    """The arrays that attributes and containers lead to, functions apart."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from reachable(part, seen)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from reachable(part, seen)
    elif (hasattr(value, "__dict__") and not callable(value)) or isinstance(value, torch.nn.Module):
        yield from reachable(vars(value), seen)


@pytest.mark.parametrize("method", RECIPES)
def test_no_clean_label_reaches_a_method(method: str, digits: Configure, images: Dataset, tmp_path: Path) -> None:
    """Neither its own attributes nor a batch lead to the clean labels, of all samples or of the batch's."""
    run = training(configuration(digits, method, "sgd", noise=0.5, epochs=1), images, tmp_path)
    problem = run.trainer.problem
    noisy = problem.noisy.take(problem.train)
    clean, own = torch.from_numpy(noisy.clean), run.trainer.method.tasks
    assert (clean != torch.from_numpy(noisy.labels)).sum() > 10
    batches = 0

    def watched(batch: Batch, look: Any) -> Sequence[Task]:
        nonlocal batches
        batches += 1
        tasks = own(batch, look)
        for array in reachable([run.trainer.method, batch, tasks], set()):
            values = torch.as_tensor(array).flatten()
            if values.is_floating_point() or values.dtype == torch.bool:
                continue
            assert not (len(values) == len(clean) and torch.equal(values.long(), clean))
            assert not (len(values) == len(batch.index) and torch.equal(values.long(), clean[batch.index]))
        return tasks

    run.trainer.method.tasks = watched  # type: ignore[method-assign]
    run.fit()
    assert batches
