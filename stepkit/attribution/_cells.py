"""Where a layer's cells lie in the clip: (N, K, T', H', W') of whatever a layer puts out.

Networks fold frames into the batch, put channels last, flatten space and time into tokens, or run a
layer once for every frame. Shapes alone do not tell all of these apart: TimeSformer's tokens lie
(h, w, t), VideoMAE's (t, h, w). Where more than one reading fits, parts of a clip are changed, and
the reading is taken by which the cells *there* change; if none is, there is an error and no map.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stepkit._checks import one_of, require
from stepkit.models import find_layer

Reading = Callable[[Tensor, int], Tensor]  # a layer's output for n clips -> (n, K, T', H', W')
ORDERS = ("thw", "hwt")  # of tokens
CLEAR = 0.05  # (late − early)/(late + early) of what a change of the late half changes, at least
AXES = (2, 3, 4)  # of a clip: t, h, w


class Watched:
    """What a layer puts out, call by call; and the grids of the convolutions that run."""

    def __init__(self, n: int):
        self.n = n  # clips
        self.thread = threading.get_ident()  # others may explain the same model at the same time
        self.kept: list[Tensor] = []  # of a tuple, the first; gradients, if on, begin here
        self.grids: set[tuple[int, int, int]] = set()

    def keep(self, _, __, output):
        """Keep an output; the network goes on with a copy, which it may change in place."""
        if self.thread != threading.get_ident():
            return output
        several = isinstance(output, tuple) and len(output) > 0
        first, rest = (output[0], output[1:]) if several else (output, ())
        given = f"{type(first).__name__}, first in what it puts out"
        require(isinstance(first, Tensor), "layer", given, "a layer of tensors")
        with torch._C.DisableTorchFunction():  # no rule of relevance: it begins here
            if self.kept and first.requires_grad:
                asked = {"allow_unused": True, "retain_graph": True}
                before = torch.autograd.grad(first.sum(), self.kept, **asked)
                given = "one that runs again on what it gave before"
                once = all(slope is None for slope in before)
                require(once, "layer", given, "one that runs once, or once for each part of a clip")
            self.kept.append(first.detach().requires_grad_(torch.is_grad_enabled()))
            first = self.kept[-1].clone()
        if not several:
            return first
        made = getattr(output, "_make", tuple)  # a named tuple stays one
        return made((first, *rest))

    def note(self, _, __, output):
        """Note the grid of a convolution: an embedding of patches tells how tokens lie."""
        if self.thread != threading.get_ident():
            return
        steps = output.shape[2:-2] if output.ndim == 5 else (len(output) // self.n,)
        self.grids.add((*steps, *output.shape[-2:]))


@contextlib.contextmanager
def watched(model: nn.Module, n: int, layer: str | None = None):
    """Watch a layer (see `stepkit.models.find_layer`) while n clips pass; yields `Watched`."""
    seen = Watched(n)
    handles = [find_layer(model, layer).register_forward_hook(seen.keep)]
    try:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                handles.append(module.register_forward_hook(seen.note))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def reader(
    model: nn.Module, layer: str | None, clips: Tensor, seen: Watched, grid=None, grid_order=None
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return what brings the layer's outputs for ``clips``, or their gradients, to their place.

    That function takes a tensor for each call of the layer, in the order of ``seen.kept``, and
    returns (N, K, T', H', W'); calls are stacked in time.

    Raises
    ------
    ValueError
        No reading fits; or more than one does, and no change of the clip tells which.
    """
    require(len(seen.kept) > 0, "layer", "one that did not run", "a layer in use, of tensors")
    one_of("grid_order", grid_order, (None, *ORDERS))
    n, calls, (frames, *space) = len(clips), len(seen.kept), clips.shape[2:]
    shapes = {tuple(values.shape) for values in seen.kept}
    given = f"{calls} outputs {sorted(shapes)} of {frames} frames"
    equal = len(shapes) == 1 and frames % calls == 0
    require(equal, "layer", given, "one output, or as many equal ones as the clip has parts")
    _check_grid(grid)
    if grid is not None and calls > 1:
        grid = (max(1, grid[0] // calls), *grid[1:])
    part = (frames // calls, *space)
    found = readings(shapes.pop(), n, part, grid, seen.grids, grid_order)
    told = grid is not None and len(found) == 1
    if calls > 1:
        _check_parts(model, layer, clips[:1], calls)
    if calls > 1 or not (told or found == [_channels_first]):
        found = [_confirmed(model, layer, clips[:1], found)]
    shape = seen.kept[0].shape
    if n > 1 and (n in shape[1:2] or (len(shape) < 5 and shape[0] > n)):
        _check_batch(model, layer, clips, found[0], seen.kept)
    return lambda outputs: _stacked(found[0], outputs, n)


def in_time(
    activation: Tensor, n: int, size: Sequence[int], grid=None, seen=(), order: str | None = None
) -> Tensor:
    """Return a layer's one output for n clips of ``size`` (T, H, W) by the first reading."""
    return readings(tuple(activation.shape), n, size, grid, seen, order)[0](activation, n)


def readings(shape: tuple, n: int, size, grid, seen, order: str | None = None) -> list[Reading]:
    """List the ways to read an output of ``shape`` for n clips of ``size`` (T, H, W).

    ``grid`` (T', H', W') and ``order`` of tokens are what the user says of them; ``seen`` the grids
    of convolutions that ran.
    """
    expected = "(N, K, T, H, W), (N, T, H, W, K), (N·T, K, H, W) or tokens (N, L, K)"
    fits = len(shape) in (3, 4, 5) and shape[0] % n == 0
    require(fits and (len(shape) < 5 or shape[0] == n), "layer", f"output {shape}", expected)
    _check_grid(grid)
    if len(shape) == 3:
        return _of_tokens(shape, n, size, grid, seen, order)
    steps = shape[0] // n
    if len(shape) == 4:  # frames were folded into the batch
        first, last = (steps, *shape[2:]), (steps, *shape[1:3])
    else:
        first, last = shape[2:], shape[1:4]
    both = [(first, _channels_first), (last, _channels_last)]
    if grid is not None:
        fitting = [reading for cells, reading in both if cells == tuple(grid)]
        require(bool(fitting), "grid", grid, f"{first} or {last}, of the layer")
        return fitting
    even, times = _frame_grids(*size[1:]), {t for t, _ in _frame_grids(size[0], size[0])}
    likely = [r for cells, r in both if cells[1:] in even and cells[0] in times]
    return likely or [_channels_first, _channels_last]


def _check_grid(grid) -> None:
    whole = grid is None or (len(grid) == 3 and all(isinstance(i, int) and i > 0 for i in grid))
    require(whole, "grid", grid, "three numbers (T', H', W')")


def _channels_first(x: Tensor, n: int) -> Tensor:
    return x if x.ndim == 5 else x.unflatten(0, (n, -1)).transpose(1, 2)


def _channels_last(x: Tensor, n: int) -> Tensor:
    return (x if x.ndim == 5 else x.unflatten(0, (n, -1))).movedim(-1, 1)


def _of_tokens(shape, n: int, size, grid, seen, order) -> list[Reading]:
    """List the readings of tokens (N·s, L, K), with or without a class token in front.

    s is 1, or the frames, or the places: what attends in space has the tokens of one frame side by
    side, what attends in time those of one place.
    """
    steps, length = shape[0] // n, shape[1]
    orders = ORDERS if order is None else (order,)

    def fitting(grids) -> dict:
        return {
            (cells, by, outer): _token_reading(cells, by, outer)
            for cells in grids
            for by in orders
            for outer in _cuts(cells, by)
            if outer == steps and math.prod(cells) // outer in (length, length - 1)
        }

    if grid is not None:
        found = fitting([tuple(grid)])
        tokens = f"{length} tokens" if steps == 1 else f"{steps} times {length} tokens"
        expected = f"(T', H', W') for {tokens}, or one less each: a class token"
        require(bool(found), "grid", grid, expected)
        return _distinct(found)
    times = [t for t in range(1, size[0] + 1) if size[0] % t == 0]
    even = {(t, *cells) for t in times for cells in _frame_grids(*size[1:])}
    told = []
    for known in (seen, even):
        found = fitting(sorted(known))
        told = sorted({cells for cells, _, _ in found})
        if len(told) == 1:
            return _distinct(found)
    candidates = " or ".join(map(str, told)) or "no even division of the clip"
    raise ValueError(
        f"layer: got {length} tokens, {candidates}, expected another layer or grid=(T', H', W')"
    )


def _cuts(cells, by: str) -> set[int]:
    """Return how many groups the tokens of a grid may be folded into: 1, or its first axes."""
    t, h, w = cells
    return {1, t} if by == "thw" else {1, h * w}


def _token_reading(cells, by: str, outer: int) -> Reading:
    sides = [dict(zip("thw", cells, strict=True))[axis] for axis in by]
    inner = math.prod(cells) // outer
    axes = [2 + by.index(axis) for axis in "thw"]  # behind clips and before channels

    def reading(tokens: Tensor, n: int) -> Tensor:
        tokens = tokens[:, tokens.shape[1] - inner :].reshape(n, -1, tokens.shape[-1])
        return tokens.transpose(1, 2).unflatten(2, sides).permute(0, 1, *axes)

    return reading


def _distinct(found: dict) -> list[Reading]:
    """Leave out orders that are the same: of a single frame, or of a single place."""
    cells = next(iter(found))[0]
    return [*found.values()][: 1 if cells[0] == 1 or cells[1] * cells[2] == 1 else None]


def _frame_grids(height: int, width: int) -> set[tuple[int, int]]:
    """Return the cells (H', W') that strides of 1, 2, ... pixels leave, rounded down or up."""
    down = {(height // s, width // s) for s in range(1, min(height, width) + 1)}
    return down | {(-(-height // s), -(-width // s)) for s in range(1, max(height, width) + 1)}


def _stacked(reading: Reading, outputs: Sequence[Tensor], n: int) -> Tensor:
    return torch.cat([reading(values, n) for values in outputs], 2)


# ------------------------------------------------------------------------------- which one is right


@torch.no_grad()
def _outputs(model: nn.Module, layer: str | None, clips: Tensor) -> list[Tensor]:
    with watched(model, len(clips), layer) as seen:
        model(clips)
    return [values.float() for values in seen.kept]


def _confirmed(model, layer, clip: Tensor, found: list[Reading]) -> Reading:
    """Return the reading by which a change in one half of the clip moves the cells of that half.

    The half becomes brighter, or noise: a network may be blind to one of them.
    """
    size = 3 * float(clip.std()) or 1.0
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0)).to(clip)
    outputs = [_outputs(model, layer, clip)]  # one by one: some networks take no more
    for change in (size * torch.ones_like(clip), size * noise):
        for axis in AXES:
            half = clip.shape[axis] // 2
            late = change.clone()
            late.narrow(axis, 0, half).zero_()
            outputs += [_outputs(model, layer, clip + part) for part in (late, change - late)]
    clearest = []
    for reading in found:
        cells = torch.cat([_stacked(reading, values, 1) for values in outputs])
        clearest.append(_clearness(cells) if len(cells) == len(outputs) else -1.0)
    best = max(range(len(found)), key=clearest.__getitem__)
    told = ", ".join(f"{value:.2f}" for value in clearest)
    given = f"cells whose place in the clip no change of it tells ({told})"
    expected = 'another layer, or grid= and grid_order="thw" or "hwt" for tokens'
    require(clearest[best] > CLEAR, "layer", given, expected)
    return found[best]


def _clearness(cells: Tensor) -> float:
    """Return how clearly a change of a half moves the cells of that half, in the worst of cases.

    ``cells`` (1 + 6·C, K, T', H', W') are those of the clip, and of the clip changed in C ways in
    its late and its early half along t, h and w; the clearest way counts. Both halves are needed:
    cells that answer more strongly than others would seem to be where the change is.
    """
    changed = (cells[1:] - cells[0]).abs().sum(1).unflatten(0, (-1, 3, 2))  # (C, 3, 2, T', H', W')
    clear = torch.ones(len(changed), 3, 2)
    for axis in range(3):
        along = changed[:, axis].movedim(2 + axis, 2).flatten(3).sum(3)  # (C, 2, cells)
        half = along.shape[2] // 2
        early, late = along[:, :, :half].sum(2), along[:, :, along.shape[2] - half :].sum(2)
        if half:
            clear[:, axis] = (late - early) / (late + early).clamp(min=1e-30)
    clear[:, :, 1] *= -1  # there the early half was changed
    clear[:, [axis for axis in range(3) if cells.shape[2 + axis] == 1]] = 1
    return float(clear.amin((1, 2)).max())


def _check_parts(model, layer, clip: Tensor, calls: int) -> None:
    """Refuse calls that are no parts of the clip, in turn: the last frames move the last alone."""
    other, part = clip.clone(), clip.shape[2] // calls
    other[:, :, -part:] += 3 * float(clip.std()) or 1.0
    pairs = zip(_outputs(model, layer, clip), _outputs(model, layer, other), strict=True)
    moved = [not torch.equal(*pair) for pair in pairs]
    given = f"{calls} outputs, of which a change of the last {part} frames moves {sum(moved)}"
    alone = moved == [False] * (calls - 1) + [True]
    require(alone, "layer", given, "one that runs once, or once for each part of the clip in turn")


def _check_batch(model, layer, clips: Tensor, reading: Reading, kept: list[Tensor]) -> None:
    """Refuse frames of several clips that are folded in another order than clip by clip."""
    together = _stacked(reading, kept, len(clips))[0].detach().float()
    alone = _stacked(reading, _outputs(model, layer, clips[:1]), 1)[0]
    same = (together - alone).abs().max() <= 0.05 * alone.abs().max()
    given = "frames of several clips in another order than clip by clip"
    require(bool(same), "layer", given, "batch_size=1, or frames folded as (N, T)")
