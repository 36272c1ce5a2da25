"""What ``auto`` becomes on this machine: decided once, from the configuration and the machine, never from a timing."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from noisysam import optim
from noisysam.core.environment import instruction_set
from noisysam.core.errors import UserError
from noisysam.runs.config import RunConfig

# Instruction sets whose bfloat16 beats float32 in a training step of ResNet-32 on one thread: AMX about 3 times,
# AVX-512 BF16 1.7 times (measured); ARM's by its flag, unmeasured.
BF16_SETS = ("amx_bf16", "avx512_bf16", "bf16")
SMALLEST_BF16_RADIUS = 0.05  # below, bfloat16 rounds away much of the difference that the perturbation makes


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


COMPILE_PAYS_FROM = {"cuda": 2_000_000, "cpu": 50_000}  # images; below, compiling takes longer than it saves
COMPILE_PAYS_IN = {"cuda": ("bf16", "fp32"), "cpu": ("bf16",)}  # on CPUs float32 is as fast without (measured)


def resolve(config: RunConfig, images: int) -> dict[str, Any]:
    """Device, precision, compilation and threads for a run that draws ``images`` images a stage."""
    device = resolve_device(config.device)
    precision = resolve_precision(config, device)
    return {
        "device": str(device),
        "device_name": device_name(device),
        "precision": precision,
        "compile": resolve_compile(config, device, precision, images),
        "threads": torch.get_num_threads(),
    }


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available on this machine; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps")
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 multiplies in hardware at more than float32's rate: recent CUDA, or a CPU with ``BF16_SETS``."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(bf16_set())


def bf16_set() -> str:
    """The instruction set of this CPU that makes bfloat16 pay; empty where it has none."""
    return next((name for name in BF16_SETS if name in instruction_set()), "")


def precision_reason(device: torch.device) -> str:
    """What ``--precision auto`` becomes on a device, and why."""
    if device.type == "cpu":
        return f"bf16 ({bf16_set()})" if bf16_set() else f"fp32 (the CPU has none of {', '.join(BF16_SETS)})"
    return "bf16" if native_bf16(device) else "fp32 (no bfloat16 in hardware)"


def compile_reason(device: torch.device) -> str:
    """What ``--compile auto`` becomes on a device, and why."""
    precisions = COMPILE_PAYS_IN.get(device.type, ())
    if not precisions or not compiler_works(device):
        return "off (no compiler works here)"
    if not native_bf16(device) and "fp32" not in precisions:
        return "off (float32 is as fast without on a CPU)"
    return f"on in {' and '.join(precisions)}, for runs of {COMPILE_PAYS_FROM[device.type]:,} images or more"


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """bf16 where it is native and the perturbation is large enough to survive it; else fp32."""
    if config.precision != "auto":
        return config.precision
    options = config.recipe().optimizer_options
    small = isinstance(options, optim.Radius) and 0 < options.rho < SMALLEST_BF16_RADIUS
    return "bf16" if native_bf16(device) and not small else "fp32"


def resolve_compile(config: RunConfig, device: torch.device, precision: str, images: int) -> bool:
    """Whether the network is compiled: as asked, or where the precision gains from it, the run is long enough and a
    compiler is at hand."""
    if config.compile != "auto":
        return config.compile == "on"
    pays = precision in COMPILE_PAYS_IN.get(device.type, ()) and images >= COMPILE_PAYS_FROM[device.type]
    return pays and compiler_works(device)


@cache
def compiler_works(device: torch.device) -> bool:
    """Whether ``torch.compile`` can build a kernel on this machine."""
    if device.type == "cpu" and shutil.which("g++") is None:
        return False
    try:
        return bool(torch.compile(lambda x: (x + 1).relu())(torch.ones(8, device=device)).sum() == 16)
    except Exception:  # whatever is missing, the answer is no
        return False


def compile_seconds() -> float:
    """Seconds that this process has spent in ``torch.compile`` so far."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    return float(sys.modules["torch._dynamo.utils"].calculate_time_spent().get("total_wall_time", 0.0))


@contextmanager
def settings(threads: int, deterministic: bool) -> Iterator[None]:
    """Settings of the whole process while a run trains: threads, denormals flushed, deterministic kernels, and on a CPU
    memory that is not given back between steps."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(deterministic or before[1])
    _keep_freed_memory(True)
    try:
        yield
    finally:
        _keep_freed_memory(False)
        torch.set_num_threads(before[0])
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(before[1])


def _keep_freed_memory(on: bool) -> None:
    """Whether the C library keeps what is freed, or gives large pieces back to the system. Those come anew in every
    step, a page fault for each 4 kB: a tenth of a step of ResNet-32. Done by glibc's mallopt; nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0 if on else 65536)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if on else 128 * 1024)


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
