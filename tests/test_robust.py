"""Regret, the oracle's gain and the price of a wrong rate, on means typed by hand."""

from typing import Any

import pytest

from noisysam.report import robust


def summaries(**rows: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    return [
        {"row": row, "noise_type": "symmetric", "noise": noise, "mean": mean}
        for row, means in rows.items()
        for noise, mean in zip((0.4, 0.8), means, strict=True)
    ]


def cell(row: str, oracle: str = "", method: str = "forward", **options: Any) -> dict[str, Any]:
    return {
        "row": row, "status": "finished", "oracle": oracle, "method": method, "opt": "sgd", "method_options": options,
    }  # fmt: skip


def test_regret_is_the_distance_from_the_best_at_each_rate() -> None:
    table = robust.regret(summaries(a=(0.5, 0.3), b=(0.6, 0.1), c=(0.55, 0.28), lacking=(0.9, None)))
    assert table is not None
    assert table.to_numpy().tolist() == [
        ["c", "5.00", "2.00", "5.00"],
        ["a", "10.00", "0.00", "10.00"],
        ["b", "0.00", "20.00", "20.00"],
    ]


@pytest.mark.parametrize("one", [{"a": (0.5, 0.3)}, {"a": (0.5, None), "b": (0.6, None)}])
def test_regret_needs_two_rows_and_two_rates(one: dict[str, tuple[float | None, float | None]]) -> None:
    assert robust.regret([s for s in summaries(**one) if s["mean"] is not None]) is None


def test_oracle_against_blind_rows_of_its_own_recipe() -> None:
    cells = [cell("true", "knows"), cell("anchors"), cell("other", method="gce"), cell("other, told", "knows", "elr")]
    table = robust.oracle_gap(cells, summaries(true=(0.6, 0.4), anchors=(0.5, 0.45), other=(0.1, 0.1)))
    assert table is not None
    assert table.to_numpy().tolist() == [["true", "anchors", "+10.00", "-5.00"]]
    assert robust.oracle_gap(cells[1:], summaries(anchors=(0.5, 0.4), other=(0.1, 0.1))) is None


def test_a_wrong_rate_against_the_right_one() -> None:
    cells = [
        cell("right", "knows", "co-teaching", forget_rate=None, ramp=10),
        cell("half", "knows", "co-teaching", forget_rate="0.5x", ramp=10),
        cell("more", "knows", "co-teaching", forget_rate="1.5x", ramp=10),
        cell("another ramp", "knows", "co-teaching", forget_rate="1.5x", ramp=5),
    ]
    means = summaries(**{"right": (0.5, 0.4), "half": (0.45, 0.2), "more": (0.5, None), "another ramp": (0.1, 0.1)})
    table = robust.misspecified(cells, means)
    assert table is not None
    assert table.to_numpy().tolist() == [["half", "right", "-5.00", "-20.00"], ["more", "right", "+0.00", ""]]
