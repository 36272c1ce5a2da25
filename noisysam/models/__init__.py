"""Networks."""

from noisysam.models.blocks import BatchNorm, LastActivation
from noisysam.models.compilation import compiled
from noisysam.models.resnet import MODELS, Architecture, ResNet, build

__all__ = ["MODELS", "Architecture", "BatchNorm", "LastActivation", "ResNet", "build", "compiled"]
