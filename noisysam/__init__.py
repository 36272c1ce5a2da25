"""noisysam: how well do neural networks survive wrong training labels?

As a library: ``noisysam.fit(noisysam.RunConfig(noise=0.8, opt="sam"))``, ``noisysam.optim.SAM`` in any training loop,
``noisysam.results("study")`` as a DataFrame. Nothing heavy is imported before it is used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {  # public name -> module, and the name there
    "fit": ("training.fit", "fit"),
    "Result": ("training.result", "Result"),
    "RunConfig": ("runs.config", "RunConfig"),
    "results": ("report.frame", "results"),
    "suspects": ("probes.suspects", "suspects"),
    "Method": ("methods", "Method"),
    "Stage": ("methods", "Stage"),
    "Task": ("core.task", "Task"),
    "NoisyLabels": ("noise", "NoisyLabels"),
    "make_noise": ("noise", "make"),
}
_MODULES = ("data", "methods", "models", "noise", "optim", "probes")
__all__ = [  # noqa: RUF022  (first what is used first)
    "fit", "RunConfig", "Result", "results", "suspects", "Method", "Stage", "Task", "NoisyLabels", "make_noise", "data",
    "methods", "models", "noise", "optim", "probes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"noisysam.{name}")
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(f"noisysam.{module}"), attribute)
    raise AttributeError(f"module 'noisysam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
