"""Named components: registered where they are defined, known by that to the CLI, the lists, the tests and the docs.

What a user's file or an installed package registers is checked at once, so that its faults are told in one line before
anything is trained.
"""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from noisysam.core import plugins
from noisysam.core.errors import UnknownName, UserError

T = TypeVar("T")

LONGEST = 200  # characters of the names in a message
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Registry(Generic[T]):
    """An ordered map from a component's name to the component.

    ``kind`` is the word used in messages ("method", "optimizer", ...). A registered object gets the attributes
    ``name``, ``source`` (paper and equation) and ``revision`` (raised when a mend changes results: it is part of a
    run's key); its one-line summary is the first line of its docstring. ``check``: what is wrong with an object that is
    to be registered, None if nothing is.
    """

    def __init__(self, kind: str, check: Callable[[Any], str | None] | None = None) -> None:
        self.kind, self.check = kind, check
        self._items: dict[str, T] = {}

    def register(self, name: str, *, source: str, revision: int = 1) -> Callable[[T], T]:
        """Decorator that files a class or function under ``name``. ``UserError`` where it does not keep the contract
        of its kind."""

        def file(item: T) -> T:
            fault = self._fault(name, source, revision) or (self.check and self.check(item))
            if fault:
                raise UserError(f"{self.kind} {name!r}: {fault}")
            for attribute, value in (("name", name), ("source", source), ("revision", revision)):
                setattr(item, attribute, value)
            self._items[name] = item
            return item

        return file

    def _fault(self, name: Any, source: Any, revision: Any) -> str | None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return "a name has letters, digits, '-', '.', '_' and '+' alone"
        if name in self._items:
            return "there is one of this name already, give it another"
        if not isinstance(source, str) or not source:
            return "source= names the paper or whatever else defines it"
        if not isinstance(revision, int) or revision < 1:
            return "revision= is a number from 1 on"
        return None

    def __getitem__(self, name: str) -> T:
        """The component called ``name``; ``UnknownName`` with the nearest names where there is none. Installed packages
        are asked for what this one does not have."""
        if name not in self._items:
            plugins.load_installed()
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


def call_fault(function: Any, parameters: Sequence[str], what: str) -> str | None:
    """What keeps ``function`` from being called with these positional arguments; None if nothing does."""
    expected = f"{what} must take ({', '.join(parameters)})"
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return f"{expected}; it cannot be called"
    try:
        found.bind(*parameters)
    except TypeError:
        return f"{expected}, it takes {found}"
    return None


def class_fault(item: Any, base: type, must: Sequence[str] = ()) -> str | None:
    """What keeps ``item`` from being a subclass of ``base``, each of whose methods can be called as those of ``base``;
    None if nothing does. ``must``: names that it has to define."""
    if not inspect.isclass(item) or not issubclass(item, base):
        return f"it must be a class that inherits from {base.__name__}"
    for name in must:
        if getattr(item, name, None) is getattr(base, name, None):
            return f"it must define {name}"
    for name, function in inspect.getmembers(base, inspect.isfunction):
        own = getattr(item, name)
        if name.startswith("_") or own is function or not inspect.isfunction(own):
            continue
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
        fault = call_fault(own, needed, name)
        if fault is not None:
            return fault
    return None
