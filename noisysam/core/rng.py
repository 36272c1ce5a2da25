"""Named random streams: every draw of a run comes from (seed, stage, epoch, stream)."""

import hashlib
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

if TYPE_CHECKING:  # noise models and reports do without torch, whose import takes a second
    import torch

Stream = Literal["init", "order", "augment", "method", "optimizer"]


def stream_seed(seed: int, stage: int, epoch: int, name: Stream, part: int = 0) -> int:
    """63 bits that depend on the five values alone (``part``: the number of the network, or of a second use)."""
    digest = hashlib.sha256(f"noisysam/{seed}/{stage}/{epoch}/{name}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, stage: int, epoch: int, name: Stream, device: "torch.device", part: int = 0) -> "torch.Generator":
    """A generator on ``device``, seeded with ``stream_seed``."""
    import torch

    return torch.Generator(device).manual_seed(stream_seed(seed, stage, epoch, name, part))


def random_bits(n: int, *name: object) -> NDArray[np.uint64]:
    """``n`` words of 64 random bits that depend on ``name`` alone, on every machine and with every numpy.

    They are the raw output of Philox4x64-10 (Salmon et al. 2011) keyed by the first 128 bits of SHA-256 of the names
    joined by '/'; numpy keeps raw output stable across versions, but not what its Generator methods make of it.
    """
    digest = hashlib.sha256("/".join(str(part) for part in name).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)


def random_uniforms(n: int, *name: object) -> NDArray[np.float64]:
    """``n`` numbers in [0, 1), the top 53 bits of ``random_bits``."""
    return (random_bits(n, *name) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_normals(n: int, *name: object) -> NDArray[np.float64]:
    """``n`` standard normal numbers, by the inverse of the distribution function at the middles of 2^53 equal parts."""
    values: NDArray[np.float64] = ndtri(random_uniforms(n, *name) + 2.0**-54)
    return values
