"""Base of all probes: a finished run with its weights and data, the probe class, and where results are stored.

A probe measures a trained network and changes nothing: neither weights nor record. Its results are in
``<run>/probes/<name>.json``::

    schema, probe, revision, key and name of the run, weights (SHA-256), options, commit, device, seconds, results,
    scalars: the results that are single numbers, by flat names, as MLflow shows them
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from noisysam import methods
from noisysam.core.environment import environment
from noisysam.core.errors import UserError
from noisysam.core.files import file_digest, read_json, write_json
from noisysam.core.registry import Registry, class_fault
from noisysam.core.validation import explain
from noisysam.data.augmentation import normalise
from noisysam.data.loader import PLAIN_ROWS, Loader
from noisysam.methods import Method, RunInfo
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.problem import Problem, prepare
from noisysam.runs.record import RunFolder, find_run
from noisysam.runs.schema import PROBE_SCHEMA
from noisysam.training import devices, metrics
from noisysam.training.evaluator import Evaluator
from noisysam.training.weights import read_networks

Part = Literal["clean", "noisy", "test"]
PARTS: tuple[Part, ...] = ("clean", "noisy", "test")

PROBES: Registry[type["Probe"]] = Registry("probe", lambda item: class_fault(item, Probe, must=("run",)))


class Options(BaseModel):
    """A probe's own settings (``--option key=value``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Probe(ABC):
    """A measurement on a trained network. Registered with the paper that defines it."""

    name: ClassVar[str]
    source: ClassVar[str]
    revision: ClassVar[int]
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def run(self, subject: "Subject") -> dict[str, Any]:
        """The results, JSON-serialisable. Reports draw them."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A finished run. ``modules``: the reported networks (one, or as many as the method has) with the final weights;
    in evaluation mode, float32, channels_last, on ``device``."""

    folder: RunFolder
    record: Mapping[str, Any]
    config: RunConfig
    problem: Problem
    loader: Loader
    device: torch.device
    method: Method
    modules: list[nn.Module]

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """The reported logits (n, K) from the logits (or features) of each network, by the method's own rule."""
        return self.method.outputs(logits)

    def snapshots(self) -> list[tuple[int, int]]:
        """(stage, epoch) of the weights that ``--snapshots`` stored during training, in order."""
        names = [path.stem.split("-") for path in (self.folder.path / "snapshots").glob("*-*.safetensors")]
        return sorted((int(stage), int(epoch)) for stage, epoch in names)

    def at(self, stage: int, epoch: int) -> list[nn.Module]:
        """The networks with the weights of a snapshot. ``UserError`` if there is none."""
        if (stage, epoch) not in self.snapshots():
            raise UserError(f"run {self.folder.key} has no weights of stage {stage}, epoch {epoch}: see --snapshots")
        path = self.folder.path / "snapshots" / f"{stage}-{epoch}.safetensors"
        return read_networks(path, self.config, self.problem, self.device)

    def part(self, name: Part, limit: int | None) -> tuple[Tensor, Tensor]:
        """Plain inputs (n, C, H, W) and labels (n,), on the device.

        ``clean``: training images with their true labels; ``noisy``: the same images with the labels they were given;
        ``test``: test images. At most ``limit`` of them, by class in proportion (of the training images also by
        whether the label is wrong), the same ones in every call; None: all. Validation images are never included.
        """
        if name == "test":
            data = self.problem.dataset
            labels = data.test_labels.numpy()
            wrong = np.zeros(len(labels), dtype=np.bool_)
            chosen = torch.from_numpy(metrics.stratified_sample(wrong, labels, limit or len(labels), seed=0))
            images = data.test_images[chosen].to(self.device)
            return normalise(images, self.loader.mean, self.loader.std), data.test_labels[chosen].to(self.device)
        noisy = self.problem.noisy.take(self.problem.train)
        chosen = torch.from_numpy(metrics.stratified_sample(*noisy.strata, limit or len(noisy.labels), 0))
        given = torch.from_numpy(noisy.truth if name == "clean" else noisy.labels)[chosen]
        return torch.cat(list(self.loader.plain(chosen.to(self.device)))), given.to(self.device)

    @torch.no_grad()
    def logits(self, inputs: Tensor, modules: Sequence[nn.Module] | None = None) -> Tensor:
        """The reported logits (n, K) of networks (default: ``modules``) for plain inputs (n, C, H, W)."""
        features = self.method.reported == "features"
        each = [
            torch.cat([m.features(x) if features else m(x) for x in inputs.split(PLAIN_ROWS)])  # type: ignore[operator]
            for m in (self.modules if modules is None else modules)
        ]
        return self.outputs(each)


def load(
    store: Path, key: str, data_dir: Path | None = None, device: str = "auto", plugin: Path | None = None
) -> Subject:
    """Load a finished run by its key or a unique prefix of it. ``plugin``: the file that it was trained with, if any.

    ``UserError`` if there is no such run, it has not finished, it has no weights, or its data or labels differ from
    those that it was trained on.
    """
    folder = find_run(store, key)
    record = _finished(folder)
    if "network" in record["digests"]:
        raise UserError(f"run {folder.key} trained a network of the caller's own: only configured ones can be probed")
    config = _config(record, data_dir, plugin)
    problem = prepare(config)
    for name, digest in problem.digests.items():
        if digest != record["digests"][name]:
            raise UserError(
                f"run {folder.key} was trained on {name} {record['digests'][name][:16]}, found here are {digest[:16]}:"
                " the files have changed since, or the run needs another --data-dir or version of noisysam"
            )
    where = devices.resolve_device(device)
    noisy = problem.noisy.take(problem.train)
    loader = Loader(
        problem.dataset,
        torch.from_numpy(problem.chosen[problem.train]),
        torch.from_numpy(noisy.labels),
        rows=config.batch,
        policy="none",
        device=where,
        seed=config.seed,
    )
    modules = read_networks(folder.path / "weights.safetensors", config, problem, where)
    method = _method(config, problem, loader, modules)
    return Subject(folder, record, config, problem, loader, where, method, modules)


def probe(
    store: Path,
    key: str,
    names: Sequence[str],
    options: Mapping[str, Any] | None = None,
    *,
    data_dir: Path | None = None,
    device: str = "auto",
    plugin: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Run probes on a run and return the content of each result file, by the name of the probe.

    ``options``: each probe takes those that it has; ``UserError`` if none of them has one. Results that exist for the
    same weights and options are not computed again.
    """
    folder = find_run(store, key)
    record = _finished(folder)
    weights = file_digest(folder.path / "weights.safetensors")
    subject: Subject | None = None
    written = {}
    for name, chosen in choices(names, options or {}).items():
        path = folder.path / "probes" / f"{name}.json"
        facts = {
            "schema": PROBE_SCHEMA,
            "probe": name,
            "revision": PROBES[name].revision,
            "key": folder.key,
            "name": record["name"],
            "weights": weights,
            "options": chosen.model_dump(mode="json"),
        }
        if not (path.exists() and facts.items() <= read_json(path).items()):
            subject = subject or load(store, folder.key, data_dir, device, plugin)
            start = time.perf_counter()
            results = PROBES[name](chosen).run(subject)
            spent = {"device": devices.device_name(subject.device), "seconds": time.perf_counter() - start}
            found = {"results": results, "scalars": scalars(results)}
            write_json(path, {**facts, "commit": environment()["commit"], **spent, **found})
        written[name] = read_json(path)
    return written


def scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers in the results of a probe, by their paths: ``test.lambda_max``.

    These are the finite floats; integers are counts and are left out. Of a list of mappings, such as the moments of a
    training, the last one is used; other lists are left out.
    """
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            found |= scalars(value[-1])
        elif isinstance(value, Mapping):
            found |= {f"{name}.{inner}": figure for inner, figure in scalars(value).items()}
        elif isinstance(value, float) and math.isfinite(value):
            found[name] = value
    return found


def choices(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, BaseModel]:
    """The validated options of each probe, which takes those of ``options`` that it has."""
    fields = {name: PROBES[name].Options.model_fields for name in names}
    for option in options:
        if not any(option in known for known in fields.values()):
            known = ", ".join(dict.fromkeys(o for of in fields.values() for o in of))
            raise UserError(f"--option {option}: {' and '.join(fields)} have no such option (known: {known})")
    chosen = {}
    for name, own in fields.items():
        try:
            chosen[name] = PROBES[name].Options(**{o: v for o, v in options.items() if o in own})
        except ValidationError as error:
            raise UserError(f"probe {name}: " + explain(error, prefix="option ")) from None
    return chosen


def _finished(folder: RunFolder) -> Mapping[str, Any]:
    """The record of a finished run with weights."""
    record = folder.record
    if record is None or record["status"] != "finished":
        status = "unknown" if record is None else record["status"]
        raise UserError(f"run {folder.key} is not finished ({status}): only a trained network can be probed")
    if not (folder.path / "weights.safetensors").exists():
        raise UserError(f"run {folder.key} has no weights here: export it with --weights, or train it in another store")
    return record


def _config(record: Mapping[str, Any], data_dir: Path | None, plugin: Path | None) -> RunConfig:
    """The configuration of a record, with the folder and plug-in of this machine."""
    values = {**record["config"], "data_dir": data_dir, "plugin": plugin}
    if record["config"].get("plugin") and plugin is None:
        raise UserError(f"run {record['key']} was trained with {record['config']['plugin']}: give it with --plugin")
    return validate(values, f"run {record['key']}: ")


def _method(config: RunConfig, problem: Problem, loader: Loader, modules: list[nn.Module]) -> Method:
    """The method after training, with the state that ``outputs`` needs."""
    options = methods.options(config.method, config.method_option)
    known = methods.noise_facts(config.method, options)
    noisy = problem.noisy.take(problem.train)
    facts = RunInfo(
        samples=len(noisy.labels),
        classes=problem.dataset.classes,
        epochs=config.epochs,
        device=loader.device,
        features=getattr(getattr(modules[0], "head", None), "in_features", 0),
        label_smoothing=config.label_smoothing,
        rate=float(noisy.flipped.mean()) if "rate" in known else None,
        matrix=torch.from_numpy(noisy.matrix).float().to(loader.device)
        if "matrix" in known and noisy.matrix is not None
        else None,
    )
    method = methods.compose(config.method)(options, facts)
    if method.reported == "features":  # its classifier is fitted to the features of the training set
        if type(method).stages is not Method.stages:
            raise UserError(f"method {config.method}: the labels that its classifier was fitted to are not kept")
        evaluator = Evaluator(problem, loader, method.outputs, bf16=False, features=True)
        method.on_stage(loader.labels)
        method.on_evaluation(lambda k, features=False, augmented=False: evaluator.of_training(modules[k], features))
    return method
