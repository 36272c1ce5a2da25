"""Reed's soft and hard bootstrapping."""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot


class ReedSoftOptions(Options):
    beta: float = Field(
        0.95, ge=0, le=1, description="weight of the label; the prediction has the rest (published 0.95)"
    )
    flow: bool = Field(True, description="whether the gradient flows through the prediction in the target")


@METHODS.register("reed-soft", source="arXiv 1412.6596, soft bootstrapping")
class ReedSoft(Method):
    """Soft bootstrapping: the target is a mean of the label and the network's own prediction.

    Equation: L = -sum_k (b e_y + (1 - b) p)_k log p_k, p the prediction at the weights evaluated
    Code: none by the authors; giorgiop/loss-correction@15a79de loss.py boot_soft
    Deviation: that code clips predictions at 1e-7.
    Checked: equal to that code's loss and gradient to 1e-7 (tests/parity); numpy, values and gradients with and without
        flow; cross-entropy plus an entropy.
    """

    Options = ReedSoftOptions
    smooths = False

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        beta, log_p = self.options.beta, logits.log_softmax(1)
        p = log_p.exp() if self.options.flow else log_p.detach().exp()
        return -((beta * one_hot(task.labels, logits.shape[1]) + (1 - beta) * p) * log_p).sum(1)


class ReedHardOptions(Options):
    beta: float = Field(0.8, ge=0, le=1, description="weight of the label; the prediction has the rest (published 0.8)")


@METHODS.register("reed-hard", source="arXiv 1412.6596, hard bootstrapping")
class ReedHard(Method):
    """Hard bootstrapping: the target is a mean of the label and the class that the network predicts.

    Equation: L = -sum_k (b e_y + (1 - b) e_z)_k log p_k, z = argmax p, chosen once a step at the unperturbed weights
    Code: none by the authors; giorgiop/loss-correction@15a79de loss.py boot_hard
    Deviation: that code clips predictions at 1e-7.
    Checked: equal to that code's loss and gradient to 1e-7 (tests/parity); numpy, values and gradients; the class stays
        where the weights evaluated would predict another.
    """

    Options = ReedHardOptions
    requires = ("one process",)
    smooths = False

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        for task, z in zip(tasks, logits, strict=True):
            task.plan["predicted"] = one_hot(z.argmax(1), z.shape[1])

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        beta = self.options.beta
        target = beta * one_hot(task.labels, logits.shape[1]) + (1 - beta) * task.plan["predicted"]
        return -(target * logits.log_softmax(1)).sum(1)
