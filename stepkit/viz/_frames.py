"""Frames of a clip and of its attribution, as arrays of pixels.

Nothing here changes a score: the scaling of `display` is for the eye. All remains readable when
printed in grey.

A mask (values in [0, 1], such as STEP's) is drawn as it is, any other map through `display`. A bool
map is always a mask, a float32 map where the caller says ``keep=None``; its values alone do not
tell, as a gradient lies in [0, 1] too.
"""

import math

import matplotlib
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from stepkit import _checks
from stepkit._checks import require
from stepkit.clips import unnormalise
from stepkit.viz._style import CMAP, OPACITY

KINDS = ("clip", "overlay", "kept", "mask")


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
    values, axes = maps.detach().cpu().double().numpy(), (-3, -2, -1)
    values = values - values.min(axes, keepdims=True)
    scale = np.percentile(values, 99.9, axes, keepdims=True)
    scale = np.where(scale > 0, scale, values.max(axes, keepdims=True))
    shown = np.clip(values / np.where(scale > 0, scale, 1), 0, 1)
    return torch.from_numpy(shown).to(maps.device, torch.float32)


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
    rgb, maps, boxes = inputs(clip, {} if maps is None else {"": maps}, boxes, 1)
    require(0 <= opacity <= 1, "opacity", opacity, "a number in [0, 1]")
    kind = "overlay" if maps else "clip"
    return burn(render(kind, rgb, maps.get(""), 1, opacity, cmap), boxes)


def inputs(clip, maps: dict, boxes, keep) -> tuple[np.ndarray, dict, list[np.ndarray]]:
    """Check what a picture is made of; return (T, H, W, 3) in [0, 1], the maps, the boxes."""
    one = "(1, 3, T, H, W)" if getattr(clip, "ndim", 4) == 5 else "(3, T, H, W)"
    clip = _checks.tensor("clip", clip, one).detach().cpu().reshape(clip.shape[-4:])
    require(keep is None or 0 < keep <= 1, "keep", keep, "a share in (0, 1] or None")
    maps = {n: _map(f"maps[{n!r}]" if n else "maps", m, clip, keep) for n, m in maps.items()}
    rgb = unnormalise(clip).permute(1, 2, 3, 0).numpy()
    return rgb, maps, _boxes(boxes, len(rgb))


def _map(argument: str, given, clip: Tensor, keep) -> Tensor:
    """Return one map, (T, H, W) as the clip, on the CPU; bool stays bool."""
    if isinstance(given, Tensor) and given.ndim == 4 and len(given) == 1:
        given = given[0]
    dtype = torch.bool if getattr(given, "dtype", None) == torch.bool else torch.float32
    given = _checks.tensor(argument, given, str(tuple(clip.shape[1:])), dtype).detach().cpu()
    low, high = float(given.min()), float(given.max())
    expected = "a mask in [0, 1] for keep=None, or a share to keep of an attribution"
    is_mask = low >= 0 and high <= 1
    require(keep is not None or is_mask, argument, f"{low:.3g}..{high:.3g}", expected)
    return given


def _boxes(boxes, count: int) -> list[np.ndarray]:
    """Return one (n, 4) array per frame; none at all stands for no box in any frame."""
    if boxes is None or len(boxes) == 0:
        return [np.zeros((0, 4))] * count
    require(len(boxes) == count, "boxes", f"{len(boxes)} entries", f"{count}, one a frame")
    found = []
    for t, given in enumerate(boxes):
        box = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
        fits = box.numel() == 0 or (box.ndim == 2 and box.shape[1] == 4)
        require(fits, f"boxes[{t}]", f"shape {tuple(box.shape)}", "(n, 4): x0, y0, x1, y1")
        require(bool(box.isfinite().all()), f"boxes[{t}]", "NaN or infinity", "finite")
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


def burn(frames: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
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
