"""One look of all plots, from seaborn: its style, and a colour, a marker and dashes per method."""

import matplotlib
import pandas as pd
import seaborn as sns

from stepkit.attribution import METHODS
from stepkit.viz._style import DPI, FONT, Picture

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
STYLED = matplotlib.rc_context(_STYLE)


class Plot(Picture):
    """A picture in this style, also of what matplotlib makes only when it draws."""

    @STYLED
    def draw(self, renderer) -> None:
        """Draw with ``renderer``, as matplotlib does."""
        super().draw(renderer)


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
