"""A table that compares runs: the settings in which they differ, and their results."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from noisysam.core.errors import UserError
from noisysam.runs import measures
from noisysam.runs.record import RunFolder
from noisysam.runs.schema import RunRecord


def compare(folders: Sequence[RunFolder]) -> pd.DataFrame:
    """A column for each run: the settings in which they differ, then noise, knowledge, figures, cost. Figures of the
    second run and later carry their difference from the first in brackets."""
    records = [record for folder in folders if (record := folder.sound_record) is not None]
    if not records:
        raise UserError("none of these runs has a record that can be read")
    unfinished = [f"{r['key']} ({r['status']})" for r in records if r["status"] != "finished"]
    if unfinished:
        raise UserError(f"only finished runs can be compared: {', '.join(unfinished)}")
    settings = [_settings(record) for record in records]
    names = dict.fromkeys(name for own in settings for name in own)
    lines = {
        name: [_shown(own.get(name)) for own in settings]
        for name in names
        if any(own.get(name) != settings[0].get(name) for own in settings)
    }
    lines["labels"] = [record["noise"]["digest"][:16] for record in records]
    lines["wrong labels (%)"] = [_percent(record["noise"]["flip_rate"]) for record in records]
    lines["knowledge"] = ["oracle" if record["oracle"] else "blind" for record in records]
    for measure in measures.shown("compare"):
        values = [measure.value(record["results"]) for record in records]
        if any(value is not None for value in values):
            lines[measure.label] = [_against(value, values[0], measure.scale) for value in values]
    fallen = [folder.collapsed for folder in folders if folder.sound_record is not None]
    if any(fallen):
        lines["collapsed to one class"] = ["-" if c is None else "yes" if c else "no" for c in fallen]
    for name, text, form in (
        ("gradient_evaluations", "gradient evaluations per image", ".2f"),
        ("train_seconds", "training seconds", ".0f"),
    ):
        lines[text] = [format(cast(Mapping[str, Any], record["cost"])[name], form) for record in records]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=[record["key"] for record in records])
    return table.rename_axis("run").reset_index()


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{100 * share:.2f}"


def _settings(record: RunRecord) -> dict[str, Any]:
    """The configuration with the validated options of optimizer and method, and the precision."""
    given = {"method_option", "opt_option", "rho", "sam_m", "ascent_steps"}
    own = {name: value for name, value in record["config"].items() if name not in given}
    own |= {f"{record['config']['opt']}: {k}": v for k, v in record["optimizer_options"].items()}
    own |= {f"{record['config']['method']}: {k}": v for k, v in record["method_options"].items()}
    return own | {"precision": record["resolved"]["precision"]}


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _against(value: float | None, first: float | None, scale: float) -> str:
    if value is None:
        return "-"
    text = f"{scale * value:.2f}"
    return text if first is None or value == first else f"{text} ({scale * (value - first):+.2f})"
