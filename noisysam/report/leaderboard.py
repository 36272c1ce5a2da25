"""The leaderboard: all finished runs of the same problem side by side, in one page that can be sorted and filtered.

A problem is what a comparison has to hold fixed: data, what is held out, network, epochs, precision, and in each column
the noisy labels. A line is a recipe: everything else that changes a result. The page is one file without anything from
outside; its script is 40 lines of ours, allowed by its digest alone. (itables, the library for this, puts 0.97 MB of
script into a page, which is loaded from blob: addresses and evaluates strings, beside names that may be a stranger's.)
"""

import base64
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from noisysam import methods, optim
from noisysam.core.errors import UserError
from noisysam.core.text import printable
from noisysam.report.tables import EARLIER, column_name, earlier, joined, told_options, tuning_text
from noisysam.runs.config import RunConfig
from noisysam.runs.record import RunFolder, load_study, study_names
from noisysam.runs.schema import RunRecord, StudyPlan

PROBLEM = ("dataset", "train_subset", "subset_seed", "val_fraction", "model", "width", "norm", "epochs")
NOISE = ("noise", "noise_type", "noise_draw", "noise_seed", "seed")
OPTIONS = (
    "method",
    "method_option",
    "opt",
    "opt_option",
    "rho",
    "sam_m",
    "ascent_steps",
)  # shown as they were resolved
MACHINE = ("data_dir", "eval_every", "precision", "device", "compile", "snapshots", "deterministic")
APART = {*PROBLEM, *NOISE, *OPTIONS, *MACHINE}
LONG = 60  # characters of the value of an option

Link = Callable[[str, Sequence[str]], str]  # key of a run and its studies -> address, or nothing


@dataclass(frozen=True)
class Run:
    """A finished run with its (study, row, tuning) in every study that has it."""

    record: RunRecord
    studies: tuple[tuple[str, str, str], ...]
    address: str

    @property
    def column(self) -> tuple[str, float, str]:
        """Noise type, nominal rate and kind of draw."""
        config = self.record["config"]
        return config["noise_type"], config["noise"], config["noise_draw"]


@dataclass(frozen=True)
class Field:
    """What a recipe reached in one column: mean and standard deviation over seeds, shares of 1."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def text(self) -> str:
        """In percent, with the number of runs."""
        spread = f" ± {100 * statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:.2f}{spread} (n={len(self.values)})"


@dataclass(frozen=True)
class Line:
    """A recipe: its fields in the order of the columns (None: not run there), and what else is said of it."""

    name: str
    options: str
    oracle: str
    tuning: str
    studies: str
    seeds: str
    evaluations: float
    fields: tuple[Field | None, ...]
    runs: tuple[tuple[str, str, str], ...]  # what it is, key, address


@dataclass(frozen=True)
class Problem:
    """A problem with its recipes, the best ones first; settings that only some recipes have are among their options."""

    title: str
    facts: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def read_runs(store: Path, link: Link, studies: Sequence[str] | None = None) -> list[Run]:
    """The finished runs of a store, or of some of its studies."""
    places: dict[str, list[tuple[str, str, str]]] = {}
    for name in study_names(store) if studies is None else studies:
        plan = load_study(store, name)
        for cell in plan["cells"]:
            places.setdefault(cell["key"], []).append((name, cell["row"], _tuning(plan, cell["row"])))
    keys = places if studies is not None else sorted(path.parent.name for path in store.glob("*/record.json"))
    found = []
    for key in keys:
        record = RunFolder(store, key).sound_record
        if record is not None and record["status"] == "finished":
            own = tuple(dict.fromkeys(places.get(key, ())))
            found.append(Run(record, own, link(key, [study for study, _, _ in own])))
    return found


def _tuning(plan: StudyPlan, row: str) -> str:
    """What a study says of the tuning of a row: nothing where it was not searched for by it."""
    return tuning_text(plan["search"].get(row)) if plan.get("search") else ""


def problems(runs: Iterable[Run]) -> list[Problem]:
    """The problems that the runs are of, those with the most recipes first. Each run counts once."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in {run.record["key"]: run for run in runs}.values():
        groups.setdefault(_problem(run.record), []).append(run)
    return sorted(map(_board, groups.values()), key=lambda board: (-len(board.lines), board.title))


def _problem(record: RunRecord) -> tuple[Any, ...]:
    """What runs that are compared have in common."""
    config, data = record["config"], record["data"]
    of_config = tuple(config.get(name) for name in PROBLEM if name != "dataset")
    parameters, precision = record["model"]["parameters"], record["resolved"]["precision"]
    return (record["digests"].get("data"), data["train"], data["val"], *of_config, parameters, precision)


def _board(runs: Sequence[Run]) -> Problem:
    columns = _columns(runs)
    names = list(
        dict.fromkeys(columns[run.record["key"]] for run in sorted(runs, key=lambda run: _order(run, columns)))
    )
    recipes: dict[tuple[Any, ...], list[Run]] = {}
    usual = _usual(runs)
    for run in runs:
        recipes.setdefault(_recipe(run.record), []).append(run)
    lines = [_line(own, names, columns, usual) for own in recipes.values()]
    lines = _best_first(lines)
    first = runs[0].record
    data, digest = first["data"], str(first["digests"].get("data"))[:16]
    title = (
        f"{first['config']['dataset']}, {data['train']:,} images, {first['model']['name']}"
        f" ({first['model']['parameters']:,} parameters), {first['config']['epochs']} epochs,"
        f" {first['resolved']['precision']}"
    )
    held = f"{data['val']:,} more held out with their noisy labels" if data["val"] else "none held out"
    facts = (
        f"{counted(len(runs), 'run')} of {counted(len(lines), 'recipe')}; data {digest}; {held};"
        f" test accuracy (%) on {data['test']:,} images at the last epoch, mean ± standard deviation over seeds."
        f"{_said_usual(runs, usual)}"
    )
    return Problem(title, facts, tuple(names), tuple(lines))


def counted(number: int, what: str) -> str:
    """A number of things: '1 run', '2 runs'."""
    return f"{number} {what}{'s' * (number != 1)}"


def _columns(runs: Sequence[Run]) -> dict[str, str]:
    """Key of a run -> the name of its column. Runs with other labels than most at the same noise and seed have a column
    of their own."""
    digests: dict[tuple[Any, ...], Counter[str]] = {}
    for run in runs:
        labels = run.record["noise"]["digest"]
        digests.setdefault((*run.column, run.record["config"]["seed"]), Counter())[labels] += 1
    draws = len({run.column[2] for run in runs}) > 1
    found = {}
    for run in runs:
        kind, rate, draw = run.column
        usual = digests[*run.column, run.record["config"]["seed"]]
        labels = run.record["noise"]["digest"]
        other = "" if labels == min(usual, key=lambda each: (-usual[each], each)) else f", other labels ({labels[:8]})"
        found[run.record["key"]] = column_name({"noise_type": kind, "noise": rate}) + f", {draw}" * draws + other
    return found


def _order(run: Run, columns: Mapping[str, str]) -> tuple[str, float, int, str]:
    kind, rate, _ = run.column
    name = columns[run.record["key"]]
    return kind, rate, len(name), name


def _settings(record: RunRecord) -> dict[str, Any]:
    """Everything of a recipe but its method, optimizer and their options; fields that came later than the record are at
    their defaults, which is what they were."""
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    return {name: value for name, value in {**defaults, **record["config"]}.items() if name not in APART}


def _usual(runs: Sequence[Run]) -> dict[str, Any]:
    """The most frequent value of each setting of a problem."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        for name, value in _settings(run.record).items():
            found.setdefault(name, []).append(value)
    return {name: max(sorted(values, key=str), key=values.count) for name, values in found.items()}


def _said_usual(runs: Sequence[Run], usual: Mapping[str, Any]) -> str:
    """The usual values of settings that differ between runs."""
    differ = [n for n, value in usual.items() if any(_settings(run.record).get(n) != value for run in runs)]
    named = ", ".join(f"{name}={_short(usual[name])}" for name in differ if usual[name] is not None)
    return f" Where the options do not say otherwise: {named}." if named else ""


def _options(record: RunRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the method and of the optimizer; those that a rule chooses by the noise are left to the rule.
    Options that came later than the record, without a new revision, are at their defaults."""
    config, of_method, of_optimizer = record["config"], record["method_options"], record["optimizer_options"]
    if not earlier(record):
        of_method = {**_defaults(methods.compose, config["method"]), **of_method}
        of_optimizer = {**_defaults(optim.OPTIMIZERS.__getitem__, config["opt"]), **of_optimizer}
    if config.get("preset") == "published":
        of_method = {}
    if config.get("rho") == "paper":
        of_optimizer = {**of_optimizer, "rho": "paper"}
    return _given(of_method), _given(of_optimizer)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _defaults(resolve: Callable[[str], Any], name: str) -> dict[str, Any]:
    """The default options of a component; none where it is not registered here."""
    try:
        fields = resolve(name).Options.model_fields
    except UserError:
        return {}
    return {option: field.default for option, field in fields.items() if not field.is_required()}


def _recipe(record: RunRecord) -> tuple[Any, ...]:
    """What makes two runs the same recipe, apart from noise and seed."""
    config = record["config"]
    parts = (*_options(record), _settings(record), record["revisions"])
    return (config["method"], config["opt"], *(str(sorted(part.items(), key=str)) for part in parts))


def _line(runs: Sequence[Run], names: Sequence[str], columns: Mapping[str, str], usual: Mapping[str, Any]) -> Line:
    runs = sorted(runs, key=lambda run: (names.index(columns[run.record["key"]]), run.record["config"]["seed"]))
    first = runs[0].record
    config = first["config"]
    values: dict[str, dict[tuple[int, str], float]] = {}  # a seed with its labels counts once: its latest run
    for run in sorted(runs, key=lambda run: str(run.record["ended"])):
        seed = (run.record["config"]["seed"], run.record["noise"]["digest"])
        values.setdefault(columns[run.record["key"]], {})[seed] = run.record["results"]["last"]
    shown = told_options(config["opt"], *_options(first))
    for setting, value in _settings(first).items():
        if value is not None and value != usual[setting]:
            shown[f"--{setting}" if setting in shown else setting] = value
    name = config["opt"] if config["method"] == "ce" else f"{config['method']}, {config['opt']}"
    places = [place for run in runs for place in run.studies]
    spent = [run.record["cost"]["gradient_samples"] / max(run.record["data"]["train"], 1) for run in runs]
    return Line(
        name + f" ({EARLIER})" * earlier(first),
        ", ".join(f"{n}={shorten(_short(v), LONG, placeholder=' ...')}" for n, v in shown.items()),
        joined((reason for run in runs for reason in run.record["oracle"]), "blind"),
        joined((tuning or None for _, _, tuning in places), "none recorded"),
        "; ".join(dict.fromkeys(f"{row} ({study})" for study, row, _ in places)),
        joined(sorted({run.record["config"]["seed"] for run in runs})),
        math.fsum(spent) / len(spent),
        tuple(
            Field(tuple(value for _, value in sorted(values[column].items()))) if column in values else None
            for column in names
        ),
        tuple((_said(run, columns), run.record["key"], run.address) for run in runs),
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _said(run: Run, columns: Mapping[str, str]) -> str:
    """One run of a line, in a few words."""
    record, environment = run.record, run.record["environment"]
    cpu = environment.get("cpu") if record["resolved"]["device"] == "cpu" else None
    return (
        f"{columns[record['key']]}, seed {record['config']['seed']}: {100 * record['results']['last']:.2f} %, labels"
        f" {record['noise']['digest'][:8]}, {str(record['ended'])[:10]}, {cpu or record['resolved']['device_name']},"
        f" commit {environment.get('commit') or 'unknown'}"
    )


def _best_first(lines: Sequence[Line]) -> list[Line]:
    """By how far the means of a recipe are above those of the recipes in the same columns."""
    columns = list(zip(*(line.fields for line in lines), strict=True))
    typical = [statistics.fmean(field.mean for field in column if field is not None) for column in columns]

    def ahead(line: Line) -> float:
        there = [field.mean - mean for field, mean in zip(line.fields, typical, strict=True) if field is not None]
        return statistics.fmean(there)

    return sorted(lines, key=lambda line: (-round(ahead(line), 9), line.name, line.options))


def page(boards: Sequence[Problem]) -> str:
    """The leaderboard as one page. The same runs give the same bytes."""
    script = Path(__file__).with_name("leaderboard.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("noisysam.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("leaderboard.html")
    return printable(template.render(boards=boards, script=Markup(script), digest=digest))
