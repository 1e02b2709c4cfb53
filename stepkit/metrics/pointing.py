"""Does an attribution lie where people or the data say the evidence is (paper §V-H, Table VI)?

Boxes: the pointing game. Pixel masks, where they are known: share of the relevance, and overlap.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stepkit._checks import in_proportion, one_of, require, tensor, warn
from stepkit.data import Batch
from stepkit.metrics._metric import metric

__all__ = ["Pointing", "iou", "pointing_game", "relevance_mass"]


@dataclass(frozen=True)
class Pointing:
    """What N maps of T frames hit in the pointing game.

    Attributes
    ----------
    hits : Tensor
        bool (N, T), the frame's maximum hit a box; False in a frame that does not count.
    boxed : Tensor
        bool (N, T), the frame has a box.
    flat : Tensor
        bool (N, T), the map has one value all over the frame, so it points nowhere.
    """

    hits: Tensor
    boxed: Tensor
    flat: Tensor

    @property
    def counted(self) -> Tensor:
        """The frames that count, bool (N, T): those with a box whose map points somewhere."""
        return self.boxed & ~self.flat

    @property
    def rate(self) -> float:
        """Share of hits among all frames that count; NaN if none does.

        Where no map is flat, the released code's, which counts a frame without box as a miss, is
        ``rate * (1 - unboxed)``.
        """
        return (self.hits.sum() / self.counted.sum()).item()

    @property
    def by_clip(self) -> Tensor:
        """Share of hits among the frames of each clip that count, (N,); NaN if none does."""
        return self.hits.sum(1) / self.counted.sum(1)

    @property
    def unboxed(self) -> float:
        """Share of the frames that have no box, and so were left out."""
        return 1 - self.boxed.float().mean().item()


def pointing_game(
    maps: Tensor, boxes, radius: float | None = None, *, shape: str = "circle"
) -> Pointing:
    """Return which frames' maxima hit a box, or come close enough (§V-H, Table VI).

    The paper prints: a hit if a circle of 7 pixels around the maximum of an importance map meets
    the box. It does not say whether a video has one such maximum or one per frame; as in the
    released code every frame is a map of its own.

    Parameters
    ----------
    maps : Tensor
        float32 (N, T, H, W), raw: display normalisation clips values and creates ties.
    boxes : list of list of Tensor
        For each clip and frame (K, 4), ``x0, y0, x1, y1`` in pixels of the map, K = 0 where the
        frame has none: the ``boxes`` of a `stepkit.data.Batch`. An empty list: a clip without any.
        One tensor (4,) or (K, 4) for a clip stands for each of its frames.
    radius : float, optional
        In pixels; by default 7 at 112, in proportion to the shorter side.
    shape : str
        ``"circle"`` (default), as printed; ``"square"``: the box grown by the radius on every side,
        corners too, as released.

    Returns
    -------
    Pointing
        ``.hits .boxed .flat .counted (N, T) .rate .by_clip (N,) .unboxed``.

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit; NaN; a box without area or with its corners swapped.

    Warns
    -----
    UserWarning
        No frame has a box, or no map points anywhere: the rate is undefined, hence NaN.

    Notes
    -----
    The pixel in column i, row j covers [i, i+1] × [j, j+1], as boxes count: one around that pixel
    alone is (i, j, i+1, j+1). The circle stands on the pixel's centre (i + ½, j + ½); to touch the
    box is to meet it. A radius of 0 asks for the centre to lie in the box.

    Frames without a box are left out (released: they are misses, and rows and columns of the
    maximum are swapped). With several boxes one is enough. Maxima that tie: the first in raster
    order. A frame of equal values has no maximum and is left out.

    References
    ----------
    Zhang, Bargal, Lin, Brandt, Shen, Sclaroff 2018 (the game); Adel Bargal, Zunino, Kim, Zhang,
    Murino, Sclaroff 2018 (on videos).

    Examples
    --------
    >>> maps = torch.zeros(1, 2, 8, 8)
    >>> maps[0, :, 1, 5] = 1  # row 1, column 5
    >>> found = pointing_game(maps, [[torch.tensor([[0., 0., 3., 3.]]), torch.zeros(0, 4)]], 2.5)
    >>> found.hits.tolist(), found.rate, found.unboxed
    ([[True, False]], 1.0, 0.5)
    """
    found = _pointed(maps, boxes, radius, shape)
    if not found.counted.any():
        why = "the maps are flat wherever there is one" if found.boxed.any() else "no frame has one"
        warn(f"pointing_game: of boxes, {why}; the rate is NaN")
    return found


@metric("located", label="pointing game, share and overlap", columns=("hit", "mass", "iou"))
def located(
    model: nn.Module,
    batch: Batch,
    maps: Tensor,
    *,
    radius: float | None = None,
    shape: str = "circle",
) -> dict[str, Tensor]:
    """Score maps by the pointing game (Table VI) and by the pixels of the evidence, (N,) each.

    ``hit``: share of the frames that count, NaN for a clip without box; ``boxed``, ``flat``: shares
    of the frames that have a box, and where the map points nowhere; ``mass``, ``iou``: see
    `relevance_mass` and `iou`. Where only boxes are known, all their pixels are evidence. The
    options are those of `pointing_game`; the model is not asked.
    """
    found = _pointed(maps, batch.boxes, radius, shape)
    shares = {name: getattr(found, name).float().mean(1) for name in ("boxed", "flat")}
    masses = {"mass": relevance_mass(maps, batch.evidence), "iou": iou(maps, batch.evidence)}
    return {"hit": found.by_clip} | shares | masses


def _pointed(maps: Tensor, boxes, radius: float | None, shape: str) -> Pointing:
    one_of("shape", shape, ("circle", "square"))
    tensor("maps", maps, "(N, T, H, W)")
    N, T, H, W = maps.shape
    radius = in_proportion(7, (H, W)) if radius is None else radius
    number = isinstance(radius, (int, float)) and not isinstance(radius, bool)
    require(number and 0 <= radius < math.inf, "radius", radius, "pixels, at least 0")
    found, counts = _gathered(boxes, N, T)  # (B, 4), (N·T,)
    flat = (maps.amax((2, 3)) == maps.amin((2, 3))).cpu()  # (N, T)
    place = maps.flatten(2).argmax(2).flatten().cpu()  # (N·T,), the first of equal ones
    centre = torch.stack([place % W, place // W], 1) + 0.5  # x, y
    frame = torch.arange(N * T).repeat_interleave(counts)  # (B,), the frame of each box
    apart = torch.maximum(found[:, :2] - centre[frame], centre[frame] - found[:, 2:]).clamp(min=0)
    met = apart.square().sum(1) <= radius**2 if shape == "circle" else apart.amax(1) <= radius
    hits = torch.zeros(N * T, dtype=torch.bool)
    hits[frame[met]] = True
    return Pointing(hits.view(N, T) & ~flat, (counts > 0).view(N, T), flat)


def _gathered(boxes, N: int, T: int) -> tuple[Tensor, Tensor]:
    """Check boxes; return them in one tensor, float64 (B, 4), and how many each frame has."""
    _listed("boxes", boxes, (N,), f"{N} clips, as many as maps")
    found = [box for n, clip in enumerate(boxes) for box in boxes_of(f"boxes[{n}]", clip, T)]
    return torch.cat(found), torch.tensor([len(box) for box in found])


def boxes_of(argument: str, clip, T: int) -> list[Tensor]:
    """Check the boxes of one clip; return those of each frame, float64 (K, 4)."""
    if isinstance(clip, (Tensor, np.ndarray)) and clip.ndim < 3 and clip.shape[-1] == 4:
        clip = [clip.reshape(-1, 4)] * T
    _listed(argument, clip, (T, 0), f"{T} frames, one tensor for all, or an empty list")
    none = [torch.zeros(0, 4, dtype=torch.float64)] * (T - len(clip))
    return [_rows(f"{argument}[{t}]", given) for t, given in enumerate(clip)] + none


def _listed(argument: str, given, lengths: tuple[int, ...], expected: str) -> None:
    if not isinstance(given, (list, tuple, Tensor, np.ndarray)):
        raise TypeError(f"{argument}: got {type(given).__name__}, expected {expected}")
    require(len(given) in lengths, argument, f"length {len(given)}", expected)


def _rows(argument: str, given) -> Tensor:
    """Return the boxes of one frame as float64 (K, 4)."""
    expected = "(K, 4): x0, y0, x1, y1"
    try:
        box = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: got {type(given).__name__}, expected {expected}") from error
    fits = box.numel() == 0 or (box.ndim == 2 and box.shape[1] == 4)
    require(fits, argument, f"shape {tuple(box.shape)}", expected)
    box = box.detach().reshape(-1, 4)
    require(bool(box.isfinite().all()), argument, "NaN or infinity", "finite values")
    wrong = box[(box[:, :2] >= box[:, 2:]).any(1)]
    require(len(wrong) == 0, argument, wrong[:1].tolist(), "x0 < x1 and y0 < y1")
    return box


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's positive relevance that lies inside the mask, (N,).

    ``maps`` float32 (N, T, H, W), ``masks`` bool of the same shape. Summed in float64. NaN for a
    map without positive relevance and for an empty mask. (Arras, Osman, Samek 2022: relevance mass
    accuracy; not in the paper.)

    Examples
    --------
    >>> maps = torch.tensor([[[[3.0, 1.0], [-5.0, 0.0]]]])
    >>> relevance_mass(maps, maps > 1)
    tensor([0.7500])
    """
    maps, masks, device = _pair(maps, masks)
    positive = maps.double().clamp(min=0)
    share = (positive * masks).sum(1) / positive.sum(1)
    return share.where(masks.any(1), math.nan).float().to(device)


def iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the overlap |A ∩ B| / |A ∪ B| of each mask B and the map's highest voxels A, (N,).

    A holds as many voxels of the clip as B. Of the voxels that tie for the last places A holds the
    same share everywhere: as many of B's as a draw would take on average. ``maps`` float32
    (N, T, H, W), ``masks`` bool of the same shape. NaN for an empty mask, and for a map with one
    value all over the clip. (Not in the paper.)

    Examples
    --------
    >>> maps = torch.tensor([[[[3.0, 1.0], [-5.0, 0.0]]]])
    >>> iou(maps, torch.tensor([[[[True, False], [True, False]]]]))
    tensor([0.3333])
    """
    maps, masks, device = _pair(maps, masks)
    size = masks.sum(1)
    last = maps.sort(dim=1, descending=True).values.gather(1, (size[:, None] - 1).clamp(min=0))
    above, tied = maps > last, maps == last
    share = (size - above.sum(1)) / tied.sum(1)
    common = (above & masks).sum(1) + share * (tied & masks).sum(1)
    flat = tied.all(1)
    return (common / (2 * size - common)).where(~flat, math.nan).to(device)


def _pair(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, torch.device]:
    """Check both; return them as (N, T·H·W) on the CPU, and the device of the maps.

    Not every accelerator has float64.
    """
    tensor("maps", maps, "(N, T, H, W)")
    tensor("masks", masks, "(N, T, H, W)", torch.bool)
    fits = masks.shape == maps.shape
    require(fits, "masks", f"shape {tuple(masks.shape)}", f"the maps' {tuple(maps.shape)}")
    return maps.flatten(1).cpu(), masks.flatten(1).cpu(), maps.device
