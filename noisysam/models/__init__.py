"""Networks."""

from noisysam.models.blocks import BatchNorm, LastActivation
from noisysam.models.compilation import compiled
from noisysam.models.resnet import MODELS, Architecture, ResNet, build, check_size

__all__ = ["MODELS", "Architecture", "BatchNorm", "LastActivation", "ResNet", "build", "check_size", "compiled"]
