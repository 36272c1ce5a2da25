"""Named random streams: every draw of a run comes from (seed, stage, epoch, stream)."""

import hashlib
from typing import Literal

import torch

Stream = Literal["init", "order", "augment", "method", "optimizer"]


def stream_seed(seed: int, stage: int, epoch: int, name: Stream, part: int = 0) -> int:
    """63 bits that depend on the five values alone (``part``: the number of the network, or of a second use)."""
    digest = hashlib.sha256(f"noisysam/{seed}/{stage}/{epoch}/{name}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, stage: int, epoch: int, name: Stream, device: torch.device, part: int = 0) -> torch.Generator:
    """A generator on ``device``, seeded with ``stream_seed``."""
    return torch.Generator(device).manual_seed(stream_seed(seed, stage, epoch, name, part))
