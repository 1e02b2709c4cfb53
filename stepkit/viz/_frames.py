"""Frames of a clip and of its attribution, as arrays of pixels.

Nothing here changes a score: the scaling of `display` is for the eye. All remains readable when
printed in grey.

A mask (values in [0, 1], such as STEP's) is drawn as it is, any other map through `display`. A bool
map is always a mask, a float32 map where the caller says ``keep=None``; its values alone do not
tell, as a gradient lies in [0, 1] too.
"""

import matplotlib
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from stepkit import _checks
from stepkit._checks import require
from stepkit.clips import unnormalise
from stepkit.metrics.pointing import boxes_of
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


def inputs(clip, maps: dict, boxes, keep) -> tuple[np.ndarray, dict, list[Tensor]]:
    """Check what a picture is made of; return (T, H, W, 3) in [0, 1], the maps, the boxes."""
    one = "(1, 3, T, H, W)" if getattr(clip, "ndim", 4) == 5 else "(3, T, H, W)"
    clip = _checks.tensor("clip", clip, one).detach().cpu().reshape(clip.shape[-4:])
    require(keep is None or 0 < keep <= 1, "keep", keep, "a share in (0, 1] or None")
    maps = {n: _map(f"maps[{n!r}]" if n else "maps", m, clip, keep) for n, m in maps.items()}
    rgb = unnormalise(clip).permute(1, 2, 3, 0).numpy()
    return rgb, maps, boxes_of("boxes", [] if boxes is None else boxes, len(rgb))


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


def render(kind: str, rgb: np.ndarray, given, keep, opacity=OPACITY, cmap=CMAP) -> np.ndarray:
    """Draw one of `KINDS`: frames (T, H, W, 3) in [0, 1], a map (T, H, W) -> uint8 (T, H, W, 3).

    In an overlay the clip turns grey and dim, and the map lies over it in colour, more opaque where
    it is higher, at most ``opacity``. ``keep`` as for `stepkit.show`.
    """
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
