"""Time of a step of every optimizer relative to SGD, on one network and batch, in one process with one thread.

Each round takes a few steps of every optimizer in turn, so that most steps follow one of the same kind, as in a run; if
the steps of an optimizer differ (LookSAM), it takes whole periods of them. Optimizers perturb the whole batch
(m = batch) unless the case says otherwise, and are past their warm-up. A method that plans would add a forward pass if
a step does not begin at the unperturbed weights (msam, extrap-sgd, sam-random).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from noisysam import models, optim
from noisysam.bench.measure import BATCH, Findings, Row, Settings, interleaved, median, ratio, rounded, seconds
from noisysam.core.network import Net, WithFeatures
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.training import devices
from noisysam.training.progress import note

FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "sam m=32": ("sam", {"m": 32}),
    "esam mask=tensor": ("esam", {"mask": "tensor"}),
}
SOME = ("sgd", "sam", "sam m=32", "sam-on", "esam", "esam mask=tensor", "mesa")
CHEAP = (*SOME, "looksam", "saf", "msam", "extrap-sgd")  # and the others that are designed to cost less than SAM
AFTER_WARMUP = 100  # epoch
ROUNDS = 10
TURN = 3  # steps (or periods of steps) per case and round


@dataclass(frozen=True)
class Network:
    """A network to measure steps on. ``only``: its cases, None for all."""

    model: str
    width: float = 1.0
    compile: bool = False
    only: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """Its name in the table."""
        width = "" if self.width == 1 else f" x {self.width:g}"
        return f"{self.model}{width}, {'compiled' if self.compile else 'eager'}"


NETWORKS = (
    Network("resnet8", width=2, only=CHEAP),  # the network of experiments/cpu-small*.yaml
    Network("resnet20"),
    Network("resnet32", compile=True, only=SOME),
    Network("resnet18", compile=True, only=SOME),
)
QUICK = (Network("resnet8", width=0.25, only=("sgd", "sam", "sam m=32", "looksam", "esam")),)


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every optimizer, and some further settings."""
    return {"sgd": ("sgd", {}), **{name: (name, {}) for name in optim.OPTIMIZERS}, **FURTHER}


def measure(settings: Settings) -> Findings:
    """One column for each network, one row for each case."""
    rows: dict[str, Row] = {}
    speeds: list[Row] = []
    batch = 64 if settings.quick else BATCH
    for network in QUICK if settings.quick else NETWORKS:
        note(f"  {network.label}")
        found = step_times(network, batch, settings.times(ROUNDS))
        for case in sorted(found.keys() - {"sgd"}):
            rows.setdefault(case, {"step over SGD's": f"`{case}`"})[network.label] = ratio(found[case], found["sgd"])
        speeds.append({
            "network": network.label,
            "images a second, sgd": rounded(batch / median(found["sgd"])),
            "sam / sgd": ratio(found["sam"], found["sgd"]),
            "sam m=32 / sam": ratio(found["sam m=32"], found["sam"]),
        })  # fmt: skip
    facts = {
        "rounds": settings.times(ROUNDS),
        "batch": batch,
        "threads": 1,
        "m": "batch, unless the case says otherwise",
    }
    return Findings({"Step over SGD's": [rows[case] for case in sorted(rows)], "SGD and SAM": speeds}, facts)


def step_times(network: Network, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each case, by round."""
    steps = {n: stepper(network, batch, *c) for n, c in cases().items() if network.only is None or n in network.only}
    for step in steps.values():
        step(), step()
    return interleaved(steps, rounds)


def stepper(network: Network, batch: int, name: str, options: dict[str, Any]) -> Callable[[], float]:
    """A function that takes the steps of one round on its own network and returns the seconds per step."""
    device = devices.resolve_device("auto")
    precision = "bf16" if devices.native_bf16(device) else "fp32"
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator).to(device)
    index = torch.arange(batch, device=device)
    member = optim.OPTIMIZERS[name]
    if "m" in member.Options.model_fields:
        options = {"m": "batch", **options}
    module = models.build(network.model, 10, width=network.width).to(device)
    forward: Any = WithFeatures(module) if "features" in member.requires else module
    if network.compile:
        forward = models.compiled(forward)
    net = Net(module, precision, forward=forward)  # type: ignore[arg-type]
    optimizer = member(net.named, lr=0.01, momentum=0.9, nesterov=True, **options)
    optimizer.on_epoch(AFTER_WARMUP, 2 * AFTER_WARMUP, batch)
    period = getattr(optimizer.options, "interval", 1)

    def loss(logits: torch.Tensor, task: Task) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, task.labels, reduction="none")

    def steps() -> None:
        for _ in range(TURN * period):
            net.statistics.begin()
            optimizer.step(Objective(net, Task(0, inputs, labels, index), loss))
            net.statistics.commit(optimizer.found_inf)

    return lambda: seconds(steps, device) / (TURN * period)
