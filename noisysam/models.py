"""CIFAR ResNets: two residual blocks, one network class, and a registry of architectures.

Every network gives logits from ``forward(x)`` for x of shape (n, C, H, W), and its penultimate features from
``features(x)``. Inputs from 8x8x1 to 32x32x3 work. Batch norm in training needs more than one value per channel.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisysam.errors import UserError
from noisysam.registry import Registry

NORMS = ("batch", "group", "none")
GROUPS = 8  # divides every published width below, and leaves at least two channels a group


@torch.library.custom_op("noisysam::once", mutates_args=())
def once(values: Tensor) -> Tensor:
    """``values`` as they are. The compiler for CPUs writes what leads to a small tensor into every loop that reads it,
    roots and divisions for each pixel; past this call it reads the results."""
    return values.clone()


once.register_fake(torch.empty_like)
once.register_autograd(lambda context, gradient: once(gradient))


LANES = 32  # bfloat16 numbers in a vector of a CPU
COMPILED_FORMS = 1000  # shapes and the like, in a process; past torch's own limit of 8 the rest stays uncompiled


def compiled(module: nn.Module) -> Callable[[Tensor], Any]:
    """``module`` compiled for inputs of fixed shapes, each new shape anew.

    On a CPU the pixels of a layer with few channels fill half a vector or less. A kernel that writes into what it reads
    then takes up to three times as long (most likely each load waits for the store before it, whose vector reaches over
    it): such networks get memory of their own for results, which saves a tenth of a step of ResNet-32.
    """
    import torch._dynamo  # takes a second

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = COMPILED_FORMS
    narrow = any(isinstance(m, nn.Conv2d) and m.out_channels < LANES for m in module.modules())
    on_cpu = next(module.parameters()).device.type == "cpu"
    options: dict[str, Any] | None = {"inplace_buffers": False} if narrow and on_cpu else None
    found: Callable[[Tensor], Any] = torch.compile(module, dynamic=False, options=options)
    return found


def _compiled_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu"


class BatchNorm(nn.BatchNorm2d):
    """Batch norm. Compiled for a CPU it takes a form of its own, which differs in rounding alone: moments in two sums
    (torch's is Welford's recursion, four times slower there), and float32 throughout, where torch's backward keeps
    mean and deviation in bfloat16."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """(n, C, H, W) of any float type -> the same shape and type."""
        if not _compiled_for_cpu(input):
            return super().forward(input)
        x = input.to(self.weight.dtype)
        mean, variance = self._moments(x) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * (variance + self.eps).rsqrt()
        scale, shift = once(torch.stack((scale, self.bias - mean * scale)))
        return (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel, blended into the running ones."""
        over = (0, 2, 3)
        mean, square = once(torch.stack((x.mean(over), x.square().mean(over))))
        variance = (square - mean.square()).clamp(min=0)
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * (n / max(n - 1, 1)), self.momentum or 0.0)
            self.num_batches_tracked += 1
        return mean, variance


class LastActivation(nn.Module):
    """The (leaky) ReLU before the pooling. Its result is needed by nothing else, so compiled code would keep its
    derivative as booleans; those are slow to read on a CPU (an eighth of a step of ResNet-8), numbers are not."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and type."""
        if not _compiled_for_cpu(x):
            return F.leaky_relu(x, self.slope) if self.slope else F.relu(x)
        derivative = torch.where(x > 0, 1.0, self.slope).to(x.dtype)
        return x * once(derivative)


@dataclass(frozen=True)
class Layers:
    """The layers that all blocks of one network share: kind of norm and its eps, slope of the leaky ReLU (0: ReLU)."""

    norm: str
    eps: float
    slope: float

    def convolution(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
        """A padded convolution; it has a bias only where no norm follows to give one."""
        return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=self.norm == "none")

    def normalise(self, channels: int) -> nn.Module:
        """The norm over ``channels``."""
        if self.norm == "batch":
            return BatchNorm(channels, self.eps)
        return nn.GroupNorm(GROUPS, channels, self.eps) if self.norm == "group" else nn.Identity()

    def activate(self) -> nn.Module:
        """The activation: in place on what a norm gave; without norms its input may be a shortcut's too."""
        inplace = self.norm != "none"
        return nn.LeakyReLU(self.slope, inplace) if self.slope else nn.ReLU(inplace)


class PadShortcut(nn.Module):
    """Parameter-free shortcut: shrink by ``stride``, then zero-pad the channels on both sides.

    ``pool`` averages each stride x stride window (MentorMix); otherwise every stride-th pixel is kept (option A of
    arXiv 1512.03385, section 3.3).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, pool: bool) -> None:
        super().__init__()
        self.stride, self.pool = stride, pool
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, ceil(H / stride), ceil(W / stride))."""
        shrunk = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.pool else x[:, :, :: self.stride, :: self.stride]
        return F.pad(shrunk, (0, 0, 0, 0, self.before, self.after))


def _shortcut(layers: Layers, kind: str, inputs: int, outputs: int, stride: int, norm: bool) -> nn.Module:
    """The skip path: identity where the shape stays, else by ``kind``: "subsample", "pool" or "project" (1x1)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if kind != "project":
        return PadShortcut(inputs, outputs, stride, pool=kind == "pool")
    convolution = layers.convolution(inputs, outputs, stride, kernel=1)
    return nn.Sequential(convolution, layers.normalise(outputs)) if norm else convolution


class BasicBlock(nn.Module):
    """Post-activation residual block of two 3x3 convolutions (arXiv 1512.03385, figure 2)."""

    def __init__(self, layers: Layers, shortcut: str, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.convolution(inputs, outputs, stride)
        self.norm1 = layers.normalise(outputs)
        self.conv2 = layers.convolution(outputs, outputs)
        self.norm2 = layers.normalise(outputs)
        self.shortcut = _shortcut(layers, shortcut, inputs, outputs, stride, norm=True)
        self.activate, self.close = layers.activate(), layers.activate()

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        branch = self.norm2(self.conv2(self.activate(self.norm1(self.conv1(x)))))
        out: Tensor = self.close(self.shortcut(x) + branch)
        return out


class PreActBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions (arXiv 1603.05027, figure 4e).

    A projection reads the activated input, an identity or padded shortcut the raw one. ``opened`` says that the stem
    has normalised and activated the input already.
    """

    def __init__(
        self, layers: Layers, shortcut: str, inputs: int, outputs: int, stride: int, opened: bool = False
    ) -> None:
        super().__init__()
        self.open = nn.Identity() if opened else nn.Sequential(layers.normalise(inputs), layers.activate())
        self.conv1 = layers.convolution(inputs, outputs, stride)
        self.norm2 = layers.normalise(outputs)
        self.activate = layers.activate()
        self.conv2 = layers.convolution(outputs, outputs)
        self.shortcut = _shortcut(layers, shortcut, inputs, outputs, stride, norm=False)
        self.projects = isinstance(self.shortcut, nn.Conv2d)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        opened = self.open(x)
        branch = self.conv2(self.activate(self.norm2(self.conv1(opened))))
        out: Tensor = self.shortcut(opened if self.projects else x) + branch
        return out


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


@dataclass
class Architecture:
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


MODELS: Registry[Architecture] = Registry("model")


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


def build(
    name: str, classes: int, channels: int = 3, *, width: float = 1.0, norm: str = "batch", seed: int = 0
) -> ResNet:
    """The network ``name`` for images of ``channels`` channels, on the CPU, in channels_last memory format.

    ``width`` multiplies all channel counts (rounded, at least 1; with group norm to a multiple of its 8 groups, at
    least 16). ``norm``: "batch", "group", or "none" (convolutions with biases, residual branches that start at zero).
    Weights depend on ``seed`` alone; the global random state is left as it was.
    ``UserError`` for an unknown name or norm, or a width that is not a positive number.
    """
    architecture = MODELS[name]
    if norm not in NORMS:
        raise UserError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)}")
    if not (math.isfinite(width) and width > 0):
        raise UserError(f"width is {width}: give a positive factor for the channel counts, such as 0.5")

    def scale(count: int) -> int:
        return max(2, round(count * width / GROUPS)) * GROUPS if norm == "group" else max(1, round(count * width))

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed CUDA too
        network = architecture(classes, channels, scale, norm)
        _initialise(network, norm)
    return network.to(memory_format=torch.channels_last)


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
