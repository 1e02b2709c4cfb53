"""Pictures and short videos of a clip and its attributions.

Nothing here changes a score: the scaling of `display` is for the eye. Every picture is a matplotlib
``Figure`` made without pyplot, so none stays open; as the last value of a notebook cell it shows
itself, once. All remain readable when printed in grey.

A mask (values in [0, 1], such as STEP's) is drawn as it is, any other map through `display`. A bool
map is always a mask, a float32 map where the caller says ``keep=None``; its values alone do not
tell, as a gradient lies in [0, 1] too.
"""

import io
import math
import textwrap
from collections.abc import Mapping

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from scipy.ndimage import gaussian_filter
from torch import Tensor

from stepkit import _checks
from stepkit.attribution import methods
from stepkit.clips import unnormalise

ROWS = ("clip", "overlay", "kept", "mask")
CMAP, OPACITY = "inferno", 0.75  # brighter from end to end, so that it survives printing in grey
DPI, WIDTH, CELL, GAP, FONT = 100, 1100, 220, 6, 11  # of `show`: pixels, at most; FONT in points


def caption(name) -> str:
    """Write a name for a reader: a method's id as its label, other underscores as blanks.

    Examples
    --------
    >>> caption("grad_cam, the mean"), caption("r2plus1d_narrow")
    ('Grad-CAM, the mean', 'r2plus1d narrow')
    """
    labels = methods()["label"]
    return ", ".join(labels.get(part, part.replace("_", " ")) for part in str(name).split(", "))


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


def display(maps: Tensor) -> Tensor:
    """Scale maps to [0, 1] for the eye: minus the minimum, over the 99.9th percentile, clipped.

    Clipping makes ties, so no score may be computed on the result.

    Parameters
    ----------
    maps : Tensor
        float32 (T, H, W) or (N, T, H, W); each clip is scaled alone.

    Returns
    -------
    Tensor
        float32, same shape and device. A constant map becomes zeros. Where less than 0.1 % of a map
        stands out, so that its percentile is its minimum, its maximum takes the percentile's place.

    Raises
    ------
    TypeError, ValueError
        Not a float32 tensor; another rank, NaN or infinity.

    Examples
    --------
    >>> display(torch.tensor([[[-1.0, 0.0, -1.0]]]))
    tensor([[[0., 1., 0.]]])
    """
    batched = getattr(maps, "ndim", 3) == 4
    _checks.tensor("maps", maps, "(N, T, H, W)" if batched else "(T, H, W)")
    flat = maps.detach().cpu().double().reshape(-1, math.prod(maps.shape[-3:])).numpy()
    flat = flat - flat.min(axis=1, keepdims=True)
    scale = np.percentile(flat, 99.9, axis=1, keepdims=True)
    scale = np.where(scale > 0, scale, flat.max(axis=1, keepdims=True))
    flat = np.clip(flat / np.where(scale > 0, scale, 1), 0, 1)
    return torch.from_numpy(flat).to(maps.device, torch.float32).reshape(maps.shape)


def frames_rgb(clip, maps=None, boxes=None, *, opacity=OPACITY, cmap=CMAP) -> np.ndarray:
    """Render the frames of a clip, under its attribution if one is given, as 8-bit pictures.

    The clip turns grey and dim, and the map lies over it in colour, more opaque where it is higher.

    Parameters
    ----------
    clip : Tensor
        float32 (3, T, H, W) or (1, 3, T, H, W), normalised.
    maps : Tensor, optional
        float32 (T, H, W), drawn through `display`, or bool, a mask.
    boxes : list of Tensor, optional
        Per frame (n, 4), ``x0, y0, x1, y1`` in pixels; drawn white within a dark line, each one
        pixel wide (two from a height of 200). An empty list: no boxes.
    opacity : float, default 0.75
        Of the colour where the map is 1.
    cmap : str, default "inferno"
        A colour map of matplotlib.

    Returns
    -------
    ndarray
        uint8 (T, H, W, 3).

    Raises
    ------
    TypeError, ValueError
        Another dtype or rank, sizes that differ, NaN, an opacity outside [0, 1].

    Examples
    --------
    >>> frames_rgb(torch.zeros(3, 8, 56, 56), torch.rand(8, 56, 56)).shape
    (8, 56, 56, 3)
    """
    rgb, maps, boxes = _inputs(clip, {} if maps is None else {"": maps}, boxes, 1)
    _checks.require(0 <= opacity <= 1, "opacity", opacity, "a number in [0, 1]")
    kind = "overlay" if maps else "clip"
    return _burn(render(kind, rgb, maps.get(""), 1, opacity, cmap), boxes)


def _inputs(clip, maps: dict, boxes, keep) -> tuple[np.ndarray, dict, list[np.ndarray]]:
    """Check what a picture is made of; return (T, H, W, 3) in [0, 1], the maps, the boxes."""
    one = "(1, 3, T, H, W)" if getattr(clip, "ndim", 4) == 5 else "(3, T, H, W)"
    clip = _checks.tensor("clip", clip, one).detach().cpu().reshape(clip.shape[-4:])
    _checks.require(keep is None or 0 < keep <= 1, "keep", keep, "a share in (0, 1] or None")
    maps = {n: _map(f"maps[{n!r}]" if n else "maps", m, clip, keep) for n, m in maps.items()}
    rgb = unnormalise(clip).permute(1, 2, 3, 0).numpy()
    return rgb, maps, _boxes(boxes, len(rgb))


def _map(argument: str, given, clip: Tensor, keep) -> Tensor:
    """Return one map, (T, H, W) as the clip, on the CPU; bool stays bool."""
    if isinstance(given, Tensor) and given.ndim == 4 and len(given) == 1:
        given = given[0]
    dtype = torch.bool if getattr(given, "dtype", None) == torch.bool else torch.float32
    given = _checks.tensor(argument, given, "(T, H, W)", dtype).detach().cpu()
    expected = f"{tuple(clip.shape[1:])}, the (T, H, W) of the clip {tuple(clip.shape)}"
    fits = given.shape == clip.shape[1:]
    _checks.require(fits, argument, f"shape {tuple(given.shape)}", expected)
    low, high = float(given.min()), float(given.max())
    expected = "a mask in [0, 1] for keep=None, or a share to keep of an attribution"
    is_mask = low >= 0 and high <= 1
    _checks.require(keep is not None or is_mask, argument, f"{low:.3g}..{high:.3g}", expected)
    return given


def _boxes(boxes, count: int) -> list[np.ndarray]:
    """Return one (n, 4) array per frame; none at all stands for no box in any frame."""
    if boxes is None or len(boxes) == 0:
        return [np.zeros((0, 4))] * count
    _checks.require(len(boxes) == count, "boxes", f"{len(boxes)} entries", f"{count}, one a frame")
    found = []
    for t, given in enumerate(boxes):
        box = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
        fits = box.numel() == 0 or (box.ndim == 2 and box.shape[1] == 4)
        _checks.require(fits, f"boxes[{t}]", f"shape {tuple(box.shape)}", "(n, 4): x0, y0, x1, y1")
        _checks.require(bool(box.isfinite().all()), f"boxes[{t}]", "NaN or infinity", "finite")
        found.append(box.reshape(-1, 4).numpy())
    return found


def render(kind: str, rgb: np.ndarray, given, keep, opacity=OPACITY, cmap=CMAP) -> np.ndarray:
    """Draw one row: frames (T, H, W, 3) in [0, 1] and a map (T, H, W) become uint8 pictures."""
    grey = rgb @ np.array([[0.299], [0.587], [0.114]], np.float32)
    if kind != "clip":
        mask = keep is None or given.dtype == torch.bool
        heat = (given.float() if mask else display(given)).numpy()[..., None]
        colours = matplotlib.colormaps[cmap](heat[..., 0])[..., :3]
    if kind == "clip":
        frames = rgb
    elif kind == "mask":
        frames = colours
    elif kind == "overlay":  # dimmed, so that what is hot outshines also a white background
        frames = (1 - opacity * heat) * 0.6 * grey + opacity * heat * colours
    else:  # what is kept, on a blurred mid-grey rest from which black and white both stand out
        weights = heat if mask else top(given, keep).numpy()[..., None]
        sigma = (0, rgb.shape[1] / 28, rgb.shape[2] / 28, 0)
        rest = 0.5 + 0.32 * gaussian_filter(grey, sigma)
        frames = weights * rgb + (1 - weights) * rest
    return (255 * frames).round().astype(np.uint8)


def top(given: Tensor, keep: float) -> Tensor:
    """Return 1 on the map's highest share of voxels, else 0; equal values in raster order."""
    # Of the map as it came: `display` ties its top.
    order = given.flatten().argsort(descending=True, stable=True)
    weights = torch.zeros(given.numel())
    weights[order[: round(keep * given.numel())]] = 1
    return weights.reshape(given.shape)


def _burn(frames: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
    """Draw boxes into (T, H, W, 3): a dark frame, and the white line inside it."""
    height, width = frames.shape[1:3]
    thick = 1 + height // 200
    for frame, of_frame in zip(frames, boxes, strict=True):
        for x0, y0, x1, y1 in of_frame:
            for grow in range(thick, -thick, -1):
                xs = np.clip([math.floor(x0) - grow, math.ceil(x1) - 1 + grow], 0, width - 1)
                ys = np.clip([math.floor(y0) - grow, math.ceil(y1) - 1 + grow], 0, height - 1)
                frame[ys[0] : ys[1] + 1, xs] = frame[ys, xs[0] : xs[1] + 1] = 255 * (grow < 1)
    return frames


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
    boxes : list of Tensor, optional
        Per frame (n, 4), ``x0, y0, x1, y1`` in pixels; drawn on the clip and, thinly, on overlays.
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
    rgb, maps, boxes = _inputs(clip, maps, boxes, keep)
    columns = _columns(frames, len(rgb))
    possible = ROWS if maps else ROWS[:1]
    rows = list(possible[:2] if several else possible) if rows is None else list(rows)
    for row in rows:
        _checks.one_of("rows" if maps else "rows (without maps)", row, possible)
    _checks.require(len(rows) > 0, "rows", rows, "at least one row")
    masks = {name: keep is None or given.dtype == torch.bool for name, given in maps.items()}
    kinds = [row for row in rows if row != "clip"]
    strips = [("clip", "clip", None)] if "clip" in rows else []  # label, kind of row, map
    for name, given in maps.items():
        words = {"overlay": "overlay", "kept": "kept", "mask": "mask"}
        if not masks[name]:
            words |= {"kept": f"top {100 * keep:.3g} %", "mask": "map"}
        for kind in kinds:
            parts = caption(name).splitlines()
            lines = [line for part in parts for line in textwrap.wrap(part, 14)]
            lines += [words[kind]] if len(kinds) > 1 or not name else []
            strips.append(("\n".join(lines), kind, given))

    bar = {"overlay", "mask"}.intersection(kinds)
    labels = [label for label, _, _ in strips]
    figure, axes = _grid(labels, columns, rgb.shape[1:3], title, right=95 if bar else 10)
    for line, (_, kind, given) in zip(axes, strips, strict=True):
        pictures = render(kind, rgb, given, keep, cmap=cmap)[columns]
        for ax, t, picture in zip(line, columns, pictures, strict=True):
            _draw(ax, picture, boxes[t], {"clip": 1.6, "overlay": 0.7}.get(kind))
    if bar:
        beside = axes[[kind in bar for _, kind, _ in strips], -1]
        _colour_bar(figure, beside, cmap, "mask" if all(masks.values()) else "attribution, scaled")
    return figure


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
    _checks.require(len(clips) > 0, "clips", "none", "at least one")
    films = {name: _inputs(clip, {}, boxes, None) for name, clip in clips.items()}
    sizes = {films[name][0].shape for name in films}
    _checks.require(len(sizes) == 1, "clips", f"sizes {sorted(sizes)}", "clips of one size")
    rgb, _, boxes = next(iter(films.values()))
    columns = _columns(frames, len(rgb))
    labels = ["\n".join(textwrap.wrap(caption(name), 14)) for name in films]
    figure, axes = _grid(labels, columns, rgb.shape[1:3], title, right=10)
    for line, (film, _, _) in zip(axes, films.values(), strict=True):
        for ax, t in zip(line, columns, strict=True):
            _draw(ax, film[t], boxes[t], 1.6)
    return figure


def _columns(frames, count: int) -> list[int]:
    """Return the indices of the frames to draw."""
    if isinstance(frames, int):
        _checks.require(frames > 0, "frames", frames, "at least 1")
        return np.linspace(0, count - 1, min(frames, count)).round().astype(int).tolist()
    frames = [int(t) for t in frames]
    inside = len(frames) > 0 and all(0 <= t < count for t in frames)
    _checks.require(inside, "frames", frames, f"indices in 0..{count - 1}")
    return frames


def _grid(labels: list[str], columns: list[int], size: tuple[int, int], title, right: int):
    """Lay out empty axes, in pixels: labels at the left, frame numbers on top, a right margin."""
    left = 20 + 9 * max(len(line) for label in labels for line in ["frame", *label.split("\n")])
    n = len(columns)
    cell = min((WIDTH - left - right - (n - 1) * GAP) / n, CELL, CELL * size[1] / size[0])
    # A frame grows by a whole number, so that every pixel of it is drawn as wide as the next.
    cell = cell // size[1] * size[1] if cell >= size[1] else int(cell)
    high = round(cell * size[0] / size[1])
    over = max(0, 18 * max(label.count("\n") + 1 for label in labels) - high)  # labels higher
    step = GAP + high + over
    wide = left + right + n * (cell + GAP) - GAP
    lines = textwrap.wrap(title or "", int((wide - left) / 9))
    top = 28 + 22 * len(lines)
    tall = top + len(labels) * step
    figure = Picture(figsize=(wide / DPI, tall / DPI), dpi=DPI)
    axes = np.empty((len(labels), n), object)
    for i, j in np.ndindex(axes.shape):
        x, y = left + j * (cell + GAP), tall - top - i * step - over / 2 - high
        axes[i, j] = ax = figure.add_axes((x / wide, y / tall, cell / wide, high / tall))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
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


def _draw(ax, picture: np.ndarray, boxes: np.ndarray, width: float | None) -> None:
    """Draw a frame, and its boxes in white between dark lines; no ``width``: none of them."""
    high, wide = picture.shape[:2]
    method = "nearest" if ax.get_window_extent().width > wide - 0.5 else "antialiased"
    # The edges of the pixels are at whole numbers, as boxes count them.
    ax.imshow(picture, extent=(0, wide, high, 0), interpolation=method)
    for x0, y0, x1, y1 in boxes if width else ():
        outline = [withStroke(linewidth=width + 1.6, foreground="black")]
        style = {"fill": False, "edgecolor": "white", "linewidth": width, "path_effects": outline}
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
