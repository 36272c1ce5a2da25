"""The base of every optimizer: what a member of the SAM family needs beside its own few lines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from noisysam.core.errors import UserError
from noisysam.core.objective import Closure, Objective
from noisysam.core.registry import Registry
from noisysam.core.task import Average, Rows

OPTIMIZERS: Registry[type["SharpnessAware"]] = Registry("optimizer")

NEEDS = {  # what a member may ask for beyond gradients
    "rows": "losses of single rows",
    "hard labels": "classes as labels, not distributions",
    "one view": "rows of one image",
    "index": "each row's place in the training set",
    "features": "a network with features() and head",
    "norm layers": "a network with normalisation layers",
    "names": "named parameters",
}


class Options(BaseModel):
    """A member's own settings, with their published values."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Radius(Options):
    """Settings of the members that perturb by a radius. Below a certain radius, ``auto`` takes float32."""

    rho: float = Field(0.1, ge=0, allow_inf_nan=False, description="radius of the perturbation (L2, over all weights)")


class Chunked(Radius):
    """Settings of the members that perturb each chunk of m rows for itself."""

    m: Annotated[int, Field(ge=1)] | Literal["batch"] = Field(
        32, description="rows that share one perturbation (m-sharpness, arXiv 2010.01412, section 4.1), or batch"
    )


class SharpnessAware(torch.optim.Optimizer):
    """A torch optimizer around a base rule; a member says how the gradient of a step comes about.

    Usable with a plain closure in anybody's training loop, as torch's own optimizers are::

        optimizer = noisysam.optim.SAM(model.parameters(), lr=0.1, rho=0.1, m="batch")
        for x, y in loader:
            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

    This class owns norms, exact restore, chunks of m rows, the finite check (on the device, without synchronisation),
    clipping, the place of weight decay and the base step. ``param_groups`` are the base's; ``state_dict`` holds the
    base's state and the member's own, never a perturbation.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    revision: ClassVar[int]
    Options: ClassVar[type[Options]] = Options
    passes: ClassVar[tuple[str, str]]  # forwards and backwards of the whole batch per step, in the options' names
    copies: ClassVar[float]  # memory beyond SGD's at the peak of a step, state included, in copies of the weights
    null: ClassVar[dict[str, Any]] = {}  # the options with which a step equals the base's, bit for bit
    needs: ClassVar[tuple[str, ...]] = ()  # any of NEEDS
    keeps: ClassVar[tuple[str, ...]] = ()  # what is gathered in a step and kept for the next one
    begins_at_w: bool = True  # whether the first evaluation is of given rows at the unperturbed weights

    def __init__(
        self,
        params: Any,
        *,
        base: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        l2: Literal["descent", "loss"] = "descent",
        clip: float | None = None,
        **options: Any,
    ) -> None:
        """``params``: tensors, (name, tensor) pairs as of ``named_parameters()``, or groups of them. ``l2``: weight
        decay in the base step, or as L2 in the loss of every evaluation (google-research/sam). ``clip``: largest
        global norm of the step's gradient. ``options``: the member's own."""
        self.options = self.Options(**options)
        self.l2 = weight_decay if l2 == "loss" else 0.0
        decay = 0.0 if l2 == "loss" else weight_decay
        params = list(params)
        if base == "sgd":
            nesterov = nesterov and momentum > 0
            self.base: torch.optim.Optimizer = torch.optim.SGD(
                params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=True
            )
        else:
            self.base = torch.optim.AdamW(params, lr=lr, betas=(momentum, 0.999), weight_decay=decay, fused=True)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.params: list[Tensor] = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        self.names = [
            name
            for group in self.param_groups
            for name, p in zip(group.get("param_names", [""] * len(group["params"])), group["params"], strict=True)
            if p.requires_grad
        ]
        if "names" in self.needs and not all(self.names):
            raise UserError(f"optimizer {self.name} needs names: give it model.named_parameters()")
        if base == "sgd" and momentum:  # a skipped first step must not leave an unset buffer behind
            for p in self.params:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.peak_lr = float(self.param_groups[0]["lr"])  # before a schedule lowers it
        self.clip = clip
        self.transform_gradient: Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]] | None = (
            None  # the method's, if it has one
        )
        self.average: Average = list  # of a step's gradient
        self.generator: torch.Generator | None = None  # of this epoch's draws; None: torch's global one
        self.epoch, self.epochs, self.samples = 0, 1, 0  # as ``on_epoch`` said last
        self.steps = 0  # taken or skipped
        self.memory = {name: [torch.zeros_like(p) for p in self.params] for name in self.keeps}
        self.gathered: dict[str, list[Tensor]] = {}  # of this step
        self.share = 1.0  # of the present chunk in its batch
        device = self.params[0].device
        self.found_inf = torch.zeros((), device=device)  # 1 where the last step was skipped
        self.skipped = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)  # of the last step's gradient, before clipping

    # what a member writes

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        """The gradient that the base rule steps with, for these rows of the batch."""
        raise TypeError(f"{type(self).__name__} does not say how its gradient comes about")

    def after(self, objective: Objective) -> None:
        """What follows the base step."""

    def on_epoch(self, epoch: int, epochs: int, samples: int) -> None:
        """An epoch begins, of so many and over a training set of so many samples. Only members with a schedule, or
        with an outcome per sample, need to be told."""
        self.epoch, self.epochs, self.samples = epoch, epochs, samples

    # what a member uses

    def in_turn(self, first: float, later: float) -> Tensor:
        """One number in the first step that is not skipped, another one after it; a 0-d tensor on the device."""
        weight = self.params[0]
        return torch.where(self.skipped == self.steps, weight.new_full((), first), weight.new_full((), later))

    def unit(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors divided by their common norm; zeros where that is zero."""
        norm = global_norm(tensors)
        return scaled(tensors, torch.where(norm > 0, 1 / norm, norm))

    def noise(self) -> list[Tensor]:
        """Standard normal draws in the shapes of the weights, from this epoch's stream."""
        return [torch.randn(p.shape, generator=self.generator, device=p.device, dtype=p.dtype) for p in self.params]

    @contextmanager
    def restored(self, params: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Weights may be moved within the block; then they are restored exactly, from a copy."""
        params = self.params if params is None else params
        saved = [p.detach().clone() for p in params]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(params), saved)
                torch.clear_autocast_cache()

    @torch.no_grad()
    def move(self, direction: Sequence[Tensor], radius: float = 1.0, params: Sequence[Tensor] | None = None) -> None:
        """Add ``radius * direction`` to the weights, within a block of ``restored``."""
        torch._foreach_add_(list(self.params if params is None else params), list(direction), alpha=radius)
        torch.clear_autocast_cache()  # casts of the weights where they were, where the caller holds an autocast open

    @contextmanager
    def at(
        self, direction: Sequence[Tensor], radius: float = 1.0, params: Sequence[Tensor] | None = None
    ) -> Iterator[None]:
        """The weights moved by ``radius * direction`` within the block; then restored exactly."""
        with self.restored(params):
            self.move(direction, radius, params)
            yield

    def both(self, objective: Objective, rows: Rows, radius: float) -> tuple[list[Tensor], list[Tensor]]:
        """SAM's two gradients: at the weights, and at ``radius`` along that one."""
        g = objective.grad(rows)
        with self.at(self.unit(g), radius):
            return g, objective.grad(rows)

    def descend(self, grads: list[Tensor], norm: Tensor | None = None) -> None:
        """The base rule's step, after clipping; nothing where this step is skipped."""
        if self.clip is not None:
            norm = global_norm(grads) if norm is None else norm
            grads = scaled(grads, torch.clamp(self.clip / norm, max=1.0))
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.base.found_inf = self.found_inf  # type: ignore[attr-defined]  # torch's fused rules skip on the device
        self.base.step()

    def gather(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep something of this step: over chunks, the mean weighted by their share of the rows. ``after`` finds it
        in ``self.gathered``, and where ``keeps`` names it the next step finds it in ``self.memory``; a step that is
        skipped leaves the memory as it was. What is gathered must be finite, or the step is skipped."""
        self.gathered[name] = self._add(self.gathered.get(name), tensors)

    # what the base class owns

    @classmethod
    def cost(cls, options: BaseModel) -> tuple[float, float]:
        """Forwards and backwards of the whole batch per step, under these options."""
        forwards, backwards = (float(eval(p, {"__builtins__": {}}, dict(options))) for p in cls.passes)
        return forwards, backwards

    def whole(self, rows: int) -> bool:
        """Whether a step on ``rows`` rows begins with all of them at the unperturbed weights, so that a forward made
        for planning can serve as its first evaluation."""
        return self.begins_at_w and self._m(rows) >= rows

    def _m(self, rows: int) -> int:
        m = getattr(self.options, "m", "batch")
        return rows if m == "batch" else min(int(m), rows)

    def _add(self, total: list[Tensor] | None, part: Sequence[Tensor]) -> list[Tensor]:
        """The chunks' sum so far, each with its share."""
        if self.share == 1:
            return list(part)
        if total is None:
            return list(torch._foreach_mul(list(part), self.share))
        torch._foreach_add_(total, list(part), alpha=self.share)
        return total

    def _chunks(self, rows: int | None) -> list[tuple[Rows, float]]:
        if rows is None:
            if getattr(self.options, "m", "batch") != "batch" and "rows" not in self.needs:
                raise ValueError("a plain closure cannot be cut into chunks of m rows: use m='batch'")
            return [(None, 1.0)]
        m = self._m(rows)
        if m == rows:
            return [(None, 1.0)]
        return [(slice(i, min(i + m, rows)), min(m, rows - i) / rows) for i in range(0, rows, m)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step on an ``Objective`` or a plain closure; returns the mean loss at the unperturbed weights.

        A gradient that is not finite skips the whole step: weights, momentum and step count stay as they were.
        """
        if closure is None:
            raise TypeError("step needs an objective or a closure: the loss is evaluated more than once")
        objective = closure if isinstance(closure, Objective) else Closure(closure, self.params)
        objective.l2 = self.l2
        self.zero_grad()  # the last step's gradient need not be in memory beside this one's
        self.gathered = {}
        total: list[Tensor] | None = None
        for rows, share in self._chunks(objective.rows):
            self.share = share
            total = self._add(total, self.gradient(objective, rows))  # type: ignore[arg-type]
        assert total is not None
        total = self.average(total)
        self.gathered = {name: self.average(kept) for name, kept in self.gathered.items()}
        grads = total if self.transform_gradient is None else self.transform_gradient(total, self.params)
        self.norm = global_norm(grads)
        sound = torch.isfinite(self.norm)
        for kept in self.gathered.values():
            sound = sound & torch.isfinite(global_norm(kept))
        self.found_inf = (~sound).float()
        self.skipped += self.found_inf
        self.descend(grads, self.norm)
        for name in self.keeps:
            new, old = self.gathered.get(name, []), self.memory[name]
            self.memory[name] = [torch.where(sound, n, o) for n, o in zip(new, old, strict=True)] if new else old
        self.after(objective)  # type: ignore[arg-type]
        self.steps += 1
        self.gathered = {}
        return objective.first_loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state, what the member keeps from step to step, the counts of steps; no perturbation."""
        return {
            "name": self.name,
            "base": self.base.state_dict(),
            "memory": self.memory,
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a ``state_dict`` of the same member; ``UserError`` where it is another's."""
        if state_dict.get("name") != self.name:
            raise UserError(f"the state is of optimizer {state_dict.get('name')!r}, not of {self.name!r}")
        self.base.load_state_dict(state_dict["base"])
        self.param_groups, self.state = self.base.param_groups, self.base.state
        device = self.skipped.device
        self.memory = {name: [t.to(device, copy=True) for t in kept] for name, kept in state_dict["memory"].items()}
        self.steps = state_dict["steps"]
        self.skipped.copy_(state_dict["skipped"])


def scaled(tensors: Sequence[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Each tensor times one number."""
    return list(torch._foreach_mul(list(tensors), factor))


def plus(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Tensor | float) -> list[Tensor]:
    """``tensors + factor * others``."""
    return list(torch._foreach_add(list(tensors), scaled(others, factor)))


def along(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The part of ``tensors`` that lies along ``others``; zeros where those are zero."""
    square = inner(others, others)
    return scaled(others, torch.where(square > 0, inner(tensors, others) / square, square))


def inner(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The inner product over all tensors together, a 0-d tensor."""
    return torch.stack([t.sum() for t in torch._foreach_mul(list(tensors), list(others))]).sum()


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all tensors together, a 0-d float32 tensor (float64 for float64 tensors)."""
    norms = torch._foreach_norm(list(tensors))
    wide = [n if n.dtype == torch.float64 else n.float() for n in norms]
    return torch.linalg.vector_norm(torch.stack(wide))
