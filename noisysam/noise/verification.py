"""Checks of a saved label file."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from noisysam.core.errors import UserError
from noisysam.noise.base import NOISE, make
from noisysam.noise.labels import check_clean, load
from noisysam.noise.models import MatrixNoise


def verify(path: Path, clean: ArrayLike | None = None) -> list[str]:
    """What could be checked about a saved label file, one line each; ``UserError`` where a check fails.

    Checked are the checksum; the clean labels against ``clean``, where given; and, where the labels follow from the
    definition alone (noise by class, of the present revision, not a part of a larger set), that a new draw gives them.
    """
    noisy = load(path)
    passed = [f"content fits its checksum (labels {noisy.digest[:12]}, definition {noisy.definition_digest[:12]})"]
    if clean is not None and noisy.clean is not None:
        check_clean(noisy.clean, np.asarray(clean), str(path))
        passed.append(f"all {len(noisy.truth)} clean labels equal the data set's")
    facts = noisy.definition
    by_class = facts["type"] in NOISE and issubclass(NOISE[facts["type"]], MatrixNoise)
    if by_class and facts["revision"] == NOISE[facts["type"]].revision and "taken_from" not in facts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether the noise can be learnt is not the question here
            again = make(
                facts["type"],
                noisy.truth,
                noisy.classes,
                rate=facts["rate"],
                seed=facts["seed"],
                draw=facts["draw"],
                superclasses=facts.get("superclasses"),
            )
        differing = int((again.labels != noisy.labels).sum())
        if differing:
            raise UserError(f"{path}: {differing} labels are not what its definition gives")
        passed.append(f"all {len(noisy.labels)} labels drawn again from the definition are the same")
    return passed
