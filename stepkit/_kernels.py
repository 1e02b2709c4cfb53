"""The loops of the smooth max, compiled for float32 on a processor.

`attribution.smoothmax` says them once more in plain torch, for other devices and dtypes; the tests
hold the two against each other. What is won, three to six times the speed: a cell is weighted, its
exponential taken and both sums raised while all are in registers; cells outside the seed grid are
counted instead of computed; nothing is copied.
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

__all__ = ["smooth_max", "smooth_max_back", "usable"]


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
    # all of fast mathematics but "there are no NaN": those of a model gone wrong shall be seen
    fast = {"reassoc", "contract", "arcp", "nsz", "afn"}
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath=fast)(loop)
    with suppress(RuntimeError):  # neither place can be written
        compiled._cache = _Cache(loop)  # what cache=True does, with a cache that never fails
    return compiled


_f = np.float32


def usable(values: Tensor) -> bool:
    """Whether these loops serve ``values``: float32, on the processor."""
    return values.dtype == torch.float32 and values.device.type == "cpu"


def _parallel(loop, length: int, *arguments) -> None:
    """Run ``loop(*arguments, first, last)`` over 0 to ``length``, cut among torch's threads."""
    workers = max(1, min(torch.get_num_threads(), length))
    spans = list(pairwise(length * i // workers for i in range(workers + 1)))
    arguments = [x.detach().numpy() if isinstance(x, Tensor) else x for x in arguments]
    others = [_pool(workers).submit(loop, *arguments, *span) for span in spans[1:]]
    loop(*arguments, *spans[0])
    for other in others:
        other.result()


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "stepkit")


def smooth_max(cells: Tensor, weights: Tensor, blocks, padding: int) -> tuple[Tensor, Tensor]:
    """Cells (h, w, B) -> Σ z·2^z / Σ 2^z and its denominator, both (s², *blocks, B).

    z = weight·cell over the cells that a pixel sees, ``weights`` ((2r+1)², s²); ``padding`` cells
    of value 0 lie around the others.
    """
    out = cells.new_empty(weights.shape[1], *blocks, cells.shape[2])
    total = torch.empty_like(out)
    _parallel(_smooth_max, blocks[0], cells, weights, out, total, padding)
    return out, total


def smooth_max_back(cells: Tensor, weights: Tensor, offset, scaled, padding: int) -> Tensor:
    """Return Σ (offset + z·scaled)·2^z·weight over the pixels that see a cell, (h, w, B)."""
    gradient = torch.empty_like(cells)
    given = cells, weights, offset.contiguous(), scaled.contiguous(), gradient, padding
    _parallel(_smooth_max_back, len(cells), *given)
    return gradient


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


@_compiled
def _smooth_max(cells, weights, out, total, padding, first, last):
    """See `smooth_max`; the blocks' rows ``first`` to ``last``."""
    h, w, batch = cells.shape
    side = int(np.sqrt(len(weights)))
    for bi in range(first, last):
        top, bottom = max(0, padding - bi), min(side, h + padding - bi)
        for bj in range(out.shape[2]):
            left, right = max(0, padding - bj), min(side, w + padding - bj)
            outside = _f(side * side - (bottom - top) * (right - left))  # cells of 0, each 2^0
            for s in range(len(out)):
                value, sums = out[s, bi, bj], total[s, bi, bj]
                value[:] = 0
                sums[:] = outside
                for i in range(top, bottom):
                    for j in range(left, right):
                        weight = weights[i * side + j, s]
                        cell = cells[bi + i - padding, bj + j - padding]
                        for b in range(batch):
                            z = weight * cell[b]
                            e = _exp2(z)
                            sums[b] += e
                            value[b] += z * e
                for b in range(batch):
                    value[b] /= sums[b]


@_compiled
def _smooth_max_back(cells, weights, offset, scaled, gradient, padding, first, last):
    """See `smooth_max_back`: gathered cell by cell, so that no two threads write one."""
    side, batch = int(np.sqrt(len(weights))), cells.shape[2]
    rows, columns = offset.shape[1:3]
    for y in range(first, last):
        for x in range(cells.shape[1]):
            cell, slope = cells[y, x], gradient[y, x]
            slope[:] = 0
            for i in range(max(0, y + padding + 1 - rows), min(side, y + padding + 1)):
                for j in range(max(0, x + padding + 1 - columns), min(side, x + padding + 1)):
                    bi, bj = y + padding - i, x + padding - j
                    for s in range(len(offset)):
                        weight, a = weights[i * side + j, s], offset[s, bi, bj]
                        k = scaled[s, bi, bj]
                        for b in range(batch):
                            z = weight * cell[b]
                            slope[b] += (a[b] + z * k[b]) * _exp2(z) * weight
