"""Published recipes."""

from typing import Any

from pydantic import BaseModel


class Preset(BaseModel):
    """A published recipe: its values, and what the paper leaves open with what we set it to."""

    source: str
    values: dict[str, Any]
    unpublished: dict[str, str]


PRESETS = {
    "published": Preset(source="what the method's authors chose for this noise (oracle)", values={}, unpublished={}),
    "foret": Preset(
        source="Foret et al. 2020, arXiv 2010.01412, section 3.3, appendix C.1 and google-research/sam",
        values={
            "model": "resnet32-wide",
            "batch": 256,
            "clip": 5.0,
            "l2": "loss",
            "nesterov": True,
            "schedule": "cosine",
            "epochs": 200,
        },
        unpublished={
            "lr": "0.1 (the paper's value for WRN-28-10)",
            "weight_decay": "5e-4 (the paper's value for WRN-28-10)",
            "m": "32 (eight devices, batch 256, as in the clean CIFAR runs)",
            "noise_type": "symmetric, over all classes (SGD's 26.2 % at 80 % agrees with no other)",
            "augment": "standard, crop and flip (the default of the released code)",
            "model": "resnet32-wide, after 'following Jiang et al. 2019'",
            "val_fraction": "0.1, noisy, so that an epoch can be selected; the paper does not say what it trains on",
            "selection": "last epoch",
            "rho": "0.1 at every rate (blind); --rho paper gives the paper's choice",
        },
    ),
}
