"""The plots of the notebooks: insertion curves, the course of an optimisation, of a training."""

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from stepkit import _checks
from stepkit.attribution import methods
from stepkit.viz.pictures import DPI, FONT, Picture, caption

# Okabe and Ito's palette, which colour-blind readers tell apart (less its yellow, too pale on
# white). 7 colours, 4 dashes and 9 markers: no two of the first 252 curves look alike.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")


def plot_curves(
    curves, *, xlabel="share of the clip inserted", ylabel="probability of the class", title=None
) -> Figure:
    """Plot the mean curve of each method within its 95 % bootstrap interval over the clips.

    Parameters
    ----------
    curves : dict of str to (fractions, values)
        Per method, fractions (L+1,) and values (N, L+1), a curve per clip.
    xlabel, ylabel, title : str
        For deletion, ``xlabel="share of the clip deleted"``.

    Returns
    -------
    Figure
        The legend lists the highest mean first. The band is the percentile interval of the mean
        over 1000 resamples of the clips; one clip has none.

    Raises
    ------
    ValueError
        No curve, shapes that do not fit each other, NaN.

    Examples
    --------
    >>> figure = plot_curves({"step": ([0, 0.5, 1], [[0.1, 0.8, 0.9], [0.2, 0.6, 0.9]])})
    """
    _checks.require(len(curves) > 0, "curves", "none", "at least one")
    curves = {name: _curve(name, *pair) for name, pair in curves.items()}
    figure = Picture(figsize=(9, 4.2), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    # The look follows the caller's order, so that a method has the same one in two plots.
    for i, (name, (x, values)) in sorted(
        enumerate(curves.items()), key=lambda item: -item[1][1][1].mean()
    ):
        # Ten markers a curve, each method's elsewhere, so that they do not hide one another.
        every = max(1, len(x) // 10)
        marks = {"marker": MARKERS[i % 9], "markevery": (i * every // len(curves), every)}
        style = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4], "markersize": 5}
        ax.plot(x, values.mean(0), label=caption(name), **style, **marks)
        if len(values) > 1:
            ax.fill_between(x, *_interval(values), color=COLOURS[i % 7], alpha=0.13, linewidth=0)
    clips = sorted({len(values) for _, values in curves.values()})
    note = "to ".join(f"{n} " for n in dict.fromkeys((clips[0], clips[-1])))
    note = "one clip" if clips == [1] else f"mean over {note}clips,\nband: 95 % bootstrap"
    _dress(ax, xlabel, title)
    ax.set_ylabel(ylabel, fontsize=FONT)
    _legend(figure, ax, note)
    return figure


def _curve(name: str, fractions, values) -> tuple[np.ndarray, np.ndarray]:
    """Return one method's fractions (L+1,) and values (N, L+1), checked."""
    x, y = (
        np.asarray(a.detach().cpu() if isinstance(a, torch.Tensor) else a, float)
        for a in (fractions, values)
    )
    fits = x.ndim == 1 and y.ndim == 2 and len(y) > 0 and y.shape[1] == len(x)
    given = f"fractions {x.shape}, values {y.shape}"
    _checks.require(fits, f"curves[{name!r}]", given, "(L+1,) and (N, L+1)")
    finite = np.isfinite(x).all() and np.isfinite(y).all()
    _checks.require(finite, f"curves[{name!r}]", "NaN or infinity", "finite values")
    return x, y


def _interval(values: np.ndarray) -> np.ndarray:
    """Return the 2.5th and the 97.5th percentile of the mean over resampled clips, (2, L+1)."""
    n = len(values)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    return np.percentile(counts @ values / n, [2.5, 97.5], axis=0)


def plot_intervals(table: pd.DataFrame, *, xlabel: str, zero: bool = False, title=None) -> Figure:
    """Plot a table of means with intervals, all panels side by side; see `forest`."""
    return forest(table, xlabel=xlabel, zero=zero, title=title, across=0, width=9)


def forest(
    table: pd.DataFrame,
    *,
    xlabel: str,
    zero: bool = True,
    title=None,
    across: int = 2,
    width: float = 5.6,
    margin: float = 0.0,
    sharex: bool = True,
) -> Figure:
    """Plot a table of means with intervals: a panel per outer group, a row per inner one.

    Parameters
    ----------
    table : DataFrame
        Columns ``mean, low, high``, and ``paper`` where the paper prints a number; indexed by three
        levels: panel, marker, row, such as dataset, model, method. NaN is not drawn.
    xlabel : str
        What is measured.
    zero : bool
        Draw a line at 0.
    title : str, optional
        Above the picture.
    across : int
        Panels beside one another; 0: all.
    width : float
        Of the picture, in inches; 5.6 can be read at 420 pixels.
    margin : float
        Shade what is nearer to 0.
    sharex : bool
        One scale for all panels.

    Returns
    -------
    Figure
        Dots with their intervals, a cross where the paper prints a number. A method has the same
        colour in every picture, as a row and as a marker. Printed in grey, the shape of a marker
        tells it from others, and every second is hollow.
    """
    fits = isinstance(table.index, pd.MultiIndex) and table.index.nlevels == 3
    _checks.require(fits, "table", f"{table.index.nlevels} index levels", "panel, marker, row")
    table = table if table["mean"].isna().all() else table.dropna(subset="mean")
    panels, rows = (list(dict.fromkeys(table.index.get_level_values(i))) for i in (0, 2))
    parts = {panel: table.loc[[panel]].droplevel(0) for panel in panels}
    marks = {name: list(dict.fromkeys(t.index.get_level_values(0))) for name, t in parts.items()}
    across = min(across or len(panels), len(panels))
    down = math.ceil(len(panels) / across)
    most = max(map(len, marks.values()))
    height = 0.9 + down * max(0.8, 0.3 + (0.08 + 0.065 * most) * len(rows))
    figure = Picture(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    legend = {}
    for ax, panel in zip(axes, panels, strict=False):
        _rows_of(ax, parts[panel], marks[panel], rows)
        legend |= {name: line for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
        if zero:
            ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        if margin:
            ax.axvspan(-margin, margin, color="0.9", linewidth=0, zorder=0)
        ax.set_yticks(range(len(rows)), [caption(row) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        _dress(ax, "", str(panel))
        ax.title.set_fontsize(FONT - 1)
        ax.margins(x=0.04)
    figure.supxlabel(xlabel, fontsize=FONT)
    figure.suptitle(title or "", fontsize=FONT, x=0, ha="left")
    style = {"fontsize": FONT - 1, "frameon": False, "ncols": 2 if width < 9 else 4}
    figure.legend(legend.values(), legend, loc="outside upper center", columnspacing=1, **style)
    return figure


def _rows_of(ax, table: pd.DataFrame, marks: list, rows: list) -> None:
    """Draw the rows of one panel, a set of markers for each value of the first level."""
    known = {method: i for i, method in enumerate(methods().index)}
    apart = 0.7 / len(marks)
    for i, mark in enumerate(marks):
        own = [row for row in rows if (mark, row) in table.index]
        part = table.loc[[(mark, row) for row in own]]
        y = np.array([rows.index(row) for row in own]) + apart * (i - (len(marks) - 1) / 2)
        of_rows = [COLOURS[known[row] % 7] for row in own if row in known]
        look = "0.2" if of_rows else COLOURS[known.get(mark, i) % 7]
        colours = of_rows if len(of_rows) == len(own) else look
        shape = MARKERS[known.get(mark, i) % 9]
        fill = {"markerfacecolor": "white"} if i % 2 else {}
        ax.hlines(y, part["low"], part["high"], color=colours, linewidth=1.3)
        style = {"color": look, "linestyle": "", "markersize": 4.5, "label": caption(mark)}
        ax.plot(part["mean"], y, shape, **style | fill)
        dots = {"s": 20, "edgecolors": colours, "facecolors": "white" if fill else colours}
        ax.scatter(part["mean"], y, marker=shape, zorder=3, **dots)
        if "paper" in part and part["paper"].notna().any():
            name = caption(str(mark).removesuffix("_narrow"))
            style |= {"label": f"{name} in the paper", "zorder": 1.8}
            ax.plot(part["paper"], y, "x", **style | {"markersize": 5})


def plot_pairs(table: pd.DataFrame, *, label: str, title=None) -> Figure:
    """Plot one column of a table against another, a marker for each value of an index level.

    Parameters
    ----------
    table : DataFrame
        Two columns; the first goes along the horizontal axis. Rows with NaN are not drawn.
    label : str
        The level of the index that tells the markers apart.
    title : str, optional
        Above the picture.

    Returns
    -------
    Figure
        With Pearson's r of all points in the legend's title, if there are three or more.
    """
    _checks.require(table.shape[1] == 2, "table", f"{table.shape[1]} columns", "two")
    _checks.require(len(table) > 0, "table", "no row", "at least one")
    across, up = table.columns
    table = table.dropna()
    figure = Picture(figsize=(6, 3.6), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for i, (name, part) in enumerate(table.groupby(label, sort=False)):
        style = {"color": COLOURS[i % 7], "linestyle": "", "label": str(name)}
        ax.plot(part[across], part[up], MARKERS[i % 9], **style)
    _dress(ax, across, title)
    ax.margins(x=0.05)
    ax.set_ylabel(up, fontsize=FONT)
    r = table[across].corr(table[up]) if len(table) > 2 else math.nan
    _legend(figure, ax, "" if math.isnan(r) else f"r = {r:.2f} of\n{len(table)} points")
    return figure


def plot_history(history, areas=None) -> Figure:
    """Plot how STEP's optimisation went: probability, area loss and core loss, a line per area.

    Parameters
    ----------
    history : pandas.DataFrame
        Columns clip, area, iteration, probability, area_loss, core_loss. Clips are averaged.
    areas : sequence of float, optional
        Which areas, as shares. Default: all.

    Returns
    -------
    Figure
        A loss has a logarithmic axis where all its values are positive.

    Raises
    ------
    ValueError
        A missing column, no row, an area that the history does not have.

    Examples
    --------
    >>> figure = plot_history(found.history, areas=(0.05, 0.20))  # doctest: +SKIP
    """
    panels = ["probability", "area_loss", "core_loss"]
    columns = ["clip", "area", "iteration", *panels]
    missing = sorted(set(columns) - set(history.columns))
    _checks.require(not missing, "history", f"no column {missing}", f"columns {columns}")
    _checks.require(len(history) > 0, "history", "no row", "at least one iteration")
    known = sorted(history["area"].unique())
    areas = known if areas is None else [_nearest(area, known) for area in areas]
    mean = history.groupby(["area", "iteration"])[panels].mean()
    figure = Picture(figsize=(9, 3), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, column in zip(axes, panels, strict=True):
        for i, area in enumerate(areas):
            # Areas have an order, so their colours have one: from dark to light.
            colour = matplotlib.colormaps["viridis"](0.78 * i / max(1, len(areas) - 1))
            style = {"color": colour, "linestyle": DASHES[i % 4], "label": f"{100 * area:.3g} %"}
            ax.plot(mean.loc[area, column], **style)
        if column == "probability":
            ax.set_ylim(-0.03, 1.03)
        elif (mean[column] > 0).all():
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        _dress(ax, "iteration", column.replace("_", " "))
    clips = history["clip"].nunique()
    _legend(figure, axes[0], "area" if clips == 1 else f"area\n({clips} clips)")
    return figure


def plot_training(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot how trainings went: the loss, and the accuracy on the validation part.

    Parameters
    ----------
    histories : dict of str to DataFrame
        By name, what `stepkit.training.train` returns.

    Returns
    -------
    Figure
    """
    _checks.require(len(histories) > 0, "histories", "none", "at least one")
    figure = Picture(figsize=(9, 3.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2)
    panels = {"loss": "training loss", "val_top1": "validation accuracy"}
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        for i, (name, history) in enumerate(histories.items()):
            style = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4], "label": name}
            ax.plot(history["epoch"] + 1, history[column], **style)
        _dress(ax, "epoch", label)
    axes[1].set_ylim(-0.03, 1.03)
    _legend(figure, axes[0], "")
    return figure


def _nearest(area: float, known: list) -> float:
    """Return the area of the history that ``area`` means; as float32, 0.05 is another number."""
    same = [k for k in known if math.isclose(k, area, rel_tol=1e-4)]
    _checks.require(len(same) > 0, "areas", area, "one of " + ", ".join(f"{k:g}" for k in known))
    return same[0]


def _dress(ax, xlabel: str, title) -> None:
    ax.set_xlabel(xlabel, fontsize=FONT)
    ax.set_title(title or "", fontsize=FONT, loc="left")
    ax.tick_params(labelsize=FONT - 1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)


def _legend(figure: Figure, ax, title: str) -> None:
    """Put the legend at the right of the figure, where it hides no line."""
    style = {"fontsize": FONT, "title_fontsize": FONT - 1, "frameon": False, "handlelength": 3.2}
    lines = ax.get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", title=title, alignment="left", **style)
