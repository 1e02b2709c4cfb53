"""Loops of STEP, compiled for float32 on a processor: smooth max, ladder, largest values.

Each is said once more in plain torch, in `attribution.masks` and in `removal`, for the other
devices and dtypes; the tests hold the two against each other. What is won: a cell is weighted, its
exponential taken and both sums raised while all are in registers; cells outside the seed grid are
counted instead of computed; nothing is gathered, sorted or copied.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise

import numba
import numpy as np
import torch
from numba.core.caching import FunctionCache
from torch import Tensor


class _Cache(FunctionCache):
    """Machine code kept on disk; where that fails, each process compiles its own."""

    def load_overload(self, *given):
        try:
            return super().load_overload(*given)
        except Exception:  # half a file after a crash, or one of somebody else
            with suppress(OSError):
                self.flush()

    def save_overload(self, *given):
        with suppress(OSError):  # a full disk or quota
            super().save_overload(*given)


def _compiled(loop):
    """Compile a loop at its first call, or find it beside this file or in the user's cache."""
    compiled = numba.njit(
        nogil=True,
        error_model="numpy",
        # all of fast mathematics but "there are no NaN": those of a model gone wrong shall be seen
        fastmath={"reassoc", "contract", "arcp", "nsz", "afn"},
    )(loop)
    with suppress(RuntimeError):  # neither place can be written
        compiled._cache = _Cache(loop)  # what cache=True does, with a cache that never fails
    return compiled


_f = np.float32


def usable(*tensors: Tensor) -> bool:
    """Whether these loops serve ``tensors``: float32, on the processor."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def _parallel(loop, length: int, *arguments) -> None:
    """Run ``loop(*arguments, first, last)`` over 0 to ``length``, cut among torch's threads."""
    workers = max(1, min(torch.get_num_threads(), length))
    cuts = [length * i // workers for i in range(workers + 1)]
    spans = list(pairwise(cuts))
    others = [_pool(workers).submit(loop, *arguments, *span) for span in spans[1:]]
    loop(*arguments, *spans[0])
    for other in others:
        other.result()


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "stepkit")


# ------------------------------------------------------------------------------------- smooth max


@numba.njit(inline="always")
def _exp2(x):
    """2^x within 2e-7 of it: the power of two into the exponent's bits, the rest by its series."""
    whole = np.floor(x + _f(0.5))
    rest = x - whole
    series = _f(1.535336188e-4)  # ln(2)^k / k!, k = 6 to 0
    series = series * rest + _f(1.333355815e-3)
    series = series * rest + _f(9.618129108e-3)
    series = series * rest + _f(5.550410866e-2)
    series = series * rest + _f(2.402265070e-1)
    series = series * rest + _f(6.931471806e-1)
    series = series * rest + _f(1.0)
    return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


def smooth_max(seeds: Tensor, weights: Tensor, padding: int, blocks, canvas, bits) -> Tensor:
    """Spread seeds (h, w, B) over the canvas (B, SH, SW); see `masks.MaskGeometry.spread`.

    ``weights`` (2r+1, 2r+1, s²) are those of the geometry times ``bits``, 20/ln 2, so that the
    exponential is a power of two.
    """
    return _SmoothMax.apply(seeds, weights, padding, blocks, canvas, bits)


class _SmoothMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seeds, weights, padding, blocks, canvas, bits):
        batch = seeds.shape[2]
        smooth = seeds.new_empty(*blocks, weights.shape[2], batch)
        total, out = torch.empty_like(smooth), seeds.new_empty(batch, *canvas)
        given = [x.numpy() for x in (seeds.detach(), weights, smooth, total, out)]
        _parallel(_smooth_max, blocks[0], *given, padding, _f(1 / bits))
        ctx.save_for_backward(seeds, weights, smooth, total)
        ctx.padding, ctx.bits = padding, bits
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        seeds, weights, smooth, total = ctx.saved_tensors
        offset, scaled = torch.empty_like(total), torch.empty_like(total)
        given = [x.numpy() for x in (upstream.contiguous(), smooth, total, offset, scaled)]
        _parallel(_slopes, len(total), *given, _f(ctx.bits * np.log(2)), _f(np.log(2)))
        gradient = torch.empty_like(seeds)
        given = [x.numpy() for x in (seeds.detach(), weights, offset, scaled, gradient)]
        _parallel(_smooth_max_back, len(seeds), *given, ctx.padding, _f(1 / ctx.bits))
        return gradient, *[None] * 5


@_compiled
def _smooth_max(seeds, weights, smooth, total, out, padding, inverse, first, last):
    """Σ z·2^z / Σ 2^z over the cells that each pixel of the blocks' rows first..last sees."""
    h, w, batch = seeds.shape
    side, edge = len(weights), int(np.sqrt(weights.shape[2]))
    for bi in range(first, last):
        top, bottom = max(0, padding - bi), min(side, h + padding - bi)
        for bj in range(smooth.shape[1]):
            left, right = max(0, padding - bj), min(side, w + padding - bj)
            outside = _f(side * side - (bottom - top) * (right - left))  # cells of 0, each 2^0
            for s in range(weights.shape[2]):
                y, x = bi * edge + s // edge, bj * edge + s % edge
                if y >= out.shape[1] or x >= out.shape[2]:
                    continue
                value, sums = smooth[bi, bj, s], total[bi, bj, s]
                value[:] = 0
                sums[:] = outside
                for i in range(top, bottom):
                    for j in range(left, right):
                        weight, cell = weights[i, j, s], seeds[bi + i - padding, bj + j - padding]
                        for b in range(batch):
                            z = weight * cell[b]
                            e = _exp2(z)
                            sums[b] += e
                            value[b] += z * e
                for b in range(batch):
                    value[b] = value[b] / sums[b] * inverse
                    out[b, y, x] = min(max(value[b], _f(0)), _f(1))


@_compiled
def _slopes(upstream, smooth, total, offset, scaled, sharpness, log2, first, last):
    """∂out/∂z = 2^z / Σ2^z · (1 − 20·out + ln 2·z): its two parts without 2^z, times upstream."""
    edge = int(np.sqrt(smooth.shape[2]))
    for bi in range(first, last):
        for bj in range(smooth.shape[1]):
            for s in range(smooth.shape[2]):
                y, x = bi * edge + s // edge, bj * edge + s % edge
                if y >= upstream.shape[1] or x >= upstream.shape[2]:
                    offset[bi, bj, s] = 0
                    scaled[bi, bj, s] = 0
                    continue
                for b in range(smooth.shape[3]):
                    slope = upstream[b, y, x] / total[bi, bj, s, b]
                    offset[bi, bj, s, b] = slope * (1 - sharpness * smooth[bi, bj, s, b])
                    scaled[bi, bj, s, b] = slope * log2


@_compiled
def _smooth_max_back(seeds, weights, offset, scaled, gradient, padding, inverse, first, last):
    """Gather each cell's gradient from the pixels that see it: no two threads write one cell."""
    side, batch = len(weights), seeds.shape[2]
    rows, columns = offset.shape[:2]
    for y in range(first, last):
        for x in range(seeds.shape[1]):
            cell, slope = seeds[y, x], gradient[y, x]
            slope[:] = 0
            for i in range(max(0, y + padding + 1 - rows), min(side, y + padding + 1)):
                for j in range(max(0, x + padding + 1 - columns), min(side, x + padding + 1)):
                    bi, bj = y + padding - i, x + padding - j
                    for s in range(weights.shape[2]):
                        weight, a, k = weights[i, j, s], offset[bi, bj, s], scaled[bi, bj, s]
                        for b in range(batch):
                            z = weight * cell[b]
                            slope[b] += (a[b] + z * k[b]) * _exp2(z) * weight
            for b in range(batch):
                slope[b] *= inverse


# ----------------------------------------------------------------------------------------- ladder


def by_voxel(ladder: Tensor) -> Tensor:
    """Lay the rungs and channels of a voxel side by side in memory; the shape stays."""
    return ladder.permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)


def read(ladder: Tensor, mask: Tensor) -> Tensor:
    """Ladder (N, L, C, T, H, W), mask (N, A, T, H, W) -> (N, A, C, T, H, W); see `removal.read`.

    The ladder is copied unless it is as `by_voxel` leaves it.
    """
    return _Read.apply(ladder, mask)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ladder, mask):
        ladder = ladder.permute(0, 3, 4, 5, 1, 2).contiguous()  # (N, T, H, W, L, C)
        n, a, *size = mask.shape
        out = mask.new_empty(n, a, ladder.shape[5], *size)
        _parallel(_read, n * size[0], ladder.numpy(), mask.detach().numpy(), out.numpy())
        ctx.save_for_backward(ladder, mask)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        ladder, mask = ctx.saved_tensors
        gradient = torch.empty_like(mask, memory_format=torch.contiguous_format)
        given = ladder, mask.detach(), upstream.contiguous(), gradient
        _parallel(_read_back, mask.shape[0] * mask.shape[2], *(x.numpy() for x in given))
        return None, gradient


@numba.njit(inline="always")
def _rung(mask, steps):
    """Return the height on the ladder, and the rung below it; NaN stands on the lowest."""
    height = mask * steps
    if not height > 0:
        return height, 0
    return height, min(int(height), steps - 1)


@_compiled
def _read(ladder, mask, out, first, last):
    _, areas, frames, height, width = mask.shape
    steps, channels = ladder.shape[4] - 1, ladder.shape[5]
    for frame in range(first, last):
        n, t = frame // frames, frame % frames
        for y in range(height):
            for a in range(areas):  # while the row's ladder is at hand
                for x in range(width):
                    at, rung = _rung(mask[n, a, t, y, x], steps)
                    share = _f(at - rung)
                    for c in range(channels):
                        below = ladder[n, t, y, x, rung, c]
                        above = ladder[n, t, y, x, rung + 1, c]
                        out[n, a, c, t, y, x] = below + share * (above - below)


@_compiled
def _read_back(ladder, mask, upstream, gradient, first, last):
    _, areas, frames, height, width = mask.shape
    steps, channels = ladder.shape[4] - 1, ladder.shape[5]
    for frame in range(first, last):
        n, t = frame // frames, frame % frames
        for y in range(height):
            for a in range(areas):
                for x in range(width):
                    _, rung = _rung(mask[n, a, t, y, x], steps)
                    slope = _f(0)
                    for c in range(channels):
                        rise = ladder[n, t, y, x, rung + 1, c] - ladder[n, t, y, x, rung, c]
                        slope += upstream[n, a, c, t, y, x] * rise
                    gradient[n, a, t, y, x] = slope * steps


# --------------------------------------------------------------------------------- largest values


def top_share(values: Tensor, counts: list[int], tie: float) -> Tensor:
    """Mark the ``counts[a]`` largest of ``values[:, a]``, (N, A, n); see `masks.top_share`."""
    values = values.detach().contiguous()
    marks = torch.empty_like(values)
    rows = [x.view(-1, values.shape[2]).numpy() for x in (values, marks)]
    _parallel(_top_share, len(rows[0]), *rows, np.array(counts), _f(tie))
    return marks


def distance_from_full(values: Tensor, counts: list[int], tie: float) -> Tensor:
    """Return ‖sort(values) − r‖² of Eq. 6, (N, A, n) -> (N, A); see `masks.area_loss`."""
    return _Distance.apply(values, counts, tie)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, counts, tie):
        values = values.contiguous()
        short = top_share(values, counts, tie)  # becomes values - marks, half the gradient
        out = values.new_empty(values.shape[:2])
        rows = [x.view(-1, values.shape[2]).numpy() for x in (values.detach(), short)]
        _parallel(_distance, len(rows[0]), *rows, np.array(counts), out.view(-1).numpy())
        ctx.save_for_backward(short)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * (2 * upstream[..., None]), None, None


@_compiled
def _top_share(values, marks, counts, tie, first, last):
    for row in range(first, last):
        count = counts[row % len(counts)]
        if count == 0:
            marks[row] = 0
            continue
        threshold = _kth_largest(values[row], count)
        above, tied = 0, 0
        for value in values[row]:
            above += value > threshold + tie
            tied += abs(value - threshold) <= tie
        share = _f(count - above) / _f(tied)
        for i, value in enumerate(values[row]):
            near = abs(value - threshold) <= tie
            marks[row, i] = share if near else _f(value > threshold + tie)


@_compiled
def _distance(values, marks, counts, out, first, last):
    """Σm² − 2·Σ(largest k of m) + k; leaves m − marks where the marks were."""
    for row in range(first, last):
        total = 0.0
        for i in range(values.shape[1]):
            value, mark = values[row, i], marks[row, i]
            total += value * (value - 2 * mark)
            marks[row, i] = value - mark
        out[row] = total + counts[row % len(counts)]


@numba.njit(inline="always")
def _order(value):
    """Return an unsigned number that sorts as the float does; NaN above all."""
    bits = np.int64(np.float32(value).view(np.int32))
    return bits + (1 << 31) if bits >= 0 else (1 << 31) - 1 - (bits + (1 << 31))


@_compiled
def _kth_largest(values, count):
    """Find the value by its bits, the upper half of them first: two counts, no sort."""
    left, prefix = count, 0
    for shift in (16, 0):
        bins = np.zeros(1 << 16, np.int32)
        for value in values:
            order = _order(value)
            if shift == 16 or order >> 16 == prefix:
                bins[(order >> shift) & 0xFFFF] += 1
        digit = (1 << 16) - 1
        while bins[digit] < left:
            left -= bins[digit]
            digit -= 1
        prefix = prefix << 16 | digit
    bits = prefix - (1 << 31) if prefix >= 1 << 31 else -1 - prefix
    return np.int32(bits).view(np.float32)
