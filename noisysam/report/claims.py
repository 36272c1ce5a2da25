"""Claims about the rows of a study, and what its runs say of them: supported, contradicted or undecided."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from noisysam.core.errors import UserError
from noisysam.report import statistics
from noisysam.report.statistics import Estimate
from noisysam.report.tables import Cell, column_name, joined
from noisysam.runs.measures import MEASURE
from noisysam.studies.claims import LEVEL, Claim

FEWEST = 3  # planned seeds that can decide; two are descriptive, one has no interval


RATE_STEP = 0.1  # of noise, for which the growth of a gain is told


NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


RULES = (
    "Effects are differences in percentage points between runs with the same noise, seed and label file; [ ] is their t"
    " interval with coverage 1 - 2 x level. Tests are one-sided at a level of 5 % unless the reason names another, so"
    " intervals cover 90 %. A claim is supported where all of it is shown, contradicted where its opposite is shown,"
    " undecided otherwise. What must hold at every rate is tested at full level at each (intersection-union); what must"
    " hold for some row or rate by Holm; an opposite at one of several rates by Simes. The effect printed is the one"
    " that decides. Only the seeds that the study planned first count, three or more, all of them finished; with seeds"
    " added later, a second line describes."
)


Place = tuple[str, float]  # noise type, nominal rate


Runs = dict[tuple[str, str, float], dict[int, Cell]]  # row, noise type, rate -> seed -> run


@dataclass(frozen=True)
class Effect:
    """One difference that a claim rests on: ``planned`` over the seeds that were planned first (None: no pair has
    finished), ``later`` with those added since (None: none were), the planned seeds that are ``missing``, the p value
    of what is claimed of it, and that of the opposite; both are 1 where it cannot be tested."""

    what: str
    planned: Estimate | None
    later: Estimate | None
    missing: tuple[int, ...]
    p: float
    opposite: float


@dataclass(frozen=True)
class TestResult:
    """Tests taken together: p values of the whole, and the effect that decides each."""

    p: float
    opposite: float
    weakest: Effect
    against: Effect
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Verdict:
    """What a study says of a claim. ``deciding``: the effect that it hangs on; ``effects``: all of them, by row and
    rate; ``p``, ``opposite``: p values of the claim and of its opposite; ``oracle``: what of it knew more than a user
    would have."""

    claim: Claim
    verdict: Literal["supported", "contradicted", "undecided"]
    reason: str
    p: float = 1.0
    opposite: float = 1.0
    deciding: Effect | None = None
    effects: tuple[Effect, ...] = ()
    oracle: tuple[str, ...] = ()


def applicable(claims: Iterable[Claim], cells: Sequence[Cell]) -> list[Claim]:
    """The claims whose rows and noise rates are all in the study."""
    return [claim for claim in claims if not _scope(claim, cells).lacking]


def judge(claim: Claim, cells: Sequence[Cell], planned_seeds: Iterable[int]) -> Verdict:
    """What the cells of a study (``tables.read_cells``) say of a claim.

    Runs are paired by noise type, rate and seed; ``UserError`` where a pair was trained on different labels. Only
    ``planned_seeds``, those that the study file named first, decide, and a test waits until all of its runs have
    finished: p values then only ever fall from 1 to what they stay at, so that neither looking early nor adding seeds
    until a claim holds changes how often a false one is supported (at most ``level``). Fewer than three planned seeds
    leave a claim undecided.
    """
    scope = _scope(claim, cells)
    if scope.lacking:
        return Verdict(claim, "undecided", scope.lacking)
    outcome = _outcome(claim, scope, _runs(scope.cells), sorted(set(planned_seeds)))
    known = {cell["row"] for cell in scope.cells if cell.get("oracle")}
    oracle = tuple(row for row in dict.fromkeys(scope.rows) if row in known)
    oracle += ("best epoch on test",) if any(MEASURE[name].oracle for name in claim.measure) else ()
    name: Literal["supported", "contradicted", "undecided"]
    if outcome.p <= claim.level:
        name, deciding = "supported", outcome.weakest
        reason = f"shown: p = {outcome.p:.2g}, {deciding.what}"
    elif outcome.opposite <= claim.level:
        name, deciding = "contradicted", outcome.against
        reason = f"the opposite is shown: p = {outcome.opposite:.2g}, {deciding.what}"
    else:
        name, deciding, reason = "undecided", outcome.weakest, _undecided(outcome)
    reason += "" if claim.level == LEVEL else f"; level {claim.level:g}"
    return Verdict(claim, name, reason, outcome.p, outcome.opposite, deciding, outcome.effects, oracle)


def _undecided(outcome: TestResult) -> str:
    """Why neither the claim nor its opposite is shown."""
    waiting = [effect for effect in outcome.effects if effect.missing]
    if waiting:
        more = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        return f"planned figures missing: {waiting[0].what}, seed {joined(waiting[0].missing)}{more}"
    n = outcome.weakest.planned.n if outcome.weakest.planned else 0
    if n < FEWEST:
        return ("no seed was planned", "n = 1: no interval", "n = 2: descriptive")[n]
    both = f"p = {outcome.p:.2g}, opposite {outcome.opposite:.2g}"
    return f"neither is shown ({both}): the interval is wide, {outcome.weakest.what}"


@dataclass(frozen=True)
class Scope:
    """What of a study a claim is about: rows, their cells, noise types and rates; what of it the study lacks."""

    rows: tuple[str, ...]
    cells: list[Cell]
    places: list[Place]
    lacking: str


def _scope(claim: Claim, cells: Iterable[Cell]) -> Scope:
    cells = list(cells)
    rows = _rows(claim, cells)
    own = [cell for cell in cells if cell["row"] in rows and claim.noise_type in (None, cell["noise_type"])]
    places = sorted({(cell["noise_type"], cell["noise"]) for cell in own})
    places = [place for place in places if claim.noise is None or place[1] in claim.noise]
    there, lacking = {cell["row"] for cell in own}, ""
    if missing := [row for row in rows if row not in there]:
        lacking = f"rows missing: {', '.join(missing)}"
    elif len(claim.rows) == 1 and len(rows) < 3:
        lacking = f"rows missing: {claim.rows[0]}=... at three values or more"
    elif len({noise for _, noise in places}) < len(set(claim.noise or [0])):
        lacking = "noise rates missing"
    elif claim.kind == "grows" and not _trends(places):
        lacking = "one noise rate: no trend"
    return Scope(rows, own, places, lacking)


def _rows(claim: Claim, cells: Iterable[Cell]) -> tuple[str, ...]:
    """The rows of a claim; of one that names a setting, its variants in the order of the setting."""
    if len(claim.rows) > 1:
        return claim.rows
    start = f"{claim.rows[0]}="
    found = {row.removeprefix(start): row for row in {cell["row"] for cell in cells} if row.startswith(start)}
    return tuple(found[value] for value in sorted(filter(NUMBER.fullmatch, found), key=float))


def _trends(places: Iterable[Place]) -> dict[str, list[Place]]:
    """The places of each noise type that comes at two rates or more."""
    types: dict[str, list[Place]] = {}
    for place in places:
        types.setdefault(place[0], []).append(place)
    return {name: found for name, found in types.items() if len(found) > 1}


def _runs(cells: Iterable[Cell]) -> Runs:
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


def _gains(claim: Claim, runs: Runs, a: str, b: str, place: Place) -> dict[int, float]:
    """By how many points a is better than b, for each seed that both have finished."""
    ours, theirs = runs.get((a, *place), {}), runs.get((b, *place), {})
    sign = 100 if claim.direction == "higher" else -100
    gains = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        if ours[seed]["labels"] != theirs[seed]["labels"]:
            raise UserError(
                f"{a} and {b} were trained on different labels at {_name(place)}, seed {seed}: they are no pair;"
                " give them the same noise_seed"
            )
        x, y = ours[seed].get(claim.measure[0]), theirs[seed].get(claim.measure[1])
        if x is not None and y is not None:
            gains[seed] = round(sign * (x - y), 9)  # what floating point adds is no difference
    return gains


def _growth(
    claim: Claim, runs: Runs, rows: Sequence[str], name: str, places: Sequence[Place], planned: Sequence[int]
) -> TestResult:
    """The slope of the gain over the rates of one noise type, for each seed."""
    gains = [_gains(claim, runs, rows[0], rows[1], place) for place in places]
    seeds = sorted(set.intersection(*map(set, gains)))
    whole = np.array([[gain[seed] for gain in gains] for seed in seeds]).reshape(len(seeds), len(places))
    found = statistics.slopes(whole, [noise for _, noise in places])
    growth = {seed: round(RATE_STEP * float(slope), 9) for seed, slope in zip(seeds, found, strict=True)}
    return _effect(claim, f"slope over the {len(places)} rates of {name}", growth, planned)


def _effect(claim: Claim, what: str, gains: Mapping[int, float], planned: Sequence[int]) -> TestResult:
    """One test."""
    values = [gains[seed] for seed in planned if seed in gains]
    missing = tuple(seed for seed in planned if seed not in gains)
    p, opposite = (1.0, 1.0) if missing or len(planned) < FEWEST else _tests(claim, values)
    effect = Effect(
        what,
        statistics.estimate(values, claim.level) if values else None,
        statistics.estimate(list(gains.values()), claim.level) if len(gains) > len(values) else None,
        missing,
        p,
        opposite,
    )
    return TestResult(p, opposite, effect, effect, (effect,))


def _tests(claim: Claim, values: Sequence[float]) -> tuple[float, float]:
    """p values of what a claim says of one effect, and of the opposite."""
    if claim.kind == "equal":
        return statistics.equivalent(values, claim.margin), statistics.different(values, claim.margin)
    if claim.kind == "not_worse":
        return statistics.noninferior(values, claim.margin), statistics.less(values, -claim.margin)
    return statistics.greater(values, claim.margin), statistics.less(values, claim.margin)


def verdict_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """Verdicts as they are printed, all strings: claim, verdict, effect [interval], n, reason. Where seeds were added
    later, a second line describes the deciding effect with all of them."""
    lines = []
    for verdict in verdicts:
        claim, deciding = verdict.claim, verdict.deciding
        known = f" (oracle: {', '.join(verdict.oracle)})" if verdict.oracle else ""
        numbers = sorted({effect.planned.n if effect.planned else 0 for effect in verdict.effects})
        n = " to ".join(str(number) for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]))
        lines.append([claim.text + known, verdict.verdict, _text(claim, deciding.planned if deciding else None), n])
        lines[-1].append(verdict.reason)
        if deciding and deciding.later:
            added = deciding.later.n - (deciding.planned.n if deciding.planned else 0)
            reason = f"{added} of the seeds added later, {deciding.what}: no part of the verdict"
            lines.append(["", "descriptive", _text(claim, deciding.later), str(deciding.later.n), reason])
    return pd.DataFrame(lines, columns=["claim", "verdict", "effect [interval]", "n", "reason"])


def _text(claim: Claim, found: Estimate | None) -> str:
    """`+8.83 [+8.22, +9.44] points`; one seed has no interval."""
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{interval} {claim.unit}"
