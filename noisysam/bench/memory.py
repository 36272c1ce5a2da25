"""Memory: copies of the weights that an optimizer's step needs, and bytes that a method keeps per sample.

Both are counted exactly, once, on the CPU.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from noisysam import methods
from noisysam.bench.measure import Findings, Row, Settings, rounded
from noisysam.core.network import Net, WithFeatures
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.methods import METHODS, RunInfo, StageContext
from noisysam.optim import OPTIMIZERS

WIDTH, ROWS = 256, 4  # so that weights need far more memory than activations
SAMPLES, CLASSES, FEATURES = 64, 10, 64


def measure(settings: Settings) -> Findings:
    """One row for every optimizer and for every method."""
    members = ("sgd", "sam", "adamw") if settings.quick else tuple(OPTIMIZERS)
    optimizers: list[Row] = [
        {
            "optimizer": f"`{name}`",
            "copies beyond SGD's, declared": float(OPTIMIZERS[name].copies),
            "measured": rounded(step_copies(name) - step_copies("sgd")),
        }
        for name in members
    ]
    kept: list[Row] = [{"method": f"`{name}`", "bytes a sample": sample_bytes(name)} for name in METHODS]
    return Findings({"Peak of a step, in copies of the weights": optimizers, "State of a method (K classes)": kept})


class Wide(nn.Module):
    """Four wide layers, a norm layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.rest = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
        self.head = nn.Linear(WIDTH, 10)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (n, d)."""
        out: Tensor = self.rest(torch.relu(self.norm(self.first(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        logits: Tensor = self.head(self.features(x))
        return logits


@cache
def step_copies(name: str) -> float:
    """Peak memory of an optimizer over its first six steps, in copies of the weights."""

    def loss(logits: Tensor, task: Task) -> Tensor:
        return F.cross_entropy(logits, task.labels, reduction="none")

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module, member = Wide(), OPTIMIZERS[name]
        net = Net(module, forward=WithFeatures(module))
        at_once: dict[str, Any] = {"warmup": 0, "m": "batch"}
        given = {k: v for k, v in at_once.items() if k in member.Options.model_fields}
        x, y = torch.randn(ROWS, WIDTH), torch.randint(10, (ROWS,))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            optimizer = member(net.named, lr=0.01, momentum=0.9, **given)
            optimizer.on_epoch(8, 10, ROWS)
            for _ in range(6):
                optimizer.step(Objective(net, Task(0, x, y, torch.arange(ROWS)), loss))
    events = watched.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = torch.tensor([change for _, change in changes]).cumsum(0)
    return float(held.max()) / sum(4 * p.numel() for p in net.params)


def sample_bytes(name: str) -> str:
    """Bytes that a method keeps per sample during a training: '8', '4 K', '4 + 4 K' (K classes), '-' for none. Counted
    from its buffers and parameters with default options, for n and 2 n samples of 10 and 20 classes."""
    few, many = (state_bytes(name, 2 * SAMPLES, k) - state_bytes(name, SAMPLES, k) for k in (CLASSES, 2 * CLASSES))
    each = (many - few) // (SAMPLES * CLASSES)
    fixed = few // SAMPLES - CLASSES * each
    return " + ".join([str(fixed)] * bool(fixed) + [f"{each} K"] * bool(each)) or "-"


def state_bytes(name: str, samples: int, classes: int) -> int:
    """Bytes of a method's buffers and parameters at the start of its first training."""
    options = methods.options(name, {})
    known = methods.noise_facts(name, options)
    facts = RunInfo(
        samples=samples,
        classes=classes,
        epochs=200,
        device=torch.device("cpu"),
        features=FEATURES,
        rate=0.4 if "rate" in known else None,
        matrix=(0.6 * torch.eye(classes) + 0.4 / classes) if "matrix" in known else None,
    )
    method = methods.compose(name)(options, facts)
    stages = method.stages(StageContext(lambda which: torch.zeros(samples, classes)))
    next(stages)
    method.on_stage(torch.arange(samples) % classes)
    return sum(t.numel() * t.element_size() for t in (*method.buffers(), *method.parameters()))
