"""Study files: YAML, parsed with the line of each field."""

import difflib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from noisysam.core import plugins
from noisysam.core.errors import UserError
from noisysam.core.text import one_line
from noisysam.core.untrusted import check_file, unusable
from noisysam.core.validation import explain, named
from noisysam.runs.config import RunConfig
from noisysam.runs.record import STUDY

Values = dict[str, Any]


Place = tuple[Any, ...]  # where something stands in a file: ("rows", "SAM", "rho")


class SearchRange(BaseModel):
    """Values of one field that a search tries."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(False, description="whether values are spread evenly over their logarithm")


class SearchSettings(BaseModel):
    """The search of a study: the same number of trials for every row."""

    model_config = ConfigDict(extra="forbid")

    trials: int = Field(ge=1, le=1000, description="trials of each row; the first one has the row's present values")
    fields: dict[str, SearchRange] = Field(
        default={}, description="fields that are tuned, such as lr or opt_option.rho, each with its range"
    )
    seed: int = Field(
        default=1000, ge=0, description="seed of the trials and of the values tried; none of the study's seeds"
    )


class StudyFile(BaseModel):
    """The content of a study file. The values of a cell come from base, then grid, then row; later ones override."""

    model_config = ConfigDict(extra="forbid")

    include: str | None = Field(
        None, description="another study file, by its path from this one: its base and rows lie below those given here"
    )
    name: str | None = Field(
        None, pattern=f"^{STUDY}$", description="the study's name in the store (default: that of the file)"
    )
    base: Values = Field({}, description="values of every cell; as in a row, noise may be a mapping")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="fields that are crossed with the rows, each a list of values"
    )
    rows: dict[str, Values] = Field(
        min_length=1,
        description="named rows of the table, each with its values; noise may be a mapping from rates to the values"
        " that hold at that rate alone: SAM: {opt: sam, noise: {0.8: {rho: 0.05}}}; seeds may name those of the row;"
        " without rows, each combination of the grid's other fields than noise is one",
    )
    seeds: list[int] = Field([0], min_length=1, description="seeds; the noise seed is the same number")
    search: SearchSettings | None = Field(
        None,
        description="tune fields for each row on noisy validation labels before the study is run: {trials: 8, fields:"
        " {lr: {low: 0.01, high: 1, log: true}}}; `search` in a row names fields of its own, {} none",
    )
    retries: int = Field(0, ge=0, description="how often a failed run is tried again")
    published: str | list[str] | None = Field(
        None, description="published tables to print beside, such as sam-table4; a name or a list"
    )
    claims: list[Values] = Field([], description="what the report tests")

    def row_search(self, row: str, where: str) -> dict[str, SearchRange] | None:
        """The fields that a row names for the search; None if it names none. ``UserError`` if the study has no
        search."""
        if "search" not in self.rows[row]:
            return None
        if self.search is None:
            raise UserError(f"{where}: row {row!r} has fields to search, but the study has no search: give its trials")
        try:
            return TypeAdapter(dict[str, SearchRange]).validate_python(self.rows[row]["search"])
        except ValidationError as error:
            raise UserError(f"{where}: rows.{row}.search.{explain(error, prefix='')}") from None


# reading


LARGEST = 2**18  # bytes of a study file


NESTED, ITEMS, DIGITS = 20, 20_000, 400  # limits of a study file: depth, values with aliases, digits of a number


class Lines(dict[Place, tuple[Path, int]]):
    """The file and line of each field of a study."""

    def at(self, file: Path, *places: Place) -> str:
        """'study.yaml, line 7' for the first of these places that is known, or for its parent."""
        for place in places:
            if place in self:
                return "{}, line {}".format(*self[place])
        for place in places:
            for end in range(len(place) - 1, 0, -1):
                if place[:end] in self:
                    return "{}, line {}".format(*self[place[:end]])
        return str(file)


def read(path: Path) -> StudyFile:
    """Parse a study file and its includes; ``UserError`` names the file, the line and the field."""
    return read_lines(path)[0]


def study_name(path: Path) -> str:
    """The name that the study of a file has in a store, where the file is at hand; else the file's own."""
    return (path.is_file() and read(path).name) or path.stem


def read_lines(path: Path) -> tuple[StudyFile, Lines]:
    """A study file and the line of each of its fields."""
    content, lines = _content(path)
    if content.get("grid") and content.get("rows", {}) == {}:
        content |= _rows_of_grid(content.get("grid", {}))
    try:
        study = StudyFile.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{lines.at(path, error.errors()[0]['loc'])}: {explain(error, prefix='')}") from None
    if study.claims:
        from noisysam.studies.claims import parse

        if isinstance(study.base.get("plugin"), str):  # it may register a kind of claim
            plugins.load(Path(study.base["plugin"]))

        where = f"{lines.at(path, ('claims',))}: claims"
        for number, claim in enumerate(parse(study.claims, where), 1):
            for row in claim.rows:  # 'SAM, rho' names the variants of a row that the grid makes
                if row not in study.rows and not any(row.startswith(f"{known}, ") for known in study.rows):
                    raise UserError(f"{where}, number {number}: no row {row!r} (there are {', '.join(study.rows)})")
    return study, lines


NOISE = ("noise", "noise_type")  # columns of a table, not rows


def _rows_of_grid(grid: Any) -> Values:
    """The grid of a study that names no rows, divided: each combination of the fields that are not of the noise is a
    row, 'opt=sam, rho=0.1'."""
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        return {}  # which is reported with its line
    fields = [name for name in grid if name not in NOISE]
    points = [dict(zip(fields, point, strict=True)) for point in itertools.product(*(grid[name] for name in fields))]
    rows = {", ".join(f"{name}={value}" for name, value in point.items()) or "all": point for point in points}
    return {"rows": rows, "grid": {name: values for name, values in grid.items() if name in NOISE}}


def _content(path: Path, above: tuple[Path, ...] = ()) -> tuple[Values, Lines]:
    """The content of a file, merged with the base and the rows of the file that it includes."""
    content, lines = _parse(path)
    name = content.get("include")
    if name is None:
        return content, lines
    where = f"{lines.at(path, ('include',))}: include"
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{where}: the path of another study file was expected, not {name!r}")
    other = path.parent / name
    if not os.path.isfile(other):  # noqa: PTH113 (Path.is_file raises where a name is too long for the file system)
        raise UserError(f"{where}: there is no file {other}")
    if other.resolve() in (*above, path.resolve()):
        raise UserError(f"{where}: {other} includes this file in turn")
    below, lines_below = _content(other, (*above, path.resolve()))
    for part in ("base", "rows"):
        if not isinstance(below.get(part, {}), dict):
            raise UserError(f"{lines_below.at(other, (part,))}: {part}: a mapping was expected")
        if isinstance(content.get(part, {}), dict):
            content[part] = _above(content.get(part, {}), below.get(part, {}), deep=part == "rows")
    return content, Lines({place: line for place, line in lines_below.items() if place[0] in ("base", "rows")} | lines)


def _above(values: Values, below: Values, deep: bool) -> Values:
    """Merge two mappings; ``deep``: nested mappings with the same name as well."""
    merged = {**below, **values}
    if deep:
        for name in set(values) & set(below):
            if isinstance(values[name], dict) and isinstance(below[name], dict):
                merged[name] = {**below[name], **values[name]}
    return merged


def _parse(path: Path) -> tuple[Values, Lines]:
    """The content of one YAML file and the line of each field."""
    check_file(path, LARGEST)
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _check_size(root)
            _refuse_twice(root, set())
        content = None if root is None else loader.construct_document(root)
        lines = Lines({place: (path, line) for place, line in _places(loader, root)})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # PyYAML's own, and those of its constructors of numbers, dates and keys
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{path}{where}: not valid YAML ({problem})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping with base, grid, rows and seeds was expected")
    for name in content:
        if name not in StudyFile.model_fields and isinstance(name, str):
            raise UserError(f"{lines.at(path, (name,))}: {named(name)}: there is no such option{_hint(name)}")
    return content, lines


def _hint(name: str) -> str:
    """What somebody meant who wrote ``name`` at the top of a file."""
    near = difflib.get_close_matches(name, StudyFile.model_fields, n=1)
    if near:
        return f", did you mean {near[0]}?"
    return "; a field of the configuration stands in base, grid or a row" if name in RunConfig.model_fields else ""


def _check_depth(text: str) -> None:
    """Refuse deep nesting before PyYAML recurses into it."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > NESTED:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {NESTED} deep", event.start_mark)  # type: ignore[arg-type]


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that its aliases make very large or infinite, and scalars that cannot be used, before anything
    is constructed."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in above:
            raise yaml.MarkedYAMLError(None, None, "an alias within what it stands for", node.start_mark)
        if id(node) not in sizes:
            above.add(id(node))
            if isinstance(node, yaml.ScalarNode):
                reason = unusable(node.value.replace("\n", " ").replace("\t", " "))
                if reason is None and len(node.value) > DIGITS and not node.tag.endswith(":str"):
                    reason = f"a number of more than {DIGITS} digits"
                if reason is not None:
                    raise yaml.MarkedYAMLError(None, None, reason, node.start_mark)
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
            above.discard(id(node))
        if sizes[id(node)] > ITEMS:
            raise yaml.MarkedYAMLError(None, None, f"more than {ITEMS:,} values", node.start_mark)
        return sizes[id(node)]

    size(root)


def _refuse_twice(node: yaml.Node, seen: set[int]) -> None:
    """Refuse keys that are given twice: YAML would keep the last one."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[Any] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                keys.add(key.value)
            _refuse_twice(value, seen)


DEEPEST = 5  # of the places in a study file: rows, name, noise, rate, field


def _places(loader: yaml.SafeLoader, node: yaml.Node | None, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """All places below a node with their lines."""
    parts: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if len(place) < DEEPEST and isinstance(node, yaml.MappingNode):
        parts = [(loader.construct_object(k, deep=True), k, v) for k, v in node.value]
    elif len(place) < DEEPEST and isinstance(node, yaml.SequenceNode):
        parts = [(number, item, item) for number, item in enumerate(node.value)]
    for name, key, value in parts:
        yield (*place, name), key.start_mark.line + 1
        yield from _places(loader, value, (*place, name))
