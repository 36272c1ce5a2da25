"""Documents: every name may be hostile, every format holds every value, the same content gives the same bytes."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure as Drawing

from noisysam.report.document import Document, Figure, Section, Table, markdown, svg, tex

HOSTILE = '<script>alert("1")</script> $x_1$ a|b & 50 % #{}~^\\ "\'> `code` {{ 7 * 7 }}'


def drawing(label: str = "a line") -> Drawing:
    figure = Drawing(figsize=(3, 2))
    panel = figure.subplots()
    panel.plot([1, 2], [3, 4], label=label.replace("$", r"\$"))
    panel.legend()
    return figure


def document(name: str) -> Document:
    table = pd.DataFrame([[name, "1.00 ± 0.50"], ["plain", "2.00"]], columns=["row", f"noise {name}"])
    return Document(
        name,
        [
            Section(name, name, lines=[name, (name, "runs-1")], tables=[Table("one", table, {(0, 1): "runs-1"}, name)],
                    figures=[Figure("line", name, drawing(name))]),
            Section("More"),
        ],
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            self.attributes.setdefault(key, []).append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def written(tmp_path: Path) -> Path:
    document(HOSTILE).write(tmp_path)
    return tmp_path


def test_a_page_with_hostile_names_holds_them_as_text(written: Path) -> None:
    reader = Reader()
    reader.feed((written / "report.html").read_text())
    assert not reader.open
    assert "script" not in reader.tags
    assert not [name for name in reader.attributes if name.startswith("on")]
    for part in HOSTILE.split("`"):  # what stands between backticks is code
        assert part in reader.text
    assert "49" not in reader.text
    assert set(reader.attributes["href"]) == {"#section-1", "#section-2", "#runs-1"} | {
        h
        for h in reader.attributes["href"]
        if h.startswith("#m") or h.startswith("#D")  # glyphs and markers of the figure
    }
    assert "runs-1" in reader.attributes["id"]


def test_a_page_needs_nothing_from_outside(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "<svg" in text
    for outside in ('src="', "url(http", "@import", "<link", "<iframe", "<object"):
        assert outside not in text
    assert "default-src 'none'" in text


def test_markdown_with_hostile_names_keeps_its_table(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "<script" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert "1.00 ± 0.50[^runs-1]" in text
    assert sum(line.startswith("[^runs-1]: ") for line in text.splitlines()) == 1
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}
    assert "![" in text
    assert (written / "png" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert (written / "figures" / "line.svg").read_text().startswith("<?xml")


def test_details_are_on_the_page_and_only_named_in_markdown(tmp_path: Path) -> None:
    figure = Figure("small", "What it shows.", drawing(), detail=True)
    Document("Study", [Section("Details", figures=[figure])]).write(tmp_path)
    assert "What it shows." in (tmp_path / "report.md").read_text()
    assert "![" not in (tmp_path / "report.md").read_text()
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "details" / "small.svg").exists()
    assert not (tmp_path / "figures").exists()


def test_an_svg_is_short_and_shows_the_same() -> None:
    """Coordinates are rounded; scales, of which glyphs are made, are not."""
    text = svg(drawing("mm"))
    assert "scale(0.015625)" in text
    assert not re.search(r"\d\.\d{3,}", re.sub(r"scale\([^)]*\)", "", text))
    assert "\n " not in text


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        document("plain").write(tmp_path / name)
    first = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [str(p) for p in first] == [
        "figures/line.svg",
        "png/line.png",
        "report.html",
        "report.md",
        "tables/one.tex",
    ]
    for path in first:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert svg(drawing("other")) != svg(drawing())


def test_tex_spells_out_what_latex_lacks() -> None:
    text = tex(pd.DataFrame([["a & b", "1.00 ± 0.5", "< 3 %"]], columns=["x_1", "y", "z"]))
    assert r"\toprule" in text
    for part in (r"a \& b", r"1.00 $\pm$ 0.5", r"\textless{} 3 \%", r"x\_1"):
        assert part in text


def test_tables_compile(written: Path) -> None:
    """The hostile one, and those of every committed report."""
    if (
        shutil.which("kpsewhich") is None
        or not subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).stdout
    ):
        pytest.skip("no LaTeX with booktabs here")
    tables = [written / "tables" / "one.tex", *sorted((Path(__file__).parents[1] / "reports").glob("*/tables/*.tex"))]
    body = "\n\n".join(table.read_text() for table in tables)
    page = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\begin{document}\n"
    (written / "page.tex").write_text(page + body + "\\end{document}\n")
    run = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=written,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]
    assert (written / "page.pdf").exists()


def test_markdown_of_a_table_is_what_pandas_reads() -> None:
    frame = pd.DataFrame([["a|b", "1"], ["c", "2"]], columns=["row", "n"])
    assert markdown(frame).splitlines()[2] == "| a\\|b  | 1   |"
