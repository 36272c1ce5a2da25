"""What needs no second look: components that were listed and runs that were shown before, without importing torch.

Both hold for the files as they were: of this package, and of the data. What is not certain is found out anew.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisysam.core.errors import DamagedFile
from noisysam.core.plugins import GROUP

if TYPE_CHECKING:
    from noisysam.runs.record import RunFolder

PACKAGE = Path(__file__).resolve().parents[1]
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FROM_ELSEWHERE = ("plugin", "pretrained")  # fields that name files whose content decides what a run is


def entries(what: str) -> list[dict[str, Any]]:
    """``catalogue.entries``, kept in the cache of the user until a file of this package changes."""
    path = _cache() / f"{what}-{_stamp(sorted(PACKAGE.rglob('*.py')))}.json"
    certain = not entry_points(group=GROUP)  # what installed packages register may change at any time
    with suppress(OSError, ValueError):
        found: list[dict[str, Any]] = json.loads(path.read_text()) if certain else []
        if found:
            return found
    from noisysam.cli import catalogue
    from noisysam.core.files import atomic

    found = json.loads(json.dumps(catalogue.entries(what)))
    with suppress(OSError):
        for old in path.parent.glob(f"{what}-*.json"):
            old.unlink()
        if certain:
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(found))
    return found


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisysam" / "lists"


def remember(store: Path, given: Mapping[str, Any], key: str) -> None:
    """Note that a command with these options is run ``key`` of the store."""
    path = _note(store, given)
    if path is not None:
        with suppress(OSError):  # the store may be read-only
            path.parent.mkdir(exist_ok=True)
            path.write_text(key)


def finished(store: Path, given: Mapping[str, Any]) -> "RunFolder | None":
    """The finished run that the same command has shown before, if neither code nor data changed since."""
    path = _note(store, given)
    if path is None or not path.is_file():
        return None
    from noisysam.runs.record import RunFolder

    with suppress(OSError, ValueError, DamagedFile):
        folder = RunFolder(store, path.read_text())
        record = folder.record
        if record is not None and record["status"] == "finished":
            return folder
    return None


def _note(store: Path, given: Mapping[str, Any]) -> Path | None:
    """The place of the note; None where more than options, code and a few files decides what the run is."""
    dataset, noise = str(given.get("dataset") or "cifar10"), str(given.get("noise_type") or "")
    kind, _, file = dataset.partition(":")
    folder = Path(given.get("data_dir") or os.environ.get("NOISYSAM_DATA_DIR") or "data")
    files = {
        "digits": [],
        "npz": [Path(file)],
        **{name: [folder / f"{name}.npz", *sorted((folder / old).glob("*"))] for name, old in CIFAR.items()},
    }.get(kind)
    labels, colon, own = noise.partition(":")
    known = (not colon or labels == "file") and ":" not in str(given.get("model") or "")
    known = known and not entry_points(group=GROUP)
    if files is None or not known or "RANK" in os.environ or any(given.get(name) for name in FROM_ELSEWHERE):
        return None
    options = {name: value for name, value in given.items() if value not in (None, ())}
    files = [*files, *([Path(own)] if colon else []), *sorted(PACKAGE.rglob("*.py"))]
    return store / ".commands" / _stamp(files, options)


def _stamp(files: list[Path], options: Mapping[str, Any] | None = None) -> str:
    """A digest of options and of what tells that a file has changed: its place, size and time."""
    found: list[Any] = [sys.version, sorted((options or {}).items())]
    for path in files:
        with suppress(OSError, ValueError):  # one that is not there is left out
            stat = path.stat()
            found.append((str(path.absolute()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()[:32]
