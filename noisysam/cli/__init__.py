"""The command line. It parses and prints; nothing heavy is imported before a command runs.

Results go to stdout, progress and messages to stderr. Exit codes: 0; 1 if a run failed; 2 for wrong usage or
configuration; 130 after Ctrl-C.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from noisysam.cli import labels, leaderboard, new, runs, studies, suspects, tools  # noqa: F401  (they register)
from noisysam.cli.base import cli
from noisysam.core import stopping
from noisysam.core.errors import RunFailed, UserError
from noisysam.core.text import printable


def _warn(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Print user warnings as one line and hide all others, and those of libraries."""
    library = "site-packages" in Path(filename).parts and PACKAGE not in Path(filename).parents
    if issubclass(category, UserWarning) and not library:
        click.echo(f"noisysam: warning: {printable(str(message)).splitlines()[0]}", err=True)


def _stop(*_: Any) -> NoReturn:
    """Raise KeyboardInterrupt; a second signal ends the process at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop_at_once)
    error = KeyboardInterrupt()
    stopping.request(error)
    raise error


def _stop_at_once(*_: Any) -> NoReturn:
    os.write(2, f"\nnoisysam: {STOPPED}\n".encode())  # not through a buffer that may be in use
    os._exit(130)


STOPPED = "stopped at once; the same command resumes after the last complete epoch, if there is one"
PACKAGE = Path(__file__).resolve().parents[1]
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_LOGS": "-all"}  # torch's own warnings, read when it is imported


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Every error is printed as one line on stderr."""
    warnings.showwarning = _warn
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for each in (signal.SIGINT, signal.SIGTERM):  # a scheduler's request to stop is handled like Ctrl-C
        signal.signal(each, _stop)
    sys.exit(_run(arguments))


def _run(arguments: Iterable[str] | None) -> int:
    try:
        result = cli.main(list(arguments) if arguments is not None else None, "noisysam", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group was called without a command: print its help
            click.echo(message, err=True)
            return error.exit_code
        return _fail(" ".join(message.split()), error.exit_code)
    except UserError as error:
        return _fail(str(error), 2)
    except RunFailed as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort) as error:
        return _fail(str(error.__cause__ or error) or "stopped", 130)  # click wraps our exception in its own
    except OSError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("NOISYSAM_TRACEBACK"):
            raise
        line = next(iter(str(error).splitlines()), "")
        return _fail(f"unexpected {type(error).__name__}: {line} (set NOISYSAM_TRACEBACK=1 to see the traceback)", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"noisysam: {next(iter(printable(message).splitlines()), 'failed')}", err=True)
    return code
