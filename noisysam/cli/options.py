"""The fields of ``RunConfig`` as options of a command."""

from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

import click

from noisysam.core.errors import UserError


class ProbeCommand(click.Command):
    """A command with an option for every probe; they are created when the command is parsed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from noisysam.core.registry import summary
        from noisysam.probes import PROBES

        options = [
            click.Option([f"--{name}", "names"], flag_value=name, multiple=True, help=summary(probe).rstrip("."))
            for name, probe in PROBES.items()
        ]
        return [*options, *super().get_params(ctx)]


class ConfigCommand(click.Command):
    """A command with an option for every field of ``RunConfig``; they are created when the command is parsed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from noisysam.runs.config import RunConfig

        options = [_option(name, field) for name, field in RunConfig.model_fields.items()]
        return [*options, *super().get_params(ctx)]


def _option(name: str, field: Any) -> click.Option:
    """The click option of a field. It has no default, so that only given values reach the configuration."""
    kind, choices = _kind(field.annotation)
    default = "" if field.default in (None, {}, [], -1) else f"  [default: {field.default}]"
    names = f"--{name.replace('_', '-')}"
    if kind is bool:
        names += f"/--no-{name.replace('_', '-')}"
    settings: dict[str, Any] = {"type": choices or click.STRING} if kind is not bool else {"default": None}
    if kind is dict:
        settings = {"multiple": True, "metavar": "KEY=VALUE"}
    elif kind in (int, float) and not choices:
        settings["metavar"] = kind.__name__.upper()
    return click.Option([names], help=(field.description or "") + default, **settings)


def _kind(annotation: Any) -> tuple[Any, click.Choice[str] | None]:
    """The plain type of a field, and its choices if it is a literal."""
    if get_origin(annotation) is Literal:
        return str, click.Choice(get_args(annotation))
    if get_origin(annotation) is dict:
        return dict, None
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return (inner[0], None) if len(inner) == 1 else (str, None)
    return annotation, None


def configured(given: dict[str, Any]) -> dict[str, Any]:
    """The given options as values of a configuration."""
    values = {name: value for name, value in given.items() if value is not None and value != ()}
    for name in ("method_option", "opt_option"):
        if name in values:
            values[name] = pairs(f"--{name.replace('_', '-')}", values[name])
    return values


def pairs(option: str, given: Iterable[str]) -> dict[str, str]:
    """Parse the ``key=value`` pairs of a repeatable option; ``UserError`` if one does not have this form."""
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {pair!r}: write it as key=value")
        found[key.strip().replace("-", "_")] = value.strip()
    return found
