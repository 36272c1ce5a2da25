"""One run from its start, or its checkpoint, to its result: stages, evaluations, record, checkpoints."""

import copy
import errno
import math
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from noisysam import methods
from noisysam.core.environment import environment
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.text import one_line
from noisysam.methods import Stage, StageContext
from noisysam.runs.config import RunConfig
from noisysam.runs.measures import EVALUATED_AT_THE_END
from noisysam.runs.predictions import PREDICTIONS, write_predictions
from noisysam.runs.problem import Problem
from noisysam.runs.record import RunFolder
from noisysam.runs.schema import RECORD_SCHEMA
from noisysam.runs.summary import collapsed, cost, results, run_name
from noisysam.training import checkpoint, devices, reuse
from noisysam.training.distributed import ProcessGroup, ProcessLost
from noisysam.training.result import Result
from noisysam.training.trainer import Factory, ProgressCallback, Trainer


class SupportsSync(Protocol):
    """Sends a run's record somewhere; never raises."""

    def sync(self, final: bool = False) -> bool: ...


class Run:
    """One run while it is trained. ``fit`` makes it, with its folder locked."""

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
        self.config, self.folder, self.digests, self.progress = config, folder, digests, progress
        self.processes = processes = processes or ProcessGroup()
        self.tracker = tracker(folder) if tracker is not None else None
        images = config.epochs * len(problem.train)
        earlier: Mapping[str, Any] = folder.sound_record or {}
        self.resolved = processes.share(lambda: earlier.get("resolved") or devices.resolve(config, images))
        self._check_machine()
        self.trainer = Trainer(config, problem, self.resolved, network, progress, processes)
        self.configured = network is None
        self.lines: list[dict[str, Any]] = []  # of all stages: one an epoch
        self.stage_predictions: dict[str, Tensor] = {}  # 'stage/epoch' -> logits, for a resume
        self.reused: dict[str, Any] = {}
        self.selected: dict[str, Any] | None = None  # of the present stage: the epoch best on noisy validation labels
        self.record = self._new_record(earlier)
        self.elsewhere = _elsewhere(earlier)

    def _check_machine(self) -> None:
        """A resumed run keeps the device that was chosen at its start."""
        wanted = devices.resolve_device(self.config.device)
        device = torch.device(self.resolved["device"])
        if self.config.device != "auto" and device.type != wanted.type:
            raise UserError(
                f"run {self.folder.key} began on {device}: resume it there, or delete {self.folder.path} to start over"
            )
        devices.resolve_device(str(device))

    def fit(self) -> Result:
        """Train all stages, from the checkpoint on where there is one."""
        trainer = self.trainer
        saved = self.processes.share(
            lambda: checkpoint.load(self.folder.path, trainer.device, self.folder.key), trainer.device
        )
        if saved is not None:
            self.lines, self.stage_predictions = saved["lines"], saved["memo"]
            self.reused = saved.get("reused", {})
            if self.elsewhere:
                self.record["earlier_environments"] = self.elsewhere
        self._write("running")
        try:
            for number, stage in enumerate(trainer.method.stages(StageContext(self.predict))):
                trainer.number = number
                if saved is not None and number < saved["stage"]:
                    continue
                if saved is None and stage.reusable and self._reuse(number, stage):
                    continue
                trainer.begin_stage(number, stage)
                self.selected = None
                first = self._resume(saved) if saved is not None and number == saved["stage"] else 0
                for epoch in range(first, trainer.settings.epochs):
                    self._epoch(epoch)
            self._finish()
        except (KeyboardInterrupt, ProcessLost):
            self._end("interrupted", None)
            raise
        except Exception as error:
            expected = isinstance(error, RunFailed | UserError)
            told = one_line(error) if expected else f"{type(error).__name__}: {one_line(error)}"
            if not expected:
                self.record["traceback"] = traceback.format_exc()
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)  # no fault of the run
            self._end("interrupted" if full else "failed", told)
            raise
        return Result(self.folder.key, self.folder.path, self.record)

    def _resume(self, saved: dict[str, Any]) -> int:
        """Take back a checkpoint; the epoch that comes next."""
        try:
            self.trainer.load_state_dict(saved)
            self.selected = saved["selected"]
            return int(saved["epoch"]) + 1
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.folder.path}: its checkpoint does not fit this run ({reason}): delete the folder to start over"
            ) from None

    # a first stage that another run has trained

    def _reuse(self, number: int, stage: Stage) -> bool:
        """Take a stage's epochs and predictions from the finished run that is this stage alone; whether there is one.

        The stage would be trained to the same bits: same labels, seed, machine and arithmetic.
        """
        if not self.configured or self.processes.size > 1:
            return False
        found = reuse.find(self.trainer, stage, self.digests, self.folder.store)
        if found is None or self.trainer.recipe.method_options.teacher not in found.predictions:
            return False
        self.lines = [{**line, "stage": number} for line in found.lines]
        classes = self.trainer.problem.dataset.classes
        for which, labels in found.predictions.items():
            one_hot = F.one_hot(labels, classes).float().to(self.trainer.device)
            self.stage_predictions[f"{number}/{which}"] = one_hot
        self.reused = {"stage": number, "key": found.key, "predictions": found.digest, "epochs": len(self.lines)}
        self.record["reused"] = self.reused
        return True

    def predict(self, which: str) -> Tensor:
        """For ``Method.stages``: the reported logits of the stage that just ended, kept for a resume."""
        name = f"{self.trainer.number}/{which}"
        if name not in self.stage_predictions:
            self.stage_predictions[name] = self.processes.share(lambda: self._reported(which), self.trainer.device)
        return self.stage_predictions[name]

    def _reported(self, which: str) -> Tensor:
        modules = self.trainer.reported
        if which == "selected":
            if self.selected is None:
                raise UserError("teacher=selected needs a validation split: give --val-fraction")
            modules = [copy.deepcopy(m) for m in modules]
            for module, state in zip(modules, self.selected["networks"], strict=True):
                module.load_state_dict(state)
        return self.trainer.evaluator.reported(modules)

    # an epoch

    def _epoch(self, epoch: int) -> None:
        """Train, measure, checkpoint, write, send: in this order, so that no epoch is reported and then repeated."""
        trainer = self.trainer
        clock = Clock(trainer.device)
        line: dict[str, Any] = {"stage": trainer.number, "epoch": epoch, "time": time.time()}
        line |= trainer.train_epoch(epoch)
        line["train_seconds"] = clock.lap()
        line["images_per_second"] = line.pop("images") / line["train_seconds"]
        last = trainer.settings.epochs - 1 - epoch
        if (epoch + 1) % trainer.settings.eval_every == 0 or last < EVALUATED_AT_THE_END:
            line |= self.processes.share(trainer.measure)
            self._select(epoch, line)
        line["eval_seconds"] = clock.lap()
        line["compile_seconds"] = clock.compiling
        self.lines.append(line)
        # without a checkpoint, so that a second start diverges again instead of going on from here
        if line["skipped_steps"] == line["steps"] or not math.isfinite(line.get("test_nll", 0.0)):
            if self.processes.first:
                self.folder.write_epochs(self.lines)
            raise RunFailed(f"diverged in epoch {epoch + 1}: not finite; lower --lr or --rho, or give --clip")
        self.processes.same(trainer.tensors())
        if self.processes.first:
            if self.config.snapshots and (epoch + 1) % self.config.snapshots == 0:
                self.folder.write_weights(trainer.reported, trainer.number, epoch)
            checkpoint.save(self.folder.path, self.state(epoch))
            self.folder.write_epochs(self.lines)
        if self.tracker is not None:
            self.tracker.sync()
        line["log_seconds"] = clock.lap()
        if self.progress is not None:
            self.progress.epoch(trainer.number, epoch, trainer.settings.epochs, line)

    def _select(self, epoch: int, line: dict[str, Any]) -> None:
        """Keep the networks of the epoch that is best on noisy validation labels; the first of equals."""
        accuracy = line.get("val_accuracy")
        if accuracy is None or (self.selected is not None and accuracy <= self.selected["accuracy"]):
            return
        states = [{n: v.clone() for n, v in m.state_dict().items()} for m in self.trainer.reported]
        self.selected = {"accuracy": accuracy, "epoch": epoch, "networks": states}

    def state(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "key": self.folder.key,
            "stage": self.trainer.number,
            "epoch": epoch,
            "lines": self.lines,
            "memo": self.stage_predictions,
            "reused": self.reused,
            "selected": self.selected,
            **self.trainer.state_dict(),
        }

    # the record

    def _new_record(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        c, trainer = self.config, self.trainer
        problem, recipe = trainer.problem, trainer.recipe
        network = trainer.network(0)
        model = c.model if self.configured else type(network).__name__
        return {
            "schema": RECORD_SCHEMA,
            "key": self.folder.key,
            "status": "running",
            "name": run_name(c, problem.dataset.name, model),
            "config": {  # where files lie is no part of a run
                **c.model_dump(mode="json", exclude={"data_dir"}),
                "plugin": c.plugin and c.plugin.name,
            },
            "optimizer_options": recipe.optimizer_options.model_dump(),
            "method_options": recipe.method_options.model_dump(),
            "resolved": self.resolved,
            "oracle": c.oracle(),
            "digests": self.digests,
            "revisions": recipe.revisions,
            "noise": problem.noisy.card(),
            "data": {
                "name": problem.dataset.name,
                "train": len(problem.train),
                "val": len(problem.val),
                "test": len(problem.dataset.test_labels),
                "classes": list(problem.dataset.class_names),
            },
            "model": {"name": model, "parameters": sum(p.numel() for p in network.parameters())},
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
        """Results, weights, predictions, record; then the checkpoints are removed."""
        trainer = self.trainer
        self.record["results"] = results(self.lines, trainer.number)
        if self.processes.first:
            confusion = trainer.evaluator.confusion(trainer.reported)
            self.folder.write_confusion(confusion)
            self.record["collapsed"] = collapsed(confusion)
            self.folder.write_weights(trainer.reported)
            if methods.without_stages(self.config.method) == self.config.method:  # another run may begin with this one
                which = ["last"] if self.selected is None else ["last", "selected"]
                predicted = {name: self._reported(name).argmax(1).cpu().numpy() for name in which}
                write_predictions(self.folder.path / PREDICTIONS, predicted)
            self.folder.write_epochs(self.lines)
        self._end("finished", None)

    def _end(self, status: str, error: str | None) -> None:
        self.record |= {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "error": error}
        if self.lines:
            self.record["cost"] = cost(self.lines)
        own = self.lines[self.reused.get("epochs", 0) :]
        if self.reused and own:  # `cost` is that of the run alone, all its stages trained
            self.record["reused"] = {**self.reused, "spent": cost(own)}
        self._write(status)
        if status == "finished" and self.processes.first:
            checkpoint.remove(self.folder.path)
        if self.tracker is not None:
            self.tracker.sync(final=True)


def _elsewhere(earlier: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """The environments of a run's earlier parts, where its bits were decided by another machine or another torch."""
    parts = [*earlier.get("earlier_environments", []), *([earlier["environment"]] if "environment" in earlier else [])]
    kinds = {tuple(part.get(name) for name in (*reuse.SAME_BITS, "cpu")): part for part in [environment(), *parts]}
    return list(kinds.values())[1:]


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
