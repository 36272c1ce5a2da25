"""Test whether bf16 is as accurate as fp32: two finished studies, paired by row and seed, tested for equivalence.

    noisysam sweep experiments/precision-fp32.yaml
    noisysam sweep experiments/precision-bf16.yaml
    python -m noisysam.bench.precision

Prints for each row the mean paired difference in test accuracy (bf16 - fp32, mean of the last ten epochs, in points),
its 90 % t interval, and whether that lies within the margin (two one-sided tests at 5 %).
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from noisysam.runs.record import study_records

MARGIN = 3.0  # points


def accuracies(store: Path, study: str) -> dict[tuple[str, int], float]:
    """(row, seed) -> accuracy in percent."""
    return {
        (cell["row"], cell["seed"]): 100 * record["results"]["last_ten"]
        for cell, record in study_records(store, study)
        if record is not None and record["status"] == "finished"
    }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs"))
    store = parser.parse_args().store
    exact, short = accuracies(store, "precision-fp32"), accuracies(store, "precision-bf16")
    for row in dict.fromkeys(row for row, _ in exact):
        differences = np.array([short[place] - exact[place] for place in exact if place[0] == row and place in short])
        n = len(differences)
        half = stats.t.ppf(0.95, n - 1) * differences.std(ddof=1) / np.sqrt(n)
        low, high = differences.mean() - half, differences.mean() + half
        verdict = "equivalent" if low > -MARGIN and high < MARGIN else "not shown to be equivalent"
        print(f"{row}: {differences.mean():+.2f} points [{low:+.2f}, {high:+.2f}], n={n}: {verdict} within {MARGIN:g}")


if __name__ == "__main__":
    main()
