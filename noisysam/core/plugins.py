"""A user's own components: from a Python file, ``--plugin my_method.py``, or from an installed package.

A package registers by an entry point of the group ``noisysam.plugins``, whose value is the module that does it::

    [project.entry-points."noisysam.plugins"]
    mine = "my_package.noisysam"
"""

import importlib.util
import sys
import warnings
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from noisysam.core.errors import UserError
from noisysam.core.files import file_digest
from noisysam.core.text import one_line
from noisysam.core.untrusted import check_file

GROUP = "noisysam.plugins"  # of entry points

_loaded: dict[str, Path] = {}  # digest -> file


def load(path: Path) -> str:
    """Run a Python file once, which registers its components; returns its SHA-256, which is part of the key of a run.

    ``UserError`` if it is missing or fails, or if it ends the program.
    """
    try:
        check_file(path)
    except UserError as error:
        raise UserError(f"--plugin {error}") from None
    digest = file_digest(path)
    if digest in _loaded:
        return digest
    name = f"noisysam_plugin_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError as error:  # what it registers does not keep the contract
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {error}") from None
    except (Exception, SystemExit, GeneratorExit) as error:
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {type(error).__name__}: {one_line(error)}") from error
    _loaded[digest] = path
    return digest


@cache
def load_installed() -> dict[str, str]:
    """Import once what installed packages register; returns the version of each such package. A package that fails is
    left out with a warning, so that it stands in nobody else's way."""
    versions = {}
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.name
        try:
            point.load()
        except (Exception, SystemExit, GeneratorExit) as error:
            warnings.warn(f"plug-in {point.name} of {package} is left out: {one_line(error)}", stacklevel=2)
        else:
            versions[package] = point.dist.version if point.dist else ""
    return versions
