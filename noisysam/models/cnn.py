"""Convolutional networks without shortcuts, which the recipes of some methods train.

Their weights are drawn as those of every network here; their convolutions have a bias only where no norm follows.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from noisysam.models.blocks import Layers
from noisysam.models.resnet import MODELS, ResNet, Scalable


class Valid(nn.Module):
    """A convolution without padding, with its norm and activation; an image that is too small is padded."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=layers.norm == "none")
        self.close = nn.Sequential(layers.normalise(outputs), layers.activate())

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H - kernel + 1, W - kernel + 1), or padded to keep the size."""
        if min(x.shape[2:]) < self.kernel:
            x = F.pad(x, (self.kernel // 2,) * 4)
        out: Tensor = self.close(self.conv(x))
        return out


@dataclass
class PlainArchitecture(Scalable):
    """What tells one of these networks from another. ``widths``: channels of each stage's convolutions, or one number
    for a dense layer over a 4 x 4 image; ``valid``: stages whose convolutions have no padding."""

    summary: str
    stages: tuple[tuple[int, ...], ...]
    slope: float = 0.0
    valid: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.__doc__ = self.summary
        self.widths = tuple(stage[-1] for stage in self.stages)

    def __call__(self, classes: int, channels: int, scale: Callable[[int], int], norm: str) -> ResNet:
        """The network, its channel counts mapped by ``scale``, with torch's default weights."""
        layers = Layers(norm, 1e-5, self.slope)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = channels
        for number, stage in enumerate(self.stages, start=1):
            parts: list[nn.Module] = []
            if number in self.dense:
                parts += [nn.AdaptiveAvgPool2d(4), Valid(layers, inputs, scale(stage[0]), 4)]
                inputs = scale(stage[0])
            for count in () if number in self.dense else stage:
                width = scale(count)
                if number in self.valid:
                    parts.append(Valid(layers, inputs, width, 3))
                else:
                    parts.append(
                        nn.Sequential(layers.convolution(inputs, width), layers.normalise(width), layers.activate())
                    )
                inputs = width
            if number == 1:
                blocks["stem"] = parts.pop(0)
            if number not in self.valid + self.dense:
                parts.append(nn.MaxPool2d(2))
                parts += [nn.Dropout2d(self.dropout)] if self.dropout else []
            blocks[f"stage{number}"] = nn.Sequential(*parts)
        return ResNet(blocks, inputs, classes)


MODELS.register("cnn9", source="Han et al. 2018 (Co-teaching), arXiv 1804.06872, table 2; bhanML/Co-teaching@7c7fbe2")(
    PlainArchitecture(
        "The nine convolutions of Co-teaching, with dropout; 4.4 M parameters.",
        ((128, 128, 128), (256, 256, 256), (512, 256, 128)), slope=0.01, valid=(3,), dropout=0.25,
    )
)  # fmt: skip


MODELS.register("cnn8", source="HanxunH/Active-Passive-Losses@04bce53 models.py (SCE, APL), CIFAR-10")(
    PlainArchitecture(
        "The six convolutions and two dense layers of SCE and APL; 1.6 M parameters.",
        ((64, 64), (128, 128), (196, 196), (256,)), dense=(4,),
    )
)  # fmt: skip
