"""Batch augmentation on the device, drawn per sample from a given generator.

Images are uint8 tensors (B, H, W, C) going in and coming out; the generator lives on their device.
"""

import math
from collections.abc import Callable
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


@cache
def rand_operations(height: int, width: int) -> tuple[tuple[Change, Change], ...]:
    """The 14 operations of RandAugment at magnitude 9 of 30, each with its two signs (where it has no sign, twice the
    same), on uint8 (B, C, height, width). torchvision's kernels, imported at the first use: that takes about a second.
    """
    from torchvision.transforms.v2 import functional as f

    def level(most: float) -> float:  # in float32, as torchvision's
        return float(torch.linspace(0, most, 31)[9])

    slope, turn, strength = math.degrees(math.atan(level(0.3))), level(30), level(0.9)
    right, down = int(level(150 / 331 * width)), int(level(150 / 331 * height))

    def warp(translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Change:
        corner = [0.0, 0.0] if any(shear) else None  # a shear leaves the upper left corner where it is
        return lambda x: f.affine(x, 0.0, list(translate), 1.0, list(shear), center=corner)

    return (
        (lambda x: x, lambda x: x),
        (warp(shear=(slope, 0)), warp(shear=(-slope, 0))),
        (warp(shear=(0, slope)), warp(shear=(0, -slope))),
        (warp((right, 0)), warp((-right, 0))),
        (warp((0, down)), warp((0, -down))),
        (lambda x: f.rotate(x, turn), lambda x: f.rotate(x, -turn)),
        (lambda x: f.adjust_brightness(x, 1 + strength), lambda x: f.adjust_brightness(x, 1 - strength)),
        (lambda x: f.adjust_saturation(x, 1 + strength), lambda x: f.adjust_saturation(x, 1 - strength)),
        (lambda x: f.adjust_contrast(x, 1 + strength), lambda x: f.adjust_contrast(x, 1 - strength)),
        (lambda x: f.adjust_sharpness(x, 1 + strength), lambda x: f.adjust_sharpness(x, 1 - strength)),
        (lambda x: f.posterize(x, 7),) * 2,
        (lambda x: f.solarize(x, 255 * float(torch.linspace(1, 0, 31)[9])),) * 2,
        (f.autocontrast,) * 2,
        (f.equalize,) * 2,
    )


def rand_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719): two operations of magnitude 9 of 30, drawn per sample.

    The rows that drew the same go through it together; a GPU is waited for to know how many they are.
    """
    changes = [change for signs in rand_operations(*images.shape[1:3]) for change in signs]
    draws = torch.randint(len(changes), (2, len(images)), generator=generator, device=images.device)
    out = images.permute(0, 3, 1, 2).contiguous()
    for drawn in draws:
        groups = drawn.argsort(stable=True).split(drawn.bincount(minlength=len(changes)).tolist())
        for change, rows in zip(changes, groups, strict=True):
            if len(rows):
                out[rows] = change(out[rows])
    return out.permute(0, 2, 3, 1).contiguous()


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
}


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
