"""``noisysam suspects``: training images whose labels are most probably wrong."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from noisysam.cli import completion
from noisysam.cli.base import cli, json_option, store_option

if TYPE_CHECKING:
    from noisysam.probes.suspects import Suspects

SHOWN = 48  # pictures of the contact sheet


@cli.command(short_help="Find training images whose labels are probably wrong.")
@click.argument("run", shell_complete=completion.runs)
@store_option
@click.option("--count", type=click.IntRange(1), help="so many, the most suspicious  [default: those above 1/2]")
@click.option(
    "--by",
    type=click.Choice(["loss", "confident-learning"]),
    default="loss",
    show_default=True,
    help="mean loss of the given label, or cleanlab's confident learning (extra 'cleanlab', AGPL)",
)
@click.option("--data-dir", type=click.Path(path_type=Path), help="folder of the data sets")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto")
@click.option("--plugin", type=click.Path(path_type=Path), help="Python file that the run was trained with")
@click.option("--out", type=click.Path(path_type=Path), help="folder of the files  [default: the run's]")
@json_option
def suspects(run: str, store: Path, by: Any, out: Path | None, as_json: bool, **options: Any) -> None:
    """Write suspects.csv and the contact sheet suspects.png: the training images of RUN whose labels are most probably
    wrong, with precision and recall where the true labels are known.

    Train with --snapshots: the losses early in training tell most, since a network memorises wrong labels later.
    """  # fmt: skip
    from noisysam.probes import suspects as search

    found = search.suspects(run, store, by=by, **options)
    folder = found.subject.folder.path if out is None else out
    _write(found, folder)
    if as_json:
        click.echo(json.dumps({**found.figures, "folder": str(folder)}))
        return
    figures = found.figures
    moments = f"over {figures['moments']} moments of training" if figures["moments"] > 1 else "of the final weights"
    click.echo(f"{figures['suspects']:,} of {figures['images']:,} labels are probably wrong, by the losses {moments}")
    if "precision" in figures:
        named = {name: figures[name] for name in ("precision", "recall", "auroc") if figures[name] is not None}
        shares = ", ".join(f"{name} {100 * value:.1f} %" for name, value in named.items())
        click.echo(f"  {figures['wrong labels']:,} are wrong: {shares}")
    for line in found.table.head(10).itertuples():
        click.echo(f"  {getattr(line, 'file', line.index)}: labelled {line.given}, perhaps {line.suggested}")
    for name in ("suspects.csv", "suspects.png"):
        click.echo(f"written: {folder / name}")


def _write(found: "Suspects", folder: Path) -> None:
    from noisysam.core.files import atomic
    from noisysam.core.text import csv_cell
    from noisysam.report.contact_sheet import contact_sheet

    table = found.table
    with atomic(folder / "suspects.csv") as temporary:
        table.map(csv_cell).to_csv(temporary, index=False)
    lines = table.head(SHOWN)
    truth = [f" (is {name})" for name in lines["true"]] if "true" in lines else [""] * len(lines)
    named = zip(lines["given"], lines["suggested"], truth, strict=True)
    captions = [f"labelled {given} | {suggested}?{true}" for given, suggested, true in named]
    marks = [bool(wrong) for wrong in lines["wrong"]] if "wrong" in lines else [None] * len(lines)
    with atomic(folder / "suspects.png") as temporary:
        contact_sheet(found.images(SHOWN), captions, marks).savefig(temporary, format="png", dpi=120)
