"""The command that puts all finished runs of the same problem into one page."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from noisysam.cli.base import cli, store_option
from noisysam.core.errors import UserError

if TYPE_CHECKING:
    from noisysam.report.leaderboard import Link


@cli.command(short_help="Write one page with all finished runs, to sort and filter.")
@click.argument("sources", metavar="[STORE|STUDY...]", nargs=-1)
@store_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports/leaderboard.html"), show_default=True,
    help="the page",
)  # fmt: skip
@click.option("--plugin", type=click.Path(path_type=Path), help="Python file that runs of an archive were trained with")
def leaderboard(sources: tuple[str, ...], store: Path, out: Path, plugin: Path | None) -> None:
    """Write one page with all finished runs of the same problem: the same data, labels, network and epochs.

    Each argument is a store, an exported archive, or the name of a study of --store; without one, it is all of --store.
    The page can be read offline; its tables are sorted by their headings and filtered by words.
    """
    from noisysam.report import leaderboard as boards
    from noisysam.report.document import write_text
    from noisysam.runs.transfer import import_study

    runs = []
    for source in map(Path, sources or [store]):
        if (source / "MANIFEST.json").exists():
            with TemporaryDirectory() as temporary:
                import_study(source, Path(temporary), plugin=plugin)
                runs += boards.read_runs(Path(temporary), _reports(out.parent))
        elif source.is_dir() or not sources:
            runs += boards.read_runs(source, _records(source, out.parent))
        else:
            runs += boards.read_runs(store, _records(store, out.parent), [str(source)])
    if not runs:
        raise UserError(f"there is no finished run in {', '.join(sources) or store}: train one, or import records")
    found = boards.problems(runs)
    write_text(out, boards.page(found))
    recipes = sum(len(board.lines) for board in found)
    numbers = ((len(runs), "run"), (recipes, "recipe"), (len(found), "problem"))
    of_runs, of_recipes, of_problems = (boards.counted(*each) for each in numbers)
    click.echo(f"{out}: {of_runs} of {of_recipes} on {of_problems}")


def _records(store: Path, folder: Path) -> "Link":
    """The address of a run's record, from the folder of the page."""
    return lambda key, _: quote(Path(os.path.relpath(store / key / "record.json", folder)).as_posix())


def _reports(folder: Path) -> "Link":
    """The address of a report that lists the run: an archive has no file of its own for it."""

    def address(_: str, studies: Sequence[str]) -> str:
        there = [study for study in studies if (folder / study / "report.md").exists()]
        return f"{quote(there[0])}/report.md" if there else ""

    return address
