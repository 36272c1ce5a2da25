"""Probes measure trained networks. Each is one class, registered where it is defined."""

from noisysam.probes import landscape, mechanism, quantise, sharpness  # noqa: F401  (they register)
from noisysam.probes.base import PARTS, PROBES, Part, Probe, Subject, load, probe, scalars

__all__ = ["PARTS", "PROBES", "Part", "Probe", "Subject", "load", "probe", "scalars"]
