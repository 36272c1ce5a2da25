"""Pages and parts of pages that follow from the code.

One page for each registered method and optimizer, one for each committed report, and, within other pages, what these
markers name: ``<!-- fields: MODULE:CLASS -->`` (the fields of a pydantic model), ``<!-- help: COMMAND -->`` (the help
text of a command), ``<!-- components: KIND -->`` (the components of a kind as a table), ``<!-- published: tables -->``
(the published tables) and ``<!-- columns: results -->`` (those of ``noisysam.results()``). A component that is
registered appears by itself.
"""

import importlib
import inspect
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from noisysam import methods, optim
from noisysam.cli import catalogue
from noisysam.core.requirements import described

ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, Any] = {"methods": methods.METHODS, "optimizers": optim.OPTIMIZERS}
HEADINGS = {
    "Equation": "Equation",
    "Code": "Code of the authors",
    "Deviation": "Deviations",
    "State": "State",
    "Checked": "How it is checked",
}
Problem = tuple[str, str, float]  # data set, noise type, noise rate
PUBLISHED_FOR: tuple[Problem, ...] = (  # for which the authors' recipes are listed
    *itertools.product(("cifar10", "cifar100"), ("symmetric",), (0.2, 0.4, 0.5, 0.6, 0.8, 0.9)),
    *itertools.product(("cifar10", "cifar100"), ("asymmetric",), (0.4,)),
)


def write_pages(folder: Path) -> None:
    """Write every generated page below ``folder``; pages of components that are gone are removed."""
    for kind in (*KINDS, "reports"):
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir()
        pages = report_pages() if kind == "reports" else component_pages(kind)
        for name, text in pages.items():
            (folder / kind / f"{name}.md").write_text(text)


def on_source_read(app: object, page: str, source: list[str]) -> None:
    """Sphinx's hook: ``source`` holds the text of one page."""
    text = expanded(source[0])
    if page in KINDS:
        text = linked(text, page)
    source[0] = text


# components


def page_name(component: str) -> str:
    """The file name of a component's page, without its ending: 'elr+' -> 'elr-plus'."""
    return component.replace("+", "-plus")


def component_pages(kind: str) -> dict[str, str]:
    """Page name -> text, for every registered method or optimizer."""
    return {
        page_name(entry["name"]): component_page(kind, KINDS[kind][entry["name"]], entry)
        for entry in catalogue.entries(kind)
    }


def component_page(kind: str, item: Any, entry: Mapping[str, Any]) -> str:
    """What a component computes, its options, where it comes from and how it is checked."""
    parts = [f"# {entry['name']}", entry["summary"], *remarks(item), table(("", ""), facts(kind, entry))]
    ledger = entry["ledger"]
    if "Equation" in ledger:
        parts += ["## Equation", f"```text\n{wrapped(ledger['Equation'])}\n```"]
    if entry.get("options"):
        rows = [(f"`{o['name']}`", f"`{o['default']}`", o["description"] or "") for o in entry["options"]]
        parts += ["## Options", table(("option", "default", "meaning"), rows)]
    if kind == "methods":
        parts += published(item)
    parts += ["## Use", usage(kind, item, entry)]
    for name, text in ledger.items():
        if name != "Equation":
            parts += [f"## {HEADINGS.get(name, name)}", sentence(text)]
    parts += ["## Implementation", implementation(item)]
    return "\n\n".join(parts) + "\n"


def facts(kind: str, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table at the top of a page."""
    found = [("Source", with_links(entry["source"]))]
    if kind == "methods":
        from noisysam.bench.memory import sample_bytes

        told, size = ", ".join(entry["oracle"]), sample_bytes(entry["name"])
        found += [
            ("Networks", str(entry["networks"])),
            (
                "Memory per sample",
                "none" if size == "-" else f"{size} bytes (K classes)" if "K" in size else f"{size} bytes",
            ),
            ("Uses facts of the noise", f"{told} (the run is tagged oracle)" if told else "no (blind)"),
        ]
    else:
        found += [
            ("Forwards and backwards per step", f"{entry['forwards']:g} and {entry['backwards']:g}"),
            ("Memory beyond SGD's", f"{entry['copies']:g} copies of the weights"),
            ("Equals SGD for", f"`{catalogue.settings(entry['null'])}`" if entry["null"] else "-"),
        ]
        if entry["requires"]:
            found.append(("Requires", described(entry["requires"])))
    return found


def remarks(item: object) -> list[str]:
    """The paragraphs of a docstring that are neither its first line nor part of the ledger."""
    paragraphs = inspect.cleandoc(item.__doc__ or "").split("\n\n")[1:]
    return [p.replace("``", "`") for p in paragraphs if not p.startswith(catalogue.LEDGER)]


def published(method: Any) -> list[str]:
    """How the authors trained, by data set and noise type, and their options by noise."""
    recipes = {problem: catalogue.recipe(method.name, *problem) for problem in PUBLISHED_FOR}
    parts = ["## Published recipe"]
    if method.published_recipe("cifar10", "symmetric", 0.4) is None:
        parts.append("Not published: there is no training script of the authors for these data.")
    else:
        parts += settings_table(recipes)
    return [*parts, *options_table(recipes)]


def settings_table(recipes: Mapping[Problem, dict[str, Any] | None]) -> list[str]:
    """The settings of a recipe, one row for those that are alike; what is not as published; the source."""
    rows: dict[str, list[str]] = {}
    differs, sources = {}, []
    for (dataset, noise_type, _), recipe in recipes.items():
        assert recipe is not None
        rows.setdefault(catalogue.settings(recipe["settings"]), []).append(f"{dataset}, {noise_type}")
        differs |= {f"{name}: {text}": None for name, text in recipe["differs"].items()}
        sources.append(recipe["source"])
    text = "`--preset published`, at the length of the authors; `--epochs` scales it (see [](../configuration.md))."
    places = [("any" if len(rows) == 1 else "; ".join(dict.fromkeys(found)), f"`{s}`") for s, found in rows.items()]
    parts = [text, table(("problem", "settings"), places)]
    if differs:
        parts += ["Not as published:", "\n".join(f"- {sentence(line)}" for line in differs)]
    return [*parts, f"Read in {', '.join(with_links(source) for source in dict.fromkeys(sources))}."]


def options_table(recipes: Mapping[Problem, dict[str, Any] | None]) -> list[str]:
    """The options that the authors chose by noise, rates that share them in one row; nothing where there are none."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (dataset, noise_type, noise), recipe in recipes.items():
        if recipe is not None and recipe["options"]:
            place = (dataset, noise_type, catalogue.settings(recipe["options"]))
            found.setdefault(place, []).append(f"{100 * noise:g}")
    rows = [(data, noise, f"{', '.join(rates)} %", f"`{options}`") for (data, noise, options), rates in found.items()]
    if not rows:
        return []
    text = "Options that go with it, where they differ from the defaults (an oracle's choice):"
    return [text, table(("data", "noise", "rate", "options"), rows)]


def usage(kind: str, item: Any, entry: Mapping[str, Any]) -> str:
    """How the component is called."""
    flag = "method" if kind == "methods" else "opt"
    options = "".join(f" --{flag}-option {o['name']}={o['default']}" for o in entry.get("options", [])[:1])
    lines = [f"```console\n$ noisysam run --noise 0.4 --{flag} {entry['name']}{options}\n```"]
    if kind == "optimizers" and item.__name__ in optim.__all__:
        lines.append(f"In a loop of your own: `noisysam.optim.{item.__name__}` (see [](../python.md)).")
    return "\n\n".join(lines)


def implementation(item: Any) -> str:
    """The source of the class."""
    file = Path(inspect.getsourcefile(item) or "").resolve()
    place = file.relative_to(ROOT)
    return f"`{place}`\n\n```{{literalinclude}} ../../{place}\n:pyobject: {item.__qualname__}\n:language: python\n```"


# reports


def report_pages() -> dict[str, str]:
    """A page for each committed report."""
    found = {path.parent.name: path for path in sorted(ROOT.glob("reports/*/report.md"))}
    found["speed"] = ROOT / "reports/speed.md"
    include = "```{{include}} ../../{place}\n:relative-images:\n:relative-docs: benchmarks/\n```\n"
    return {name: include.format(place=path.relative_to(ROOT)) for name, path in found.items()}


# parts of pages


def expanded(text: str) -> str:
    """The text with its markers replaced by what they name."""
    makers: dict[str, Callable[[str], str]] = {
        "fields": fields,
        "help": help_text,
        "components": components,
        "published": published_tables,
        "columns": columns,
    }
    return re.sub(rf"<!-- ({'|'.join(makers)}): (.+?) -->", lambda m: makers[m[1]](m[2]), text)


def linked(text: str, kind: str) -> str:
    """The rows of a table of components with links to their pages."""
    known = KINDS[kind]
    return re.sub(
        r"(?m)^\| `([^`]+)` \|",
        lambda m: f"| [`{m[1]}`]({kind}/{page_name(m[1])}.md) |" if m[1] in known else m[0],
        text,
    )


def fields(place: str) -> str:
    """The fields of a pydantic model, ``module:Class``, with their defaults and descriptions."""
    module, _, name = place.partition(":")
    model = getattr(importlib.import_module(module), name)
    rows = []
    for field_name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default}`"
        rows.append((f"`{field_name}`", default, field.description or ""))
    return table(("field", "default", "meaning"), rows)


def help_text(command: str) -> str:
    """What ``noisysam COMMAND --help`` prints."""
    from noisysam.cli import cli

    item: click.Command = cli
    context = click.Context(cli, info_name="noisysam", max_content_width=100)
    for word in command.split()[1:]:
        assert isinstance(item, click.Group)
        item = item.commands[word]
        context = click.Context(item, info_name=word, parent=context)
    return f"```text\n{item.get_help(context)}\n```"


def components(kind: str) -> str:
    """Names, one line and source of the components of a kind."""
    rows = [(f"`{e['name']}`", e["summary"], with_links(e["source"])) for e in catalogue.entries(kind)]
    return table(("name", "what it is", "source"), rows)


def columns(_: str) -> str:
    """The columns of ``noisysam.results()``."""
    from noisysam.report.frame import COLUMNS

    return table(("column", "content"), [(f"`{name}`", meaning) for name, meaning in COLUMNS.items()])


def published_tables(_: str) -> str:
    """The published tables that a study can name."""
    from noisysam.report.published import published, tables

    return table(
        ("name", "source"), [(f"`{name}`", with_links(published(name)["source"].iloc[0])) for name in tables()]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in (head, *rows)]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(head)), *lines[1:]])


def with_links(source: str) -> str:
    """A source with its arXiv numbers as links."""
    return re.sub(r"(?:arXiv )?\b(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def wrapped(equation: str) -> str:
    """An equation with one statement a line."""
    return re.sub(r"; +", ";\n", equation)


def sentence(text: str) -> str:
    """A note with a capital letter and a full stop, and nothing that Markdown would take for markup."""
    text = re.sub(r"([\\*_<>\[\]$|])", r"\\\1", text.strip())
    return text if text.endswith(".") else text + "."
