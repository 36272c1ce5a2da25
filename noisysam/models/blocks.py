"""Layers and residual blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisysam.models.compilation import _compiled_for_cpu, once

NORMS = ("batch", "group", "none")


GROUPS = 8  # divides every published width below, and leaves at least two channels a group


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
