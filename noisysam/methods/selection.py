"""Two networks that choose each other's rows, and the noisy teacher."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, Stage, Study
from noisysam.methods.bootstrap import Bootstrap, BootstrapOptions
from noisysam.methods.coteaching import CoTeaching, CoTeachingOptions
from noisysam.objective import Task


class DecouplingOptions(Options):
    warmup: int = Field(20, ge=0, description="epochs of plain training first (code: iterations, none unless given)")
    floor: float = Field(
        0.1, ge=0, le=1, description="least share of the batch that the mean is taken over (code 0.1; paper: open)"
    )


@METHODS.register("decoupling", source="arXiv 1706.02613, Algorithm 1 (update by disagreement)")
class Decoupling(Method):
    """Decoupling: two networks learn from the rows that they predict differently, and from no others.

    Equation: L_k = sum_i d_i CE(y_i, p_ki) / max(sum_i d_i, floor n), d_i = 1[argmax p_1i != argmax p_2i]
    Code: emalach/UpdateByDisagreement@cd0fc0f train.py
    Deviation: a warm-up in epochs, not in iterations; of the code, the mean over the rows that differ and its floor,
        without its weights by class and its buffer of rows. Where no rows differ nothing is learned in that step, as in
        the paper: only weight decay and momentum move the weights.
    Checked: weights of hand-made disagreements, none of them included; the mean over rows against the formula.
    """

    Options = DecouplingOptions
    networks = 2

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        rows = len(logits[0])
        weight = torch.ones_like(logits[0][:, 0])
        if self.epoch >= self.options.warmup:
            chosen = differing(logits)
            weight = chosen * (rows / chosen.sum().clamp(min=max(1.0, self.options.floor * rows)))
        for task in tasks:
            task.plan["weight"] = weight

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.cross_entropy(logits, task.labels)


class CoTeachingPlusOptions(CoTeachingOptions):
    warmup: int = Field(20, ge=0, description="epochs of co-teaching first (code: CIFAR-10 20, CIFAR-100 5, MNIST 0)")


@METHODS.register("co-teaching+", source="arXiv 1901.04215, Algorithm 1")
class CoTeachingPlus(CoTeaching):
    """Co-teaching+: co-teaching, after a warm-up only among the rows that the two networks predict differently.

    Equation: network k learns from the R(e) |D| rows of D = {i: argmax p_1i != argmax p_2i} that have the smallest
        CE(y_i, p_ji), j being the other network; R(e) = 1 - tau min(e / ramp, 1)
    Code: xingruiyu/coteaching_plus@40d5831 main.py, loss.py
    Deviation: cross-entropy of logits (the code takes it of probabilities, a second softmax); no row is lost (the
        code drops the sample of index 0). Of few disagreements at least one row is kept (the code then keeps all of
        them); where there are none nothing is learned in that step (the code: its 5000 first steps apart).
    Checked: selections by hand; equality with co-teaching in the warm-up and where all rows differ.
    """

    Options: ClassVar[type[CoTeachingOptions]] = CoTeachingPlusOptions

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"warmup": 5} if dataset == "cifar100" else {}

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        if self.epoch < self.options.warmup:
            super().plan(tasks, logits)
            return
        chosen = differing(logits)
        # by a table, so that the number of disagreements need not leave the device
        table = torch.tensor([self.keep(n, self.epoch) for n in range(len(chosen) + 1)], device=chosen.device)
        kept = table.take(chosen.sum())
        for k, other in ((0, 1), (1, 0)):
            losses = self.cross_entropy(logits[other], tasks[other].labels)
            tasks[k].plan["weight"] = chosen * smallest(losses.where(chosen, torch.inf), kept)


class JoCoROptions(CoTeachingOptions):
    strength: float = Field(
        0.9, ge=0, le=1, description="lambda (authors: CIFAR-10 0.9, at 80 % 0.65; CIFAR-100 0.85; code's default 0.1)"
    )


@METHODS.register("jocor", source="arXiv 2003.02752, section 3")
class JoCoR(CoTeaching):
    """JoCoR: two networks with one joint loss, which also draws their predictions together, on its smallest rows.

    Equation: L_i = (1 - l) (CE(y_i, p_1i) + CE(y_i, p_2i)) + l (KL(p_1i || p_2i) + KL(p_2i || p_1i)), mean over the
        R(e) n smallest L_i; R(e) = 1 - tau min(e / ramp, 1)
    Code: hongxin001/JoCoR@20a570e algorithm/loss.py, algorithm/jocor.py
    Deviation: one optimizer for each network. The other network's predictions, and the selection, are those at the
        unperturbed weights; the loss of network k leaves out the other's cross-entropy, constant for it.
    Checked: selection and loss in numpy; both gradients against autograd of the joint loss.
    """

    Options: ClassVar[type[CoTeachingOptions]] = JoCoROptions

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        """lambda by data set and rate; the authors halve the nominal rate of asymmetric noise."""
        chosen: dict[str, Any] = {"forget_rate": noise / 2} if noise_type == "asymmetric" else {}
        if dataset == "cifar100":
            chosen["strength"] = 0.85
        elif dataset == "cifar10" and noise == 0.8:
            chosen["strength"] = 0.65
        return chosen

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        for task, peer in zip(tasks, reversed(logits), strict=True):
            task.plan["peer"] = peer.log_softmax(1)
        labels, (left, right) = tasks[0].labels, logits
        # each network's part, the agreement counted once
        joint = self.part(left, tasks[0]) + (1 - self.options.strength) * self.cross_entropy(right, labels)
        weight = smallest(joint, self.keep(len(joint), self.epoch))
        for task in tasks:
            task.plan["weight"] = weight

    def part(self, logits: Tensor, task: Task) -> Tensor:
        """What of the joint loss of each row (n,) depends on one network."""
        log_p, log_q, strength = logits.log_softmax(1), task.plan["peer"], self.options.strength
        apart = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)  # both divergences
        return (1 - strength) * self.cross_entropy(logits, task.labels) + strength * apart

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.part(logits, task)


class NTSOptions(BootstrapOptions):
    teacher: Literal["last", "selected"] = Field("selected", description="the epoch that relabels (published selected)")


@METHODS.register("nts", source="arXiv 2012.04193 (AAAI 2021), noisy teacher and student", revision=2)
class NTS(Bootstrap):
    """NTS: train, relabel by the epoch that is best on noisy validation labels, train a student from scratch.

    Equation: y'_i = argmax_k p_k(x_i; w_t), t = argmax over epochs of the accuracy on noisy validation labels
    Code: chenpf1025/RobustnessAccuracy@3625e81 train_cifar10_ce.py
    Checked: against bootstrap with teacher=selected, through the loop.
    """

    Options = NTSOptions

    def stages(self, study: Study) -> Iterator[Stage]:
        yield Stage(settings={"eval_every": 1})  # any epoch may be the teacher, however seldom the run is evaluated
        yield Stage(labels=study.predict(self.options.teacher).argmax(1))


def differing(logits: Sequence[Tensor]) -> Tensor:
    """The rows (n,) that the two networks predict differently."""
    return logits[0].argmax(1) != logits[1].argmax(1)


def smallest(losses: Tensor, kept: int | Tensor) -> Tensor:
    """rows / kept for each of the ``kept`` smallest losses (those that are not finite come last), 0 for the others."""
    rank = losses.nan_to_num(torch.inf).argsort().argsort()
    return (rank < kept) * (len(losses) / kept)
