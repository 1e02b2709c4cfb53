"""Smooth masks from small seeds (paper §III; the smooth max of ref. 43).

The seed mask has a cell every ``step`` pixels. A *smooth max* spreads each cell over a disc of
about ``sigma`` pixels, onto a canvas that is larger than the frame, so that a cell at the border
costs as much area as one in the middle. The frame's mask is the canvas, cropped.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkit import _kernels
from stepkit._checks import in_proportion, require
from stepkit._compiling import fused

__all__ = ["MaskGeometry", "random_masks"]

SHARPNESS = 20.0  # of the smooth max
_BITS = SHARPNESS / math.log(2)  # exp(20z) is computed as 2^(_BITS·z): a third of the time on a CPU


@dataclass(frozen=True)
class MaskGeometry:
    """Where seed cells, canvas and frame lie (SPEC §2.1; the smooth-max operator of ref. 43).

    Attributes
    ----------
    height, width : int
        The frame, in pixels.
    step : int
        Pixels between seed cells; 7 at the paper's 112×112.
    sigma : int
        Reach of a cell, and the canvas's margin, in pixels; 11 at 112×112.

    Examples
    --------
    >>> MaskGeometry(112, 112, 7, 11).canvas
    (134, 134)
    """

    height: int
    width: int
    step: int = 7
    sigma: int = 11

    def __post_init__(self):
        require(self.step >= 1, "step", self.step, "at least one pixel")
        require(self.sigma >= 1, "sigma", self.sigma, "at least one pixel")

    @classmethod
    def scaled(cls, height: int, width: int) -> "MaskGeometry":
        """Return the paper's geometry, in proportion to the frame's shorter side."""
        scale = in_proportion(1, (height, width))
        return cls(height, width, max(1, round(7 * scale)), max(1, round(11 * scale)))

    @property
    def seeds(self) -> tuple[int, int]:
        """Rows and columns of seed cells, ⌈H/s⌉ × ⌈W/s⌉."""
        return math.ceil(self.height / self.step), math.ceil(self.width / self.step)

    @property
    def radius(self) -> int:
        """Cells that a canvas pixel sees on either side, 1 + ⌈σ/s⌉."""
        return 1 + math.ceil(self.sigma / self.step)

    @property
    def padding(self) -> int:
        """Cells of value 0 around the seeds, 1 + ⌈2σ/s⌉."""
        return 1 + math.ceil(2 * self.sigma / self.step)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of step×step canvas pixels that see the same cells.

        ⌈H/s⌉ + 2p − 2r; more where that gives a canvas smaller than H + 2σ.
        """
        return tuple(
            max(
                cells + 2 * self.padding - 2 * self.radius,
                math.ceil((edge + 2 * self.sigma + self.step - 1) / self.step),
            )
            for cells, edge in zip(self.seeds, (self.height, self.width), strict=True)
        )

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the canvas, s·blocks − s + 1."""
        return tuple(self.step * (blocks - 1) + 1 for blocks in self.blocks)

    @cached_property
    def weights(self) -> Tensor:
        """Weight of each cell that a pixel sees, float64 ((2r+1)², s²).

        exp(−2·max(d/σ − ½, 0)²) at distance d. It depends on the pixel's place within its block
        only; rows are the cells of the block's neighbourhood, in raster order.
        """
        pixel = torch.arange(self.step, dtype=torch.float64)
        cell = torch.arange(2 * self.radius + 1, dtype=torch.float64)
        # cell i of the grid sits at σ + s·i; block b sees the cells from b − p on
        along = pixel - self.sigma - self.step * (cell[:, None] - self.padding)  # (2r+1, s)
        squares = along[:, None, :, None] ** 2 + along[None, :, None, :] ** 2
        distance = squares.sqrt().flatten(2).flatten(0, 1)
        return torch.exp(-2 * (distance / self.sigma - 0.5).clamp(min=0) ** 2)

    def spread(self, seeds: Tensor) -> Tensor:
        """Spread seeds (..., h, w) in [0, 1] over the canvas (..., SH, SW).

        Each pixel takes the smooth max Σ z·softmax(20·z) over the weighted cells z that it sees;
        cells beyond the seed grid count as 0 and take part. Frames are independent.
        """
        lead, size = seeds.shape[:-2], seeds.shape[-2:]
        require(size == self.seeds, "seeds", f"{tuple(size)} cells", f"{self.seeds}")
        (bh, bw), s = self.blocks, self.step
        cells = seeds.reshape(-1, *size).permute(1, 2, 0).contiguous()  # (h, w, B)
        canvas = _SmoothMax.apply(cells, self)  # (s², bh, bw, B)
        canvas = canvas.view(s, s, bh, bw, -1).permute(4, 2, 0, 3, 1).reshape(-1, s * bh, s * bw)
        return canvas[:, : self.canvas[0], : self.canvas[1]].reshape(*lead, *self.canvas)

    def crop(self, canvas: Tensor) -> Tensor:
        """Cut the frame's mask (..., H, W) out of the canvas."""
        top = self.sigma
        return canvas[..., top : top + self.height, top : top + self.width]


class _SmoothMax(torch.autograd.Function):
    """Σ z·exp(20z) / Σ exp(20z) over the cells z = weight·cell that a pixel sees.

    Cells (h, w, B) -> (s², bh, bw, B), the pixels of each block. One cell of the neighbourhood at a
    time: all pairs of pixel and cell are never stored. On a GPU `torch.compile` fuses each loop; on
    a processor, in float32, `_kernels` has them.
    """

    @staticmethod
    def forward(ctx, cells, geometry):
        before, seen = geometry.padding, 2 * geometry.radius
        weights = _weights(geometry, cells.device, cells.dtype)
        if _kernels.usable(cells):
            out, total = _kernels.smooth_max(cells, weights, geometry.blocks, before)
        else:
            grid = _framed(cells, before, [n + seen for n in geometry.blocks])
            out, total = fused(_smooth_max, cells)(grid, weights, geometry.blocks, seen + 1)
        out /= _BITS
        ctx.geometry = geometry
        ctx.save_for_backward(cells, out, total)
        return out.clamp(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        # ∂out/∂z = exp(20z) / Σexp(20z) · (1 + 20z − 20·out), and ∂z/∂cell = weight
        cells, out, total = ctx.saved_tensors
        before, seen = ctx.geometry.padding, 2 * ctx.geometry.radius
        weights = _weights(ctx.geometry, cells.device, cells.dtype)
        slope = upstream / total / _BITS
        parts = slope * (1 - SHARPNESS * out), slope * (SHARPNESS / _BITS)
        if _kernels.usable(cells):
            return _kernels.smooth_max_back(cells, weights, *parts, before), None
        size = [n + seen for n in cells.shape[:2]]
        parts = [_framed(part, seen - before, size) for part in parts]
        return fused(_smooth_max_back, cells)(cells, weights, *parts, seen + 1), None


def _framed(values: Tensor, before: int, size) -> Tensor:
    """Put values (..., a, b, B) into zeros (..., *size, B), ``before`` their start."""
    rows, columns = (n - before - m for n, m in zip(size, values.shape[-3:-1], strict=True))
    return F.pad(values, (0, 0, before, columns, before, rows))


@cache
def _weights(geometry: MaskGeometry, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return 20/ln 2 times the weights, where they are needed: ((2r+1)², s²)."""
    return _BITS * geometry.weights.to(device, dtype)


def _smooth_max(grid: Tensor, weights: Tensor, blocks, side: int) -> tuple[Tensor, Tensor]:
    """Padded cells -> the smooth max (s², bh, bw, B) and its Σ exp(20z)."""
    (bh, bw), value, total = blocks, 0.0, 0.0
    for k in range(side * side):
        weight, (i, j) = weights[k][:, None, None, None], divmod(k, side)
        z = weight * grid[i : i + bh, j : j + bw]
        e = torch.exp2(z)
        value, total = value + z * e, total + e
    return value / total, total


def _smooth_max_back(cells, weights, offset, scaled, side: int) -> Tensor:
    """Gather each cell's gradient (h, w, B) from the padded slopes of the pixels that see it."""
    (h, w, _), gradient = cells.shape, 0.0
    for k in range(side * side):
        i, j = divmod(side * side - 1 - k, side)  # blocks see cells ahead
        weight = weights[k][:, None, None, None]
        z = weight * cells
        slope = offset[:, i : i + h, j : j + w] + z * scaled[:, i : i + h, j : j + w]
        gradient = gradient + slope * torch.exp2(z) * weight
    return gradient.sum(0)


def random_masks(masks: Tensor, seed: int) -> Tensor:
    """Return random blobs, 0 or 1, as many pixels of them as each mask shows; (N, A, T, H, W).

    The level sets of smooth noise in space and time, one noise for all masks of a seed.
    """
    noise = torch.randn(1, 1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    noise = F.interpolate(noise, masks.shape[2:], mode="trilinear", align_corners=True)
    noise = noise.flatten().to(masks)
    count = masks.mean((2, 3, 4)).mul(len(noise)).round().long()
    ranks = torch.empty_like(noise, dtype=torch.long)
    ranks[noise.argsort(descending=True, stable=True)] = torch.arange(
        len(noise), device=noise.device
    )
    return (ranks < count[:, :, None]).to(masks).view(masks.shape)
