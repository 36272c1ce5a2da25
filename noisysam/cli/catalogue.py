"""The registered components and the machine, as data, as tables and as generated parts of pages."""

import csv
import importlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noisysam.core.registry import summary

REGISTRIES = {
    "methods": ("noisysam.methods", "METHODS"),
    "optimizers": ("noisysam.optim", "OPTIMIZERS"),
    "models": ("noisysam.models", "MODELS"),
    "datasets": ("noisysam.data", "DATASETS"),
    "noise": ("noisysam.noise", "NOISE"),
    "probes": ("noisysam.probes", "PROBES"),
    "claims": ("noisysam.studies.claims", "CLAIM_KINDS"),
}


def registry(what: str) -> Any:
    """The registry of a kind."""
    from noisysam.core import plugins

    plugins.load_installed()
    module, name = REGISTRIES[what]
    return getattr(importlib.import_module(module), name)


def named(what: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of some components; ``UnknownName`` for one that there is not."""
    for name in names:
        registry(what)[name]
    return [entry for entry in entries(what) if entry["name"] in names]


def entries(what: str) -> list[dict[str, Any]]:
    """Name, summary, source and options of every component of a kind."""
    found = []
    for name, item in sorted(registry(what).items()):
        entry: dict[str, Any] = {"name": name, "summary": summary(item), "source": item.source, "ledger": ledger(item)}
        if hasattr(item, "Options"):
            entry["options"] = [
                {"name": n, "default": field.default, "description": field.description}
                for n, field in item.Options.model_fields.items()
            ]
        if what == "optimizers":
            forwards, backwards = item.cost(item.Options())
            entry |= {"forwards": forwards, "backwards": backwards, "passes": list(item.passes)}
            entry |= {"copies": item.copies, "null": item.null, "requires": list(item.requires)}
        if what == "methods":
            entry |= {"networks": item.networks, "oracle": list(item.noise_facts(item.Options()))}
        found.append(entry)
    return found


LEDGER = ("Equation", "Code", "Deviation", "State", "Checked")  # paragraphs of a docstring


def ledger(item: object) -> dict[str, str]:
    """The named paragraphs of a docstring: equation, the authors' code, deviations, state per sample, checks."""
    lines = [line.strip() for line in (item.__doc__ or "").splitlines()]
    found: dict[str, str] = {}
    for line in itertools.takewhile(bool, itertools.dropwhile(lambda line: not line.startswith(LEDGER), lines)):
        head, colon, rest = line.partition(": ")
        if colon and head in LEDGER:
            last = head
            found[last] = f"{found[last]} {rest}" if last in found else rest
        else:
            found[last] += " " + line
    return found


def details(entry: dict[str, Any]) -> list[str]:
    """Lines for the terminal: cost of an optimizer, the options for which it equals SGD, and its requirements."""
    if "passes" not in entry:
        return []
    passes = f"{entry['forwards']:g} forwards, {entry['backwards']:g} backwards per step"
    lines = [f"{passes}; memory beyond SGD's: {entry['copies']:g} copies of the weights"]
    if entry["null"]:
        lines.append(f"equals SGD for {settings(entry['null'])}")
    if entry["requires"]:
        from noisysam.core.requirements import described

        lines.append(f"requires {described(entry['requires'])}")
    return lines


POINTS = ("milestones", "decay_from", "period")  # of a schedule: in epochs, or below 1 as shares of them


def recipe(
    method: str, dataset: str = "cifar10", noise_type: str = "symmetric", noise: float = 0.4, epochs: int | None = None
) -> dict[str, Any] | None:
    """The published recipe of a method at a length (None: the authors'): its source, the fields of a run's
    configuration with points of the schedule in epochs, options of the method, and what differs; None without one."""
    from noisysam.runs.presets import published

    preset = published(method, dataset, noise_type, noise, epochs)
    if preset is None:
        return None
    values = dict(preset.values)
    options = values.pop("method_option")
    for name in POINTS:
        if name in values:
            values[name] = _in_epochs(values[name], values["epochs"])
    return {"source": preset.source, "settings": values, "options": options, "differs": preset.differs}


def _in_epochs(point: Any, epochs: int) -> Any:
    if isinstance(point, list):
        return [_in_epochs(p, epochs) for p in point]
    return round(point * epochs, 3) if point < 1 else point


def recipe_lines(found: dict[str, Any] | None) -> list[str]:
    """A recipe for the terminal."""
    if found is None:
        return ["published recipe: none (no training script of the authors)"]
    lines = [f"published recipe (--preset published): {settings(found['settings'])}"]
    if found["options"]:
        lines.append(f"  options of the method: {settings(found['options'])}")
    lines += [f"  not as published: {name}: {text}" for name, text in found["differs"].items()]
    return [*lines, f"  from {found['source']}"]


def diagnosis(data_dir: Path | None) -> dict[str, Any]:
    """Versions, devices, precision and threads that ``auto`` selects, and the data that were found."""
    import torch

    from noisysam.core.environment import environment
    from noisysam.data.datasets import data_folder
    from noisysam.training import devices

    device = devices.resolve_device("auto")
    folder = data_folder(data_dir)
    present = [
        n for n in ("cifar10.npz", "cifar100.npz", "cifar-10-batches-py", "cifar-100-python") if (folder / n).exists()
    ]
    return {
        **environment(),
        "device": f"{device} ({devices.device_name(device)})",
        "cores": devices.cores(),
        "threads": torch.get_num_threads(),
        "precision auto": devices.precision_reason(device),
        "compile auto": devices.compile_reason(device),
        "data folder": str(folder),
        "data found": ", ".join(present) or "none (digits needs no file)",
    }


COLUMNS = {
    "methods": ("name", "what it does", "networks", "bytes per sample", "source"),
    "optimizers": ("name", "what it does", "forwards + backwards", "memory", "SGD for", "source"),
}


def table(what: str) -> str:
    """The methods or the optimizers as a Markdown table; 'suites': the methods beside those of other suites."""
    if what == "suites":
        return _markdown(suites())
    rows: list[Sequence[str]] = [COLUMNS[what]]
    for entry in entries(what):
        cells = [f"`{entry['name']}`", entry["summary"].rstrip(".")]
        if what == "methods":
            from noisysam.bench.memory import sample_bytes

            cells += [str(entry["networks"]), sample_bytes(entry["name"])]
        else:
            cells += [" + ".join(entry["passes"]), f"{entry['copies']:g}", settings(entry["null"]) or "-"]
        rows.append((*cells, entry["source"]))
    return _markdown(rows)


def suites() -> list[Sequence[str]]:
    """Rows of a table: each method of this package or of another suite, its name in every suite, and why it is not
    here where it is not (``methods/suites.csv``)."""
    from noisysam import methods

    with (Path(methods.__file__).parent / "suites.csv").open(newline="", encoding="utf-8") as file:
        known = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["suite"] for row in known))
    here = {name: {"": f"`{name}`"} for name in sorted(methods.METHODS)}
    missing: dict[str, dict[str, str]] = {}
    for row in known:
        cells = here.get(row["ours"]) or missing.setdefault(row["ours"] or row["theirs"], {"": row["reason"]})
        cells[row["suite"]] = row["theirs"]
    rows: list[Sequence[str]] = [("noisysam", *names)]
    return rows + [
        [cells[""], *(cells.get(suite, "-") for suite in names)] for cells in [*here.values(), *missing.values()]
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def settings(values: dict[str, Any]) -> str:
    """Options as text: 'rho=0, m=batch, milestones=100+150'."""
    return ", ".join(f"{name}={_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def generated(text: str, root: Path) -> str:
    """Update the generated parts of a Markdown text.

    ``<!-- table: methods -->`` ... ``<!-- end -->`` holds the table of a kind, ``<!-- file: PATH -->`` the main table
    of a report, and ``<!-- bench: PATH -->`` the tables of a part of the benchmark (``noisysam bench``).
    """

    def part(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        if kind == "table":
            content = table(name)
        elif kind == "file":
            content = first_table((root / name).read_text())
        else:
            from noisysam.bench.measure import markdown

            content = markdown(json.loads((root / name).read_text())["tables"])
        return f"<!-- {kind}: {name} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- (table|file|bench): (\S+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def first_table(text: str) -> str:
    """The first Markdown table below the heading that mentions the last epoch, or else of the text; no footnotes."""
    lines = re.sub(r"(\[\^\w+\])(?=.*\|)", lambda note: " " * len(note[0]), text).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("#") and "last epoch" in line.lower()]
    rows = itertools.dropwhile(lambda line: not line.startswith("|"), lines[heads[0] if heads else 0 :])
    return "\n".join(itertools.takewhile(lambda line: line.startswith("|"), rows))


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(generated(path.read_text(), path.resolve().parent))
