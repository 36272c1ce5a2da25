"""The contract of a method: what it sees, what it may decide, and when.

A step runs in this order: ``tasks`` (all that is random, or changes inputs), one forward per task, ``plan`` (decisions
and state, once, at the unperturbed weights), then the optimizer, which evaluates ``loss`` at any weights, as often as
it likes. So ``loss`` must be pure: no state, no draws.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor, nn

from noisysam.core.registry import Registry, call_fault, class_fault
from noisysam.core.requirements import REQUIREMENTS
from noisysam.core.settings import check_stage_settings
from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.recipe import PublishedRecipe


def _fault(item: Any) -> str | None:
    """Why a class cannot be a method."""
    fault = class_fault(item, Method)
    if fault is None and not issubclass(item.Options, BaseModel):
        fault = "Options must inherit from noisysam.methods.Options"
    if fault is None and item.plan is not None:
        fault = call_fault(item.plan, ("self", "tasks", "logits"), "plan")
    unknown = [name for name in (*item.requires, *item.provides) if name not in REQUIREMENTS] if fault is None else []
    return f"{unknown[0]!r} is no requirement (known: {', '.join(REQUIREMENTS)})" if unknown else fault


METHODS: Registry[type["Method"]] = Registry("method", _fault)

Tasks = Sequence[Task]


class Forward(Protocol):
    """Logits (n, K) of network ``k`` as it is trained, without gradient, counted; with ``averaged`` at the moving
    average of its weights, where the method keeps one (``Method.teacher_decay``)."""

    def __call__(self, k: int, inputs: Tensor, averaged: bool = False) -> Tensor: ...


class PredictTrainingSet(Protocol):
    """Logits (n, K), or features (n, d), of network ``k`` for the whole training set: plain inputs (or ``augmented``
    ones, drawn anew by each call), evaluation mode, the averaged weights where averaging is on. Counts as training
    time."""

    def __call__(self, k: int, features: bool = False, augmented: bool = False) -> Tensor: ...


class Options(BaseModel):
    """A method's own settings (``--method-option key=value``), with their published values. One that counts epochs of
    the run has the type ``Epochs``."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_rate(value: float | str | None) -> float | str | None:
    factor = value.removesuffix("x") if isinstance(value, str) else value
    try:
        number = 0.0 if factor is None else float(factor)
    except ValueError:
        number = -1.0
    if not (0 <= number < 1 or (isinstance(value, str) and value.endswith("x") and 0 <= number <= 10)):
        raise ValueError(
            f"should be a share of wrong labels below 1, or a multiple of the run's own such as 0.5x ({value!r})"
        )
    return value if value is None or str(value).endswith("x") else number


Rate = Annotated[float | str | None, AfterValidator(_check_rate)]
"""An option for the noise rate that a method goes by: a number (blind), None for the run's measured rate (oracle), or a
multiple of that such as '0.5x' (oracle, and wrong on purpose)."""


def rate_facts(option: float | str | None) -> tuple[str, ...]:
    """What ``Method.noise_facts`` returns for a ``Rate`` option."""
    return () if isinstance(option, float) else ("rate",)


@dataclass(frozen=True)
class RunInfo:
    """What a method is told about its run. ``rate`` and ``matrix`` of the noise only where the method declares them."""

    samples: int
    classes: int
    epochs: int
    device: torch.device
    steps: int = 1  # of an epoch over all samples
    features: int = 0  # of the network's last layer; 0: unknown
    label_smoothing: float = 0.0
    rate: float | None = None  # measured share of wrong labels
    matrix: Tensor | None = None  # (K, K), row: true class


@dataclass(frozen=True)
class Stage:
    """One training from given labels; never changed after it was given (what each of its epochs draws from is asked of
    ``Method.subset``).

    ``labels``: (n,) classes or (n, K) distributions, None for the noisy ones; ``start``: from new weights, or from
    those of the stage before, of which the last ``fresh`` blocks are drawn anew; ``trainable``: how many of the last
    blocks are trained, None for all; ``frozen``: how many of them are held fixed while all others are trained (the
    blocks, the head last, are those of ``named_blocks``); ``settings``: fields of the run's configuration that this
    stage changes (those of ``core.settings.StageSettings``: epochs, lr, opt, ...; another optimizer has its default
    options); ``schedule_epoch``: the epoch of the run's own learning rate schedule at which this stage begins, None
    where the whole schedule is run through in this stage; ``reusable``: whether the stage is a run by itself, by the
    method's other parts, of which only the predicted classes are used: a finished run then takes its place."""

    labels: Tensor | None = None
    start: Literal["scratch", "continue"] = "scratch"
    fresh: int = 0
    trainable: int | None = None
    frozen: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule_epoch: float | None = None
    reusable: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("scratch", "continue"):
            raise ValueError(f"a stage starts from scratch or continues, not {self.start!r}")
        if self.fresh and self.start == "scratch":
            raise ValueError("fresh blocks are those of a stage that continues: from scratch all are new")
        if min(self.fresh, self.frozen) < 0 or (self.trainable is not None and self.trainable < 1):
            raise ValueError("a stage draws anew or freezes 0 or more blocks, and trains at least 1")
        if self.trainable is not None and self.frozen:
            raise ValueError("a stage names the blocks that it trains or those that it freezes, not both")
        if self.settings.get("epochs", 1) < 1:
            raise ValueError("a stage has at least one epoch")
        check_stage_settings(self.settings)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))


@dataclass(frozen=True)
class StageContext:
    """What ``stages`` may ask for between two stages."""

    predict: Callable[[str], Tensor]
    """``predict(which)``: the reported logits (n, K) of the stage that just ended, for the training set: at its 'last'
    epoch, or at the one 'selected' on noisy validation labels."""


class Method(nn.Module):
    """Cross-entropy on the given labels; every method overrides what differs.

    Per-sample state and counters are buffers, made in ``on_stage``, so that they are saved, moved and reset for free.
    What a method learns beside the network are parameters, made there too; they are never perturbed, and step once a
    batch, by ``auxiliary_optimizer``, with the gradient of each row's first evaluation, summed over the networks.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    revision: ClassVar[int]
    Options: ClassVar[type[BaseModel]] = Options
    networks: ClassVar[int] = 1
    smooths: ClassVar[bool] = True  # whether it uses --label-smoothing
    requires: ClassVar[tuple[str, ...]] = ()  # of REQUIREMENTS; 'features': its loss reads ``task.features``
    provides: ClassVar[tuple[str, ...]] = ("index", "hard labels", "one view")  # of REQUIREMENTS, by its tasks
    views: ClassVar[int] = 1  # images that a row of a task holds
    reported: ClassVar[Literal["logits", "features"]] = "logits"  # what ``outputs`` makes the reported logits from
    headline: ClassVar[Literal["ensemble", "mean of networks"]] = "ensemble"  # whose figures the authors report
    teacher_decay: float = 0.0  # decay of the moving averages of the weights that ``forward`` may see; 0: none are kept

    def __init__(self, options: Any, info: RunInfo) -> None:
        super().__init__()
        self.options, self.info = options, info
        self.epoch = 0
        self.generator: torch.Generator | None = None  # stream 'method' of this epoch, on the device
        self.rng = np.random.default_rng(0)  # the same stream for draws on the host

    @classmethod
    def noise_facts(cls, options: Any) -> tuple[str, ...]:
        """The noise facts of this run that it is given ('rate', 'matrix'); any of them makes the run oracle."""
        return ()

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        """The options that the authors chose for this noise where they differ from the defaults (an oracle's choice:
        ``--preset published``), as they are at the length of the authors' training."""
        return {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe | None:
        """How the authors trained on this problem, with its source; None: they published no training script.

        ``--preset published`` puts it, together with the options of ``published``, below what is given. Written at the
        authors' own length; options that count epochs have the type ``Epochs``, so that they are scaled with it. A
        data set that the authors did not train on has their recipe for CIFAR-10. A subclass that is another method
        overrides it.
        """
        return None

    def stages(self, context: StageContext) -> Iterator[Stage]:
        """The trainings of this method, in order."""
        yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        """A stage begins: make (or reset) the buffers. ``labels``: those of the whole training set."""

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        """An epoch begins."""

    def subset(self) -> Tensor | None:
        """Places in the training set that this epoch draws from, None for all; asked after ``on_epoch``."""
        return None

    def auxiliary_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the method's own parameters, asked for after each ``on_stage``."""
        return None

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        """The batches of an epoch."""
        return epoch

    def tasks(self, batch: Batch, forward: Forward) -> Tasks:
        """What each network learns from in this step; at most one task per network."""
        return [Task(k, batch.inputs, batch.labels, batch.index) for k in range(self.networks)]

    plan: Callable[[Tasks, Sequence[Tensor]], None] | None = None
    """``plan(tasks, logits)``: decide at w, from every task's detached logits; fill ``task.plan``, write state."""

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """Loss of each row (n,), pure. The objective is its mean: a method that selects scales by rows / selected."""
        return self.cross_entropy(logits, task.labels)

    transform_gradient: Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]] | None = None
    """``transform_gradient(grads, params)``: changes the step's gradient before the base rule."""

    def on_evaluation(self, predict: PredictTrainingSet) -> None:
        """The networks are about to be measured."""

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """The reported logits from each network's (or its features); by default the mean of their probabilities."""
        if len(logits) == 1:
            return logits[0]
        return torch.stack([F.log_softmax(z, 1) for z in logits]).logsumexp(0) - torch.tensor(len(logits)).log()

    # helpers

    def rate(self, option: float | str | None) -> float:
        """The number that a ``Rate`` option stands for."""
        if isinstance(option, float):
            return option
        assert self.info.rate is not None
        return min(1.0, self.info.rate * (float(option.removesuffix("x")) if option else 1.0))

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row, with classes or distributions as labels, and the run's label smoothing."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.info.label_smoothing)

    def write(self, buffer: Tensor, index: Tensor, values: Tensor) -> None:
        """Write state for some samples; a value that is not finite leaves the whole batch's state as it was."""
        values = values.to(buffer.dtype)
        buffer[index] = torch.where(torch.isfinite(values).all(), values, buffer[index])


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Distributions (n, K) from classes (n,); distributions pass through."""
    return labels if labels.ndim == 2 else F.one_hot(labels, classes).float()


def parse(name: str) -> list[str]:
    """The names that make up a method: 'bootstrap,mixup' -> ['bootstrap', 'mixup']."""
    return [part.strip() for part in name.split(",")]


def validated(name: str, cls: type[Method], given: Mapping[str, Any]) -> BaseModel:
    """The options of a method class, checked."""
    from pydantic import ValidationError

    from noisysam.core.errors import OptionError
    from noisysam.core.validation import explain

    try:
        return cls.Options(**given)
    except ValidationError as error:
        raise OptionError("method", name, explain(error, "option ", cls.Options.model_fields)) from None
