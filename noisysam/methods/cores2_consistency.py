"""CORES²*: consistency training after the sample sieve."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Options, Stage, StageContext
from noisysam.methods.cores2 import CORES2, CORES2Options, every_loss
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.semi import StrongView, consistency


class CORES2ConsistencyOptions(CORES2Options, StrongView):
    length: float = Field(0.0625, gt=0, description="length of the sieve's training, in --epochs (100 of 1,600)")
    sieve_lr: float = Field(0.1, gt=0, description="learning rate of the sieve's training, by plain SGD (0.1)")
    stop: float = Field(0.41, gt=0, le=1, description="share of it after which its sieve is read (41 of 100)")
    consistency: float = Field(0.9, ge=0, description="weight of the consistency on what was left out (0.9)")


@METHODS.register("cores2-consistency", source="arXiv 2010.02347, section 3.3")
class CORES2Consistency(CORES2):
    """CORES²*: the sieve's samples with their labels, the others without: consistency of two views, from scratch.

    Equation: L = CE(strong view of a sample that passed, y) + 0.9 KL(p(weak) || p(strong)) of one that did not, p(weak)
        a constant; passed: CE(y) <= mean_k CE(k) after 41 of 100 epochs of CORES²; all views in one forward
    Code: UCSC-REAL/cores@cf0945e phase2/phase2.py, phase2/data.py
    Deviation: the sieve looks at plain inputs after its training (code: at augmented ones in its 41st epoch). As many
        samples without labels as with (code: three quarters); labelled samples are drawn as they come (code: the
        classes' shares held within a batch). AutoAugment follows crop and flip, as in its paper (code: comes before).
    State: 1 byte per sample; 2 K numbers
    Checked: equal to the authors' division, loss and gradient to 1e-6 (tests/parity); its stages and pools.
    """

    Options: ClassVar[type[Options]] = CORES2ConsistencyOptions
    provides = ("index", "hard labels")
    views = 3
    divided = False  # whether the sieve has been read
    passed: Tensor

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="UCSC-REAL/cores@cf0945e phase2/phase2.py, phase2/confs/resnet34_ins_0.6.yaml",
            model="resnet34",
            augment="standard",
            batch=320,
            epochs=1600,
            lr=0.3,
            nesterov=True,
            weight_decay=5e-4,
            clip=5.0,
            schedule="cosine",
            warmup=120,
            differs={"batch": "of 64 for the sieve"},
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, whole = self.options, self.info.epochs
        self.span = max(1, round(o.length * whole))  # epochs of the sieve's training, were it to go on
        self.divided = False
        plain = {"base_opt": "sgd", "lr": o.sieve_lr, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        settings = {**plain, "schedule": "constant", "warmup": 0.0, "epochs": max(1, round(o.stop * self.span))}
        yield Stage(settings=settings)
        self.judged, self.divided = context.predict("last"), True
        yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        super().on_stage(labels)
        passed = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        if self.divided:
            logits = self.judged.to(labels.device)
            passed = self.cross_entropy(logits, labels) <= every_loss(logits).mean(1)
        self.register_buffer("passed", passed)

    def done(self) -> float:
        return self.epoch / self.span

    def subset(self) -> Tensor | None:
        chosen = self.passed.nonzero().flatten() if self.divided else None
        return None if chosen is None or not len(chosen) else chosen

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        if not self.divided:
            yield from epoch
            return
        others = (~self.passed).nonzero().flatten()
        pool = others if len(others) else torch.arange(len(self.passed), device=others.device)
        unlabelled = epoch.cycle(pool, epoch.rows, len(epoch), self.generator)
        for batch, index in zip(epoch, unlabelled, strict=True):
            strong = [epoch.view(places, self.options.strong) for places in (batch.index, index)]
            yield replace(batch, views=[strong[0], epoch.view(index), strong[1]])

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row: a strong view of a sample that passed, a weak and a strong one of a sample that did not."""
        inputs = torch.stack(batch.views, 1) if self.divided else batch.inputs
        return [Task(0, inputs, batch.labels, batch.index)]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        if not self.divided:
            super().plan(tasks, logits)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, K), or (n, 3, K) after the sieve."""
        if not self.divided:
            return super().loss(logits, task)
        labelled, weak, strong = logits.unbind(1)
        return self.cross_entropy(labelled, task.labels) + self.options.consistency * consistency(weak, strong)
