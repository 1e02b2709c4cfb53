"""Smooth masks from small seeds, and the two terms that shape them (paper §III, Eqs. 6-10).

The seed mask has a cell every ``step`` pixels. A *smooth max* spreads each cell over a disc of
about ``sigma`` pixels, onto a canvas that is larger than the frame, so that a cell at the border
costs as much area as one in the middle. The frame's mask is the canvas, cropped.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stepkit import _kernels
from stepkit._checks import in_proportion, one_of, require
from stepkit._compiling import fused

SHARPNESS = 20.0  # of the smooth max
TIE = 1e-5  # mask values closer than this are equal
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


def top_share(values: Tensor, counts: list[int]) -> Tensor:
    """Mark the ``counts[a]`` largest of ``values[:, a]``; (N, A, n) -> weights (N, A, n) in [0, 1].

    Values within 1e-5 of the threshold count as tied and share what is left of the count evenly:
    pixels that the equations make equal differ in their last bits, and which of them is ahead would
    otherwise depend on the machine.
    """
    threshold = _thresholds(values, [max(1, count) for count in counts])
    above, tied = values > threshold + TIE, (values - threshold).abs() <= TIE
    left = _constants(tuple(counts), values.device, values.dtype)[:, None] - above.sum(2, True)
    return torch.where(tied, left / tied.sum(2, True), above.to(values))


def _thresholds(values: Tensor, counts: list[int]) -> Tensor:
    """Return the ``counts[a]``-th largest of ``values[:, a]``, (N, A, 1)."""
    n = values.shape[2]
    if values.device.type == "cpu":  # a tenth of the time of torch's own selection
        rows = values.detach().numpy()
        found = [np.partition(rows[:, a], n - k, 1)[:, n - k] for a, k in enumerate(counts)]
        return torch.from_numpy(np.stack(found, 1))[..., None]
    # infinite values let one rank fit all areas: one selection fills a GPU, one for each does not
    more = _infinities(tuple(counts), values.device, values.dtype).expand(len(values), -1, -1)
    full = torch.cat([values, more], 2)
    return full.kthvalue(full.shape[2] - max(counts) + 1, 2, keepdim=True).values


@cache
def _infinities(counts: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return rows (A, ...) of ∞ and −∞ that make the counts[a]-th largest the max(counts)-th."""
    most = max(1, *counts)
    rows = torch.full((len(counts), most - min(counts)), -math.inf, dtype=dtype)
    for row, count in zip(rows, counts, strict=True):
        row[: most - count] = math.inf
    return rows.to(device)


@cache
def _constants(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers where they are needed; copied anew, they would make a GPU wait."""
    return torch.tensor(values, device=device, dtype=dtype)


def area_loss(masks: Tensor, areas) -> Tensor:
    """L_S of Eq. 6, the squared distance of the sorted mask from v·|M| ones, divided by |M|.

    ``masks`` (N, A, T, H, W), ``areas`` A shares v -> (N, A). No sort is needed:
    ‖sort(m) − r_v‖² = Σm² − 2·Σ(largest k of m) + k, with k = v·|M|.
    """
    values = masks.flatten(2)
    n = values.shape[2]
    counts = [round(v * n) for v in areas]
    top = top_share(values.detach(), counts)
    fixed = _constants(tuple(counts), values.device, values.dtype)
    return ((values * (values - 2 * top)).sum(2) + fixed) / n


def core_kernel(length: int, size: int, shape: str = "ellipsoid") -> Tensor:
    """Return the kernel K of Eqs. 9-10, float64 (length, size, size), summing to one.

    An ellipsoid inscribed in the box, its poles on the outermost slices, or the cylinder that the
    paper mentions. One or two slices have nothing between poles: they lie at the centre, whole.
    """
    one_of("kernel_shape", shape, ("ellipsoid", "cylinder"))
    require(length >= 1, "kernel_length", length, "at least one frame")
    require(size >= 1, "kernel_size", size, "at least one pixel")
    edges = ([-1, 1] if n > 2 else [0, 0] for n in (length, size, size))
    axes = (
        torch.linspace(*ends, n, dtype=torch.float64)
        for ends, n in zip(edges, (length, size, size), strict=True)
    )
    t, i, j = torch.meshgrid(*axes, indexing="ij")
    radius = i**2 + j**2 + (t**2 if shape == "ellipsoid" else 0)
    kernel = (radius <= 1 + 1e-12).double()
    return kernel / kernel.sum()


def kernel_length(printed: int, frames: int) -> int:
    """Return T_K for a clip of ``frames`` frames, as ``printed`` for the paper's 16, in proportion.

    At least 3, of which the middle one is whole, and at most the clip; 0 (no L_K) stays 0.
    """
    return min(frames, max(3, round(printed * frames / 16))) if printed else 0


def core_loss(masks: Tensor, areas, kernel: Tensor, form: str = "printed") -> Tensor:
    """L_K of Eqs. 7-8: the mask, averaged over small tubes, shall be full or empty as well.

    ``masks`` (N, A, T, H, W) -> (N, A). M∗K has spatial strides of the kernel's size, temporal
    stride 1, no padding.

    ``form="printed"``: L_S of M∗K at the area β·v, β = THW / ((T+T_K−1)(H+H_K−1)(W+W_K−1)).
    ``form="released"``: the k largest and the rest averaged apart and added, with
    k = ⌈v·T·H·W / ⌊0.5236·T_K·H_K·W_K⌋⌉ (0.5236 = π/6, the ellipsoid's share of its box).
    """
    one_of("core_form", form, ("printed", "released"))
    T, H, W = masks.shape[2:]
    length, size = kernel.shape[0], kernel.shape[1]
    fits = length <= T and size <= min(H, W)
    require(fits, "kernel_length", f"kernel {tuple(kernel.shape)}", f"at most the mask {(T, H, W)}")
    convolved = fused(_tubes, masks)(masks, kernel.to(masks)).flatten(2)
    if form == "printed":
        beta = T * H * W / ((T + length - 1) * (H + size - 1) * (W + size - 1))
        return area_loss(convolved[:, :, :, None, None], [beta * v for v in areas])
    n, element = convolved.shape[2], max(1, int(kernel.numel() * 0.5236))
    counts = [min(n, math.ceil(v * T * H * W / element)) for v in areas]
    top = top_share(convolved.detach(), counts)
    k = _constants(tuple(counts), convolved.device, convolved.dtype)
    full = (top * (1 - convolved) ** 2).sum(2) / k.clamp(min=1)
    return full + ((1 - top) * convolved**2).sum(2) / (n - k).clamp(min=1)


def _tubes(masks: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (N, A, T, H, W) with strides (1, H_K, W_K): (N, A, T − T_K + 1, ⌊H/H_K⌋, ⌊W/W_K⌋).

    In space the kernel's places do not overlap, so that this is one matrix product with the
    kernel's slices, whose results are then added up along time.
    """
    (length, size), (H, W) = kernel.shape[:2], masks.shape[3:]
    places = masks[..., : H - H % size, : W - W % size]
    places = places.unflatten(4, (-1, size)).unflatten(3, (-1, size)).transpose(4, 5)
    slices = places.flatten(5) @ kernel.flatten(1).T  # (N, A, T, h, w, T_K)
    steps = masks.shape[2] - length + 1
    return sum(slices[:, :, i : i + steps, ..., i] for i in range(length))


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
