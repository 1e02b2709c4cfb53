"""What all pictures of the project share: size of type, colours of maps, names."""

import io

from matplotlib.figure import Figure
from matplotlib.text import Text

from stepkit.attribution import METHODS

CMAP, OPACITY = "inferno", 0.75  # brighter from end to end, so that it survives printing in grey
DPI, FONT = 100, 11  # FONT in points


class Picture(Figure):
    """A Figure that Jupyter shows as a PNG also where pyplot was never imported.

    Names in it are drawn as they are written: no ``$`` begins a formula, none reaches TeX.
    """

    def draw(self, renderer) -> None:
        """Draw with ``renderer``, as matplotlib does."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
            text.set_usetex(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        self.savefig(png := io.BytesIO(), format="png")
        return png.getvalue()


def caption(name) -> str:
    """Write a name for a reader: a method's id as its label, other underscores as blanks.

    Examples
    --------
    >>> caption("grad_cam, the mean"), caption("r2plus1d_narrow")
    ('Grad-CAM, the mean', 'r2plus1d narrow')
    """
    parts = str(name).split(", ")
    return ", ".join(METHODS[p].label if p in METHODS else p.replace("_", " ") for p in parts)
