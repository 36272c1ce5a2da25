"""Cross-entropy."""

from noisysam.methods.base import METHODS, Method


@METHODS.register("ce", source="the baseline")
class CrossEntropy(Method):
    """Cross-entropy on the labels as given.

    Equation: -log p_y.
    Checked: torch's own, with and without label smoothing.
    """
