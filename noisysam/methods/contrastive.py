"""What methods with a contrastive loss share: the projection head and the loss."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drawn(make: Callable[[], nn.Module], rng: np.random.Generator, device: torch.device) -> nn.Module:
    """What ``make`` makes, with weights drawn from the method's own stream; the global state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**31)))
        return make().to(device)


def contrastive(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross-entropy of SimCLR (arXiv 2002.05709, equation 1) of each row (n,).

    ``first`` and ``second`` (n, d) are two views of each row. A row's loss is the mean over its two views of the
    cross-entropy that finds the other one, by cosine / temperature, among the 2 n - 1 other images.
    """
    rows = len(first)
    unit = F.normalize(torch.cat([first, second]), dim=1)
    similar = unit @ unit.T / temperature
    similar = similar.masked_fill(torch.eye(2 * rows, dtype=torch.bool, device=unit.device), -torch.inf)
    other = torch.arange(2 * rows, device=unit.device).roll(rows)
    return F.cross_entropy(similar, other, reduction="none").unflatten(0, (2, rows)).mean(0)
