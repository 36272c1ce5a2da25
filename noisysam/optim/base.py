"""The base of every optimizer: what a member of the SAM family needs beside its own few lines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from noisysam.errors import UserError
from noisysam.objective import Closure, Objective, Rows
from noisysam.registry import Registry

OPTIMIZERS: Registry[type["SharpnessAware"]] = Registry("optimizer")


class Options(BaseModel):
    """A member's own settings, with their published values."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Radius(Options):
    """Settings of the members that perturb by a radius."""

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
    passes: ClassVar[str]  # forwards + backwards of the whole batch per step, for the lists and the contract test
    null: ClassVar[dict[str, Any]] = {}  # the options with which a step equals the base's, bit for bit
    needs: ClassVar[tuple[str, ...]] = ()  # 'hard labels', 'index', 'features', 'fp32', 'rows'
    begins_at_w: ClassVar[bool] = True  # whether the first evaluation is of given rows at the unperturbed weights

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
        """``l2``: weight decay in the base step, or as L2 in the loss of every evaluation (google-research/sam).
        ``clip``: largest global norm of the step's gradient. ``options``: the member's own."""
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
        if base == "sgd" and momentum:  # a skipped first step must not leave an unset buffer behind
            for p in self.params:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.clip = clip
        self.edit: Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]] | None = None  # the method's, if it has one
        self.generator: torch.Generator | None = None  # of this epoch's draws; None: torch's global one
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

    # what a member uses

    def unit(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors divided by their common norm; zeros where that is zero."""
        norm = global_norm(tensors)
        return list(torch._foreach_mul(list(tensors), torch.where(norm > 0, 1 / norm, norm)))

    @contextmanager
    def at(self, direction: Sequence[Tensor], radius: float) -> Iterator[None]:
        """The weights moved by ``radius * direction`` within the block; then restored exactly, from a copy."""
        with torch.no_grad():
            saved = [p.clone() for p in self.params]
            torch._foreach_add_(self.params, list(direction), alpha=radius)
            torch.clear_autocast_cache()  # casts of the unperturbed weights, where the caller holds an autocast open
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, saved)
                torch.clear_autocast_cache()

    # what the base class owns

    def whole(self, rows: int) -> bool:
        """Whether a step on ``rows`` rows begins with all of them at the unperturbed weights, so that a forward made
        for planning can serve as its first evaluation."""
        return self.begins_at_w and self._m(rows) >= rows

    def _m(self, rows: int) -> int:
        m = getattr(self.options, "m", "batch")
        return rows if m == "batch" else min(int(m), rows)

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
        grads: list[Tensor] = []
        for rows, share in self._chunks(objective.rows):
            part = self.gradient(objective, rows)  # type: ignore[arg-type]
            if share == 1:
                grads = part
            elif not grads:
                grads = list(torch._foreach_mul(part, share))
            else:
                torch._foreach_add_(grads, part, alpha=share)
        if self.edit is not None:
            grads = self.edit(grads, self.params)
        self.norm = global_norm(grads)
        self.found_inf = (~torch.isfinite(self.norm)).float()
        self.skipped += self.found_inf
        if self.clip is not None:
            torch._foreach_mul_(grads, torch.clamp(self.clip / self.norm, max=1.0))
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.base.found_inf = self.found_inf  # type: ignore[attr-defined]  # torch's fused rules skip on the device
        self.base.step()
        self.after(objective)  # type: ignore[arg-type]
        return objective.first_loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def own_state(self) -> dict[str, Any]:
        """What a member carries from step to step, beside the base's state."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what ``own_state`` gave."""

    def state_dict(self) -> dict[str, Any]:
        """The base's state, the member's own and the count of skipped steps; no perturbation."""
        return {"name": self.name, "base": self.base.state_dict(), "own": self.own_state(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a ``state_dict`` of the same member."""
        if state_dict.get("name") != self.name:
            raise UserError(f"the state is of optimizer {state_dict.get('name')!r}, not of {self.name!r}")
        self.base.load_state_dict(state_dict["base"])
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.skipped.copy_(state_dict["skipped"])
        self.load_own_state(state_dict["own"])


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all tensors together, a 0-d float32 tensor (float64 for float64 tensors)."""
    norms = torch._foreach_norm(list(tensors))
    wide = [n if n.dtype == torch.float64 else n.float() for n in norms]
    return torch.linalg.vector_norm(torch.stack(wide))
