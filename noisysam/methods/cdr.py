"""CDR."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, Rate, rate_facts
from noisysam.methods.recipe import Epochs, PublishedRecipe


class CDROptions(Options):
    rate: Rate = Field(None, description="share left out in the end (default: the run's noise rate; 0.5x of it)")
    ramp: Epochs = Field(
        20, ge=0, description="epochs until that share is reached (CIFAR 20, MNIST 10; code in effect 0)"
    )
    within: Literal["network", "tensor"] = Field(
        "network", description="among which gradients one is ranked: all of the network (code), or those of its tensor"
    )
    scale: bool = Field(True, description="multiply the gradients kept by the share kept (code)")


@METHODS.register("cdr", source="ICLR 2021, openreview Eql5b1_hTE4, section 3")
class CDR(Method):
    """CDR: in each step only the critical weights follow their gradient; the others only decay.

    Equation: g_j <- c g_j where |g_j w_j| is among the c m largest of the m weights, else 0; c = 1 - tau min(e/ramp, 1)
    Code: xiaoboxia/CDR@6665a8b main.py
    Deviation: c falls over the first epochs; the code computes this schedule, then overwrites it by 1 - tau (ramp=0).
        As in the code, tensors of one dimension (biases, norm layers) keep their gradient, and momentum is not masked.
        With --l2 loss the decay is part of the gradient and is left out with it: use --l2 descent.
    Checked: equal to the authors' gradients at ramp=0 to 1e-12 (tests/parity); hand-made tensors and rate 0; against
        numpy's sort; gradients that are not finite stay so.
    """

    Options = CDROptions

    @classmethod
    def noise_facts(cls, options: CDROptions) -> tuple[str, ...]:
        return rate_facts(options.rate)

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"ramp": 0}  # the code in effect

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="xiaoboxia/CDR@6665a8b main.py",
            augment="standard",
            batch=64,
            epochs=200,
            lr=0.01,
            weight_decay=1e-3,
            schedule="milestones",
            milestones=[40, 80],
            differs={"model": "ResNet-50, not in this package"},
        )

    def transform_gradient(self, grads: list[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        o = self.options
        share = 1 - self.rate(o.rate) * min(1.0, self.epoch / o.ramp if o.ramp else 1.0)
        ranked = [p.ndim in (2, 4) for p in params]
        worth = [(g * p).abs() for g, p, chosen in zip(grads, params, ranked, strict=True) if chosen]
        if o.within == "tensor":
            bars = [bar(w, share) for w in worth]
        else:
            bars = [bar(torch.cat([w.flatten() for w in worth]), share)] * len(worth) if worth else []
        factor = share if o.scale else 1.0
        # multiplied, not chosen: a gradient that is not finite stays so, and the step is skipped
        masks = iter([w >= b for w, b in zip(worth, bars, strict=True)])
        return [g * next(masks) * factor if chosen else g for g, chosen in zip(grads, ranked, strict=True)]


def bar(worth: Tensor, share: float) -> Tensor:
    """The least of the largest values that make up a share of all; at least one value, and ties with it, pass."""
    kept = max(1, int(share * worth.numel()))
    return worth.flatten().kthvalue(worth.numel() - kept + 1).values
