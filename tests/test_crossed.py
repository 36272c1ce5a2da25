"""Methods by optimizers: pairs by recipe, gains by seed; numbers typed by hand."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from noisysam.report import crossed
from noisysam.report.tables import RECIPE


def run(row: str, method: str, opt: str, seed: int, last: float, **changes: Any) -> dict[str, Any]:
    cell = {
        "row": row, "method": method, "opt": opt, "seed": seed, "last": last, "status": "finished", "noise": 0.6,
        "noise_type": "symmetric", "method_options": {}, "rho": None if opt == "sgd" else 0.1, "memorised": 0.25,
        "m": None if opt == "sgd" else 32, "gradient_evaluations": 30.0 if opt == "sgd" else 60.0,
    }  # fmt: skip
    return {**dict.fromkeys(RECIPE, 1), **cell, **changes}


CELLS = [
    run("CE", "ce", "sgd", 0, 0.30), run("CE", "ce", "sgd", 1, 0.32), run("CE", "ce", "sgd", 2, 0.31),
    run("CE + SAM", "ce", "sam", 0, 0.40), run("CE + SAM", "ce", "sam", 1, 0.44), run("CE + SAM", "ce", "sam", 2, 0.42),
    run("ELR", "elr", "sgd", 0, 0.50), run("ELR + SAM", "elr", "sam", 0, 0.49),
    run("GCE", "gce", "sgd", 0, 0.45),
    run("CE (twice as long)", "ce", "sgd", 0, 0.29, epochs=60),
]  # fmt: skip


def test_rows_are_paired_by_method_and_recipe() -> None:
    found = crossed.grid(CELLS)
    assert list(found) == ["CE", "ELR"]
    assert {tuple(runs) for runs in found.values()} == {("sgd", "sam, rho 0.1, m 32")}
    np.testing.assert_allclose(crossed.means(found).to_numpy(), [[31, 42], [50, 49]])


def test_gains_by_seed() -> None:
    table = crossed.table(crossed.grid(CELLS))
    interval = stats.ttest_1samp([10, 12, 11], 0).confidence_interval(0.95)
    assert list(table["method"]) == ["CE", "", "ELR", ""]
    assert list(table["gain [95 %]"]) == ["", f"+11.00 [{interval.low:+.2f}, {interval.high:+.2f}]", "", "-1.00"]
    assert list(table["accuracy (%)"]) == ["31.00", "42.00", "50.00", "49.00"]
    assert list(table["gradients"]) == ["30", "60", "30", "60"]
    assert list(table["n"]) == ["3", "3", "1", "1"]


@pytest.mark.parametrize("cells", [CELLS[:6], [c for c in CELLS if c["opt"] == "sgd"]])
def test_one_method_or_one_optimizer_makes_no_section(cells: list[dict[str, Any]]) -> None:
    assert crossed.sections(cells) == []


def test_the_section() -> None:
    (section,) = crossed.sections(CELLS)
    assert [figure.name for figure in section.figures] == ["crossed-1"]
    assert "noise" not in section.tables[0].frame.columns
    higher = [{**cell, "noise": 0.8} for cell in CELLS]
    (section,) = crossed.sections([*CELLS, *higher])
    frame = section.tables[0].frame
    assert list(frame.columns[:2]) == ["noise", "method"]
    assert list(frame["noise"]) == ["symmetric 60 %"] * 4 + ["symmetric 80 %"] * 4
