"""The settings of one training: the fields of a run's configuration that a method may change for a stage."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from noisysam.core.validation import explain

BaseRule = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["cosine", "step", "constant", "milestones", "linear", "restarts"]

SCHEDULE_FIELDS: dict[ScheduleName, tuple[str, ...]] = {  # beside lr, epochs and warmup
    "cosine": ("lr_min",),
    "step": (),
    "constant": (),
    "milestones": ("milestones", "lr_factor"),
    "linear": ("decay_from", "final_momentum"),
    "restarts": ("period", "lr_min"),
}


class StageSettings(BaseModel):
    """Names and types of the settings that a stage may have of its own; None: those of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int | None = Field(default=None, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    opt: str | None = None
    base_opt: BaseRule | None = None
    lr: float | None = Field(default=None, gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    l2: Literal["descent", "loss"] | None = None
    clip: float | None = Field(default=None, gt=0)
    schedule: ScheduleName | None = None
    milestones: list[float] | None = None
    lr_factor: float | None = Field(default=None, ge=0)
    lr_min: float | None = Field(default=None, ge=0)
    decay_from: float | None = Field(default=None, ge=0)
    final_momentum: float | None = Field(default=None, ge=0, lt=1)
    period: float | None = Field(default=None, gt=0)
    warmup: float | None = Field(default=None, ge=0)
    ema: float | None = Field(default=None, ge=0, lt=1)


def check_stage_settings(settings: Any) -> None:
    """``ValueError`` names a setting that no stage has, or whose value is of the wrong type."""
    try:
        StageSettings.model_validate(dict(settings))
    except ValidationError as error:
        raise ValueError(f"settings of a stage: {explain(error, prefix='')}") from None


def share(point: float, epochs: int) -> float:
    """A point of a training that is given in epochs, or below 1 as a share of them, as a share."""
    return point if point < 1 else point / epochs
