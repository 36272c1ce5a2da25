"""The base class of every optimizer, and what the members of the SAM family share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from noisysam.core.errors import OptionError, UserError
from noisysam.core.objective import Closure, Objective
from noisysam.core.registry import Registry, class_fault
from noisysam.core.settings import BaseRule
from noisysam.core.task import Average, Rows
from noisysam.core.validation import explain


def _fault(item: Any) -> str | None:
    """Why a class cannot be an optimizer."""
    fault = class_fault(item, SharpnessAware)
    if fault is None and not issubclass(item.Options, Options):
        fault = "Options must inherit from noisysam.optim.Options"
    if fault is None and not hasattr(item, "copies"):
        fault = "copies is missing: its memory beyond SGD's, in copies of the weights"
    options = item.Options.model_fields if fault is None else {}
    unknown = [name for name in item.null if name not in options] if fault is None else []
    return f"null names {unknown[0]!r}, which is none of its options" if unknown else fault


OPTIMIZERS: Registry[type["SharpnessAware"]] = Registry("optimizer", _fault)


LARGEST_OPTION = 1e30  # of a number, so that it fits float32


Factor = Tensor | float | Sequence[float]  # one number, or one for each tensor


class Passes(NamedTuple):
    """Forward and backward passes of the whole batch in one step, on average over a schedule of steps."""

    forwards: float
    backwards: float


class Options(BaseModel):
    """The options of one optimizer; the defaults are the published values."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Radius(Options):
    """Options of the optimizers with a perturbation radius. Below a certain radius, precision ``auto`` is float32."""

    rho: float = Field(0.1, ge=0, allow_inf_nan=False, description="radius of the perturbation (L2, over all weights)")


class Chunked(Radius):
    """Options of the optimizers that compute one perturbation for each chunk of m rows."""

    m: Annotated[int, Field(ge=1)] | Literal["batch"] = Field(
        32, description="rows that share one perturbation (m-sharpness, arXiv 2010.01412, section 4.1), or batch"
    )


class SharpnessAware(torch.optim.Optimizer):
    """A torch optimizer around a base rule: SGD, Adam or AdamW. A subclass defines the gradient that it steps with.

    It is used like torch's own optimizers, with a closure because the loss is evaluated more than once::

        optimizer = noisysam.optim.SAM(model.parameters(), lr=0.1, rho=0.1)
        for x, y in loader:
            def closure():
                with noisysam.optim.update_statistics_once(model, optimizer):  # needed with batch norm only
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

    Gradients are cleared before each call of the closure, so it need not call ``zero_grad``. Every option of the
    optimizer is in ``param_groups`` beside ``lr``: schedulers may change it, and a group may have its own value where
    ``per_group`` names the option. Mixed precision is bfloat16 autocast, without a ``GradScaler``.

    This class implements norms, the exact restoration of weights, chunks of m rows, the finite check (on the device,
    without synchronization), clipping, weight decay and the base step. ``param_groups`` and ``state`` are those of the
    base rule; ``state_dict`` also holds what the subclass remembers, never a perturbation.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    revision: ClassVar[int]
    Options: ClassVar[type[Options]] = Options
    passes: ClassVar[tuple[str, str]] = ("2", "2")  # forwards and backwards per step, as printed; see ``cost``
    copies: ClassVar[float]  # peak memory of a step beyond SGD's, state included, in copies of the weights
    null: ClassVar[dict[str, Any]] = {}  # options with which a step equals the base rule's, bit for bit
    requires: ClassVar[tuple[str, ...]] = ()  # of REQUIREMENTS, beyond gradients
    keeps: ClassVar[tuple[str, ...]] = ()  # names of what is remembered from one step to the next, per parameter
    per_group: ClassVar[tuple[str, ...]] = ("rho",)  # options that may differ between param groups
    begins_at_w: bool = True  # whether the first evaluation is of given rows at the unperturbed weights

    def __init__(
        self,
        params: Any,
        *,
        base: BaseRule = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        l2: Literal["descent", "loss"] = "descent",
        clip: float | None = None,
        **options: Any,
    ) -> None:
        """Create the optimizer and its base rule.

        ``params``: tensors, (name, tensor) pairs as of ``named_parameters()``, or param groups. ``nesterov``: False as
        in torch.optim.SGD (runs of this package pass True). ``betas``, ``eps``: of Adam and AdamW; the default betas
        are (momentum, 0.999). Adam adds its weight decay to the gradient, AdamW to the step. ``l2``: weight decay in
        the base step, or as L2 in the loss of every evaluation (google-research/sam). ``clip``: largest global norm of
        the step's gradient. ``options``: fields of ``Options``.
        """
        self.given = frozenset(options)
        chosen = checked(type(self), options)
        self.l2 = weight_decay if l2 == "loss" else 0.0
        decay = 0.0 if l2 == "loss" else weight_decay
        params = list(params)
        if base == "sgd":
            if betas is not None:
                raise ValueError("betas is an option of Adam: give base='adam' or 'adamw', or momentum for SGD")
            self.base: torch.optim.Optimizer = torch.optim.SGD(
                params, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=decay, fused=True
            )
        else:
            betas = betas or (momentum, 0.999)
            rule = torch.optim.Adam if base == "adam" else torch.optim.AdamW
            self.base = rule(params, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)
        super().__init__(self.base.param_groups, {**self.base.defaults, **chosen.model_dump()})
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.clip = clip
        self.transform_gradient: Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]] | None = None
        self.average: Average = list  # of a step's gradient over processes
        self.generator: torch.Generator | None = None  # of this epoch's draws; None: torch's global generator
        self.epoch, self.epochs, self.samples = 0, 1, 0  # set by ``on_epoch``
        self.steps = 0  # taken or skipped
        self.evaluations = 0  # calls of the closure in the present step
        self.memory: dict[str, list[Tensor]] = {name: [] for name in self.keeps}  # for every parameter, frozen or not
        self.gathered: dict[str, list[Tensor]] = {}  # of the present step
        self.share = 1.0  # of the present chunk in its batch
        device = self.param_groups[0]["params"][0].device
        self.found_inf = torch.zeros((), device=device)  # 1 if the last step was skipped
        self.skipped = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)  # of the last step's gradient, before clipping
        self.seen: list[tuple[Any, ...]] = []
        self.follow_parameters()

    # what a subclass defines

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        """The gradient that the base rule steps with, for these rows of the batch."""
        raise TypeError(f"{type(self).__name__} does not define gradient()")

    def update(self, grads: list[Tensor]) -> None:
        """Move the weights: the base rule's step. ``grads`` is transformed and clipped."""
        self.descend(grads)

    def arrange(self) -> None:
        """Called when the set of trainable parameters, their type or their device has changed."""

    def remembered(self, param: Tensor) -> Tensor:
        """The first value of what ``keeps`` names."""
        return torch.zeros_like(param)

    def on_epoch(self, epoch: int, epochs: int, samples: int) -> None:
        """Called at the start of an epoch with the number of epochs and of training samples. Only optimizers with a
        schedule, or with state per sample, need it."""
        self.epoch, self.epochs, self.samples = epoch, epochs, samples

    @classmethod
    def cost(cls, options: Any) -> Passes:
        """Passes of a step under these options; ``passes`` is the same as text."""
        return Passes(2, 2)

    # what a subclass uses

    @property
    def options(self) -> BaseModel:
        """The present values of the options: those of the first param group."""
        group = self.param_groups[0]
        return self.Options.model_construct(**{name: group[name] for name in self.Options.model_fields})

    def by_group(
        self, value: Callable[[dict[str, Any]], float], params: Sequence[Tensor] | None = None
    ) -> float | list[float]:
        """A number computed from each param group: one number where all groups agree, else one per parameter."""
        values = [value(group) for group in self.param_groups]
        if all(v == values[0] for v in values):
            return values[0]
        of = {id(p): v for group, v in zip(self.param_groups, values, strict=True) for p in group["params"]}
        return [of[id(p)] for p in (self.params if params is None else params)]

    def radius(self, sign: float = 1.0, params: Sequence[Tensor] | None = None) -> float | list[float]:
        """The option ``rho`` of each param group, with a sign."""
        return self.by_group(lambda group: sign * group["rho"], params)

    def in_turn(self, first: float, later: float) -> Tensor:
        """``first`` in the first step that is not skipped, ``later`` in all others; a 0-d tensor on the device."""
        weight = self.params[0]
        return torch.where(self.skipped == self.steps, weight.new_full((), first), weight.new_full((), later))

    def unit(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors divided by their global norm; zeros if it is zero."""
        norm = global_norm(tensors)
        return scaled(tensors, torch.where(norm > 0, 1 / norm, norm))

    def noise(self) -> list[Tensor]:
        """Standard normal draws in the shapes of the weights, from this epoch's stream."""
        return [torch.randn(p.shape, generator=self.generator, device=p.device, dtype=p.dtype) for p in self.params]

    @contextmanager
    def restored(self, params: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Weights may be moved within the block; afterwards they are restored exactly, from a copy."""
        params = self.params if params is None else params
        saved = [p.detach().clone() for p in params]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(params), saved)
                torch.clear_autocast_cache()

    @torch.no_grad()
    def move(
        self, direction: Sequence[Tensor], radius: float | list[float] = 1.0, params: Sequence[Tensor] | None = None
    ) -> None:
        """Add ``radius * direction`` to the weights, within a block of ``restored``."""
        if isinstance(radius, list):
            direction, radius = scaled(direction, radius), 1.0
        torch._foreach_add_(list(self.params if params is None else params), list(direction), alpha=radius)
        torch.clear_autocast_cache()  # an autocast block of the caller may hold casts of the previous weights

    @contextmanager
    def at(
        self, direction: Sequence[Tensor], radius: float | list[float] = 1.0, params: Sequence[Tensor] | None = None
    ) -> Iterator[None]:
        """The weights moved by ``radius * direction`` within the block; afterwards restored exactly."""
        with self.restored(params):
            self.move(direction, radius, params)
            yield

    def both(self, objective: Objective, rows: Rows, radius: float | list[float]) -> tuple[list[Tensor], list[Tensor]]:
        """SAM's two gradients: at the weights, and at ``radius`` along the first."""
        g = objective.grad(rows)
        with self.at(self.unit(g), radius):
            return g, objective.grad(rows)

    def prepared(self, grads: list[Tensor]) -> list[Tensor]:
        """A gradient as the base rule gets it: transformed by the method, then clipped."""
        grads = self.transformed(grads)
        return grads if self.clip is None else clipped(grads, self.clip, global_norm(grads))

    def transformed(self, grads: list[Tensor]) -> list[Tensor]:
        """A gradient after the method's ``transform_gradient``, if it has one."""
        return grads if self.transform_gradient is None else self.transform_gradient(grads, self.params)

    def descend(self, grads: Sequence[Tensor]) -> None:
        """The base rule's step with a prepared gradient; it does nothing if this step is skipped. As in torch, a
        parameter that no evaluation of the loss used is left alone, weight decay included."""
        for p, g, used in zip(self.params, grads, self.used, strict=True):
            p.grad = g if used else None
        self.base.found_inf = self.found_inf  # type: ignore[attr-defined]  # read by torch's fused rules
        self.base.step()

    def gather(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep tensors of this step: over chunks, the mean weighted by their share of the rows. ``update`` finds them
        in ``self.gathered``; the next step gets them from ``recall`` if ``keeps`` has the name. A skipped step leaves
        the memory unchanged. The step is skipped unless all that is gathered is finite."""
        self.gathered[name] = self._add(self.gathered.get(name), tensors)

    def recall(self, name: str) -> list[Tensor]:
        """What ``gather`` kept in an earlier step, for the trainable parameters."""
        return [self.memory[name][i] for i in self.trainable]

    # what this class implements

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. Its options are validated; those not given have their defaults."""
        checked(type(self), {name: param_group[name] for name in self.Options.model_fields if name in param_group})
        super().add_param_group(param_group)
        if hasattr(self, "seen"):
            self.follow_parameters()

    def follow_parameters(self) -> None:
        """Adapt to parameters that were added, frozen, unfrozen, cast or moved since the last step."""
        every = [p for group in self.param_groups for p in group["params"]]
        seen = [(id(p), p.requires_grad, p.dtype, p.device) for p in every]
        if seen == self.seen:
            return
        names = [n for group in self.param_groups for n in group.get("param_names", [""] * len(group["params"]))]
        self.trainable = [i for i, p in enumerate(every) if p.requires_grad]
        self.params: list[Tensor] = [every[i] for i in self.trainable]
        self.names = [names[i] for i in self.trainable]
        self.used = [True] * len(self.params)
        if "names" in self.requires and not all(self.names):
            raise UserError(f"optimizer {self.name} needs the names of the parameters: pass model.named_parameters()")
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and key != "step":  # AdamW's counter stays float32
                        state[key] = value.to(p.device, p.dtype)
                if group.get("momentum") and p.requires_grad and "momentum_buffer" not in state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)  # none may be missing if a step is skipped
        for kept in (self.memory[name] for name in self.keeps):
            kept[:] = [old.to(p.device, p.dtype) for old, p in zip(kept, every, strict=False)]
            kept += [self.remembered(p) for p in every[len(kept) :]]
        self.found_inf, self.skipped, self.norm = (
            t.to(every[0].device) for t in (self.found_inf, self.skipped, self.norm)
        )
        self.arrange()
        self.seen = seen

    def whole(self, rows: int) -> bool:
        """Whether a step on ``rows`` rows starts with all of them at the unperturbed weights, so that the forward pass
        made for planning can serve as its first evaluation."""
        return self.begins_at_w and self._m(rows) >= rows

    def _m(self, rows: int) -> int:
        m = getattr(self.options, "m", "batch")
        return rows if m == "batch" else min(int(m), rows)

    def _add(self, total: list[Tensor] | None, part: Sequence[Tensor]) -> list[Tensor]:
        """The sum over chunks so far, each weighted by its share."""
        if self.share == 1:
            return list(part)
        if total is None:
            return list(torch._foreach_mul(list(part), self.share))
        torch._foreach_add_(total, list(part), alpha=self.share)
        return total

    def _chunks(self, rows: int | None) -> list[tuple[Rows, float]]:
        if rows is None:
            if "m" in self.given and getattr(self.options, "m", "batch") != "batch" and "rows" not in self.requires:
                raise ValueError("a closure cannot be divided into chunks of m rows: leave m out, or give m='batch'")
            return [(None, 1.0)]
        m = self._m(rows)
        if m == rows:
            return [(None, 1.0)]
        return [(slice(i, min(i + m, rows)), min(m, rows - i) / rows) for i in range(0, rows, m)]

    def _check_step(self, closure: Any) -> None:
        if closure is None:
            raise TypeError(f"optimizer {self.name}: step() needs a closure, because it evaluates the loss itself")
        if not self.params:
            raise UserError(f"optimizer {self.name}: no parameter requires a gradient, so there is nothing to train")
        first, *others = self.param_groups
        for option in self.Options.model_fields:
            if option not in self.per_group and any(group[option] != first[option] for group in others):
                raise UserError(f"optimizer {self.name}: option {option} must be the same in all param groups")

    def _counted(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            self.zero_grad()  # whether the closure does it or not
            self.evaluations += 1
            return closure()

        return evaluate

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step on an ``Objective`` or a closure; returns the mean loss at the first evaluation.

        A gradient that is not finite skips the whole step: weights, momentum and step count are unchanged.
        """
        self.follow_parameters()
        self._check_step(closure)
        self.evaluations = 0
        given = isinstance(closure, Objective)
        objective = closure if given else Closure(self._counted(closure), self.params)
        objective.l2 = self.l2
        self.zero_grad()  # frees the memory of the last step's gradient
        self.gathered = {}
        total: list[Tensor] | None = None
        for rows, share in self._chunks(objective.rows):
            self.share = share
            total = self._add(total, self.gradient(objective, rows))  # type: ignore[arg-type]
        assert total is not None
        self.used = [True] * len(self.params) if given else objective.used
        total = self.average(total)
        self.gathered = {name: self.average(kept) for name, kept in self.gathered.items()}
        grads = self.transformed(total)
        self.norm = global_norm(grads)
        sound = torch.isfinite(self.norm)
        for kept in self.gathered.values():
            sound = sound & torch.isfinite(global_norm(kept))
        self.found_inf = (~sound).float()
        self.skipped += self.found_inf
        self.update(grads if self.clip is None else clipped(grads, self.clip, self.norm))
        for name in self.keeps:
            for i, new in zip(self.trainable, self.gathered.get(name, ()), strict=False):
                self.memory[name][i] = torch.where(sound, new, self.memory[name][i])
        self.steps += 1
        self.gathered = {}
        return objective.first_loss

    @property
    def _step_supports_amp_scaling(self) -> bool:  # torch.amp.GradScaler reads it before it calls ``step``
        raise UserError(
            f"optimizer {self.name} does not support GradScaler: train in torch.autocast(dtype=torch.bfloat16), which"
            " needs no scaler"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base rule's state, what the subclass remembers and the counts of steps; no perturbation."""
        return {
            "name": self.name,
            "base": self.base.state_dict(),
            "memory": self.memory,
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of the same optimizer; ``UserError`` if it is of another one."""
        if state_dict.get("name") != self.name:
            raise UserError(f"the state is of optimizer {state_dict.get('name')!r}, not of {self.name!r}")
        before = self.param_groups
        self.base.load_state_dict(state_dict["base"])
        self.param_groups, self.state = self.base.param_groups, self.base.state
        for group, old in zip(self.param_groups, before, strict=True):
            for key, value in old.items():  # a state may be from a time when the groups held less
                group.setdefault(key, value)
        device = self.skipped.device
        self.memory = {name: [t.to(device, copy=True) for t in kept] for name, kept in state_dict["memory"].items()}
        self.steps = state_dict["steps"]
        self.skipped.copy_(state_dict["skipped"])
        self.seen = []
        self.follow_parameters()

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but torch's hooks, for copies and pickles."""
        hooks = ("step", "_optimizer_", "_zero_grad_profile_name")
        return {key: value for key, value in self.__dict__.items() if not key.startswith(hooks) or key == "steps"}


@contextmanager
def update_statistics_once(model: nn.Module, optimizer: SharpnessAware) -> Iterator[None]:
    """In a closure: batch norm updates its running statistics only in the first evaluation of each step."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    frozen = layers if optimizer.evaluations > 1 else []
    try:
        for layer in frozen:
            layer.track_running_stats = False
        yield
    finally:
        for layer in frozen:
            layer.track_running_stats = True


def checked(optimizer: type[SharpnessAware], values: Mapping[str, Any]) -> Options:
    """Validated options of an optimizer; ``UserError`` names the one that is wrong."""
    try:
        options = optimizer.Options(**values)
    except ValidationError as error:
        known = optimizer.Options.model_fields
        raise OptionError("optimizer", optimizer.name, explain(error, "option ", known)) from None
    for name, value in options:
        if isinstance(value, float) and abs(value) > LARGEST_OPTION:
            raise OptionError("optimizer", optimizer.name, f"option {name}: should be at most {LARGEST_OPTION:g}")
    return options


def scaled(tensors: Sequence[Tensor], factor: Factor) -> list[Tensor]:
    """Each tensor times one number, or its own."""
    return list(torch._foreach_mul(list(tensors), factor))


def clipped(grads: Sequence[Tensor], bound: float, norm: Tensor) -> list[Tensor]:
    """The gradient of this norm scaled down to ``bound`` if it is longer."""
    return scaled(grads, torch.clamp(bound / norm, max=1.0))


def plus(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Factor) -> list[Tensor]:
    """``tensors + factor * others``."""
    return list(torch._foreach_add(list(tensors), scaled(others, factor)))


def along(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The projection of ``tensors`` on ``others``; zeros if those are zero."""
    square = inner(others, others)
    return scaled(others, torch.where(square > 0, inner(tensors, others) / square, square))


def inner(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The inner product over all tensors, a 0-d tensor."""
    return torch.stack([t.sum() for t in torch._foreach_mul(list(tensors), list(others))]).sum()


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all tensors, a 0-d float32 tensor (float64 for float64 tensors)."""
    norms = torch._foreach_norm(list(tensors))
    wide = [n if n.dtype == torch.float64 else n.float() for n in norms]
    return torch.linalg.vector_norm(torch.stack(wide))
