"""Reports: from a study's finished records to tables, figures and verdicts. The same records give the same bytes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from noisysam.core.errors import UserError
from noisysam.core.registry import summary
from noisysam.core.text import csv_cell
from noisysam.noise.base import NOISE
from noisysam.report import claims, figures, probes, published, robust, tables
from noisysam.report.document import Document, Figure, Section, Table, section_markdown, write_text
from noisysam.report.tables import WHOLE, Cell, Summary, finished, joined, read_cells, summary_table
from noisysam.runs.record import RunFolder, load_study
from noisysam.studies import claims as study_claims

__all__ = ["MEASURES", "Report", "read_cells", "report", "summary_table"]

# The tables of a report: the figure of the record, its name as a file, the title, whether the terminal shows it too.
MEASURES = (
    ("last", "Test accuracy at the last epoch (%)", True),
    ("selected", "Test accuracy at the epoch selected on noisy validation labels (%)", True),
    ("last_ten", "Test accuracy, mean of the last ten epochs (%)", False),
    ("best", "Test accuracy, best epoch on test (oracle) (%)", False),
    ("memorised", "Memorised: wrong labels that the network fits at the last epoch (%)", False),
    ("recovered", "Recovered: wrongly labelled images whose true class it predicts at the last epoch (%)", False),
    ("auroc", "Detection: AUROC of the loss as a sign of a wrong label, at the last epoch (%)", False),
)
EQUAL_COST = 0.05  # rows whose gradient evaluations differ by no more of their number are matched in compute
MATRICES = 4  # heat maps at most


@dataclass(frozen=True)
class Report:
    """A report that was written: the main tables in Markdown, its folder, the main table as dictionaries."""

    text: str
    folder: Path
    summary: list[Summary]


def report(store: Path, study: str, target: Path) -> Report:
    """Write the report of a study into ``target/study``: ``report.html`` and ``report.md``, ``results.csv`` (a line per
    run), ``table.csv`` (a line per mean), ``tables/*.tex``, ``figures/*``. ``UserError`` where nothing has finished or
    where the runs do not fit in one table."""
    plan, cells = load_study(store, study), read_cells(store, study)
    if not finished(cells):
        broken = [cell["error"] for cell in cells if cell["status"] == "broken"]
        raise UserError(broken[0] if broken else f"study {study} has no finished run yet: sweep it first")
    tables.check(cells, study)
    summaries = {measure: summary_table(cells, measure) for measure, _, _ in MEASURES}
    places = _places(cells)
    sections = {m: Section(t, tables=[_linked(m, summaries[m], places)]) for m, t, _ in MEASURES}
    costs = Section("Rows", tables=[Table("rows", tables.row_table(cells))])
    verdicts = _verdicts(plan, cells)
    epochs = {cell["key"]: RunFolder(store, cell["key"]).epochs for cell in finished(cells)}
    caption = f"Test accuracy at the last epoch against the noise rate{_shade(summaries['last'])}."
    shape = [Figure("accuracy", caption, figures.accuracy(summaries["last"]))]
    document = Document(
        title=f"Study {study}",
        facts=_facts(cells, study, plan),
        sections=[
            _noise(cells),
            Section(sections["last"].title, tables=sections["last"].tables, figures=shape),
            *(sections[m] for m, _, _ in MEASURES[1:]),
            *verdicts,
            costs,
            _cost(cells, summaries["last"]),
            *_robust(cells, summaries["last"]),
            _curves(cells, epochs),
            *_radii(cells, summaries["last"]),
            *_confusions(store, cells),
            *probes.sections(store, cells, {place: anchor for place, (anchor, _) in places.items()}),
            *_published(plan, study),
            _unfinished(cells),
            Section("Runs", lines=[(f"{place}: {text}", anchor) for place, (anchor, text) in places.items()]),
        ],
    )
    folder = target / study
    document.write(folder)
    write_text(folder / "results.csv", _csv([{k: v for k, v in c.items() if k not in WHOLE} for c in cells]))
    write_text(folder / "table.csv", _csv([line for measure in summaries.values() for line in measure]))
    main = [sections[m] for m, _, shown in MEASURES if shown]
    return Report("\n".join(map(section_markdown, [*main, *verdicts, costs])), folder, summaries["last"])


def _facts(cells: Sequence[Cell], study: str, plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What the runs have in common, and what the tables show."""
    done = finished(cells)
    dates = sorted(str(cell[name])[:10] for cell in done for name in ("started", "ended"))
    failed = sum(cell["status"] == "failed" for cell in cells)
    models = dict.fromkeys(f"{cell['model']} ({cell['parameters']:,} parameters)" for cell in done)
    added = sorted(plan.get("added_seeds", {}))
    return [
        ("Command", f"`noisysam report {study}`"),
        ("Commit", joined((cell["commit"] for cell in done), "unknown")),
        ("Trained", " to ".join(dict.fromkeys((dates[0], dates[-1])))),
        ("Device", joined(cell["device_name"] for cell in done)),
        ("Precision", joined(cell["precision"] for cell in done)),
        ("Threads", joined(cell["threads"] for cell in done)),
        ("Data", joined(cell["dataset"] for cell in done)),
        ("Training images", joined(cell["train"] for cell in done)),
        ("Validation images", f"{joined(cell['val'] for cell in done)}, with noisy labels"),
        ("Test images", f"{joined(cell['test'] for cell in done)}, with clean labels"),
        ("Augmentation", joined(cell["augment"] for cell in done)),
        ("Model", ", ".join(models)),
        ("Batch", joined(cell["batch"] for cell in done)),
        ("Epochs", joined(cell["epochs"] for cell in done)),
        ("Learning rate", joined(cell["lr"] for cell in done)),
        ("Schedule", joined(cell["schedule"] for cell in done)),
        ("Warm-up epochs", joined(cell["warmup"] for cell in done)),
        ("Steps by", joined(cell["base_opt"] for cell in done)),
        ("Momentum", joined(map(_momentum, done))),
        ("Weight decay", joined(cell["weight_decay"] for cell in done)),
        ("Evaluated", _evaluated(done)),
        ("Selection", "none in the main table, which is the last epoch; the other tables name their rule"),
        ("Knowledge", _knowledge(done)),
        (
            "Seeds",
            joined(sorted({cell["seed"] for cell in cells})) + (f" (added later: {joined(added)})" if added else ""),
        ),
        ("Runs", f"{len(done)} finished, {failed} failed, {len(cells) - len(done) - failed} missing"),
        ("Training", f"{sum(cell['train_seconds'] for cell in done) / 3600:.2f} hours in all"),
        ("Spread", _spread(summary_table(cells))),
    ]


def _evaluated(cells: Sequence[Cell]) -> str:
    gaps = joined(cell["eval_every"] for cell in cells)
    return "every epoch" if gaps == "1" else f"every {gaps} epochs, and each of the last ten"


def _momentum(cell: Cell) -> str:
    return f"{cell['momentum']}" + " (Nesterov)" * (cell["nesterov"] is True and cell["base_opt"] == "sgd")


def _knowledge(cells: Sequence[Cell]) -> str:
    oracle = list(dict.fromkeys(cell["row"] for cell in cells if cell["oracle"]))
    return f"oracle: {', '.join(oracle)} (see Rows); all others blind" if oracle else "all rows are blind"


def _spread(summaries: Sequence[Summary]) -> str:
    numbers = {s["n"] for s in summaries}
    said = ["± is the standard deviation over seeds (n - 1)"] if max(numbers) > 1 else []
    said += ["[ ] the 95 % t interval of the mean"] if max(numbers) > 2 else []
    said += ["one seed: no spread"] if 1 in numbers else []
    said += ["two seeds: descriptive only"] if 2 in numbers else []
    return "; ".join(said)


def _shade(summaries: Sequence[Summary]) -> str:
    """What bars and bands of a figure show, where there are any."""
    return "; ± standard deviation over seeds" if any(s["sd"] for s in summaries) else ""


def _places(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """'row, noise' -> the anchor of its runs, and their seeds and keys."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(_place(cell), []).append(f"seed {cell['seed']} `{cell['key']}`")
    return {place: (f"runs-{n}", ", ".join(keys)) for n, (place, keys) in enumerate(found.items(), 1)}


def _place(cell: Cell | Summary) -> str:
    return f"{cell['row']}, {tables.column_name(cell)}"


def _linked(name: str, summaries: Sequence[Summary], places: dict[str, tuple[str, str]]) -> Table:
    """A table of means whose fields lead to their runs."""
    frame = tables.layout(summaries)
    rows = list(frame["row"])
    columns = {
        place: n
        for n, place in enumerate(tables.columns(summaries), len(frame.columns) - len(tables.columns(summaries)))
    }
    links = {(rows.index(s["row"]), columns[s["noise_type"], s["noise"]]): places[_place(s)][0] for s in summaries}
    return Table(name, frame, links)


def _noise(cells: Sequence[Cell]) -> Section:
    """What the noise is, nominal and measured rates; the measured transition matrices of each noise's first label
    file."""
    kinds = dict.fromkeys((str(c["noise_type"]).partition(":")[0], c["noise_draw"]) for c in finished(cells))
    lines = [
        f"{kind}, {draw} draw: {summary(NOISE[kind])} Source: {NOISE[kind].source}."
        for kind, draw in kinds
        if kind in NOISE
    ]
    named = {tables.column_name(c): c["matrix"] for c in reversed(finished(cells)) if c["matrix"]}
    named = dict(list(reversed(named.items()))[:MATRICES])
    caption = "Measured share of the images of each class (rows) that carry each label (columns), in percent."
    drawn = [Figure("transitions", caption, figures.matrices(named, "label given", "class"))] if named else []
    return Section("Noise", lines=lines, tables=[Table("noise", tables.noise_table(cells))], figures=drawn)


def _verdicts(plan: dict[str, Any], cells: Sequence[Cell]) -> list[Section]:
    """The claims whose rows are all in the study: the project's own, and those of the study file."""
    chosen = [*claims.applicable(study_claims.OURS, cells), *study_claims.parse(plan.get("claims") or [], "claims")]
    if not chosen:
        return []
    seeds = plan.get("planned_seeds") or sorted({cell["seed"] for cell in cells})
    frame = claims.verdict_table([claims.judge(claim, cells, seeds) for claim in chosen])
    return [Section("Verdicts", claims.RULES, tables=[Table("verdicts", frame)])]


def _cost(cells: Sequence[Cell], summaries: Sequence[Summary]) -> Section:
    """Accuracy against gradient evaluations."""
    spent = figures.gradients(cells)
    rows = sorted(spent, key=lambda row: spent[row])
    frame = tables.layout(summaries).set_index("row").drop(columns=["m", "rho"])
    found = [[row, f"{spent[row]:.1f}", *frame.loc[row]] for row in rows]
    groups: list[list[str]] = []
    for row in rows:
        if groups and spent[row] <= (1 + EQUAL_COST) * spent[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return Section(
        "Cost",
        "Gradient evaluations per training image in the whole run, all stages and networks, and the last epoch's test"
        " accuracy (%). Rows of one list are matched in compute (within 5 %).",
        lines=[f"{spent[group[0]]:.0f}: {', '.join(group)}" for group in groups if len(group) > 1],
        tables=[Table("cost", pd.DataFrame(found, columns=["row", "gradient evaluations", *frame.columns]))],
        figures=[
            Figure("cost", "Test accuracy at the last epoch against gradient evaluations; the line joins the rows that"
                   " no cheaper row reaches.", figures.cost(cells, summaries))
        ],
    )  # fmt: skip


def _robust(cells: Sequence[Cell], summaries: Sequence[Summary]) -> list[Section]:
    """Regret over the rates, the oracle's gain, the price of a wrong rate: what of it the study can say."""
    found = [
        ("regret", "Regret: percentage points behind the best row at each rate, with one configuration for all rates"
         " (the best is known from the test set: descriptive).", robust.regret(summaries)),
        ("oracle-gap", "Oracle over blind, the same method and optimizer, in percentage points.",
         robust.oracle_gap(cells, summaries)),
        ("misspecified", "A wrong noise rate against the right one, in percentage points.",
         robust.misspecified(cells, summaries)),
    ]  # fmt: skip
    there = [Table(name, frame, text=text) for name, text, frame in found if frame is not None]
    return [Section("Robustness of the recipe", tables=there)] if there else []


def _curves(cells: Sequence[Cell], epochs: figures.Curves) -> Section:
    drawn = figures.curves(cells, epochs)
    bands = ", bands of one standard deviation" if max(Counter(map(_place, finished(cells))).values()) > 1 else ""
    caption = (
        f"Means over seeds{bands}, last stage: test accuracy, wrong labels learnt and seen through, and how well the"
        " loss tells them from right ones."
    )
    return Section("Learning curves", figures=[Figure(name, caption, drawing) for name, drawing in drawn])


def _radii(cells: Sequence[Cell], summaries: Sequence[Summary]) -> list[Section]:
    """A figure for each recipe that the study runs at three radii or more."""
    recipes: dict[str, dict[str, float]] = {}
    for cell in finished(cells):
        if isinstance(cell["rho"], int | float):
            name = f"{cell['opt']}" + ("" if cell["method"] == "ce" else f", {cell['method']}") + f", m {cell['m']}"
            recipes.setdefault(name, {})[cell["row"]] = float(cell["rho"])
    sweeps = {n: rows for n, rows in recipes.items() if len(set(rows.values())) == len(rows) >= 3}
    if not sweeps:
        return []
    radius = {row: rho for rows in sweeps.values() for row, rho in rows.items()}
    drawing = figures.radii(
        {name: [s for s in summaries if s["row"] in rows] for name, rows in sweeps.items()},
        lambda summary: radius[summary["row"]],
    )
    caption = f"Test accuracy at the last epoch against the radius{_shade(summaries)}."
    return [Section("Radius", figures=[Figure("radius", caption, drawing)])]


def _confusions(store: Path, cells: Sequence[Cell]) -> list[Section]:
    """Test confusion at the last epoch of the first rows at the first noise, first seed, where runs recorded it."""
    done = finished(cells)
    first = [c for c in done if (tables.column_name(c), c["seed"]) == (tables.column_name(done[0]), done[0]["seed"])]
    found: dict[str, Any] = {}
    for cell in first:
        counts = RunFolder(store, cell["key"]).confusion
        if counts is not None and len(found) < MATRICES:
            found[_place(cell)] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if not found:
        return []
    caption = (
        "Share of the test images of each class (rows) that are taken for each class (columns), last epoch, percent."
    )
    return [Section("Confusion", figures=[Figure("confusion", caption, figures.matrices(found, "predicted", "class"))])]


def _published(plan: dict[str, Any], study: str) -> list[Section]:
    """Published tables beside ours."""
    named = plan.get("published") or (["sam-table4"] if study == "table4" else [])
    return [
        Section(f"Published: {published.title(name)}", published.source(name), lines=published.notes(name),
                tables=[Table(name, published.layout(name))])
        for name in ([named] if isinstance(named, str) else named)
    ]  # fmt: skip


def _unfinished(cells: Sequence[Cell]) -> Section:
    lines = [
        f"{_place(cell)}, seed {cell['seed']}: {cell['status']}"
        + (f", run `{cell['key']}`: {cell['error']}" if cell["error"] else "")
        for cell in cells
        if cell["status"] != "finished"
    ]
    return Section("Missing and failed runs", "" if lines else "None.", lines=lines)


def _csv(lines: Sequence[dict[str, object]]) -> str:
    return str(pd.DataFrame(lines, dtype=object).map(csv_cell).to_csv(index=False, lineterminator="\n"))
