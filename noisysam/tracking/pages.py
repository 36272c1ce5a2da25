"""Views of an experiment in MLflow's pages: columns, order and groups, opened by a link.

MLflow stores a shared view of its run list as a tag of the experiment, and a page names the view in its address.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from noisysam.runs import measures
from noisysam.runs.record import RunFolder
from noisysam.tracking.state import sent

TAG = "mlflow.sharedViewState."
# MLflow 3.17 opens pages as those of GenAI applications, whatever an experiment's tags say, but for this parameter, or
# where the reader has chosen model training in this browser before
TRAINING = "workflowType=machine_learning"
NOTE = "mlflow.note.content"


COLUMNS = (
    "tags.`noisysam.row`",
    "params.`noise_type`",
    "params.`noise`",
    "params.`seed`",
    *(f"metrics.`final/{measure.name}`" for measure in measures.shown("pages")),
    "metrics.`final/gradient_evaluations`",
    "metrics.`final/train_seconds`",
    "tags.`noisysam.oracle`",
    "tags.`noisysam.collapsed`",
)


SEEN: dict[str, Any] = {
    "searchFilter": "tags.`noisysam.key` LIKE '%'",
    "orderByKey": "metrics.`final/last`",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": list(COLUMNS),
    "runsHiddenMode": "SHOW_ALL",
}


BY_CELL = [{"mode": "tag", "groupByData": "noisysam.cell"}]


# the charts shown at first; clearing the search field shows all of them
CHARTS = tuple(
    f"{'percent/' if measure.percent else ''}{measure.column}" if measure.column else f"final/{measure.name}"
    for measure in measures.shown("charts")
)


VIEWS: dict[str, dict[str, Any]] = {  # of every experiment
    "runs": SEEN,
    "rows": {
        **SEEN,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": BY_CELL},
        "chartsSearchFilter": f"^({'|'.join(CHARTS)})$",
    },
}


PAGES = {  # what a page is called, the view that it opens, and its mode
    "rows": ("table", ""),
    "accuracy against noise": ("curves", "&compareRunsMode=CHART"),
    "runs": ("runs", ""),
    "charts by row and noise rate": ("rows", "&compareRunsMode=CHART"),
}


def tags(columns: Sequence[str] = ()) -> dict[str, str]:
    """The views as tags of an experiment. ``columns``: metrics of the rows of a study, which has two views more."""
    views = dict(VIEWS)
    if columns:
        seen = {
            **SEEN,
            "searchFilter": "tags.`noisysam.kind` = 'row'",
            "orderByKey": "attributes.start_time",
            "selectedColumns": [
                *(f"metrics.`{column}`" for column in columns),
                *(f"tags.`noisysam.{name}`" for name in ("oracle", "search", "collapsed")),
            ],
        }
        views |= {"table": seen, "curves": {**seen, "chartsSearchFilter": "^(mean|sd)/"}}
    return {f"{TAG}{name}": json.dumps(view) for name, view in views.items()}


def pages(experiment_id: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The addresses of the pages of an experiment with these tags, relative to the server's root: of a study its rows
    and their curves first, then the runs, and charts of means over seeds."""
    runs = f"/#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey="
    return {what: f"{runs}{view}{mode}" for what, (view, mode) in PAGES.items() if f"{TAG}{view}" in tags}


def run_page(folder: RunFolder, experiment: str) -> str | None:
    """The address, relative to the server's root, of a run's page; None if it was not sent."""
    state = sent(folder, experiment)
    if not (state.get("experiment_id") and state.get("run_id")):
        return None
    return f"/#/experiments/{state['experiment_id']}/runs/{state['run_id']}?{TRAINING}"


def note(text: str) -> str:
    """Markdown as MLflow's pages show it: pictures, which it does not have, are left out, and brackets, which it takes
    for links even before a space, are escaped."""
    lines = [line for line in text.splitlines() if not line.startswith("![")]
    return "\n".join(line.replace("[", "\\[").replace("]", "\\]") for line in lines)


def side_by_side(experiment_ids: Sequence[str], run_ids: Sequence[str]) -> str:
    """The address of the page that compares runs."""
    chosen, experiments = (quote(json.dumps(list(ids)), safe="") for ids in (run_ids, experiment_ids))
    return f"/#/compare-runs?runs={chosen}&experiments={experiments}&{TRAINING}"


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
