"""ProMix."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.dividemix import sharpen
from noisysam.methods.mixup import mix
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.semi import Policy, partners

LENGTH = 600  # epochs of the authors' training
RELIABLE, DOUBTFUL = 0, 1  # the two sets of samples whose mean predictions are followed


class ProMixOptions(Options):
    first_share: float = Field(
        0.5, gt=0, le=1, description="share of an even class that is selected by loss, at first (0.5; 20 % noise: 0.7)"
    )
    last_share: float = Field(0.5, gt=0, le=1, description="the same after the ramp (0.5; 20 % noise: 0.7)")
    tau: float = Field(0.99, ge=0, lt=1, description="confidence that selects a sample too (0.99; CIFAR-100: 0.95)")
    warmup: float = Field(
        10 / LENGTH, ge=0, le=1, description="share of the training by cross-entropy, at least an epoch (10 of 600)"
    )
    ramp: float = Field(50 / LENGTH, gt=0, le=1, description="share over which weights and shares grow (50 of 600)")
    expand: float = Field(
        250 / LENGTH, ge=0, le=1, description="last share of the training that also takes agreed guesses (250 of 600)"
    )
    most: float = Field(0.9, ge=0, le=1, description="share of a batch up to which those are added (0.9)")
    debias: float = Field(0.8, ge=0, description="of logits in the loss and in guesses (CIFAR-10: 0.8; CIFAR-100: 0.5)")
    memory: float = Field(0.9999, ge=0, lt=1, description="momentum of the mean predictions (0.9999)")
    temperature: float = Field(0.5, gt=0, description="sharpening of the guesses for doubtful samples (0.5)")
    alpha: float = Field(4.0, gt=0, description="of the mixup's Beta(alpha, alpha) (4)")
    confidence_penalty: bool = Field(
        False, description="add the predictions' negative entropy to the loss of the warm-up (asymmetric noise: True)"
    )
    head_lr: float = Field(0.05, gt=0, description="learning rate of the auxiliary heads, cosine (0.05)")
    strong: Policy = Field("rand", description="augmentation of the strong view (RandAugment)")


@METHODS.register("promix", source="arXiv 2207.10276, equations 1 to 9, Algorithm 1")
class ProMix(Method):
    """ProMix: two networks learn from samples of small loss in each class, and of high confidence in their label.

    Equation: reliable: the smallest losses of each class, p_y > tau, and late in the training what both networks
        predict with confidence > tau alike; L = CE(weak) + w (CE(strong) + mixup + FMix) on these, of the head and of
        an auxiliary head, which also learns sharpened guesses on the rest: beta (CE(weak) + w CE(strong)); logits z + a
        log pi in every loss, guesses from z - a log pi, pi the moving mean prediction on either set
    Code: Justherozen/ProMix@40d8378 Train_promix.py, utils/utils.py, utils/fmix.py
    Deviation: the strong view is RandAugment of magnitude 9 of 30 (code: three operations of any magnitude, and
        cutout); it follows crop and flip. Rows that are not reliable go through the mixed forwards too, with no weight,
        among themselves. Each network takes its own step (code: one of both, with the same gradients). Shares of the
        training, so that they keep their place in one of another length. Without the projection head, which the code
        does not train. The penalty of the warm-up is of the logits as they are (code: of those above 0).
    State: 8 bytes per sample (and 4 K for the classes, and the heads)
    Checked: equal to the authors' selections, guesses, masks, loss, gradients and mean predictions to 1e-5 over several
        epochs (tests/parity); FMix's masks by their mean; the selection by hand.
    """

    Options = ProMixOptions
    requires = ("features", "one process")
    provides = ()
    networks = 2
    views = 6
    smooths = False
    small: Tensor
    means: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        asymmetric = noise_type.startswith(("asymmetric", "pair"))
        chosen: dict[str, Any] = {"confidence_penalty": True} if asymmetric else {}
        if noise_type.startswith("symmetric") and noise <= 0.2:
            chosen |= {"first_share": 0.7, "last_share": 0.7}
        if dataset == "cifar100":
            chosen |= {"tau": 0.95, "warmup": 30 / LENGTH, "debias": 0.5}
        return chosen

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="Justherozen/ProMix@40d8378 Train_promix.py, run.sh",
            model="resnet18",
            augment="standard",
            batch=256,
            epochs=LENGTH,
            lr=0.05,
            weight_decay=5e-4,
            schedule="cosine",
            lr_min=0.05e-3,
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels, classes, device = labels, self.info.classes, labels.device
        self.register_buffer("small", torch.ones(2, len(labels), device=device))
        self.register_buffer("means", torch.full((2, 2, classes), 1 / classes, device=device))  # network, set, class
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self.rng.integers(2**31)))
            self.heads = nn.ModuleList(nn.Linear(self.info.features, classes).to(device) for _ in range(2))

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        self.heads_optimizer = torch.optim.SGD(
            self.heads.parameters(), lr=self.options.head_lr, momentum=0.9, weight_decay=5e-4
        )
        return self.heads_optimizer

    def done(self) -> float:
        """The share of the training that is over when this epoch begins."""
        return self.epoch / self.info.epochs

    def warming(self) -> bool:
        """Whether this epoch is one of cross-entropy alone."""
        return self.done() < self.options.warmup - 1e-9 or self.epoch == 0

    def grown(self, times: float = 1.0) -> float:
        """The share of the ramp, or of one some times as long, that is over."""
        return min(1.0, self.done() / (times * self.options.ramp))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        lowest = self.options.head_lr * 1e-3
        cosine = 0.5 * (1 + math.cos(math.pi * self.done()))
        self.heads_optimizer.param_groups[0]["lr"] = lowest + (self.options.head_lr - lowest) * cosine
        if not self.warming():
            o = self.options
            share = o.first_share + (o.last_share - o.first_share) * self.grown()
            losses = [self.cross_entropy(predict(k), self.labels) for k in range(2)]
            self.small = torch.stack([smallest(each, self.labels, self.info.classes, share) for each in losses])

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:
            views = [] if self.warming() else [batch.inputs, epoch.view(batch.index, self.options.strong)]
            yield replace(batch, views=views)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row: its weak and its strong view, and for each head a mixup and an FMix of its weak view."""
        if self.warming():
            return [Task(k, batch.inputs, batch.labels, batch.index) for k in range(2)]
        o, labels = self.options, one_hot(batch.labels, self.info.classes)
        logits = [forward(k, batch.inputs) for k in range(2)]
        p = torch.stack([z.softmax(1) for z in logits])
        confidence, found = p.max(2)
        agreed = ((confidence > o.tau).all(0) & (found[0] == found[1])).float()
        tasks = []
        for k in range(2):
            kept = torch.maximum(self.small[k, batch.index], ((labels * p[k]).sum(1) > o.tau).float())
            guess = (logits[k] - o.debias * self.means[k, RELIABLE].log()).argmax(1)
            targets = torch.where(kept[:, None] > 0, labels, one_hot(guess, self.info.classes))
            reliable = kept
            if self.done() > 1 - o.expand + 1e-9:
                reliable = self.widened(kept, agreed, confidence.mean(0))
            doubted = (logits[k] - o.debias * self.means[k, DOUBTFUL].log()).softmax(1)
            views, plan = self.mixed(batch.views[0], targets, reliable)
            plan |= {"targets": targets, "doubted": sharpen(doubted, o.temperature), "reliable": reliable}
            for name, rows in (("kept", reliable), ("rest", 1 - reliable)):
                plan[name] = rows * len(rows) / rows.sum().clamp(min=1)
            for name, which in (("bias", RELIABLE), ("doubtful bias", DOUBTFUL)):
                plan[name] = (o.debias * self.means[k, which].log()).expand(len(labels), -1)
            inputs = torch.stack([*batch.views, *views], 1)
            tasks.append(Task(k, inputs, batch.labels, batch.index, plan, forwards=(1,) * 6))
        return tasks

    def widened(self, kept: Tensor, agreed: Tensor, confidence: Tensor) -> Tensor:
        """What is kept, and of the rows that both networks guess alike the most confident, up to a share of all."""
        new = agreed * (1 - kept)
        room = int(self.options.most * len(kept)) - kept.sum()
        order = torch.where(new > 0, confidence, -1.0).argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return torch.maximum(kept, new * (rank < room))

    def mixed(self, weak: Tensor, targets: Tensor, reliable: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """For each head a mixup and an FMix of the weak views of reliable rows, with their targets."""
        views, mixups, masks = [], [], []
        for _ in range(2):
            weight = float(self.rng.beta(self.options.alpha, self.options.alpha))
            weight, other = max(weight, 1 - weight), partners(reliable, self.generator)
            views.append(mix(weak, other, weight))
            mixups.append(mix(targets, other, weight))
            share, mask = fmix_mask(weak.shape[2], weak.shape[3], self.rng)
            area, other = torch.from_numpy(mask).to(weak), partners(reliable, self.generator)
            views.append(area * weak + (1 - area) * weak[other])
            masks.append(mix(targets, other, share))
        return views, {"mixup": torch.stack(mixups, 1), "fmix": torch.stack(masks, 1)}

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """Follow the mean predictions on either set."""
        for task, z in zip(tasks, logits, strict=True):
            if "reliable" in task.plan:
                sets = torch.stack([task.plan["reliable"], 1 - task.plan["reliable"]]).to(z.dtype)
                mean = sets @ z[:, 0].softmax(1) / sets.sum(1, keepdim=True).clamp(min=1)
                old = self.means[task.network]
                new = torch.where(
                    sets.sum(1, keepdim=True) > 0, torch.lerp(mean.float(), old, self.options.memory), old
                )
                self.means[task.network] = torch.where(torch.isfinite(new).all(), new, old)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, K), or (n, 6, K) after the warm-up."""
        plan, w = task.plan, self.grown()
        if "reliable" not in plan:
            log_p = logits.log_softmax(1)
            penalty = (log_p.exp() * log_p).sum(1) if self.options.confidence_penalty else 0.0
            return self.cross_entropy(logits, task.labels) + penalty
        assert task.features is not None
        auxiliary = self.heads[task.network](task.features)
        total: Tensor | float = 0.0
        for head, z in enumerate((logits, auxiliary)):
            biased = z + plan["bias"][:, None]
            losses = [soft(biased[:, view], plan["targets"]) for view in range(2)]
            mixed = soft(biased[:, 2 + 2 * head], plan["mixup"][:, head])
            masked = soft(biased[:, 3 + 2 * head], plan["fmix"][:, head])
            total = total + plan["kept"] * (losses[0] + w * (losses[1] + mixed + masked))
        beta = 0.1 * self.grown(2) if self.grown(2) < 1 else 0.0
        doubtful = auxiliary + plan["doubtful bias"][:, None]
        guessed = soft(doubtful[:, 0], plan["doubted"]) + w * soft(doubtful[:, 1], plan["doubted"])
        return total + beta * plan["rest"] * guessed

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """The mean of both networks' logits."""
        return torch.stack(list(logits)).mean(0)


def soft(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row to a distribution."""
    return -(targets * logits.log_softmax(1)).sum(1)


def smallest(losses: Tensor, labels: Tensor, classes: int, share: float) -> Tensor:
    """1 for the rows (n,) of each class that have the smallest losses, ceil(share n / K) of them, but at most all and
    at least one; else 0."""
    order = losses.argsort(stable=True)
    own = one_hot(labels[order], classes)
    rank = (own.cumsum(0) * own).sum(1)  # from 1, within the class
    kept = (rank <= max(1, math.ceil(share * len(losses) / classes))).float()
    return torch.empty_like(kept).scatter_(0, order, kept)


def fmix_mask(height: int, width: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """A share drawn uniformly, and a mask (height, width) of about that mean: the largest pixels of a random image of
    low frequencies, whose spectrum falls with the third power (FMix, arXiv 2002.12047).

    As its released code does, the spectrum's first two rows are its real and its imaginary part, of two columns each.
    """
    share = float(rng.beta(1.0, 1.0))
    frequency = np.hypot(np.fft.fftfreq(height)[:2, None], np.fft.rfftfreq(width))
    scale = 1 / np.maximum(frequency, 1 / max(height, width)) ** 3
    real, imaginary = scale[..., None] * rng.standard_normal((*frequency.shape, 2))
    image = np.fft.irfft2(real + 1j * imaginary, (height, width))
    count = math.ceil(share * image.size) if rng.random() > 0.5 else math.floor(share * image.size)
    mask = np.zeros(image.size)
    mask[image.ravel().argsort()[::-1][:count]] = 1
    return share, mask.reshape(height, width)
