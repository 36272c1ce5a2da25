"""Noisy teacher and student."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from noisysam.methods.base import METHODS, Stage, StageContext
from noisysam.methods.bootstrap import Bootstrap, BootstrapOptions
from noisysam.methods.recipe import PublishedRecipe


class NTSOptions(BootstrapOptions):
    teacher: Literal["last", "selected"] = Field("selected", description="the epoch that relabels (published selected)")


@METHODS.register("nts", source="arXiv 2012.04193 (AAAI 2021), noisy teacher and student", revision=2)
class NTS(Bootstrap):
    """NTS: train, relabel by the epoch that is best on noisy validation labels, train a student from scratch.

    Equation: y'_i = argmax_k p_k(x_i; w_t), t = argmax over epochs of the accuracy on noisy validation labels
    Code: chenpf1025/RobustnessAccuracy@238732e train_cifar10_ce.py
    Checked: the code's labels for the student, exactly (tests/parity); against bootstrap with teacher=selected.
    """

    Options = NTSOptions

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="chenpf1025/RobustnessAccuracy@238732e train_cifar10_ce.py, hyperparameter.txt",
            model="wrn-28-10",
            augment="rand",
            batch=128,
            epochs=200,
            lr=0.1,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[60, 120, 160],
            lr_factor=0.2,
            differs={
                "model": "with dropout of 0.2",
                "augment": "AutoAugment and cutout of 16; here RandAugment",
                "momentum": "begins at zero in every epoch",
            },
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        # any epoch may be the teacher, however seldom the run is evaluated
        yield Stage(settings={"eval_every": 1}, reusable=True)
        yield Stage(labels=context.predict(self.options.teacher).argmax(1))
