"""The plots of the notebooks, by seaborn: curves, intervals, the course of an optimisation."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from stepkit import stats
from stepkit._checks import require
from stepkit.attribution import METHODS
from stepkit.viz._looks import STYLED, Plot, palette
from stepkit.viz._style import FONT, caption

__all__ = [
    "forest",
    "palette",
    "plot_curves",
    "plot_history",
    "plot_intervals",
    "plot_pairs",
    "plot_training",
]


@STYLED
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
        Looks and order are those of `palette`. The band is the percentile interval of the mean
        over 1000 resamples of the clips; one clip has none.

    Raises
    ------
    ValueError
        No curve, shapes that do not fit each other, NaN.

    Examples
    --------
    >>> figure = plot_curves({"step": ([0, 0.5, 1], [[0.1, 0.8, 0.9], [0.2, 0.6, 0.9]])})
    """
    require(len(curves) > 0, "curves", "none", "at least one")
    table = pd.concat([_curve(name, *pair) for name, pair in curves.items()], ignore_index=True)
    clips = sorted(set(table.groupby("name")["clip"].nunique()))
    many = clips[-1] > 1
    figure = Plot(figsize=(9, 4.2))
    ax = figure.subplots()
    band = {"errorbar": _interval if many else None, "err_kws": {"alpha": 0.13, "linewidth": 0}}
    sns.lineplot(table, x="x", y="y", **_looks("name", curves), markersize=6, **band, ax=ax)
    # Ten markers a curve, each method's elsewhere, so that they do not hide one another.
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    for i, line in enumerate(drawn):
        every = max(1, len(line.get_xdata()) // 10)
        line.set_markevery((i * every // len(drawn), every))
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
    note = "to ".join(f"{n} " for n in dict.fromkeys((clips[0], clips[-1])))
    _legend(figure, ax, f"mean over {note}clips,\nband: 95 % bootstrap" if many else "one clip")
    return figure


def _curve(name: str, fractions, values) -> pd.DataFrame:
    """Return one method's fractions (L+1,) and values (N, L+1), checked, a row per point."""
    given = (torch.as_tensor(a, dtype=torch.float64) for a in (fractions, values))
    x, y = (a.detach().cpu().numpy() for a in given)
    fits = x.ndim == 1 and y.ndim == 2 and len(y) > 0 and y.shape[1] == len(x)
    given = f"fractions {x.shape}, values {y.shape}"
    require(fits, f"curves[{name!r}]", given, "(L+1,) and (N, L+1)")
    finite = np.isfinite(x).all() and np.isfinite(y).all()
    require(finite, f"curves[{name!r}]", "NaN or infinity", "finite values")
    clip = np.arange(len(y)).repeat(len(x))
    return pd.DataFrame({"name": name, "clip": clip, "x": np.tile(x, len(y)), "y": y.ravel()})


def _interval(values) -> pd.Series:
    return stats.bootstrap_mean(values, samples=1000)[["low", "high"]]


def _looks(column: str, names) -> dict:
    """Return what tells seaborn to draw each name of a column as `palette` has it."""
    looks = palette(names)
    order = [name for name in looks.index if name in names]
    look = {"palette": looks["colour"].to_dict(), "markers": looks["marker"].to_dict()}
    look |= {"hue": column, "style": column, "hue_order": order, "style_order": order}
    return look | {"dashes": looks["dashes"].to_dict()}


def plot_intervals(table: pd.DataFrame, *, xlabel: str, zero: bool = False, title=None) -> Figure:
    """Plot a table of means with intervals, all panels side by side; see `forest`."""
    return forest(table, xlabel=xlabel, zero=zero, title=title, across=0)


@STYLED
def forest(
    table: pd.DataFrame,
    *,
    xlabel: str,
    zero: bool = True,
    title=None,
    across: int = 2,
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
        Panels beside one another; 1 or 2 can be read at 420 pixels. 0: all, on 9 inches.
    margin : float
        Shade what is nearer to 0.
    sharex : bool
        One scale for all panels.

    Returns
    -------
    Figure
        Dots with their intervals, a cross where the paper prints a number. Methods have the looks
        and the order of `palette`, as rows and as markers. Every second marker is hollow.
    """
    fits = isinstance(table.index, pd.MultiIndex) and table.index.nlevels == 3
    require(fits, "table", f"{table.index.nlevels} index levels", "panel, marker, row")
    table = table if table["mean"].isna().all() else table.dropna(subset="mean")
    table = table.rename_axis(["panel", "mark", "row"]).reset_index()
    looks = palette([*table["mark"], *table["row"]])
    rows = [name for name in looks.index if name in set(table["row"])]
    panels = dict(list(table.groupby("panel", sort=False)))
    width, across = 5.6 if across else 9, min(across or len(panels), len(panels))
    most = max(panel["mark"].nunique() for panel in panels.values())
    down = math.ceil(len(panels) / across)
    height = 0.9 + down * max(0.8, 0.3 + (0.08 + 0.065 * most) * len(rows))
    figure = Plot(figsize=(width, height))
    axes = figure.subplots(down, across, sharex=sharex, sharey=True, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    legend = {}
    for ax, (name, panel) in zip(axes, panels.items(), strict=False):
        _draw_panel(ax, panel, rows, looks)
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
        if zero:
            ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        if margin:
            ax.axvspan(-margin, margin, color="0.9", linewidth=0, zorder=0)
        ax.set_title(str(name), fontsize=FONT - 1)
    figure.supxlabel(xlabel, fontsize=FONT)
    figure.suptitle(title or "", fontsize=FONT, x=0, ha="left")
    style = {"handlelength": 2, "columnspacing": 1, "ncols": 2 if width < 9 else 4}
    figure.legend(legend.values(), legend, loc="outside upper center", **style)
    return figure


def _draw_panel(ax, panel: pd.DataFrame, rows: list, looks: pd.DataFrame) -> None:
    """Draw one panel of a forest: in each row, one below the other, the markers."""
    by_row = set(rows) <= set(METHODS)  # then the colours tell the rows apart, not the markers
    marks = [name for name in looks.index if name in set(panel["mark"])]
    for i, mark in enumerate(marks):
        part = panel[panel["mark"] == mark]
        y = part["row"].map(rows.index) + 0.7 * ((i + 0.5) / len(marks) - 0.5)
        colours = looks["colour"][part["row" if by_row else "mark"]].tolist()
        look = {"marker": looks["marker"][mark], "facecolors": "white" if i % 2 else colours}
        ax.hlines(y, part["low"], part["high"], color=colours, linewidth=1.3)
        ax.scatter(part["mean"], y, s=20, edgecolors=colours, zorder=3, **look)
        look = {"marker": look["marker"], "linestyle": "", "color": "0.2" if by_row else colours[0]}
        look |= {"markerfacecolor": "white"} if i % 2 else {}
        ax.plot([], **look, markersize=5, label=caption(mark))
        if "paper" in part and part["paper"].notna().any():
            label = f"{caption(str(mark).removesuffix('_narrow'))} in the paper"
            look |= {"marker": "x", "label": label, "zorder": 1.8}
            ax.plot(part["paper"], y, **look, markersize=5)
    ax.set_yticks(range(len(rows)), [caption(row) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.04)


@STYLED
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
    require(table.shape[1] == 2, "table", f"{table.shape[1]} columns", "two")
    require(len(table) > 0, "table", "no row", "at least one")
    across, up = table.columns
    figure = Plot(figsize=(6, 3.6))
    ax = figure.subplots()
    look = _looks(label, table.index.unique(label))
    del look["dashes"]
    sns.scatterplot(table.reset_index(label), x=across, y=up, **look, s=45, ax=ax)
    ax.set_title(title or "")
    ax.margins(x=0.05)
    r, n = table[across].corr(table[up], min_periods=3), len(table.dropna())
    _legend(figure, ax, "" if math.isnan(r) else f"r = {r:.2f} of\n{n} points")
    return figure


@STYLED
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
    require(not missing, "history", f"no column {missing}", f"columns {columns}")
    require(len(history) > 0, "history", "no row", "at least one iteration")
    known = sorted(history["area"].unique())
    names = {_nearest(area, known): f"{100 * area:.3g} %" for area in areas or known}
    mean = history.groupby(["area", "iteration"])[panels].mean().loc[list(names)].reset_index()
    mean["area"] = mean["area"].map(names)
    figure = Plot(figsize=(9, 3))
    axes = figure.subplots(1, len(panels))
    for ax, column in zip(axes, panels, strict=True):
        # Areas have an order, so their colours have one: from light to dark.
        look = {"hue": "area", "style": "area", "palette": "crest", "legend": ax is axes[0]}
        sns.lineplot(mean, x="iteration", y=column, **look, ax=ax)
        ax.set(title=column.replace("_", " "), ylabel="")
        if column == "probability":
            ax.set_ylim(-0.03, 1.03)
        elif (mean[column] > 0).all():
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
    clips = history["clip"].nunique()
    _legend(figure, axes[0], "area" if clips == 1 else f"area\n({clips} clips)")
    return figure


def _nearest(area: float, known: list) -> float:
    """Return the area of the history that ``area`` means; as float32, 0.05 is another number."""
    same = [k for k in known if math.isclose(k, area, rel_tol=1e-4)]
    require(len(same) > 0, "areas", area, "one of " + ", ".join(f"{k:g}" for k in known))
    return same[0]


@STYLED
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
    require(len(histories) > 0, "histories", "none", "at least one")
    table = pd.concat(histories, names=["name"]).reset_index("name")
    table["epoch"] += 1
    figure = Plot(figsize=(9, 3.2))
    axes = figure.subplots(1, 2)
    panels = {"loss": "training loss", "val_top1": "validation accuracy"}
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        look = {**_looks("name", list(histories)), "markers": False, "legend": ax is axes[0]}
        sns.lineplot(table, x="epoch", y=column, **look, ax=ax)
        ax.set(title=title, ylabel="")
    axes[1].set_ylim(-0.03, 1.03)
    _legend(figure, axes[0], "")
    return figure


def _legend(figure: Figure, ax, title: str) -> None:
    """Put seaborn's legend at the right of the figure, where it hides no line."""
    handles, names = ax.get_legend_handles_labels()
    if handles:
        ax.get_legend().remove()
    style = {"loc": "outside right center", "alignment": "left", "title_fontsize": FONT - 1}
    figure.legend(handles, [caption(name) for name in names], title=title, **style)
