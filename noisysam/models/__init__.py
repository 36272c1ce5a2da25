"""Networks."""

from noisysam.models import cnn  # noqa: F401  (its networks come after the ResNets)
from noisysam.models.blocks import BatchNorm, LastActivation
from noisysam.models.compilation import compiled
from noisysam.models.resnet import MODELS, Architecture, NetworkArchitecture, ResNet, build, check_size

__all__ = [
    "MODELS",
    "Architecture",
    "BatchNorm",
    "LastActivation",
    "NetworkArchitecture",
    "ResNet",
    "build",
    "check_size",
    "compiled",
]
