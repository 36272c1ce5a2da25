"""The engine that a command asks for."""

from collections.abc import Iterable
from pathlib import Path

from noisysam.core.errors import UserError
from noisysam.studies.engines.base import Engine, Inline
from noisysam.studies.engines.ray import Ray
from noisysam.studies.engines.slurm import Slurm


def choose(
    name: str | None,
    store: Path,
    jobs: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    address: str | None = None,
    slurm: Iterable[str] = (),
) -> Engine:
    """The engine that a command asks for; without a ``name`` Ray where it asks for several jobs or for a cluster."""
    options = dict(_pair(text) for text in slurm)
    name = name or ("ray" if address or (jobs or 1) > 1 else "slurm" if options else "inline")
    for flag, given, only in (("--address", address, "ray"), ("--slurm", options, "slurm")):
        if given and name != only:
            raise UserError(f"{flag} goes with --engine {only}")
    if name == "ray":
        return Ray(jobs, cpus or 1, gpus, address)
    if name == "slurm":
        return Slurm(store / "slurm", jobs, cpus or 1, gpus, options)
    if (jobs or 1) > 1 or gpus is not None:
        raise UserError("--engine inline trains one run at a time, on what --device says: use --engine ray")
    if cpus is not None and cpus != int(cpus):
        raise UserError(f"--cpus-per-run {cpus:g}: --engine inline takes whole cores")
    return Inline(None if cpus is None else int(cpus))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--slurm {text}: write it as key=value, such as partition=gpu")
    return name.removeprefix("--"), value
