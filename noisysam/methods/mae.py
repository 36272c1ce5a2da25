"""Mean absolute error."""

from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, one_hot


@METHODS.register("mae", source="arXiv 1712.09482")
class MAE(Method):
    """Mean absolute error between prediction and label.

    Equation: L = sum_k |e_y - p|_k = 2 (1 - p_y)
    Code: none by the authors; HanxunH/Active-Passive-Losses@04bce53 loss.py
    Deviation: the sum, as in the paper; that code and gce at q = 1 have half of it.
    Checked: twice that code's loss and gradient to 1e-12 (tests/parity); numpy, values and gradients; twice gce at q =
        1.
    """

    smooths = False

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return (one_hot(task.labels, logits.shape[1]) - logits.softmax(1)).abs().sum(1)
