"""Claims about the rows of a study, judged on its runs: supported, contradicted or undecided."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from noisysam.core.errors import UserError
from noisysam.report import statistics
from noisysam.report.statistics import Estimate
from noisysam.report.tables import COVERAGE, OWN_RATE, ReportCell, column_name, joined
from noisysam.runs.measures import MEASURE
from noisysam.studies.claims import CLAIM_KINDS, LEVEL, MANY, Claim

FEWEST = 3  # planned seeds that can decide; two are descriptive, one has no interval


RATE_STEP = 0.1  # of noise, for which the growth of a gain is told


NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


LEAST = 1e-4  # share from which on a logit is taken: one image of ten thousand


FLIPS = 5  # seeds from which a sign-flip test can reach a p value of 5 %


INTERVAL = (1 - COVERAGE) / 2


RULES = (
    "Effects are differences in percentage points between runs with the same noise, seed and label file; [ ] is the"
    " 95 % t interval of their mean. p values are one-sided, from Student's t test. Verdicts use the p value after"
    " Holm's correction over all claims of the study, at a level of 5 % unless the reason names another. A claim is"
    " supported if all of it is shown, contradicted if its opposite is shown, and undecided otherwise; a contradicted"
    " claim depends on the rate if it is shown at some rates and its opposite at others. A claim about every rate is"
    " tested at full level at each rate with noise (intersection-union), a claim about some row or rate by Holm, an"
    " opposite at one of several rates by Simes. The table shows the effect that decides. Verdicts use only the seeds"
    " that the study planned first, at least three, and only when all of their runs have finished; seeds added later"
    " are described in a second line."
)


Place = tuple[str, float]  # noise type, nominal rate


Runs = dict[tuple[str, str, float], dict[int, ReportCell]]  # row, noise type, rate -> seed -> run


@dataclass(frozen=True)
class Effect:
    """One difference that a claim rests on: ``gains`` by seed, ``planned`` over the seeds that were planned first
    (None: no pair has finished), ``later`` with those added since (None: none were), the planned seeds that are
    ``missing``, the p value of what is claimed of it, and that of the opposite; both are 1 where it cannot be tested.
    ``flips``: the p value of what is claimed by the sign-flip test, None below five seeds."""

    what: str
    unit: str
    gains: tuple[tuple[int, float], ...]
    planned: Estimate | None
    later: Estimate | None
    missing: tuple[int, ...]
    p: float
    opposite: float
    flips: float | None


@dataclass(frozen=True)
class TestResult:
    """Combined tests: p values of the claim and its opposite, and the effect that decides each."""

    p: float
    opposite: float
    weakest: Effect
    against: Effect
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim. ``text``: the claim, worded for the rates of the study; ``depends``: it is shown at
    some rates, its opposite at others; ``p``, ``opposite``: p values of the claim and of its opposite; ``adjusted``:
    the one that decides, after Holm's correction; ``deciding``: the effect that the verdict rests on; ``effects``: all
    that were tested, by row and rate; ``others``: those that are described only; ``oracle``: what in the claim's rows
    a user would not have known."""

    claim: Claim
    text: str
    verdict: Literal["supported", "contradicted", "undecided"]
    reason: str
    depends: bool = False
    p: float = 1.0
    opposite: float = 1.0
    adjusted: float = 1.0
    deciding: Effect | None = None
    effects: tuple[Effect, ...] = ()
    others: tuple[Effect, ...] = ()
    oracle: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The verdict as it is printed."""
        return "depends on the rate" if self.depends and self.verdict == "contradicted" else self.verdict


def applicable(claims: Iterable[Claim], cells: Sequence[ReportCell]) -> list[Claim]:
    """The claims whose rows and noise rates are all in the study."""
    return [claim for claim in claims if not _scope(claim, cells).lacking]


def judge(claim: Claim, cells: Sequence[ReportCell], planned_seeds: Iterable[int]) -> Verdict:
    """What the cells of a study say of one claim alone."""
    return judge_all([claim], cells, planned_seeds)[0]


def judge_all(claims: Sequence[Claim], cells: Sequence[ReportCell], planned_seeds: Iterable[int]) -> list[Verdict]:
    """What the cells of a study (``tables.read_cells``) say of its claims, which are corrected for each other.

    Runs are paired by noise type, rate and seed; ``UserError`` where a pair was trained on different labels. Only
    ``planned_seeds``, those that the study file named first, decide, and a test waits until all of its runs have
    finished: p values then only ever fall from 1 to what they stay at, so that neither looking early nor adding seeds
    until a claim holds changes how often a false one is supported (at most ``level``). Fewer than three planned seeds
    leave a claim undecided.
    """
    planned = sorted(set(planned_seeds))
    scopes = [_scope(claim, cells) for claim in claims]
    tested = [
        None if scope.lacking else _outcome(claim, scope, _runs(scope.cells), planned)
        for claim, scope in zip(claims, scopes, strict=True)
    ]
    adjusted = statistics.holm([1.0 if test is None else test.p for test in tested])
    opposites = statistics.holm([1.0 if test is None else test.opposite for test in tested])
    return [
        Verdict(claim, claim.text, "undecided", scope.lacking)
        if test is None
        else _verdict(claim, scope, test, planned, p, opposite)
        for claim, scope, test, p, opposite in zip(claims, scopes, tested, adjusted, opposites, strict=True)
    ]


def _verdict(
    claim: Claim, scope: "Scope", test: "TestResult", planned: Sequence[int], p: float, opposite: float
) -> Verdict:
    """A verdict from the tests of a claim, with p values that are corrected for the study's other claims."""
    known = {cell["row"] for cell in scope.cells if cell.get("oracle")}
    oracle = tuple(row for row in dict.fromkeys(scope.rows) if row in known)
    oracle += ("best epoch on test",) if any(MEASURE[name].oracle for name in claim.measure) else ()
    name: Literal["supported", "contradicted", "undecided"]
    depends, deciding, adjusted = _depends(claim, scope, test), test.weakest, p
    if p <= claim.level:
        name, reason = "supported", f"shown: {deciding.what}"
    elif opposite <= claim.level:
        name, deciding, adjusted = "contradicted", test.against, opposite
        reason = f"the opposite is shown: {deciding.what}"
    else:
        name, reason = "undecided", _undecided(test, scope, planned)
    if depends:
        after = "" if name == "contradicted" else "; not after Holm's correction"
        reason = f"depends on the rate: {', '.join(map(_at, test.effects))}{after}"
    reason += "" if claim.level == LEVEL else f"; level {claim.level:g}"
    others = _others(claim, scope, planned)
    return Verdict(
        claim, _said(claim, scope), name, reason, depends, test.p, test.opposite, adjusted, deciding, test.effects,
        others, oracle,
    )  # fmt: skip


def _depends(claim: Claim, scope: "Scope", test: "TestResult") -> bool:
    """Whether a claim on every rate is shown at some and its opposite at others, each by Holm over the rates."""
    paired = claim.kind not in ("grows", *MANY) and claim.rates == "all" and len(scope.places) > 1
    shown = min(statistics.holm([effect.p for effect in test.effects]))
    against = min(statistics.holm([effect.opposite for effect in test.effects]))
    return paired and max(shown, against) <= claim.level


def _at(effect: Effect) -> str:
    return f"{effect.planned.mean:+.2f} at {effect.what}" if effect.planned else effect.what


def _said(claim: Claim, scope: "Scope") -> str:
    """The sentence of a claim; where the study has one noise rate it does not speak of every rate."""
    return claim.text.replace("every noise rate", _name(scope.places[0])) if len(scope.places) == 1 else claim.text


def _undecided(outcome: TestResult, scope: "Scope", planned: Sequence[int]) -> str:
    """Why neither the claim nor its opposite is shown."""
    waiting = [effect for effect in outcome.effects if effect.missing]
    if waiting:
        there = [cell for cell in scope.cells if (cell["noise_type"], cell["noise"]) in scope.places]
        done = [cell for cell in there if cell["status"] == "finished" and cell["seed"] in planned]
        of = len(scope.rows) * len(scope.places) * len(planned)
        more = f", and at {len(waiting) - 1} more" if len(waiting) > 1 else ""
        first = f"{waiting[0].what}, seed {joined(waiting[0].missing)}{more}"
        return f"{len(done)} of {of} cells have results; planned figures missing: {first}"
    n = outcome.weakest.planned.n if outcome.weakest.planned else 0
    if n < FEWEST:
        return ("no seed was planned", "n = 1: no interval", "n = 2: descriptive")[n]
    return f"neither is shown (opposite: p = {outcome.opposite:.2g}): {outcome.weakest.what}"


@dataclass(frozen=True)
class Scope:
    """What of a study a claim is about: rows, their cells, noise types and rates; what of it the study lacks. Places
    without noise are kept apart, except where the claim names them or is about the trend."""

    rows: tuple[str, ...]
    cells: list[ReportCell]
    places: list[Place]
    clean: list[Place]
    lacking: str


def _scope(claim: Claim, cells: Iterable[ReportCell]) -> Scope:
    cells = list(cells)
    rows = _rows(claim, cells)
    own = [cell for cell in cells if cell["row"] in rows and claim.noise_type in (None, cell["noise_type"])]
    places = sorted({(cell["noise_type"], cell["noise"]) for cell in own})
    places = [place for place in places if claim.noise is None or place[1] in claim.noise]
    clean = [(kind, noise) for kind, noise in places if not noise and kind.partition(":")[0] not in OWN_RATE]
    if claim.noise is not None or claim.kind == "grows" or len(clean) == len(places):
        clean = []
    places = [place for place in places if place not in clean]
    there, lacking = {cell["row"] for cell in own}, ""
    if missing := [row for row in rows if row not in there]:
        lacking = f"rows missing: {', '.join(missing)}"
    elif len(claim.rows) == 1 and len(rows) < 3:
        lacking = f"rows missing: {claim.rows[0]}=... at three values or more"
    elif len({noise for _, noise in places}) < len(set(claim.noise or [0])):
        lacking = "noise rates missing"
    elif claim.kind == "grows" and not _trends(places):
        lacking = "one noise rate: no trend"
    return Scope(rows, own, places, clean, lacking)


def _rows(claim: Claim, cells: Iterable[ReportCell]) -> tuple[str, ...]:
    """The rows of a claim; of one that names a setting, its variants in the order of the setting."""
    if len(claim.rows) > 1 or claim.against:
        return claim.rows + claim.against
    start = f"{claim.rows[0]}="
    found = {row.removeprefix(start): row for row in {cell["row"] for cell in cells} if row.startswith(start)}
    return tuple(found[value] for value in sorted(filter(NUMBER.fullmatch, found), key=float))


def _trends(places: Iterable[Place]) -> dict[str, list[Place]]:
    """The places of each noise type that comes at two rates or more."""
    types: dict[str, list[Place]] = {}
    for place in places:
        types.setdefault(place[0], []).append(place)
    return {name: found for name, found in types.items() if len(found) > 1}


def _runs(cells: Iterable[ReportCell]) -> Runs:
    runs: Runs = {}
    for cell in cells:
        if cell["status"] == "finished":
            seeds = runs.setdefault((cell["row"], cell["noise_type"], cell["noise"]), {})
            if cell["seed"] in seeds:
                raise UserError(f"{cell['row']}, {column_name(cell)}, seed {cell['seed']} is there twice: give one")
            seeds[cell["seed"]] = cell
    return runs


def _outcome(claim: Claim, scope: Scope, runs: Runs, planned: Sequence[int]) -> TestResult:
    """The tests of a claim, put together as its sentence says."""
    rows, places, over = scope.rows, scope.places, _every if claim.rates == "all" else _some

    def effect(a: str, b: str, place: Place, what: str = "") -> TestResult:
        return _effect(claim, what + _name(place), _gains(claim, runs, a, b, place), planned)

    if claim.kind == "grows":
        trends = _trends(places)
        return _every([_growth(claim, runs, rows, name, trends[name], planned) for name in trends])
    if claim.kind == "correlates":
        return over([_correlation(claim, runs, place, planned) for place in places])
    if claim.kind == "some_beats" and claim.against:
        return _some(
            [
                over([_every([effect(a, b, place, f"{a} over {b}, ") for b in claim.against]) for place in places])
                for a in claim.rows
            ]
        )
    if claim.kind == "some_beats":
        return _some([over([effect(a, rows[-1], place, f"{a}, ") for place in places]) for a in rows[:-1]])
    if claim.kind == "knife_edge":
        edges = [
            [
                _every([effect(best, other, place, f"{best} over {other}, ") for other in rows if other != best])
                for best in rows[1:-1]
            ]
            for place in places
        ]
        return over([_some(candidates) for candidates in edges])
    return over([effect(rows[0], rows[1], place) for place in places])


def _name(place: Place) -> str:
    return column_name({"noise_type": place[0], "noise": place[1]})


def _every(parts: Sequence[TestResult]) -> TestResult:
    """Each part must hold: intersection-union. Its opposite: one part at least is contradicted; by Simes rather than
    Holm, so that where all opposites are shown at full level, theirs is too."""
    return TestResult(
        statistics.intersection_union([part.p for part in parts]),
        statistics.simes([part.opposite for part in parts]),
        max(parts, key=lambda part: part.p).weakest,
        min(parts, key=lambda part: part.opposite).against,
        tuple(effect for part in parts for effect in part.effects),
    )


def _some(parts: Sequence[TestResult]) -> TestResult:
    """One part at least must hold: Holm. Its opposite: each part is contradicted."""
    return TestResult(
        min(statistics.holm([part.p for part in parts])),
        statistics.intersection_union([part.opposite for part in parts]),
        min(parts, key=lambda part: part.p).weakest,
        max(parts, key=lambda part: part.opposite).against,
        tuple(effect for part in parts for effect in part.effects),
    )


def _gains(claim: Claim, runs: Runs, a: str, b: str, place: Place, unit: str = "points") -> dict[int, float]:
    """By how much a is better than b, for each seed that both have finished."""
    ours, theirs = runs.get((a, *place), {}), runs.get((b, *place), {})
    sign = 1 if claim.direction == "higher" else -1
    gains = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        if ours[seed]["labels"] != theirs[seed]["labels"]:
            raise UserError(
                f"{a} and {b} were trained on different labels at {_name(place)}, seed {seed}: they are no pair;"
                " give them the same noise_seed"
            )
        x, y = ours[seed].get(claim.measure[0]), theirs[seed].get(claim.measure[1])
        if x is not None and y is not None:
            gains[seed] = sign * round(_scaled(x, unit) - _scaled(y, unit), 9)  # floating point adds no difference
    return gains


def _scaled(share: float, unit: str) -> float:
    if unit == "points":
        return 100 * share
    return math.log(max(share, LEAST) / max(1 - share, LEAST))


def _correlation(claim: Claim, runs: Runs, place: Place, planned: Sequence[int]) -> TestResult:
    """Over the pairs of rows, the gain against the second measure of the row compared with: its rank correlation in
    each seed that all have finished, none where one of the two is the same for all pairs. What is told and tested is
    that of the means over the planned seeds, over the pairs, so that it speaks of other such rows, not of other seeds;
    it has no interval."""
    gain = claim.model_copy(update={"measure": (claim.measure[0],) * 2})
    gains = [_gains(gain, runs, a, b, place) for a, b in zip(claim.rows, claim.against, strict=True)]
    found, pairs = {}, []
    for seed in sorted(set.intersection(*map(set, gains))):
        shares = [runs[b, *place][seed].get(claim.measure[1]) for b in claim.against]
        known = [share for share in shares if share is not None]
        ours = [each[seed] for each in gains]
        if len(known) == len(ours) and min(len(set(ours)), len(set(known))) > 1:
            found[seed] = round(float(stats.spearmanr(ours, known).statistic), 9)
            pairs += [(ours, known)] if seed in planned else []
    whole = _effect(claim, _name(place), found, planned, "rank correlation (p by permuting the rows)").weakest
    if pairs:
        ours, known = np.mean(pairs, axis=0)
        together = Estimate(len(pairs), float(stats.spearmanr(ours, known).statistic), None, None, None)
        p, opposite = statistics.goes_with(ours, known), statistics.goes_with(-ours, known)
        p, opposite = (1.0, 1.0) if whole.missing or len(planned) < FEWEST else (p, opposite)
        whole = replace(whole, planned=together, later=None, p=p, opposite=opposite, flips=None)
    return TestResult(whole.p, whole.opposite, whole, whole, (whole,))


def _growth(
    claim: Claim,
    runs: Runs,
    rows: Sequence[str],
    name: str,
    places: Sequence[Place],
    planned: Sequence[int],
    unit: str = "points",
) -> TestResult:
    """The slope of the gain over the rates of one noise type, for each seed."""
    gains = [_gains(claim, runs, rows[0], rows[1], place, unit) for place in places]
    seeds = sorted(set.intersection(*map(set, gains)))
    whole = np.array([[gain[seed] for gain in gains] for seed in seeds]).reshape(len(seeds), len(places))
    found = statistics.slopes(whole, [noise for _, noise in places])
    growth = {seed: round(RATE_STEP * float(slope), 9) for seed, slope in zip(seeds, found, strict=True)}
    what = f"slope over the {len(places)} rates of {name}"
    return _effect(claim, what, growth, planned, unit=f"{unit} per 10 % noise")


def _others(claim: Claim, scope: Scope, planned: Sequence[int]) -> tuple[Effect, ...]:
    """What a claim of two rows does not test: the effect without noise; of a growing gain the gain at each rate, and
    its growth in logits, in which a point counts the more the closer it is to 0 or 100 %."""
    if claim.kind in MANY:
        return ()
    runs, places = _runs(scope.cells), scope.places if claim.kind == "grows" else scope.clean
    a, b = scope.rows
    found = [_effect(claim, _name(place), _gains(claim, runs, a, b, place), planned) for place in places]
    if claim.kind == "grows":
        trends = _trends(places)
        found += [_growth(claim, runs, scope.rows, name, trends[name], planned, "logits") for name in trends]
    return tuple(result.weakest for result in found)


def _effect(
    claim: Claim, what: str, gains: Mapping[int, float], planned: Sequence[int], unit: str = "points"
) -> TestResult:
    """One test."""
    values = [gains[seed] for seed in planned if seed in gains]
    missing = tuple(seed for seed in planned if seed not in gains)
    p, opposite = (1.0, 1.0) if missing or len(planned) < FEWEST else _tests(claim, values)
    effect = Effect(
        what,
        unit,
        tuple(gains.items()),
        statistics.estimate(values, INTERVAL) if values else None,
        statistics.estimate(list(gains.values()), INTERVAL) if len(gains) > len(values) else None,
        missing,
        p,
        opposite,
        _flips(claim, values) if len(values) >= FLIPS and not missing and claim.kind not in CLAIM_KINDS else None,
    )
    return TestResult(p, opposite, effect, effect, (effect,))


def _tests(claim: Claim, values: Sequence[float]) -> tuple[float, float]:
    """p values of what a claim says of one effect, and of the opposite."""
    if claim.kind in CLAIM_KINDS:
        return CLAIM_KINDS[claim.kind](values, claim.margin)
    if claim.kind == "equal":
        return statistics.equivalent(values, claim.margin), statistics.different(values, claim.margin)
    if claim.kind == "not_worse":
        return statistics.noninferior(values, claim.margin), statistics.less(values, -claim.margin)
    return statistics.greater(values, claim.margin), statistics.less(values, claim.margin)


def _flips(claim: Claim, values: Sequence[float]) -> float:
    """p value of what a claim says of one effect, by the sign-flip test."""
    if claim.kind == "equal":
        return max(statistics.sign_flip(side, -claim.margin) for side in (values, [-v for v in values]))
    return statistics.sign_flip(values, -claim.margin if claim.kind == "not_worse" else claim.margin)


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as they are printed, all strings. Where seeds were added later, a second line describes the deciding
    effect with all of them."""
    lines = []
    holm = f"p (Holm over {len(verdicts)})"
    for number, verdict in enumerate(verdicts, 1):
        deciding = verdict.deciding
        known = f" (oracle: {', '.join(verdict.oracle)})" if verdict.oracle else ""
        numbers = sorted({effect.planned.n if effect.planned else 0 for effect in verdict.effects})
        n = " to ".join(str(number) for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]))
        p = verdict.opposite if verdict.verdict == "contradicted" else verdict.p
        shown = ("", "") if p == 1 else (f"{p:.2g}", f"{verdict.adjusted:.2g}")
        effect = _text(deciding, deciding.planned) if deciding else ""
        lines.append([str(number), verdict.text + known, verdict.name, effect, n, *shown, verdict.reason])
        if deciding and deciding.later:
            added = deciding.later.n - (deciding.planned.n if deciding.planned else 0)
            reason = f"{added} of the seeds added later, {deciding.what}: no part of the verdict"
            effect = _text(deciding, deciding.later)
            lines.append(["", "", "descriptive", effect, str(deciding.later.n), "", "", reason])
    columns = ["no.", "claim", "verdict", "effect [95 % interval]", "n", "p", holm, "reason"]
    return pd.DataFrame(lines, columns=columns)


def effect_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Every effect that the claims rest on, as far as there are runs, with each seed's difference; those that are no
    part of a test are marked. The sign-flip test has its column where a study has seeds enough."""
    lines = []
    for number, verdict in enumerate(verdicts, 1):
        for effect in (*verdict.effects, *verdict.others):
            if not effect.gains and effect.planned is None:
                continue
            tested = effect in verdict.effects
            p = ["" if not tested or effect.p == 1 == effect.opposite else f"{effect.p:.2g}"]
            p.append("" if not tested or effect.flips is None else f"{effect.flips:.2g}")
            seeds = ", ".join(f"{gain:+.2f}" for _, gain in effect.gains)
            what = effect.what + ("" if tested else " (described)")
            lines.append([str(number), what, _text(effect, effect.planned), seeds, *p])
    columns = ["no.", "where", "effect [95 % interval]", "seeds", "p", "p (sign flips)"]
    frame = pd.DataFrame(lines, columns=columns)
    return frame if frame["p (sign flips)"].any() else frame.drop(columns="p (sign flips)")


def _text(effect: Effect, found: Estimate | None) -> str:
    """`+8.83 [+8.22, +9.44] points`; one seed has no interval."""
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{interval} {effect.unit}"
