"""What optimizers evaluate: a task bound to its network.

A step may evaluate its objective two or more times, at different weights and on parts of the batch. Each evaluation
opens its own autocast, counts itself, and leaves batch norm's running statistics to a policy that is applied once, at
the end of the step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from noisysam.errors import UserError

Rows = slice | Tensor | None  # of a batch: a chunk, chosen indices, or all of them
Average = Callable[[Sequence[Tensor]], list[Tensor]]  # over the processes of a run; ``list`` for one


@dataclass
class Task:
    """What one network learns from in this step. Rows come first in every tensor.

    ``inputs`` are (n, C, H, W), or (n, v, C, H, W) where a row's loss needs v views of it, and then its logits are
    (n, v, K). ``labels`` are class indices (n,) or distributions (n, K); ``index`` is each row's place in the training
    set, None for mixed rows; ``plan`` holds what the method decided at the unperturbed weights: tensors of n rows, or
    numbers.
    """

    network: int
    inputs: Tensor
    labels: Tensor
    index: Tensor | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    features: Tensor | None = None  # penultimate, of the evaluation at hand, where the network shows them

    def take(self, rows: Rows, labels: Tensor | None = None) -> "Task":
        """The same task on some of its rows, or with other labels for them."""
        if rows is not None:
            plan = {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in self.plan.items()}
            index = None if self.index is None else self.index[rows]
            self = Task(self.network, self.inputs[rows], self.labels[rows], index, plan)
        return self if labels is None else replace(self, labels=labels)


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
    last forward. Logits are float32 whatever the precision; ``forwards`` and ``backwards`` count rows.
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
        self.random = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in module.modules())
        self.seed = 0  # of the masks, another one each step
        self.forwards = 0
        self.backwards = 0

    def train_only(self, count: int | None) -> None:
        """Freeze all but the last blocks of the network; None: train all of it."""
        blocks = [self.module] if count is None else last_blocks(self.module, count)
        chosen = {id(p) for block in blocks for p in block.parameters()}
        for _, p in self.learnable:
            p.requires_grad_(id(p) in chosen)
        self.named = [(n, p) for n, p in self.learnable if p.requires_grad]
        self.params = [p for _, p in self.named]

    def logits(self, inputs: Tensor, grad: bool, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Float32 logits (n, K) of one forward, in an autocast of its own; (n, v, K) for rows of v views, whose inputs
        have a dimension more; at other ``weights`` where given (then with
        ``grad`` the network is not the compiled one, and its graph may be used several times).

        Inside one shared autocast the casts of weights are cached, and a forward at perturbed weights would silently
        return the unperturbed logits.
        """
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
                self.features = features.float().unflatten(0, (-1, views)) if views else features.float()
            return found.float().unflatten(0, (-1, views)) if views else found.float()


def last_blocks(module: nn.Module, count: int) -> list[nn.Module]:
    """The last blocks of a network, the head at the end; ``UserError`` where it does not name its blocks."""
    if not hasattr(module, "named_blocks"):
        raise UserError("this method treats the last blocks of the network apart: it must have named_blocks()")
    return [block for _, block in module.named_blocks()][-count:]  # type: ignore[operator]


class Objective:
    """The mean over rows of a method's loss on one task, as a function of the network's present weights.

    Called without arguments it is torch's closure: clear, forward, backward, loss; SGD and AdamW take it as it is.
    """

    def __init__(
        self,
        net: Net,
        task: Task,
        loss: Callable[[Tensor, Task], Tensor],
        planned: Tensor | None = None,
        own: Sequence[Tensor] = (),
        average: Average = list,
    ) -> None:
        """``planned``: logits of the whole batch with their graph, from the method's planning; the first evaluation
        of all rows uses them. ``own``: the method's learnable parameters; ``own_grads`` become their gradients, of the
        first evaluation of each row. ``average``: of the loss and the gradient of every evaluation, where
        processes share them."""
        self.net, self.task, self.loss = net, task, loss
        self.own, self.average = list(own), average
        self.own_grads = [torch.zeros_like(p) for p in self.own]
        self.planned = planned
        self.params: Sequence[Tensor] = net.params
        self.rows = len(task.inputs)
        self.l2 = 0.0  # set by an optimizer that keeps the weight decay in the loss
        self.seen: dict[tuple[int, int], int] = {}
        self.first_loss = torch.zeros((), device=net.device)  # mean loss of the first evaluation of every row

    def output(self, rows: Rows = None, labels: Tensor | None = None, grad: bool = True) -> tuple[Tensor, Tensor]:
        """Logits (n, K) and losses (n,) of some rows at the present weights; with ``grad`` their graph is alive."""
        task = self.task.take(rows, labels)
        if grad and rows is None and self.planned is not None:
            logits, self.planned = self.planned, None
        else:
            logits = self.net.logits(task.inputs, grad)
        task = replace(task, features=self.net.features)
        with torch.set_grad_enabled(grad):
            losses = self.loss(logits, task)
        if grad:
            self._count(rows, losses)
        return logits, losses

    def _count(self, rows: Rows, losses: Tensor) -> None:
        share = len(losses) / self.rows
        if isinstance(rows, Tensor):  # chosen rows follow an evaluation of the chunk that they come from
            turn = max(self.seen.values(), default=0)
        else:
            start, stop, _ = (rows or slice(None)).indices(self.rows)
            turn = self.seen.get((start, stop), 0)
            self.seen[start, stop] = turn + 1
        if turn == 0:
            self.first_loss += losses.detach().mean() * share
            if self.own:  # their graph is the loss alone: the network's stays for its own backward
                mean = torch.full_like(losses, 1 / self.rows)
                grads = torch.autograd.grad(losses, self.own, mean, retain_graph=True, materialize_grads=True)
                torch._foreach_add_(self.own_grads, list(grads))
        self.net.statistics.absorb(turn, share)

    def pull(self, outputs: Tensor, cotangent: Tensor, params: Sequence[Tensor] | None = None) -> list[Tensor]:
        """``cotangent`` pulled back through ``outputs`` (rows first): gradients for ``params``, with L2 where set."""
        params = self.params if params is None else params
        self.net.backwards += len(outputs) * max(1, self.task.inputs.ndim == 5 and self.task.inputs.shape[1])
        grads = list(torch.autograd.grad(outputs, params, cotangent, materialize_grads=True))
        if self.l2:
            torch._foreach_add_(grads, [p.detach() for p in params], alpha=self.l2)
        return grads

    def evaluate(
        self, rows: Rows = None, params: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss over some rows (with L2 where set) and its gradient for some parameters, with other labels
        where given. Only what those parameters need is computed."""
        with self.only(params):
            _, losses = self.output(rows, labels)
            grads = self.pull(losses, torch.full_like(losses, 1 / len(losses)), params)
        loss, *grads = self.average([losses.detach().mean() + half_square(self.params, self.l2), *grads])
        return loss, grads

    def grad(
        self, rows: Rows = None, params: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> list[Tensor]:
        """The gradient of ``evaluate``."""
        return self.evaluate(rows, params, labels)[1]

    def residual(self, logits: Tensor, rows: Rows = None) -> Tensor:
        """The derivative (n, K) of the mean loss over some rows by their logits, at these logits."""
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(logits, replace(self.task.take(rows), features=self.net.features)).mean()
        (residual,) = torch.autograd.grad(loss, logits)
        return residual

    def squares(self, rows: slice) -> list[Tensor]:
        """The mean over some rows of each one's squared gradient, their batch statistics in common; batch norm's
        running statistics do not learn from it. To be called after an evaluation, not before the first."""
        task = self.task.take(rows)
        n = len(task.inputs)
        self.net.backwards += n
        with torch.enable_grad():
            logits = self.net.logits(task.inputs, grad=True, weights=self.net.params)
            losses = self.loss(logits, task).unbind()
        total = [torch.zeros_like(p) for p in self.params]
        for loss in losses:
            row = torch.autograd.grad(loss, list(self.params), retain_graph=True, materialize_grads=True)
            torch._foreach_addcmul_(total, row, row, value=1 / n)
        return total

    @contextmanager
    def only(self, params: Sequence[Tensor] | None) -> Iterator[None]:
        """Forwards within the block build their graph for these parameters alone."""
        wanted = {id(p) for p in self.params if params is None} | {id(p) for p in params or ()}
        others = [p for p in self.params if id(p) not in wanted]
        try:
            for p in others:
                p.requires_grad_(False)
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def __call__(self) -> Tensor:
        """Set every parameter's ``grad`` to the gradient over all rows; return the mean loss of that evaluation."""
        _, losses = self.output()
        for p, g in zip(self.params, self.pull(losses, torch.full_like(losses, 1 / len(losses))), strict=True):
            p.grad = g
        return losses.detach().mean()


class Closure:
    """Anybody's closure (clear, forward, backward, return loss) as an objective of one whole batch."""

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
        self.closure, self.params, self.l2 = closure, params, 0.0
        self.rows: int | None = None
        self.first_loss: Any = None

    def evaluate(
        self, rows: Rows = None, params: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The closure's loss and the gradient that it leaves in the parameters."""
        if rows is not None or labels is not None:
            raise ValueError("a plain closure knows only its whole batch: use a noisysam Objective, or m='batch'")
        with torch.enable_grad():
            loss = self.closure()
        if self.first_loss is None:
            self.first_loss = loss
        params = self.params if params is None else params
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        if self.l2:
            torch._foreach_add_(grads, [p.detach() for p in params], alpha=self.l2)
        return torch.as_tensor(loss).detach() + half_square(self.params, self.l2), grads

    def grad(
        self, rows: Rows = None, params: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> list[Tensor]:
        """The gradient of ``evaluate``."""
        return self.evaluate(rows, params, labels)[1]

    def output(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """A closure shows no logits."""
        raise ValueError("this optimizer needs the losses of single rows: use a noisysam Objective, not a closure")

    pull = residual = squares = only = output


def half_square(params: Sequence[Tensor], decay: float) -> Tensor | float:
    """The loss that L2 adds: decay / 2 times the squared norm of the parameters."""
    if not decay:
        return 0.0
    return decay / 2 * torch.stack(torch._foreach_norm([p.detach() for p in params])).square().sum()
