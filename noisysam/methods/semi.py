"""What semi-supervised methods share: strong views and consistency."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import Options

Policy = Literal["standard", "color", "rand", "auto", "auto-plain"]


class StrongView(Options):
    """The option of a method that draws strong views."""

    strong: Policy = Field("auto", description="augmentation of the strong view (AutoAugment and cutout)")


def consistency(weak: Tensor, strong: Tensor) -> Tensor:
    """KL(p of the weak view, a constant || p of the strong view) of each row, from logits (n, K)."""
    log_p = weak.detach().log_softmax(1)
    return (log_p.exp() * (log_p - strong.log_softmax(1))).sum(1)


def partners(chosen: Tensor, generator: torch.Generator | None) -> Tensor:
    """A permutation of rows (n,) that maps the chosen ones (1, the others 0) among themselves."""
    order = (-chosen).argsort(stable=True)
    key = torch.rand(len(chosen), generator=generator, device=chosen.device) - chosen
    return torch.empty_like(order).scatter_(0, order, key.argsort())
