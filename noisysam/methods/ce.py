"""Cross-entropy."""

from noisysam.methods.base import METHODS, Method


@METHODS.register("ce", source="the baseline")
class CrossEntropy(Method):
    """Cross-entropy on the labels as given.

    Equation: -log p_y.
    Checked: equal to torch's to 1e-12 (tests/parity), with and without label smoothing.
    """
