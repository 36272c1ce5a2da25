"""What components require of one another, and the sentence for what is missing.

A method, an optimizer, a network and the run's set-up each provide some things; a method and an optimizer require some.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

REQUIREMENTS = {
    "rows": "the losses of single rows",
    "hard labels": "classes as labels, not distributions",
    "one view": "rows of one image",
    "index": "each row's place in the training set",
    "features": "a network with features() and head",
    "norm layers": "a network with normalization layers",
    "names": "named parameters",
    "one process": "one process, since it keeps or decides something that the other processes do not see",
}


class Component(Protocol):
    """A registered class that requires something."""

    name: str
    requires: tuple[str, ...]


def unmet(components: Mapping[str, Component], missing: Mapping[str, str]) -> str | None:
    """A sentence for the first thing that a component requires and that is missing; None where all is there.

    ``components``: by kind ('method', 'optimizer'); ``missing``: requirements that are not met, each with what is in
    their way.
    """
    for kind, component in components.items():
        for name in component.requires:
            if name in missing:
                return f"{kind} {component.name} needs {REQUIREMENTS[name]}: {missing[name]}"
    return None


def described(names: Iterable[str]) -> str:
    """Requirements as they are listed: 'the losses of single rows; rows of one image'."""
    return "; ".join(REQUIREMENTS[name] for name in names)
