"""The published recipe of a method: what its authors trained with, and what that becomes in a run of another length."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from noisysam.core.settings import BaseRule, ScheduleName, StageSettings


class CountedInEpochs:
    """Marks an option that counts epochs: a published recipe of another length scales it."""


Epochs = Annotated[int, CountedInEpochs()]
"""Type of an option that counts epochs of the run (a warm-up, a ramp)."""


class PublishedRecipe(StageSettings):
    """How the authors of a method trained it on one problem, at the length of their own training.

    A method returns it from ``published_recipe``; what it does not name is left to the run (fields that are None), and
    options of the method are those of ``published``. ``model`` is None where their network is not in this package.

    ``source``: where this was read: repository @ commit, files; or the paper, with its section. ``differs``: what the
    authors did that a run does not, by topic.
    """

    source: str
    differs: Mapping[str, str] = Field(default={})
    model: str | None = None
    augment: Literal["none", "standard", "color", "rand"]
    batch: int = Field(ge=1)
    epochs: int = Field(ge=1)
    base_opt: BaseRule = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(ge=0)
    schedule: ScheduleName

    def at(self, epochs: int | None = None) -> dict[str, Any]:
        """Fields of a run's configuration, for a training of this many epochs (None: as published).

        This is the one place that scales a recipe; ``scaled_options`` does the same to the options of the method.
        What the authors give in epochs keeps its share of the training: warm-up, milestones, the beginning of a linear
        decay, the period of restarts, and the memory of a weight average, whose decay d becomes d^(published / epochs).
        Rates, momentum, weight decay, batch and clipping do not change. What counts in steps stays as it is.
        """
        values = self.model_dump(exclude_none=True, exclude={"source", "differs"})
        if epochs is None or epochs == self.epochs:
            return values
        values["epochs"] = epochs
        for name in ("decay_from", "period"):
            if name in values:
                values[name] = values[name] / self.epochs
        if "milestones" in values:
            values["milestones"] = [point / self.epochs for point in values["milestones"]]
        if "warmup" in values:
            values["warmup"] = values["warmup"] * epochs / self.epochs
        if "ema" in values:
            values["ema"] = values["ema"] ** (self.epochs / epochs)
        return values


def scaled_options(kind: type[BaseModel], published: Mapping[str, Any], length: float) -> dict[str, Any]:
    """Published options of a method in a training ``length`` times as long as the authors': those of type ``Epochs``
    keep their share of it, at least one epoch where they are not 0."""
    options = dict(published)
    for name, field in kind.model_fields.items():
        if any(isinstance(m, CountedInEpochs) for m in field.metadata):
            count = options.get(name, field.default)
            scaled = max(1, round(count * length)) if count else count
            if name in options or scaled != field.default:
                options[name] = scaled
    return options
