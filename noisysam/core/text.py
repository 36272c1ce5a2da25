"""Text for messages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # noise models and reports do without torch, whose import takes a second
    pass


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
