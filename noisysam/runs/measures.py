"""Every measured quantity, defined once: its name in records, how it is called, and where it is shown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Place = Literal["table", "terminal", "curves", "compare", "pages", "charts"]
"""Where a measure is shown: a table of a report; that table on the terminal too; the learning curves; ``noisysam
compare``; the columns and the first charts of MLflow's pages."""


EVALUATED_AT_THE_END = 10  # epochs that are evaluated whatever --eval-every says


@dataclass(frozen=True)
class Measure:
    """A quantity that is measured in a run. ``None`` in a record: it could not be measured."""

    name: str  # in a record's results; a measure without a result has the name of its column
    title: str  # of a table, without the unit
    short: str  # in a line of text, on an axis
    column: str | None = None  # of epochs.csv, where it is measured in every evaluation
    unit: str = "%"  # "%": a share of 1 that is shown in percent
    low: float = 0.0
    high: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    oracle: bool = False  # needs the test set or clean labels to be chosen
    result: bool = True  # whether a record's results have it
    shown: frozenset[Place] = frozenset()

    @property
    def percent(self) -> bool:
        """Whether it is a share of 1 that is shown in percent."""
        return self.unit == "%"

    @property
    def scale(self) -> float:
        """What a value is multiplied by where it is shown."""
        return 100.0 if self.percent else 1.0

    def value(self, results: Mapping[str, Any]) -> float | None:
        """Its value in a record's results."""
        value: float | None = results.get(self.name)
        return value

    @property
    def heading(self) -> str:
        """The title with the unit."""
        return f"{self.title} ({self.unit})"

    @property
    def label(self) -> str:
        """The short title with the unit."""
        return f"{self.short} ({self.unit})"


def _places(*names: Place) -> frozenset[Place]:
    return frozenset(names)


MEASURES = (
    Measure(
        "last", "Test accuracy at the last epoch", "test accuracy, last epoch",
        shown=_places("table", "terminal", "compare", "pages", "charts"),
    ),
    Measure(
        "selected", "Test accuracy at the epoch selected on noisy validation labels", "selected on noisy validation",
        shown=_places("table", "terminal", "compare", "pages", "charts"),
    ),
    Measure(
        "last_ten", "Test accuracy, mean of the last ten epochs", "mean of the last ten epochs",
        shown=_places("table", "compare"),
    ),
    Measure(
        "best", "Test accuracy, best epoch on test (oracle)", "best on test, oracle", oracle=True,
        shown=_places("table", "compare", "pages"),
    ),
    Measure(
        "test_accuracy", "Test accuracy", "test accuracy", column="test_accuracy", result=False,
        shown=_places("curves", "charts"),
    ),
    Measure(
        "memorised", "Memorised: wrong labels that the network fits at the last epoch", "wrong labels memorised",
        column="memorised", better="lower", shown=_places("table", "curves", "compare", "pages", "charts"),
    ),
    Measure(
        "recovered", "Recovered: wrongly labelled images whose true class it predicts at the last epoch",
        "true labels recovered", column="recovered", shown=_places("table", "curves", "compare", "pages", "charts"),
    ),
    Measure(
        "auroc", "Detection: AUROC of the loss as a sign of a wrong label, at the last epoch", "AUROC of wrong labels",
        column="auroc", shown=_places("table", "curves", "compare", "pages", "charts"),
    ),
    Measure(
        "nll", "Test loss at the last epoch", "test loss", column="test_nll", unit="nats", high=float("inf"),
        better="lower", shown=_places("compare"),
    ),
    Measure(
        "ece", "Calibration error at the last epoch", "calibration error", column="test_ece", better="lower",
        shown=_places("compare"),
    ),
    Measure(
        "clean_accuracy", "Accuracy on correctly labelled training images", "right labels fitted",
        column="clean_accuracy",
    ),
    Measure("test_accuracy_1", "Test accuracy of the first network", "first network", column="test_accuracy_1"),
    Measure("test_accuracy_2", "Test accuracy of the second network", "second network", column="test_accuracy_2"),
    Measure(
        "test_accuracy_ensemble", "Test accuracy of the networks together", "ensemble",
        column="test_accuracy_ensemble",
    ),
    Measure(
        "val_accuracy", "Accuracy on held-out images with their noisy labels", "noisy validation accuracy",
        column="val_accuracy", result=False,
    ),
)  # fmt: skip

MEASURE = {measure.name: measure for measure in MEASURES}


def shown(place: Place) -> list[Measure]:
    """The measures that are shown there, in their order."""
    return [measure for measure in MEASURES if place in measure.shown]


def out_of_range(values: Iterable[tuple[str, float | None]]) -> list[str]:
    """The names whose values lie outside the range of their measure."""
    return [n for n, v in values if n in MEASURE and v is not None and not MEASURE[n].low <= v <= MEASURE[n].high]
