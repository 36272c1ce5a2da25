"""Results of probes of the finished runs of a study: tables, and figures of the rows side by side."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from noisysam.core.errors import UserError
from noisysam.report import probe_figures
from noisysam.report.document import Figure, Section, Table
from noisysam.report.tables import ReportCell, column_name, finished, place_name
from noisysam.runs.record import RunFolder

Results = Mapping[str, Any]
Found = list[tuple[ReportCell, Results]]  # runs, and what one probe found in each
Line = tuple[list[str], str, list[Results]]  # of a table: its first fields, its place, what it is the mean of

# Columns of the tables -> fields of the results; those in percent are shares of 1.
CURVATURE = {
    "largest eigenvalue": "lambda_max",
    "trace": "trace",
    "its s.e.": "trace_standard_error",
    "worst case": "worst_case",
    "SAM's step": "one_step",
    "average case": "average_case",
    "loss": "loss",
    "gradient norm": "gradient_norm",
}
NORMS = {
    "last layer": "last_layer_norm",
    "features, clean": "feature_norm_clean",
    "features, flipped": "feature_norm_flipped",
    "Jacobian by weights, clean": "parameter_jacobian_clean",
    "Jacobian by weights, flipped": "parameter_jacobian_flipped",
    "Jacobian by inputs, clean": "input_jacobian_clean",
    "Jacobian by inputs, flipped": "input_jacobian_flipped",
}
GRADIENTS = {
    "gradient norm": "gradient_norm",
    "clean share (%)": "gradient_share_clean",
    "cosine": "gradient_cosine",
    "residuals, clean to flipped": "logit_ratio",
    "perturbed": "logit_ratio_perturbed",
    "each perturbed": "logit_ratio_each",
    "down-weighted (%)": "down_weighted",
}
MEANS = "Means over the seeds that were probed (n), ± their standard deviation."


def sections(store: Path, cells: Sequence[ReportCell], anchors: Mapping[str, str]) -> list[Section]:
    """A section for each probe and each choice of its options. ``anchors``: of the list of runs, by "row, noise"."""
    groups: dict[tuple[str, int, str], Found] = {}
    broken = []
    for cell in finished(cells):
        try:
            contents = RunFolder(store, cell["key"]).probes
        except UserError:
            broken.append(f"{place_name(cell)}, seed {cell['seed']}, run `{cell['key']}`")
            continue
        for content in contents:
            options = ", ".join(f"{name} {value}" for name, value in content["options"].items())
            groups.setdefault((content["probe"], content["revision"], options), []).append((cell, content["results"]))
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    parts = []
    for probe, show in SHOWN.items():
        chosen = [(options, found) for (name, _, options), found in groups.items() if name == probe]
        for number, (options, found) in enumerate(chosen, 1):
            found.sort(key=lambda one: (one[0]["noise_type"], one[0]["noise"], rows.index(one[0]["row"])))
            name = probe if number == 1 else f"{probe}-{number}"
            text, tables = show(name, found, anchors)
            statement = "; ".join(dict.fromkeys(results["statement"] for _, results in found))
            said = f"Measured: {statement}. {text} Options: {options}."
            parts.append(Section(f"Probe: {name}", said, tables=tables, figures=_figures(probe, name, found)))
    if broken:
        parts.append(Section("Probe results that cannot be read", lines=broken))
    return parts


Shown = tuple[str, list[Table]]


def _sharpness(name: str, found: Found, anchors: Mapping[str, str]) -> Shown:
    lines: list[Line] = []
    for place, leading, group in _places(found):
        for part, title in probe_figures.TITLES.items():
            lines.append(([*leading, title], place, [results[part] for results in group]))
    text = (
        f"{MEANS} The largest eigenvalue and the trace of the Hessian (s.e. over the random vectors); the increase"
        " of the loss within rho: in the worst case, for each m rows by projected ascent, of which SAM takes the"
        " first step; in the average case, in random directions."
    )
    return text, [_table(name, ("row", "noise", "images"), lines, CURVATURE, anchors)]


def _landscape(name: str, found: Found, anchors: Mapping[str, str]) -> Shown:
    return "All runs share the random draws of their directions.", []


def _mechanism(name: str, found: Found, anchors: Mapping[str, str]) -> Shown:
    lines = [(leading, place, [r["moments"][-1] for r in group]) for place, leading, group in _places(found)]
    text = (
        f"{MEANS} At the final weights: norms of the last layer's weight, of the features and of the logits'"
        " Jacobians, on samples with the right label (clean) and with a wrong one (flipped); the share of the"
        " gradient that comes from clean samples (projected on the whole gradient: it may be below 0 or above 100"
        " %), the cosine between the two groups' gradients, the ratio of their summed residuals (at the weights, at"
        " SAM's perturbed weights, at weights perturbed for each sample alone), and the share of weights whose"
        " gradient SAM's perturbation makes smaller (SANER's)."
    )
    tables = [
        _table(f"{name}-norms", ("row", "noise"), lines, NORMS, anchors),
        _table(f"{name}-gradients", ("row", "noise"), lines, GRADIENTS, anchors),
    ]
    return text, tables


def _quantise(name: str, found: Found, anchors: Mapping[str, str]) -> Shown:
    levels = found[0][1]["bits"]  # the same in all: they are options
    kinds = {"plain": "rounded", "zero_shot": "ZSAQ"}
    columns = {"full (%)": "accuracy"} | {
        f"{bits} bits, {said} (%)": f"{bits} {kind}_accuracy"
        for bits, level in levels.items()
        for kind, said in kinds.items()
        if f"{kind}_accuracy" in level
    }
    lines = [(leading, place, [_flat(results) for results in group]) for place, leading, group in _places(found)]
    text = (
        f"{MEANS} Accuracy of the full network, rounded to the nearest level, and after ZSAQ's training without data."
    )
    return text, [_table(name, ("row", "noise"), lines, columns, anchors)]


def _flat(results: Results) -> Results:
    levels = {f"{bits} {field}": value for bits, level in results["bits"].items() for field, value in level.items()}
    return {"accuracy": results["accuracy"], **levels}


SHOWN: dict[str, Callable[[str, Found, Mapping[str, str]], Shown]] = {
    "sharpness": _sharpness,
    "landscape": _landscape,
    "mechanism": _mechanism,
    "quantise": _quantise,
}


def _places(found: Found) -> list[tuple[str, list[str], list[Results]]]:
    """For each row and noise: its name, both as the first fields of a line, and the results of its runs."""
    groups: dict[str, tuple[list[str], list[Results]]] = {}
    for cell, results in found:
        groups.setdefault(place_name(cell), ([cell["row"], column_name(cell)], []))[1].append(results)
    return [(place, leading, group) for place, (leading, group) in groups.items()]


def _table(
    name: str, leading: Sequence[str], lines: Sequence[Line], columns: Mapping[str, str], anchors: Mapping[str, str]
) -> Table:
    fields = [
        [*first, str(len(group)), *(_field(column, [one[field] for one in group]) for column, field in columns.items())]
        for first, _, group in lines
    ]
    frame = pd.DataFrame(fields, columns=[*leading, "n", *columns])
    numbers = range(len(leading) + 1, len(frame.columns))
    links = {(n, column): anchors[place] for n, (_, place, _) in enumerate(lines) for column in numbers}
    return Table(name, frame, links)


def _field(column: str, values: Sequence[float | None]) -> str:
    """Mean ± standard deviation, four digits, or two decimals of a percentage; empty where there is nothing."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    scale, form = (100, ".2f") if column.endswith("(%)") else (1, ".4g")
    mean = math.fsum(there) / len(there)
    text = format(scale * mean, form)
    if len(there) > 1:
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in there) / (len(there) - 1))
        text += f" ± {format(scale * sd, '.2f' if scale == 100 else '.2g')}"
    return text


def _figures(probe: str, name: str, found: Found) -> list[Figure]:
    """Figures with one run of each row and noise, as many as they can show."""
    named = {place: group[0] for place, _, group in _places(found)}
    figures = []
    for picture, drawing, shown, there in probe_figures.draw(probe, named):
        rest = f"; the first {shown} of {there}." if shown < there else "."
        caption = f"{picture.caption} One run of each row and noise, the first seed that was probed{rest}"
        figures.append(Figure(f"{name}-{picture.name}", caption, drawing, detail=True))
    return figures
