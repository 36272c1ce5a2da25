"""A user's own components, from a Python file: ``--plugin my_method.py``."""

import importlib.util
import sys
from pathlib import Path

from noisysam.core.errors import UserError
from noisysam.core.files import file_digest

_loaded: dict[str, Path] = {}  # digest -> file


def load(path: Path) -> str:
    """Run a Python file once, so that what it registers is known; its SHA-256 is part of the key of a run.

    ``UserError`` where it is missing, or where it fails.
    """
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file")
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
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {type(error).__name__}: {error}".splitlines()[0]) from error
    _loaded[digest] = path
    return digest
