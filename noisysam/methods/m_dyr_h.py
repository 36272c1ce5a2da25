"""Dynamic bootstrapping: a mixture model of the losses weighs each label against the prediction."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.mixup import draw, mix
from noisysam.methods.recipe import PublishedRecipe


class DynamicOptions(Options):
    warmup: float = Field(
        0.35, ge=0, le=1, description="share of --epochs with plain mixup first (published 105 / 300)"
    )
    alpha: float = Field(32.0, gt=0, description="of the mixup's Beta(alpha, alpha) (published 32)")
    penalty: float = Field(1.0, ge=0, description="weight of KL(uniform || mean prediction) (published 1)")


@METHODS.register("m-dyr-h", source="arXiv 1904.11238, section 3")
class DynamicBootstrap(Method):
    """M-DYR-H: mixup with targets that blend label and prediction by the probability, from a mixture, of a wrong label.

    Equation: CE(l t_a + (1-l) t_b, p) + eta KL(uniform || mean p) on l x_a + (1-l) x_b, t = (1-B) e_y + B e_z, z =
        argmax p(x) of the unmixed row at w, B = P(noisy | loss), l ~ Beta(32, 32), one a batch
    Code: PaulAlbert31/LabelNoiseCorrection@5e9a73e utils.py, train.py
    Deviation: B is fitted to plain inputs at the start of each epoch and kept for it (the code fits on augmented inputs
        and reads B from each batch's losses, in a table of 100 values); the component of larger mean is the noisy one
        (the code: the second), its probability does not fall above that mean (the code: above its largest value).
    Deviation: a loss may not couple rows, so the KL enters by its tangent at the batch's mean prediction at w, where
        its value and its gradient are exact.
    State: 4 bytes per sample
    Checked: equal to the authors' mixture, targets, loss and gradient to 1e-5 over three batches (tests/parity); EM
        against scipy densities and on drawn mixtures.
    """

    Options = DynamicOptions
    requires = ("one process",)
    provides = ("one view",)
    smooths = False
    noisy: Tensor

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="PaulAlbert31/LabelNoiseCorrection@5e9a73e train.py, RunScripts.sh",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=300,
            lr=0.1,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[100, 250],
        )

    @property
    def begun(self) -> bool:
        return self.epoch >= round(self.options.warmup * self.info.epochs)

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.register_buffer("noisy", torch.zeros(self.info.samples, device=self.info.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if self.begun:
            losses = F.cross_entropy(predict(0), self.labels, reduction="none")
            self.noisy.copy_(probability_noisy(losses))

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        targets = one_hot(batch.labels, self.info.classes)
        if self.begun:
            guessed = one_hot(forward(0, batch.inputs).argmax(1), self.info.classes)
            targets = torch.lerp(targets, guessed, self.noisy[batch.index, None])
        weight, other = draw(self.options.alpha, len(targets), self.generator, self.rng, targets.device)
        return [Task(0, mix(batch.inputs, other, weight), mix(targets, other, weight))]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        if self.begun:
            mean = logits[0].softmax(1).mean(0).clamp_min(1e-8)
            tasks[0].plan["mean"] = mean.expand_as(logits[0])

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        log_p = logits.log_softmax(1)
        loss = -(task.labels * log_p).sum(1)
        if "mean" not in task.plan:
            return loss
        return loss + self.options.penalty * divergence(log_p.exp(), task.plan["mean"])


def divergence(p: Tensor, mean: Tensor) -> Tensor:
    """KL(uniform || mean prediction) for each row (n,) by its tangent at ``mean`` (n, K, equal rows), the batch's mean
    at w: its mean over the batch has the value and the gradient of the KL there, and rows do not depend on others."""
    tangent = 1 - (p / mean).mean(1)  # of mean zero over the batch at w
    return -math.log(p.shape[1]) - mean.log().mean(1) + tangent


def probability_noisy(losses: Tensor) -> Tensor:
    """Probability of each sample to belong to the component of larger mean of a two-component Beta mixture.

    The mixture is fitted to the losses (n,) between their 5th and 95th percentile, scaled to (0, 1); what lies outside
    is clipped. Above that component's mean the probability never falls, as the tail of a wide clean component may win
    it back. All zeros (clean) where the losses cannot be divided or are not finite.
    """
    values = losses.cpu().double()
    low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    if not math.isfinite(float(values.sum())) or high - low < 1e-9:
        return torch.zeros_like(losses)
    scaled = ((values - low) / (high - low)).clamp(1e-3, 1 - 1e-3)
    weight, alpha, beta = fit_beta_mixture(scaled[(values >= low) & (values <= high)])
    mean, noisy = (alpha / (alpha + beta)).max(0)
    p = posterior(scaled, weight, alpha, beta)[:, noisy]
    if not math.isfinite(float(p.sum())):  # a component was left without samples
        return torch.zeros_like(losses)
    order = scaled.argsort()
    above = order[scaled[order] >= mean]
    p[above] = p[above].cummax(0).values
    return p.to(losses)


def fit_beta_mixture(x: Tensor, steps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, alphas, betas (2,) of a mixture of two Beta densities, by EM on x in (0, 1); the M step by moments."""
    weight, alpha, beta = x.new_tensor([0.5, 0.5]), x.new_tensor([1.0, 2.0]), x.new_tensor([2.0, 1.0])
    for _ in range(steps):
        r = posterior(x, weight, alpha, beta)
        weight = r.mean(0)
        mean = (r * x[:, None]).sum(0) / r.sum(0)
        variance = (r * (x[:, None] - mean) ** 2).sum(0) / r.sum(0)
        total = mean * (1 - mean) / variance.clamp_min(1e-6) - 1  # a component may shrink to one value
        alpha, beta = mean * total, (1 - mean) * total
    return weight, alpha, beta


def posterior(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Probability (n, 2) of each component at x (n,)."""
    x = x[:, None]
    scale = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    return (weight.log() + scale + (alpha - 1) * x.log() + (beta - 1) * (1 - x).log()).softmax(1)
