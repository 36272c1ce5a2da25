"""How often are verdicts wrong? Measured on simulated studies whose truth is known.

    python -m noisysam.bench.verdicts

Each study has 3, 4 or 5 planned seeds. An accuracy is the sum of its true value, an effect of the seed that all rows
share, and noise of the run that grows with the noise rate. Where the column `right` is empty, the truth lies on the
boundary between true and false, the worst case for both wrong verdicts. Claims are judged on the planned seeds; for
some of them a simulated researcher also looks before all planned seeds are there, and then adds seeds, up to 20, until
the claim is supported. The last line counts added seeds, which verdicts do not. Prints shares in percent with 99 %
Clopper-Pearson intervals; fails if an interval of a wrong verdict lies above 5 %. About two minutes on one core.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from noisysam.report.claims import judge
from noisysam.studies.claims import Claim

LEVEL = 0.05
RATES = (0.2, 0.4, 0.8)
RUN_SD = (0.5, 1.0, 2.0)  # points, at each rate
SEED_SD = 3.0  # points
SELECTED = 10.0  # points that the figure `selected` is above `last`
COLUMNS = ("kind", "truth", "false supported", "looking and adding", "false contradicted", "right")
LOOKS = (2, 3, 4, 5, 8, 13, 20)


@dataclass(frozen=True)
class Scenario:
    """A claim, the true accuracy of each row at each rate (points), and whether the claim is then true; sought: on the
    boundary, and the researcher adds seeds. ``learnt``: the share of wrong labels that each row learns, which a claim
    of correlation is about; rows that it does not name draw one for each study."""

    claim: Claim
    what: str
    means: dict[str, tuple[float, float, float]]
    truth: Literal["sought", "edge", "true", "false"] = "edge"
    learnt: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Tally:
    """Counts of each verdict on the planned seeds, and of `supported` by looking and adding seeds."""

    supported: int = 0
    contradicted: int = 0
    added: int = 0


def claim(kind: Any, rows: Sequence[str] = ("A", "B"), **fields: Any) -> Claim:
    return Claim(text=kind, kind=kind, rows=tuple(rows), **fields)


BASE = (70.0, 60.0, 40.0)


def rows(**gains: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
    """B, and rows that are better than B by the given points."""
    above = {row: (BASE[0] + g[0], BASE[1] + g[1], BASE[2] + g[2]) for row, g in gains.items()}
    return {**above, "B": BASE}


def profile(*falls: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
    """Rows r0, r1, ... that are below 60 by the given points."""
    return {f"r{k}": (60 - fall[0], 60 - fall[1], 60 - fall[2]) for k, fall in enumerate(falls)}


FLAT, FAR = (0.0, 0.0, 0.0), (30.0, 30.0, 30.0)
MANY = ("A1", "A2", "A3", "A4", "B")
PAIRS = {f"A{k}": (2.0 * k, 4.0 * k, 6.0 * k) for k in range(6)} | {f"B{k}": FLAT for k in range(6)}  # gains
GOES = claim(
    "correlates", [f"A{k}" for k in range(6)], against=tuple(f"B{k}" for k in range(6)),
    measure=("last", "memorised"), noise=(0.4,),
)  # fmt: skip
RADII = ("r0", "r1", "r2", "r3", "r4")
EARLY = claim("greater", measure=("last", "selected"))
EDGE = claim("knife_edge", RADII, margin=5)
SCENARIOS = (
    Scenario(claim("greater"), "no gain at one rate, much at others", rows(A=(9, 9, 0)), "sought"),
    Scenario(claim("greater"), "no gain at any rate", rows(A=FLAT)),
    Scenario(claim("greater"), "a gain of 6 points", rows(A=(6, 6, 6)), "true"),
    Scenario(claim("greater"), "a loss of 6 points at one rate", rows(A=(6, -6, 6)), "false"),
    Scenario(claim("greater", rates="some"), "at some rate; no gain at any", rows(A=FLAT), "sought"),
    Scenario(claim("greater", rates="some"), "at some rate; no gain at one, loss at others", rows(A=(-9, 0, -9))),
    Scenario(EARLY, "two measures; no gain", rows(A=(19, 10, 19)), "sought"),
    Scenario(claim("not_worse", margin=1), "worse by the margin at one rate", rows(A=(5, 5, -1)), "sought"),
    Scenario(claim("not_worse", margin=1), "worse by the margin at every rate", rows(A=(-1, -1, -1))),
    Scenario(claim("not_worse", margin=1), "better by 4 points", rows(A=(4, 4, 4)), "true"),
    Scenario(claim("equal", margin=5), "apart by the margin at one rate", rows(A=(0, 5, 0)), "sought"),
    Scenario(claim("equal", margin=5), "apart by the margin at every rate", rows(A=(5, -5, 5))),
    Scenario(claim("equal", margin=0.01), "a margin far below the noise", rows(A=FLAT)),
    Scenario(claim("equal", margin=5), "no difference", rows(A=FLAT), "true"),
    Scenario(claim("equal", margin=5), "apart by twice the margin at one rate", rows(A=(0, 10, 0)), "false"),
    Scenario(claim("grows"), "the same gain at every rate", rows(A=(5, 5, 5)), "sought"),
    Scenario(claim("grows"), "gains without a slope", rows(A=(5, 0, 4))),
    Scenario(claim("grows"), "gains from 0 to 12", rows(A=(0, 4, 12)), "true"),
    Scenario(claim("grows"), "gains from 12 to 0", rows(A=(12, 8, 0)), "false"),
    Scenario(
        claim("some_beats", MANY), "each candidate without gain at a rate",
        rows(A1=(9, 9, 0), A2=(9, 0, 9), A3=(0, 9, 9), A4=(9, 0, 9)),
    ),
    Scenario(
        claim("some_beats", MANY, rates="some"), "at some rate; no candidate has a gain",
        rows(A1=FLAT, A2=FLAT, A3=FLAT, A4=FLAT), "sought",
    ),
    Scenario(
        claim("some_beats", MANY), "one candidate without gain, others worse",
        rows(A1=FLAT, A2=(-9, -9, -9), A3=(-9, -9, -9), A4=(-9, -9, -9)),
    ),
    Scenario(
        claim("some_beats", MANY), "one candidate with 9 points",
        rows(A1=FLAT, A2=(9, 9, 9), A3=FLAT, A4=FLAT), "true",
    ),
    Scenario(GOES, "gains of six rows, and wrong labels that have nothing to do with them", rows(**PAIRS), "sought"),
    Scenario(
        GOES, "gains that grow with the wrong labels", rows(**PAIRS), "true",
        {f"{side}{k}": 0.1 + 0.1 * k for side in "AB" for k in range(6)},
    ),
    Scenario(
        GOES, "gains that fall with the wrong labels", rows(**PAIRS), "false",
        {f"{side}{k}": 0.7 - 0.1 * k for side in "AB" for k in range(6)},
    ),
    Scenario(EDGE, "one row behind by the margin at one rate", profile(FAR, FLAT, (30, 5, 30), FAR, FAR), "sought"),
    Scenario(EDGE, "all rows behind by the margin", profile((5, 5, 5), (5, 5, 5), FLAT, (5, 5, 5), (5, 5, 5))),
    Scenario(claim("knife_edge", RADII, margin=0.01), "two best rows", profile(FAR, FLAT, FLAT, FAR, FAR)),
    Scenario(EDGE, "20 points on both sides", profile(FAR, (20, 20, 20), FLAT, (20, 20, 20), FAR), "true"),
    Scenario(EDGE, "the best at the end", profile(FLAT, FAR, FAR, FAR, FAR), "false"),
)  # fmt: skip


def simulate(scenario: Scenario, studies: int, rng: np.random.Generator, added_count: bool = False) -> Tally:
    """Judge simulated studies of a scenario. ``added_count``: treat all seeds as planned."""
    tally = Tally()
    names, seeds = list(scenario.means), range(LOOKS[-1])
    true = np.array([scenario.means[row] for row in names])  # rows, rates
    cells: list[dict[str, Any]] = [
        {"row": row, "noise_type": "symmetric", "noise": rate, "seed": seed, "labels": f"{rate}-{seed}"}
        for seed in seeds for row in names for rate in RATES
    ]  # fmt: skip
    for study in range(studies):
        shared = SEED_SD * rng.standard_normal((len(seeds), 1, len(RATES)))
        values = true + shared + np.array(RUN_SD) * rng.standard_normal((len(seeds), *true.shape))
        for cell, value in zip(cells, values.ravel().tolist(), strict=True):
            cell.update(status="finished", last=value / 100, selected=(value + SELECTED) / 100)
        if scenario.claim.kind == "correlates":
            shares = {row: rng.uniform(0.1, 0.7) for row in names} | dict(scenario.learnt)
            for cell in cells:
                cell["memorised"] = shares[cell["row"]] + 0.01 * rng.standard_normal()
        planned = 3 + study % 3
        once, held = "", False
        for look in LOOKS if scenario.truth == "sought" else [planned]:
            there = cells[: look * true.size]
            verdict = judge(scenario.claim, there, range(look if added_count else planned)).verdict
            once = verdict if look == planned else once
            held = held or verdict == "supported"
        tally.supported += once == "supported"
        tally.contradicted += once == "contradicted"
        tally.added += held
    return tally


def share(count: int, studies: int) -> str:
    """`4.9 [4.2, 5.7]`, in percent."""
    interval = binomtest(count, studies).proportion_ci(0.99, "exact")
    return f"{100 * count / studies:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def wrong(scenario: Scenario, tally: Tally) -> dict[str, int]:
    """Studies with each wrong verdict that the scenario allows."""
    counts = {}
    if scenario.truth != "true":
        counts["false supported"] = tally.supported
    if scenario.truth == "sought":
        counts["looking and adding"] = tally.added
    if scenario.truth != "false":
        counts["false contradicted"] = tally.contradicted
    return counts


def table(lines: Sequence[dict[str, str]]) -> None:
    columns = [name for name in COLUMNS if any(name in line for line in lines)]
    print(pd.DataFrame(lines, columns=columns).fillna("").to_markdown(index=False, disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=5000, help="studies of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lines, failed = [], False
    kinds: dict[str, dict[str, tuple[int, int]]] = {}  # wrong verdicts, studies
    for number, scenario in enumerate(SCENARIOS):
        tally = simulate(scenario, args.studies, np.random.default_rng([args.seed, number]))
        right = {"true": tally.supported, "false": tally.contradicted}.get(scenario.truth)
        counts = wrong(scenario, tally)
        failed |= any(binomtest(k, args.studies).proportion_ci(0.99, "exact").low > LEVEL for k in counts.values())
        kind = kinds.setdefault(scenario.claim.kind, {})
        for name, count in counts.items():
            before = kind.get(name, (0, 0))
            kind[name] = before[0] + count, before[1] + args.studies
        lines.append(
            {
                "kind": scenario.claim.kind,
                "truth": scenario.what,
                **{name: share(count, args.studies) for name, count in counts.items()},
                "right": "" if right is None else share(right, args.studies),
            }
        )
        print(".", end="", flush=True, file=sys.stderr)
    naive = simulate(SCENARIOS[0], args.studies, np.random.default_rng([args.seed, len(SCENARIOS)]), added_count=True)
    lines.append(
        {
            "kind": "greater",
            "truth": f"{SCENARIOS[0].what}; if added seeds counted",
            "looking and adding": share(naive.added, args.studies),
        }
    )
    print(f"Wrong verdicts of each kind, percent of its studies ({args.studies} a scenario)\n")
    table([{"kind": k, **{name: share(*both) for name, both in kind.items()}} for k, kind in kinds.items()])
    print("\nScenario by scenario\n")
    table(lines)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
