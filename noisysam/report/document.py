"""A report as a document: sections of text, tables and figures, printed as Markdown, HTML and TeX."""

import html
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from noisysam.core.files import atomic
from noisysam.core.text import inert, printable


@dataclass(frozen=True)
class Table:
    """A table of strings, as they are printed. ``links``: (line, column) -> the anchor of the runs behind a number;
    ``marked``: fields that are printed in bold."""

    name: str
    frame: pd.DataFrame
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    text: str = ""
    marked: Collection[tuple[int, int]] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing with its name and caption. ``detail``: the HTML page shows it, the Markdown only names it."""

    name: str
    caption: str
    drawing: Drawing
    detail: bool = False

    @property
    def path(self) -> str:
        """Where its SVG lies in the report's folder."""
        return f"{'details' if self.detail else 'figures'}/{self.name}.svg"


@dataclass(frozen=True)
class Section:
    """A heading and its content, in this order. ``lines``: list items, each a text or (text, anchor)."""

    title: str
    text: str = ""
    lines: Sequence[str | tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Document:
    """A title and sections."""

    title: str
    sections: Sequence[Section]

    def write(self, folder: Path) -> None:
        """``report.md`` with ``figures/*.svg``, ``report.html`` (opens offline, figures inside); for use elsewhere
        ``details/*.svg``, ``png/*.png`` and ``tables/*.tex``."""
        drawn = {}
        for section in self.sections:
            for table in section.tables:
                write_text(folder / "tables" / f"{table.name}.tex", tex(table.frame, table.marked))
            for figure in section.figures:
                drawn[figure.name] = svg(figure.drawing)
                write_text(folder / figure.path, drawn[figure.name])
                write_png(folder / "png" / f"{figure.name}.png", figure.drawing)
        write_text(folder / "report.html", self.html(drawn))
        write_text(folder / "report.md", self.markdown())

    def markdown(self) -> str:
        """The report in Markdown; figures lie beside it. What a number leads to is a footnote."""
        notes = {anchor for section in self.sections for table in section.tables for anchor in table.links.values()}
        parts = [section_markdown(section, notes) for section in self.sections]
        return "\n".join([f"# {_plain(self.title)}\n", *parts]).rstrip() + "\n"

    def html(self, drawn: Mapping[str, str]) -> str:
        """The report as one self-contained page; ``drawn``: figures by name, as SVG."""
        environment = Environment(
            loader=PackageLoader("noisysam.report", "."), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.filters["inline"] = _inline
        images = {name: Markup(image[image.index("<svg") :]) for name, image in drawn.items()}
        return printable(environment.get_template("page.html").render(document=self, images=images, entry=_entry))


def section_markdown(section: Section, notes: Collection[str] | None = None) -> str:
    """One section in Markdown. ``notes``: the anchors that tables of the document lead to, each a footnote; None:
    without footnotes."""
    parts = [f"## {_plain(section.title)}\n"]
    if section.text:
        parts.append(_plain(section.text) + "\n")
    items, ends = [], []
    for text, anchor in map(_entry, section.lines):
        if notes is not None and anchor in notes:
            ends.append(f"[^{anchor}]: {_plain(text)}\n")
        else:
            items.append(f"- {_plain(text)}")
    parts += ["\n".join(items) + "\n"] * bool(items) + ends
    for table in section.tables:
        parts += [_plain(table.text) + "\n"] if table.text else []
        parts.append(markdown(table.frame, table.marked, {} if notes is None else table.links) + "\n")
    for figure in section.figures:
        caption = _plain(figure.caption)
        parts.append(f"In `report.html`: {caption}\n" if figure.detail else f"![{caption}]({figure.path})\n")
    return "\n".join(parts)


def markdown(
    table: pd.DataFrame,
    marked: Collection[tuple[int, int]] = (),
    links: Mapping[tuple[int, int], str] = MappingProxyType({}),
) -> str:
    """A table in Markdown. ``links``: fields -> footnotes."""
    cells = _mark(table.map(lambda cell: _plain(str(cell)).replace("|", "\\|")), marked, "**{}**")
    for (line, column), anchor in links.items():
        text = str(cells.iat[line, column])
        cells.iat[line, column] = f"{text}[^{anchor}]"
    cells.columns = [_plain(str(name)).replace("|", "\\|") for name in cells.columns]
    return str(cells.to_markdown(index=False, disable_numparse=True))


def tex(table: pd.DataFrame, marked: Collection[tuple[int, int]] = ()) -> str:
    """A table for LaTeX with booktabs; characters that plain LaTeX lacks are written as commands."""
    text = _mark(table.map(lambda cell: printable(" ".join(str(cell).split()))), marked, "BOLD<{}>").to_latex(
        index=False, escape=True
    )
    text = re.sub(r"BOLD<([^<>]*)>", r"\\textbf{\1}", text)
    for sign, command in (("±", r"$\pm$"), ("−", "$-$"), ("–", "--"), ("<", r"\textless{}"), (">", r"\textgreater{}")):
        text = text.replace(sign, command)
    return text


def _mark(table: pd.DataFrame, marked: Collection[tuple[int, int]], form: str) -> pd.DataFrame:
    table = table.astype(object)
    for line, column in marked:
        table.iat[line, column] = form.format(table.iat[line, column])
    return table


def svg(drawing: Drawing) -> str:
    """A figure as SVG, the same bytes for the same figure; without comments and indentation, and with coordinates to a
    hundredth of a point."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "noisysam"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<!--.*?-->\n?", "", buffer.getvalue(), flags=re.DOTALL)  # matplotlib repeats every text in one
    text = re.sub(r"^ +", "", text, flags=re.MULTILINE)
    return re.sub(r"scale\([^)]*\)|-?\d+\.\d{3,}", _shortened, text)


def _shortened(number: re.Match[str]) -> str:
    return number[0] if number[0].startswith("scale") else f"{float(number[0]):.2f}"


def write_png(path: Path, drawing: Drawing) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    with atomic(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


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
    """Escaped text, with parts between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text)))
