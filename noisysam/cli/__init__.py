"""The command line. Parsing and printing only; nothing heavy is imported before a command runs.

Results go to stdout, progress and logs to stderr. Exit codes: 0, 1 for a run that failed, 2 for wrong usage, 130 after
Ctrl-C.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import click

from noisysam.cli import labels, runs, studies, tools  # noqa: F401  (they add their commands)
from noisysam.cli.base import cli
from noisysam.core.errors import RunFailed, UserError


def _warn(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; those of libraries are theirs."""
    if issubclass(category, UserWarning):
        click.echo(f"noisysam: warning: {str(message).splitlines()[0]}", err=True)


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt("stopped; the last whole epoch is saved: the same command resumes")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every error is one line on stderr."""
    warnings.showwarning = _warn
    signal.signal(signal.SIGTERM, _stop)  # a scheduler's request ends a run as Ctrl-C does
    sys.exit(_run(arguments))


def _run(arguments: Iterable[str] | None) -> int:
    try:
        result = cli.main(list(arguments) if arguments is not None else None, "noisysam", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group without a command: its help
            click.echo(message, err=True)
            return error.exit_code
        return _fail(" ".join(message.split()), error.exit_code)
    except UserError as error:
        return _fail(str(error), 2)
    except RunFailed as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort) as error:
        return _fail(str(error.__cause__ or error) or "stopped", 130)  # click puts its own exception above ours
    except OSError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("NOISYSAM_TRACEBACK"):
            raise
        line = next(iter(str(error).splitlines()), "")
        return _fail(f"unexpected {type(error).__name__}: {line} (NOISYSAM_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"noisysam: {message.splitlines()[0] if message else 'failed'}", err=True)
    return code
