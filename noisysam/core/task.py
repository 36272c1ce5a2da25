"""What one network learns from in one step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

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
    forwards: tuple[int, ...] = ()  # how many of a row's views share a forward, in order; (): all of them

    def take(self, rows: Rows, labels: Tensor | None = None) -> "Task":
        """The same task on some of its rows, or with other labels for them."""
        if rows is not None:
            plan = {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in self.plan.items()}
            index = None if self.index is None else self.index[rows]
            self = replace(self, inputs=self.inputs[rows], labels=self.labels[rows], index=index, plan=plan)
        return self if labels is None else replace(self, labels=labels)
