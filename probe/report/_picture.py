"""Picture: a figure that notebooks show, without pyplot and what it keeps.

>>> draw_diversity([report])          # the last line of a cell: shown
>>> axes, *_ = draw_diversity([report]).axes
"""

from io import BytesIO
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        found = BytesIO()
        self.savefig(found, format="png")
        return found.getvalue()


def plain_axes(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Leave of a frame what is read, with lines behind what is drawn."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
