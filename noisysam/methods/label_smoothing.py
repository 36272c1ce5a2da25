"""Label smoothing, and negative label smoothing."""

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot
from noisysam.methods.recipe import Epochs, PublishedRecipe


class SmoothingOptions(Options):
    rate: float = Field(
        0.1, lt=1, allow_inf_nan=False, description="mass spread over all classes, or taken from them (0.8 to -8)"
    )
    warmup: Epochs = Field(
        0, ge=0, description="epochs of cross-entropy first (released code at high noise: 120, then lr 1e-6)"
    )


@METHODS.register("label-smoothing", source="arXiv 1512.00567, section 7; negative rates: arXiv 2106.04149")
class LabelSmoothing(Method):
    """Label smoothing, with a positive or a negative rate.

    Equation: L = -(1 - r) log p_y - r / K sum_k log p_k, over all K classes, y among them
    Code: UCSC-REAL/negative-label-smoothing-in-noisy-labels@05078f6 README.md
    Deviation: after a warm-up the run continues at its own learning rate; the code starts a second one, at 1e-6.
    Checked: equal to the authors' loss and gradient at a positive and a negative rate to 1e-6 (tests/parity); numpy,
        values and gradients; torch's label_smoothing for rates of 0 and more.
    """

    Options = SmoothingOptions
    smooths = False

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="UCSC-REAL/negative-label-smoothing-in-noisy-labels@05078f6 main_GLS_direct_train.py",
            model="resnet34",
            augment="standard",
            batch=128,
            epochs=200,
            lr=0.1,
            nesterov=True,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[100, 150],
            differs={"rate": "chosen by noise among 0.8 to -8; the script's default, 0.1, here"},
        )

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        rate = self.options.rate if self.epoch >= self.options.warmup else 0.0
        labels = one_hot(task.labels, logits.shape[1])
        return -(((1 - rate) * labels + rate / logits.shape[1]) * logits.log_softmax(1)).sum(1)
