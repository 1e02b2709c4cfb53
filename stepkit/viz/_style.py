"""How every picture of the project looks: its type, its names, one look for each method."""

import io

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.text import Text

from stepkit.attribution import _METHODS as METHODS

__all__ = ["CMAP", "DPI", "FONT", "OPACITY", "Picture", "caption", "palette", "styled"]

CMAP, OPACITY = "inferno", 0.75  # brighter from end to end, so that it survives printing in grey
DPI, FONT = 100, 11  # FONT in points
# seaborn's colours for colour-blind readers and its dark ones, less what is too pale on white. So
# many that the methods of the notebooks, by their places in Table I, have one each.
_BRIGHT, _DARK = sns.color_palette("colorblind"), sns.color_palette("dark")
COLOURS = [*(_BRIGHT[i] for i in (7, 0, 2, 3, 5, 4, 9)), (0.0, 0.0, 0.0)]
COLOURS += [*(_DARK[i] for i in (2, 4, 3, 9, 0, 1)), _BRIGHT[1], _DARK[8], _DARK[6]]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("", (4, 1.5), (1, 1), (3, 1.25, 1.5, 1.25), (6, 1, 1, 1, 1, 1))
_STYLE = sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92"})
_STYLE |= sns.plotting_context("paper", FONT / 9.6, {"lines.linewidth": 1.6})
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
_STYLE |= {"axes.xmargin": 0.01, "legend.frameon": False, "legend.handlelength": 3.2}
_STYLE |= {"figure.dpi": DPI, "figure.constrained_layout.use": True}


def styled():
    """Return a context, or a decorator, in which plots look as all others do."""
    return matplotlib.rc_context(_STYLE)


class Picture(Figure):
    """A Figure that Jupyter shows as a PNG also where pyplot was never imported.

    Names in it are drawn as they are written: no ``$`` begins a formula, none reaches TeX.
    """

    def draw(self, renderer) -> None:
        """Draw with ``renderer``, as matplotlib does."""
        with styled():  # some ticks are made only now
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


def palette(names=()) -> pd.DataFrame:
    """Return the one look and the one order that each method has in every plot.

    Parameters
    ----------
    names : iterable of str, optional
        What else is drawn; it follows the methods, in this order.

    Returns
    -------
    DataFrame
        ``colour`` (RGB), ``marker`` and ``dashes`` (on and off, in widths of the line; ``""`` is
        solid) by method id, in the order of `stepkit.methods`. No two of the first 40 agree in both
        marker and dashes, so that they differ in grey as well.

    Examples
    --------
    >>> palette().loc[["step", "grad_cam"], "marker"].nunique()
    2
    """
    names = list(dict.fromkeys([*METHODS, *names]))
    looks = [(COLOURS[i % 17], MARKERS[i % 8], DASHES[i % 5]) for i in range(len(names))]
    return pd.DataFrame(looks, names, ["colour", "marker", "dashes"])
