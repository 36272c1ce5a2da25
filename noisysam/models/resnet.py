"""CIFAR ResNets: two residual blocks, one network class, and a registry of architectures.

Every network gives logits from ``forward(x)`` for x of shape (n, C, H, W), and its penultimate features from
``features(x)``. Inputs from 8x8x1 to 32x32x3 work. Batch norm in training needs more than one value per channel.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from noisysam.core.errors import UserError
from noisysam.core.registry import Registry, call_fault
from noisysam.models.blocks import GROUPS, BasicBlock, LastActivation, Layers, PreActBlock


class ResNet(nn.Module):
    """Named blocks in forward order (stem, stage1, ...), global average pooling, and a linear head."""

    def __init__(self, blocks: OrderedDict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(blocks)
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> penultimate features (n, d)."""
        out: Tensor = self.blocks(x).mean((2, 3))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> logits (n, classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def named_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) in forward order: stem, stage1, ..., head. Together they hold each parameter once."""
        yield from self.blocks.named_children()
        yield "head", self.head


class Scalable(ABC):
    """An architecture of this package, whose channels are multiplied by --width: see ``networks.build``."""

    @abstractmethod
    def __call__(self, classes: int, channels: int, scale: Callable[[int], int], norm: str) -> ResNet:
        """The network, its channel counts mapped by ``scale``, with torch's default weights."""


@dataclass
class Architecture(Scalable):
    """What tells one ResNet from another; ``summary`` becomes the docstring that lists print.

    ``widths`` and ``depths`` are channels and blocks of each stage; the first stage keeps the resolution, each later
    one halves it. ``shortcut``: "subsample", "pool" or "project".
    """

    summary: str
    block: type[BasicBlock] | type[PreActBlock]
    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    shortcut: str
    eps: float = 1e-5
    slope: float = 0.0
    opening_stem: bool = False  # the stem activates and normalises what the first pre-activation block reads

    def __post_init__(self) -> None:
        self.__doc__ = self.summary

    def __call__(self, classes: int, channels: int, scale: Callable[[int], int], norm: str) -> ResNet:
        """The network, its channel counts mapped by ``scale``, with torch's default weights."""
        layers = Layers(norm, self.eps, self.slope)
        inputs = scale(self.stem)
        stem: list[nn.Module] = [layers.convolution(channels, inputs)]
        if self.opening_stem:
            stem += [layers.activate(), layers.normalise(inputs)]
        elif self.block is BasicBlock:
            stem += [layers.normalise(inputs), layers.activate()]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*stem))
        for number, (width, depth) in enumerate(zip(map(scale, self.widths), self.depths, strict=True), start=1):
            stage = nn.Sequential()
            for position in range(depth):
                stride = 2 if number > 1 and position == 0 else 1
                opened = {"opened": True} if self.opening_stem and number == 1 and position == 0 else {}
                stage.append(self.block(layers, self.shortcut, inputs, width, stride, **opened))
                inputs = width
            blocks[f"stage{number}"] = stage
        last = LastActivation(self.slope)
        if self.block is PreActBlock:  # the activation that closes the last residual sum
            stage.extend([layers.normalise(inputs), last])
        else:
            stage[-1].close = last
        return ResNet(blocks, inputs, classes)


def _fault(item: object) -> str | None:
    """Why something cannot be a model."""
    own = isinstance(item, Scalable)
    return None if own else call_fault(item, ("classes", "channels", "size"), "the function or class")


MODELS: Registry[Callable[..., nn.Module]] = Registry("model", _fault)


WIDTH, PARAMETERS = 1000, 10**9  # limits; 10^9 parameters take 4 GB in float32


def _initialise(network: ResNet, norm: str) -> None:
    """Draw every convolution from the Kaiming normal by fan-out (arXiv 1502.01852, section 2.2); biases are zero.

    Without norms, as in Fixup (arXiv 1901.09321, section 3; here without its scalar multipliers and zero head), the
    last convolution of each of the L residual branches starts at zero and the first one is scaled by L^(-1/2): each
    block starts as its shortcut, and one step changes the function by an amount that does not grow with depth. Nothing
    bounds the activations later: a learning rate near 0.1 needs gradient clipping.
    """
    residual = [block for block in network.modules() if isinstance(block, BasicBlock | PreActBlock)]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if norm == "none":
        with torch.no_grad():
            for block in residual:
                block.conv1.weight.mul_(len(residual) ** -0.5)
                block.conv2.weight.zero_()


def _scale(width: float, norm: str) -> Callable[[int], int]:
    """The channels of a layer by its channels at width 1."""

    def scale(count: int) -> int:
        if norm == "group":
            return max(2, round(count * width / GROUPS)) * GROUPS
        return max(1, round(count * width))

    return scale


@lru_cache
def check_size(name: str, classes: int, channels: int, width: float, norm: str) -> None:
    """``UserError`` if a network would have too many parameters. Nothing is allocated."""
    if width > WIDTH:
        raise UserError(f"--width {width:g}: at most {WIDTH}")
    with torch.device("meta"):
        network = MODELS[name](classes, channels, _scale(width, norm), norm)
    count = sum(p.numel() for p in network.parameters())
    if count > PARAMETERS:
        raise UserError(f"--width {width:g}: {name} would have {count:,} parameters, more than {PARAMETERS:,}")


def scaled(
    architecture: Scalable,
    classes: int,
    channels: int,
    width: float,
    norm: str,
) -> ResNet:
    """A network of this width and norm with initial weights from torch's default generator."""
    network = architecture(classes, channels, _scale(width, norm), norm)
    _initialise(network, norm)
    return network


for _depth in (8, 14, 20, 32, 44, 56, 110):
    MODELS.register(f"resnet{_depth}", source="He et al. 2015, arXiv 1512.03385, section 4.2")(
        Architecture(
            f"ResNet-{_depth} for CIFAR: widths 16, 32, 64, parameter-free shortcuts (option A).",
            BasicBlock, 16, (16, 32, 64), ((_depth - 2) // 6,) * 3, "subsample",
        )
    )  # fmt: skip


# MentorMix's public network: its stem activates first and normalises then, for branch and shortcut of the first block;
# eps 1e-3. One difference: torch pads a stride-2 convolution evenly, TensorFlow's SAME on the far side alone.
MODELS.register("resnet32-wide", source="Jiang et al. 2020 (MentorMix), arXiv 1911.09781, public network")(
    Architecture(
        "The wide pre-activation ResNet-32 of MentorMix, most likely that of SAM's Table 4; 29.4 M parameters.",
        PreActBlock, 64, (128, 256, 512), (5, 5, 5), "pool", eps=1e-3, slope=0.1, opening_stem=True,
    )
)  # fmt: skip


MODELS.register("preact-resnet18", source="He et al. 2016, arXiv 1603.05027")(
    Architecture(
        "Pre-activation ResNet-18 with a 3x3 stem, the usual network of the label-noise literature.",
        PreActBlock, 64, (64, 128, 256, 512), (2, 2, 2, 2), "project",
    )
)  # fmt: skip


for _depth, _depths in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
    MODELS.register(f"resnet{_depth}", source="He et al. 2015, arXiv 1512.03385, table 1, with a 3x3 stem")(
        Architecture(
            f"ResNet-{_depth} with a 3x3 stem and projection shortcuts (option B).",
            BasicBlock, 64, (64, 128, 256, 512), _depths, "project",
        )
    )  # fmt: skip


MODELS.register("wrn-28-10", source="Zagoruyko and Komodakis 2016, arXiv 1605.07146")(
    Architecture(
        "Wide ResNet 28-10 without dropout; 36.5 M parameters.",
        PreActBlock, 16, (160, 320, 640), (4, 4, 4), "project",
    )
)  # fmt: skip
