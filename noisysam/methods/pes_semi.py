"""Progressive early stopping with semi-supervised learning."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, Stage, StageContext, one_hot
from noisysam.methods.dividemix import sharpen
from noisysam.methods.mixup import draw, mix
from noisysam.methods.recipe import Epochs, PublishedRecipe

LARGEST_WEIGHT = 3.0  # of a class
LAMBDA_U = {("cifar10", "instance"): 15.0, ("cifar100", "pair"): 50.0}  # the examples of the authors' README


class PESSemiOptions(Options):
    first: float = Field(
        20 / 300, gt=0, lt=1, description="share of the training before the head is drawn anew (CIFAR-100: 35 of 300)"
    )
    second: int = Field(1950, ge=1, description="steps of the new head alone (5 epochs of 390)")
    refine_lr: float = Field(1e-4, gt=0, description="learning rate of those, with Adam (1e-4)")
    lambda_u: float = Field(
        5.0,
        ge=0,
        description="weight of the unlabelled loss (CIFAR-N: 5, 75; instance: 15; pair, CIFAR-100: 50)",
    )
    ramp: Epochs = Field(16, ge=1, description="epochs until lambda_u is reached, step by step (16)")
    temperature: float = Field(0.5, gt=0, description="sharpening of the guessed labels (0.5)")
    alpha: float = Field(4.0, gt=0, description="of the mixup's Beta(alpha, alpha), in the first half (4)")
    late_alpha: float = Field(0.75, gt=0, description="the same in the second half of the training (0.75)")


@METHODS.register("pes-semi", source="arXiv 2106.15853, section 3.2 and Algorithm 2")
class PESSemi(Method):
    """PES (semi): a new head, trained for a little and then fixed; samples that agree with their label are labelled.

    Equation: MixMatch, each epoch; labelled where argmax of the mean prediction for two augmented views is y; L = sum_k
        w_k mean(-t_k log p_k) on mixed labelled rows + lambda_u(t) mean (t - p)^2 on mixed unlabelled ones, t the
        label, or the sharpened mean prediction for two views; w the mean size of a class among the labelled over its
        size, at most 3
    Code: tmllab/2021_NeurIPS_PES@ec5290d PES_semi.py, PES_noisylabels.py
    Deviation: momentum begins at zero after the head. Guesses leave batch norm's running statistics alone. The
        refinement counts in steps, rounded to epochs of this run: in a short run it is many epochs. Where nothing
        agrees with its label, the epoch is one of cross-entropy. lambda_u: that of CIFAR-10N (PES_noisylabels.py); the
        default of the code is 150.
    State: 4 bytes per sample (and 4 K for the classes)
    Checked: equal to the authors' selection, batches, class weights, targets, loss and gradient to 1e-6 over three
        epochs (tests/parity); the stages; the pools.
    """

    Options = PESSemiOptions
    requires = ("one process",)
    provides = ("one view",)
    smooths = False
    divides = False  # whether the head has been trained anew
    selected: Tensor
    balance: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        chosen: dict[str, Any] = {"first": 35 / 300} if dataset == "cifar100" else {}
        if noise_type.startswith("human"):
            return {**chosen, "lambda_u": 75.0 if dataset == "cifar100" else 5.0}
        if (dataset, noise_type) in LAMBDA_U:
            chosen["lambda_u"] = LAMBDA_U[dataset, noise_type]
        return chosen

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="tmllab/2021_NeurIPS_PES@ec5290d PES_semi.py",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=300,
            lr=0.02,
            weight_decay=5e-4,
            schedule="cosine",
            lr_min=0.0002,
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, epochs = self.options, self.info.epochs
        self.first = max(1, round(o.first * epochs))
        self.divides = False
        yield Stage(settings={"epochs": self.first}, schedule_epoch=0)
        refined = {"base_opt": "adam", "l2": "descent", "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"}
        length = max(1, round(o.second / self.info.steps))
        settings = {**refined, "lr": o.refine_lr, "epochs": length, "eval_every": length}
        yield Stage(start="continue", fresh=1, trainable=1, settings=settings)
        self.divides = True
        rest = max(1, epochs - self.first)
        yield Stage(start="continue", frozen=1, settings={"epochs": rest}, schedule_epoch=self.first)

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.register_buffer("selected", torch.ones(len(labels), device=labels.device))
        self.register_buffer("balance", torch.ones(self.info.classes, device=labels.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        """Select what agrees with the mean prediction for two augmented views."""
        if self.divides:
            p = torch.stack([predict(0, augmented=True).softmax(1) for _ in range(2)]).mean(0)
            self.selected = (p.argmax(1) == self.labels).float()
            counts = one_hot(self.labels, self.info.classes).T @ self.selected
            mean = counts.sum() / (counts > 0).sum().clamp(min=1)
            self.balance = torch.where(counts > 0, mean / counts.clamp(min=1), 0.0).clamp(max=LARGEST_WEIGHT)

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        """Batches of as many unlabelled rows as labelled ones, or of fewer where there are fewer."""
        if not self.divides:
            yield from epoch
            return
        labelled, unlabelled = ((self.selected == agrees).nonzero().flatten() for agrees in (1, 0))
        if not len(labelled):
            yield from epoch
            return
        rows, many = epoch.rows, len(unlabelled) > len(labelled)
        guessed = rows // 2 if many else int(len(unlabelled) / len(self.labels) * rows)
        self.labelled_rows = rows - guessed
        pools = [epoch.cycle(labelled, rows - guessed, len(epoch), self.generator)]
        if guessed:
            pools.append(epoch.cycle(unlabelled, guessed, len(epoch), self.generator))
        for number, parts in enumerate(zip(*pools, strict=True)):
            self.progress = epoch.number + number / len(epoch)
            yield epoch.batch(torch.cat(parts), views=2, divided=True)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        if not batch.divided:
            return [Task(0, batch.inputs, one_hot(batch.labels, self.info.classes))]
        o, n, rows = self.options, self.labelled_rows, len(batch.index)
        targets = one_hot(batch.labels, self.info.classes)
        if n < rows:
            p = torch.stack([forward(0, view[n:]).softmax(1) for view in batch.views]).mean(0)
            targets = torch.cat([targets[:n], sharpen(p, o.temperature)])
        one, two = batch.views
        inputs = torch.cat([one[:n], two[:n], one[n:], two[n:]])  # the labelled rows of both views first
        targets = torch.cat([targets[:n], targets[:n], targets[n:], targets[n:]])
        late = self.first + batch.epoch >= self.info.epochs / 2
        weight, other = draw(o.late_alpha if late else o.alpha, len(inputs), self.generator, self.rng, inputs.device)
        weight = max(weight, 1 - weight)
        labelled = (torch.arange(len(inputs), device=inputs.device) < 2 * n).float()
        plan: dict[str, Any] = {"labelled": labelled * rows / n, "unlabelled": (1 - labelled) * rows / max(1, rows - n)}
        plan["lambda_u"] = o.lambda_u * min(1.0, self.progress / o.ramp)
        return [Task(0, mix(inputs, other, weight), mix(targets, other, weight), plan=plan)]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        log_p = logits.log_softmax(1)
        if "labelled" not in task.plan:
            return -(task.labels * log_p).sum(1)
        supervised = -(self.balance * task.labels * log_p).sum(1)
        guessed = task.plan["lambda_u"] * ((log_p.exp() - task.labels) ** 2).mean(1)
        return task.plan["labelled"] * supervised + task.plan["unlabelled"] * guessed
