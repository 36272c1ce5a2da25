"""Speed and memory on this machine: ``noisysam bench [PART...]``. A short module for each part.

A part measures its cases interleaved, in rounds, and compares them within a round: what else the machine does falls on
all of them. Figures are medians over rounds with 95 % bootstrap intervals.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from noisysam.core.errors import UserError

if TYPE_CHECKING:
    from noisysam.bench.measure import Settings

PARTS = {
    "loop": "our training loop against a plain one, as public repositories write it",
    "loader": "our augmented batches against torchvision's and kornia's",
    "steps": "a step of every optimizer over SGD's",
    "methods": "an epoch of every method over cross-entropy's",
    "memory": "copies of the weights in an optimizer's step, bytes that a method keeps of each sample",
    "epoch": "evaluation, checkpoint and tracking beside the training of an epoch",
    "start": "from the command to its first training step, new and resumed",
    "growth": "how costs grow with samples, classes, epochs and runs",
}


def run(
    names: Sequence[str], settings: "Settings", out: Path | None = None, show: Callable[[str], object] = print
) -> None:
    """Measure the named parts (none: all of them), show their tables and write ``out/PART.json`` where ``out`` is
    given. ``UserError`` for a name that is no part."""
    for name in names:
        if name not in PARTS:
            raise UserError(f"there is no part {name!r} of the benchmark (known: {', '.join(PARTS)})")
    from noisysam.bench.measure import document, markdown
    from noisysam.core.files import write_json
    from noisysam.training import devices
    from noisysam.training.progress import note

    for name in names or PARTS:
        note(f"bench {name}: {PARTS[name]}")
        load = os.getloadavg()[0]
        with devices.settings(1, deterministic=False):
            found = importlib.import_module(f"noisysam.bench.{name}").measure(settings)
        show(markdown(found.tables))
        if out is not None:
            write_json(out / f"{name}.json", document(name, PARTS[name], found, settings, load))
            note(f"written to {out / name}.json")
