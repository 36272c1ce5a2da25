"""Where a run took place: versions and commit, for its record."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from noisysam.core import plugins

NUMERICS = 1  # raised when the arithmetic of a training step changes, so that the same run ends with other bits


CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd")  # that decide which kernels run; best first


OPTIONAL = ("timm", "datasets")  # named where they are there


OPTIONAL = ("timm", "datasets")  # named where they are there


PACKAGES = ("noisysam", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "mlflow")


@cache
def environment() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, the commit of this code where it is a checkout, and what
    else decides the bits of a result: the numerics revision, the CPU's model and its instruction sets."""
    versions = {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}, "commit": _commit()}
    installed = {package: found for package in OPTIONAL if (found := _version(package)) is not None}
    versions |= installed | plugins.load_installed()
    installed = {package: found for package in OPTIONAL if (found := _version(package)) is not None}
    versions |= {**installed, **plugins.load_installed()}
    return {**versions, "numerics": str(NUMERICS), "cpu": cpu_model(), "instruction_set": " ".join(instruction_set())}


@cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def cpu_model() -> str:
    """The CPU as its maker calls it, with the numbers that tell apart what has one name."""
    found = _cpuinfo()
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{part} {found[f'cpu {part}' if part == 'family' else part]}" for part in ("family", "model")
               if (f"cpu {part}" if part == "family" else part) in found]  # fmt: skip
    return ", ".join([name, *numbers])


def instruction_set() -> tuple[str, ...]:
    """The instruction sets of the CPU that decide which kernels run."""
    found = _cpuinfo()
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return tuple(flag for flag in CPU_FLAGS if flag in flags)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash, with '+' where the package's files differ from it; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(package)]
    try:
        run = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        if run.returncode:
            return None
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() + ("+" if changed.stdout.strip() else "")
