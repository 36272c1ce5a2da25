"""Checks of values and files that may come from strangers, before they are used or read as a whole."""

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from noisysam.core.errors import UserError

DIGITS = 18  # of an integer: it fits 64 bits


def check_file(path: Path, largest: int | None = None) -> None:
    """``UserError`` unless ``path`` is a file of at most ``largest`` bytes."""
    reason = no_file(path, largest)
    if reason is not None:
        raise UserError(f"{path if str(path).isprintable() else ascii(str(path))}: {reason}")


def no_file(path: Path, largest: int | None = None) -> str | None:
    """Why ``path`` is not a file of at most ``largest`` bytes that can be read; None if it is. A named pipe or a device
    is not a file: reading it may never end."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    if largest is not None and found.st_size > largest:
        return f"{found.st_size:,} bytes; at most {largest:,} are read"
    return None


def unusable(value: Any) -> str | None:
    """Why a value of a configuration cannot be used in paths, records and documents, wherever in it the reason is; None
    if it can."""
    if isinstance(value, str):
        if any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in value):
            return "control characters and invalid Unicode are not allowed"
        if len(value) > DIGITS and value.lstrip("+-").isdigit():
            return "the number is too large"
    elif isinstance(value, int) and abs(value) >= 10**DIGITS:
        return "the number is too large"
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = (part for pair in value.items() for part in pair)
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, Path):
        parts = (str(value),)
    return next((reason for part in parts if (reason := unusable(part)) is not None), None)
