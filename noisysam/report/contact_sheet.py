"""A sheet of small pictures with a line of text below each."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from noisysam.report.figures import literal

COLUMNS = 8
INCHES = 1.35  # of a picture with its text


def contact_sheet(images: npt.NDArray[np.uint8], captions: Sequence[str], marks: Sequence[bool | None]) -> Figure:
    """Images (n, H, W, 1 or 3) in rows of ``COLUMNS``. ``marks``: captions in green where True, in red where False."""
    rows = max(1, -(-len(images) // COLUMNS))
    figure = Figure(figsize=(COLUMNS * INCHES, rows * INCHES * 1.25), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for panel in panels:
        panel.set_axis_off()
    for panel, image, caption, mark in zip(figure.axes, images, captions, marks, strict=False):
        grey = image.shape[-1] == 1
        panel.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
        colour = {True: "tab:green", False: "tab:red", None: "black"}[mark]
        text = literal(caption).replace(" | ", "\n")
        panel.text(0.5, -0.03, text, fontsize=7, color=colour, ha="center", va="top", transform=panel.transAxes)
    return figure
