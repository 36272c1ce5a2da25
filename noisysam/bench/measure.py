"""Code shared by the parts of the benchmark: settings, clocks, intervals, the machine, tables."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike

from noisysam.core.environment import environment
from noisysam.training import devices

BATCH = 128


@dataclass(frozen=True)
class Settings:
    """Settings of ``noisysam bench``. ``rounds``: None: each part's own; ``quick``: tiny networks and data, as
    a test; ``long``: also the largest sizes; ``peak_tflops``: peak performance of the device, in 10^12 operations per
    second, to compute the share that is used."""

    rounds: int | None = None
    quick: bool = False
    long: bool = False
    data_dir: Path | None = None
    peak_tflops: float | None = None

    def times(self, own: int) -> int:
        """The number of rounds of a part whose own choice is ``own``."""
        return self.rounds or (2 if self.quick else own)


class Estimate(TypedDict):
    """A median over rounds and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


Row = dict[str, Any]  # column -> text, number, Estimate, list of numbers, or None
Tables = dict[str, list[Row]]  # title -> rows


@dataclass(frozen=True)
class Findings:
    """What a part measured, and under which conditions (``facts``)."""

    tables: Tables
    facts: dict[str, Any] = field(default_factory=dict)


def estimate(values: ArrayLike) -> Estimate:
    """Median of one value per round, with a percentile bootstrap interval (BCa fails for medians)."""
    from scipy.stats import bootstrap

    numbers = np.asarray(values, dtype=float)
    median = float(np.median(numbers))
    low = high = median
    if len(numbers) > 1:
        interval = bootstrap((numbers,), np.median, method="percentile", rng=0).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"median": rounded(median), "low": rounded(low), "high": rounded(high)}


def ratio(of: ArrayLike, to: ArrayLike) -> Estimate:
    """Estimate of the ratio, computed round by round."""
    return estimate(np.asarray(of, dtype=float) / np.asarray(to, dtype=float))


def rounded(value: float) -> float:
    """The value to four significant digits."""
    return float(f"{value:.4g}")


def median(values: ArrayLike) -> float:
    """The median over rounds, to four significant digits."""
    return rounded(float(np.median(np.asarray(values, dtype=float))))


def interleaved(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run the cases in turn, ``rounds`` times; returns the values of each case by round."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case())
    return found


def seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Wall-clock time of ``work``, including what it has queued on the device."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device | None) -> None:
    """Wait until the device has finished its queue."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


# what is written


def machine(load: float) -> dict[str, Any]:
    """The machine and the date, without host name or paths. ``load``: load average before the measurement."""
    device = devices.resolve_device("auto")
    found = environment()
    return {
        "device": devices.device_name(device),
        "cpu": devices.device_name(torch.device("cpu")),
        "cores": devices.cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(load, 2),
        "precision": "bf16" if devices.native_bf16(device) else "fp32",
        "torch": torch.__version__,
        "python": found["python"],
        "noisysam": found["noisysam"],
        "commit": found["commit"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def document(part: str, what: str, found: Findings, settings: Settings, load: float) -> dict[str, Any]:
    """The content of a part's JSON file."""
    asked: dict[str, Any] = {"quick": settings.quick, "long": settings.long, "peak_tflops": settings.peak_tflops}
    return {
        "part": part,
        "what": what,
        "machine": machine(load),
        "settings": asked | found.facts,
        "tables": found.tables,
    }


def markdown(tables: Mapping[str, Sequence[Row]]) -> str:
    """Format tables as Markdown, each below its title."""
    from tabulate import tabulate

    parts = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        body = [[text(row.get(name)) for name in columns] for row in rows]
        parts.append(f"{title}\n\n{tabulate(body, columns, tablefmt='pipe', disable_numparse=True)}")
    return "\n\n".join(parts)


def text(value: Any) -> str:
    """Format a cell: an estimate as 'median [low, high]', a list joined by commas, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{text(value['median'])} [{text(value['low'])}, {text(value['high'])}]"
    if isinstance(value, list | tuple):
        return ", ".join(text(v) for v in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
