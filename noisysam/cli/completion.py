"""What the Tab key offers beside commands, options and choices: components, studies and keys of runs."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import click

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def components(what: str) -> Complete:
    """The names that ``noisysam list WHAT`` shows."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
        from noisysam.cli import recall

        return _beginning(incomplete, (entry["name"] for entry in recall.entries(what)))

    return complete


def studies(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The studies of the store."""
    return _beginning(incomplete, (path.stem for path in _store(context).glob("studies/*.json")))


def runs(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The keys of the store's runs."""
    return _beginning(incomplete, (path.parent.name for path in _store(context).glob("*/record.json")))


def _store(context: click.Context) -> Path:
    return Path(context.params.get("store") or os.environ.get("NOISYSAM_STORE") or "runs")


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
