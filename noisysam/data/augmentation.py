"""Batch augmentation on the device, drawn per sample from a given generator.

Images are uint8 tensors (B, H, W, C) going in and coming out; the generator lives on their device.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from noisysam.core.errors import UserError


def crop_flip(padded: Tensor, index: Tensor, size: int, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops, mirrored with probability 1/2 if ``flip``, by one gather.

    ``padded``: uint8 (N, size + 2 pad, size + 2 pad, C), zero-padded; ``index``: int64 (B,), the images to draw.
    Returns uint8 (B, size, size, C). Offsets are uniform on 0 ... 2 pad in both directions.
    """
    device, batch = padded.device, len(index)
    offsets = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator, device=device)
    steps = torch.arange(size, device=device)
    rows, columns = offsets[0] + steps, offsets[1] + steps
    if flip:
        mirrored = torch.rand((batch, 1), generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale each channel about its mean over the image."""
    mean = images.mean((1, 2), keepdim=True)
    return mean + factor * (images - mean)


def _saturate_and_rotate(images: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Multiply the HSV saturation (clipped to [0, 1]), then turn the hue by ``hue`` turns; (B, H, W, 3) RGB.

    HSV is held as (hue, smallest channel, largest channel): saturation moves the smallest channel alone, a turn of
    the hue keeps both, so one conversion serves the two. A pixel that brightness made wholly negative becomes grey.
    """
    red, green, blue = images.unbind(-1)
    high, low = images.amax(-1), images.amin(-1)
    spread = torch.where(high > low, high - low, 1.0)
    sixth = torch.where(
        high == red,
        (green - blue) / spread,
        torch.where(high == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    scaled = torch.where(high > 0, ((high - low) / high * saturation).clamp(0, 1), 0.0)
    low = high - scaled * high
    sixth = (sixth + 6 * hue) % 6
    weights = torch.stack(((sixth - 3).abs() - 1, 2 - (sixth - 2).abs(), 2 - (sixth - 4).abs()), -1).clamp(0, 1)
    return low.unsqueeze(-1) + (high - low).unsqueeze(-1) * weights


def distort_color(images: Tensor, generator: torch.Generator) -> Tensor:
    """The colour distortion of MentorMix (Jiang et al. 2020, arXiv 1911.09781, public input pipeline).

    Per sample: brightness + U(-32, 32) / 255; saturation x U(0.5, 1.5); hue + U(-0.2, 0.2) turns; contrast
    x U(0.5, 1.5). Contrast comes last, or with probability 1/2 between brightness and saturation; clipping to
    [0, 1] comes at the end. Images without three channels get brightness and contrast alone. Rounded to uint8.
    """
    draws = torch.rand((5, len(images), 1, 1, 1), generator=generator, device=images.device)
    brightness = (2 * draws[0] - 1) * 32 / 255
    saturation, hue, contrast = 0.5 + draws[1], 0.4 * draws[2] - 0.2, 0.5 + draws[3]
    early = draws[4] < 0.5
    out = images.float() / 255 + brightness
    out = _contrast(out, torch.where(early, contrast, 1.0))
    if images.shape[-1] == 3:
        out = _saturate_and_rotate(out, saturation.squeeze(-1), hue.squeeze(-1))
    out = _contrast(out, torch.where(early, 1.0, contrast))
    return (out.clamp(0, 1) * 255).round().to(torch.uint8)


Change = Callable[[Tensor], Tensor]  # of uint8 images (B, C, H, W)


Signs = tuple[Change, Change]  # an operation with its two signs; where it has no sign, twice the same


@cache
def operation(name: str, level: int, levels: int, height: int, width: int) -> Signs:
    """An operation of AutoAugment (Cubuk et al. 2018, arXiv 1805.09501, table 6) at a level of ``levels``, on uint8
    (B, C, height, width). torchvision's kernels, imported at the first use: that takes about a second."""
    from torchvision.transforms.v2 import functional as f

    def part(most: float, least: float = 0.0) -> float:  # in float32, as torchvision's
        return float(torch.linspace(least, most, levels)[level])

    def warp(translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Change:
        corner = [0.0, 0.0] if any(shear) else None  # a shear leaves the upper left corner where it is
        return lambda x: f.affine(x, 0.0, list(translate), 1.0, list(shear), center=corner)

    def enhance(kernel: Callable[[Tensor, float], Tensor]) -> Signs:
        strength = part(0.9)
        return lambda x: kernel(x, 1 + strength), lambda x: kernel(x, 1 - strength)

    slope, turn, bits = math.degrees(math.atan(part(0.3))), part(30), 8 - round(4 * level / (levels - 1))
    right, down = int(part(150 / 331 * width)), int(part(150 / 331 * height))
    bound = 255 * part(0.0, least=1.0)
    found: dict[str, Callable[[], Signs]] = {
        "Identity": lambda: (lambda x: x, lambda x: x),
        "ShearX": lambda: (warp(shear=(slope, 0)), warp(shear=(-slope, 0))),
        "ShearY": lambda: (warp(shear=(0, slope)), warp(shear=(0, -slope))),
        "TranslateX": lambda: (warp((right, 0)), warp((-right, 0))),
        "TranslateY": lambda: (warp((0, down)), warp((0, -down))),
        "Rotate": lambda: (lambda x: f.rotate(x, turn), lambda x: f.rotate(x, -turn)),
        "Brightness": lambda: enhance(f.adjust_brightness),
        "Color": lambda: enhance(f.adjust_saturation),
        "Contrast": lambda: enhance(f.adjust_contrast),
        "Sharpness": lambda: enhance(f.adjust_sharpness),
        "Posterize": lambda: (lambda x: f.posterize(x, bits),) * 2,
        "Solarize": lambda: (lambda x: f.solarize(x, bound),) * 2,
        "AutoContrast": lambda: (f.autocontrast,) * 2,
        "Equalize": lambda: (f.equalize,) * 2,
        "Invert": lambda: (f.invert,) * 2,
    }
    return found[name]()


RAND = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


def rand_operations(height: int, width: int) -> tuple[Signs, ...]:
    """The 14 operations of RandAugment at magnitude 9 of 30, each with its two signs."""
    return tuple(operation(name, 9, 31, height, width) for name in RAND)


def _changed(planes: Tensor, drawn: Tensor, changes: Sequence[Change]) -> None:
    """Apply to each row of (B, C, H, W) the change that it drew, in place.

    The rows that drew the same go through it together; a GPU is waited for to know how many they are.
    """
    groups = drawn.argsort(stable=True).split(drawn.bincount(minlength=len(changes)).tolist())
    for change, rows in zip(changes, groups, strict=True):
        if len(rows):
            planes[rows] = change(planes[rows])


def rand_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719): two operations of magnitude 9 of 30, drawn per sample."""
    changes = [change for signs in rand_operations(*images.shape[1:3]) for change in signs]
    draws = torch.randint(len(changes), (2, len(images)), generator=generator, device=images.device)
    out = images.permute(0, 3, 1, 2).contiguous()
    for drawn in draws:
        _changed(out, drawn, changes)
    return out.permute(0, 2, 3, 1).contiguous()


@cache
def auto_policies() -> tuple[tuple[tuple[str, float, int], ...], ...]:
    """The 25 policies that AutoAugment found for CIFAR-10 (torchvision's table): two operations each, with the
    probability and the level (of 10) of each operation."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    found = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    return tuple(tuple((name, p, level or 0) for name, p, level in policy) for policy in found)


def auto_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """AutoAugment (Cubuk et al. 2018, arXiv 1805.09501) for CIFAR-10: one of its policies, drawn per sample."""
    height, width, device = *images.shape[1:3], images.device
    policies, n = auto_policies(), len(images)
    chosen = torch.randint(len(policies), (n,), generator=generator, device=device)
    signs = torch.randint(2, (2, n), generator=generator, device=device)
    draws = torch.rand((2, n), generator=generator, device=device)
    out = images.permute(0, 3, 1, 2).contiguous()
    for place, (sign, draw) in enumerate(zip(signs, draws, strict=True)):
        parts = [policy[place] for policy in policies]
        changes = [change for name, _, level in parts for change in operation(name, level, 10, height, width)]
        applied = draw <= torch.tensor([p for _, p, _ in parts], device=device)[chosen]
        _changed(out, torch.where(applied, 2 * chosen + sign, len(changes)), [*changes, lambda x: x])
    return out.permute(0, 2, 3, 1).contiguous()


def cutout(inputs: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Cutout (DeVries and Taylor 2017, arXiv 1708.04552): a square of this share of the image's side is set to zero,
    the mean colour, around a pixel drawn per sample; what of it lies outside is lost. (B, C, H, W), normalised."""
    n, _, height, width = inputs.shape
    half = int(share * height) // 2
    centre = (
        torch.rand((2, n), generator=generator, device=inputs.device) * inputs.new_tensor([[height], [width]])
    ).long()
    rows, columns = (
        (torch.arange(size, device=inputs.device) - place[:, None] + 0.5).abs() < half
        for size, place in zip((height, width), centre, strict=True)
    )
    return inputs.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(images / 255 - mean) / std, computed in float32.

    ``images``: uint8 (B, H, W, C); ``mean`` and ``std``: float32 (C,) on the 0 ... 1 scale, on the same device.
    Returns ``dtype`` (B, C, H, W) in channels_last memory format, without a transposition in memory.
    """
    return ((images.float() / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)


# What follows the random crop and flip; None: not even those.
POLICIES: dict[str, tuple[Callable[[Tensor, torch.Generator], Tensor], ...] | None] = {
    "none": None,
    "standard": (),
    "color": (distort_color,),
    "rand": (rand_augment,),
    "auto": (auto_augment,),
    "auto-plain": (auto_augment,),  # without cutout
}
CUTOUT = {"auto": 0.5}  # policies that end with cutout, on normalised inputs: its share of the image's side


def augment(
    policy: str, padded: Tensor, index: Tensor, *, size: int, pad: int, flip: bool, generator: torch.Generator
) -> Tensor:
    """The images ``index`` of ``padded`` under ``policy``, uint8 (B, size, size, C); arguments as in ``crop_flip``.

    "none" is the central, unpadded crop and draws nothing. ``UserError`` for an unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"unknown augmentation {policy!r}: use one of {', '.join(POLICIES)}")
    steps = POLICIES[policy]
    if steps is None:
        return padded[:, pad : pad + size, pad : pad + size][index]
    images = crop_flip(padded, index, size, pad, flip, generator)
    for step in steps:
        images = step(images, generator)
    return images
