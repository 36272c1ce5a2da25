"""The result of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What came out of a run; ``record`` holds everything that was written down."""

    key: str
    folder: Path
    record: Mapping[str, Any] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        """``result.last``, ``.last_ten``, ``.selected``, ``.best`` (oracle): shares of 1."""
        try:
            return self.record["results"][name]
        except KeyError:
            raise AttributeError(name) from None
