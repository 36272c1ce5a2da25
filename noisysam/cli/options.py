"""The fields of ``RunConfig`` as options of a command."""

from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

import click

from noisysam.cli.completion import components
from noisysam.core.errors import UserError
from noisysam.runs.synonyms import SYNONYMS


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


GROUPS = {  # headings of the help: the first field of each, in the order of ``RunConfig``
    "dataset": "Data",
    "noise": "Noise",
    "model": "Network",
    "plugin": "Method",
    "opt": "Optimizer",
    "base_opt": "Training",
    "eval_every": "Measurement and machine",
}
OF_STORE = "Results and MLflow"
COMPONENTS = {  # fields that name a component, and how `noisysam list` calls its kind
    "dataset": "datasets", "noise_type": "noise", "model": "models", "method": "methods", "opt": "optimizers",
}  # fmt: skip
COMMON = {  # what `--help` shows; `--help-all` shows everything
    "dataset", "data_dir", "train_subset", "noise", "noise_type", "noise_seed", "model", "plugin", "method",
    "method_option", "opt", "opt_option", "rho", "sam_m", "lr", "weight_decay", "batch", "epochs", "seed", "precision",
    "device", "preset", "store", "tracking_uri", "no_track", "as_json", "help", "help_all",
}  # fmt: skip


class ConfigCommand(click.Command):
    """A command with an option for every field of ``RunConfig``; they are created when the command is parsed. Its help
    is in groups, and shows what is rarely used only with ``--help-all``."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from noisysam.runs.config import RunConfig

        options = [_option(name, field) for name, field in RunConfig.model_fields.items()]
        whole = click.Option(
            ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
            help="Show all options and exit.",
        )  # fmt: skip
        return [*options, *super().get_params(ctx), whole]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            meant = SYNONYMS.get(error.option_name.lstrip("-").replace("-", "_"))
            if meant is None:
                raise
            hint = f"Did you mean '--{meant.replace('_', '-')}'?"  # click itself hints at what is spelled alike alone
            raise click.UsageError(f"{error.message} {hint}", error.ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from noisysam.runs.config import RunConfig

        heading, hidden = "", 0
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            name, record = str(param.name), param.get_help_record(ctx)
            heading = GROUPS.get(name, heading) if name in RunConfig.model_fields else OF_STORE
            if name not in COMMON and not ctx.meta.get(ALL):
                hidden += 1
            elif record is not None:
                sections.setdefault(heading, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options: {ctx.command_path} --help-all")


ALL = "noisysam.help_all"


def _help_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


def _option(name: str, field: Any) -> click.Option:
    """The click option of a field. It has no default, so that only given values reach the configuration."""
    kind, choices = _kind(field.annotation)
    default = "" if field.default in (None, {}, [], -1) else f"  [default: {field.default}]"
    names = f"--{name.replace('_', '-')}"
    if kind is bool:
        names += f"/--no-{name.replace('_', '-')}"
    settings: dict[str, Any] = {"type": choices or click.STRING} if kind is not bool else {"default": None}
    if name == "plugin":
        settings["multiple"] = True  # so that a second one is not taken for the only one
    elif kind is dict:
        settings = {"multiple": True, "metavar": "KEY=VALUE"}
    elif kind in (int, float) and not choices:
        settings["metavar"] = kind.__name__.upper()
    if name in COMPONENTS:
        settings["shell_complete"] = components(COMPONENTS[name])
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
    if isinstance(values.get("plugin"), tuple):
        values["plugin"], *more = values["plugin"]
        if more:
            raise UserError("--plugin is given twice: a run takes one file, which may import others")
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
