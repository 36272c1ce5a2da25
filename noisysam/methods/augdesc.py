"""AugDesc: augmented descent."""

from typing import Any, ClassVar

from pydantic import BaseModel, Field
from torch import Tensor

from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS
from noisysam.methods.dividemix import DivideMix, DivideMixOptions
from noisysam.methods.recipe import PublishedRecipe
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

    Options: ClassVar[type[BaseModel]] = AugDescOptions

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        chosen = super().published(dataset, noise_type, noise)
        return {**chosen, "threshold": 0.6} if noise >= 0.9 else chosen

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        asymmetric = noise_type.startswith(("asymmetric", "pair"))
        late = asymmetric or noise >= 0.9
        epochs, milestone = (350, 250) if late else (350, 200) if noise >= 0.8 else (300, 150)
        if dataset == "cifar100":
            epochs, milestone = 400, 300
        return PublishedRecipe(
            source="KentoNishi/Augmentation-for-LNL@908a22b presets.json (AugDesc-WS), train_cifar.py",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=epochs,
            lr=0.02,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[milestone],
        )

    def drawn(self, epoch: Epoch, index: Tensor, network: int) -> Batch:
        batch = super().drawn(epoch, index, network)
        batch.views += [epoch.view(index, self.options.strong) for _ in range(2)]
        return batch
