"""The short form of ``kills.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_runs_that_are_killed_end_with_the_same_bits() -> None:
    script, root = Path(__file__).with_name("kills.py"), Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "20", "--seed", "1"],
        capture_output=True, text=True, check=False, timeout=3600, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills in 10 runs" in done.stdout
