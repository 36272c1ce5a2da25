"""Noise-robust methods. Each is one class, registered where it is defined."""

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, create_model

from noisysam.core.errors import UserError
from noisysam.methods import (  # noqa: F401  (they register)
    adacorr,
    augdesc,
    backward,
    bootstrap,
    cal,
    cdr,
    ce,
    co_learning,
    co_teaching,
    co_teaching_plus,
    cores2,
    cores2_consistency,
    decoupling,
    disc,
    dividemix,
    elr,
    elr_plus,
    f_divergence,
    forward,
    gce,
    gce_truncated,
    gjs,
    incv,
    jo_src,
    jocor,
    joint_optimization,
    label_smoothing,
    longremix,
    m_dyr_h,
    mae,
    mentormix,
    mentornet,
    mixup,
    nce_rce,
    nlnl,
    nts,
    o2u,
    peer,
    pencil,
    pes,
    pes_semi,
    pgdf,
    plc,
    promix,
    reed,
    rog,
    sce,
    selc,
    sop,
    sop_plus,
    ssr,
    t_revision,
    unicon,
    volminnet,
)
from noisysam.methods.base import METHODS, Method, Options, RunInfo, Stage, StageContext, parse, validated
from noisysam.methods.recipe import PublishedRecipe, scaled_options

__all__ = [
    "METHODS", "Method", "Options", "PublishedRecipe", "RunInfo", "Stage", "StageContext", "compose", "noise_facts",
    "options", "parse", "scaled_options", "without_stages",
]  # fmt: skip


@cache
def compose(name: str) -> type[Method]:
    """The class of a method, or of several joined by commas.

    'bootstrap,mixup' is a class that inherits from both: Bootstrap says the stages, Mixup the tasks. Two parts that
    both override the same hook are refused.
    """
    parts = [METHODS[part] for part in parse(name)]
    if len(parts) == 1:
        return parts[0]
    owner: dict[str, str] = {}
    for part in parts:
        for hook in HOOKS:
            if definer(part, hook) is not Method and owner.setdefault(hook, part.name) != part.name:
                raise UserError(f"methods {owner[hook]} and {part.name} do not combine: both define {hook}")
        if parts.count(part) > 1:
            raise UserError(f"method {part.name} is given twice: name it once")
    for part, other in itertools.combinations(parts, 2):
        if both := set(part.Options.model_fields) & set(other.Options.model_fields):
            raise UserError(f"methods {part.name} and {other.name} do not combine: both have an option {min(both)}")
    for part, other in itertools.permutations(parts, 2):
        if "index" in part.requires and "index" not in other.provides:
            raise UserError(f"methods {part.name} and {other.name} do not combine: rows of {other.name} have no index")
    own = tuple(part.Options for part in parts if part.Options is not Options)
    fields = create_model("Options", __base__=own or (Options,))

    def published(cls: type[Method], dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {k: v for part in parts for k, v in part.published(dataset, noise_type, noise).items()}

    body: dict[str, Any] = {
        "Options": fields,
        "name": name,
        "published": classmethod(published),
        "smooths": all(part.smooths for part in parts),
        "requires": tuple(dict.fromkeys(need for part in parts for need in part.requires)),
        "provides": tuple(what for what in Method.provides if all(what in part.provides for part in parts)),
    }
    if sum(definer(part, "published_recipe") is not Method for part in parts) > 1:
        body["published_recipe"] = vars(Method)["published_recipe"]  # nobody published the combination
    return type(name, tuple(parts), body)


def definer(part: type[Method], hook: str) -> type[Any]:
    """The class that defines a hook for a method: its own, or a base of it."""
    return next((cls for cls in part.__mro__ if hook in vars(cls)), Method)


HOOKS = (  # of which one part alone may have its own
    "stages", "on_stage", "auxiliary_optimizer", "on_epoch", "subset", "on_evaluation", "batches", "tasks", "plan",
    "loss", "transform_gradient", "outputs", "networks",
)  # fmt: skip


def options(name: str, given: Mapping[str, Any]) -> BaseModel:
    """The checked options of a method; ``UserError`` names the option that does not fit."""
    return validated(name, compose(name), given)


def noise_facts(name: str, chosen: Any) -> tuple[str, ...]:
    """The noise facts that a method is given under these options."""
    return tuple(fact for part in parse(name) for fact in METHODS[part].noise_facts(chosen))


def without_stages(name: str) -> str:
    """The parts of a method that act within a stage, without those that define the stages; 'ce' where none is left."""
    return ",".join(part for part in parse(name) if METHODS[part].stages is Method.stages) or "ce"
