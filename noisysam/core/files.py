"""Atomic writes, strict JSON, digests."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from noisysam.core.errors import DamagedFile
from noisysam.core.untrusted import check_file, no_file


def temporary_name(path: Path) -> Path:
    """A path beside ``path`` that no other process uses, on any machine; hidden, so that leftovers are recognised."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` if the block succeeds, after its content has reached the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON atomically; what is not finite becomes null."""
    with atomic(path) as temporary:
        temporary.write_text(json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Strict JSON as it stands in a file."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_file(path: Path) -> bytes:
    """The content of a file; ``DamagedFile`` where it cannot be read or is none: a named pipe may never end."""
    reason = no_file(path)
    if reason is not None:
        raise DamagedFile(path, reason)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DamagedFile(path, "a JSON object was expected")
    return content


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    check_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
