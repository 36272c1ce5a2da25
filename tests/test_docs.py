"""The documentation: complete, without dead links, and with commands that exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import noisysam
from noisysam.cli import catalogue, cli
from noisysam.cli.options import configured
from noisysam.methods import METHODS
from noisysam.optim import OPTIMIZERS
from noisysam.runs.config import validate

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(DOCS.glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """What stands in the code blocks of a page, fenced or indented."""
    text = page.read_text()
    fenced = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [*fenced, *re.findall(r"(?m)^    (?=[a-z.])(.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]


def commands(page: Path) -> list[list[str]]:
    """The words of each ``noisysam`` command that a page shows."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "noisysam" in words and words[0] in ("noisysam", "torchrun"):
                found.append(words[words.index("noisysam") + 1 :])
    return found


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join((p, *w)) for p, w in COMMANDS])
def test_commands_exist_with_their_options(page: str, words: list[str]) -> None:
    command: click.Command = cli
    context = click.Context(cli, info_name="noisysam")
    words = list(words)
    while isinstance(command, click.Group) and words:
        command = command.commands[words.pop(0)]
        context = click.Context(command, info_name=command.name, parent=context)
    command.parse_args(context, words)  # raises for an unknown option, or a value of the wrong type
    if command.name == "run" and not context.params["plugin"]:  # test_readme trains with the plugins
        given = {k: v for k, v in context.params.items() if k in noisysam.RunConfig.model_fields}
        validate(configured(given))


def test_the_pages_show_commands() -> None:
    assert {words[0] for _, words in COMMANDS if words} >= {"run", "sweep", "report", "ui", "probe", "compare", "list"}


@pytest.mark.parametrize("kind", ["methods", "optimizers"])
def test_every_component_has_a_page(kind: str) -> None:
    pages = generate.component_pages(kind)
    registry = {"methods": METHODS, "optimizers": OPTIMIZERS}[kind]
    assert len(pages) == len(registry)
    for name, item in registry.items():
        page = pages[generate.page_name(name)]
        assert page.startswith(f"# {name}\n")
        assert "## Equation" in page
        assert "## How it is checked" in page
        for option in item.Options.model_fields:
            assert f"| `{option}` |" in page
        assert f":pyobject: {item.__qualname__}" in page


def test_methods_of_other_suites_are_here_or_say_why() -> None:
    """The table of suites: each of their methods once, in a row of its own or of ours, and in the page as generated."""
    head, *rows = catalogue.suites()
    assert head[1:] == ("noisy-labels", "DISC", "BadLabels")
    assert [len([row for row in rows if row[1 + k] != "-"]) for k in range(3)] == [23, 14, 12]
    ours = [row for row in rows if row[0].startswith("`")]
    assert [row[0].strip("`") for row in ours] == sorted(METHODS)
    assert all(row[0].startswith("not written: ") for row in rows[len(ours) :])
    assert catalogue.table("suites") in (DOCS / "methods.md").read_text()


def test_every_report_has_a_page() -> None:
    assert set(generate.report_pages()) == {p.parent.name for p in ROOT.glob("reports/*/report.md")} | {"speed"}


def test_generated_markers_expand() -> None:
    for page in DOCS.glob("*.md"):
        assert not re.search(r"<!-- (?!table|file|bench|end)", generate.expanded(page.read_text())), page


def test_every_public_name_is_documented() -> None:
    text = (DOCS / "python.md").read_text() + (DOCS / "configuration.md").read_text()
    assert [name for name in noisysam.__all__ if f"noisysam.{name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    made = {
        DOCS / kind / f"{name}.md" for kind in ("methods", "optimizers") for name in generate.component_pages(kind)
    } | {DOCS / "reports" / f"{name}.md" for name in generate.report_pages()}
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path in made or path.exists(), target
        if anchor and path.suffix == ".md" and path not in made:
            assert anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """The anchors that a forge and MyST make of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_notebook_is_stored_without_outputs() -> None:
    for path in DOCS.glob("notebooks/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs")


@pytest.mark.slow
def test_the_documentation_builds(tmp_path: Path) -> None:
    """With warnings as errors, the notebook executed."""
    pytest.importorskip("myst_nb", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html/methods/elr.html").exists()
