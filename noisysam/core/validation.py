"""Validation errors of pydantic as one line."""

import reprlib

from pydantic import ValidationError


def explain(error: ValidationError, prefix: str = "--") -> str:
    """The first fault of a pydantic error as one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not first["loc"]:
        return message
    # without a prefix the place in a file in full, which may be nested; with one, an option
    field = prefix + str(first["loc"][0]).replace("_", "-") if prefix else ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such option"
    if first["type"] == "missing":
        return f"{field}: missing"
    return f"{field}: {message} (got {reprlib.repr(first['input'])})"
