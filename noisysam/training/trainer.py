"""The training loop: stages, epochs and steps of one run, whatever the method and the optimizer.

A ``Trainer`` writes nothing and decides nothing about the run: see ``run`` for records, checkpoints and evaluations.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from noisysam import models, optim
from noisysam.core import stopping
from noisysam.core.errors import UserError
from noisysam.core.network import Net, WithFeatures, last_blocks
from noisysam.core.objective import Objective
from noisysam.core.rng import stream, stream_seed
from noisysam.core.task import Average, Task
from noisysam.data.loader import Batch, Loader
from noisysam.methods import RunInfo, Stage
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import Problem
from noisysam.training.distributed import ProcessGroup
from noisysam.training.evaluator import Evaluator
from noisysam.training.learner import Learner
from noisysam.training.schedule import learning_rate, momentum

Factory = Callable[[int], nn.Module]  # seed -> an initialised network


class ProgressCallback(Protocol):
    """Receives progress: progress bars, log lines, tests."""

    def step(self, stage: int, epoch: int, number: int, of: int) -> None:
        """A batch was trained on (``of``: batches of a plain epoch)."""

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        """An epoch ended."""


class Trainer:
    """The networks of one run while they are trained.

    ``resolved``: device, precision and compilation (``devices.resolve``); ``network`` (seed -> module) takes the place
    of the configured architecture. Usage::

        trainer = Trainer(config, problem, resolved)
        for number, stage in enumerate(trainer.method.stages(context)):
            trainer.begin_stage(number, stage)
            for epoch in range(trainer.settings.epochs):
                line = trainer.train_epoch(epoch)
    """

    def __init__(
        self,
        config: RunConfig,
        problem: Problem,
        resolved: dict[str, Any],
        network: Factory | None = None,
        progress: ProgressCallback | None = None,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.config, self.problem, self.resolved, self.progress = config, problem, resolved, progress
        self.recipe = config.recipe()
        self.processes = processes = processes or ProcessGroup()
        # what processes average: every gradient at once, or the step's at its end
        self.at_once: Average = processes.average if config.sync_perturbation else list
        self.at_end: Average = list if config.sync_perturbation else processes.average
        self.device = torch.device(resolved["device"])
        self.network = network or self._configured_network
        noisy = problem.noisy.take(problem.train)
        self.loader = Loader(
            problem.dataset,
            torch.from_numpy(problem.chosen[problem.train]),
            torch.from_numpy(noisy.labels),
            rows=config.batch,
            policy=config.augment,
            device=self.device,
            seed=config.seed,
        )
        self.given = self.loader.labels
        facts = self.recipe.noise_facts
        info = RunInfo(
            samples=len(noisy.labels),
            classes=problem.dataset.classes,
            epochs=config.epochs,
            device=self.device,
            steps=len(noisy.labels) // self.loader.rows,
            features=getattr(getattr(self.network(0), "head", None), "in_features", 0),
            label_smoothing=config.label_smoothing,
            rate=float(noisy.flipped.mean()) if "rate" in facts else None,
            matrix=torch.from_numpy(noisy.matrix).float().to(self.device)
            if "matrix" in facts and noisy.matrix is not None
            else None,
        )
        self.method = self.recipe.method(self.recipe.method_options, info)
        self.evaluator = Evaluator(
            problem,
            self.loader,
            self.method.outputs,
            bf16=resolved["precision"] == "bf16",
            features=self.method.reported == "features",
            compile=resolved["compile"],
            headline=self.method.headline,
        )
        self.learners: list[Learner] = []
        self.number = -1  # of the present stage

    def _configured_network(self, seed: int) -> nn.Module:
        c, dataset = self.config, self.problem.dataset
        return models.build(
            c.model,
            dataset.classes,
            dataset.train_images.shape[3],
            size=dataset.size,
            width=c.width,
            norm=c.norm,
            seed=seed,
            weights=models.weights_file(c.model, c.pretrained),
        )

    @property
    def reported(self) -> list[nn.Module]:
        """The networks that are evaluated."""
        return [learner.reported for learner in self.learners]

    # a stage

    def begin_stage(self, number: int, stage: Stage) -> None:
        """Networks, optimizers and the method's state at the start of a stage."""
        self.number, self.stage = number, stage
        self.settings = self.config.model_copy(update=stage.settings)
        self.scheduled, self.elapsed = self.settings, 0.0  # whose schedule, and its epochs before this stage
        if stage.schedule_epoch is not None:
            self.scheduled = self.settings.model_copy(update={"epochs": self.config.epochs})
            self.elapsed = stage.schedule_epoch
        self.loader.labels = self.given if stage.labels is None else stage.labels.to(self.device)
        seeds = [stream_seed(self.config.seed, number, 0, "init", k) for k in range(self.method.networks)]
        if stage.start == "scratch" or not self.learners:  # none: a run that resumes in a continued stage
            modules = [self.network(s).to(self.device).to(memory_format=torch.channels_last) for s in seeds]
            nets = [self._net(module) for module in modules]
        else:
            nets = [learner.net for learner in self.learners]
            for net, seed in zip(nets, seeds, strict=True):
                self._draw_anew(net.module, stage.fresh, seed)
        for net in nets:
            self.processes.broadcast(net.module.state_dict().values())
            net.train_only(stage.trainable, stage.frozen)
        ema, teacher = self.settings.ema, self.method.teacher_decay > 0
        self.learners = [Learner(net, self._optimizer(net), ema, teacher) for net in nets]
        self.method.rng = np.random.default_rng(stream_seed(self.config.seed, number, 0, "init", self.method.networks))
        self.method.on_stage(self.loader.labels)
        self.auxiliary_optimizer = self.method.auxiliary_optimizer()

    def _net(self, module: nn.Module) -> Net:
        forward = module
        if "features" in (*self.method.requires, *optim.OPTIMIZERS[self.settings.opt].requires):
            if not (hasattr(module, "features") and hasattr(module, "head")):
                raise UserError("this method or optimizer needs a network with features() and head")
            forward = WithFeatures(module)
        if self.resolved["compile"]:
            forward = models.compiled(forward)  # type: ignore[assignment]
        net = Net(module, self.resolved["precision"], self.config.bn, forward)
        net.statistics.average = self.processes.average
        return net

    def _draw_anew(self, module: nn.Module, count: int, seed: int) -> None:
        """Initialise the last blocks of a network again, from the stage's own seed."""
        if count:
            for block, new in zip(last_blocks(module, count), last_blocks(self.network(seed), count), strict=True):
                block.load_state_dict(new.state_dict())

    def _optimizer(self, net: Net) -> optim.SharpnessAware:
        s = self.settings
        own = s.opt == self.config.opt  # another optimizer has its default options
        optimizer = optim.OPTIMIZERS[s.opt](
            net.named,
            base=s.base_opt,
            lr=s.lr,
            momentum=s.momentum,
            nesterov=s.nesterov,
            weight_decay=s.weight_decay,
            l2=s.l2,
            clip=s.clip,
            **(self.recipe.optimizer_options if own else optim.options(s.opt, {})).model_dump(),
        )
        optimizer.transform_gradient, optimizer.average = self.method.transform_gradient, self.at_end
        return optimizer

    # an epoch

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """The steps of one epoch: means and counts of what happened. Nothing is read from the device before its end."""
        self._begin_epoch(epoch)
        forwards, backwards = self._counts()
        self.method.on_epoch(epoch, self.predict)
        drawn = self.loader.epoch(self.number, epoch, self.method.subset())
        sums = torch.zeros(3, device=self.device)  # over steps that were not skipped: loss, gradient norm, one
        batches = steps = images = 0
        rate = self.settings.lr
        for batch in self.method.batches(drawn):
            stopping.check()
            progress = self.elapsed + epoch + min(1.0, batches / len(drawn))
            rate = learning_rate(self.scheduled, progress, 1 / len(drawn), self.config.epochs)
            steps += self.step(batch, rate, sums)
            batches, images = batches + 1, images + len(batch.index)
            if self.progress is not None:
                self.progress.step(self.number, epoch, batches, len(drawn))
        loss, norm, finite = self.processes.average([sums])[0].tolist()
        return {
            "train_loss": loss / finite if finite else None,
            "learning_rate": rate,
            "gradient_norm": norm / finite if finite else None,
            "steps": steps,
            "skipped_steps": steps - round(finite),
            "forward_samples": self._counts()[0] - forwards,
            "gradient_samples": self._counts()[1] - backwards,
            "images": images,
        }

    def _begin_epoch(self, epoch: int) -> None:
        """Give every consumer of random numbers its stream of this epoch."""
        seed, number, method = self.config.seed, self.number, self.method
        method.epoch = epoch
        method.generator = stream(seed, number, epoch, "method", self.device)
        method.rng = np.random.default_rng(stream_seed(seed, number, epoch, "method", 1))
        for k, learner in enumerate(self.learners):
            part = k if self.config.sync_perturbation else k + self.processes.rank  # several processes have one network
            learner.optimizer.generator = stream(seed, number, epoch, "optimizer", self.device, part)
            learner.optimizer.on_epoch(epoch, self.settings.epochs, len(self.loader))
            if self.scheduled.final_momentum is not None:
                learner.set_momentum(momentum(self.scheduled, self.elapsed + epoch, self.config.epochs))
            learner.net.module.train()
            learner.net.seed = stream_seed(seed, number, epoch, "method", 2 + k)

    def _counts(self) -> tuple[int, int]:
        """Rows that went forwards and backwards so far, over all processes, each of which has as many."""
        nets, size = [learner.net for learner in self.learners], self.processes.size
        return size * sum(n.forwards for n in nets), size * sum(n.backwards for n in nets)

    # a step

    def step(self, batch: Batch, rate: float, sums: Tensor) -> int:
        """One batch: plan once, at the unperturbed weights; then each network's optimizer evaluates its objective.
        Adds loss, gradient norm and 1 of each step that is not skipped to ``sums``; the number of steps."""
        for learner in self.learners:
            learner.begin_step()
        # drawn for the whole batch, and then divided among the processes
        tasks = [task.take(self.processes.rows(len(task.inputs))) for task in self.method.tasks(batch, self.forward)]
        own = list(self.method.parameters())
        gradients: list[Tensor] = []  # of what the method learns itself, over all networks
        for task, first in zip(tasks, self._plan(tasks), strict=True):
            learner = self.learners[task.network]
            objective = Objective(learner.net, task, self.method.loss, first, own, self.at_once)
            loss = learner.step(objective, rate, self.method.teacher_decay)
            found_inf = learner.optimizer.found_inf
            if self.auxiliary_optimizer is not None:  # a step that is skipped is so for all
                found = [torch.where(found_inf == 0, g, torch.zeros_like(g)) for g in objective.auxiliary_grads]
                gradients = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
            values = torch.stack([loss, learner.optimizer.norm, torch.ones_like(loss)])
            sums += torch.where(found_inf == 0, values, torch.zeros_like(values))
        if self.auxiliary_optimizer is not None:
            for p, g in zip(own, gradients, strict=True):
                p.grad = g
            self.auxiliary_optimizer.step()
        for k in set(range(len(self.learners))) - {task.network for task in tasks}:
            self.learners[k].net.statistics.commit()  # a network without a task keeps its running statistics
        return len(tasks)

    def _plan(self, tasks: Sequence[Task]) -> list[Tensor | None]:
        """Let the method decide; the logits that can serve as the first evaluation of each task."""
        if self.method.plan is None:
            return [None] * len(tasks)
        whole = [self.learners[t.network].optimizer.whole(len(t.inputs)) for t in tasks]
        logits = [
            self.learners[t.network].net.logits(t.inputs, w, forwards=t.forwards)
            for t, w in zip(tasks, whole, strict=True)
        ]
        self.method.plan(tasks, [z.detach() for z in logits])
        return [z if w else None for z, w in zip(logits, whole, strict=True)]

    def forward(self, k: int, inputs: Tensor, averaged: bool = False) -> Tensor:
        """Logits of network k as it is trained, or at its moving average, without gradient; counted."""
        return self.learners[k].logits(inputs, averaged)

    def predict(self, k: int, features: bool = False, augmented: bool = False) -> Tensor:
        """Plain (or augmented) predictions, or features, of network k for the training set; counted."""
        learner = self.learners[k]
        learner.net.forwards += len(self.loader)
        inputs = self.loader.augmented(self.method.generator) if augmented else None
        result = self.evaluator.of_training(learner.reported, features, inputs)
        learner.net.module.train()
        return result

    def measure(self) -> dict[str, float]:
        """All figures of the present networks."""
        self.method.on_evaluation(self.predict)
        return self.evaluator.measure(self.reported)

    # state

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, averages and the method's state; not the random streams, which follow from the seed."""
        states = [learner.state_dict() for learner in self.learners]
        return {
            "networks": [state["network"] for state in states],
            "optimizers": [state["optimizer"] for state in states],
            "averages": [state["ema"] for state in states if state["ema"] is not None],
            "teachers": [state["teacher"] for state in states if state["teacher"] is not None],
            "method": self.method.state_dict(),
            "own_rule": None if self.auxiliary_optimizer is None else self.auxiliary_optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back a ``state_dict`` of the same stage."""
        for k, learner in enumerate(self.learners):
            state = {"network": saved["networks"][k], "optimizer": saved["optimizers"][k]}
            state["ema"] = saved["averages"][k] if learner.ema is not None else None
            state["teacher"] = saved["teachers"][k] if learner.teacher is not None else None
            learner.load_state_dict(state)
        self.method.load_state_dict(saved["method"])
        if self.auxiliary_optimizer is not None:
            self.auxiliary_optimizer.load_state_dict(saved["own_rule"])

    def tensors(self) -> list[Tensor]:
        """What several processes must hold alike."""
        optimizers = [learner.optimizer for learner in self.learners]
        modules = [self.method, *(learner.net.module for learner in self.learners)]
        kept = [t for module in modules for t in module.state_dict().values()]
        kept += [t for o in optimizers for memory in o.memory.values() for t in memory]
        kept += [t for o in optimizers for state in o.state.values() for t in state.values()]
        return [t for t in kept if isinstance(t, Tensor)]
