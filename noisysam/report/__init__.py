"""Reports: from the finished records of a study to tables and a figure. The same records give the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from noisysam.errors import UserError
from noisysam.records import atomic, load_study
from noisysam.report import figures, tables
from noisysam.report.tables import Cell, Summary, finished, joined, markdown, read_cells, summary_table

__all__ = ["MEASURES", "Report", "read_cells", "report", "summary_table"]

# The tables of a report: the figure of the record, the title, whether the terminal shows it too.
MEASURES = (
    ("last", "Test accuracy at the last epoch (%)", True),
    ("last_ten", "Test accuracy, mean of the last ten epochs (%)", False),
    ("selected", "Test accuracy at the epoch selected on noisy validation labels (%)", True),
    ("best", "Test accuracy, best epoch on test (oracle) (%)", False),
    ("memorised", "Memorised: wrong labels that the network fits at the last epoch (%)", False),
    ("recovered", "Recovered: wrongly labelled images whose true class it predicts at the last epoch (%)", False),
)


@dataclass(frozen=True)
class Report:
    """A report that was written: the main tables in Markdown, its folder, the main table as dictionaries."""

    text: str
    folder: Path
    summary: list[Summary]


def report(store: Path, study: str, target: Path) -> Report:
    """Write ``report.md``, ``results.csv`` (a line per run), ``table.csv`` (a line per mean) and ``accuracy.png`` for a
    study into ``target/study``. ``UserError`` where nothing has finished or where the runs do not fit in one table."""
    plan, cells = load_study(store, study), read_cells(store, study)
    if not finished(cells):
        raise UserError(f"study {study} has no finished run yet: sweep it first")
    tables.check(cells, study)
    summaries = {measure: summary_table(cells, measure) for measure, _, _ in MEASURES}
    sections = {title: markdown(tables.layout(summaries[measure])) for measure, title, _ in MEASURES}
    costs = markdown(tables.row_table(cells))

    main = "".join(_section(title, sections[title]) for _, title, shown in MEASURES if shown)
    text = [f"# Study {study}\n\n", _header(cells, study), _section("Noise", markdown(tables.noise_table(cells)))]
    text += [_section(title, body) for title, body in sections.items()]
    text += ["![Test accuracy against the noise rate](accuracy.png)\n\n", _section("Rows", costs)]
    name = plan.get("published") or ("sam-table4" if study == "table4" else None)
    if name:
        text.append(_section("Published", tables.published_text(name)))
    text += [_section("Missing and failed runs", _unfinished(cells)), _section("Runs", _runs(cells))]

    folder = target / study
    _write(folder / "report.md", "".join(text).rstrip() + "\n")
    _write(
        folder / "results.csv", _csv([{k: v for k, v in c.items() if k not in ("variant", "revisions")} for c in cells])
    )
    _write(folder / "table.csv", _csv([line for measure in summaries.values() for line in measure]))
    figures.accuracy(summaries["last"], folder / "accuracy.png")
    return Report(main + _section("Rows", costs), folder, summaries["last"])


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body.rstrip()}\n\n"


def _header(cells: Sequence[Cell], study: str) -> str:
    """What the runs have in common, and what the tables show."""
    done = finished(cells)
    dates = sorted(str(cell[name])[:10] for cell in done for name in ("started", "ended"))
    failed = sum(cell["status"] == "failed" for cell in cells)
    models = dict.fromkeys(f"{cell['model']} ({cell['parameters']:,} parameters)" for cell in done)
    seeds = sorted({cell["seed"] for cell in cells})
    facts = {
        "Command": f"`noisysam report {study}`",
        "Commit": joined((cell["commit"] for cell in done), "unknown"),
        "Trained": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "Device": joined(cell["device_name"] for cell in done),
        "Precision": joined(cell["precision"] for cell in done),
        "Threads": joined(cell["threads"] for cell in done),
        "Data": joined(cell["dataset"] for cell in done),
        "Model": ", ".join(models),
        "Batch": joined(cell["batch"] for cell in done),
        "Epochs": joined(cell["epochs"] for cell in done),
        "Learning rate": joined(cell["lr"] for cell in done),
        "Evaluated": f"every {joined(cell['eval_every'] for cell in done)} epochs, and each of the last ten",
        "Selection": "none in the main table, which is the last epoch; the other tables name their rule",
        "Seeds": joined(seeds),
        "Runs": f"{len(done)} finished, {failed} failed, {len(cells) - len(done) - failed} missing",
        "Training": f"{sum(cell['train_seconds'] for cell in done) / 3600:.2f} hours in all",
        "Spread": _spread(summary_table(cells)),
    }
    return "".join(f"- {name}: {value}\n" for name, value in facts.items()) + "\n"


def _spread(summaries: Sequence[Summary]) -> str:
    numbers = {s["n"] for s in summaries}
    said = ["± is the standard deviation over seeds (n - 1)"] if max(numbers) > 1 else []
    said += ["one seed: no spread"] if 1 in numbers else []
    said += ["two seeds: descriptive only"] if 2 in numbers else []
    return "; ".join(said)


def _unfinished(cells: Sequence[Cell]) -> str:
    lines = [
        f"- {_place(cell)}: {cell['status']}" + (f", run `{cell['key']}`: {cell['error']}" if cell["error"] else "")
        for cell in cells
        if cell["status"] != "finished"
    ]
    return "\n".join(lines) or "None."


def _runs(cells: Sequence[Cell]) -> str:
    places: dict[str, list[str]] = {}
    for cell in cells:
        place = f"{cell['row']}, {tables.column_name(cell)}"
        places.setdefault(place, []).append(f"seed {cell['seed']} `{cell['key']}`")
    return "\n".join(f"- {place}: {', '.join(keys)}" for place, keys in places.items())


def _place(cell: Cell) -> str:
    return f"{cell['row']}, {tables.column_name(cell)}, seed {cell['seed']}"


def _csv(lines: Sequence[dict[str, object]]) -> str:
    return str(pd.DataFrame(lines, dtype=object).to_csv(index=False, lineterminator="\n"))


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
