"""INCV."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, RunInfo, Stage, StageContext
from noisysam.methods.recipe import PublishedRecipe


class INCVOptions(Options):
    iterations: int = Field(4, ge=1, description="divisions into halves, with two trainings each (published 4)")
    length: float = Field(0.25, gt=0, description="length of these trainings, in --epochs (published 50 / 200)")
    remove: float | None = Field(
        None,
        ge=0,
        description="discarded for each selected sample (default: min(2, e / (1-e)), e estimated; asymmetric noise: 0)",
    )


@METHODS.register("incv", source="arXiv 1905.05040, Algorithm 2")
class INCV(Method):
    """INCV: trains on one half, selects from the other the samples whose label it predicts; then trains on those.

    Equation: S = {i held out: argmax p_i = y_i}; dropped from the candidates: S and the r |S| largest losses held out,
        r = min(2, e / (1-e)); e, from the first half: agreement = (1-e)^2 + e^2 / (K-1)
    Code: chenpf1025/noisy_label_understanding_utilizing@a6c8e0d INCV_main.py
    Deviation: the last training is cross-entropy on the selected samples (paper: co-teaching, with the remaining
        candidates later on); incv,co-teaching runs every training by co-teaching.
    Deviation: a half's last epoch judges (code: in the first iterations the one of best held-out accuracy); each
        training has its own initial weights (code: the same); e is solved for (code: raised by steps of 0.001).
    State: none per sample; the logits of 2 x iterations trainings (4 K bytes per sample each) are in the checkpoint
    Checked: the samples that the code selects from the same halves and predictions, exactly, over two iterations
        (tests/parity); a division by hand; the estimate; a resume in the last stage
    """

    Options = INCVOptions

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"remove": 0.0} if noise_type.startswith(("asymmetric", "pair")) else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="chenpf1025/noisy_label_understanding_utilizing@a6c8e0d INCV_main.py, my_model.py",
            model="resnet32",
            augment="standard",
            batch=128,
            epochs=200,
            base_opt="adam",
            lr=1e-3,
            weight_decay=2e-4,  # Keras' l2(1e-4) has no half
            schedule="milestones",
            milestones=[80, 120, 160],
            differs={
                "schedule": "the rate halves at 180 too; a half's 50 epochs have x 0.5, 0.25, 0.1 at 20, 30, 40",
                "method": "co-teaching in the last training: --method incv,co-teaching",
                "weight_decay": "of convolutions alone",
            },
        )

    def __init__(self, options: INCVOptions, info: RunInfo) -> None:
        super().__init__(options, info)
        self.judged: list[Tensor] = []  # logits of each training so far

    def stages(self, context: StageContext) -> Iterator[Stage]:
        length = max(1, round(self.options.length * self.info.epochs))
        for _ in range(2 * self.options.iterations):
            yield Stage(settings={"epochs": length})
            self.judged.append(context.predict("last").cpu())
        yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        places = divide(labels.cpu(), self.judged, self.options.iterations, self.options.remove)
        self.places = places.to(labels.device) if len(places) else None  # nothing selected: all samples

    def subset(self) -> Tensor | None:
        return self.places


def divide(labels: Tensor, judged: Sequence[Tensor], iterations: int, remove: float | None) -> Tensor:
    """Places that the next training of INCV learns from, by the logits (n, K) that each training so far ended with.

    In each iteration the candidates are drawn into halves; the first training learns from the first half and what was
    selected before, the second from the second. The draws are seeded by the labels.
    """
    rng = np.random.default_rng(labels.numpy())
    candidate, selected = torch.ones_like(labels, dtype=torch.bool), torch.zeros_like(labels, dtype=torch.bool)
    for turn in range(iterations):
        order = torch.from_numpy(rng.permutation(candidate.nonzero().flatten().numpy()))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        chosen = selected.clone()
        for k in range(2):
            if len(judged) == 2 * turn + k:
                selected[halves[k]] = True
                return selected.nonzero().flatten()
            held = halves[1 - k]
            logits = judged[2 * turn + k][held]
            agreed = held[logits.argmax(1) == labels[held]]
            if remove is None:
                noise = estimated_noise(len(agreed) / max(1, len(held)), logits.shape[1])
                remove = min(2.0, noise / (1 - noise))
            losses = F.cross_entropy(logits, labels[held], reduction="none")
            largest = losses.argsort(descending=True, stable=True)[: int(remove * len(agreed))]
            chosen[agreed] = True
            candidate[agreed] = candidate[held[largest]] = False
        selected = chosen
    return selected.nonzero().flatten()


def estimated_noise(agreement: float, classes: int) -> float:
    """The smaller e that solves (1-e)^2 + e^2 / (K-1) = agreement; (K-1) / K, its limit, where none does."""
    a = 1 + 1 / (classes - 1)
    return (1 - math.sqrt(max(0.0, 1 - a * (1 - agreement)))) / a
