"""Views of an experiment in MLflow's pages: columns, order and groups, opened by a link.

MLflow stores a shared view of its run list as a tag of the experiment, and a page names the view in its address.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from noisysam.runs import measures
from noisysam.runs.record import RunFolder
from noisysam.tracking.state import sent

TAG = "mlflow.sharedViewState."


COLUMNS = (
    "tags.`noisysam.row`",
    "params.`noise_type`",
    "params.`noise`",
    "params.`seed`",
    *(f"metrics.`final_{measure.name}`" for measure in measures.shown("pages")),
    "metrics.`final_gradient_evaluations`",
    "metrics.`final_train_seconds`",
    "tags.`noisysam.oracle`",
    "tags.`noisysam.collapsed`",
)


SEEN: dict[str, Any] = {
    "searchFilter": "",
    "orderByKey": "metrics.`final_last`",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": list(COLUMNS),
    "runsHiddenMode": "SHOW_ALL",
}


BY_ROW = [{"mode": "tag", "groupByData": "noisysam.row"}, {"mode": "param", "groupByData": "noise"}]


# the charts shown at first; clearing the search field shows all of them
CHARTS = tuple(measure.column or f"final_{measure.name}" for measure in measures.shown("charts"))


VIEWS: dict[str, dict[str, Any]] = {
    "runs": SEEN,
    "rows": {
        **SEEN,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": BY_ROW},
        "chartsSearchFilter": f"^({'|'.join(CHARTS)})$",
    },
}


def tags() -> dict[str, str]:
    """The views as tags of an experiment."""
    return {f"{TAG}{name}": json.dumps(view) for name, view in VIEWS.items()}


def pages(experiment_id: str) -> dict[str, str]:
    """The addresses of two pages, relative to the server's root: a table of runs, and charts of means over seeds."""
    runs = f"/#/experiments/{experiment_id}/runs?viewStateShareKey="
    return {"runs": f"{runs}runs", "charts by row and noise rate": f"{runs}rows&compareRunsMode=CHART"}


def side_by_side(experiment_ids: Sequence[str], run_ids: Sequence[str]) -> str:
    """The address of the page that compares runs."""
    chosen, experiments = (quote(json.dumps(list(ids)), safe="") for ids in (run_ids, experiment_ids))
    return f"/#/compare-runs?runs={chosen}&experiments={experiments}"


def comparison(folders: Sequence[RunFolder]) -> str | None:
    """The address, relative to the server's root, of MLflow's page that compares these runs; None if one of them was
    not sent, or they are in several stores."""
    states = [sent(folder) for folder in folders]
    if len({state.get("uri") for state in states}) > 1 or not all(
        state.get("experiment_id") and state.get("run_id") for state in states
    ):
        return None
    experiments = dict.fromkeys(state["experiment_id"] for state in states)
    return side_by_side(list(experiments), [state["run_id"] for state in states])
