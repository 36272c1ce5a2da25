"""A network with what an evaluation of it needs, and batch norm's running statistics."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from noisysam.core.errors import UserError
from noisysam.core.task import Average


class RunningStatistics:
    """Batch norm's running statistics, updated once a step by a policy (google-research/sam: ``first``).

    During a step the modules' buffers are scratch: with momentum 1 each training forward leaves its own batch
    statistics there. ``absorb`` collects them, ``commit`` blends them into the true values. A row's evaluations are
    numbered (``turn`` 0 is the first time it is seen with gradient); ``first`` uses turn 0, ``last`` the last turn,
    ``both`` every turn in order. Chunks of one turn are averaged by their share of the rows into one update.
    """

    def __init__(self, module: nn.Module, policy: Literal["first", "last", "both"] = "first") -> None:
        self.policy = policy
        layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.layers = [m for m in layers if m.track_running_stats]
        self.buffers: list[Tensor] = [b for m in self.layers for b in _statistics(m)]
        self.rates: Tensor | None = None
        if self.buffers:
            if any(m.momentum is None for m in self.layers):
                raise ValueError("batch norm with momentum=None (a cumulative average) is not supported")
            rates = [torch.full_like(b, float(m.momentum or 0)) for m in self.layers for b in _statistics(m)]
            self.rates = torch.cat(rates)
            for m in self.layers:
                m.momentum = 1.0
        self.turns: list[tuple[Tensor, float]] = []
        self.average: Average = list

    def _flat(self) -> Tensor:
        return torch.cat(self.buffers)

    def _write(self, flat: Tensor) -> None:
        torch._foreach_copy_(self.buffers, list(flat.split([b.numel() for b in self.buffers])))

    def begin(self) -> None:
        """Remember the true values before the step's first forward."""
        if self.buffers:
            self.true = self._flat()
            self.turns = []

    def averaged(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The inputs of several forwards, after which their mean batch statistics are left, as if they had been one.
        Each forward has buffers of its own: autograd keeps a hold of them."""
        total = [torch.zeros_like(b) for b in self.buffers]
        try:
            for part in parts:
                own = [b.clone() for b in self.buffers]
                self._place(own)
                yield part
                for t, b in zip(total, own, strict=True):
                    t += b / len(parts)
        finally:
            self._place(self.buffers)
        for b, t in zip(self.buffers, total, strict=True):
            b.copy_(t)

    def _place(self, buffers: Sequence[Tensor]) -> None:
        """Let the layers use these tensors as their running statistics."""
        for layer, mean, variance in zip(self.layers, buffers[::2], buffers[1::2], strict=True):
            layer.running_mean, layer.running_var = mean, variance

    def absorb(self, turn: int, share: float) -> None:
        """Collect the batch statistics that the forward just left, for ``share`` of the rows in their n-th turn."""
        if not self.buffers:
            return
        if turn < len(self.turns):
            total, weight = self.turns[turn]
            self.turns[turn] = (total.add_(self._flat(), alpha=share), weight + share)
        else:
            self.turns.append((self._flat().mul_(share), share))

    def commit(self, found_inf: Tensor | None = None) -> None:
        """Blend the collected statistics into the true values; keep those where the step was not finite."""
        if not self.buffers:
            return
        used = {"first": self.turns[:1], "last": self.turns[-1:], "both": self.turns}[self.policy]
        assert self.rates is not None
        new = self.true
        for total, weight in used:
            (mean,) = self.average([total / weight])
            new = torch.lerp(new, mean, self.rates)
        keep = torch.isfinite(new).all()
        if found_inf is not None:
            keep = keep & (found_inf == 0)
        self._write(torch.where(keep, new, self.true))


def _statistics(layer: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    return [b for b in (layer.running_mean, layer.running_var) if b is not None]


class WithFeatures(nn.Module):
    """A network that also returns its penultimate features, for members that look at them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, K) and features (n, d)."""
        features = self.module.features(x)  # type: ignore[operator]
        return self.module.head(features), features  # type: ignore[operator]


class Net:
    """A network with what an evaluation needs: its parameters, autocast, the batch-norm policy, counters.

    ``forward`` may be a compiled form of ``module``, or of it ``WithFeatures``: then ``features`` are those of the
    last forward. Logits are float32 whatever the precision (float64 for float64 weights); ``forwards`` and
    ``backwards`` count rows.
    """

    def __init__(
        self,
        module: nn.Module,
        precision: Literal["fp32", "bf16"] = "fp32",
        policy: Literal["first", "last", "both"] = "first",
        forward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.module = module
        self.forward = module if forward is None else forward
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.params = [p for _, p in self.named]
        self.learnable = self.named
        self.device = self.params[0].device
        self.features: Tensor | None = None
        self.bf16 = precision == "bf16"
        self.statistics = RunningStatistics(module, policy)
        # Dropout must repeat its masks in every evaluation of a step.
        self.random = any(isinstance(m, nn.modules.dropout._DropoutNd) or _drops_paths(m) for m in module.modules())
        self.seed = 0  # of the masks, another one each step
        self.forwards = 0
        self.backwards = 0

    def train_only(self, count: int | None, frozen: int = 0) -> None:
        """Freeze all but the last ``count`` blocks of the network (None: train all of it), or the last ``frozen``."""
        blocks = [self.module] if count is None else last_blocks(self.module, count)
        chosen = {id(p) for block in blocks for p in block.parameters()}
        if frozen:
            chosen -= {id(p) for block in last_blocks(self.module, frozen) for p in block.parameters()}
        for _, p in self.learnable:
            p.requires_grad_(id(p) in chosen)
        self.named = [(n, p) for n, p in self.learnable if p.requires_grad]
        self.params = [p for _, p in self.named]

    def logits(
        self,
        inputs: Tensor,
        grad: bool,
        weights: Sequence[Tensor] | None = None,
        forwards: tuple[int, ...] = (),
    ) -> Tensor:
        """Float32 logits (n, K) of one forward, in an autocast of its own; (n, v, K) for rows of v views, whose inputs
        have a dimension more, in one forward or in several of so many views; at other ``weights`` where given (then
        with ``grad`` the network is not the compiled one, and its graph may be used several times).

        Inside one shared autocast the casts of weights are cached, and a forward at perturbed weights would silently
        return the unperturbed logits.
        """
        if forwards:
            parts, features = [], []
            for part in self.statistics.averaged(inputs.split(forwards, 1)):
                parts.append(self.logits(part, grad, weights))
                features.append(self.features)
            with torch.set_grad_enabled(grad):
                self.features = torch.cat(features, 1) if features[0] is not None else None  # type: ignore[arg-type]
                return torch.cat(parts, 1)
        views = inputs.shape[1] if inputs.ndim == 5 else 0
        if views:
            inputs = inputs.flatten(0, 1)
        self.forwards += len(inputs)
        if self.random:
            torch.manual_seed(self.seed)
        with torch.set_grad_enabled(grad), torch.autocast(self.device.type, torch.bfloat16, self.bf16, False):
            if weights is None:
                found = self.forward(inputs)
            else:  # the present weights stay in place, so that graphs of earlier forwards stay alive
                forward = self.module if grad or not isinstance(self.forward, nn.Module) else self.forward
                names = [name for name, p in forward.named_parameters() if p.requires_grad]
                found = functional_call(forward, dict(zip(names, weights, strict=True)), (inputs,))
            if isinstance(found, tuple):
                found, features = found
                self.features = wide(features).unflatten(0, (-1, views)) if views else wide(features)
            return wide(found).unflatten(0, (-1, views)) if views else wide(found)


def _drops_paths(module: nn.Module) -> bool:
    """Whether a module is the stochastic depth of timm or of torchvision."""
    return type(module).__name__ in ("DropPath", "StochasticDepth")


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def last_blocks(module: nn.Module, count: int) -> list[nn.Module]:
    """The last blocks of a network, the head at the end; ``UserError`` where it does not name its blocks."""
    if not hasattr(module, "named_blocks"):
        raise UserError("this method treats the last blocks of the network apart: it must have named_blocks()")
    return [block for _, block in module.named_blocks()][-count:]  # type: ignore[operator]
