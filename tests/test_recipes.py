"""Published recipes: what the authors' scripts say, schedules beside torch's and theirs, and other lengths."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler, MultiStepLR

from noisysam import fit, methods
from noisysam.core.settings import StageSettings
from noisysam.methods import METHODS, Method, PublishedRecipe
from noisysam.methods.pes import PES
from noisysam.report.tables import read_cells
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.presets import published
from noisysam.runs.record import RunFolder
from noisysam.studies import plan as plans
from noisysam.training.schedule import learning_rate, momentum
from noisysam.training.trainer import Trainer

RECIPES = sorted(name for name, cls in METHODS.items() if cls.published_recipe("cifar10", "symmetric", 0.4) is not None)
WITHOUT = {"ce", "bootstrap", "mae", "reed-soft", "reed-hard", "decoupling"}  # no script for these data of the authors
PROBLEMS = [
    (dataset, noise_type, noise)
    for dataset in ("cifar10", "cifar100", "digits")
    for noise_type in ("symmetric", "symmetric-exclusive", "asymmetric", "pair", "instance")
    for noise in (0.2, 0.4, 0.6, 0.8, 0.9)
]


def rates(config: RunConfig, steps: int = 1, **stage: Any) -> list[float]:
    """The learning rate at each step of a training."""
    return [learning_rate(config, step / steps, 1 / steps, **stage) for step in range(config.epochs * steps)]


def torchs(make: Callable[[torch.optim.Optimizer], LRScheduler], lr: float, epochs: int) -> list[float]:
    """The rate of each epoch under a scheduler of torch's."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(epochs):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


# schedules


@pytest.mark.parametrize(("milestones", "factor"), [([100, 150], 0.1), ([40, 80, 199], 0.01), ([76.8], 0.9)])
def test_milestones(milestones: list[float], factor: float) -> None:
    config = validate({"schedule": "milestones", "milestones": milestones, "lr_factor": factor, "lr": 0.02})
    expected = torchs(lambda o: MultiStepLR(o, [math.ceil(m) for m in milestones], factor), 0.02, 200)
    np.testing.assert_allclose(rates(config), expected, rtol=1e-12)


@pytest.mark.parametrize("epochs", [30, 120, 150, 200, 300])
def test_milestones_as_shares(epochs: int) -> None:
    """Every epoch, given as a share of the training, falls on itself."""
    for epoch in range(1, epochs):
        values = {"schedule": "milestones", "epochs": epochs, "milestones": [epoch / epochs]}
        found = rates(validate(values))
        assert found[epoch - 1] == 0.1
        assert found[epoch] == pytest.approx(0.01)


@pytest.mark.parametrize(("period", "epochs"), [(10, 150), (7, 30), (0.1, 70)])
def test_restarts(period: float, epochs: int) -> None:
    values = {"schedule": "restarts", "period": period, "lr": 0.02, "lr_min": 1e-3, "epochs": epochs}
    length = round(period * epochs) if period < 1 else period
    expected = torchs(lambda o: CosineAnnealingWarmRestarts(o, int(length), eta_min=1e-3), 0.02, epochs)
    np.testing.assert_allclose(rates(validate(values)), expected, rtol=1e-9)


def test_restarts_within_an_epoch() -> None:
    """torch's scheduler takes parts of epochs too."""
    config = validate({"schedule": "restarts", "period": 3, "lr": 0.02, "lr_min": 1e-3, "epochs": 9})
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.02)
    scheduler, expected = CosineAnnealingWarmRestarts(optimizer, 3, eta_min=1e-3), []
    for step in range(90):
        scheduler.step(step / 10)
        expected.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates(config, steps=10), expected, rtol=1e-9)


def test_cosine_to_a_minimum() -> None:
    config = validate({"lr": 0.02, "lr_min": 4e-4, "epochs": 300})
    expected = torchs(lambda o: CosineAnnealingLR(o, 300, eta_min=4e-4), 0.02, 300)
    np.testing.assert_allclose(rates(config), expected, rtol=1e-9)
    assert learning_rate(config, 300, 0.1) == pytest.approx(4e-4)


@pytest.mark.parametrize("begin", [80, 100])
def test_linear_decay_is_co_teachings(begin: int) -> None:
    """Its main.py: (n - i) / (n - begin) of the rate in epoch i >= begin, and beta1 is 0.1 from there on."""
    values = {"schedule": "linear", "decay_from": begin, "final_momentum": 0.1, "lr": 1e-3, "base_opt": "adam"}
    config = validate(values)
    expected = [1e-3 * (1 if i < begin else (200 - i) / (200 - begin)) for i in range(200)]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-12)
    assert [momentum(config, i) for i in range(200)] == [0.9] * begin + [0.1] * (200 - begin)
    assert learning_rate(config, 200, 0.1) == 0


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_earlier_schedules_are_what_they_were(schedule: str) -> None:
    """Bit for bit, by their closed forms."""
    config = validate({"schedule": schedule, "epochs": 40, "warmup": 2.5, "lr": 0.3})
    for step in range(400):
        progress = step / 10
        done = (progress - 2.5) / 37.5
        expected = {
            "cosine": 0.3 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
            "step": 0.3 * 0.1 ** ((done >= 0.5) + (done >= 0.75)),
            "constant": 0.3,
        }[schedule]
        if progress < 2.5:
            expected = 0.3 * min(1.0, (progress + 0.1) / 2.5)
        assert learning_rate(config, progress, 0.1) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "milestones", "milestones": [100, 150]},
        {"schedule": "linear", "decay_from": 80},
        {"schedule": "restarts", "period": 10},
    ],
)
def test_a_shorter_stage_has_the_whole_schedule(values: dict[str, Any]) -> None:
    """Points in epochs of the run keep their share of a stage with epochs of its own."""
    run = validate(values)
    stage = run.model_copy(update={"epochs": 50})
    assert rates(stage, steps=4, run_epochs=200) == pytest.approx(rates(run))


# recipes by the authors' scripts


def values_of(method: str, *problem: Any, epochs: int | None = None) -> dict[str, Any]:
    found = published(method, *problem, epochs)
    assert found is not None
    return found.values


SYMMETRIC, ASYMMETRIC = ("cifar10", "symmetric", 0.4), ("cifar10", "asymmetric", 0.4)
HUNDRED = ("cifar100", "symmetric", 0.4)
SGD = {"base_opt": "sgd", "momentum": 0.9, "nesterov": False}
ADAM = {"base_opt": "adam", "lr": 1e-3, "momentum": 0.9, "final_momentum": 0.1, "weight_decay": 0.0, "epochs": 200,
        "batch": 128, "augment": "none", "schedule": "linear"}  # fmt: skip


def steps(lr: float, decay: float, batch: int, epochs: int, milestones: list[float], factor: float = 0.1) -> Any:
    """SGD whose rate falls at some epochs."""
    found = {**SGD, "lr": lr, "weight_decay": decay, "batch": batch, "epochs": epochs, "schedule": "milestones"}
    return {**found, "milestones": milestones} | ({} if factor == 0.1 else {"lr_factor": factor})


# of the scripts named in each recipe, as read there
SCRIPTS: list[tuple[str, tuple[str, str, float], dict[str, Any], dict[str, Any]]] = [
    ("pes", SYMMETRIC, {**steps(0.1, 1e-4, 128, 200, [100, 150]), "model": "resnet18"}, {"schedule": "continued"}),
    ("pes", HUNDRED, {"model": "resnet34"}, {"schedule": "continued", "first": 30 / 200}),
    ("co-teaching", SYMMETRIC, {**ADAM, "decay_from": 80, "model": "cnn9"}, {"schedule": "code"}),
    ("co-teaching", HUNDRED, {**ADAM, "decay_from": 100}, {"schedule": "code"}),
    ("co-teaching+", SYMMETRIC, {**ADAM, "decay_from": 80}, {"schedule": "code"}),
    ("co-teaching+", HUNDRED, {**ADAM, "decay_from": 80}, {"schedule": "code", "warmup": 5}),
    ("jocor", ASYMMETRIC, {**ADAM, "decay_from": 80}, {"schedule": "code", "forget_rate": 0.2}),
    ("jocor", HUNDRED, {**ADAM, "decay_from": 100}, {"schedule": "code", "strength": 0.85}),
    ("elr", SYMMETRIC, {**SGD, "model": "resnet34", "lr": 0.02, "weight_decay": 1e-3, "batch": 128, "epochs": 150,
                        "schedule": "restarts", "period": 10, "lr_min": 0.001}, {}),
    ("elr", ASYMMETRIC, steps(0.02, 1e-3, 128, 120, [40, 80], 0.01), {"beta": 0.9, "strength": 1.0}),
    ("elr", HUNDRED, steps(0.02, 1e-3, 128, 150, [80, 120], 0.01), {"beta": 0.9, "strength": 7.0}),
    ("elr+", SYMMETRIC, {**steps(0.02, 5e-4, 128, 200, [150]), "model": "preact-resnet18"}, {}),
    ("elr+", HUNDRED, steps(0.02, 5e-4, 128, 250, [200]),
     {"beta": 0.9, "strength": 7.0, "ramp": 0.45, "ema_ramp": 0.45}),
    ("selc", SYMMETRIC, {**steps(0.02, 1e-3, 128, 200, [40, 80]), "model": "resnet34"}, {"start": 0.15}),
    ("sop", SYMMETRIC, {**steps(0.02, 5e-4, 128, 120, [40, 80]), "model": "resnet34"}, {}),
    ("dividemix", ("cifar10", "symmetric", 0.8), {**steps(0.02, 5e-4, 64, 300, [150]), "model": "preact-resnet18"},
     {"lambda_u": 25.0}),
    ("dividemix", ASYMMETRIC, steps(0.02, 5e-4, 64, 300, [150]), {"lambda_u": 0.0, "confidence_penalty": True}),
    ("nce-rce", SYMMETRIC, {**SGD, "lr": 0.01, "weight_decay": 1e-4, "clip": 5.0, "schedule": "cosine", "epochs": 120},
     {"A": math.log(1e-4)}),
    ("nce-rce", HUNDRED, {"lr": 0.1, "weight_decay": 1e-5, "epochs": 200, "clip": 5.0},
     {"A": math.log(1e-4), "alpha": 10.0, "beta": 0.1}),
    ("gce", SYMMETRIC, {**steps(0.01, 1e-4, 128, 120, [40, 80]), "model": "resnet34"}, {}),
    ("gce-truncated", HUNDRED, steps(0.01, 1e-4, 128, 150, [80, 120]), {"start": 80}),
    ("sce", SYMMETRIC, {**steps(0.01, 0.0, 128, 120, [40, 80])}, {"A": math.log(1e-4)}),
    ("mixup", SYMMETRIC, {**steps(0.1, 1e-4, 128, 200, [100, 150]), "model": "preact-resnet18"}, {}),
    ("mentornet", SYMMETRIC, steps(0.1, 2e-4, 128, 100, [50, 64, 76.8]), {}),
    ("mentormix", ("cifar10", "symmetric", 0.8), {"model": "resnet32-wide", "augment": "color", "epochs": 512,
                                                  "lr": 0.1, "lr_factor": 0.9, "ema": 0.9999},
     {"alpha": 4, "percentile": 0.2, "second": True}),
    ("forward", SYMMETRIC, {**steps(0.1, 2e-4, 128, 120, [40, 80]), "model": "resnet32", "l2": "loss"}, {}),
    ("backward", HUNDRED, {**steps(0.1, 2e-3, 128, 150, [80, 120]), "model": "resnet44"}, {"quantile": 1.0}),
    ("incv", ASYMMETRIC, {"base_opt": "adam", "lr": 1e-3, "model": "resnet32", "epochs": 200,
                          "milestones": [80, 120, 160]}, {"remove": 0.0}),
    ("o2u", SYMMETRIC, {"lr": 0.01, "weight_decay": 5e-4, "epochs": 250, "augment": "none", "model": "cnn9"}, {}),
    ("rog", HUNDRED, {**steps(0.1, 5e-4, 128, 200, [80, 120, 160]), "model": "resnet34"}, {}),
    ("ssr", ("cifar10", "symmetric", 0.8), {**SGD, "lr": 0.02, "lr_min": 0.02 / 50, "schedule": "cosine", "epochs": 300,
                                            "weight_decay": 5e-4}, {"theta_r": 0.8}),
    ("cdr", SYMMETRIC, steps(0.01, 1e-3, 64, 200, [40, 80]), {"ramp": 0}),
    ("gjs", SYMMETRIC, {**steps(0.1, 5e-4, 128, 400, [200, 300]), "nesterov": True}, {"pi": 0.9}),
    ("gjs", ("cifar100", "asymmetric", 0.2), {"lr": 0.4, "weight_decay": 1e-4}, {"pi": 0.5}),
    ("m-dyr-h", SYMMETRIC, {**steps(0.1, 1e-4, 128, 300, [100, 250]), "model": "preact-resnet18"}, {}),
    ("peer", SYMMETRIC, {**steps(0.1, 1e-4, 128, 300, [40, 80, 120, 160, 200, 240, 280]), "model": "preact-resnet18"},
     {"alpha": "uniform"}),
    ("peer", ("cifar100", "asymmetric", 0.4), steps(0.1, 5e-4, 128, 250, [60, 100]), {"alpha": "sparse-100"}),
    ("f-divergence", SYMMETRIC, steps(0.1, 5e-4, 128, 340, [85, 170, 255]), {}),
    ("cores2", SYMMETRIC, {**steps(0.1, 0.0, 64, 100, [50]), "momentum": 0.0, "model": "resnet34"}, {}),
    ("cores2-consistency", SYMMETRIC, {"lr": 0.3, "nesterov": True, "warmup": 120, "epochs": 1600, "batch": 320,
                                       "schedule": "cosine", "clip": 5.0, "weight_decay": 5e-4}, {}),
    ("volminnet", HUNDRED, {**steps(0.01, 1e-4, 128, 80, [30, 60]), "model": "resnet34"},
     {"start": 4.5, "rule": "adam"}),
    ("t-revision", SYMMETRIC, {**steps(0.01, 1e-4, 128, 200, [40, 80]), "model": "resnet18"}, {}),
    ("cal", HUNDRED, {**steps(0.1, 5e-4, 128, 100, [60]), "model": "resnet34"}, {"sieve_alpha": 1.0, "scale": 10.0}),
    ("pes-semi", ("cifar10", "instance", 0.4), {**SGD, "lr": 0.02, "lr_min": 2e-4, "weight_decay": 5e-4, "epochs": 300,
                                                "batch": 128, "schedule": "cosine"}, {"lambda_u": 15.0}),
    ("sop+", HUNDRED, {**SGD, "lr": 0.02, "lr_min": 2e-4, "weight_decay": 1e-3, "epochs": 300, "batch": 128,
                       "model": "preact-resnet18"}, {"lr_u": 1.0, "lr_v": 10.0}),
    ("disc", ASYMMETRIC, {**steps(0.1, 1e-3, 128, 200, [80, 160]), "momentum": 0.0}, {"momentum": 0.95}),
    ("disc", ("cifar10", "symmetric", 0.8), {"base_opt": "adam", "lr": 1e-3, "decay_from": 120, "final_momentum": 0.1},
     {"momentum": 0.95, "hard": 0.2}),
    ("promix", ("cifar100", "symmetric", 0.2), {**SGD, "lr": 0.05, "lr_min": 5e-5, "weight_decay": 5e-4, "epochs": 600,
                                                "batch": 256, "model": "resnet18"},
     {"first_share": 0.7, "last_share": 0.7, "tau": 0.95, "warmup": 0.05, "debias": 0.5}),
    ("joint-optimization", SYMMETRIC, steps(0.08, 1e-4, 128, 200, [200 / 3, 400 / 3]), {"retrain_lr": 0.2}),
    ("joint-optimization", ASYMMETRIC, {"lr": 0.03}, {"alpha": 0.8, "beta": 0.4, "retrain_lr": 0.2}),
    ("pencil", SYMMETRIC, steps(0.06, 1e-4, 128, 320, [320 / 3, 640 / 3]), {"last_lr": 0.2}),
    ("nlnl", HUNDRED, {**SGD, "lr": 0.02, "weight_decay": 1e-4, "batch": 128, "epochs": 3 * 720, "model": "resnet34"},
     {"pseudo_lr": 0.1, "negatives": 110}),
    ("adacorr", ("cifar10", "symmetric", 0.8), {"base_opt": "adamw", "lr": 1e-3, "weight_decay": 5e-4, "epochs": 180,
                                                "milestones": [61, 121, 161], "lr_factor": 0.5},
     {"retro": 20 / 180, "correct": 25 / 180}),
    ("plc", SYMMETRIC, {**steps(0.01, 5e-4, 128, 180, [40, 80], 0.5), "nesterov": True}, {}),
    ("co-learning", SYMMETRIC, {**ADAM, "decay_from": 80, "augment": "standard", "model": "resnet18"}, {}),
    ("jo-src", HUNDRED, {**ADAM, "decay_from": 80, "augment": "standard"}, {}),
    ("augdesc", ("cifar10", "symmetric", 0.9), {**steps(0.02, 5e-4, 128, 350, [250]), "model": "preact-resnet18"},
     {"lambda_u": 50.0, "threshold": 0.6, "history": 5}),
    ("augdesc", HUNDRED, steps(0.02, 5e-4, 128, 400, [300]), {"lambda_u": 25.0, "warmup": 30}),
    ("longremix", SYMMETRIC, {**steps(0.02, 5e-4, 64, 300, [150]), "model": "preact-resnet18"}, {"lambda_u": 0.0}),
    ("unicon", HUNDRED, {**SGD, "lr": 0.02, "lr_min": 2e-4, "weight_decay": 5e-4, "batch": 64, "epochs": 350,
                         "schedule": "cosine"}, {"warmup": 30}),
    ("pgdf", ("cifar100", "symmetric", 0.5), steps(0.02, 5e-4, 128, 400, [300]), {"lambda_u": 150.0, "warmup": 30}),
    ("label-smoothing", SYMMETRIC, {**steps(0.1, 1e-4, 128, 200, [100, 150]), "nesterov": True}, {}),
    ("nts", SYMMETRIC, {**steps(0.1, 5e-4, 128, 200, [60, 120, 160], 0.2), "model": "wrn-28-10"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "problem", "settings", "options"), SCRIPTS)
def test_the_authors_numbers(
    method: str, problem: tuple[str, str, float], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    found = values_of(method, *problem)
    assert {name: found.get(name) for name in settings} == settings
    assert found["method_option"] == options


def test_every_method_has_a_recipe_or_none_was_published() -> None:
    named = {method for method, *_ in SCRIPTS}
    ours = {name for name, cls in METHODS.items() if cls.__module__.startswith("noisysam.")}
    for name in ours:
        recipe = METHODS[name].published_recipe("cifar10", "symmetric", 0.4)
        assert (recipe is None) == (name in WITHOUT), name
        if recipe is not None:
            assert any(mark in recipe.source for mark in ("@", "arXiv", "openreview")), "says where it was read"
    assert named <= ours


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_configurations_at_any_length(name: str) -> None:
    for dataset, noise_type, noise in PROBLEMS:
        for epochs in (None, 1, 7, 30, 1000):
            values = {"preset": "published", "method": name, "dataset": dataset, "noise_type": noise_type}
            config = validate({**values, "noise": noise, **({} if epochs is None else {"epochs": epochs})})
            recipe = METHODS[name].published_recipe(dataset, noise_type, noise)
            assert recipe is not None
            assert config.epochs == (epochs or recipe.epochs)
            assert (config.lr, config.batch, config.momentum) == (recipe.lr, recipe.batch, recipe.momentum)
            assert validate(config.model_dump(mode="json")).keyed() == config.keyed(), "as a record has it"


# another length


def test_what_counts_epochs_keeps_its_share() -> None:
    """Co-teaching+ in 100 of 200 epochs: decay from 40, ramp of 5 and warm-up of 10; the rule itself is the same."""
    values = values_of("co-teaching+", *SYMMETRIC, epochs=100)
    assert values["method_option"] == {"schedule": "code", "ramp": 5, "warmup": 10}
    assert values["decay_from"] * 100 == 40
    whole = values_of("co-teaching+", *SYMMETRIC)
    same = ("lr", "momentum", "final_momentum", "weight_decay", "batch", "augment", "base_opt", "schedule")
    assert {name: values[name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.parametrize("name", RECIPES)
def test_rates_at_half_the_length(name: str) -> None:
    """The rate at a share of the training does not depend on its length."""
    recipe = METHODS[name].published_recipe(*SYMMETRIC)
    assert recipe is not None
    values = {"preset": "published", "method": name, "noise": 0.4}
    whole, half = validate(values), validate({**values, "epochs": recipe.epochs // 2})
    for done in (0.0, 0.1, 0.249, 0.251, 0.4, 0.6, 0.76, 0.999):
        left, right = (learning_rate(c, done * c.epochs, 1e-6) for c in (whole, half))
        assert left == pytest.approx(right, rel=1e-4, abs=1e-8), done


def test_small_counts_stay_at_one_and_a_warm_up_of_none_stays_none() -> None:
    values = values_of("dividemix", *SYMMETRIC, epochs=3)
    assert values["method_option"] == {"warmup": 1, "ramp": 1, "lambda_u": 0.0}
    assert values_of("cdr", *SYMMETRIC, epochs=20)["method_option"] == {"ramp": 0}


def test_the_memory_of_an_average_keeps_its_share() -> None:
    """0.9999 of 512 epochs: after a share of the training the same weight is left, whatever the length."""
    ema = values_of("mentormix", *SYMMETRIC, epochs=64)["ema"]
    assert ema**64 == pytest.approx(0.9999**512)


def test_warm_up_is_scaled_in_epochs() -> None:
    recipe = PublishedRecipe(
        source="x", augment="none", batch=8, epochs=100, lr=0.1, weight_decay=0.0, schedule="cosine", warmup=5
    )
    assert recipe.at()["warmup"] == recipe.at(100)["warmup"] == 5
    assert recipe.at(40)["warmup"] == 2


# given values, and combinations


def test_given_values_beat_the_recipe() -> None:
    values = {"preset": "published", "method": "elr+", "noise": 0.4, "dataset": "cifar100"}
    config = validate({**values, "lr": 0.5, "model": "resnet8", "method_option": {"beta": "0.5"}})
    assert (config.lr, config.model, config.weight_decay) == (0.5, "resnet8", 5e-4)
    assert config.method_option == {"beta": "0.5", "strength": 7.0, "ramp": 0.45, "ema_ramp": 0.45}


def test_another_schedule_takes_nothing_from_the_recipes() -> None:
    values = {"preset": "published", "method": "co-teaching", "noise": 0.4}
    config = validate({**values, "schedule": "cosine"})
    assert (config.schedule, config.decay_from, config.final_momentum, config.lr) == ("cosine", 0.0, None, 1e-3)


def test_a_recipe_makes_the_run_an_oracle_of_its_own_key() -> None:
    config = validate({"preset": "published", "method": "sop", "noise": 0.4})
    assert any("published" in reason for reason in config.oracle())
    spelled = validate({**config.model_dump(), "preset": None})
    assert config.key({}) != spelled.key({})
    assert not spelled.oracle()


def test_nobody_published_a_combination() -> None:
    assert methods.compose("nts,mixup").published_recipe(*SYMMETRIC) is None
    assert methods.compose("incv,co-teaching").published(*ASYMMETRIC) == {"remove": 0.0, "schedule": "code"}
    combined = methods.compose("bootstrap,mixup").published_recipe(*SYMMETRIC)
    assert combined == METHODS["mixup"].published_recipe(*SYMMETRIC), "bootstrap has none of its own"


def test_options_alone() -> None:
    """A method whose authors' options are known, but no script of theirs."""

    class Half(Method):
        @classmethod
        def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
            return {"q": noise}

    METHODS.register("half-published", source="a test")(Half)
    try:
        found = published("half-published", noise=0.3)
        assert found is not None
        assert found.values == {"method_option": {"q": 0.3}}
    finally:
        METHODS._items.pop("half-published")


def test_settings_of_a_stage_are_fields_of_a_run() -> None:
    for name, field in StageSettings.model_fields.items():
        own = RunConfig.model_fields[name]
        if name != "milestones":  # whose parts have a limit of their own
            assert field.annotation in (own.annotation, own.annotation | None), name  # type: ignore[operator]
            assert {str(m) for m in field.metadata} <= {str(m) for m in own.metadata}, name


# in a study


def test_a_row_with_options_by_rate_stays_one_row(tmp_path: Path) -> None:
    """SSR+ relabels at 0.9, from half of the labels wrong on at 0.8; with another lr in its row, which is its own."""
    path = tmp_path / "s.yaml"
    path.write_text(
        "base: {dataset: digits, model: resnet8, epochs: 3, preset: published, augment: none}\n"
        "grid: {noise: [0.4, 0.8]}\n"
        "rows: {SSR+: {method: ssr, lr: 0.01}}\n"
    )
    cells = plans.plan(path)
    assert [cell.config.method_option for cell in cells] == [{}, {"theta_r": 0.8}]
    assert {cell.config.lr for cell in cells} == {0.01}
    assert "lr" not in cells[0].for_rate
    assert {"method_option", "batch"} <= set(cells[0].for_rate)
    plans.save(path, cells, tmp_path)
    assert {cell["row"] for cell in read_cells(tmp_path, "s")} == {"SSR+"}


# through the loop


def run(tmp_path: Path, **values: Any) -> tuple[list[dict[str, Any]], RunConfig]:
    small = {"dataset": "digits", "model": "resnet8", "width": 0.25, "train_subset": 60, "batch": 16, "noise": 0.4}
    machine = {"device": "cpu", "precision": "fp32", "compile": "off", "augment": "none"}
    config = validate({"preset": "published", **small, **machine, **values})
    result = fit(config, store=tmp_path)
    assert result.record["status"] == "finished"
    return RunFolder(tmp_path, result.key).epochs, config


def test_pes_goes_on_with_the_schedule(tmp_path: Path) -> None:
    """Of 8 epochs one is the first part and one stands for the refinement; the rate falls at 4 and 6."""
    options = {"second": 3, "third": 3}
    lines, config = run(tmp_path, method="pes", epochs=8, method_option=options)
    assert config.milestones == [0.5, 0.75]
    found = [(line["stage"], round(line["learning_rate"], 6)) for line in lines]
    assert found == [(0, 0.1), (1, 1e-4), (2, 1e-4), *((3, rate) for rate in (0.1, 0.1, 0.01, 0.01, 0.001, 0.001))]


def test_pes_anew_is_as_it_was() -> None:
    info = methods.RunInfo(samples=8, classes=2, epochs=200, device=torch.device("cpu"), steps=351)
    stages = list(PES(PES.Options(), info).stages(None))  # type: ignore[arg-type]
    assert [stage.schedule_epoch for stage in stages] == [None] * 4
    continued = list(PES(PES.Options(schedule="continued"), info).stages(None))  # type: ignore[arg-type]
    assert [stage.schedule_epoch for stage in continued] == [0, None, None, 26]


def test_beta1_falls_with_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Co-teaching in 5 epochs: both networks' Adam has 0.9 for the first two, then 0.1."""
    seen = []
    train = Trainer.train_epoch

    def noted(self: Trainer, epoch: int) -> dict[str, Any]:
        line = train(self, epoch)
        seen.append([g["betas"] for k in self.learners for g in k.optimizer.param_groups])
        assert all(isinstance(k.optimizer.base, torch.optim.Adam) for k in self.learners)
        return line

    monkeypatch.setattr(Trainer, "train_epoch", noted)
    lines, _ = run(tmp_path, method="co-teaching", epochs=5)
    assert seen == [[(0.9, 0.999)] * 2] * 2 + [[(0.1, 0.999)] * 2] * 3
    last = [line["learning_rate"] for line in lines]  # of each epoch's last step, the third of three
    assert last == pytest.approx([1e-3, 1e-3, *(1e-3 * (5 - e - 2 / 3) / 3 for e in (2, 3, 4))])


def test_momentum_of_sgd_may_fall_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train = Trainer.train_epoch

    def noted(self: Trainer, epoch: int) -> dict[str, Any]:
        line = train(self, epoch)
        seen.append(self.learners[0].optimizer.param_groups[0]["momentum"])
        return line

    monkeypatch.setattr(Trainer, "train_epoch", noted)
    run(tmp_path, preset=None, opt="sam", schedule="linear", decay_from=0.5, final_momentum=0.2, epochs=4)
    assert seen == [0.9, 0.9, 0.2, 0.2]
