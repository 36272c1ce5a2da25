"""Published tables: every number leads to a source, doubtful ones say why, and what is printed is what stands there."""

import csv
import math
import re

import pandas as pd
import pytest

from noisysam.core.errors import UserError
from noisysam.report import published as module
from noisysam.report.published import RULES, beside, layout, notes, published, source, tables, title
from noisysam.runs.config import RunConfig

COLUMNS = (
    "source", "table", "arxiv", "dataset", "noise_type", "backbone", "selection", "row", "noise", "value", "sd", "n",
    "measure", "mark", "note",
)  # fmt: skip
ASYM, IDN = "asymmetric", "instance"
EXCL, SYM = "symmetric-exclusive", "symmetric"

# Typed from the papers and READMEs, apart from the file: (row, stopping rule, noise, rate) -> value in percent.
SPOT: dict[str, dict[tuple[str, str, str, float], float]] = {
    "sam-table4": {
        ("SGD", "unstated", "unstated", 0.8): 26.2,
        ("SAM", "unstated", "unstated", 0.2): 95.1,
        ("SAM", "unstated", "unstated", 0.8): 77.9,
        ("Bootstrap + SAM", "unstated", "unstated", 0.6): 91.8,
        ("MentorMix 2019", "unstated", "unstated", 0.4): 94.2,
        ("Chen et al. 2019", "unstated", EXCL, 0.8): 52.3,
    },
    "sam-table8": {
        ("Bootstrap + SAM, rho 0", "unstated", "unstated", 0.8): 73.5,
        ("Bootstrap + SAM, rho 0.02", "unstated", "unstated", 0.4): 27.8,
        ("Bootstrap + SAM, rho 0.05", "unstated", "unstated", 0.8): 21.0,
        ("Bootstrap + SAM, rho 0.1", "unstated", "unstated", 0.6): 8.7,
        ("Bootstrap + SAM, rho 0.5", "unstated", "unstated", 0.2): 17.6,
    },
    "asam-table6": {
        ("SGD", "best", "unstated", 0.0): 94.50,
        ("SGD", "best", "unstated", 0.8): 68.35,
        ("SAM", "best", "unstated", 0.4): 90.62,
        ("SAM", "best", "unstated", 0.6): 86.58,
        ("ASAM", "best", "unstated", 0.2): 93.21,
        ("ASAM", "best", "unstated", 0.8): 67.69,
    },
    "dividemix-elr": {
        ("Cross-entropy", "best", SYM, 0.8): 62.9,
        ("Reed bootstrap", "last_ten", SYM, 0.8): 26.8,
        ("F-correction", "best", ASYM, 0.4): 87.2,
        ("Mixup", "last_ten", SYM, 0.5): 77.6,
        ("M-DYR-H", "last", SYM, 0.9): 9.9,
        ("DivideMix", "best", SYM, 0.2): 96.1,
        ("DivideMix", "last_ten", ASYM, 0.4): 92.1,
        ("ELR+", "selected", SYM, 0.9): 75.2,
        ("ELR+", "best", SYM, 0.9): 78.7,
        ("AugDesc-WS", "last_ten", SYM, 0.8): 93.64,
    },
    "dividemix-elr-cifar100": {
        ("Cross-entropy", "best", SYM, 0.2): 62.0,
        ("F-correction", "last_ten", SYM, 0.9): 3.4,
        ("M-correction", "best", SYM, 0.9): 24.3,
        ("DivideMix", "best", ASYM, 0.4): 72.1,
        ("DivideMix", "last_ten", SYM, 0.8): 59.6,
        ("ELR+", "selected", ASYM, 0.4): 76.5,
        ("AugDesc-WS", "best", SYM, 0.9): 41.20,
    },
    "elr-table1": {
        ("Cross-entropy", "unstated", SYM, 0.8): 53.82,
        ("Reed bootstrap", "unstated", ASYM, 0.4): 81.21,
        ("GCE", "unstated", SYM, 0.8): 64.07,
        ("SL", "unstated", SYM, 0.6): 82.81,
        ("ELR", "unstated", ASYM, 0.2): 93.52,
        ("ELR (cosine)", "unstated", SYM, 0.8): 80.69,
    },
    "elr-table1-cifar100": {
        ("Cross-entropy", "unstated", SYM, 0.8): 18.10,
        ("GCE", "unstated", SYM, 0.6): 53.16,
        ("SL", "unstated", SYM, 0.2): 70.38,
        ("ELR", "unstated", SYM, 0.4): 68.28,
        ("ELR (cosine)", "unstated", SYM, 0.8): 30.27,
    },
    "badlabels": {
        ("Cross-entropy", "last", EXCL, 0.8): 17.20,
        ("Cross-entropy", "best", IDN, 0.4): 78.93,
        ("Co-teaching", "last", ASYM, 0.4): 56.33,
        ("RoG", "last", EXCL, 0.8): 16.02,
        ("DivideMix", "best", EXCL, 0.8): 81.95,
        ("Negative label smoothing", "last", ASYM, 0.4): 47.22,
        ("SOP", "last", EXCL, 0.8): 89.78,
        ("AdaCorr", "best", EXCL, 0.6): 80.97,
        ("AdaCorr", "last", IDN, 0.8): 30.48,
        ("Peer loss", "best", ASYM, 0.2): 91.47,
        ("PGDF", "best", IDN, 0.6): 76.84,
    },
    "badlabels-cifar100": {
        ("Cross-entropy", "last", EXCL, 0.8): 9.27,
        ("Co-teaching", "best", IDN, 0.4): 57.55,
        ("T-Revision", "best", EXCL, 0.8): 4.03,
        ("RoG", "last", EXCL, 0.2): 66.68,
        ("DivideMix", "best", EXCL, 0.6): 72.25,
        ("AdaCorr", "last", IDN, 0.8): 41.95,
    },
    "cifar10n": {
        ("Cross-entropy", "best", "human:worse", 0.4021): 77.69,
        ("Forward", "best", "human:random2", 0.1812): 86.14,
        ("ELR+", "best", "human:aggre", 0.0903): 94.83,
        ("DivideMix", "best", "human:random1", 0.1723): 95.16,
        ("PES-semi", "best", "human:random3", 0.1764): 95.22,
        ("ProMix", "unstated", "human:worse", 0.4021): 96.34,
    },
    "cifar100n": {
        ("Cross-entropy", "best", "human:noisy", 0.402): 55.50,
        ("ELR+", "best", "human:noisy", 0.402): 66.72,
        ("DivideMix", "best", "human:noisy", 0.402): 71.13,
        ("CORES*", "best", "human:noisy", 0.402): 55.72,
        ("CAL", "best", "human:noisy", 0.402): 61.73,
        ("ProMix", "unstated", "human:noisy", 0.402): 73.79,
    },
    "cifar10n-rerun": {
        ("Cross-entropy", "best", "human:worse", 0.4021): 83.91,
        ("Co-teaching", "best", "human:worse", 0.4021): 80.92,
        ("DivideMix", "best", "human:random1", 0.1723): 95.72,
        ("SOP", "best", "human:aggre", 0.0903): 91.69,
        ("SOP+", "best", "human:worse", 0.4021): 92.89,
        ("VolMinNet", "best", "human:aggre", 0.0903): 90.47,
        ("Co-teaching", "best", "human:random2", 0.1812): 90.51,
        ("ELR+", "best", "human:random3", 0.1764): 94.93,
    },
    "cifar100n-rerun": {
        ("Cross-entropy", "best", "human:noisy", 0.402): 61.19,
        ("Co-teaching", "best", "human:noisy", 0.402): 54.48,
        ("DivideMix", "best", "human:noisy", 0.402): 70.91,
        ("SOP", "best", "human:noisy", 0.402): 56.17,
        ("SOP+", "best", "human:noisy", 0.402): 63.88,
    },
}
# How many numbers each table has, counted in the source.
SIZES = {
    "sam-table4": 48,  # 13 rows x 4 rates, less 1 of Lee, 2 of Chen, 1 of Huang
    "sam-table8": 28,
    "asam-table6": 15,
    "dividemix-elr": 18 * 4 + 10,
    "dividemix-elr-cifar100": 18 * 4 + 3,
    "elr-table1": 7 * 8,
    "elr-table1-cifar100": 5 * 4,
    "badlabels": 23 * 10,  # 12 rows, best and last, but for the best of RoG
    "badlabels-cifar100": 23 * 8,
    "cifar10n": 14 * 5,
    "cifar100n": 14,
    "cifar10n-rerun": 11 * 5,
    "cifar100n-rerun": 11,
}
SPREADS = {  # (row, noise, rate) -> sd and n of the source
    "asam-table6": {("ASAM", "unstated", 0.8): (1.34, 3), ("SGD", "unstated", 0.4): (math.nan, 3)},
    "elr-table1": {("ELR", SYM, 0.2): (0.08, 5), ("Cross-entropy", ASYM, 0.4): (1.44, 5)},
    "cifar10n": {("ELR+", "human:worse", 0.4021): (1.60, math.nan)},
    "cifar10n-rerun": {("CAL", "human:worse", 0.4021): (0.23, 3)},
    "cifar100n": {("Forward", "human:noisy", 0.402): (1.03, math.nan)},
    "cifar100n-rerun": {("SOP", "human:noisy", 0.402): (1.02, 3)},
}


def raw() -> list[dict[str, str]]:
    with module.FILE.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return list(reader)


def test_every_line_parses() -> None:
    lines = raw()
    for line in lines:
        assert None not in line, line  # more fields than columns
        assert None not in line.values(), line  # fewer
        assert all(line[name] for name in COLUMNS if name not in ("sd", "n", "note")), line
        assert all(text == text.strip() for text in line.values()), line
        assert re.fullmatch(r"\d{1,2}\.\d{1,2}", line["value"]), line
        assert 0 <= float(line["noise"]) < 1, line
        assert not line["sd"] or 0 <= float(line["sd"]) < 10, line
        assert not line["n"] or 1 <= int(line["n"]) <= 10, line
        assert line["measure"] in ("test accuracy", "validation error"), line
        assert line["dataset"] in ("cifar10", "cifar100"), line
        assert line["selection"] in RULES, line
        assert line["mark"] in ("verified", "second-hand", "doubtful"), line
        assert all(line["note"].split("; ")) or not line["note"], line
        assert line["note"] or line["mark"] == "verified", line
    places = [tuple(line[c] for c in ("table", "row", "noise_type", "noise", "selection")) for line in lines]
    assert len(set(places)) == len(places)
    assert [line["table"] for line in lines] == [name for name in tables() for _ in range(SIZES[name])]


@pytest.mark.parametrize("name", sorted(SPOT))
def test_a_table_has_one_source(name: str) -> None:
    lines = published(name)
    for column in ("source", "arxiv", "dataset", "measure"):
        assert lines[column].nunique() == 1, column
    assert re.fullmatch(r"\d{4}\.\d{5}", lines["arxiv"].iloc[0])
    told = source(name)
    assert told.startswith(f"Source: {lines['source'].iloc[0]}, arXiv {lines['arxiv'].iloc[0]} (")
    assert told.endswith("). Not run here.")
    for part in (lines["dataset"].iloc[0], "backbone: ", "noise: ", "stopping rule: ", *lines["noise_type"].unique()):
        assert part in told
    for rule in lines["selection"].unique():
        assert RULES[rule] in told
    assert title(name) == f"{lines['source'].iloc[0]} ({lines['dataset'].iloc[0]})"


def test_noise_types_are_those_of_the_command_line() -> None:
    for kind, rate, dataset in {(line["noise_type"], line["noise"], line["dataset"]) for line in raw()}:
        if kind != "unstated":
            RunConfig(dataset=dataset, noise_type=kind, noise=0.0 if kind.startswith("human:") else float(rate))


@pytest.mark.parametrize("name", sorted(SPOT))
def test_values(name: str) -> None:
    lines = published(name)
    found = {
        (line["row"], line["selection"], line["noise_type"], line["noise"]): line["value"]
        for line in lines.to_dict("records")
    }
    assert {place: found.get(place) for place in SPOT[name]} == SPOT[name]
    assert len(SPOT[name]) >= 5
    for (row, kind, rate), (sd, n) in SPREADS.get(name, {}).items():
        (line,) = lines[(lines["row"] == row) & (lines["noise_type"] == kind) & (lines["noise"] == rate)].to_dict(
            "records"
        )
        assert (line["sd"], line["n"]) == pytest.approx((sd, n), nan_ok=True)


def test_tables_are_all_checked() -> None:
    assert set(tables()) == set(SPOT) == set(SIZES)


@pytest.mark.parametrize("name", sorted(SPOT))
def test_the_layout_prints_every_value_with_its_notes(name: str) -> None:
    """The printed table, read back: each value in its row and column, each with the notes of its line."""
    frame = layout(name).set_index("row")
    assert frame.map(lambda cell: isinstance(cell, str)).all(axis=None)
    assert frame.index.is_unique
    assert frame.columns.is_unique
    listed = notes(name)
    by_number = dict(re.fullmatch(r"\[(\d+)\] (.+)", note).groups() for note in listed if note.startswith("["))
    assert [int(number) for number in by_number] == list(range(1, len(by_number) + 1))
    everywhere = [note for note in listed if not note.startswith("[")]
    seen, several = 0, published(name)["selection"].nunique() > 1
    for line in (line for line in raw() if line["table"] == name):
        shown = line["row"] + (f" ({line['selection'].replace('_', ' ')})" if several else "")
        (row,) = [row for row in frame.index if re.fullmatch(re.escape(shown) + r"( (\[\d+\])+)?", row)]
        rate = f"{100 * float(line['noise']):.10g} %"
        wanted = {rate, f"{line['noise_type']} {rate}", line["noise_type"]} & set(frame.columns)
        (column,) = wanted
        cell = frame.loc[row, column]
        value = line["value"] + (f" ± {line['sd']}" if line["sd"] else "")
        assert re.fullmatch(re.escape(value) + r"( (\[\d+\])+)?", cell), (cell, value)
        numbers = re.findall(r"\[(\d+)\]", row[len(shown) :] + cell)
        told = {*everywhere, *(by_number[number] for number in numbers)}
        doubt = line["mark"] == "doubtful"
        mark = "" if line["mark"] == "verified" else f"{line['mark']}: "
        assert set((mark + line["note"]).split("; ")) - {""} <= told
        assert ("doubtful: " in " ".join(by_number[n] for n in re.findall(r"\[(\d+)\]", cell))) == doubt
        seen += 1
    cells = frame[[c for c in frame.columns if "%" in c or c.startswith("human:")]]
    assert (cells != "").to_numpy().sum() == seen == SIZES[name]
    used = set(re.findall(r"\[(\d+)\]", " ".join([*frame.index, *cells.to_numpy().ravel()])))
    assert used == set(by_number)


def test_the_shapes_of_the_printed_tables() -> None:
    assert list(layout("sam-table4").columns) == ["row", "backbone", "noise", "20 %", "40 %", "60 %", "80 %"]
    assert list(layout("asam-table6").columns) == ["row", "0 %", "20 %", "40 %", "60 %", "80 %"]
    grid = layout("badlabels")
    rates = {EXCL: (20, 40, 60, 80), ASYM: (20, 40), IDN: (20, 40, 60, 80)}
    assert list(grid.columns)[1:] == [f"{kind} {rate} %" for kind, own in rates.items() for rate in own]
    assert list(grid["row"][grid["row"].str.startswith("RoG")]) == ["RoG (last)"]
    mixed = list(layout("dividemix-elr")["row"])
    assert next(row for row in mixed if row.startswith("ELR+")).startswith("ELR+ (selected)")
    assert any(row.startswith("DivideMix (last ten)") for row in mixed)
    people = layout("cifar10n")
    assert list(people.columns)[1:] == [f"human:{s}" for s in ("aggre", "random1", "random2", "random3", "worse")]


def test_a_table_beside_a_study() -> None:
    """Rows and rates that both have, and gains over the first row; plain SGD stands for cross-entropy."""
    rows = {"SGD": ("ce", "sgd"), "SAM": ("ce", "sam"), "ELR": ("elr", "sgd"), "Mine": ("ce", "sgd")}
    cells = [{"row": row, "method": m, "opt": o, "dataset": "cifar10"} for row, (m, o) in rows.items()]
    means = {("SGD", 0.2): 0.7, ("SGD", 0.8): 0.2, ("SAM", 0.8): 0.5, ("SAM", 0.5): 0.4, ("Mine", 0.8): 0.9}
    summaries = [{"row": r, "noise_type": "symmetric", "noise": rate, "mean": m} for (r, rate), m in means.items()]
    whole, gains = (table.frame for table in beside("sam-table4", cells, summaries))
    assert list(whole.columns) == ["row"] + [f"symmetric {r} %, {of}" for r in (20, 80) for of in ("paper", "here")]
    assert whole.to_numpy().tolist() == [["SGD", "84.8", "70.0", "26.2", "20.0"], ["SAM", "", "", "77.9", "50.0"]]
    assert gains.to_numpy().tolist() == [["SAM over SGD", "+51.7", "+30.0"]]
    other = [{**s, "row": "ELR"} if s["row"] == "SAM" else s for s in summaries if s["row"] != "Mine"]
    (sgd, elr) = beside("elr-table1", cells, other)[0].frame.to_numpy().tolist()
    assert (sgd[:2], elr[0]) == (["SGD; in the paper Cross-entropy", "87.0"], "ELR")
    assert beside("sam-table4", [{**c, "dataset": "digits"} for c in cells], summaries) == []
    assert beside("sam-table4", cells, [s for s in summaries if s["row"] == "SGD"]) == []


def test_a_table_beside_a_study_that_is_not_finished() -> None:
    """Means that are not there yet are said to be missing; a row with a remark stands for the row without it."""
    rows = {"SAM": ("ce", "sam"), "SAM (m = batch)": ("ce", "sam"), "SGD": ("ce", "sgd")}
    cells = [{"row": row, "method": m, "opt": o, "dataset": "cifar10"} for row, (m, o) in rows.items()]
    means = {
        ("SAM", 0.8): 0.5,
        ("SAM", 0.2): None,
        ("SGD", 0.8): 0.2,
        ("SGD", 0.2): 0.7,
        ("SAM (m = batch)", 0.8): None,
    }
    summaries = [{"row": r, "noise_type": "symmetric", "noise": rate, "mean": m} for (r, rate), m in means.items()]
    whole, gains = (table.frame.to_numpy().tolist() for table in beside("sam-table4", cells, summaries))
    assert whole == [
        ["SGD", "84.8", "70.0", "26.2", "20.0"],
        ["SAM", "95.1", "missing", "77.9", "50.0"],
        ["SAM (m = batch); in the paper SAM", "", "", "77.9", "missing"],
    ]
    assert gains == [
        ["SAM over SGD", "+10.3", "missing", "+51.7", "+30.0"],
        ["SAM (m = batch) over SGD", "", "", "+51.7", "missing"],
    ]


def test_second_hand_numbers_are_marked() -> None:
    marked = [line for line in raw() if line["mark"] == "second-hand"]
    assert {line["table"] for line in marked} == {"asam-table6", "dividemix-elr", "dividemix-elr-cifar100"}
    assert len(marked) == 47
    assert all(line["note"].startswith("quoted from the paper by another source") for line in marked)
    assert any(note.startswith("second-hand: ") for note in notes("asam-table6"))
    assert "26.2" in notes("sam-table4")[0]


def test_doubts_are_told() -> None:
    def doubts(name: str) -> pd.DataFrame:
        lines = published(name)
        return lines[lines["mark"] == "doubtful"]

    assert list(zip(doubts("elr-table1")["row"], doubts("elr-table1")["noise"], strict=True)) == [
        ("SL", 0.2), ("SL", 0.4), ("ELR (cosine)", 0.2),
    ]  # fmt: skip
    assert doubts("elr-table1")["note"].iloc[0] == "the same as GCE's, probably a slip of the paper"
    assert list(doubts("dividemix-elr")["row"]) == ["Cross-entropy"]
    assert set(doubts("sam-table4")["row"]) == {"Sanchez et al. 2019", "Huang et al. 2019"}
    elr = published("badlabels").query("row == 'ELR'")
    assert elr["note"].str.contains("SOP's configuration").all()
    assert notes("sam-table8") == ["error in percent on a clean validation split, though the caption says accuracy"]
    assert "validation error in percent" in source("sam-table8")


@pytest.mark.parametrize("ask", [published, layout, notes, source, title])
def test_an_unknown_table_is_one_line(ask: object) -> None:
    with pytest.raises(UserError) as caught:
        ask("sam-table5")  # type: ignore[operator]
    line = str(caught.value)
    assert line.startswith("no published table 'sam-table5' (known: sam-table4, ")
    assert "\n" not in line
