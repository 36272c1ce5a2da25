"""The cells of a study as flat dictionaries, means and printed tables."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from textwrap import shorten
from typing import Any

import pandas as pd

from noisysam.core.errors import DamagedFile, UserError
from noisysam.core.text import last_line
from noisysam.data.datasets import CIFAR10_CLASSES
from noisysam.report.statistics import share_interval
from noisysam.runs.measures import EVALUATED_AT_THE_END
from noisysam.runs.record import RunFolder, load_study
from noisysam.runs.summary import COLLAPSED

ReportCell = dict[str, Any]  # one run of a study, flat: where it stands in the table, how it was made, every figure
Summary = dict[str, Any]  # one field of a table: row, column, mean and standard deviation over seeds

OWN_RATE = ("human", "file", "given")  # noise types that bring their own rate
COVERAGE = 0.95  # of intervals
OFTEN = 10  # evaluations in a run from which on one of its epochs may be picked
PICKED = ("selected", "best")  # results at an epoch that was picked
INTERVALS = 5  # seeds from which a mean has an interval; fewer are shown one by one
RECIPE = (  # settings that a report prints, and that `results.csv` has
    "dataset", "augment", "noise_draw", "base_opt", "lr", "momentum", "nesterov", "weight_decay", "schedule", "warmup",
    "batch", "epochs", "eval_every", "train_subset", "subset_seed", "plugin",
)  # fmt: skip
RECIPE_ALONE = ("dataset", "noise_draw", "eval_every", "train_subset", "subset_seed", "plugin")  # no setting of a row
NAMES = {"cifar10": CIFAR10_CLASSES}  # of records that do not name their classes
EARLIER = "earlier revision"  # added to the name of a row whose runs are of a component that was mended since
OPTIONS = {"method_option": "method_options", "opt_option": "optimizer_options"}  # option of a run -> field of a cell
WITHHELD = "withheld"
SHORT = 40  # characters of the value of an option in a table
WHOLE = (  # of a cell: what is no single figure
    "variant", "search", "revisions", "method_options", "optimizer_options", "matrix", "classes", "environment",
)  # fmt: skip


def read_cells(store: Path, study: str) -> list[ReportCell]:
    """The cells of a study in the order of its plan. A row whose cells differ in more than noise and seed is split,
    and the settings that differ are added to its name; so is that a cell was trained with an earlier revision of its
    method or optimizer, whose results a table does not take together with today's. A cell whose record cannot be read
    has the status ``damaged`` and no results."""
    content = load_study(store, study)
    plan, searches = content["cells"], content.get("search", {})
    cells = []
    matrices: dict[Any, Any] = {}  # of the same labels are the same, and those of 100 classes are large
    for cell, variant in zip(plan, _variants(plan), strict=True):
        record = _record(store, cell["key"])
        cells.append(flat_cell(cell, joined([variant or None, EARLIER if earlier(record) else None]), record))
        cells[-1]["matrix"] = matrices.setdefault(cells[-1]["labels"], cells[-1]["matrix"])
        search = searches.get(cell["row"])
        cells[-1] |= {"search": search, "search_trials": search["trials"] if search else None}
    return mark_beside(cells)


def earlier(record: Mapping[str, Any]) -> bool:
    """Whether a run was trained with an earlier revision of a component than today's."""
    from noisysam import methods, optim

    registries: dict[str, Any] = {"method": methods.METHODS, "optimizer": optim.OPTIMIZERS}
    for component, revision in record.get("revisions", {}).items():
        kind, _, name = component.partition(" ")
        if name in registries.get(kind, ()) and registries[kind][name].revision > revision:
            return True
    return False


def _record(store: Path, key: str) -> Mapping[str, Any]:
    folder = RunFolder(store, key)
    try:
        record: Mapping[str, Any] = folder.record or {}
        return {**record, "collapsed": folder.collapsed}
    except DamagedFile as error:
        return {"status": "damaged", "error": str(error)}


def _variants(plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each cell the settings that differ within its row, apart from noise, seed, and what the study sets for single
    noise rates."""
    configs = []
    for cell in plan:
        apart = {"noise", "noise_type", "seed", *cell.get("for_rate", ())}
        config = {k: v for k, v in cell["config"].items() if k not in apart}
        if config.get("noise_seed") == cell["seed"]:
            del config["noise_seed"]
        configs.append(config)
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell, config in zip(plan, configs, strict=True):
        rows.setdefault(cell["row"], []).append(config)
    differ = {
        row: {name for name in set().union(*same) if any(c.get(name) != same[0].get(name) for c in same)}
        for row, same in rows.items()
    }
    return [
        ", ".join(f"{name}={value}" for name, value in config.items() if name in differ[cell["row"]])
        for cell, config in zip(plan, configs, strict=True)
    ]


def flat_cell(cell: Mapping[str, Any], variant: str, record: Mapping[str, Any]) -> ReportCell:
    config, noise = record.get("config", {}), record.get("noise", {})
    results, environment = record.get("results", {}), record.get("environment", {})
    sparse = config.get("eval_every", 1) > max(1, config.get("epochs", 1) / OFTEN)
    options, resolved = record.get("optimizer_options", {}), record.get("resolved", {})
    model, cost = record.get("model", {}), record.get("cost", {})
    return {
        "row": ", ".join(filter(None, (str(cell["row"]), variant))),
        "variant": variant,
        "noise_type": cell["config"]["noise_type"],
        "noise": cell["noise"],
        "seed": cell["seed"],
        "key": cell["key"],
        "status": record.get("status", "missing"),
        "error": last_line(record.get("error") or "") or None,
        "m": options.get("m", config.get("sam_m")),
        "rho": options.get("rho", config.get("rho")),
        "oracle": "; ".join(record.get("oracle", [])),
        "flip_rate": noise.get("flip_rate"),
        "labels": noise.get("digest"),
        "method": config.get("method"),
        "opt": config.get("opt"),
        "method_options": record.get("method_options", {}),
        "optimizer_options": options,
        "data": record.get("digests", {}).get("data"),
        **{name: record.get("data", {}).get(name) for name in ("train", "val", "test", "classes")},
        "matrix": noise.get("matrix"),
        "model": model.get("name"),
        "parameters": model.get("parameters"),
        **{name: config.get(name) for name in RECIPE},
        "dataset": _without_place(config.get("dataset")),
        **{name: resolved.get(name) for name in ("precision", "device", "device_name", "threads")},
        "environment": environment,
        **{name: environment.get(name) for name in ("commit", "torch", "cpu", "instruction_set", "numerics")},
        "machine": " and ".join(_machine(resolved, e) for e in (*record.get("earlier_environments", []), environment)),
        "sparse": sparse,
        "collapsed": record.get("collapsed"),
        "started": record.get("started"),
        "ended": record.get("ended"),
        "revisions": record.get("revisions", {}),
        **(results | dict.fromkeys(PICKED) if sparse else results),
        **cost,
    }


def _machine(resolved: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """The hardware and numerics revision that decide the bits of a result."""
    name = (environment.get("cpu") if resolved.get("device") == "cpu" else None) or resolved.get("device_name")
    numerics = environment.get("numerics")
    return joined([name, environment.get("instruction_set"), numerics and f"numerics revision {numerics}"])


def as_line(cell: ReportCell) -> dict[str, Any]:
    """A cell as a line of a table of data: its single figures, and each option of its components by the name that
    study files give it, such as ``method_option.alpha``."""
    line = {name: value for name, value in cell.items() if name not in WHOLE}
    for kind, field in OPTIONS.items():
        for name, value in cell[field].items():
            if name not in ("m", "rho"):  # they have columns of their own
                line[f"{kind}.{name}"] = value if isinstance(value, str | int | float | None) else str(value)
    return line


def mark_beside(cells: Sequence[ReportCell]) -> list[ReportCell]:
    """The cells with ``beside_others``: whether a run was trained during the time of another one of them on the same
    kind of CPU, so that its speed may be that of shared cores."""
    spans: dict[str, list[tuple[datetime, datetime, str]]] = {}
    for cell in runs(finished(cells)):
        if cell["device"] == "cpu":
            span = (datetime.fromisoformat(cell["started"]), datetime.fromisoformat(cell["ended"]), cell["key"])
            spans.setdefault(cell["machine"], []).append(span)
    found = set()
    for there in spans.values():
        for (start, end, a), (other_start, other_end, b) in itertools.combinations(there, 2):
            if start < other_end and other_start < end:
                found |= {a, b}
    return [{**cell, "beside_others": cell["key"] in found} for cell in cells]


def classes(cells: Iterable[ReportCell]) -> Sequence[str] | None:
    """The names of the classes, where the finished runs have one list of them, or are of CIFAR-10."""
    found = {tuple(cell["classes"] or NAMES.get(str(cell["dataset"]), ())) for cell in finished(cells)}
    return (next(iter(found)) or None) if len(found) == 1 else None


def machines(cells: Iterable[ReportCell]) -> dict[str, str]:
    """A letter for each kind of machine that runs of a study were trained on; empty where there is one."""
    kinds = sorted({cell["machine"] for cell in finished(cells)})
    return {kind: chr(ord("a") + n) for n, kind in enumerate(kinds)} if len(kinds) > 1 else {}


def remark(measure: str, cells: Sequence[ReportCell], marked: bool) -> str:
    """Remarks on the table of a measure."""
    said = ["The best mean of each column is in bold."] if marked else []
    rows = list(dict.fromkeys(cell["row"] for cell in finished(cells) if cell["sparse"]))
    if measure in PICKED and rows:
        said.append(f"Left out, since they were evaluated less often than every tenth of the run: {', '.join(rows)}.")
    if measure == "last_ten" and any(cell["epochs"] < EVALUATED_AT_THE_END for cell in finished(cells)):
        said.append("Runs of fewer epochs: the mean of all.")
    if any(cell.get("collapsed") for cell in finished(cells)):
        said.append(f"Collapsed runs predict one class for at least {percent(COLLAPSED)} % of the test images.")
    kinds = machines(cells)
    if kinds:
        named = "; ".join(f"{letter}: {kind}" for kind, letter in kinds.items())
        said.append(f"Runs of several kinds of machine, whose arithmetic may differ in the last bits ({named}).")
    return " ".join(said)


def finished(cells: Iterable[ReportCell]) -> list[ReportCell]:
    """The cells that have results."""
    return [cell for cell in cells if cell["status"] == "finished"]


def runs(cells: Iterable[ReportCell]) -> list[ReportCell]:
    """Each run once: rows may share one."""
    return list({cell["key"]: cell for cell in cells}.values())


def check(cells: Sequence[ReportCell], study: str) -> None:
    """``UserError`` if the finished runs do not belong in one table: several precisions, several revisions of one
    component, or rows that were trained on different labels at the same noise and seed."""
    done = finished(cells)
    _one_each(done, lambda c: [("precision", c["precision"])], f"study {study} mixes")
    _one_each(done, lambda c: list(c["revisions"].items()), f"study {study} mixes revisions of")
    _one_each(done, lambda c: [(_place(c), c["labels"])], f"study {study}: different labels at")


def _place(cell: ReportCell) -> str:
    return ", ".join(filter(None, (column_name(cell), cell["variant"], f"seed {cell['seed']}")))


def _one_each(cells: Iterable[ReportCell], facts: Callable[[ReportCell], list[tuple[str, Any]]], fault: str) -> None:
    """Check that each named fact has one value over all cells."""
    seen: dict[str, dict[Any, list[str]]] = {}
    for cell in cells:
        for name, value in facts(cell):
            seen.setdefault(name, {}).setdefault(value, []).append(cell["key"])
    for name, values in seen.items():
        if len(values) > 1:
            found = "; ".join(f"{str(v)[:16]} in {_some(keys)}" for v, keys in values.items())
            raise UserError(f"{fault} {name}: {found}; run one of these groups again, or put them in two studies")


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ("run " if len(keys) == 1 else "runs ") + ", ".join(keys[:3]) + more


def _without_place(dataset: str | None) -> str | None:
    """'folder:pets' of folder:/home/me/pets: a report is read on other machines."""
    kind, colon, place = (dataset or "").partition(":")
    return f"{kind}:{Path(place).name}" if colon else dataset


def column_name(cell: Mapping[str, Any]) -> str:
    """A column of a table: a noise type with its nominal rate."""
    own = str(cell["noise_type"]).partition(":")[0] in OWN_RATE
    return str(cell["noise_type"]) + ("" if own else f" {percent(cell['noise'])} %")


def place_name(cell: Mapping[str, Any]) -> str:
    """Row and noise."""
    return f"{cell['row']}, {column_name(cell)}"


def percent(share: float) -> str:
    """A share of 1 in percent, in its shortest form."""
    return f"{100 * share:.10g}"


def summary_table(cells: Sequence[ReportCell], measure: str = "last") -> list[Summary]:
    """One dictionary for each row and column: the ``values`` of ``measure`` over the finished seeds, their mean and
    sample standard deviation (n - 1; None for one seed), from five seeds on the 95 % interval of the mean (``low`` and
    ``high``; else None), all as shares of 1, and how many seeds there are, failed, or are still missing. Rows in the
    order of the plan, columns by noise type and rate."""
    groups: dict[tuple[str, str, float], list[ReportCell]] = {}
    kinds = machines(cells)
    for cell in cells:
        groups.setdefault((cell["row"], cell["noise_type"], cell["noise"]), []).append(cell)
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    summaries = []
    for row, noise_type, noise in sorted(groups, key=lambda place: (rows.index(place[0]), *place[1:])):
        group = groups[row, noise_type, noise]
        done, failed = finished(group), sum(cell["status"] == "failed" for cell in group)
        values = [cell[measure] for cell in done if cell.get(measure) is not None]
        flips = [cell["flip_rate"] for cell in done if cell["flip_rate"] is not None]
        mean = math.fsum(values) / len(values) if values else None
        n, spread = len(values), math.fsum((v - mean) ** 2 for v in values) if mean is not None else 0.0
        sd = math.sqrt(spread / (n - 1)) if n > 1 else None
        low, high = share_interval(values, (1 - COVERAGE) / 2) if n >= INTERVALS else (None, None)
        summaries.append(
            {
                "row": row,
                "m": joined(cell["m"] for cell in done),
                "rho": joined(cell["rho"] for cell in done),
                "noise_type": noise_type,
                "noise": noise,
                "flip_rate": math.fsum(flips) / len(flips) if flips else None,
                "measure": measure,
                "n": n,
                "mean": mean,
                "sd": sd,
                "low": low,
                "high": high,
                "values": values,
                "machines": "".join(sorted({kinds[cell["machine"]] for cell in done})) if kinds else "",
                "unmeasured": len(done) - len(values),
                "collapsed": sum(cell.get("collapsed") is True for cell in done),
                "failed": failed,
                "missing": len(group) - len(done) - failed,
            }
        )
    return summaries


def joined(values: Iterable[Any], none: str = "") -> str:
    """The distinct values in their order, numbers in their shortest form."""
    present = [f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not None]
    return ", ".join(dict.fromkeys(present)) or none


def layout(summaries: Sequence[Summary]) -> pd.DataFrame:
    """A table as it is printed: rows x noise, in percent, mean ± standard deviation, with the seeds themselves, or from
    five seeds on the 95 % interval of the mean and the number of seeds."""
    single = len({s["noise_type"] for s in summaries}) == 1 and not any(
        str(s["noise_type"]).partition(":")[0] in OWN_RATE for s in summaries
    )
    places = columns(summaries)
    lines: dict[str, dict[str, str]] = {}
    for row in dict.fromkeys(s["row"] for s in summaries):
        own = {(s["noise_type"], s["noise"]): s for s in summaries if s["row"] == row}
        line = {"row": row, "m": joined(_split(own, "m")), "rho": joined(_split(own, "rho"))}
        for place in places:
            name = (
                f"{percent(place[1])} %"
                if single
                else column_name(dict(zip(("noise_type", "noise"), place, strict=True)))
            )
            line[name] = _field(own[place]) if place in own else ""
        lines[row] = line
    return pd.DataFrame(list(lines.values()))


def best(summaries: Sequence[Summary], lowest: bool = False) -> set[tuple[str, str, float]]:
    """Row, noise type and rate of the best mean in each column that has several; all of them where they are equal."""
    found = set()
    for place in columns(summaries):
        here = [s for s in summaries if (s["noise_type"], s["noise"]) == place and s["mean"] is not None]
        top = (min if lowest else max)((s["mean"] for s in here), default=None)
        if len(here) > 1:
            found |= {(s["row"], *place) for s in here if s["mean"] == top}
    return found


def columns(summaries: Sequence[Summary]) -> list[tuple[str, float]]:
    """The columns of a table in their order: noise type and rate."""
    return sorted({(s["noise_type"], s["noise"]) for s in summaries})


def _split(own: Mapping[Any, Summary], name: str) -> list[str]:
    return [value for s in own.values() for value in s[name].split(", ") if value]


def _field(s: Summary) -> str:
    """`90.51 ± 0.20 (90.37, 90.65)`, from five seeds on `90.51 ± 0.20 [90.26, 90.76] (n=5)`; what is not there is
    named."""
    lacking = [f"{s[name]} {name}" for name in ("collapsed", "failed", "missing") if s[name]]
    if not s["n"]:
        return "not measured" if s["unmeasured"] else "failed" if s["failed"] else "missing"
    spread = f" ± {100 * s['sd']:.2f}" if s["sd"] is not None else ""
    said = f"n={s['n']}"
    if s["low"] is not None:
        spread += f" [{100 * s['low']:.2f}, {100 * s['high']:.2f}]"
    elif s["n"] > 1:
        said = ", ".join(f"{100 * value:.2f}" for value in s["values"])
    trained = f" {s['machines']}" if s["machines"] else ""
    return f"{100 * s['mean']:.2f}{spread} ({'; '.join([said, *lacking])}){trained}"


def row_table(cells: Sequence[ReportCell]) -> pd.DataFrame:
    """Settings and cost of each row that has finished runs: its options, the mean number of gradient evaluations, and
    the median speed of those runs that had their machine for themselves."""
    done = finished(cells)
    fields = [name for name in RECIPE if name not in RECIPE_ALONE and len({str(cell[name]) for cell in done}) > 1]
    lines = []
    for row in dict.fromkeys(cell["row"] for cell in done):
        own = [cell for cell in done if cell["row"] == row]
        reasons = joined(cell["oracle"] or None for cell in own)
        lines.append(
            {
                "row": row,
                "m": joined(cell["m"] for cell in own),
                "rho": joined(cell["rho"] for cell in own),
                "options": _options(own, [name for name in fields if name != "epochs"]),
                "tag": f"oracle: {reasons}" if reasons else "blind",
                "epochs": joined(cell["epochs"] for cell in own),
                "gradient evaluations per image": _over(own, "gradient_evaluations", ".2f", fmean),
                "images/s": _speed(own, "images_per_second", ".0f"),
                "training minutes": _speed(own, "train_seconds", ".1f", 1 / 60),
            }
        )
        if any(cell.get("collapsed") for cell in done):
            lines[-1]["collapsed runs"] = str(sum(cell.get("collapsed") is True for cell in own))
        if any(cell.get("search") for cell in cells):
            lines[-1]["tuning"] = tuning_text(own[0].get("search"))
    return pd.DataFrame(lines)


def tuning_text(search: Mapping[str, Any] | None) -> str:
    """The budget of a row, what was tuned, and the values chosen."""
    if not search or not search["trials"]:
        return "0 trials"
    values = ", ".join(f"{field} {value:g}" for field, value in search["chosen"].items())
    return f"{search['trials']} trials: {values}"


def _speed(cells: Sequence[ReportCell], name: str, form: str, scale: float = 1.0) -> str:
    """The median of the runs that had their machine for themselves."""
    alone = [cell for cell in cells if not cell["beside_others"]]
    return WITHHELD if cells and not alone else _over(alone, name, form, median, scale)


def speed_remark(cells: Sequence[ReportCell]) -> str:
    """What the speeds of ``row_table`` are, and why some are not there."""
    shared = sum(cell["beside_others"] for cell in runs(finished(cells)))
    if not shared:
        return "Speeds and minutes are medians over the runs of a row."
    return (
        "Speeds and minutes are medians over the runs of a row that were trained alone; those of"
        f" {shared} of {len(runs(finished(cells)))} runs are withheld, since other runs of the study were trained on"
        " the same kind of CPU at the same time, and may have shared its cores."
    )


def told_options(opt: str, of_method: Mapping[str, Any], of_optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a table shows: all of the method; m, rho, and what is not its default of the optimizer."""
    from noisysam.optim import OPTIMIZERS

    fields = OPTIMIZERS[opt].Options.model_fields if opt in OPTIMIZERS else {}
    usual = {name: field.default for name, field in fields.items() if name not in ("m", "rho")}
    return {**of_method, **{n: v for n, v in of_optimizer.items() if n not in usual or v != usual[n]}}


def _options(cells: Sequence[ReportCell], fields: Sequence[str]) -> str:
    """The options of a row's components, the settings in which rows of the study differ, and its plug-in; several
    values where they differ between its runs."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        options = told_options(cell["opt"], cell["method_options"], cell["optimizer_options"])
        settings = {f"--{n}" if n in options else n: cell[n] for n in fields}  # --warmup beside a method's warmup
        for name, value in {**options, **settings, "plugin": cell["plugin"]}.items():
            if value is not None and name not in ("m", "rho"):
                found.setdefault(name, []).append(shorten(str(value), SHORT, placeholder=" ..."))
    return ", ".join(f"{name}={' or '.join(dict.fromkeys(values))}" for name, values in found.items())


def _over(
    cells: Sequence[ReportCell], name: str, form: str, of: Callable[[list[float]], float], scale: float = 1.0
) -> str:
    values = [cell[name] for cell in cells if cell.get(name) is not None]
    return format(scale * of(values), form) if values else ""


def noise_table(cells: Sequence[ReportCell]) -> pd.DataFrame:
    """Nominal noise rates beside the measured flip rates."""
    lines = []
    for noise_type, noise in sorted({(cell["noise_type"], cell["noise"]) for cell in cells}):
        here = [c for c in finished(cells) if (c["noise_type"], c["noise"]) == (noise_type, noise)]
        flips = [cell["flip_rate"] for cell in here if cell["flip_rate"] is not None]
        measured = dict.fromkeys(f"{100 * flip:.2f}" for flip in (min(flips), max(flips))) if flips else {}
        measured = measured or dict.fromkeys(["not known"] if here else [])
        lines.append(
            {
                "noise": column_name({"noise_type": noise_type, "noise": noise}),
                "measured flip rate (%)": " to ".join(measured),
                "label files": str(len({cell["labels"] for cell in here})),
            }
        )
    return pd.DataFrame(lines)
