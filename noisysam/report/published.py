"""Published tables that reports print beside a study's own: ``published.csv``, with the source of every number.

A line of the file is one number, in percent, as its source prints it. ``noise_type`` takes the names of the command
line, or unstated where the source does not say; ``noise`` is the nominal rate (of human labels the measured one), a
share of 1; ``selection`` one of ``RULES``; ``sd`` and ``n`` the spread and the number of runs where they are known;
``mark`` verified, second-hand or doubtful; ``note`` sentences parted by semicolons, of a doubtful or second-hand number
the reason first.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from noisysam.core.errors import UserError
from noisysam.report.document import Table
from noisysam.report.tables import ReportCell, Summary, column_name, joined, percent

Line = dict[str, str]  # a line of the file

FILE = Path(__file__).with_name("published.csv")
RULES = {  # which epoch a number is of; names as in the records
    "best": "the best epoch on test, an oracle",
    "selected": "the epoch selected on noisy validation labels",
    "last_ten": "the mean of the last ten epochs",
    "last": "the last epoch",
    "unstated": "",
}
PREFERRED = ("last", "last_ten", "unstated", "selected", "best")  # rules closest to a study's last epoch first
ACCURACY = "test accuracy"
REMARKS = {
    "sam-table4": "The paper does not say which symmetric noise it means. SGD's 26.2 % at 80 % points to labels that"
    " are drawn over all classes, the true one included: with that definition F-correction and Reed's bootstrap end at"
    " 26.2 and 26.8 % (table dividemix-elr); without the true class cross-entropy ends at 17.2 % (table badlabels)."
}
NOISES = {
    "symmetric": "uniform over all classes, the true one included",
    "symmetric-exclusive": "uniform over the classes but the true one",
    "asymmetric": "to one similar class",
    "instance": "depending on the image",
    "unstated": "",
}


def tables() -> list[str]:
    """The names of the published tables, such as sam-table4."""
    return list(dict.fromkeys(line["table"] for line in _read()))


def published(table: str) -> pd.DataFrame:
    """The numbers of a table, one a line, with the columns of the file; ``noise``, ``value``, ``sd`` and ``n`` as
    numbers (not a number where there is none). ``UserError`` if there is no such table."""
    lines = pd.DataFrame(_lines(table))
    numbers = ["noise", "value", "sd", "n"]
    return lines.assign(**{name: pd.to_numeric(lines[name]) for name in numbers})


def layout(table: str) -> pd.DataFrame:
    """A table as it is printed, all strings: rows x noise, `92.12 ± 0.35 [2]` with the number of its note. A note on
    every number of a row that is not doubtful stands at the row's name. Backbone and noise have their columns where
    they differ between rows; where there are several stopping rules, each stands behind its row's name."""
    lines = _lines(table)
    shared, numbers = _numbered(lines)
    rows: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        rows.setdefault((line["row"], line["selection"]), []).append(line)
    several = {name: len({line[name] for line in lines}) > 1 for name in ("selection", "backbone", "noise_type")}
    rates_only = all(len({line["noise_type"] for line in group}) == 1 for group in rows.values())

    def column(line: Line) -> str:
        rate = float(line["noise"])
        return f"{percent(rate)} %" if rates_only else column_name({**line, "noise": rate})

    def marks(notes: Iterable[str]) -> str:
        found = sorted(numbers[note] for note in notes if note not in shared)
        return " " * bool(found) + "".join(f"[{number}]" for number in found)

    kinds = ["" if rates_only else line["noise_type"] for line in lines]  # columns in the order of the file's types
    order = sorted(zip(kinds, lines, strict=True), key=lambda x: (kinds.index(x[0]), float(x[1]["noise"])))
    columns = dict.fromkeys((column(line) for _, line in order), "")
    printed = []
    for (row, rule), group in rows.items():
        own = _shared([line for line in group if line["mark"] != "doubtful"])
        entry = {"row": row + f" ({_plain(rule)})" * several["selection"] + marks(own)}
        if several["backbone"]:
            entry["backbone"] = joined(line["backbone"] for line in group)
        if several["noise_type"] and rates_only:
            entry["noise"] = group[0]["noise_type"]
        entry |= columns
        for line in group:
            spread = f" ± {line['sd']}" if line["sd"] else ""
            entry[column(line)] = line["value"] + spread + marks(note for note in _notes(line) if note not in own)
        printed.append(entry)
    return pd.DataFrame(printed)


def beside(table: str, cells: Sequence[ReportCell], summaries: Sequence[Summary]) -> list[Table]:
    """A published table beside a study's means, for the rows and noise rates that both have, and by how many points
    each row is ahead of the first one, plain SGD where it is there. Nothing where fewer than two rows are in both. A
    row of the study with plain SGD and no method also stands for the published cross-entropy, and one with a remark,
    such as SAM (m = batch), for the row without it. A mean that is not there yet is said to be missing."""
    plain = {cell["row"] for cell in cells if (cell["method"], cell["opt"]) == ("ce", "sgd")}
    datasets = {cell["dataset"] for cell in cells}
    lines = sorted(_lines(table), key=lambda line: PREFERRED.index(line["selection"]), reverse=True)
    theirs = {
        (line["row"], kind, float(line["noise"])): float(line["value"])
        for line in lines
        for kind in dict.fromkeys(s["noise_type"] for s in summaries)
        if line["dataset"] in datasets and line["noise_type"] in (kind, "unstated") and line["measure"] == ACCURACY
    }
    rows = {line["row"] for line in lines}
    found: dict[str, dict[tuple[str, float], tuple[float, float | None]]] = {}
    names: dict[str, str] = {}
    for s in sorted(summaries, key=lambda s: s["row"] not in plain):
        place = (s["noise_type"], s["noise"])
        asked = [s["row"], *(["Cross-entropy"] if s["row"] in plain else []), s["row"].partition(" (")[0]]
        name = next((name for name in asked if name in rows), "")
        if (name, *place) in theirs:
            names[s["row"]] = name
            here = None if s["mean"] is None else 100 * s["mean"]
            found.setdefault(s["row"], {})[place] = (theirs[name, *place], here)
    if sum(any(here is not None for _, here in own.values()) for own in found.values()) < 2:
        return []
    first = next(iter(found))
    gains = {
        f"{row} over {first}": {
            place: _gain(both, found[first][place]) for place, both in own.items() if place in found[first]
        }
        for row, own in found.items()
        if row != first
    }
    printed = {row if names[row] == row else f"{row}; in the paper {names[row]}": own for row, own in found.items()}
    return [
        Table(f"{table}-beside", _beside(printed, ".1f"), text="Test accuracy (%) in the paper and here:"),
        Table(f"{table}-gains", _beside(gains, "+.1f"), text="Gains in points in the paper and here:"),
    ]


def _gain(one: tuple[float, float | None], other: tuple[float, float | None]) -> tuple[float, float | None]:
    here = None if one[1] is None or other[1] is None else one[1] - other[1]
    return one[0] - other[0], here


def _beside(rows: Mapping[str, Mapping[tuple[str, float], tuple[float, float | None]]], form: str) -> pd.DataFrame:
    """Two columns for each noise: the paper's number, and the one here."""
    places = sorted({place for own in rows.values() for place in own})
    lines = []
    for row, own in rows.items():
        line = {"row": row}
        for place in places:
            name = column_name({"noise_type": place[0], "noise": place[1]})
            paper, here = own.get(place, (None, None))
            line[f"{name}, paper"] = "" if paper is None else format(paper, form)
            line[f"{name}, here"] = "" if paper is None else "missing" if here is None else format(here, form)
        lines.append(line)
    return pd.DataFrame(lines)


def notes(table: str) -> list[str]:
    """The notes of a table: first those on all of it, then the numbered ones of ``layout``, `[1] doubtful: ...`."""
    shared, numbers = _numbered(_lines(table))
    return [
        *([REMARKS[table]] if table in REMARKS else []),
        *shared,
        *(f"[{number}] {note}" for note, number in numbers.items()),
    ]


def title(table: str) -> str:
    """The paper, its table and the data: Foret et al. 2020, Table 4 (cifar10)."""
    line = _lines(table)[0]
    return f"{line['source']} ({line['dataset']})"


def source(table: str) -> str:
    """Where the numbers of a table come from and what they are, in one paragraph."""
    lines = _lines(table)
    backbones = {line["backbone"] for line in lines}
    kinds = {line["noise_type"]: percent(float(line["noise"])) for line in lines}
    runs = {line["n"] for line in lines}
    rules = [rule for rule in RULES if rule in {line["selection"] for line in lines}]
    facts = {
        "": f"{lines[0]['dataset']}, {lines[0]['measure']} in percent",
        "backbone: ": backbones.pop() if len(backbones) == 1 else "by row",
        "noise: ": ", ".join(_noise(kind, rate) for kind, rate in kinds.items()),
        "stopping rule: ": ", ".join(_plain(r) + (f" ({RULES[r]})" if RULES[r] else "") for r in rules),
        "runs: ": (runs.pop() if len(runs) == 1 else "") or "unstated",
    }
    told = "; ".join(name + fact for name, fact in facts.items())
    return f"Source: {lines[0]['source']}, arXiv {lines[0]['arxiv']} ({told}). Not run here."


def _noise(kind: str, rate: str) -> str:
    if kind.startswith("human:"):
        return f"{kind} (given by people, {rate} % wrong)"
    return f"{kind} ({NOISES[kind]})" if NOISES[kind] else kind


def _plain(rule: str) -> str:
    return rule.replace("_", " ")


def _read() -> list[Line]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _lines(table: str) -> list[Line]:
    found = [line for line in _read() if line["table"] == table]
    if not found:
        raise UserError(f"no published table {table!r} (known: {', '.join(tables())})")
    return found


def _notes(line: Line) -> list[str]:
    mark = "" if line["mark"] == "verified" else f"{line['mark']}: "
    return (mark + line["note"]).split("; ") if line["note"] else []


def _shared(lines: Sequence[Line]) -> list[str]:
    """The notes that all lines have."""
    return [note for note in _notes(lines[0]) if all(note in _notes(line) for line in lines)] if lines else []


def _numbered(lines: Sequence[Line]) -> tuple[list[str], dict[str, int]]:
    """The notes that a whole table shares, and the numbers of the others in the order of the file."""
    shared = _shared(lines)
    others = dict.fromkeys(note for line in lines for note in _notes(line) if note not in shared)
    return shared, {note: number for number, note in enumerate(others, 1)}
