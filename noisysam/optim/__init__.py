"""Optimizers: SGD, AdamW and the SAM family. Each is one class, registered where it is defined."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from noisysam.errors import UserError
from noisysam.optim.base import OPTIMIZERS, Options, SharpnessAware
from noisysam.optim.esam import ESAM
from noisysam.optim.jsam import JSAM
from noisysam.optim.msam import MSAM
from noisysam.optim.sam import SAM, SGD, AdamW

__all__ = ["ESAM", "JSAM", "MSAM", "OPTIMIZERS", "SAM", "SGD", "AdamW", "Options", "SharpnessAware", "options"]


def options(name: str, given: Mapping[str, Any], rho: float | None = None, m: int | str | None = None) -> Options:
    """The checked options of optimizer ``name``; ``UserError`` names the option that does not fit."""
    from noisysam.config import explain

    member = OPTIMIZERS[name]
    values = dict(given)
    for flag, key, value in (("--rho", "rho", rho), ("--sam-m", "m", m)):
        if value is None:
            continue
        if key not in member.Options.model_fields:
            raise UserError(f"{flag}: optimizer {name} has no such option; give it only where it applies")
        if key in values:
            raise UserError(f"{flag} and option {key} of optimizer {name} are both given: leave one out")
        values[key] = value
    try:
        return member.Options(**values)
    except ValidationError as error:
        raise UserError(f"optimizer {name}: " + explain(error, prefix="option ")) from None
