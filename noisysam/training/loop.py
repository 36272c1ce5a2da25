"""The training loop: ``fit`` takes a configuration to a result, whatever the method and the optimizer."""

import copy
import errno
import math
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from noisysam import methods, models, optim
from noisysam.core.environment import environment
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.network import Net, WithFeatures, last_blocks
from noisysam.core.objective import Objective
from noisysam.core.rng import stream, stream_seed
from noisysam.core.task import Average
from noisysam.data.loader import Batch, Loader
from noisysam.methods import RunInfo, Stage, StageContext
from noisysam.runs.config import RunConfig
from noisysam.runs.problem import Problem
from noisysam.runs.record import RECORD_SCHEMA, RunFolder
from noisysam.runs.summary import EVALUATED_AT_THE_END, cost, results, run_name
from noisysam.training import checkpoint, devices
from noisysam.training.distributed import ProcessGroup, ProcessLost
from noisysam.training.evaluator import Evaluator
from noisysam.training.result import Result
from noisysam.training.schedule import learning_rate

Factory = Callable[[int], nn.Module]  # seed -> an initialised network


class ProgressCallback(Protocol):
    """Whoever looks on: progress bars, log lines, tests."""

    def step(self, stage: int, epoch: int, number: int, of: int) -> None:
        """A batch was trained on (``of``: batches of a plain epoch)."""

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        """An epoch ended."""


class SupportsSync(Protocol):
    """Sends a run's record somewhere; never raises."""

    def sync(self, final: bool = False) -> bool: ...


class Training:
    """One run while it is trained."""

    def __init__(
        self,
        config: RunConfig,
        problem: Problem,
        digests: dict[str, str],
        folder: RunFolder,
        network: Factory | None = None,
        tracker: Callable[[RunFolder], SupportsSync] | None = None,
        progress: ProgressCallback | None = None,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.config, self.problem, self.folder, self.progress = config, problem, folder, progress
        self.processes = processes = processes or ProcessGroup()
        # what processes average: every gradient at once, or the step's at its end
        self.at_once: Average = processes.average if config.sync_perturbation else list
        self.at_end: Average = list if config.sync_perturbation else processes.average
        self.tracker = tracker(folder) if tracker is not None else None
        noisy = problem.noisy.take(problem.train)
        images = config.epochs * len(noisy.labels)
        earlier = folder.record or {}
        self.resolved = processes.share(lambda: earlier.get("resolved") or devices.resolve(config, images))
        self._check_machine()
        self.device = torch.device(self.resolved["device"])
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
        self.network = network or self._configured_network
        options = methods.options(config.method, config.method_option)
        known = methods.noise_facts(config.method, options)
        facts = RunInfo(
            samples=len(noisy.labels),
            classes=problem.dataset.classes,
            epochs=config.epochs,
            device=self.device,
            steps=len(noisy.labels) // self.loader.rows,
            features=getattr(getattr(self.network(0), "head", None), "in_features", 0),
            label_smoothing=config.label_smoothing,
            rate=float(noisy.flip_rate) if "rate" in known else None,
            matrix=torch.from_numpy(noisy.matrix).float().to(self.device) if "matrix" in known else None,
        )
        self.method = methods.compose(config.method)(options, facts)
        self.optimizer_options = config.optimizer_options()
        self.evaluator = Evaluator(
            problem,
            self.loader,
            self.method.outputs,
            bf16=self.resolved["precision"] == "bf16",
            features=self.method.reported == "features",
            compile=self.resolved["compile"],
            headline=self.method.headline,
        )
        self.nets: list[Net] = []
        self.lines: list[dict[str, Any]] = []
        self.memo: dict[str, Tensor] = {}
        self.stage = -1
        self.record = self._new_record(digests, earlier)

    def _check_machine(self) -> None:
        """A resumed run goes on with what was decided at its start."""
        wanted = devices.resolve_device(self.config.device)
        device = torch.device(self.resolved["device"])
        if self.config.device != "auto" and device.type != wanted.type:
            raise UserError(
                f"run {self.folder.key} began on {device}: resume it there, or delete {self.folder.path} to start over"
            )
        devices.resolve_device(str(device))

    def _configured_network(self, seed: int) -> nn.Module:
        c, images = self.config, self.problem.dataset.train_images
        return models.build(
            c.model, self.problem.dataset.classes, images.shape[3], width=c.width, norm=c.norm, seed=seed
        )

    # a run

    def fit(self) -> Result:
        """All stages, from the checkpoint on where there is one."""
        saved = self.processes.share(lambda: checkpoint.load(self.folder.path, self.device), self.device)
        if saved is not None:
            self.lines, self.memo = saved["lines"], saved["memo"]
        self._write("running")
        try:
            for number, stage in enumerate(self.method.stages(StageContext(self.predict))):
                self.stage = number
                if saved is not None and number < saved["stage"]:
                    continue
                self._begin(stage)
                first = 0
                if saved is not None and number == saved["stage"]:
                    self._load(saved)
                    first = saved["epoch"] + 1
                for epoch in range(first, self.settings.epochs):
                    self._epoch(epoch, stage)
            self._finish()
        except (KeyboardInterrupt, ProcessLost):
            self._end("interrupted", None)
            raise
        except Exception as error:
            told = str(error) if isinstance(error, RunFailed | UserError) else traceback.format_exc()
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)  # no fault of the run
            self._end("interrupted" if full else "failed", told)
            raise
        return Result(self.folder.key, self.folder.path, self.record)

    def predict(self, which: str) -> Tensor:
        """For ``Method.stages``: the reported logits of the stage that just ended, remembered for a resume."""
        name = f"{self.stage}/{which}"
        if name not in self.memo:
            self.memo[name] = self.processes.share(lambda: self._reported(which), self.device)
        return self.memo[name]

    def _reported(self, which: str) -> Tensor:
        modules = self._evaluated()
        if which == "selected":
            if self.selected is None:
                raise UserError("teacher=selected needs a validation split: give --val-fraction")
            modules = [copy.deepcopy(m) for m in modules]
            for module, state in zip(modules, self.selected["networks"], strict=True):
                module.load_state_dict(state)
        return self.evaluator.reported(modules)

    # a stage

    def _begin(self, stage: Stage) -> None:
        """Networks, optimizers and state at the start of a stage."""
        self.settings = self.config.model_copy(update=stage.settings)
        self.loader.labels = self.given if stage.labels is None else stage.labels.to(self.device)
        if stage.start == "scratch" or not self.nets:  # none: a run that resumes in a continued stage
            seeds = [stream_seed(self.config.seed, self.stage, 0, "init", k) for k in range(self.method.networks)]
            modules = [self.network(s).to(self.device).to(memory_format=torch.channels_last) for s in seeds]
            self.nets = [self._net(m) for m in modules]
        else:
            for k, net in enumerate(self.nets):
                self._refresh(net.module, stage.fresh, k)
        for net in self.nets:
            self.processes.broadcast(net.module.state_dict().values())
            net.train_only(stage.trainable, stage.frozen)
        self.optimizers = [self._optimizer(net) for net in self.nets]
        average = get_ema_multi_avg_fn(self.settings.ema) if self.settings.ema else None
        self.averages = [
            AveragedModel(net.module, multi_avg_fn=average, use_buffers=True) for net in self.nets if average
        ]
        self.teachers = [[p.detach().clone() for p in net.params] for net in self.nets if self.method.teacher_decay]
        self.method.rng = np.random.default_rng(
            stream_seed(self.config.seed, self.stage, 0, "init", self.method.networks)
        )
        self.method.on_stage(self.loader.labels)
        self.auxiliary_optimizer = self.method.auxiliary_optimizer()
        self.selected: dict[str, Any] | None = None

    def _net(self, module: nn.Module) -> Net:
        forward = module
        if self.method.features or "features" in optim.OPTIMIZERS[self.settings.opt].needs:
            if not (hasattr(module, "features") and hasattr(module, "head")):
                raise UserError("this method or optimizer needs a network with features() and head")
            forward = WithFeatures(module)
        if self.resolved["compile"]:
            forward = models.compiled(forward)  # type: ignore[assignment]
        net = Net(module, self.resolved["precision"], self.config.bn, forward)
        net.statistics.average = self.processes.average
        return net

    def _refresh(self, module: nn.Module, count: int, k: int) -> None:
        """Draw the last blocks of a network anew, from the stage's own seed."""
        if count:
            drawn = self.network(stream_seed(self.config.seed, self.stage, 0, "init", k))
            for block, new in zip(last_blocks(module, count), last_blocks(drawn, count), strict=True):
                block.load_state_dict(new.state_dict())

    def _optimizer(self, net: Net) -> optim.SharpnessAware:
        s = self.settings
        chosen = self.optimizer_options if s.opt == self.config.opt else optim.options(s.opt, {})
        optimizer = optim.OPTIMIZERS[s.opt](
            net.named,
            base=s.base_opt,
            lr=s.lr,
            momentum=s.momentum,
            nesterov=s.nesterov,
            weight_decay=s.weight_decay,
            l2=s.l2,
            clip=s.clip,
            **chosen.model_dump(),
        )
        optimizer.transform_gradient, optimizer.average = self.method.transform_gradient, self.at_end
        return optimizer

    def _evaluated(self) -> list[nn.Module]:
        """The networks that are reported: the averages where averaging is on."""
        return [a.module for a in self.averages] or [net.module for net in self.nets]

    # an epoch

    def _epoch(self, epoch: int, stage: Stage) -> None:
        """Train, measure, checkpoint, write down, send: in this order, so that nothing is told that is done again."""
        clock = Clock(self.device)
        line: dict[str, Any] = {"stage": self.stage, "epoch": epoch, "time": time.time()}
        line |= self._train(epoch, stage)
        line["train_seconds"] = clock.lap()
        line["images_per_second"] = line.pop("images") / line["train_seconds"]
        last = self.settings.epochs - 1 - epoch
        if (epoch + 1) % self.settings.eval_every == 0 or last < EVALUATED_AT_THE_END:
            line |= self.processes.share(self._measure)
            self._select(epoch, line)
        line["eval_seconds"] = clock.lap()
        line["compile_seconds"] = clock.compiling
        self.lines.append(line)
        # without a checkpoint, so that a second start diverges again instead of going on from here
        if line["skipped_steps"] == line["steps"] or not math.isfinite(line.get("test_nll", 0.0)):
            if self.processes.first:
                self.folder.write_epochs(self.lines)
            raise RunFailed(f"diverged in epoch {epoch + 1}: not finite; lower --lr or --rho, or give --clip")
        self.processes.same(self._tensors())
        if self.processes.first:
            if self.config.snapshots and (epoch + 1) % self.config.snapshots == 0:
                self.folder.write_weights(self._evaluated(), self.stage, epoch)
            checkpoint.save(self.folder.path, self._state(epoch))
            self.folder.write_epochs(self.lines)
        if self.tracker is not None:
            self.tracker.sync()
        line["log_seconds"] = clock.lap()
        if self.progress is not None:
            self.progress.epoch(self.stage, epoch, self.settings.epochs, line)

    def _train(self, epoch: int, stage: Stage) -> dict[str, Any]:
        """The steps of one epoch. Nothing is read from the device before its end."""
        seed, method = self.config.seed, self.method
        method.epoch = epoch
        method.generator = stream(seed, self.stage, epoch, "method", self.device)
        method.rng = np.random.default_rng(stream_seed(seed, self.stage, epoch, "method", 1))
        for k, (net, optimizer) in enumerate(zip(self.nets, self.optimizers, strict=True)):
            part = k if self.config.sync_perturbation else k + self.processes.rank  # several processes have one network
            optimizer.generator = stream(seed, self.stage, epoch, "optimizer", self.device, part)
            optimizer.on_epoch(epoch, self.settings.epochs, len(self.loader))
            net.module.train()
            net.seed = stream_seed(seed, self.stage, epoch, "method", 2 + k)
        forwards, backwards = self._counts()
        method.on_epoch(epoch, self._predict)
        drawn = self.loader.epoch(self.stage, epoch, method.subset())
        sums = torch.zeros(3, device=self.device)  # over finite steps: loss, gradient norm, one
        batches = steps = images = 0
        rate = self.settings.lr
        for batch in method.batches(drawn):
            rate = learning_rate(self.settings, epoch + min(1.0, batches / len(drawn)), 1 / len(drawn))
            steps += self._step(batch, rate, sums)
            batches, images = batches + 1, images + len(batch.index)
            if self.progress is not None:
                self.progress.step(self.stage, epoch, batches, len(drawn))
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

    def _step(self, batch: Batch, rate: float, sums: Tensor) -> int:
        """One batch: plan once, at the unperturbed weights; then each network's optimizer evaluates its objective.
        Returns the number of optimizer steps."""
        for net in self.nets:
            net.statistics.begin()
            net.seed += 1
        # drawn for the whole batch, and then divided among the processes
        tasks = [task.take(self.processes.rows(len(task.inputs))) for task in self.method.tasks(batch, self._forward)]
        planned: list[Tensor | None] = [None] * len(tasks)
        if self.method.plan is not None:
            whole = [self.optimizers[t.network].whole(len(t.inputs)) for t in tasks]
            logits = [
                self.nets[t.network].logits(t.inputs, w, forwards=t.forwards) for t, w in zip(tasks, whole, strict=True)
            ]
            self.method.plan(tasks, [z.detach() for z in logits])
            planned = [z if w else None for z, w in zip(logits, whole, strict=True)]
        own = list(self.method.parameters())
        for task, first in zip(tasks, planned, strict=True):
            net, optimizer = self.nets[task.network], self.optimizers[task.network]
            for group in optimizer.param_groups:
                group["lr"] = rate
            objective = Objective(net, task, self.method.loss, first, own, self.at_once)
            loss = optimizer.step(objective)
            if self.auxiliary_optimizer is not None:
                for p, g in zip(own, objective.auxiliary_grads, strict=True):  # a step that is skipped is so for all
                    p.grad = torch.where(optimizer.found_inf == 0, g, torch.zeros_like(g))
                self.auxiliary_optimizer.step()
            net.statistics.commit(optimizer.found_inf)
            if self.teachers:
                weight = (1 - self.method.teacher_decay) * (1 - optimizer.found_inf)
                for kept, p in zip(self.teachers[task.network], net.params, strict=True):
                    kept.lerp_(p.detach(), weight)
            if self.averages:
                self.averages[task.network].update_parameters(net.module)
            values = torch.stack([loss, optimizer.norm, torch.ones_like(loss)])
            sums += torch.where(optimizer.found_inf == 0, values, torch.zeros_like(values))
        if len(tasks) < len(self.nets):  # a network that only looked on keeps its running statistics
            for k in set(range(len(self.nets))) - {t.network for t in tasks}:
                self.nets[k].statistics.commit()
        return len(tasks)

    def _forward(self, k: int, inputs: Tensor, averaged: bool = False) -> Tensor:
        """Logits of network k as it is trained, or at its average, without gradient."""
        return self.nets[k].logits(inputs, grad=False, weights=self.teachers[k] if averaged else None)

    def _predict(self, k: int, features: bool = False, augmented: bool = False) -> Tensor:
        """Plain (or augmented) predictions, or features, of network k for the training set; counted."""
        self.nets[k].forwards += len(self.loader)
        module = self._evaluated()[k]
        inputs = self.loader.augmented(self.method.generator) if augmented else None
        result = self.evaluator.of_training(module, features, inputs)
        self.nets[k].module.train()
        return result

    def _measure(self) -> dict[str, float]:
        """All figures of the present networks."""
        self.method.on_evaluation(self._predict)
        return self.evaluator.measure(self._evaluated())

    def _counts(self) -> tuple[int, int]:
        """Rows that went forwards and backwards so far, over all processes, each of which has as many."""
        size = self.processes.size
        return size * sum(n.forwards for n in self.nets), size * sum(n.backwards for n in self.nets)

    def _select(self, epoch: int, line: dict[str, Any]) -> None:
        """Keep the networks of the epoch that is best on noisy validation labels; the first of equals."""
        accuracy = line.get("val_accuracy")
        if accuracy is None or (self.selected is not None and accuracy <= self.selected["accuracy"]):
            return
        states = [{n: v.clone() for n, v in m.state_dict().items()} for m in self._evaluated()]
        self.selected = {"accuracy": accuracy, "epoch": epoch, "networks": states}

    # state

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "key": self.folder.key,
            "stage": self.stage,
            "epoch": epoch,
            "lines": self.lines,
            "memo": self.memo,
            "networks": [net.module.state_dict() for net in self.nets],
            "teachers": self.teachers,
            "averages": [a.state_dict() for a in self.averages],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "method": self.method.state_dict(),
            "own_rule": None if self.auxiliary_optimizer is None else self.auxiliary_optimizer.state_dict(),
            "selected": self.selected,
        }

    def _tensors(self) -> list[Tensor]:
        """What several processes must hold alike."""
        modules = [self.method, *(net.module for net in self.nets)]
        kept = [t for module in modules for t in module.state_dict().values()]
        kept += [t for o in self.optimizers for memory in o.memory.values() for t in memory]
        kept += [t for o in self.optimizers for state in o.state.values() for t in state.values()]
        return [t for t in kept if isinstance(t, Tensor)]

    def _load(self, saved: dict[str, Any]) -> None:
        for parts, states in (
            ([net.module for net in self.nets], saved["networks"]),
            (self.averages, saved["averages"]),
            (self.optimizers, saved["optimizers"]),
            ([self.method], [saved["method"]]),
            ([self.auxiliary_optimizer], [saved["own_rule"]]) if self.auxiliary_optimizer is not None else ([], []),
        ):
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)  # type: ignore[attr-defined]
        self.teachers, self.selected = saved["teachers"], saved["selected"]

    # the record

    def _new_record(self, digests: dict[str, str], earlier: dict[str, Any]) -> dict[str, Any]:
        c, noisy = self.config, self.problem.noisy
        module = self.network(0)
        return {
            "schema": RECORD_SCHEMA,
            "key": self.folder.key,
            "status": "running",
            "name": run_name(c),
            "config": {  # where files lie is no part of a run
                **c.model_dump(mode="json", exclude={"data_dir"}),
                "plugin": c.plugin and c.plugin.name,
            },
            "optimizer_options": self.optimizer_options.model_dump(),
            "method_options": self.method.options.model_dump(),
            "resolved": self.resolved,
            "oracle": c.oracle(),
            "digests": digests,
            "revisions": c.revisions(),
            "noise": noisy.card(),
            "data": {
                "name": self.problem.dataset.name,
                "train": len(self.problem.train),
                "val": len(self.problem.val),
                "test": len(self.problem.dataset.test_labels),
            },
            "model": {"name": c.model, "parameters": sum(p.numel() for p in module.parameters())},
            "environment": environment(),
            "started": earlier.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "ended": None,
            "results": {},
            "cost": {},
            "error": None,
        }

    def _write(self, status: str) -> None:
        self.record["status"] = status
        if self.processes.first:
            self.folder.write(self.record)

    def _finish(self) -> None:
        """Results, weights, record; then the checkpoints go."""
        self.record["results"] = results(self.lines, self.stage)
        self.record["cost"] = cost(self.lines)
        if self.processes.first:
            self.folder.write_confusion(self.evaluator.confusion(self._evaluated()))
            self.folder.write_weights(self._evaluated())
            self.folder.write_epochs(self.lines)
        self._end("finished", None)
        if self.processes.first:
            checkpoint.remove(self.folder.path)

    def _end(self, status: str, error: str | None) -> None:
        self.record |= {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "error": error}
        if not self.record["cost"] and self.lines:
            self.record["cost"] = cost(self.lines)
        self._write(status)
        if status == "finished" and self.processes.first:
            checkpoint.remove(self.folder.path)
        if self.tracker is not None:
            self.tracker.sync(final=True)


class Clock:
    """Seconds between laps, with the device's work done; those spent in ``torch.compile`` apart, in ``compiling``."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()
        self.compiled_before = devices.compile_seconds()
        self.compiling = 0.0

    def lap(self) -> float:
        """Seconds since the last lap, without those of compilation."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, self.last = self.last, time.perf_counter()
        spent = devices.compile_seconds() - self.compiled_before - self.compiling
        self.compiling += spent
        return self.last - last - spent
