"""Augmentation: crops as slices, uniform draws, colour against colorsys, and no trace on global random state."""

import colorsys
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional as F

from noisysam.core.errors import UserError
from noisysam.data.augmentation import (
    POLICIES,
    augment,
    auto_augment,
    auto_policies,
    crop_flip,
    cutout,
    distort_color,
    normalise,
    operation,
    rand_augment,
    rand_operations,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int = 6, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, size, size, channels), generator=generator(seed), dtype=torch.uint8)


def padded_by(images: Tensor, pad: int) -> Tensor:
    return F.pad(images, (0, 0, pad, pad, pad, pad))


def offsets_of(crop: Tensor, padded: Tensor, size: int, pad: int) -> list[tuple[int, int, bool]]:
    """All (dy, dx, flip) at which ``crop`` is a slice of ``padded``."""
    found = []
    for dy in range(2 * pad + 1):
        for dx in range(2 * pad + 1):
            window = padded[dy : dy + size, dx : dx + size]
            found += [(dy, dx, flip) for flip in (False, True) if torch.equal(crop, window.flip(1) if flip else window)]
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.booleans(), st.sampled_from([1, 3]))
def test_every_crop_is_a_slice_of_its_own_image(seed: int, pad: int, flip: bool, channels: int) -> None:
    size = 5
    # All pixels of all images differ, and none is zero like the padding.
    pixels = torch.arange(25, dtype=torch.uint8).reshape(1, 5, 5, 1) + 1
    images = pixels.repeat(4, 1, 1, channels) + 30 * torch.arange(4, dtype=torch.uint8)[:, None, None, None]
    padded = padded_by(images, pad)
    index = torch.tensor([3, 0, 0, 2, 1])
    crops = crop_flip(padded, index, size, pad, flip, generator(seed))
    assert crops.shape == (5, size, size, channels)
    assert crops.dtype == torch.uint8
    for crop, source in zip(crops, index, strict=True):
        found = offsets_of(crop, padded[source], size, pad)
        assert len(found) == 1
        assert flip or not found[0][2]


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    pad, size, draws = 1, 5, 3600
    padded = padded_by(torch.arange(1, 26, dtype=torch.uint8).reshape(1, size, size, 1), pad)
    crops = crop_flip(padded, torch.zeros(draws, dtype=torch.int64), size, pad, True, generator())
    counts = dict.fromkeys(((y, x, f) for y in range(3) for x in range(3) for f in (False, True)), 0)
    middle = crops[:, 2, 2, 0].long()  # the pixel at the centre names (dy, dx); its right neighbour the flip
    right = crops[:, 2, 3, 0].long()
    for centre, neighbour in zip(middle.tolist(), right.tolist(), strict=True):
        y, x = divmod(centre - 1, size)
        counts[y - 1, x - 1, neighbour < centre] += 1
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 40.8  # 17 degrees of freedom, p = 0.001


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_is_its_seed_and_leaves_global_state_alone(policy: str, channels: int) -> None:
    padded = padded_by(random_images(channels=channels), 2)
    index = torch.tensor([4, 1, 1, 0])
    options = {"size": 8, "pad": 2, "flip": True}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = augment(policy, padded, index, generator=generator(7), **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(first, augment(policy, padded, index, generator=generator(7), **options))
    assert first.shape == (4, 8, 8, channels)
    assert first.dtype == torch.uint8
    if policy != "none":
        assert not torch.equal(first, augment(policy, padded, index, generator=generator(8), **options))


def test_none_is_the_central_crop_without_a_draw() -> None:
    images = random_images()
    source = generator()
    before = source.get_state()
    index = torch.tensor([2, 2, 5])
    out = augment("none", padded_by(images, 3), index, size=8, pad=3, flip=True, generator=source)
    assert torch.equal(out, images[index])
    assert torch.equal(source.get_state(), before)


def test_policies_are_crop_and_flip_and_then_their_steps() -> None:
    padded = padded_by(random_images(), 2)
    index = torch.arange(6)
    for policy, step in (("standard", None), ("color", distort_color), ("rand", rand_augment), ("auto", auto_augment)):
        out = augment(policy, padded, index, size=8, pad=2, flip=True, generator=generator(1))
        source = generator(1)
        expected = crop_flip(padded, index, 8, 2, True, source)
        assert torch.equal(out, step(expected, source) if step else expected)


def test_unknown_policy_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="none, standard, color, rand"):
        augment("colour", random_images(), torch.tensor([0]), size=8, pad=0, flip=False, generator=generator())


def reference_color(image: npt.NDArray[np.uint8], draws: list[float]) -> npt.NDArray[np.float64]:
    """One image, pixel by pixel with colorsys: its HSV is exact inside the colour cube, so brightness must stay in."""
    x = image.astype(np.float64) / 255 + (2 * draws[0] - 1) * 32 / 255
    saturation, hue, factor, early = 0.5 + draws[1], 0.4 * draws[2] - 0.2, 0.5 + draws[3], draws[4] < 0.5

    def contrast(y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        mean = y.mean((0, 1))
        return (y - mean) * factor + mean

    x = contrast(x) if early else x
    if image.shape[2] == 3:
        assert x.min() >= 0
        for place in np.ndindex(x.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*x[place])
            x[place] = colorsys.hsv_to_rgb((h + hue) % 1, min(1.0, s * saturation), v)
    x = x if early else contrast(x)
    return np.clip(x, 0, 1) * 255


@pytest.mark.parametrize("channels", [1, 3])
def test_distort_color_against_colorsys(channels: int) -> None:
    images = torch.randint(100, 200, (24, 6, 6, channels), generator=generator(2), dtype=torch.uint8)
    images[:, 0, 0] = 120  # a grey pixel has no hue
    found = distort_color(images, generator(5))
    draws = torch.rand((5, 24, 1, 1, 1), generator=generator(5)).reshape(5, 24)
    assert 0 < (draws[4] < 0.5).sum() < 24
    for i in range(24):
        expected = reference_color(images[i].numpy(), draws[:, i].tolist())
        assert np.abs(found[i].numpy() - expected).max() <= 0.5 + 1e-3


def test_distort_color_outside_the_colour_cube() -> None:
    # A flat image has no contrast, and saturation and hue keep the largest channel, so brightness alone moves it.
    flat = torch.tensor([5, 0, 2], dtype=torch.uint8).repeat(256, 4, 4, 1)
    out = distort_color(flat, generator())
    largest = 5 + (2 * torch.rand((5, 256, 1, 1, 1), generator=generator())[0].flatten() - 1) * 32
    assert ((largest < 0).sum() > 50) & ((largest > 0) & (largest < 5)).any()
    assert (out[:, 0, 0].amax(-1) - largest.clamp(min=0)).abs().max() <= 0.5 + 1e-3
    assert (out[largest < 0] == 0).all()
    assert torch.equal(out, out[:, :1, :1].expand_as(out))


def test_distort_color_keeps_grey_grey() -> None:
    grey = torch.randint(256, (64, 4, 4, 1), generator=generator(), dtype=torch.uint8).repeat(1, 1, 1, 3)
    out = distort_color(grey, generator()).int()
    assert (out.amax(-1) - out.amin(-1)).max() <= 1


def outcomes(images: torch.Tensor) -> set[tuple[int, ...]]:
    """The different images among (B, C, H, W)."""
    return {tuple(image.flatten().tolist()) for image in images}


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_of_rand_augment_are_those_of_torchvision(channels: int) -> None:
    from torchvision.transforms.v2 import RandAugment

    image = random_images(1, size=12)[..., :channels].permute(0, 3, 1, 2) // 2 + 40
    ours = outcomes(torch.cat([change(image) for pair in rand_operations(12, 12) for change in pair]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = RandAugment(num_ops=1)
        theirs = outcomes(torch.cat([one(image) for _ in range(1000)]))
    assert ours == theirs
    assert len(ours) > 18


def test_rand_augment_draws_two_operations_for_each_sample() -> None:
    n = 28 * 28 * 8
    image = random_images(1, size=4)
    changes = [change for pair in rand_operations(4, 4) for change in pair]
    planes = image.permute(0, 3, 1, 2)
    expected = Counter(tuple(second(first(planes)).flatten().tolist()) for first in changes for second in changes)
    out = rand_augment(image.repeat(n, 1, 1, 1), generator()).permute(0, 3, 1, 2)
    found = Counter(tuple(one.flatten().tolist()) for one in out)
    assert set(found) <= set(expected)
    frequent = [key for key, count in expected.items() if count > 3]
    shares = [(found[key], 8 * expected[key]) for key in frequent]
    statistic = sum((seen - due) ** 2 / due for seen, due in shares)
    assert statistic < chi2.ppf(0.999, len(frequent))
    source = generator()
    assert not torch.equal(*(rand_augment(random_images(32), source) for _ in range(2)))


def test_rows_of_rand_augment_do_not_mix() -> None:
    images = random_images(32, size=8)
    together = rand_augment(images, generator())
    marked = images.clone()
    marked[5] = 255 - marked[5]
    again = rand_augment(marked, generator())
    others = [row for row in range(32) if row != 5]
    assert torch.equal(together[others], again[others])


@pytest.mark.parametrize("place", [0, 1])
def test_auto_augment_draws_the_policies_of_torchvision(place: int) -> None:
    """The first or second operation of every policy, each with its probability, on one image, beside torchvision."""
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

    image, n = random_images(1, size=12).permute(0, 3, 1, 2), 1500
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
    theirs._policies = [(policy[place], ("AutoContrast", 0.0, None)) for policy in theirs._policies]
    expected: Counter[tuple[int, ...]] = Counter()
    for name, p, level in (policy[place] for policy in auto_policies()):
        for change in operation(name, level, 10, 12, 12):
            expected[tuple(change(image).flatten().tolist())] += p / 50
        expected[tuple(image.flatten().tolist())] += (1 - p) / 25  # type: ignore[assignment]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = Counter(tuple(theirs(image).flatten().tolist()) for _ in range(n))
    assert set(found) <= set(expected)
    frequent = [key for key, share in expected.items() if n * share > 5]
    statistic = sum((found[key] - n * expected[key]) ** 2 / (n * expected[key]) for key in frequent)
    assert statistic < chi2.ppf(0.999, len(frequent))


def test_auto_augment_applies_both_operations_of_one_policy() -> None:
    image = random_images(1, size=6)
    planes = image.permute(0, 3, 1, 2)
    expected: Counter[tuple[int, ...]] = Counter()
    for (one, p, low), (two, q, high) in auto_policies():
        for first, share in [*((c, p / 2) for c in operation(one, low, 10, 6, 6)), (lambda x: x, 1 - p)]:
            for second, part in [*((c, q / 2) for c in operation(two, high, 10, 6, 6)), (lambda x: x, 1 - q)]:
                expected[tuple(second(first(planes)).flatten().tolist())] += share * part / 25  # type: ignore[assignment]
    n = 20000
    out = auto_augment(image.repeat(n, 1, 1, 1), generator()).permute(0, 3, 1, 2)
    found = Counter(tuple(one.flatten().tolist()) for one in out)
    assert set(found) <= set(expected)
    frequent = [key for key, share in expected.items() if n * share > 5]
    statistic = sum((found[key] - n * expected[key]) ** 2 / (n * expected[key]) for key in frequent)
    assert statistic < chi2.ppf(0.999, len(frequent))


def test_cutout_is_a_square_that_the_border_cuts() -> None:
    size, n = 8, 4000
    out = cutout(torch.ones(n, 2, size, size), 0.5, generator())
    holes = Counter(tuple((row == 0).all(0).flatten().tolist()) for row in out)
    squares = set()
    for y in range(size):
        for x in range(size):
            mask = np.zeros((size, size), bool)
            mask[max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = True
            squares.add(tuple(mask.flatten().tolist()))
    assert set(holes) == squares
    assert sum((count - n / 64) ** 2 / (n / 64) for count in holes.values()) < chi2.ppf(0.999, 63)
    assert set(out.unique().tolist()) == {0.0, 1.0}


def test_normalise_by_hand_and_in_channels_last() -> None:
    images = random_images()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    out = normalise(images, mean, std)
    assert out.shape == (6, 3, 8, 8)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = (images.numpy().astype(np.float64) / 255 - mean.numpy()) / std.numpy()
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    low = normalise(images, mean, std, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, out.bfloat16())
