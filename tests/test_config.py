"""The configuration: what it refuses is in test_cli_errors.py; here what it becomes, and what its key depends on."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisysam.core.errors import UserError
from noisysam.runs.config import SCHEMA, RunConfig, Unkeyed, validate
from noisysam.runs.presets import FORET

DIGESTS = {"data": "d" * 64, "labels": "1" * 64}
PLUGIN = __file__  # any Python file that registers nothing
ANOTHER: dict[str, Any] = {  # another value of each field that is part of the key
    "sync_perturbation": True,
    "dataset": "digits",
    "augment": "none",
    "train_subset": 100,
    "subset_seed": 1,
    "val_fraction": 0.2,
    "noise": 0.4,
    "noise_type": "pair",
    "noise_seed": 7,
    "noise_draw": "bernoulli",
    "model": "resnet8",
    "width": 2.0,
    "pretrained": PLUGIN,
    "norm": "group",
    "plugin": PLUGIN,
    "method": "gce",
    "method_option": {"q": 0.5},
    "label_smoothing": 0.1,
    "opt": "esam",
    "opt_option": {"rho": 0.3},
    "rho": 0.2,
    "sam_m": 16,
    "ascent_steps": 2,
    "bn": "last",
    "base_opt": "adamw",
    "lr": 0.05,
    "momentum": 0.5,
    "nesterov": False,
    "weight_decay": 1e-3,
    "l2": "loss",
    "clip": 5.0,
    "schedule": "step",
    "milestones": [0.5, 150],
    "lr_factor": 0.5,
    "decay_from": 0.4,
    "final_momentum": 0.1,
    "period": 5,
    "lr_min": 1e-3,
    "warmup": 2.0,
    "batch": 64,
    "epochs": 100,
    "ema": 0.99,
    "seed": 1,
    "eval_every": 5,
    "precision": "fp32",
}
WITH = {
    "method_option": {"method": "gce"},
    "opt_option": {"opt": "sam"},
    "rho": {"opt": "sam"},
    "sam_m": {"opt": "sam"},
    "ascent_steps": {"opt": "sam"},
    "milestones": {"schedule": "milestones", "milestones": [0.5]},
    "lr_factor": {"schedule": "milestones", "milestones": [0.5]},
    "decay_from": {"schedule": "linear"},
    "final_momentum": {"schedule": "linear"},
    "period": {"schedule": "restarts"},
}
UNKEYED: dict[str, Any] = {
    "data_dir": "/elsewhere",
    "image_size": 16,
    "device": "cpu",
    "compile": "on",
    "deterministic": True,
    "snapshots": 2,
}


def key(**values: Any) -> str:
    """The key of a configuration on data that are always the same."""
    return validate(values).key(DIGESTS)


# the key


def test_every_field_is_here() -> None:
    unkeyed = {n for n, f in RunConfig.model_fields.items() if any(isinstance(m, Unkeyed) for m in f.metadata)}
    assert unkeyed == {*UNKEYED, "preset"}
    assert set(ANOTHER) == set(RunConfig.model_fields) - unkeyed


@pytest.mark.parametrize("name", ANOTHER)
def test_the_key_changes_with(name: str) -> None:
    others = WITH.get(name, {})
    assert key(**{**others, name: ANOTHER[name]}) != key(**others)


def test_different_values_have_different_keys() -> None:
    keys = {name: key(**{**WITH.get(name, {}), name: value}) for name, value in ANOTHER.items()}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("name", UNKEYED)
def test_the_key_does_not_change_with(name: str) -> None:
    assert key(**{name: UNKEYED[name]}) == key()


@pytest.mark.parametrize("name", sorted(set(ANOTHER) - {"noise_seed"}))
def test_a_default_may_be_spelled_out(name: str) -> None:
    default = RunConfig.model_fields[name].default
    assert key(**{name: default}) == key()
    if isinstance(default, int | float) and not isinstance(default, bool):
        assert key(**{name: str(default)}) == key(), "as the command line gives it"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"opt": "sam"}, {"opt": "sam", "rho": 0.1, "sam_m": 32}),
        ({"opt": "sam"}, {"opt": "sam", "opt_option": {"rho": "0.1", "m": "32"}}),
        ({"opt": "sam", "rho": 0.2}, {"opt": "sam", "opt_option": {"rho": "0.20"}}),
        ({"opt": "sam", "sam_m": "batch"}, {"opt": "sam", "opt_option": {"m": "batch"}}),
        ({"opt": "sam", "ascent_steps": 2}, {"opt": "sam", "opt_option": {"ascent_steps": 2}}),
        ({"method": "mixup", "method_option": {"alpha": 8}}, {"method": "mixup", "method_option": {"alpha": "8.0"}}),
        ({"method": "bootstrap"}, {"method": "bootstrap", "method_option": {"teacher": "last"}}),
        ({"method": "bootstrap,mixup"}, {"method": "bootstrap, mixup"}),
        ({"seed": 3}, {"seed": 3, "noise_seed": 3}),
        ({"width": 2}, {"width": "2.0"}),
        ({"schedule": "milestones", "milestones": [100, 150]}, {"schedule": "milestones", "milestones": "100, 150.0"}),
    ],
)
def test_the_same_run_written_in_two_ways(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert key(**short) == key(**long)


def test_rho_paper_keeps_a_key_of_its_own() -> None:
    """It is an oracle: a blind run with the same radius is another run, though the weights are the same."""
    assert validate({"opt": "sam", "rho": "paper", "noise": 0.4}).rho_value == 0.1
    assert key(opt="sam", rho="paper", noise=0.4) != key(opt="sam", rho=0.1, noise=0.4)


def test_the_place_of_a_file_is_not_keyed_but_its_digest_is() -> None:
    here, there = ({"dataset": f"npz:/{place}/own.npz", "noise_type": f"file:/{place}/l.npz"} for place in "ab")
    assert key(**here) == key(**there)
    assert validate(here).key({**DIGESTS, "data": "e" * 64}) != key(**here)
    assert validate(here).key({**DIGESTS, "labels": "2" * 64}) != key(**here)
    assert key(dataset="npz:/a/own.npz") != key()


def test_the_key_depends_on_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    from noisysam import methods, models, noise, optim

    before = key(), key(opt="sam"), key(method="bootstrap,mixup")
    monkeypatch.setattr(optim.OPTIMIZERS["sam"], "revision", 99)
    monkeypatch.setattr(methods.METHODS["mixup"], "revision", 99)
    after = key(), key(opt="sam"), key(method="bootstrap,mixup")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    monkeypatch.setattr(models.MODELS["resnet32"], "revision", 99)
    assert key() != before[0]
    monkeypatch.undo()
    monkeypatch.setattr(noise.NOISE["symmetric"], "revision", 99)
    assert key() != before[0]


def test_the_key_is_a_digest_of_plain_facts() -> None:
    """Computed again here: whoever has the record can check its key."""
    config = validate({"opt": "sam", "noise": 0.8, "seed": 2, "dataset": "digits", "rho": 0.05})
    content = {
        "schema": SCHEMA,
        "config": {"dataset": "digits", "noise": 0.8, "noise_seed": 2, "opt": "sam", "opt_option": {"rho": 0.05},
                   "seed": 2},
        "revisions": {"method ce": 1, "optimizer sam": 1, "model resnet32": 1, "noise symmetric": 1},
        "digests": DIGESTS,
    }  # fmt: skip
    assert config.keyed() == content["config"]
    text = json.dumps(content, sort_keys=True)
    assert config.key(DIGESTS) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_keys_are_what_they_were() -> None:
    """A changed key orphans every stored run: raise SCHEMA on purpose, and change these with it."""
    assert SCHEMA == 1
    assert key() == "4138877a2641edc2"
    values = {"preset": "foret", "dataset": "cifar100", "noise": 0.8, "opt": "sam", "rho": "paper", "seed": 4}
    assert key(**values, method="bootstrap,mixup", method_option={"alpha": 8}) == "fb9481bdbd0aaa22"


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(1e-6, 10), batch=st.integers(1, 4096), noise=st.floats(0, 1), seed=st.integers(0, 2**40),
    rho=st.floats(0, 1),
)  # fmt: skip
def test_a_record_gives_its_key_back(lr: float, batch: int, noise: float, seed: int, rho: float) -> None:
    config = validate({"lr": lr, "batch": batch, "noise": noise, "seed": seed, "opt": "sam", "rho": rho})
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert validate(stored) == config
    assert validate(stored).key(DIGESTS) == config.key(DIGESTS)
    as_text = {n: str(v) for n, v in stored.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert validate({**stored, **as_text}).key(DIGESTS) == config.key(DIGESTS)


# values that hang on others


def test_noise_seed_is_the_seed_unless_given() -> None:
    assert validate({}).noise_seed == 0
    assert validate({"seed": "5"}).noise_seed == 5
    assert validate({"seed": 5, "noise_seed": -1}).noise_seed == 5
    assert validate({"seed": 5, "noise_seed": "-1"}).noise_seed == 5
    assert validate({"seed": 5, "noise_seed": 0}).noise_seed == 0
    assert validate({"noise_seed": 9}).seed == 0


def test_none_means_not_given() -> None:
    assert validate({"lr": None, "model": None, "preset": None}) == validate({})


def test_adam_and_adamw_have_a_rate_of_their_own() -> None:
    assert validate({"base_opt": "adam"}).lr == 1e-3
    assert validate({"opt": "adamw"}).lr == validate({"opt": "sam", "base_opt": "adamw"}).lr == 1e-3
    assert validate({"opt": "adamw", "lr": 0.1}).lr == 0.1
    assert validate({"opt": "sam"}).lr == 0.1


def test_foret() -> None:
    """arXiv 2010.01412: section 3.3, appendix C.1 and google-research/sam."""
    config = validate({"preset": "foret"})
    assert (config.model, config.batch, config.clip, config.l2) == ("resnet32-wide", 256, 5.0, "loss")
    assert (config.nesterov, config.schedule, config.epochs) == (True, "cosine", 200)
    assert "arXiv 2010.01412" in FORET.source
    assert set(FORET.differs) >= {"lr", "weight_decay", "m", "noise_type", "rho", "selection"}


def test_flags_override_a_preset() -> None:
    config = validate({"preset": "foret", "batch": 128, "model": "resnet8", "clip": None})
    assert (config.batch, config.model, config.clip, config.l2) == (128, "resnet8", 5.0, "loss")


def test_a_preset_is_its_values() -> None:
    spelled = FORET.values
    assert key(preset="foret") == key(**spelled)
    assert key(preset="foret", batch=128) == key(**{**spelled, "batch": 128})
    assert key(preset="foret") != key()


def test_rho_value() -> None:
    rates = {0.0: 0.1, 0.2: 0.1, 0.6: 0.1, 0.79: 0.1, 0.8: 0.05, 0.9: 0.05}
    for noise, rho in rates.items():
        assert validate({"opt": "sam", "rho": "paper", "noise": noise}).rho_value == rho
    assert validate({"opt": "sam", "rho": "0.3"}).rho_value == 0.3
    assert validate({"opt": "sam"}).rho_value is None


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        validate({}).lr = 1.0  # type: ignore[misc]


# oracle or blind


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, []),
        ({"opt": "sam", "rho": 0.05, "noise": 0.8}, []),
        ({"opt": "sam", "rho": "paper"}, ["rho"]),
        ({"method": "co-teaching"}, ["co-teaching knows the noise rate"]),
        ({"method": "co-teaching", "method_option": {"forget_rate": 0.2}}, []),
        ({"method": "co-teaching", "opt": "sam", "rho": "paper"}, ["co-teaching knows the noise rate", "rho"]),
        ({"method": "bootstrap", "method_option": {"teacher": "selected"}}, []),
        ({"method": "bootstrap,mixup", "method_option": {"alpha": 8}}, []),
        ({"method": "dividemix"}, []),
        ({"preset": "foret", "opt": "sam"}, []),
    ],
)
def test_oracle(values: dict[str, Any], words: list[str]) -> None:
    reasons = validate(values).oracle()
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason


# messages


def test_where_leads_the_line() -> None:
    for values in ({"lr": 0}, {"opt": "sma"}, {"lrr": 1}, {"preset": "x"}):
        with pytest.raises(UserError, match=r"^row 'a': ") as caught:
            validate(values, where="row 'a': ")
        assert len(str(caught.value).splitlines()) == 1
