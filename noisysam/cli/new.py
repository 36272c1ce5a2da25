"""``noisysam new``: a component of one's own, with its test, as a start."""

import re
from importlib.resources import files
from pathlib import Path

import click

from noisysam.cli import recall
from noisysam.cli.base import cli
from noisysam.core.errors import UserError
from noisysam.core.registry import NAME

KINDS = {  # and how `noisysam list` calls them
    "method": "methods", "optimizer": "optimizers", "noise": "noise", "dataset": "datasets", "model": "models",
    "claim": "claims",
}  # fmt: skip


@cli.command(short_help="Write a component of your own, with its test.")
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="folder of the files  [default: this one]")
def new(kind: str, name: str, out: Path) -> None:
    """Write NAME.py and test_NAME.py: a component that works as it is, with comments on what to change."""
    for path in write(kind, name, out):
        click.echo(f"written: {path}")
    module = out / f"{module_name(name)}.py"
    click.echo(f"try it: pytest {module.with_name('test_' + module.name)}")


def module_name(name: str) -> str:
    """The name of the file of a component: 'my-loss' is in my_loss.py."""
    return re.sub(r"\W", "_", name).lower()


def write(kind: str, name: str, out: Path) -> list[Path]:
    """Write the component and its test; ``UserError`` for a name that cannot be used or is taken, or a file there."""
    module = module_name(name)
    if not NAME.fullmatch(name) or not module.isidentifier():
        raise UserError(f"{name!r}: a name begins with a letter, and has letters, digits and '-'")
    words = {"name": name, "file": f"{module}.py", "function": module}
    words["Class"] = "".join(part.capitalize() for part in module.split("_") if part)
    found = [out / f"{module}.py", out / f"test_{module}.py"]
    for path in found:
        if path.exists():
            raise UserError(f"{path}: it is there already; give another name, or --out")
    if any(entry["name"] == name for entry in recall.entries(KINDS[kind])):
        raise UserError(f"{name!r}: there is a {kind} of this name already, give another")
    out.mkdir(parents=True, exist_ok=True)
    skeletons = files("noisysam.cli") / "skeletons"
    for path, source in zip(found, (f"{kind}.txt", f"test_{kind}.txt"), strict=True):
        text = (skeletons / source).read_text()
        for word, value in words.items():
            text = text.replace(f"{{{word}}}", value)
        path.write_text(text)
    return found
