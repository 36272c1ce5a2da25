"""Verdicts: hand-worked studies of every kind, what must leave them alone, and how often they are wrong."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from noisysam.bench import verdicts
from noisysam.core.errors import UserError
from noisysam.report.claims import Verdict, applicable, effect_table, judge, judge_all, verdict_table
from noisysam.report.figures import forest
from noisysam.report.tables import ReportCell, read_cells
from noisysam.runs.transfer import import_study
from noisysam.studies import claims
from noisysam.studies.claims import OURS, Claim, parse

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
Figures = Mapping[str, Mapping[float, Sequence[float | None]]]  # row -> rate -> percent for each seed


def study(figures: Figures, measure: str = "last", noise_type: str = "symmetric") -> list[ReportCell]:
    """Cells whose ``measure`` is as given; None: not finished."""
    return [
        {
            "row": row, "noise_type": noise_type, "noise": noise, "seed": seed,
            "labels": f"{noise_type} {noise} {seed}",
            "status": "missing" if value is None else "finished", measure: None if value is None else value / 100,
        }
        for row, rates in figures.items() for noise, values in rates.items() for seed, value in enumerate(values)
    ]  # fmt: skip


def gains(*rates: Sequence[float | None], level: float = 50.0) -> list[ReportCell]:
    """Row A, better than B by so many points at 20 %, 40 %, ... for each seed."""
    a = {0.2 * k: [None if g is None else level + g for g in rate] for k, rate in enumerate(rates, 1)}
    return study({"A": a, "B": {noise: [level] * len(values) for noise, values in a.items()}})


def claim(kind: Any, *rows: str, **fields: Any) -> Claim:
    return Claim(text="it is so", kind=kind, rows=rows or ("A", "B"), **fields)


def outcome(kind: Any, *rates: Sequence[float | None], **fields: Any) -> str:
    return judge(claim(kind, **fields), gains(*rates), SEEDS).verdict


def test_better_at_every_rate_by_hand() -> None:
    """Differences 1, 2, 3 (t = 2 / (1 / root 3)) and 4, 5, 6: the first rate decides."""
    found = judge(claim("greater"), gains([1, 2, 3], [4, 5, 6]), SEEDS)
    assert found.verdict == "supported"
    assert found.p == pytest.approx(stats.t.sf(2 * math.sqrt(3), 2))
    assert found.deciding is not None
    assert found.deciding.planned is not None
    assert (found.deciding.what, found.deciding.planned.n, found.deciding.later) == ("symmetric 20 %", 3, None)
    reach = stats.t.ppf(0.975, 2) / math.sqrt(3)
    planned = found.deciding.planned
    assert (planned.mean, planned.low, planned.high) == pytest.approx((2, 2 - reach, 2 + reach))
    assert [effect.what for effect in found.effects] == ["symmetric 20 %", "symmetric 40 %"]
    assert found.effects[1].p == pytest.approx(stats.ttest_1samp([4, 5, 6], 0, alternative="greater").pvalue)


HIGH, LOW, WIDE, NONE = [4.0, 5.0, 6.0], [-4.0, -5.0, -6.0], [-4.0, 1.0, 6.0], [-0.1, 0.0, 0.1]
JUST = [0.5, 1.0, 1.5]  # p = 0.037: shown at full level, not at half of it


@pytest.mark.parametrize(
    ("kind", "fields", "rates", "expected"),
    [
        ("greater", {}, [HIGH, HIGH], "supported"),
        ("greater", {}, [HIGH, WIDE], "undecided"),
        ("greater", {}, [HIGH, LOW], "contradicted"),
        ("greater", {}, [JUST, JUST], "supported"),
        ("greater", {"level": 0.01}, [JUST, JUST], "undecided"),
        ("greater", {"margin": 3}, [HIGH, HIGH], "supported"),
        ("greater", {"margin": 5}, [HIGH, HIGH], "undecided"),
        ("greater", {"margin": 9}, [HIGH, HIGH], "contradicted"),
        ("greater", {"rates": "some"}, [HIGH, LOW], "supported"),
        ("greater", {"rates": "some"}, [WIDE, LOW], "undecided"),
        ("greater", {"rates": "some"}, [LOW, LOW], "contradicted"),
        ("greater", {"rates": "some"}, [JUST, LOW], "undecided"),  # Holm: twice 0.037
        ("greater", {"rates": "some", "noise": [0.2]}, [JUST, LOW], "supported"),
        ("not_worse", {"margin": 1}, [NONE, HIGH], "supported"),
        ("not_worse", {"margin": 1}, [NONE, WIDE], "undecided"),
        ("not_worse", {"margin": 1}, [NONE, LOW], "contradicted"),
        ("equal", {"margin": 1}, [NONE, NONE], "supported"),
        ("equal", {"margin": 1}, [NONE, WIDE], "undecided"),
        ("equal", {"margin": 1}, [NONE, HIGH], "contradicted"),
        ("equal", {"margin": 1}, [NONE, LOW], "contradicted"),
        ("equal", {"margin": 0.001}, [JUST], "undecided"),  # two sides: twice 0.037
        ("equal", {"margin": 7}, [HIGH, LOW], "supported"),
    ],
)
def test_verdicts(kind: str, fields: dict[str, Any], rates: list[list[float]], expected: str) -> None:
    assert outcome(kind, *rates, **fields) == expected


def test_contradiction_at_one_rate_or_at_all() -> None:
    """Simes: 0.037 at every rate contradicts, at one of two it does not."""
    just = [-0.5, -1.0, -1.5]
    assert outcome("greater", just, just) == "contradicted"
    assert outcome("greater", just, WIDE) == "undecided"
    found = judge(claim("greater"), gains(HIGH, [-4.9, -5.0, -5.1], HIGH), SEEDS)
    assert found.deciding is not None
    assert (found.verdict, found.deciding.what) == ("contradicted", "symmetric 40 %")
    assert found.opposite == pytest.approx(3 * stats.ttest_1samp([-4.9, -5, -5.1], 0, alternative="less").pvalue)
    found = judge(claim("greater", rates="some"), gains([-4.9, -5.0, -5.1], LOW), SEEDS)
    assert found.deciding is not None
    assert (found.verdict, found.deciding.what) == ("contradicted", "symmetric 40 %")


def test_gain_that_grows() -> None:
    """Slopes by hand: gains (0, 4), (1, 6), (2, 8) over 20 %: 2, 2.5 and 3 points for 10 %."""
    found = judge(claim("grows"), gains([0, 1, 2], [4, 6, 8]), SEEDS)
    assert found.deciding is not None
    assert found.deciding.planned is not None
    assert (found.verdict, found.deciding.planned.mean) == ("supported", 2.5)
    assert found.p == pytest.approx(stats.ttest_1samp([2, 2.5, 3], 0, alternative="greater").pvalue)
    assert verdict_table([found])["effect [95 % interval]"][0].startswith("+2.50 [")
    assert verdict_table([found])["effect [95 % interval]"][0].endswith("] points per 10 % noise")
    assert outcome("grows", [4, 6, 8], [0, 1, 2]) == "contradicted"
    assert outcome("grows", HIGH, HIGH) == "undecided"
    assert judge(claim("grows"), gains(HIGH), SEEDS).reason == "one noise rate: no trend"


def test_gain_that_grows_with_each_type_of_noise() -> None:
    def typed(noise_type: str, *rates: Sequence[float]) -> list[ReportCell]:
        return [{**cell, "noise_type": noise_type} for cell in gains(*rates)]

    up, human = typed("symmetric", [0, 1, 2], [4, 6, 8]), typed("human:worst", HIGH)
    assert judge(claim("grows"), [*up, *human], SEEDS).verdict == "supported"
    assert judge(claim("grows"), [*up, *typed("pair", [4, 6, 8], [0, 1, 2])], SEEDS).verdict == "contradicted"
    both = [*typed("symmetric", HIGH), *typed("pair", LOW)]
    assert judge(claim("greater"), both, SEEDS).verdict == "contradicted"
    assert judge(claim("greater", noise_type="symmetric"), both, SEEDS).verdict == "supported"


def family(**rows: Sequence[float]) -> list[ReportCell]:
    return study({**{row: {0.4: [50 + g for g in gain]} for row, gain in rows.items()}, "B": {0.4: [50.0] * 3}})


def test_some_row_beats() -> None:
    beats = claim("some_beats", "C", "D", "A", "B")
    found = judge(beats, family(A=[4.9, 5, 5.1], C=LOW, D=WIDE), SEEDS)
    assert found.deciding is not None
    assert (found.verdict, found.deciding.what) == ("supported", "A, symmetric 40 %")
    assert found.p == pytest.approx(3 * stats.ttest_1samp([4.9, 5, 5.1], 0, alternative="greater").pvalue)
    assert judge(beats, family(A=JUST, C=LOW, D=LOW), SEEDS).verdict == "undecided"  # Holm: three times 0.037
    assert judge(beats, family(A=LOW, C=LOW, D=LOW), SEEDS).verdict == "contradicted"
    assert judge(beats, family(A=LOW, C=WIDE, D=LOW), SEEDS).verdict == "undecided"


def test_some_row_beats_all_that_it_faces() -> None:
    """The best cell of a grid is one of these rows: each that it faces must be beaten by the same one."""
    beats = claim("some_beats", "A", "C", against=("B", "D"))
    ahead = judge(beats, family(A=HIGH, C=LOW, D=[g - 1 for g in HIGH]), SEEDS)
    assert (ahead.verdict, len(ahead.effects)) == ("supported", 4)
    assert judge(beats, family(A=HIGH, C=LOW, D=[g + 9 for g in HIGH]), SEEDS).verdict == "contradicted"


def pairs(*seeds: tuple[Sequence[float], Sequence[float]]) -> list[ReportCell]:
    """Rows A0, B0, A1, B1, ... at 60 %; for each seed the gains of A over B and the shares that B memorised."""
    n = len(seeds[0][0])
    rows = {f"A{k}": {0.6: [40 + gain[k] for gain, _ in seeds]} for k in range(n)}
    rows |= {f"B{k}": {0.6: [40.0] * len(seeds)} for k in range(n)}
    learnt = {(f"B{k}", seed): shares[k] for seed, (_, shares) in enumerate(seeds) for k in range(n)}
    return [{**cell, "memorised": learnt.get((cell["row"], cell["seed"]), 0.5)} for cell in study(rows)]


def test_a_gain_that_goes_with_another_measure() -> None:
    """Rank correlations by hand, 1 - 6 sum d^2 / (n (n^2 - 1)) over n = 4 pairs: 1, 0.8 (d^2 = 2), 0.8."""
    names = [f"A{k}" for k in range(4)]
    faced = tuple(f"B{k}" for k in range(4))
    goes = claim("correlates", *names, against=faced, measure=("last", "memorised"))
    up = ([1, 2, 3, 9], [0.1, 0.2, 0.3, 0.9]), ([1, 2, 9, 3], [0.1, 0.2, 0.3, 0.9]), ([2, 1, 3, 9], [0, 0.2, 0.3, 0.4])
    found = judge(goes, pairs(*up), SEEDS)
    assert found.deciding is not None
    assert [gain for _, gain in found.deciding.gains] == pytest.approx([1, 0.8, 0.8])
    assert (found.verdict, found.deciding.unit[:16]) == ("supported", "rank correlation")
    assert found.p == pytest.approx(1 / 24)  # the means are in the same order, one of 4! ways
    assert verdict_table([found])["effect [95 % interval]"][0] == "+1.00 rank correlation (p by permuting the rows)"
    down = [(gains_, [1 - share for share in shares]) for gains_, shares in up]
    assert judge(goes, pairs(*down), SEEDS).verdict == "contradicted"
    even = [(gains_, [0.5] * 4) for gains_, _ in up]  # nothing to rank
    assert "planned figures missing" in judge(goes, pairs(*even), SEEDS).reason


def sweep(*means: float, values: Sequence[str] = ("0.02", "0.05", "0.1", "0.5", "1.0")) -> list[ReportCell]:
    """Radii of SAM with these accuracies, shuffled."""
    rows = {f"SAM, rho={rho}": {0.8: [mean - 0.3, mean, mean + 0.4]} for rho, mean in zip(values, means, strict=False)}
    return study(dict(sorted(rows.items(), key=lambda row: row[0][::-1])))


def test_knife_edge() -> None:
    radii = {"0.1": [44, 43.5, 44.5], "0.02": [27, 27.1, 26.9], "1.0": [20, 20, 20], "0.05": [79, 79.3, 78.7]}
    cells = study({f"SAM, rho={rho}": {0.8: values} for rho, values in {**radii, "0.5": [30, 30, 30]}.items()})
    found = judge(claim("knife_edge", "SAM, rho", margin=5), cells, SEEDS)
    assert found.deciding is not None
    assert (found.verdict, found.deciding.what) == ("supported", "SAM, rho=0.05 over SAM, rho=0.1, symmetric 80 %")
    falls = np.subtract(radii["0.05"], radii["0.1"])
    assert found.p == pytest.approx(3 * stats.ttest_1samp(falls, 5, alternative="greater").pvalue)
    assert judge(claim("knife_edge", "SAM, rho", margin=40), cells, SEEDS).verdict == "contradicted"
    named = claim("knife_edge", *(f"SAM, rho={rho}" for rho in ("0.02", "0.05", "0.1", "0.5", "1.0")), margin=5)
    assert judge(named, cells, SEEDS) == replace(found, claim=named)
    moved = claim("knife_edge", *(f"SAM, rho={rho}" for rho in ("0.05", "0.02", "0.1", "0.5", "1.0")), margin=5)
    assert judge(moved, cells, SEEDS).verdict == "contradicted"  # the best is at an end


def test_knife_edge_pays_for_the_choice_of_the_best() -> None:
    """Three rows may be the best: a fall with p = 0.037 is not enough; with one that may be, it is."""
    rows = {f"r{k}": {0.4: [50.0] * 3} for k in range(5)} | {"r2": {0.4: [50 + g + 1 for g in JUST]}}
    assert judge(claim("knife_edge", "r0", "r1", "r2", "r3", "r4", margin=1), study(rows), SEEDS).verdict == "undecided"
    assert judge(claim("knife_edge", "r1", "r2", "r3", margin=1), study(rows), SEEDS).verdict == "supported"


def test_radii_are_ordered_as_numbers() -> None:
    edge = claim("knife_edge", "SAM, rho", margin=5)
    cells = sweep(20, 30, 80, 30, 20, values=("1e-05", "0.05", "0.5", "5.0", "10.0"))
    assert judge(edge, cells, SEEDS).verdict == "supported"
    assert judge(edge, sweep(80, 30, 20, values=("1e-05", "5.0", "10.0")), SEEDS).verdict == "contradicted"
    assert applicable([edge], sweep(80, 30)) == []
    assert applicable([edge], study({f"SAM, m={m}": {0.8: [1, 2, 3]} for m in (1, 2, 3)})) == []
    assert judge(edge, sweep(80, 30), SEEDS).reason == "rows missing: SAM, rho=... at three values or more"


def test_measures_and_direction() -> None:
    cells = [
        {**cell, "selected": cell["last"] + 0.20 * (cell["row"] == "B"), "memorised": 1 - cell["last"]}
        for cell in gains(HIGH, HIGH)
    ]
    assert judge(claim("greater"), cells, SEEDS).verdict == "supported"
    assert judge(claim("greater", measure=["last", "selected"]), cells, SEEDS).verdict == "contradicted"
    assert judge(claim("greater", measure="memorised"), cells, SEEDS).verdict == "contradicted"
    assert judge(claim("greater", measure="memorised", direction="lower"), cells, SEEDS).verdict == "supported"
    early = claim("greater", "B", "B", measure=["selected", "last"])
    assert judge(early, cells, SEEDS).verdict == "supported"


@pytest.mark.parametrize(
    ("rates", "planned", "reason"),
    [
        ([[5]], [0], "n = 1: no interval"),
        ([[5, 5.1]], [0, 1], "n = 2: descriptive"),
        ([[5, 5.1, 5.2]], [0, 1], "n = 2: descriptive"),
        ([[5, 5.1, 5.2]], [], "no seed was planned"),
        (
            [[5, 5.1, None], [5, None, None]],
            SEEDS,
            "9 of 12 cells have results; {}: symmetric 20 %, seed 2, and at 1 more",
        ),
        ([[5, 5.1, 5.2, None]], range(4), "7 of 8 cells have results; {}: symmetric 20 %, seed 3"),
        ([[None, None, 5]], SEEDS, "4 of 6 cells have results; {}: symmetric 20 %, seed 0, 1"),
        ([WIDE], SEEDS, "neither is shown (opposite: p = 0.62): symmetric 20 %"),
    ],
)
def test_why_it_is_undecided(rates: list[list[float | None]], planned: Sequence[int], reason: str) -> None:
    found = judge(claim("greater"), gains(*rates), planned)
    assert (found.verdict, found.reason) == ("undecided", reason.format("planned figures missing"))


def test_effects_of_few_seeds_are_told() -> None:
    one, two = (judge(claim("greater"), gains(values), range(len(values))) for values in ([5.0], [5.0, 5.5]))
    table = verdict_table([one, two])
    assert list(table["effect [95 % interval]"]) == ["+5.00 points", "+5.25 [+2.07, +8.43] points"]
    assert list(table["n"]) == ["1", "2"]


def test_what_the_study_lacks() -> None:
    cells = gains(HIGH)
    assert judge(claim("greater", "A", "C"), cells, SEEDS).reason == "rows missing: C"
    assert judge(claim("greater", noise=[0.2, 0.9]), cells, SEEDS).reason == "noise rates missing"
    assert judge(claim("greater", noise_type="pair"), cells, SEEDS).reason == "rows missing: A, B"
    without = [{**cell, "selected": None} for cell in cells]
    assert "figures missing" in judge(claim("greater", measure="selected"), without, SEEDS).reason
    failed = [{**cell, "status": "failed" if cell["seed"] == 1 else "finished"} for cell in cells]
    assert "seed 1" in judge(claim("greater"), failed, SEEDS).reason


def test_pairs_share_their_labels() -> None:
    cells = gains(HIGH)
    cells[1]["labels"] = "other"
    with pytest.raises(UserError, match=r"A and B were trained on different labels at symmetric 20 %, seed 1: .* pair"):
        judge(claim("greater"), cells, SEEDS)
    with pytest.raises(UserError, match="B, symmetric 20 %, seed 2 is there twice"):
        judge(claim("greater"), [*gains(HIGH), gains(HIGH)[-1]], SEEDS)


def test_seeds_added_later_are_described_and_decide_nothing() -> None:
    found = judge(claim("greater"), gains([*WIDE, *([9.0] * 7)]), SEEDS)
    assert found.verdict == "undecided"
    assert found.deciding is not None
    assert found.deciding.later is not None
    assert (found.deciding.later.n, found.deciding.later.mean) == (10, 6.6)
    table = verdict_table([found])
    assert list(table["verdict"]) == ["undecided", "descriptive"]
    assert list(table["n"]) == ["3", "10"]
    assert table["reason"][1] == "7 of the seeds added later, symmetric 20 %: no part of the verdict"
    as_if_planned = judge(claim("greater"), gains([*WIDE, *([9.0] * 7)]), range(10))
    assert as_if_planned.verdict == "supported"


def test_table_as_printed() -> None:
    cells = [{**cell, "oracle": "rho per rate" if cell["row"] == "A" else ""} for cell in gains(HIGH, [1, 2, 3, 9])]
    cells = [{**cell, "best": cell["last"]} for cell in cells]
    table = verdict_table(
        [judge(c, cells, SEEDS) for c in (claim("greater"), claim("equal", margin=9, measure="best", level=0.01))]
    )
    head = ["no.", "claim", "verdict", "effect [95 % interval]", "n", "p", "p (Holm over 2)", "reason"]
    assert list(table.columns) == head
    first, more, second, *_ = table.itertuples(index=False)
    assert first == (
        "1", "it is so (oracle: A)", "supported", "+2.00 [-0.48, +4.48] points", "3", "0.037", "0.037",
        "shown: symmetric 40 %",
    )  # fmt: skip
    assert (more[2], more[4]) == ("descriptive", "4")
    assert second[1] == "it is so (oracle: A, best epoch on test)"
    assert second[7].endswith("; level 0.01")


def test_yaml_has_exactly_the_fields() -> None:
    text = """
    - {text: early stopping helps, kind: greater, rows: [A, A], measure: [selected, last]}
    - text: A remembers less than B at most rates
      kind: not_worse
      rows: [A, B]
      measure: memorised
      direction: lower
      margin: 1.5
      rates: some
      noise: [0.2, 0.4]
      noise_type: symmetric
      level: 0.025
    """
    first, second = parse(yaml.safe_load(text), "study.yaml: claims")
    assert (first.measure, first.rates, first.level) == (("selected", "last"), "all", 0.05)
    assert {*yaml.safe_load(text)[1], "against"} == set(Claim.model_fields)
    assert second.measure == ("memorised", "memorised")
    assert second.noise == (0.2, 0.4)
    assert parse([c.model_dump(mode="json") for c in OURS], "claims") == OURS


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "better"}, "kind: should be one of 'greater', 'not_worse'"),
        ({"kind": None}, "kind: missing"),
        ({"colour": 1}, "colour: there is no such option"),
        ({"text": ""}, "text: "),
        ({"rows": ["A"]}, "rows: greater compares two"),
        ({"rows": ["A", "A"]}, "rows: a row is compared with itself"),
        ({"rows": "A"}, "rows: "),
        ({"measure": "loss"}, "measure.0: should be one of last, selected"),
        ({"kind": "equal"}, "margin: equal needs one above 0"),
        ({"kind": "not_worse", "margin": -1}, "margin: should be greater than or equal to 0"),
        ({"margin": math.inf}, "margin: should be a finite number"),
        ({"kind": "grows", "margin": 1}, "margin: grows has none"),
        ({"kind": "grows", "rates": "some"}, "rates: grows has none"),
        ({"kind": "knife_edge", "margin": 1}, "rows: knife_edge needs three"),
        ({"kind": "knife_edge", "rows": ["A", "B", "C"], "measure": ["last", "best"], "margin": 1}, "measure: knife"),
        ({"kind": "some_beats", "rows": ["A"]}, "rows: some_beats needs candidates"),
        ({"against": ["C"]}, "against: greater has none"),
        ({"kind": "some_beats", "rows": ["A"], "against": ["A"]}, "against: a row is compared with itself"),
        ({"kind": "correlates", "against": ["C", "D"]}, "against: correlates needs four rows or more"),
        ({"kind": "correlates", "rows": list("ABCE"), "against": ["D"]}, "against: correlates needs four rows"),
        ({"level": 0.5}, "level: should be less than 0.5"),
        ({"rates": "most"}, "rates: should be 'all' or 'some'"),
        ({"noise": []}, "noise: "),
    ],
)
def test_faults_name_their_field(change: dict[str, Any], fault: str) -> None:
    given = {"text": "it is so", "kind": "greater", "rows": ["A", "B"], **change}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(UserError) as error:
        parse([{"text": "fine", "kind": "greater", "rows": ["A", "B"]}, given], "study.yaml: claims")
    assert str(error.value).startswith(f"study.yaml: claims, number 2, {fault}")
    assert "\n" not in str(error.value)


def test_a_claim_is_a_mapping() -> None:
    with pytest.raises(UserError, match="claims, number 1, "):
        parse(["SAM is better"], "claims")


def test_our_claims_are_about_rows_of_our_studies() -> None:
    """Each applies where its rows are, and to every study whose rows it has."""
    studies = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "experiments").glob("*.yaml")}
    applied = {}
    for name in ("cpu-small", "cpu-small-family", "cpu-small-m", "table4"):
        rows = {row: {noise: [1.0] for noise in studies[name]["grid"]["noise"]} for row in studies[name]["rows"]}
        applied[name] = applicable(OURS, study(rows))
    assert [len(applied[name]) for name in applied] == [5, 7, 4, 5]
    of_a_sweep = [c for c in OURS if c.rows == ("SAM, rho",)]
    assert {c.text for found in applied.values() for c in found} == {c.text for c in OURS if c not in of_a_sweep}
    assert applicable(OURS, sweep(20, 80, 30)) == of_a_sweep


def test_committed_studies_of_one_seed_decide_nothing(tmp_path: Path) -> None:
    import_study(ROOT / "reports" / "records", tmp_path)
    cells = read_cells(tmp_path, "cpu-small")
    seeds = {cell["seed"] for cell in cells}
    if len(seeds) > 1:
        pytest.skip("the study has several seeds now")
    verdicts = [judge(c, cells, seeds) for c in applicable(OURS, cells)]
    assert {v.verdict for v in verdicts} == {"undecided"}
    # evaluated in the last ten epochs alone
    early = "4 of 4 cells have results; planned figures missing: symmetric 40 %, seed 0, and at 1 more"
    assert [v.reason for v in verdicts] == [
        early if "selected" in v.claim.measure else "n = 1: no interval" for v in verdicts
    ]
    assert len(verdicts) == 5
    sam, sgd = ([c["last"] for c in cells if (c["row"], c["noise"]) == (row, 0.4)] for row in ("SAM", "SGD"))
    assert verdicts[0].effects[0].planned is not None
    assert verdicts[0].effects[0].planned.mean == pytest.approx(100 * (sam[0] - sgd[0]))


# What must leave a verdict alone. Gains of a few points with little spread, so that all verdicts come up.

KINDS = [
    claim("greater"),
    claim("greater", rates="some"),
    claim("not_worse", margin=2),
    claim("equal", margin=3),
    claim("grows"),
    claim("some_beats", "A", "C", "B"),
    claim("knife_edge", "C", "A", "B", margin=1),
]
kinds = pytest.mark.parametrize("tested", KINDS, ids=lambda c: f"{c.kind} {c.rates}")


@st.composite
def studies(draw: st.DrawFn, seeds: int = 5) -> list[ReportCell]:
    """Rows A, B, C at two rates; figures with two decimals."""
    figures: dict[str, dict[float, list[float]]] = {}
    for row in "ABC":
        for noise in (0.2, 0.6):
            level = draw(st.integers(40, 46))
            spread = draw(st.lists(st.integers(-60, 60), min_size=seeds, max_size=seeds))
            figures.setdefault(row, {})[noise] = [level + s / 100 for s in spread]
    return study(figures)


def told(verdict: Verdict) -> tuple[str, float, float]:
    return verdict.verdict, round(verdict.p, 6), round(verdict.opposite, 6)


@kinds
@settings(max_examples=40, deadline=None)
@given(cells=studies(), order=st.randoms(use_true_random=False))
def test_order_of_runs(tested: Claim, cells: list[ReportCell], order: Any) -> None:
    shuffled = cells[:]
    order.shuffle(shuffled)
    assert judge(tested, shuffled, SEEDS) == judge(tested, cells, SEEDS)


@kinds
@settings(max_examples=40, deadline=None)
@given(cells=studies(seeds=8), more=st.integers(0, 5))
def test_later_seeds(tested: Claim, cells: list[ReportCell], more: int) -> None:
    first = judge(tested, [cell for cell in cells if cell["seed"] < 3], SEEDS)
    later = judge(tested, [cell for cell in cells if cell["seed"] < 3 + more], SEEDS)
    assert told(first) == told(later)
    assert first.reason == later.reason
    assert [effect.planned for effect in first.effects] == [effect.planned for effect in later.effects]
    assert all((effect.later is not None) == (more > 0) for effect in later.effects)


@kinds
@settings(max_examples=40, deadline=None)
@given(cells=studies(), gone=st.sets(st.integers(0, 29)))
def test_looking_early(tested: Claim, cells: list[ReportCell], gone: set[int]) -> None:
    """A verdict before all planned runs have finished stays when they have."""
    early = judge(tested, [{**c, "status": "missing"} if k in gone else c for k, c in enumerate(cells)], range(5))
    assert early.verdict in ("undecided", judge(tested, cells, range(5)).verdict)


@kinds
@settings(max_examples=40, deadline=None)
@given(cells=studies(), shifts=st.lists(st.integers(-30, 30), min_size=5, max_size=5))
def test_seed_effects_that_rows_share_and_scale(tested: Claim, cells: list[ReportCell], shifts: list[int]) -> None:
    found = judge(tested, cells, range(5))
    shifted = [{**cell, "last": cell["last"] + shifts[cell["seed"]] / 100} for cell in cells]
    assert told(judge(tested, shifted, range(5))) == told(found)
    half = tested.model_copy(update={"margin": tested.margin / 2})
    assert told(judge(half, [{**cell, "last": cell["last"] / 2} for cell in cells], range(5))) == told(found)


@settings(max_examples=60, deadline=None)
@given(cells=studies())
def test_sides_swapped(cells: list[ReportCell]) -> None:
    swapped = {"A": "B", "B": "A", "C": "C"}
    mirrored = [{**cell, "row": swapped[cell["row"]]} for cell in cells]
    for tested in (claim("greater"), claim("grows")):
        if judge(tested, cells, SEEDS).verdict == "supported":
            assert judge(tested, mirrored, SEEDS).verdict == "contradicted"
    equal = claim("equal", margin=2)
    assert told(judge(equal, mirrored, SEEDS)) == told(judge(equal, cells, SEEDS))
    lower = claim("greater", direction="lower")
    assert told(judge(lower, mirrored, SEEDS)) == told(judge(claim("greater"), cells, SEEDS))


@settings(max_examples=60, deadline=None)
@given(cells=studies(), lift=st.integers(0, 300))
def test_a_better_row_is_never_less_supported(cells: list[ReportCell], lift: int) -> None:
    lifted = [{**c, "last": c["last"] + lift / 10000} if c["row"] == "A" else c for c in cells]
    for tested in (claim("greater"), claim("not_worse", margin=1), claim("some_beats", "A", "C", "B")):
        before, after = judge(tested, cells, SEEDS), judge(tested, lifted, SEEDS)
        assert after.p <= before.p + 1e-9
        assert after.opposite >= before.opposite - 1e-9


def test_claims_of_a_study_are_corrected_for_each_other() -> None:
    """Holm by hand: the smallest of three p values times three, the next times two."""
    cells = gains([1, 2, 3], [4, 5, 6])
    asked = [claim("greater", noise=[0.2]), claim("greater", noise=[0.4]), claim("greater", "A", "C")]
    alone = [judge(one, cells, SEEDS) for one in asked]
    found = judge_all(asked, cells, SEEDS)
    assert [one.p for one in found] == [one.p for one in alone]
    assert [one.verdict for one in alone] == ["supported", "supported", "undecided"]
    assert [one.adjusted for one in found] == pytest.approx([2 * alone[0].p, 3 * alone[1].p, 1])
    assert [one.verdict for one in found] == ["undecided", "supported", "undecided"]
    assert "p (Holm over 3)" in verdict_table(found).columns
    down = judge_all([claim("greater", "B", "A", noise=[rate]) for rate in (0.2, 0.4)], cells, SEEDS)
    assert [one.verdict for one in down] == ["contradicted", "contradicted"]
    assert [one.adjusted for one in down] == pytest.approx([alone[0].p, 2 * alone[1].p])


def test_a_claim_that_depends_on_the_rate() -> None:
    found = judge(claim("greater"), gains(HIGH, LOW), SEEDS)
    assert (found.verdict, found.name) == ("contradicted", "depends on the rate")
    assert found.reason == "depends on the rate: +5.00 at symmetric 20 %, -5.00 at symmetric 40 %"
    assert judge(claim("greater"), gains(WIDE, LOW), SEEDS).name == "contradicted"
    assert judge(claim("greater", rates="some"), gains(HIGH, LOW), SEEDS).name == "supported"
    many = judge_all([claim("greater"), *[claim("greater", "B", "A")] * 9], gains([3.5, 5, 6.5], LOW), SEEDS)
    assert (many[0].verdict, many[0].depends) == ("undecided", True)
    assert many[0].reason.endswith("; not after Holm's correction")


def test_every_rate_means_rates_with_noise() -> None:
    """The clean rate is described beside them; labels that bring their own rate are not clean."""
    cells = study(
        {"A": {0.0: [50 + g for g in LOW], 0.4: [50 + g for g in HIGH]}, "B": dict.fromkeys((0.0, 0.4), [50] * 3)}
    )
    found = judge(claim("greater"), cells, SEEDS)
    assert (found.verdict, [effect.what for effect in found.effects]) == ("supported", ["symmetric 40 %"])
    assert [(e.what, e.planned and e.planned.mean) for e in found.others] == [("symmetric 0 %", -5)]
    assert "symmetric 0 % (described)" in list(effect_table([found])["where"])
    assert judge(claim("greater", noise=[0, 0.4]), cells, SEEDS).name == "depends on the rate"
    assert len(judge(claim("grows"), cells, SEEDS).effects) == 1
    assert judge(claim("greater"), [c for c in cells if not c["noise"]], SEEDS).verdict == "contradicted"
    human = [{**cell, "noise_type": "human:worst"} if not cell["noise"] else cell for cell in cells]
    assert [e.what for e in judge(claim("greater"), human, SEEDS).effects] == ["human:worst", "symmetric 40 %"]


def test_a_claim_at_one_rate_does_not_say_every() -> None:
    every = claim("greater").model_copy(update={"text": "A is better than B at every noise rate"})
    assert judge(every, gains(HIGH), SEEDS).text == "A is better than B at symmetric 20 %"
    assert judge(every, gains(HIGH, HIGH), SEEDS).text == every.text


def test_effects_are_shown_at_every_rate_with_their_seeds() -> None:
    found = judge_all([claim("greater"), claim("grows")], gains(HIGH, JUST), SEEDS)
    table = effect_table(found)
    assert list(table["no."]) == ["1", "1", "2", "2", "2", "2"]
    assert list(table["seeds"][:2]) == ["+4.00, +5.00, +6.00", "+0.50, +1.00, +1.50"]
    assert list(table["where"][3:]) == [
        "symmetric 20 % (described)", "symmetric 40 % (described)", "slope over the 2 rates of symmetric (described)"
    ]  # fmt: skip
    logits = [[math.log((50 + g) / (50 - g)) for g in values] for values in (HIGH, JUST)]
    slope = np.subtract(logits[1], logits[0]) / 2
    assert list(table["seeds"])[5] == ", ".join(f"{value:+.2f}" for value in slope)
    assert "logits per 10 % noise" in table["effect [95 % interval]"][5]
    assert "p (sign flips)" not in table.columns


def test_sign_flips_from_five_seeds_on() -> None:
    """All five above: one of the 32 ways to give signs."""
    found = judge(claim("greater"), gains([1, 2, 3, 4, 5]), range(5))
    assert found.effects[0].flips == 1 / 32
    assert effect_table([found])["p (sign flips)"][0] == "0.031"
    equal = judge(claim("equal", margin=6), gains([1, 2, 3, 4, 5]), range(5))
    assert equal.effects[0].flips == 1 / 32
    assert judge(claim("greater"), gains(HIGH), SEEDS).effects[0].flips is None


def test_a_forest_shows_each_seed() -> None:
    found = judge_all([claim("greater"), claim("grows")], gains(HIGH, [1.0, 2.0, None]), SEEDS)
    figure = forest(found)
    assert figure is not None
    (panel,) = figure.axes
    assert [text.get_text() for text in panel.get_yticklabels()] == ["1. it is so", "symmetric 20 %", "symmetric 40 %"]
    dots = [sorted(line.get_xdata()) for line in panel.lines if line.get_marker() == "o"]
    assert dots == [[4, 5, 6], [1, 2]]
    intervals = [line for line in panel.lines if line.get_linestyle() == "-" and line.get_marker() == "None"]
    assert len(intervals) == 2  # of three seeds, and the line at zero
    assert forest([judge(claim("greater", "A", "C"), gains(HIGH), SEEDS)]) is None


# How often they are wrong: a short form of `python -m noisysam.bench.verdicts`.

STUDIES = 400
MOST = stats.binom.ppf(0.999, STUDIES, claims.LEVEL)


def test_every_kind_is_simulated() -> None:
    kinds = claims.KINDS
    assert {s.claim.kind for s in verdicts.SCENARIOS if s.truth == "sought"} == set(kinds)
    assert {s.claim.kind for s in verdicts.SCENARIOS if s.truth == "true"} == set(kinds)


LONG = [s.truth == "sought" and s.claim.kind in ("correlates", "knife_edge") for s in verdicts.SCENARIOS]


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.slow) if long else n for n, long in enumerate(LONG)]
)
def test_verdicts_of_simulated_studies(number: int) -> None:
    scenario = verdicts.SCENARIOS[number]
    tally = verdicts.simulate(scenario, STUDIES, np.random.default_rng([1, number]))
    counts = verdicts.wrong(scenario, tally)
    assert max(counts.values()) <= MOST, counts
    if scenario.truth in ("true", "false"):  # and the right verdict comes
        assert (tally.supported if scenario.truth == "true" else tally.contradicted) > STUDIES / 2


@pytest.mark.slow
def test_adding_until_decided_would_pay_if_added_seeds_counted() -> None:
    tally = verdicts.simulate(verdicts.SCENARIOS[0], STUDIES, np.random.default_rng(2), added_count=True)
    assert tally.added > MOST
    assert tally.supported <= MOST
