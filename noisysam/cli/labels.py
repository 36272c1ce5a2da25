"""Commands for label files."""

import json
from pathlib import Path
from typing import Any

import click

from noisysam.cli.base import cli, json_option
from noisysam.core.errors import UserError


@cli.group(short_help="Create, show and verify label files.")
def noise() -> None:
    """Create, show and verify files of noisy labels."""


@noise.command("make")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path))
@click.option(
    "--type", "--noise-type", "kind", default="symmetric", show_default=True, help="see `noisysam list noise`"
)
@click.option(
    "--rate", "--noise", "rate", type=float, default=0.0, show_default=True, help="share of samples to select"
)
@click.option("--seed", "--noise-seed", "seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--draw", "--noise-draw", "draw", type=click.Choice(["exact", "bernoulli"]), default="exact", show_default=True
)
@json_option
def noise_make(
    file: Path, dataset: str, data_dir: Path | None, kind: str, rate: float, seed: int, draw: str, as_json: bool
) -> None:
    """Draw noisy labels for a data set. Writes FILE (.npz) and a CSV file beside it. The options of `noisysam run` are
    understood too."""
    from noisysam import data
    from noisysam import noise as labels

    if file.suffix != ".npz":
        raise UserError(f"{file}: the name of a label file must end in .npz")
    of = data.load(dataset, data_dir)
    noisy = labels.make(
        kind, of.train_labels.numpy(), of.classes, rate=rate, seed=seed, draw=draw,
        images=of.train_images.numpy() if kind == "instance" else None, superclasses=of.superclasses, data_dir=data_dir,
        given=None if of.noisy_labels is None else of.noisy_labels.numpy(),
    )  # fmt: skip
    labels.save(noisy, file)
    _show_card(noisy.card(), as_json)


@noise.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def noise_show(file: Path, as_json: bool) -> None:
    """Show the facts about a label file: rates, transition matrix, digests."""
    from noisysam import noise as labels

    _show_card(labels.load(file).card(), as_json)


def _show_card(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(card))
        return
    for name, value in card.items():
        if not isinstance(value, list):
            click.echo(f"{name:20} {value}")
    for name in (n for n, v in card.items() if isinstance(v, list)):
        rows = card[name] if isinstance(card[name][0], list) else [card[name]]
        click.echo(name)
        for line in _summarised(rows) if len(rows[0]) > WIDEST else [" ".join(f"{v:6.3f}" for v in r) for r in rows]:
            click.echo(f"  {line}")


WIDEST, LARGEST = 20, 5  # columns of a matrix that is printed whole; entries that are named of a larger one


def _summarised(rows: list[list[float]]) -> list[str]:
    """A list or a matrix of many classes in a few lines."""
    square = len(rows) == len(rows[0])
    values = sorted(rows[i][i] for i in range(len(rows))) if square else sorted(rows[0])
    of = "diagonal, " if square else ""
    lines = [f"{of}{len(values)} classes: {values[0]:.3f} to {values[-1]:.3f}, median {values[len(values) // 2]:.3f}"]
    if square:
        others = sorted(((v, i, j) for i, row in enumerate(rows) for j, v in enumerate(row) if i != j), reverse=True)
        lines.append("largest elsewhere: " + ", ".join(f"{i} -> {j} {v:.3f}" for v, i, j in others[:LARGEST]))
    return [*lines, "(--json prints all of it)"]


@noise.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dataset", help="also compare with the labels of this data set")
@click.option("--data-dir", type=click.Path(path_type=Path))
def noise_verify(file: Path, dataset: str | None, data_dir: Path | None) -> None:
    """Check a label file against its checksum, its definition and, optionally, a data set."""
    from noisysam import data
    from noisysam import noise as labels

    clean = None if dataset is None else data.load(dataset, data_dir).train_labels.numpy()
    for line in labels.verify(file, clean):
        click.echo(f"ok  {line}")
