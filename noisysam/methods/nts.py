"""Noisy teacher and student."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from noisysam.methods.base import METHODS, Stage, StageContext
from noisysam.methods.bootstrap import Bootstrap, BootstrapOptions


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

    def stages(self, context: StageContext) -> Iterator[Stage]:
        # any epoch may be the teacher, however seldom the run is evaluated
        yield Stage(settings={"eval_every": 1}, reusable=True)
        yield Stage(labels=context.predict(self.options.teacher).argmax(1))
