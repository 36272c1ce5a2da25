"""What optimizers evaluate: a task bound to its network.

A step may evaluate its objective two or more times, at different weights and on parts of the batch. Each evaluation
opens its own autocast, counts itself, and leaves batch norm's running statistics to a policy that is applied once, at
the end of the step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from noisysam.core.errors import UserError
from noisysam.core.network import Net
from noisysam.core.task import Average, Rows, Task


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
        of all rows uses them. ``own``: the method's learnable parameters; ``auxiliary_grads`` become their
        gradients, of the first evaluation of each row. ``average``: of the loss and the gradient of every
        evaluation, where processes share them."""
        self.net, self.task, self.loss = net, task, loss
        self.own, self.average = list(own), average
        self.auxiliary_grads = [torch.zeros_like(p) for p in self.own]
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
            logits = self.net.logits(task.inputs, grad, forwards=task.forwards)
        task = replace(task, features=self.net.features)
        with torch.set_grad_enabled(grad):
            losses = self.loss(logits, task)
        if losses.shape != logits.shape[:1]:
            raise UserError(
                f"the loss of a method must have one value for each of {len(logits)} rows, not the shape"
                f" {tuple(losses.shape)}: leave out .mean()"
            )
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
                torch._foreach_add_(self.auxiliary_grads, list(grads))
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
            logits = self.net.logits(task.inputs, grad=True, weights=self.net.params, forwards=task.forwards)
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
    """A closure (forward, backward, return the loss) as an objective of one whole batch."""

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
        self.closure, self.params, self.l2 = closure, params, 0.0
        self.rows: int | None = None
        self.first_loss: Any = None
        self.used = [False] * len(params)  # whether an evaluation gave the parameter a gradient

    def evaluate(
        self, rows: Rows = None, params: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The closure's loss and the gradients of the parameters after it."""
        if rows is not None or labels is not None:
            raise ValueError("a closure evaluates its whole batch only: use a noisysam Objective, or m='batch'")
        with torch.enable_grad():
            loss = self.closure()
        if loss is None:
            raise TypeError("the closure must return the loss")
        if self.first_loss is None:
            self.first_loss = loss
        self.used = [used or p.grad is not None for used, p in zip(self.used, self.params, strict=True)]
        params = self.params if params is None else params
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        if self.l2:
            for p, g in zip(params, grads, strict=True):
                if p.grad is not None:
                    g.add_(p.detach(), alpha=self.l2)
        return torch.as_tensor(loss).detach() + half_square(self.params, self.l2), grads

    def grad(
        self, rows: Rows = None, params: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> list[Tensor]:
        """The gradient of ``evaluate``."""
        return self.evaluate(rows, params, labels)[1]

    def output(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Not available: a closure has no logits."""
        raise ValueError("this optimizer needs the losses of single rows: use a noisysam Objective, not a closure")

    pull = residual = squares = only = output


def half_square(params: Sequence[Tensor], decay: float) -> Tensor | float:
    """The loss that L2 adds: decay / 2 times the squared norm of the parameters."""
    if not decay:
        return 0.0
    return decay / 2 * torch.stack(torch._foreach_norm([p.detach() for p in params])).square().sum()
