"""A report as a document: sections of text, tables and figures, printed as Markdown, HTML and TeX."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from noisysam.core.files import atomic
from noisysam.core.text import inert, printable


@dataclass(frozen=True)
class Table:
    """A table of strings, as they are printed. ``links``: (line, column) -> the anchor of the runs behind a number."""

    name: str
    frame: pd.DataFrame
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its name and the sentence under it."""

    name: str
    caption: str
    drawing: Drawing


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it, in this order. ``lines`` are a list: text, or (text, anchor)."""

    title: str
    text: str = ""
    lines: Sequence[str | tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Document:
    """A title, lines of facts, sections."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]

    def write(self, folder: Path) -> None:
        """``report.md``, ``report.html`` (opens offline, figures inside), ``tables/*.tex`` and ``figures/*``."""
        drawn = {figure.name: svg(figure.drawing) for section in self.sections for figure in section.figures}
        for name, image in drawn.items():
            write_text(folder / "figures" / f"{name}.svg", image)
        for section in self.sections:
            for table in section.tables:
                write_text(folder / "tables" / f"{table.name}.tex", tex(table.frame))
            for figure in section.figures:
                with atomic(folder / "figures" / f"{figure.name}.png") as temporary:
                    figure.drawing.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        write_text(folder / "report.html", self.html(drawn))
        write_text(folder / "report.md", self.markdown())

    def markdown(self) -> str:
        """The report in Markdown; figures lie beside it."""
        facts = "".join(f"- {name}: {_plain(value)}\n" for name, value in self.facts)
        return "\n".join([f"# {_plain(self.title)}\n", facts, *map(section_markdown, self.sections)]).rstrip() + "\n"

    def html(self, drawn: Mapping[str, str]) -> str:
        """The report as one self-contained page; ``drawn``: figures by name, as SVG."""
        environment = Environment(
            loader=PackageLoader("noisysam.report", "."), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.filters["inline"] = _inline
        images = {name: Markup(image[image.index("<svg") :]) for name, image in drawn.items()}
        return printable(environment.get_template("page.html").render(document=self, images=images, entry=_entry))


def section_markdown(section: Section) -> str:
    """One section in Markdown."""
    parts = [f"## {_plain(section.title)}\n"]
    if section.text:
        parts.append(_plain(section.text) + "\n")
    if section.lines:
        parts.append("\n".join(f"- {_plain(_entry(line)[0])}" for line in section.lines) + "\n")
    for table in section.tables:
        parts += [_plain(table.text) + "\n"] if table.text else []
        parts.append(markdown(table.frame) + "\n")
    parts += [f"![{_plain(figure.caption)}](figures/{figure.name}.png)\n" for figure in section.figures]
    return "\n".join(parts)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    cells = table.map(lambda cell: _plain(str(cell)).replace("|", "\\|"))
    cells.columns = [_plain(str(name)).replace("|", "\\|") for name in cells.columns]
    return str(cells.to_markdown(index=False, disable_numparse=True))


def tex(table: pd.DataFrame) -> str:
    """A table for LaTeX with booktabs; signs that plain LaTeX lacks are spelt out."""
    text = table.map(lambda cell: printable(" ".join(str(cell).split()))).to_latex(index=False, escape=True)
    for sign, command in (("±", r"$\pm$"), ("−", "$-$"), ("–", "--"), ("<", r"\textless{}"), (">", r"\textgreater{}")):
        text = text.replace(sign, command)
    return text


def svg(drawing: Drawing) -> str:
    """A figure as SVG, the same bytes for the same figure."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "noisysam"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"<!--.*?-->\n?", "", buffer.getvalue(), flags=re.DOTALL)  # matplotlib notes every text in a comment


def write_text(path: Path, text: str) -> None:
    """Replace a file."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _entry(line: str | tuple[str, str]) -> tuple[str, str]:
    return line if isinstance(line, tuple) else (line, "")


def _plain(text: str) -> str:
    """One line of Markdown that holds no HTML."""
    return inert(" ".join(text.split(" ")))


def _inline(text: str) -> Markup:
    """Text with what stands between backticks as code; everything escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text)))
