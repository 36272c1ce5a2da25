"""What a step takes beyond SGD's at its peak, in copies of the weights: measured, and as the members declare."""

import pytest

from noisysam.bench.memory import step_copies
from noisysam.optim import OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_is_as_declared(name: str) -> None:
    assert step_copies(name) - step_copies("sgd") == pytest.approx(OPTIMIZERS[name].copies, abs=0.15)
