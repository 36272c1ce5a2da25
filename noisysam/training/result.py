"""The result of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisysam.runs.record import RunFolder

if TYPE_CHECKING:  # a second to import
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Result:
    """What came out of a run; ``record`` holds everything that was written down.

    ``result.last``, ``.last_ten``, ``.selected``, ``.best`` (oracle), ``.memorised``, ...: shares of 1.
    """

    key: str
    folder: Path
    record: Mapping[str, Any] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        """A figure of the record's results."""
        try:
            return self.record["results"][name]
        except KeyError:
            raise AttributeError(f"this run has no result {name!r}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.record["results"]]

    def __repr__(self) -> str:
        """The run and its main figures on one line."""
        figures = {name: self.record["results"].get(name) for name in ("last", "selected", "memorised")}
        named = [f"{name} {100 * value:.2f} %" for name, value in figures.items() if value is not None]
        return f"Result({self.key}: {self.record['name']}; {', '.join(named) or self.record['status']})"

    @property
    def curves(self) -> "pd.DataFrame":
        """A line for each stage and epoch, as in epochs.csv: losses, accuracies (shares of 1), seconds. A value that
        was not measured in an epoch is NaN."""
        import pandas as pd

        return pd.DataFrame(RunFolder(self.folder.parent, self.folder.name).epochs)

    def frame(self) -> "pd.DataFrame":
        """One line: key, status, configuration, results (shares of 1) and cost. ``pandas.concat`` joins those of
        several runs; ``noisysam.results`` gives the table of a whole store or study."""
        import pandas as pd

        record = self.record
        line = {"key": self.key, "name": record["name"], "status": record["status"], **record["config"]}
        line |= {"flip_rate": record["noise"]["flip_rate"], "parameters": record["model"]["parameters"]}
        return pd.DataFrame([{**line, **record["results"], **record["cost"]}])
