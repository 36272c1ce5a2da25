"""The types of what a store holds: records of runs, plans of studies, results of probes.

They are checked where a file is read. Fields that a later version adds are kept.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from noisysam.core.errors import DamagedFile
from noisysam.core.files import read_file
from noisysam.core.validation import explain
from noisysam.runs.measures import out_of_range

RECORD_SCHEMA = 1  # of records and of plans
PROBE_SCHEMA = 1  # of a probe's result

EXTENSIBLE = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Key = Annotated[str, Field(pattern=r"^[^./\\\\][^/\\\\]*$")]  # the name of a folder
Digest = Annotated[str, Field(min_length=1)]
Status = Literal["running", "interrupted", "failed", "finished"]


def _schema(number: int) -> int:
    if number != RECORD_SCHEMA:
        raise ValueError(f"this version reads {RECORD_SCHEMA}")
    return number


Schema = Annotated[int, AfterValidator(_schema)]


@with_config(EXTENSIBLE)
class NoiseCard(TypedDict):
    """What a run's noisy labels are."""

    type: str
    rate: Share | None
    flip_rate: Share | None  # None: the correct labels are not known
    matrix: list[list[Share]] | None
    digest: Digest
    draw: NotRequired[str | None]
    seed: NotRequired[int | None]
    revision: NotRequired[int | None]
    classes: NotRequired[Count]
    n: NotRequired[Count]
    per_class_flip_rate: NotRequired[list[Share] | None]
    definition_digest: NotRequired[Digest]


@with_config(EXTENSIBLE)
class Machine(TypedDict):
    """What ``auto`` became, and where the run took place."""

    device: str
    device_name: str
    precision: Literal["fp32", "bf16"]
    threads: Count
    compile: NotRequired[bool]


@with_config(EXTENSIBLE)
class DataFacts(TypedDict):
    """Images in each part of the data set, and the names of its classes."""

    name: str
    train: Count
    val: Count
    test: Count
    classes: NotRequired[list[str]]


@with_config(EXTENSIBLE)
class ModelFacts(TypedDict):
    """The network."""

    name: str
    parameters: Count


@with_config(EXTENSIBLE)
class Results(TypedDict, total=False):
    """Measures of a finished run, see ``measures``; None: could not be measured."""

    last: Share
    last_ten: Share
    best: Share
    best_epoch: Count
    selected: Share | None
    selected_epoch: Count | None
    nll: float | None
    ece: Share | None
    clean_accuracy: Share | None
    memorised: Share | None
    recovered: Share | None
    auroc: Share | None


@with_config(EXTENSIBLE)
class Cost(TypedDict, total=False):
    """What a run has taken so far."""

    steps: Count
    skipped_steps: Count
    forward_samples: Count
    gradient_samples: Count
    train_seconds: Seconds
    eval_seconds: Seconds
    log_seconds: Seconds
    compile_seconds: Seconds
    images_per_second: Seconds
    gradient_evaluations: Seconds
    forward_evaluations: Seconds


def _in_range(results: Results) -> Results:
    wrong = out_of_range(cast(Mapping[str, float | None], results).items())
    if wrong:
        raise ValueError(f"out of range: {', '.join(wrong)}")
    return results


@with_config(EXTENSIBLE)
class RunRecord(TypedDict):
    """The record of a run: what it is, how it stands, what came out of it."""

    schema: Schema
    key: Key
    status: Status
    name: str
    config: dict[str, Any]
    optimizer_options: dict[str, Any]
    method_options: dict[str, Any]
    resolved: Machine
    oracle: list[str]
    digests: dict[str, str]
    revisions: dict[str, int]
    noise: NoiseCard
    data: DataFacts
    model: ModelFacts
    environment: dict[str, str | None]
    earlier_environments: NotRequired[list[dict[str, str | None]]]
    started: str
    ended: str | None
    results: Annotated[Results, AfterValidator(_in_range)]
    collapsed: NotRequired[bool]
    cost: Cost
    error: str | None  # one line; a traceback in the records of earlier versions
    traceback: NotRequired[str | None]  # of an error that nobody expected


OF_FINISHED = {
    "results": ("last", "last_ten", "best", "best_epoch"),
    "cost": ("train_seconds", "eval_seconds", "gradient_samples", "gradient_evaluations", "images_per_second"),
}


def _complete(record: RunRecord) -> RunRecord:
    """A finished run has its results."""
    if record["status"] == "finished":
        for part, names in OF_FINISHED.items():
            lacking = [name for name in names if name not in cast(Mapping[str, Any], record)[part]]
            if lacking:
                raise ValueError(f"{part} of a finished run lacks {', '.join(lacking)}")
        if record["ended"] is None:
            raise ValueError("a finished run has not ended")
    return record


@with_config(EXTENSIBLE)
class RunStatus(TypedDict):
    """How a run stands, for those who ask for many: ``status.json``, written after the record. ``size``: bytes of the
    record that it describes."""

    schema: Schema
    key: Key
    status: Status
    size: Count


@with_config(EXTENSIBLE)
class PlannedCell(TypedDict):
    """A cell of a study. ``for_rate``: fields of its configuration that its row sets for single noise rates."""

    row: str
    noise: float
    seed: int
    key: Key
    config: dict[str, Any]
    noise_type: NotRequired[str]
    for_rate: NotRequired[list[str]]


@with_config(EXTENSIBLE)
class RowSearch(TypedDict):
    """How a row was tuned: its budget, the ranges of the fields, the values chosen, the runs of the trials."""

    trials: Count
    seed: Count
    fields: dict[str, dict[str, Any]]
    chosen: dict[str, float]
    accuracy: Share | None
    runs: list[Key]


@with_config(EXTENSIBLE)
class StudyPlan(TypedDict):
    """A study as a store keeps it: its file's text and its cells."""

    schema: Schema
    name: str
    file: str
    cells: list[PlannedCell]
    published: NotRequired[str | list[str] | None]
    claims: NotRequired[list[dict[str, Any]]]
    search: NotRequired[dict[str, RowSearch]]
    planned_seeds: NotRequired[list[int]]
    added_seeds: NotRequired[dict[str, str]]


@with_config(EXTENSIBLE)
class ProbeResult(TypedDict):
    """What a probe found in a run."""

    schema: Count
    probe: str
    key: Key
    results: dict[str, Any]
    scalars: NotRequired[dict[str, float | None]]
    weights: NotRequired[str]


T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[RunRecord, AfterValidator(_complete)] if kind is RunRecord else kind)


def parse(kind: type[T], content: bytes, path: Path) -> T:
    """The content of a JSON file as a value of this type; ``DamagedFile`` names the file and the field."""
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise DamagedFile(path, f"cannot be read as JSON ({first['ctx']['error']})") from None
        raise DamagedFile(path, explain(error, prefix="")) from None


def read(kind: type[T], path: Path) -> T:
    """A JSON file as a value of this type."""
    return parse(kind, read_file(path), path)
