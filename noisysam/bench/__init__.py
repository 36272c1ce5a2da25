"""Speed and memory on this machine: ``noisysam bench [PART...]``. Each part is a module.

A part measures its cases in interleaved rounds and compares them within a round, so that other load on the machine
affects all of them. Values are medians over rounds with 95 % bootstrap intervals.
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
    "loop": "the training loop, compared with a plain one as public repositories write it",
    "loader": "augmented batches, compared with torchvision's and kornia's",
    "steps": "a step of every optimizer, relative to SGD",
    "methods": "an epoch of every method, relative to cross-entropy",
    "memory": "memory of an optimizer's step, and of a method's state per sample",
    "epoch": "evaluation, checkpoint and tracking, relative to the training of an epoch",
    "start": "time from the command to its first training step, for new and resumed runs",
    "growth": "how costs grow with samples, classes, epochs and runs",
    "reports": "memory and time of a report by the number of runs of its study",
}


def run(
    names: Sequence[str], settings: "Settings", out: Path | None = None, show: Callable[[str], object] = print
) -> None:
    """Measure the named parts (all of them if there are no names), show their tables and, if ``out`` is given, write
    ``out/PART.json``. ``UserError`` for an unknown part."""
    for name in names:
        if name not in PARTS:
            raise UserError(f"unknown part {name!r} of the benchmark (known: {', '.join(PARTS)})")
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
