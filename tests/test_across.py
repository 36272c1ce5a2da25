"""Rows ranked over all cells: by hand, against closed forms, and intervals by simulated studies."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from noisysam.report import across
from noisysam.report.across import block, bootstrap, ranks, sections, share_of_wins, wins

ROWS = ("SGD", "SAM", "GCE", "ELR", "Mixup")


def cell(row: str, noise: float, seed: int, last: float, **changes: Any) -> dict[str, Any]:
    plain = {"method": "ce", "opt": "sgd"} if row == "SGD" else {"method": row, "opt": "sgd"}
    return {"row": row, "noise_type": "symmetric", "noise": noise, "seed": seed, "status": "finished", "last": last,
            **plain, **changes}  # fmt: skip


def study(seeds: int = 5, rates: tuple[float, ...] = (0.4, 0.8), rows: tuple[str, ...] = ROWS) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        cell(row, noise, seed, 0.5 + 0.05 * number + 0.05 * float(rng.normal()))
        for seed in range(seeds)
        for noise in rates
        for number, row in enumerate(rows)
    ]


def test_ranks_and_wins_by_hand() -> None:
    scores = np.array([[[0.5, 0.7, 0.5, 0.2], [0.1, 0.2, 0.3, 0.4]]])
    assert ranks(scores).tolist() == [[[2.5, 1, 2.5, 4], [4, 3, 2, 1]]]
    assert wins(scores, 0).tolist() == [[[0.5, 1, 0.5, 0], [0.5, 1, 1, 1]]]


def test_probability_of_improvement_is_rliables_where_cells_are_unpaired() -> None:
    """Over all pairs of runs the mean of wins is the Mann-Whitney statistic, as in rliable's metric."""
    x, y = np.random.default_rng(1).normal(size=(2, 7))
    pairs = np.array([[[b, a] for a in x for b in y]])
    expected = stats.mannwhitneyu(x, y).statistic / 49
    assert wins(pairs, 0).mean(axis=(0, 1))[1] == pytest.approx(expected)


def test_the_block_takes_the_most_cells() -> None:
    """Rows that lack a seed are left out, unless fewer seeds of more rows are more."""
    whole = study(3, rows=(*ROWS, "PES"))
    some = [c for c in whole if c["row"] != "PES" or c["seed"] == 0]
    found = block(some)
    assert found is not None
    assert (found.rows, found.seeds, found.lacking) == (ROWS, (0, 1, 2), ("PES",))
    assert found.scores.shape == (2, 3, 5)
    assert found.scores[1, 2, 0] == next(c["last"] for c in whole if (c["seed"], c["noise"]) == (2, 0.8))
    four = study(3, (0.2, 0.4, 0.6, 0.8), (*ROWS, "PES"))
    partly = [c for c in four if c["seed"] == 0 or c["row"] == "SGD"]
    found = block(partly)
    assert found is not None
    assert (len(found.rows), found.seeds) == (6, (0,))
    assert block([c for c in whole if c["row"] in ROWS[:4]]) is None
    assert block([c for c in whole if c["noise"] == 0.4]) is None
    assert block([c for c in whole if c["seed"] == 0]) is None


def test_bootstrap_against_the_closed_form() -> None:
    """With many seeds it is the t interval of a stratified mean, with Satterthwaite's degrees of freedom."""
    values = np.random.default_rng(3).normal(size=(3, 40, 2))
    error = np.sqrt((values.var(axis=1, ddof=1) / 40).sum(axis=0)) / 3
    for row, interval in enumerate(bootstrap(values)):
        assert interval is not None
        reach = stats.t.ppf(0.975, 110) * error[row]
        mean = values[..., row].mean()
        assert interval == pytest.approx((mean - reach, mean + reach), abs=0.1 * reach)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(np.ones((2, 5, 1)))[0] is None


@pytest.mark.parametrize(("seeds", "rates"), [(5, 2), (5, 3), (5, 4), (10, 2)])
def test_intervals_of_the_mean_rank_cover_it(seeds: int, rates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated studies of six rows that differ a little, share the difficulty of a cell, and whose order depends on
    the rate: at least 93 % of the intervals of rows that have one hold the expected rank."""
    monkeypatch.setattr(across, "DRAWS", 1000)
    rng = np.random.default_rng([seeds, rates])
    effects = rng.normal(0, 1, (rates, 1, 6))

    def scores(n: int) -> np.ndarray:
        return effects + rng.normal(0, 2, (rates, n, 1)) + rng.normal(0, 1, (rates, n, 6))

    expected = ranks(scores(40_000)).mean(axis=(0, 1))
    held = []
    for number in range(400):
        for row, interval in enumerate(bootstrap(ranks(scores(seeds)), seed=number)):
            if interval is not None:
                held.append(interval[0] <= expected[row] <= interval[1])
    assert 0.93 <= np.mean(held) <= 0.99


def test_intervals_of_wins_by_hand() -> None:
    """None lost of n: the lower end is the level to the power of 1/n; half of ten as in Clopper and Pearson's chart."""
    assert share_of_wins(8, 8) == pytest.approx((0.025 ** (1 / 8), 1))
    assert share_of_wins(0, 8) == pytest.approx((0, 1 - 0.025 ** (1 / 8)))
    assert share_of_wins(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert share_of_wins(3, 10) == pytest.approx(stats.binomtest(3, 10).proportion_ci(0.95)[:])
    assert share_of_wins(2.5, 10)[0] < share_of_wins(3, 10)[0]


@pytest.mark.parametrize("p", [(0.5, 0.5), (0.9, 0.9), (0.99, 0.6), (0.2, 0.5, 0.8, 0.95)])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_intervals_of_wins_cover_the_probability(p: tuple[float, ...], seeds: int) -> None:
    """The probability differs between the rates: the interval holds its mean in at least 95 % of the studies."""
    rng = np.random.default_rng([seeds, len(p)])
    won = rng.binomial(seeds, p, (4000, len(p))).sum(axis=1)
    held = [low <= math.fsum(p) / len(p) <= high for low, high in (share_of_wins(w, seeds * len(p)) for w in won)]
    assert np.mean(held) >= 0.945


def test_the_section_ranks_and_says_on_what() -> None:
    (section,) = sections(study())
    table = section.tables[0].frame.set_index("row")
    found = block(study())
    assert found is not None
    expected = ranks(found.scores).mean(axis=(0, 1))
    assert [float(text.split()[0]) for text in table["mean rank"]] == sorted(expected.round(2))
    assert table.loc["SGD", "better than SGD in"] == ""
    better = (found.scores[..., 1] > found.scores[..., 0]).sum()
    assert table.loc["SAM", "better than SGD in"] == f"{better} of 10"
    assert "[" in table.loc["SAM", "mean rank"]
    assert "5 rows within each of 10 cells (symmetric 40 %, symmetric 80 %; seeds 0, 1, 2, 3, 4)" in section.text
    few = sections(study(3))[0]
    assert not any("[" in text for text in few.tables[0].frame["mean rank"])
    assert "no interval with fewer than 5 seeds" in few.text
    assert sections(study(rows=ROWS[:4])) == []


def test_the_profile_is_the_share_within_so_many_points() -> None:
    (section,) = sections(study())
    panel = section.figures[0].drawing.axes[0]
    found = block(study())
    assert found is not None
    behind = 100 * (found.scores.max(-1) - found.scores[..., 0]).ravel()
    (line,) = [line for line in panel.lines if line.get_label() == "SGD"]
    x, y = line.get_xdata(), line.get_ydata()
    for at in (0.0, 2.0, 7.5, float(behind.max())):
        assert y[np.searchsorted(x, at + 1e-9) - 1] == pytest.approx(100 * np.mean(behind <= at + 1e-9))
