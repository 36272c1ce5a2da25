"""Validation errors of pydantic as one line."""

import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError


def named(part: Any) -> str:
    """A part of a place in a file, on one line whatever characters it has."""
    return str(part) if str(part).isprintable() else ascii(part)


def fault(error: ValidationError) -> tuple[str | None, Any, str]:
    """The first fault of a pydantic error: its field, the value that was given, and the reason."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not first["loc"]:
        return None, first["input"], message
    if first["type"] == "extra_forbidden":
        message = "there is no such option"
    elif first["type"] == "missing":
        message = "missing"
    else:
        message += f" (got {reprlib.repr(first['input'])})"
    return ".".join(map(named, first["loc"])), first["input"], message


def explain(error: ValidationError, prefix: str = "--", known: Iterable[str] | None = None) -> str:
    """The first fault of a pydantic error as one line. The field is named after ``prefix``, as an option; without a
    prefix, by its whole place in a file. ``known``: the options that there are, to be named beside one that is not."""
    place, _, message = fault(error)
    if place is None:
        return message
    if known is not None and error.errors()[0]["type"] == "extra_forbidden":
        message += f" (known: {', '.join(known) or 'none'})"
    field = prefix + place.partition(".")[0].replace("_", "-") if prefix else place
    return f"{field}: {message}"
