"""The package's parts import downwards only, without a circle, not even within functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "noisysam"
FLOORS = (  # a part imports what stands on floors below its own; what shares a floor knows nothing of each other
    ("core",), ("data", "models"), ("noise",), ("optim", "methods"), ("runs",), ("training",), ("tracking",),
    ("studies",), ("report", "probes"), ("bench",), ("cli",),
)  # fmt: skip
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
MLFLOW = {"tracking"}  # the parts that may import it


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def test_every_module_stands_on_a_floor() -> None:
    parts = {name.split(".")[1] for name in MODULES if name.count(".")}
    assert parts - {"__main__"} == set(FLOOR)


@pytest.mark.parametrize("part", FLOOR)
def test_no_arrow_turns_back(part: str) -> None:
    turned = []
    for name, path in MODULES.items():
        if name.split(".")[1:2] != [part]:
            continue
        for line, target in imports(path):
            words = target.split(".")
            there = words[1] if words[0] == "noisysam" and len(words) > 1 else part
            if there in FLOOR and there != part and FLOOR[there] >= FLOOR[part]:
                turned.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {target}")
    assert not turned, "\n".join(turned)


def test_no_circle() -> None:
    """A module never reaches itself through what it imports, within its part either."""
    arrows: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for _, target in imports(path):
            known = next((n for n in (target, target.rpartition(".")[0]) if n in MODULES), None)
            if known is not None and known != name and not name.startswith(f"{known}."):
                arrows.setdefault(name, set()).add(known)
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(arrows.get(name, ())):
                visit(target, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_mlflow_is_imported_in_one_place() -> None:
    users = {
        name.split(".")[1] for name, path in MODULES.items() for _, t in imports(path) if t.split(".")[0] == "mlflow"
    }
    assert users == MLFLOW
