"""Optimizers: SGD, AdamW and the SAM family. Each is one class, registered where it is defined."""

from collections.abc import Mapping
from typing import Any

from noisysam.core.errors import FieldError
from noisysam.optim.asam import ASAM
from noisysam.optim.base import (
    OPTIMIZERS,
    Options,
    Passes,
    Radius,
    SharpnessAware,
    checked,
    update_statistics_once,
)
from noisysam.optim.cr_sam import CRSAM
from noisysam.optim.esam import ESAM, ESAMInverse
from noisysam.optim.extrap_sgd import ExtrapSGD
from noisysam.optim.f_sam import FSAM
from noisysam.optim.gc_sam import GCSAM
from noisysam.optim.gsam import GSAM
from noisysam.optim.j_sam import JSAM
from noisysam.optim.l_sam import LSAM
from noisysam.optim.lookbehind import Lookbehind
from noisysam.optim.looksam import LookSAM
from noisysam.optim.mesa import MESA
from noisysam.optim.msam import MSAM
from noisysam.optim.ncsam import NCSAM
from noisysam.optim.reg_sgd import RegSGD
from noisysam.optim.saf import SAF
from noisysam.optim.sam import SAM, SAMRandom
from noisysam.optim.sam_on import SAMON
from noisysam.optim.sam_sga import SAMSGA
from noisysam.optim.saner import SANER
from noisysam.optim.sgd import SGD, AdamW
from noisysam.optim.ssam import SSAMF
from noisysam.optim.stable_sam import StableSAM
from noisysam.optim.universal import DetSAM, FrobSAM, TraceSAM, Universal
from noisysam.optim.vasso import VaSSO
from noisysam.optim.wsam import WSAM

__all__ = [
    "ASAM", "CRSAM", "ESAM", "FSAM", "GCSAM", "GSAM", "JSAM", "LSAM", "MESA", "MSAM", "NCSAM", "OPTIMIZERS",
    "SAF", "SAM", "SAMON", "SAMSGA", "SANER", "SGD", "SSAMF", "WSAM", "AdamW", "DetSAM", "ESAMInverse", "ExtrapSGD",
    "FrobSAM", "LookSAM", "Lookbehind", "Options", "Passes", "Radius", "RegSGD", "SAMRandom", "SharpnessAware",
    "StableSAM", "TraceSAM", "Universal", "VaSSO", "options", "update_statistics_once",
]  # fmt: skip


def options(
    name: str,
    given: Mapping[str, Any],
    rho: float | None = None,
    m: int | str | None = None,
    ascent_steps: int | None = None,
) -> Options:
    """The validated options of optimizer ``name``; ``UserError`` names the option that is wrong."""
    member = OPTIMIZERS[name]
    values = dict(given)
    for field, key, value in (("rho", "rho", rho), ("sam_m", "m", m), ("ascent_steps", "ascent_steps", ascent_steps)):
        if value is None:
            continue
        if key not in member.Options.model_fields:
            raise FieldError(field, value, f"optimizer {name} has no such option; give it only where it applies")
        if key in values:
            raise FieldError(field, value, f"option {key} of optimizer {name} is given too: leave one out")
        values[key] = value
    return checked(member, values)
