"""The configuration of a run: typed, validated, keyed. Field names are the command line's flags and the YAML's keys."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from noisysam.core import plugins
from noisysam.core.errors import FieldError, OptionError, UnknownName, UserError
from noisysam.core.requirements import unmet
from noisysam.core.settings import SCHEDULE_FIELDS, BaseRule, ScheduleName
from noisysam.core.untrusted import unusable
from noisysam.core.validation import fault, named
from noisysam.runs import presets
from noisysam.runs.synonyms import SYNONYMS

if TYPE_CHECKING:  # torch, which it needs, takes a second to import
    from noisysam.runs.recipe import Recipe

SCHEMA = 1  # of the configuration and of its key: raised whenever a default changes


FILES = ("npz", "folder", "hf", "torchvision", "file")  # of data sets and labels that are known by their digests


class Unkeyed:
    """Marks a field that does not change the result (where it runs, where its data lie): it is not part of the key."""


def _listed(value: Any) -> Any:
    """The parts of a list that is given as text, as the command line does: '100,150'."""
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Points = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_listed)]


class RunConfig(BaseModel):
    """One run. Every field has a default; ``noisysam run --help`` prints this class."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # data
    dataset: str = Field(
        "cifar10",
        description="cifar10, cifar100, digits, torchvision:NAME, or own data: npz:FILE, folder:DIR, hf:NAME",
    )
    image_size: Annotated[int | None, Unkeyed()] = Field(
        None, ge=4, le=1024, description="pixels that images are resized to, in both directions (default: as they are)"
    )
    data_dir: Annotated[Path | None, Unkeyed()] = Field(
        None, description="folder of the data sets; else NOISYSAM_DATA_DIR, else ./data"
    )
    augment: Literal["none", "standard", "color", "rand", "auto"] = Field(
        "standard", description="none; crop and flip; with colour distortion; RandAugment; AutoAugment and cutout"
    )
    train_subset: int | None = Field(None, ge=2, description="class-balanced number of training images (default: all)")
    subset_seed: int = Field(0, ge=0, description="seed of the choice of --train-subset")
    val_fraction: float = Field(
        0.1, ge=0, lt=0.9, description="share held out with its noisy labels to select an epoch"
    )

    # noise
    noise: float = Field(0.0, ge=0, le=1, description="share of samples selected for a new label")
    noise_type: str = Field(
        "symmetric",
        description="symmetric (over all classes), symmetric-exclusive (over the others), asymmetric, "
        "asymmetric-blocks, pair, instance, "
        "human:SET (CIFAR-N), file:PATH, given (the labels of the data set are noisy)",
    )
    noise_seed: int = Field(-1, ge=-1, description="seed of the noisy labels, apart from --seed (-1: the same number)")
    noise_draw: Literal["exact", "bernoulli"] = Field(
        "exact", description="exact number of selected samples per class, or each by its own draw"
    )

    # network
    model: str = Field(
        "resnet32", description="see `noisysam list models`, or timm:NAME, torchvision:NAME of those libraries"
    )
    pretrained: str | None = Field(
        None, description="weights to begin with: a file, or cache (those of timm:NAME in the local cache)"
    )
    width: float = Field(1.0, gt=0, description="multiplies the number of channels")
    norm: Literal["batch", "group", "none"] = Field("batch", description="normalisation layers")

    # method
    plugin: Path | None = Field(None, description="Python file that registers methods or optimizers of your own")
    method: str = Field("ce", description="see `noisysam list methods`; joined by commas: bootstrap,mixup")
    method_option: dict[str, Any] = Field({}, description="an option of the method, key=value; may be repeated")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="mass spread over all classes in the cross-entropy")

    # optimizer
    opt: str = Field("sgd", description="see `noisysam list optimizers`")
    opt_option: dict[str, Any] = Field({}, description="an option of the optimizer, key=value; may be repeated")
    rho: float | Literal["paper"] | None = Field(
        None, description="radius of the perturbation (default: the member's; sam 0.1); paper: 0.05 from 80 % noise on"
    )
    sam_m: Annotated[int, Field(ge=1, le=2**20)] | Literal["batch"] | None = Field(
        None, description="rows that share one perturbation (default 32), or batch"
    )
    ascent_steps: int | None = Field(
        None, ge=1, le=1000, description="steps of ascent that make the perturbation (default 1)"
    )
    sync_perturbation: bool = Field(
        False, description="over several processes (torchrun): one perturbation for all of them, with --sam-m batch"
    )
    bn: Literal["first", "last", "both"] = Field(
        "first", description="which evaluations of a step update batch norm's running statistics"
    )
    base_opt: BaseRule = Field("sgd", description="the rule that takes the step")
    lr: float = Field(0.1, gt=0, description="peak learning rate (adam, adamw: 0.001)")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum (adam, adamw: beta1)")
    nesterov: bool = Field(True, description="Nesterov momentum")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    l2: Literal["descent", "loss"] = Field(
        "descent", description="weight decay in the step alone, or as L2 in the loss of every evaluation"
    )
    clip: float | None = Field(None, gt=0, description="largest global gradient norm (default: none)")
    schedule: ScheduleName = Field(
        "cosine",
        description="learning rate over the steps: half a cosine; x 0.1 at 50 % and 75 %; constant; x --lr-factor at"
        " --milestones; linear to 0 from --decay-from on; cosines of --period epochs",
    )
    milestones: Points = Field(
        [], description="where schedule milestones lowers the rate: 100,150 in epochs, or below 1 in shares of the run"
    )
    lr_factor: float = Field(0.1, ge=0, description="what schedule milestones multiplies the rate by at each of them")
    decay_from: float = Field(
        0.0, ge=0, description="where schedule linear begins to fall, in epochs, or below 1 as a share of the run"
    )
    final_momentum: float | None = Field(
        None, ge=0, lt=1, description="momentum (beta1) of schedule linear from --decay-from on (default: unchanged)"
    )
    period: float = Field(
        10.0, gt=0, description="length of a cosine of schedule restarts, in epochs, or below 1 as a share of the run"
    )
    lr_min: float = Field(0.0, ge=0, description="rate at the end of a cosine")
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    batch: int = Field(
        128, ge=1, le=2**20, description="images per step; the incomplete last batch of an epoch is dropped"
    )
    epochs: int = Field(200, ge=1, le=10**6, description="epochs of each stage")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that is evaluated (0: off)")
    seed: int = Field(0, ge=0, description="seed of initialisation, order, augmentation")

    # measurement and machine
    eval_every: int = Field(1, ge=1, description="epochs between evaluations; the last ten are always evaluated")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where native and harmless")
    device: Annotated[str, Unkeyed()] = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    compile: Annotated[Literal["auto", "on", "off"], Unkeyed()] = Field("auto", description="torch.compile the network")
    snapshots: Annotated[int, Unkeyed()] = Field(
        0, ge=0, description="epochs between weights that are kept for `noisysam probe` (0: the last ones alone)"
    )
    deterministic: Annotated[bool, Unkeyed()] = Field(False, description="deterministic kernels on CUDA")
    preset: Annotated[str | None, Unkeyed()] = Field(
        None,
        description="a recipe below what is given: foret; published: how the method's authors trained, with their"
        " options for this noise (oracle), scaled to --epochs",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Put the preset below the given values; make defaults that hang on another field explicit."""
        values = {k: v for k, v in dict(values).items() if v is not None}
        for name, value in values.items():
            if (reason := unusable(value)) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: {reason}")
        if isinstance(values.get("plugin"), str | Path):
            plugins.load(Path(values["plugin"]))
        if "preset" in values:
            values = presets.below(values)
        if any(values.get(name) in ("adam", "adamw") for name in ("opt", "base_opt")):
            values.setdefault("lr", 1e-3)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Make the noise seed explicit; check what needs the registries, and what fields say together."""
        from noisysam import models
        from noisysam.methods import Method

        if self.noise_seed == -1:
            object.__setattr__(self, "noise_seed", self.seed)  # frozen for everybody else
        recipe = self.recipe()
        models.check(self.model, self.width, self.norm)
        method = recipe.method
        if recipe.noise.brings_labels and self.noise:
            raise ValueError(f"noise type {recipe.noise.name} brings its own rate: leave --noise out")
        if getattr(recipe.method_options, "teacher", None) == "selected" and not self.val_fraction:
            raise ValueError("teacher=selected needs a validation split: give --val-fraction")
        if self.label_smoothing and not method.smooths:
            raise ValueError(f"method {self.method} does not use label smoothing")
        missing = {
            what: f"{self.method} does not provide it" for what in Method.provides if what not in method.provides
        }
        missing |= {} if self.norm != "none" else {"norm layers": "--norm none leaves it nothing to perturb"}
        parts: dict[str, Any] = {"method": method, "optimizer": recipe.optimizer}
        lack = unmet(parts, missing)
        if lack is not None:
            raise ValueError(lack)
        self._check_schedule()
        if self.l2 == "loss" and (self.base_opt == "adamw" or self.opt == "adamw"):
            raise ValueError("--l2 loss goes with sgd: adamw decouples its weight decay")
        return self

    def _check_schedule(self) -> None:
        """Refuse fields of another schedule than the one chosen, and milestones without any."""
        if self.schedule == "milestones" and not self.milestones:
            raise ValueError("--schedule milestones needs --milestones, such as 100,150")
        if self.milestones != sorted(self.milestones):
            raise ValueError("--milestones: should be in ascending order")
        if self.lr_min > self.lr:
            raise ValueError(f"--lr-min: should be at most --lr, which is {self.lr:g}")
        for name in {field for fields in SCHEDULE_FIELDS.values() for field in fields}:
            if getattr(self, name) != type(self).model_fields[name].default:
                users = [schedule for schedule, fields in SCHEDULE_FIELDS.items() if name in fields]
                if self.schedule not in users:
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} goes with --schedule {' or '.join(users)}, not {self.schedule}")

    @property
    def rho_value(self) -> float | None:
        """The radius as a number; ``paper`` is 0.1, and 0.05 from 80 % on (arXiv 2010.01412, appendix C.1)."""
        if self.rho == "paper":
            return 0.05 if self.noise >= 0.8 else 0.1
        return self.rho

    def recipe(self) -> "Recipe":
        """The components that the names stand for, with their checked options. To be resolved once and passed on."""
        from noisysam.runs.recipe import Recipe

        return Recipe.resolve(
            method=self.method,
            method_option=self.method_option,
            opt=self.opt,
            opt_option=self.opt_option,
            rho=self.rho_value,
            sam_m=self.sam_m,
            ascent_steps=self.ascent_steps,
            model=self.model,
            noise_type=self.noise_type,
        )

    def oracle(self) -> list[str]:
        """What in this configuration depends on the noise facts of this run or on clean labels; empty: blind."""
        reasons = [f"method {self.method} knows the noise {fact}" for fact in self.recipe().noise_facts]
        if self.rho == "paper":
            reasons.append("rho was chosen per noise rate on clean data (arXiv 2010.01412, C.1)")
        if self.preset == "published":
            reasons.append(f"the recipe of method {self.method} is the one published for this noise")
        return reasons

    def keyed(self) -> dict[str, Any]:
        """The fields that change the result and differ from their defaults. Of a file, its digest is in the key, not
        its place; options are as they were understood, not as they were written."""
        recipe = self.recipe()
        unkeyed = {n for n, f in type(self).model_fields.items() if any(isinstance(m, Unkeyed) for m in f.metadata)}
        full = self.model_dump(mode="json", exclude=unkeyed)
        for name in ("dataset", "noise_type"):
            kind = full[name].partition(":")[0]
            full[name] = kind if kind in FILES else full[name]
        full["pretrained"] = self.pretrained and "file"  # whose digest is in the key
        full["plugin"] = None if self.plugin is None else plugins.load(self.plugin)
        if self.preset == "published":  # a run that its preset made oracle is not the blind one with the same options
            full["preset"] = self.preset
        full["method"] = ",".join(part.name for part in recipe.parts)
        full["method_option"] = recipe.method_options.model_dump(mode="json", exclude_defaults=True)
        full["opt_option"] = recipe.optimizer_options.model_dump(mode="json", exclude_defaults=True)
        full |= {
            "rho": "paper" if self.rho == "paper" else None,
            "sam_m": None,
            "ascent_steps": None,
        }  # among the options
        defaults = {n: f.default for n, f in type(self).model_fields.items()}
        return {name: value for name, value in full.items() if value != defaults[name]}

    def key(self, digests: Mapping[str, str]) -> str:
        """16 hex digits that name the run: schema, keyed fields, revisions, digests of the data and of the labels."""
        return key_of(self, self.recipe().revisions, digests)


def key_of(config: RunConfig, revisions: Mapping[str, int], digests: Mapping[str, str]) -> str:
    """The key of a run with components of these revisions, which need not be today's."""
    content = {"schema": SCHEMA, "config": config.keyed(), "revisions": dict(revisions), "digests": dict(digests)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def validate(values: Mapping[str, Any], where: str = "") -> RunConfig:
    """A ``RunConfig`` from plain values; ``FieldError`` names the field. ``where`` is put before the message."""
    for name in values:
        if name not in RunConfig.model_fields:
            near = (
                [SYNONYMS[name]] if name in SYNONYMS else difflib.get_close_matches(name, RunConfig.model_fields, n=1)
            )
            hint = f", did you mean {near[0]}?" if near else ""
            raise FieldError(name, values[name], f"there is no field {named(name)}{hint}", named=True, where=where)
    try:
        return RunConfig(**values)
    except ValidationError as error:
        place, value, reason = fault(error)
        raise FieldError(place and place.partition(".")[0], value, reason, where=where) from None
    except FieldError as error:
        raise FieldError(error.field, error.value, error.reason, error.named, where) from None
    except (UnknownName, OptionError) as error:
        field = FIELDS[type(error), error.kind]
        raise FieldError(field, values.get(field), str(error), named=True, where=where) from None
    except UserError as error:
        raise FieldError(None, None, str(error), where=where) from None


FIELDS = {  # that name components, and their options
    (UnknownName, "method"): "method",
    (UnknownName, "optimizer"): "opt",
    (UnknownName, "model"): "model",
    (UnknownName, "noise type"): "noise_type",
    (OptionError, "method"): "method_option",
    (OptionError, "optimizer"): "opt_option",
}
