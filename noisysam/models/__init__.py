"""Networks."""

from noisysam.models.blocks import BatchNorm, LastActivation
from noisysam.models.compilation import compiled
from noisysam.models.networks import Model, build, check, find, weights_file
from noisysam.models.resnet import MODELS, Architecture, ResNet

__all__ = [
    "MODELS", "Architecture", "BatchNorm", "LastActivation", "Model", "ResNet", "build", "check", "compiled", "find",
    "weights_file",
]  # fmt: skip
