"""The bootstrap of the SAM paper: train, relabel, retrain."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from noisysam.methods.base import METHODS, Method, Options, Stage, StageContext


class BootstrapOptions(Options):
    teacher: Literal["last", "selected"] = Field(
        "last", description="the epoch that relabels: the last, or the one selected on noisy validation labels"
    )


@METHODS.register("bootstrap", source="arXiv 2010.01412, section 3.3")
class Bootstrap(Method):
    """Bootstrap: train, replace each label by the network's own prediction, train again from scratch.

    After SGD's last epoch no gain is expected, since the network has memorised its labels. ``teacher=selected`` is the
    noisy teacher of Chen et al. 2021 (AAAI).

    Equation: y <- argmax p of the first training, for every sample; the second training learns those from scratch.
    Code: none released
    Deviation: hard predictions from plain inputs in evaluation mode; the paper leaves these open.
    Checked: the paper's labels for the second training, exactly (tests/parity); predictions by hand, from the last and
        from the selected epoch.
    """

    Options = BootstrapOptions

    def stages(self, context: StageContext) -> Iterator[Stage]:
        yield Stage(reusable=True)
        yield Stage(labels=context.predict(self.options.teacher).argmax(1))
