"""Picture: a figure that notebooks show, without pyplot and what it keeps.

>>> draw_diversity([report])          # the last line of a cell: shown
>>> axes, *_ = draw_diversity([report]).axes
"""

from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        found = BytesIO()
        self.savefig(found, format="png")
        return found.getvalue()
