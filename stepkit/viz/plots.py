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

__all__ = ["forest", "plot_curves", "plot_history", "plot_intervals", "plot_pairs", "plot_training"]


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
    clips = table.groupby("name")["clip"].nunique()
    few, most = clips.min(), clips.max()
    band = {"errorbar": _interval if most > 1 else None, "err_kws": {"alpha": 0.13, "linewidth": 0}}
    count = f"{most}" if few == most else f"{few} to {most}"
    note = f"mean over {count} clips,\nband: 95 % bootstrap" if most > 1 else "one clip"
    look = _looks("name", curves) | band | {"markersize": 6}
    figure = _lines(table, "x", {"y": title or ""}, note, look, height=4.2)
    figure.axes[0].set(xlabel=xlabel, ylabel=ylabel)
    # Ten markers a curve, each method's elsewhere, so that they do not hide one another.
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    for i, line in enumerate(drawn):
        every = max(1, len(line.get_xdata()) // 10)
        line.set_markevery((i * every // len(drawn), every))
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


def plot_intervals(table: pd.DataFrame, *, xlabel: str, zero: bool = False) -> Figure:
    """Plot a table of means with intervals, all panels side by side; see `forest`."""
    return forest(table, xlabel=xlabel, zero=zero, across=0)


@STYLED
def forest(
    table: pd.DataFrame, *, xlabel: str, zero=True, across=2, margin=0.0, sharex=True
) -> Figure:
    """Plot a table of means with intervals: a panel per outer group, a row per inner one.

    Parameters
    ----------
    table : DataFrame
        Columns ``mean, low, high``, and ``paper`` where the paper prints a number; indexed by three
        levels: panel, marker, row, such as dataset, model, method. NaN is not drawn.
    xlabel : str
        What is measured.
    zero : bool, default True
        Draw a line at 0.
    across : int, default 2
        Panels beside one another; 1 or 2 can be read at 420 pixels. 0: all, on 9 inches.
    margin : float, default 0
        Shade what is nearer to 0.
    sharex : bool, default True
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
def plot_pairs(table: pd.DataFrame, *, label: str) -> Figure:
    """Plot one column of a table against another, a marker for each value of an index level.

    Parameters
    ----------
    table : DataFrame
        Two columns; the first goes along the horizontal axis. Rows with NaN are not drawn.
    label : str
        The level of the index that tells the markers apart.

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
    del look["dashes"]  # of lines
    sns.scatterplot(table.reset_index(), x=across, y=up, **look, s=45, ax=ax)
    ax.margins(x=0.05)
    r, n = table[across].corr(table[up], min_periods=3), len(table.dropna())
    _legend(figure, ax, "" if math.isnan(r) else f"r = {r:.2f} of\n{n} points")
    return figure


@STYLED
def plot_history(history) -> Figure:
    """Plot how STEP's optimisation went: probability, area loss and core loss, a line per area.

    Parameters
    ----------
    history : pandas.DataFrame
        Columns clip, area, iteration, probability, area_loss, core_loss. Clips are averaged.

    Returns
    -------
    Figure
        A loss has a logarithmic axis where all its values are positive.

    Raises
    ------
    ValueError
        A missing column, or no row.

    Examples
    --------
    >>> figure = plot_history(found.history)  # doctest: +SKIP
    """
    panels = ["probability", "area_loss", "core_loss"]
    columns = ["clip", "area", "iteration", *panels]
    missing = sorted(set(columns) - set(history.columns))
    require(not missing, "history", f"no column {missing}", f"columns {columns}")
    require(len(history) > 0, "history", "no row", "at least one iteration")
    mean = history.groupby(["area", "iteration"])[panels].mean().reset_index()
    mean["area"] = [f"{100 * area:.3g} %" for area in mean["area"]]
    clips = history["clip"].nunique()
    note = "area" if clips == 1 else f"area\n({clips} clips)"
    # Areas have an order, so their colours have one: from light to dark.
    look = {"hue": "area", "style": "area", "palette": "crest"}
    figure = _lines(mean, "iteration", {c: c.replace("_", " ") for c in panels}, note, look)
    figure.axes[0].set_ylim(-0.03, 1.03)
    for ax, column in zip(figure.axes[1:], panels[1:], strict=True):
        if (mean[column] > 0).all():
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


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
    panels = {"loss": "training loss", "val_top1": "validation accuracy"}
    look = _looks("name", list(histories)) | {"markers": False}
    figure = _lines(table, "epoch", panels, "", look)
    figure.axes[1].set_ylim(-0.03, 1.03)
    return figure


def _lines(table: pd.DataFrame, x: str, panels: dict, note: str, look: dict, height=3) -> Figure:
    """Draw columns of a table by seaborn, each in a panel with a title, and one legend."""
    figure = Plot(figsize=(9, height))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        sns.lineplot(table, x=x, y=column, legend=ax is axes[0], **look, ax=ax)
        ax.set(title=title, ylabel="")
    _legend(figure, axes[0], note)
    return figure


def _legend(figure: Figure, ax, title: str) -> None:
    """Put seaborn's legend at the right of the figure, where it hides no line."""
    handles, names = ax.get_legend_handles_labels()
    if handles:
        ax.get_legend().remove()
    style = {"loc": "outside right center", "alignment": "left", "title_fontsize": FONT - 1}
    figure.legend(handles, [caption(name) for name in names], title=title, **style)
