"""The cells of a study as figures, means and printed tables."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from noisysam.core.errors import UserError
from noisysam.runs.record import RunFolder, load_study

Cell = dict[str, Any]  # one run of a study, flat: where it stands in the table, how it was made, every figure
Summary = dict[str, Any]  # one field of a table: row, column, mean and standard deviation over seeds

OWN_RATE = ("human", "file")  # noise types that bring their own rate
LEVEL = 0.95  # of intervals
RECIPE = (  # settings that a report prints, and that `results.csv` has
    "dataset", "augment", "noise_draw", "base_opt", "lr", "momentum", "nesterov", "weight_decay", "schedule", "warmup",
    "batch", "epochs", "eval_every",
)  # fmt: skip
WHOLE = ("variant", "revisions", "method_options", "matrix")  # of a cell: what is no single figure


def read_cells(store: Path, study: str) -> list[Cell]:
    """The cells of a study in the order of its plan. A row whose cells differ in more than noise and seed is split,
    and its name says by what. A record that cannot be read, or that is not of the run whose place it takes, gives no
    number: its cell's status is ``broken`` or ``foreign``."""
    plan = load_study(store, study)["cells"]
    return [
        _flat(cell, variant, _record(store, cell["key"])) for cell, variant in zip(plan, _variants(plan), strict=True)
    ]


def _record(store: Path, key: str) -> Mapping[str, Any]:
    try:
        record = RunFolder(store, key).record or {}
    except UserError as error:
        return {"status": "broken", "error": str(error)}
    if record and record.get("key") != key:
        return {"status": "foreign", "error": f"its folder holds the record of run {record.get('key')}"}
    return record


def _variants(plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each cell the settings, apart from noise and seed, that differ within its row."""
    configs = []
    for cell in plan:
        config = {k: v for k, v in cell["config"].items() if k not in ("noise", "noise_type", "seed")}
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


def _flat(cell: Mapping[str, Any], variant: str, record: Mapping[str, Any]) -> Cell:
    config, noise = record.get("config", {}), record.get("noise", {})
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
        "error": _first_line(record.get("error")),
        "m": options.get("m", config.get("sam_m")),
        "rho": options.get("rho", config.get("rho")),
        "oracle": "; ".join(record.get("oracle", [])),
        "flip_rate": noise.get("flip_rate"),
        "labels": noise.get("digest"),
        "method": config.get("method"),
        "opt": config.get("opt"),
        "method_options": record.get("method_options", {}),
        **{name: record.get("data", {}).get(name) for name in ("train", "val", "test")},
        "matrix": noise.get("matrix"),
        "model": model.get("name"),
        "parameters": model.get("parameters"),
        **{name: config.get(name) for name in RECIPE},
        **{name: resolved.get(name) for name in ("precision", "device_name", "threads")},
        "commit": record.get("environment", {}).get("commit"),
        "started": record.get("started"),
        "ended": record.get("ended"),
        "revisions": record.get("revisions", {}),
        **record.get("results", {}),
        **cost,
    }


def _first_line(error: str | None) -> str | None:
    """The line of an error that says what happened: of a traceback the last one."""
    lines = (error or "").strip().splitlines()
    return None if not lines else lines[-1 if lines[0].startswith("Traceback") else 0]


def finished(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that have results."""
    return [cell for cell in cells if cell["status"] == "finished"]


def check(cells: Sequence[Cell], study: str) -> None:
    """``UserError`` where the finished runs do not belong in one table: several precisions, several revisions of one
    component, or rows that were trained on different labels at the same noise and seed."""
    done = finished(cells)
    _one_each(done, lambda c: [("precision", c["precision"])], f"study {study} mixes")
    _one_each(done, lambda c: list(c["revisions"].items()), f"study {study} mixes revisions of")
    _one_each(done, lambda c: [(_place(c), c["labels"])], f"study {study}: different labels at")


def _place(cell: Cell) -> str:
    return ", ".join(filter(None, (column_name(cell), cell["variant"], f"seed {cell['seed']}")))


def _one_each(cells: Iterable[Cell], facts: Callable[[Cell], list[tuple[str, Any]]], fault: str) -> None:
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


def column_name(cell: Mapping[str, Any]) -> str:
    """A column of a table: a noise type with its nominal rate."""
    own = str(cell["noise_type"]).partition(":")[0] in OWN_RATE
    return str(cell["noise_type"]) + ("" if own else f" {percent(cell['noise'])} %")


def percent(share: float) -> str:
    """A share of 1 in percent, as short as it can be written."""
    return f"{100 * share:.10g}"


def summary_table(cells: Sequence[Cell], measure: str = "last") -> list[Summary]:
    """One dictionary for each row and column: mean and sample standard deviation (n - 1; None for one seed) of
    ``measure`` over the finished seeds, half the length of the mean's 95 % t interval (None below three seeds), in the
    unit of the records (accuracies: shares of 1), and how many seeds there are, failed, or are still missing. Rows in
    the order of the plan, columns by noise type and rate."""
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["row"], cell["noise_type"], cell["noise"]), []).append(cell)
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    summaries = []
    for row, noise_type, noise in sorted(groups, key=lambda place: (rows.index(place[0]), *place[1:])):
        group = groups[row, noise_type, noise]
        done, failed = finished(group), sum(cell["status"] == "failed" for cell in group)
        values = [cell[measure] for cell in done if cell.get(measure) is not None]
        flips = [cell["flip_rate"] for cell in done]
        mean = math.fsum(values) / len(values) if values else None
        n, spread = len(values), math.fsum((v - mean) ** 2 for v in values) if mean is not None else 0.0
        sd = math.sqrt(spread / (n - 1)) if n > 1 else None
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
                "half": None if sd is None or n < 3 else float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n),
                "unmeasured": len(done) - len(values),
                "failed": failed,
                "missing": len(group) - len(done) - failed,
            }
        )
    return summaries


def joined(values: Iterable[Any], none: str = "") -> str:
    """The distinct values in the order in which they come, numbers as short as they can be written."""
    present = [f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not None]
    return ", ".join(dict.fromkeys(present)) or none


def layout(summaries: Sequence[Summary]) -> pd.DataFrame:
    """A table as it is printed: rows x noise, in percent, mean ± standard deviation [95 % interval of the mean], with
    the number of seeds."""
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


def columns(summaries: Sequence[Summary]) -> list[tuple[str, float]]:
    """The columns of a table in their order: noise type and rate."""
    return sorted({(s["noise_type"], s["noise"]) for s in summaries})


def _split(own: Mapping[Any, Summary], name: str) -> list[str]:
    return [value for s in own.values() for value in s[name].split(", ") if value]


def _field(s: Summary) -> str:
    """`90.51 ± 0.20 [90.26, 90.76] (n=5)`; what is not there is named."""
    lacking = [f"{s[name]} {name}" for name in ("failed", "missing") if s[name]]
    if not s["n"]:
        return "not measured" if s["unmeasured"] else "failed" if s["failed"] else "missing"
    spread = f" ± {100 * s['sd']:.2f}" if s["sd"] is not None else ""
    if s["half"] is not None:
        spread += f" [{100 * (s['mean'] - s['half']):.2f}, {100 * (s['mean'] + s['half']):.2f}]"
    return f"{100 * s['mean']:.2f}{spread} ({', '.join(['n=' + str(s['n']), *lacking])})"


def row_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """What each row is and costs: means over its finished runs."""
    lines = []
    for row in dict.fromkeys(cell["row"] for cell in cells):
        done = finished(cell for cell in cells if cell["row"] == row)
        reasons = joined(cell["oracle"] or None for cell in done)
        lines.append(
            {
                "row": row,
                "m": joined(cell["m"] for cell in done),
                "rho": joined(cell["rho"] for cell in done),
                "tag": "" if not done else f"oracle: {reasons}" if reasons else "blind",
                "epochs": joined(cell["epochs"] for cell in done),
                "gradient evaluations per image": _mean(done, "gradient_evaluations", ".2f"),
                "images/s": _mean(done, "images_per_second", ".0f"),
                "training minutes": _mean(done, "train_seconds", ".1f", 1 / 60),
            }
        )
    return pd.DataFrame(lines)


def _mean(cells: Sequence[Cell], name: str, form: str, scale: float = 1.0) -> str:
    values = [cell[name] for cell in cells if cell.get(name) is not None]
    return format(scale * math.fsum(values) / len(values), form) if values else ""


def noise_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """Nominal rates beside the flip rates that were measured."""
    lines = []
    for noise_type, noise in sorted({(cell["noise_type"], cell["noise"]) for cell in cells}):
        here = [c for c in finished(cells) if (c["noise_type"], c["noise"]) == (noise_type, noise)]
        flips = [cell["flip_rate"] for cell in here]
        measured = dict.fromkeys(f"{100 * flip:.2f}" for flip in (min(flips), max(flips))) if flips else {}
        lines.append(
            {
                "noise": column_name({"noise_type": noise_type, "noise": noise}),
                "measured flip rate (%)": " to ".join(measured),
                "label files": str(len({cell["labels"] for cell in here})),
            }
        )
    return pd.DataFrame(lines)
