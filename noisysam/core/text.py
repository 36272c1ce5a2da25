"""Text for messages, terminals and documents, made harmless where it may come from strangers."""

import re

# what moves a cursor, colours, hides or reorders text, and halves of surrogate pairs; not the tab and the line feed
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return printable(next(iter(str(error).strip().splitlines()), "")) or type(error).__name__


def last_line(text: str) -> str:
    """The last line of an error's text: of a traceback, which records of earlier versions hold, the one that tells."""
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "")


def printable(text: str) -> str:
    """``text`` without control characters."""
    return _UNPRINTABLE.sub("", text)


def inert(text: str) -> str:
    """``text`` as one line of Markdown without HTML and without links."""
    line = printable(text.replace("\n", " ")).replace("<", "&lt;")
    return re.sub(r"\](?=[(:\[])", "] ", line)


def csv_cell(value: object) -> object:
    """A cell of a CSV file that a spreadsheet does not take for a formula: such text gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if re.match(r"\s*[=+\-@\t]", text) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
