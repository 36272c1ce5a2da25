"""Checkpoints: whole, atomic, verified, and read without unpickling code. The one before is kept."""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from noisysam.core.errors import UserError
from noisysam.core.files import atomic, read_file

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


DIGEST_BYTES = 32


FORMAT = 2  # of what a checkpoint holds


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) behind its SHA-256; the last one becomes previous."""
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT}, buffer)
    content = buffer.getbuffer()
    with atomic(folder / CURRENT) as temporary:
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        if (folder / CURRENT).exists():
            (folder / CURRENT).replace(folder / PREVIOUS)


def load(folder: Path, device: torch.device, key: str) -> dict[str, Any] | None:
    """The newest sound checkpoint of run ``key``, None where there is none; what is damaged, or another run's, is
    passed over with a warning. ``UserError`` for one that another version of this package wrote."""
    for name in (CURRENT, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        fault = f"{path} is damaged"
        content = read_file(path)
        if hashlib.sha256(content[DIGEST_BYTES:]).digest() == content[:DIGEST_BYTES]:
            try:
                state = torch.load(io.BytesIO(content[DIGEST_BYTES:]), map_location=device, weights_only=True)
            except Exception:  # whatever torch raises for bytes that are no archive of its own
                state = None
            if isinstance(state, dict):
                if state.pop("format", 1) != FORMAT:
                    raise UserError(f"{path} is of another version of noisysam: resume with that, or delete {folder}")
                if state.get("key") == key:
                    return state
                fault = f"{path} is a checkpoint of run {state.get('key')}, not of {key}"
        spare = name == CURRENT and (folder / PREVIOUS).exists()
        then = "falling back to the checkpoint before it" if spare else "starting over"
        warnings.warn(f"{fault}: {then}", stacklevel=2)
    return None


def remove(folder: Path) -> None:
    """Delete the checkpoints of a finished run."""
    for name in (CURRENT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
