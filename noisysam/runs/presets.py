"""Published recipes."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from noisysam.core.settings import SCHEDULE_FIELDS


class Preset(BaseModel):
    """A published recipe: its values, and where they are not the authors', what a run does instead."""

    source: str
    values: dict[str, Any]
    differs: dict[str, str]


FORET = Preset(
    source="Foret et al. 2020, arXiv 2010.01412, section 3.3, appendix C.1 and google-research/sam",
    values={
        "model": "resnet32-wide",
        "batch": 256,
        "clip": 5.0,
        "l2": "loss",
        "nesterov": True,
        "schedule": "cosine",
        "epochs": 200,
    },
    differs={
        "lr": "0.1 (the paper's value for WRN-28-10)",
        "weight_decay": "5e-4 (the paper's value for WRN-28-10)",
        "m": "32 (eight devices, batch 256, as in the clean CIFAR runs)",
        "noise_type": "symmetric, over all classes (SGD's 26.2 % at 80 % agrees with no other)",
        "augment": "standard, crop and flip (the default of the released code)",
        "model": "resnet32-wide, after 'following Jiang et al. 2019'",
        "val_fraction": "0.1, noisy, so that an epoch can be selected; the paper does not say what it trains on",
        "selection": "last epoch",
        "rho": "0.1 at every rate (blind); --rho paper gives the paper's choice",
    },
)
PRESETS = ("published", "foret")


def published(
    method: str, dataset: str = "cifar10", noise_type: str = "symmetric", noise: float = 0.0, epochs: int | None = None
) -> Preset | None:
    """The recipe that the authors of a method published for a problem, with their options, for a training of
    ``epochs`` (None: as long as theirs); None where they published none. ``UserError`` for an unknown method."""
    from noisysam import methods

    cls = methods.compose(method)
    kind = dataset.partition(":")[0]
    recipe = cls.published_recipe(kind, noise_type, noise)
    options = cls.published(kind, noise_type, noise)
    if recipe is None:
        if not options:
            return None
        return Preset(source="options alone", values={"method_option": options}, differs={})
    values = recipe.at(epochs)
    options = methods.scaled_options(cls.Options, options, values["epochs"] / recipe.epochs)
    return Preset(source=recipe.source, values={**values, "method_option": options}, differs=dict(recipe.differs))


def preset(name: str, values: Mapping[str, Any]) -> Preset:
    """The preset that a configuration with these values asks for; ``ValueError`` where there is none."""
    if name == "foret":
        return FORET
    if name != "published":
        raise ValueError(f"unknown preset {name!r} (known: {', '.join(PRESETS)})")
    method = str(values.get("method", "ce"))
    found = published(
        method,
        str(values.get("dataset", "cifar10")),
        str(values.get("noise_type", "symmetric")),
        _number(values.get("noise"), float) or 0.0,
        _number(values.get("epochs"), int),
    )
    if found is None:
        raise ValueError(f"method {method} has no published recipe: leave --preset published out")
    return found


def below(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration with those of its preset where they give none.

    Options of the method are merged one by one. Whoever gives another schedule gets none of the preset's fields for it.
    """
    recipe = dict(preset(values["preset"], values).values)
    if "schedule" in recipe and values.get("schedule", recipe["schedule"]) != recipe["schedule"]:
        recipe = {name: value for name, value in recipe.items() if name not in SCHEDULE_FIELDS[recipe["schedule"]]}
    merged = {**recipe, **values}
    if isinstance(values.get("method_option"), Mapping):
        merged["method_option"] = {**recipe.get("method_option", {}), **values["method_option"]}
    return merged


def by_noise(values: Mapping[str, Any]) -> set[str]:
    """The fields that the preset of a configuration sets for the noise at hand, beside those that are given."""
    if values.get("preset") != "published":
        return set()
    recipe = preset("published", values).values
    return (set(recipe) - set(values)) | {"method_option"}


def _number(value: Any, kind: type[Any]) -> Any:
    """A number as the command line or a file gives it; None where it is none, which its own check reports."""
    try:
        return kind(value) if kind(value) > 0 else None
    except (TypeError, ValueError, OverflowError):
        return None
