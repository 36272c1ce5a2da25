"""Reports: from a study's finished records to tables, figures and verdicts. The same records give the same bytes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from noisysam.core.errors import DamagedFile, UserError
from noisysam.core.text import csv_cell
from noisysam.report import (
    across,
    claims,
    crossed,
    facts,
    figures,
    glossary,
    probes,
    published,
    rerun,
    sections,
    sentences,
    tables,
)
from noisysam.report.claims import Verdict
from noisysam.report.document import Document, Figure, Section, Table, section_markdown, write_text
from noisysam.report.tables import ReportCell, Summary, finished, place_name, read_cells, summary_table
from noisysam.runs import measures
from noisysam.runs.record import RunFolder, load_study
from noisysam.runs.schema import StudyPlan
from noisysam.studies import claims as study_claims

__all__ = ["Report", "read_cells", "report", "summary_table"]

UNMARKED = ("memorised",)  # neither high nor low is better by itself


@dataclass(frozen=True)
class Report:
    """A report that was written: its first sections in Markdown, its folder, the main table as dictionaries."""

    text: str
    folder: Path
    summary: list[Summary]


def report(store: Path, study: str, target: Path) -> Report:
    """Write the report of a study into ``target/study``: ``report.html`` and ``report.md``, ``results.csv`` (a line per
    run), ``table.csv`` (a line per mean), figures, tables for LaTeX. ``UserError`` where nothing has finished or where
    the runs do not fit in one table."""
    plan, cells = load_study(store, study), read_cells(store, study)
    if not finished(cells):
        damaged = [cell["error"] for cell in cells if cell["status"] == "damaged"]
        raise UserError(damaged[0] if damaged else f"study {study} has no finished run yet: sweep it first")
    tables.check(cells, study)
    summaries = {m.name: summary_table(cells, m.name) for m in measures.shown("table")}
    means, places = summaries["last"], _places(cells)
    measured = {m.name: _measured(m.name, m.heading, cells, summaries[m.name], places) for m in measures.shown("table")}
    verdicts = _judge(plan, cells)
    rows = Section("Rows", tables.speed_remark(cells), tables=[Table("rows", tables.row_table(cells))])
    epochs = {cell["key"]: _epochs(store, cell["key"]) for cell in finished(cells)}
    first = [
        Section("In short", lines=sentences.sentences(cells, means, verdicts)),
        measured.pop("last"),
        *_verdicts(verdicts),
    ]
    document = Document(
        f"Study {study}",
        [
            *first,
            *_published(plan, cells, means),
            *measured.values(),
            rows,
            sections.cost(cells, means),
            *crossed.sections(cells),
            *across.sections(cells),
            *sections.tuning(cells, means),
            sections.curves(cells, epochs),
            *sections.radii(cells, means),
            *sections.confusions(store, cells),
            *probes.sections(store, cells, {place: anchor for place, (anchor, _) in places.items()}),
            *facts.sections(cells, study, plan, bool(verdicts)),
            _unfinished(cells),
            glossary.section(),
            rerun.section(cells, study, plan),
            Section("Runs", lines=[(f"{place}: {text}", anchor) for place, (anchor, text) in places.items()]),
        ],
    )
    folder = target / study
    document.write(folder)
    write_text(folder / "results.csv", _csv(list(map(tables.as_line, cells))))
    write_text(folder / "constraints.txt", rerun.constraints(cells))
    write_text(folder / f"{study}.yaml", plan["file"])
    lines = [{k: v for k, v in line.items() if k != "values"} for summary in summaries.values() for line in summary]
    write_text(folder / "table.csv", _csv(lines))
    shown = [*first, *(measured[m.name] for m in measures.shown("terminal") if m.name in measured), rows]
    return Report("\n".join(map(section_markdown, shown)), folder, means)


def _epochs(store: Path, key: str) -> figures.Curve:
    """What is drawn of the epochs of a run; nothing, with a warning, if they cannot be read. A study of 10,000 runs has
    them all in memory."""
    try:
        return figures.curve(RunFolder(store, key).columns(figures.DRAWN))
    except DamagedFile as error:
        warnings.warn(str(error), stacklevel=2)
        return {}


def _places(cells: Sequence[ReportCell]) -> dict[str, tuple[str, str]]:
    """'row, noise' -> the anchor of its runs, and their seeds and keys."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(place_name(cell), []).append(f"seed {cell['seed']} `{cell['key']}`")
    return {place: (f"r{n}", ", ".join(keys)) for n, (place, keys) in enumerate(found.items(), 1)}


def _measured(
    name: str, title: str, cells: Sequence[ReportCell], summaries: Sequence[Summary], places: dict[str, tuple[str, str]]
) -> Section:
    """The table of a measure, whose fields lead to their runs and whose best means are marked; the first one with its
    figure."""
    ended = {s["row"] for s in summaries if s["n"] or s["failed"]}
    if name != "last" and ended:  # the first table names the rows that are missing altogether
        summaries = [s for s in summaries if s["row"] in ended]
    frame, columns = tables.layout(summaries), tables.columns(summaries)
    rows, leading = list(frame["row"]), len(frame.columns) - len(columns)
    fields = {
        (s["row"], s["noise_type"], s["noise"]): (
            rows.index(s["row"]),
            leading + columns.index((s["noise_type"], s["noise"])),
        )
        for s in summaries
    }
    links = {fields[s["row"], s["noise_type"], s["noise"]]: places[place_name(s)][0] for s in summaries}
    marked = set() if name in UNMARKED else {fields[place] for place in tables.best(summaries)}
    caption = f"Test accuracy at the last epoch against the noise rate{sections.shade(summaries)}."
    caption += " The lines join two rates; nothing was measured between them." * figures.two_rates(summaries)
    drawn = [Figure("accuracy", caption, figures.accuracy(summaries))] if name == "last" else []
    shown = [Table(name, frame, links, marked=marked)] if any(s["n"] for s in summaries) else []
    text = tables.remark(name, cells, bool(marked)) or ("" if shown else "Not measured.")
    return Section(title, text, tables=shown, figures=drawn)


def _judge(plan: StudyPlan, cells: Sequence[ReportCell]) -> list[Verdict]:
    """The claims of the study file; of a study that lists none the project's own whose rows are all there."""
    chosen = study_claims.parse(plan.get("claims") or [], "claims") or claims.applicable(study_claims.OURS, cells)
    seeds = plan.get("planned_seeds") or sorted({cell["seed"] for cell in cells})
    return claims.judge_all(chosen, cells, seeds)


def _verdicts(verdicts: Sequence[Verdict]) -> list[Section]:
    if not verdicts:
        return []
    shown, effects = [Table("verdicts", claims.verdict_table(verdicts))], claims.effect_table(verdicts)
    if len(effects):
        text = "The effects behind the verdicts, with each seed's difference:"
        shown.append(Table("effects", effects, text=text))
    drawing = figures.forest(verdicts)
    caption = "Effects behind the verdicts: each seed's difference (circles), their mean, its 95 % interval."
    drawn = [Figure("effects", caption, drawing)] if drawing else []
    return [Section("Verdicts", tables=shown, figures=drawn)]


def _published(plan: StudyPlan, cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> list[Section]:
    """Published tables: those that the study names, else Table 4 of the SAM paper if it has two of its rows."""
    named = plan.get("published") or (["sam-table4"] if published.beside("sam-table4", cells, summaries) else [])
    found = []
    for name in [named] if isinstance(named, str) else named:
        beside = published.beside(name, cells, summaries)
        whole = Table(name, published.layout(name), text="The whole table:" if beside else "")
        found.append(
            Section(f"Published: {published.title(name)}", published.source(name), lines=published.notes(name),
                    tables=[*beside, whole])
        )  # fmt: skip
    return found


def _unfinished(cells: Sequence[ReportCell]) -> Section:
    lines = [
        f"{place_name(cell)}, seed {cell['seed']}: {cell['status']}"
        + (f", run `{cell['key']}`: {cell['error']}" if cell["error"] else "")
        for cell in cells
        if cell["status"] != "finished"
    ]
    return Section("Missing and failed runs", "" if lines else "None.", lines=lines)


def _csv(lines: Sequence[dict[str, object]]) -> str:
    return str(pd.DataFrame(lines, dtype=object).map(csv_cell).to_csv(index=False, lineterminator="\n"))
