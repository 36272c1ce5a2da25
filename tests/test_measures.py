"""Measured quantities are defined once; the evaluator and the summary give exactly those."""

import pytest
import torch

from noisysam.data.loader import Loader
from noisysam.models import build
from noisysam.runs.config import RunConfig
from noisysam.runs.measures import MEASURES, out_of_range
from noisysam.runs.problem import prepare
from noisysam.runs.summary import results
from noisysam.training.evaluator import Evaluator


def test_an_evaluation_measures_the_columns_and_nothing_else() -> None:
    problem = prepare(RunConfig(dataset="digits", noise=0.4, model="resnet8"))
    noisy = problem.noisy.take(problem.train)
    images, labels = torch.from_numpy(problem.chosen[problem.train]), torch.from_numpy(noisy.labels)
    loader = Loader(problem.dataset, images, labels, rows=64, policy="none", device=torch.device("cpu"), seed=0)
    evaluator = Evaluator(problem, loader, lambda logits: sum(logits), bf16=False)  # type: ignore[arg-type,return-value]
    figures = evaluator.measure([build("resnet8", 10, 1, seed=seed) for seed in (0, 1)])
    assert set(figures) == {measure.column for measure in MEASURES if measure.column}
    line = {"stage": 0, "epoch": 0, **figures}
    found = results([line], 0)
    assert set(found) == {m.name for m in MEASURES if m.result} | {"best_epoch", "selected_epoch"}
    for measure in MEASURES:
        if measure.result and measure.column:
            assert found[measure.name] == figures[measure.column]
    assert not out_of_range(found.items())


@pytest.mark.parametrize(("name", "value"), [("last", 1.01), ("last", -0.1), ("nll", -1.0), ("ece", 2.0)])
def test_a_value_outside_the_range_of_its_measure_is_named(name: str, value: float) -> None:
    assert out_of_range({"last": 0.5, "nll": 7.0, name: value, "unknown": 9.0}.items()) == [name]


def test_each_name_and_column_belongs_to_one_measure() -> None:
    columns = [measure.column for measure in MEASURES if measure.column]
    assert len({measure.name for measure in MEASURES}) == len(MEASURES)
    assert len(set(columns)) == len(columns)
