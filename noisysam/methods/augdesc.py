"""AugDesc: augmented descent."""

from pydantic import Field
from torch import Tensor

from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS
from noisysam.methods.dividemix import DivideMix, DivideMixOptions
from noisysam.methods.semi import Policy


class AugDescOptions(DivideMixOptions):
    strong: Policy = Field("auto-plain", description="augmentation of what is learnt from (AutoAugment without cutout)")


@METHODS.register("augdesc", source="arXiv 2103.02130, Algorithm 1 (DM-AugDesc-WS)")
class AugDesc(DivideMix):
    """AugDesc: DivideMix that guesses and refines labels on two weak views and learns from two strong ones.

    Equation: that of DivideMix, its targets from weak views, its mixed images of strong ones; losses of plain images,
        a warm-up with weak views
    Code: KentoNishi/Augmentation-for-LNL@908a22b train_cifar.py, dataloader_cifar.py, presets.json
    Deviation: those of DivideMix.
    State: 16 bytes per sample; 8 more for each further epoch of history
    Checked: equal to the authors' targets, mixed images and loss to 1e-5 (tests/parity); the views that each part sees.
    """

    Options = AugDescOptions

    def drawn(self, epoch: Epoch, index: Tensor, network: int) -> Batch:
        batch = super().drawn(epoch, index, network)
        batch.views += [epoch.view(index, self.options.strong) for _ in range(2)]
        return batch
