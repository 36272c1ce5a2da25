"""Errors that the command line reports in one line, without a traceback."""

from pathlib import Path
from typing import Any


class UserError(Exception):
    """Wrong input, which the user can correct. Exit code 2."""


class FieldError(UserError):
    """A field of a configuration has a value that it does not take.

    ``field``: None where no single field is at fault; ``named``: whether ``reason`` is complete without the field's
    name.
    """

    def __init__(self, field: str | None, value: Any, reason: str, named: bool = False, where: str = "") -> None:
        super().__init__(field, value, reason, named, where)
        self.field, self.value, self.reason, self.named, self.where = field, value, reason, named, where

    def __str__(self) -> str:
        """The line for the command line, where a field is an option."""
        return self.where + self.line("--" + str(self.field).replace("_", "-"))

    def line(self, name: str) -> str:
        """The line for a place where the field is called ``name``."""
        return self.reason if self.named or self.field is None else f"{name}: {self.reason}"


class UnknownName(UserError):
    """There is no component of this kind and name."""

    def __init__(self, kind: str, name: str, hint: str) -> None:
        super().__init__(kind, name, hint)
        self.kind, self.name, self.hint = kind, name, hint

    def __str__(self) -> str:
        return f"unknown {self.kind} {self.name!r}{self.hint}"


class OptionError(UserError):
    """A component does not take one of its options."""

    def __init__(self, kind: str, name: str, reason: str) -> None:
        super().__init__(kind, name, reason)
        self.kind, self.name, self.reason = kind, name, reason

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}"


class DamagedFile(UserError):
    """A file of a store cannot be read: it is damaged, or written by another version."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class RunLocked(UserError):
    """Another process trains the run."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"run {self.key} is being trained by another process: wait for it"


class RunFailed(Exception):
    """A run or a command could not be completed. Exit code 1."""
