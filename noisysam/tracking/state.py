"""``tracking.json`` in the folder of a run: what was sent to which store."""

from collections.abc import Mapping
from typing import Any

from noisysam.core.errors import UserError
from noisysam.core.files import file_digest, read_json
from noisysam.runs.record import RunFolder
from noisysam.tracking.address import shown

NAME = "tracking.json"


LAYOUT = 2  # of what is sent: raised when names, units or parents change, so that runs sent before are completed


NAMES = ("uri", "experiment", "experiment_id", "run_id", "parent")  # entries that are strings


def sent(folder: RunFolder, experiment: str | None = None) -> dict[str, Any]:
    """The content of tracking.json: what was sent to the first experiment, and under ``shared`` to others; or what was
    sent to ``experiment`` alone. A missing or damaged file counts as empty: the run is then found in MLflow by its
    key, and the file is written again."""
    try:
        home = _checked(read_json(folder.path / NAME))
    except UserError:
        home = {}
    given = _checked(home.pop("shared", None))
    shared = {name: _checked(state) for name, state in given.items() if _checked(state)} if given else {}
    if experiment is not None and home.get("experiment") != experiment:
        return shared.get(experiment, {})
    return {**home, "shared": shared} if shared else home


def _checked(state: Any) -> dict[str, Any]:
    """``state`` if it is the state of one experiment, else an empty one."""
    sound = isinstance(state, dict) and all(isinstance(state.get(n, ""), str) for n in NAMES)
    return state if sound else {}


def probed(folder: RunFolder) -> dict[str, Any]:
    """The entry of tracking.json for results of probes: the digest of each file."""
    found = {path.stem: file_digest(path)[:16] for path in sorted((folder.path / "probes").glob("*.json"))}
    return {"probes": found} if found else {}


def complete(
    folder: RunFolder, uri: str, experiment: str, record: Mapping[str, Any], epochs: int, parent: str | None = None
) -> dict[str, Any]:
    """The entries of tracking.json after a record with this many epochs was sent completely."""
    facts: dict[str, Any] = {
        "layout": LAYOUT,
        "status": record.get("status"),
        "ended": record.get("ended"),
        "epochs_sent": epochs,
    }
    parents = {} if parent is None else {"parent": parent}
    return {"uri": shown(uri), "experiment": experiment, **parents, **facts, **probed(folder), "done": True}


def is_complete(folder: RunFolder, uri: str, experiment: str, parent: str | None = None) -> bool:
    """Whether everything in the folder was sent to this store and experiment, according to tracking.json."""
    wanted = complete(folder, uri, experiment, folder.record or {}, len(folder.epochs), parent)
    return wanted.items() <= sent(folder, experiment).items()
