"""Finished runs as a table for analysis in Python."""

from pathlib import Path

import pandas as pd

from noisysam.core.errors import UserError
from noisysam.report.tables import WHOLE, _flat, read_cells
from noisysam.runs.record import RunFolder


def results(study: str | None = None, store: Path | str = "runs") -> pd.DataFrame:
    """A DataFrame with a line for each run of a study, or of everything in a store: its settings, noise, results
    (shares of 1) and cost. Runs without results have empty fields; see the column ``status``.

    ``study``: the name of a study in the store. ``UserError`` where there is no such study or nothing in the store.
    """
    store = Path(store)
    if study is not None:
        cells = read_cells(store, study)
    else:
        folders = [RunFolder(store, path.parent.name) for path in sorted(store.glob("*/record.json"))]
        records = [record for folder in folders if (record := folder.sound_record) is not None]
        plan = [
            {"row": r["name"], "key": r["key"], "config": r["config"], **{n: r["config"][n] for n in ("noise", "seed")}}
            for r in records
        ]
        found = [{**record, "collapsed": RunFolder(store, record["key"]).collapsed} for record in records]
        cells = [_flat(cell, "", record) for cell, record in zip(plan, found, strict=True)]
    if not cells:
        raise UserError(f"there is no run in {store}: train one, or import records")
    return pd.DataFrame([{name: value for name, value in cell.items() if name not in WHOLE} for cell in cells])
