"""Where a run took place: versions and commit, for its record."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("noisysam", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "mlflow")


@cache
def environment() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, and the commit of this code where it is a checkout."""
    return {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash, with '+' where the package's files differ from it; None outside a checkout."""
    package = Path(__file__).resolve().parent
    git = ["git", "-C", str(package)]
    try:
        run = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        if run.returncode:
            return None
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() + ("+" if changed.stdout.strip() else "")
