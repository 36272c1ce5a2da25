"""Label noise: the models, human labels, label files."""

from noisysam.noise import models, observed  # noqa: F401  (they register)
from noisysam.noise.base import DRAWS, NOISE, brings_labels, make
from noisysam.noise.labels import NoisyLabels, load, save
from noisysam.noise.verification import verify

__all__ = ["DRAWS", "NOISE", "NoisyLabels", "brings_labels", "load", "make", "save", "verify"]
