"""A request to stop that is not lost where a library swallows the KeyboardInterrupt, as ``torch.compile`` can."""

_requested: list[KeyboardInterrupt] = []


def request(error: KeyboardInterrupt) -> None:
    """Ask the training of this process to stop with ``error``."""
    _requested.append(error)


def check() -> None:
    """Raise what was asked for; to be called between two steps."""
    if _requested:
        raise _requested.pop()
