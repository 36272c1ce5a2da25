"""noisysam: how well do neural networks survive wrong training labels?

As a library: ``noisysam.fit(noisysam.RunConfig(noise=0.8, opt="sam"))`` and ``noisysam.optim.SAM``. Nothing heavy is
imported before it is used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Method", "Result", "RunConfig", "fit", "optim"]

_PLACES = {
    "fit": "training.fit",
    "Result": "training.result",
    "RunConfig": "runs.config",
    "Method": "methods",
}


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("noisysam.optim")
    if name in _PLACES:
        return getattr(importlib.import_module(f"noisysam.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'noisysam' has no attribute {name!r}")
