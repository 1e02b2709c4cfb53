"""Pictures of clips and of their attributions, frame beside frame.

Every picture is a matplotlib ``Figure`` made without pyplot, so none stays open; as the last value
of a notebook cell it shows itself, once. `stepkit.viz.display` says how a map is scaled.
"""

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from stepkit._checks import one_of, require
from stepkit.viz._frames import KINDS, inputs, render
from stepkit.viz._style import CMAP, DPI, FONT, Picture, caption

__all__ = ["show", "show_clips"]

WIDTH, CELL, GAP = 1100, 220, 6  # in pixels: of a picture, of a frame, between frames; at most


class _Row(NamedTuple):
    """A row of a picture."""

    label: str
    film: np.ndarray  # (T, H, W, 3)
    line: float = 0  # how wide the boxes are drawn; 0: not at all
    scaled: bool = False  # whether the colour bar is of this row


def show(
    clip, maps=None, *, boxes=None, frames=5, rows=None, title=None, keep=0.15, cmap=CMAP
) -> Figure:
    """Draw frames of a clip above what its attribution marks; several maps one below the other.

    Parameters
    ----------
    clip : Tensor
        float32 (3, T, H, W) or (1, 3, T, H, W), normalised.
    maps : Tensor or dict of str to Tensor, optional
        One attribution, float32 (T, H, W), or several by name; bool: a mask.
    boxes : list of Tensor, or Tensor, optional
        Per frame (n, 4), ``x0, y0, x1, y1`` in pixels; drawn on the clip and, thinly, on overlays.
        One tensor stands for all frames.
    frames : int or list of int, default 5
        At most how many, evenly spaced from the first to the last; or which.
    rows : sequence of str, optional
        Of "clip", "overlay", "kept" and "mask" (the map alone). Default: all four for one map,
        "clip" and "overlay" for several. The clip is drawn once, the others for each map.
    title : str, optional
        Above the picture.
    keep : float or None, default 0.15
        The share of the clip's voxels, those where the map is highest, that "kept" leaves as they
        are. None: the maps are masks in [0, 1], drawn as they are, and "kept" weighs by them.
    cmap : str, default "inferno"
        A colour map of matplotlib.

    Returns
    -------
    Figure
        Shows itself as the last value of a notebook cell; elsewhere ``.savefig(path)``.

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit each other, NaN, a frame that is not there, an unknown row, a share
        outside (0, 1], ``keep=None`` with values outside [0, 1].

    Examples
    --------
    >>> figure = show(torch.zeros(3, 8, 56, 56), torch.rand(8, 56, 56), frames=[0, 3, 7])
    """
    several = isinstance(maps, Mapping)
    maps = maps if several else {} if maps is None else {"": maps}
    rgb, maps, boxes = inputs(clip, maps, boxes, keep)
    possible = KINDS if maps else KINDS[:1]
    rows = list(possible[:2] if several else possible) if rows is None else list(rows)
    for row in rows:
        one_of("rows" if maps else "rows (without maps)", row, possible)
    require(len(rows) > 0, "rows", rows, "at least one row")
    kinds = [row for row in rows if row != "clip"]
    drawn = [_Row("clip", render("clip", rgb, None, None), 1.6)] if "clip" in rows else []
    masks = [keep is None or given.dtype == torch.bool for given in maps.values()]
    for (name, given), is_mask in zip(maps.items(), masks, strict=True):
        words = {kind: kind for kind in kinds}
        if not is_mask:
            words |= {"kept": f"top {100 * keep:.3g} %", "mask": "map"}
        for kind in kinds:
            word = words[kind] if len(kinds) > 1 or not name else ""
            film = render(kind, rgb, given, keep, cmap=cmap)
            line = 0.7 if kind == "overlay" else 0
            drawn.append(_Row(_label(name, word), film, line, kind != "kept"))
    scale = "mask" if all(masks) else "attribution, scaled"
    return _draw(drawn, boxes, frames, title, cmap, scale)


def show_clips(clips: Mapping[str, Tensor], *, boxes=None, frames=5, title=None) -> Figure:
    """Draw frames of several clips of equal size, one below the other.

    Parameters
    ----------
    clips : dict of str to Tensor
        By label, float32 (3, T, H, W), normalised.
    boxes, frames, title
        As for `show`; the boxes are drawn on every clip.

    Returns
    -------
    Figure

    Examples
    --------
    >>> clip = torch.zeros(3, 8, 56, 56)
    >>> figure = show_clips({"before": clip, "after": clip + 1})
    """
    require(len(clips) > 0, "clips", "none", "at least one")
    films = {name: inputs(clip, {}, boxes, None) for name, clip in clips.items()}
    sizes = {film.shape for film, _, _ in films.values()}
    require(len(sizes) == 1, "clips", f"sizes {sorted(sizes)}", "clips of one size")
    rows = [_Row(_label(name), film, 1.6) for name, (film, _, _) in films.items()]
    _, _, boxes = next(iter(films.values()))
    return _draw(rows, boxes, frames, title)


def _label(name: str, word: str = "") -> str:
    """Return the label of a row: a name and a word, over lines of 14 letters."""
    lines = [line for part in caption(name).splitlines() for line in textwrap.wrap(part, 14)]
    return "\n".join([*lines, word] if word else lines)


def _draw(rows: list[_Row], boxes, frames, title, cmap=CMAP, scale="") -> Figure:
    """Draw some frames of each row, and beside those that are scaled their colours."""
    count, *size = rows[0].film.shape[:3]
    columns = _columns(frames, count)
    scaled = [row.scaled for row in rows]
    labels = [row.label for row in rows]
    figure, axes = _grid(labels, columns, size, title, right=95 if any(scaled) else 10)
    for of_row, row in zip(axes, rows, strict=True):
        for ax, t in zip(of_row, columns, strict=True):
            _draw_frame(ax, row.film[t], boxes[t] if row.line else boxes[t][:0], row.line)
    if any(scaled):
        _colour_bar(figure, axes[scaled, -1], cmap, scale)
    return figure


def _columns(frames, count: int) -> list[int]:
    """Return the indices of the frames to draw."""
    if isinstance(frames, int):
        require(frames > 0, "frames", frames, "at least 1")
        return np.linspace(0, count - 1, min(frames, count)).round().astype(int).tolist()
    frames = [int(t) for t in frames]
    inside = len(frames) > 0 and all(0 <= t < count for t in frames)
    require(inside, "frames", frames, f"indices in 0..{count - 1}")
    return frames


def _grid(labels: list[str], columns: list[int], size, title, right: int):
    """Lay out empty axes, in pixels: labels at the left, frame numbers on top, a right margin."""
    left = 20 + 9 * max(len(line) for label in labels for line in ["frame", *label.split("\n")])
    n = len(columns)
    cell = min((WIDTH - left - right - (n - 1) * GAP) / n, CELL, CELL * size[1] / size[0])
    # A frame grows by a whole number, so that every pixel of it is drawn as wide as the next.
    cell = cell // size[1] * size[1] if cell >= size[1] else int(cell)
    high = round(cell * size[0] / size[1])
    over = max(0, 18 * max(label.count("\n") + 1 for label in labels) - high)  # labels higher
    wide = left + right + n * (cell + GAP) - GAP
    lines = textwrap.wrap(title or "", int((wide - left) / 9))
    top = 28 + 22 * len(lines)
    tall = top + len(labels) * (GAP + high + over)
    figure = Picture(figsize=(wide / DPI, tall / DPI), dpi=DPI)
    edges = {"left": left / wide, "right": 1 - right / wide, "wspace": GAP / cell}
    edges |= {"top": 1 - (top + over / 2) / tall, "bottom": (GAP + over / 2) / tall}
    edges |= {"hspace": (GAP + over) / high}
    empty = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(len(labels), n, squeeze=False, subplot_kw=empty, gridspec_kw=edges)
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT, labelpad=6)
    for ax, t in zip(axes[0], columns, strict=True):
        ax.set_title(str(t), fontsize=FONT, pad=4 + over / 2 * 72 / DPI)
    at = {"fontsize": FONT, "ha": "right", "va": "baseline"}
    figure.text((left - 8) / wide, 1 - (top - 6) / tall, "frame", **at)
    figure.suptitle("\n".join(lines), x=left / wide, y=1 - 4 / tall, ha="left", fontsize=FONT + 1)
    return figure, axes


def _colour_bar(figure: Figure, beside: np.ndarray, cmap: str, label: str) -> None:
    """Draw the scale at the right of the rows that have it."""
    low, high = beside[-1].get_position().y0, beside[0].get_position().y1
    tall = min(high - low, 250 / DPI / figure.get_figheight())
    inch = 1 / figure.get_figwidth()
    x, y = beside[0].get_position().x1 + 0.14 * inch, (low + high - tall) / 2
    bar = figure.colorbar(ScalarMappable(cmap=cmap), figure.add_axes((x, y, 0.14 * inch, tall)))
    bar.set_ticks([0, 0.5, 1], labels=["0", "½", "1"], fontsize=FONT)
    bar.set_label(label, fontsize=FONT, labelpad=2)
    bar.outline.set_visible(False)


def _draw_frame(ax, picture: np.ndarray, boxes, width: float) -> None:
    """Draw a frame, and boxes in white between dark lines."""
    high, wide = picture.shape[:2]
    method = "nearest" if ax.get_window_extent().width > wide - 0.5 else "antialiased"
    # The edges of the pixels are at whole numbers, as boxes count them.
    ax.imshow(picture, extent=(0, wide, high, 0), interpolation=method)
    for x0, y0, x1, y1 in boxes.tolist():
        outline = [withStroke(linewidth=width + 1.6, foreground="black")]
        style = {"fill": False, "edgecolor": "white", "linewidth": width, "path_effects": outline}
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
