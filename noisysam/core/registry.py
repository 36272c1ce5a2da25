"""Named components: registered where they are defined, known by that to the CLI, the lists, the tests and the docs."""

import difflib
import textwrap
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from noisysam.core.errors import UnknownName

T = TypeVar("T")

LONGEST = 200  # characters of the names in a message


class Registry(Generic[T]):
    """An ordered map from a component's name to the component.

    ``kind`` is the word used in messages ("method", "optimizer", ...). A registered object gets the attributes
    ``name``, ``source`` (paper and equation) and ``revision`` (raised when a mend changes results: it is part of a
    run's key); its one-line summary is the first line of its docstring.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, *, source: str, revision: int = 1) -> Callable[[T], T]:
        """Decorator that files a class or function under ``name``."""

        def file(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            for attribute, value in (("name", name), ("source", source), ("revision", revision)):
                setattr(item, attribute, value)
            self._items[name] = item
            return item

        return file

    def __getitem__(self, name: str) -> T:
        """The component called ``name``; ``UnknownName`` with the nearest names where there is none."""
        if name in self._items:
            return self._items[name]
        near = difflib.get_close_matches(name.lower(), self._items, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        known = textwrap.shorten(", ".join(self._items), LONGEST, placeholder=" ...")
        raise UnknownName(self.kind, name, f"{hint} (known: {known}; one of your own needs --plugin FILE)")

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        """Names and components in the order of registration."""
        return iter(self._items.items())


def summary(item: object) -> str:
    """The first line of a component's docstring."""
    return (item.__doc__ or "").strip().splitlines()[0] if item.__doc__ else ""
