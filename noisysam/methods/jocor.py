"""JoCoR."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS
from noisysam.methods.co_teaching import UNSCALED, CoTeaching, CoTeachingOptions, smallest
from noisysam.methods.recipe import PublishedRecipe


class JoCoROptions(CoTeachingOptions):
    strength: float = Field(
        0.9, ge=0, le=1, description="lambda (authors: CIFAR-10 0.9, at 80 % 0.65; CIFAR-100 0.85; code's default 0.1)"
    )


@METHODS.register("jocor", source="arXiv 2003.02752, section 3", revision=2)
class JoCoR(CoTeaching):
    """JoCoR: two networks learn from the rows of smallest joint loss, which also pulls their predictions together.

    Equation: L_i = (1 - l) (CE(y_i, p_1i) + CE(y_i, p_2i)) + l (KL(p_1i || p_2i) + KL(p_2i || p_1i)), mean over the
        R(e) n smallest L_i; R(e) = 1 - tau min(e / ramp, 1)
    Code: hongxin001/JoCoR@86db359 algorithm/loss.py, algorithm/jocor.py
    Deviation: one optimizer for each network. The other network's predictions, and the selection, are those at the
        unperturbed weights; the loss of network k leaves out the other's cross-entropy, constant for it.
    Checked: equal to the authors' gradients of both networks to 1e-6 over 14 epochs of both schedules (tests/parity);
        selection and loss in numpy.
    """

    Options: ClassVar[type[CoTeachingOptions]] = JoCoROptions

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        """lambda by data set and rate; the authors halve the nominal rate of asymmetric noise."""
        chosen = super().published(dataset, noise_type, noise)
        if noise_type.startswith("asymmetric"):
            chosen["forget_rate"] = noise / 2
        if dataset == "cifar100":
            chosen["strength"] = 0.85
        elif dataset == "cifar10" and noise == 0.8:
            chosen["strength"] = 0.65
        return chosen

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="hongxin001/JoCoR@86db359 main.py, algorithm/jocor.py; lambda: README.md",
            augment="none",
            batch=128,
            epochs=200,
            base_opt="adam",
            lr=1e-3,
            weight_decay=0.0,
            schedule="linear",
            decay_from=100 if dataset == "cifar100" else 80,
            final_momentum=0.1,
            differs={"model": "six convolutions and a linear layer (model/cnn.py), not in this package", **UNSCALED},
        )

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        for task, peer in zip(tasks, reversed(logits), strict=True):
            task.plan["peer"] = peer.log_softmax(1)
        labels, (left, right) = tasks[0].labels, logits
        # each network's part, the agreement counted once
        joint = self.part(left, tasks[0]) + (1 - self.options.strength) * self.cross_entropy(right, labels)
        weight = smallest(joint, self.keep(len(joint), self.epoch))
        for task in tasks:
            task.plan["weight"] = weight

    def part(self, logits: Tensor, task: Task) -> Tensor:
        """What of the joint loss of each row (n,) depends on one network."""
        log_p, log_q, strength = logits.log_softmax(1), task.plan["peer"], self.options.strength
        apart = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)  # both divergences
        return (1 - strength) * self.cross_entropy(logits, task.labels) + strength * apart

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.part(logits, task)
