"""Where a layer's cells lie in the clip: (N, K, T', H', W') of whatever a layer puts out.

Networks fold frames into the batch, put channels last, flatten space and time into tokens, or run a
layer once for every frame. Shapes alone do not tell all of these apart: TimeSformer's tokens lie
(h, w, t), VideoMAE's (t, h, w). Where more than one reading fits, parts of a clip are changed, and
the reading is taken by which the cells *there* change; if none is, there is an error and no map.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from stepkit._checks import one_of, require
from stepkit.models import find_layer

LAYOUTS = (  # the axes that lie behind each axis of an output; with three of them, it is of tokens
    *("n k t h w", "n t h w k", "nt k h w", "nt h w k"),
    *("n thw k", "n hwt k", "nt hw k", "nhw t k"),
)
CLEAR = 0.05  # (late − early)/(late + early) of what a change of the late half changes, at least


@dataclass(frozen=True)
class Reading:
    """A layout, and how many cells there are (T', H', W')."""

    layout: str
    cells: tuple[int, int, int]

    def lengths(self, n: int) -> list[int | None]:
        """Return how long the axes of an output for n clips are; None: any length."""
        of = dict(zip("nthw", (n, *self.cells), strict=True))
        groups = self.layout.split()
        return [None if group == "k" else math.prod(of[axis] for axis in group) for group in groups]

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Tell whether an output has this shape; a token more in each row is a class token."""
        pairs = zip(self.lengths(n), shape, strict=False)
        spare = [0, len(shape) == 3, 0, 0, 0]
        return all(
            w is None or length - w in (0, more)
            for (w, length), more in zip(pairs, spare, strict=False)
        )

    def order(self) -> str:
        """Return the axes as they follow each other, but for those of a single cell."""
        single = {axis for axis, cells in zip("thw", self.cells, strict=True) if cells == 1}
        return "".join(axis for axis in self.layout if axis not in {" ", *single})

    def __call__(self, outputs: Iterable[Tensor], n: int) -> Tensor:
        """Stack the outputs of a layer's calls in time, (n, K, T', H', W')."""
        axes = self.layout.replace(" ", "")
        of = dict(zip("nthwk", (n, *self.cells, -1), strict=True))
        placed = []
        for x in outputs:
            x = x[:, x.shape[1] - self.lengths(n)[1] :] if x.ndim == 3 else x  # no class token
            x = x.reshape([of[axis] for axis in axes])
            placed.append(x.permute([axes.index(axis) for axis in "nkthw"]))
        return torch.cat(placed, 2)


# ------------------------------------------------------------------------ what a layer puts out


@dataclass
class LayerRecord:
    """What a layer puts out, call by call; and the grids of the convolutions that run."""

    kept: list[Tensor] = field(default_factory=list)  # of a tuple, the first
    grids: set[tuple[int, ...]] = field(default_factory=set)


@contextlib.contextmanager
def record_layer(model: nn.Module, n: int, layer: str | None = None):
    """Watch a layer (see `stepkit.models.find_layer`) while n clips pass; yields a `LayerRecord`.

    Gradients, if on, begin at what is kept.
    """
    seen, thread = LayerRecord(), threading.get_ident()

    def look(do, _, __, output):
        if thread == threading.get_ident():  # others may explain the same model at the same time
            return do(output)

    def note(output):
        steps = output.shape[2:-2] if output.ndim == 5 else (len(output) // n,)
        seen.grids.add((*steps, *output.shape[-2:]))  # an embedding of patches tells how tokens lie

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    with contextlib.ExitStack() as hooks:
        for module in convolutions:
            hooks.enter_context(module.register_forward_hook(partial(look, note)))
        keep = partial(look, partial(_keep, seen.kept))
        hooks.enter_context(find_layer(model, layer).register_forward_hook(keep))
        yield seen


def _keep(kept: list[Tensor], output):
    """Keep an output; the network goes on with a copy, which it may change in place."""
    several = isinstance(output, tuple) and len(output) > 0
    first = output[0] if several else output
    given = f"{type(first).__name__}, first in what it puts out"
    require(isinstance(first, Tensor), "layer", given, "a layer of tensors")
    with torch._C.DisableTorchFunction():  # rules of relevance begin behind it
        if kept and first.requires_grad:
            asked = {"allow_unused": True, "retain_graph": True}
            again = any(s is not None for s in torch.autograd.grad(first.sum(), kept, **asked))
            given, expected = "one that runs again on what it gave before", "one that runs once"
            require(not again, "layer", given, f"{expected}, or once for each part of a clip")
        kept.append(first.detach().requires_grad_(torch.is_grad_enabled()))
        first = kept[-1].clone()
    made = getattr(output, "_make", tuple)  # a named tuple stays one
    return made((first, *output[1:])) if several else first


# --------------------------------------------------------------------------- how it may be read


def reader(
    model: nn.Module,
    layer: str | None,
    clips: Tensor,
    seen: LayerRecord,
    grid=None,
    grid_order=None,
) -> Callable[[Iterable[Tensor]], Tensor]:
    """Return what brings the layer's outputs for ``clips``, or their gradients, to their place.

    That function takes a tensor for each call of the layer, in the order of ``seen.kept``, and
    returns (N, K, T', H', W'); calls are stacked in time.

    Raises
    ------
    ValueError
        No reading fits; or more than one does, and no change of the clip tells which.
    """
    require(len(seen.kept) > 0, "layer", "one that did not run", "a layer in use, of tensors")
    n, calls, (frames, *space) = len(clips), len(seen.kept), clips.shape[2:]
    shapes = {tuple(values.shape) for values in seen.kept}
    given = f"{calls} outputs {sorted(shapes)} of {frames} frames"
    equal = len(shapes) == 1 and frames % calls == 0
    require(equal, "layer", given, "one output, or as many equal ones as the clip has parts")
    shape, size = shapes.pop(), (frames // calls, *space)
    found = readings(shape, n, size, grid, seen.grids, grid_order, calls)
    if calls > 1:
        _check_parts(model, layer, clips[:1], calls)
    channels_first = found[0].layout.endswith("h w")  # as convolutions have it: no need to measure
    told = len(found) == 1 and (grid is not None or channels_first)
    reading = found[0] if told and calls == 1 else _confirmed(model, layer, clips[:1], found)
    if n > 1 and (n in shape[1:2] or (len(shape) < 5 and shape[0] > n)):
        _check_batch(model, layer, clips, reading, seen.kept)
    return partial(reading, n=n)


def readings(shape, n: int, size, grid=None, seen=(), order=None, calls: int = 1) -> list[Reading]:
    """List the ways to read an output of ``shape`` for n clips of ``size`` (T, H, W).

    ``grid`` (T', H', W'), of all calls, and ``order`` of tokens are what the user says of them;
    ``seen`` the grids of convolutions that ran.
    """
    shape, tokens = tuple(shape), len(shape) == 3
    whole = grid is None or (len(grid) == 3 and all(isinstance(i, int) and i > 0 for i in grid))
    require(whole, "grid", grid, "three numbers (T', H', W')")
    one_of("grid_order", order, (None, "thw", "hwt"))
    layouts = [layout for layout in LAYOUTS if len(layout.split()) == len(shape)]
    if tokens and order:
        layouts = [layout for layout in layouts if order in layout.replace(" ", "")]
    expected = "(N, K, T, H, W), (N, T, H, W, K), (N·T, K, H, W) or tokens (N, L, K)"
    fits = bool(layouts) and shape[0] % n == 0 and (len(shape) < 5 or shape[0] == n)
    require(fits, "layer", f"output {shape}", expected)

    def that_fit(grids) -> list[Reading]:
        fit = [r for cells in grids for lay in layouts if (r := Reading(lay, cells)).fits(shape, n)]
        return [*{(r.cells, r.order()): r for r in reversed(fit)}.values()][::-1]

    even = _even_grids(size, tokens)
    if grid is not None:
        stages = [[(max(1, grid[0] // calls), *grid[1:])]]
    elif tokens:
        stages = [sorted(seen), sorted(even)]
    else:
        steps = shape[0] // n
        folded = [(steps, *shape[2:]), (steps, *shape[1:3])]
        own = folded if len(shape) == 4 else [shape[2:], shape[1:4]]
        stages = [[cells for cells in own if cells in even], own]
    for grids in stages:
        found = that_fit(grids)
        told = sorted({reading.cells for reading in found})
        if len(told) == 1 or (told and not tokens):
            return found
    require(grid is None, "grid", grid, f"cells (T', H', W') of an output {shape}")
    candidates = " or ".join(map(str, told)) or "no even division of the clip"
    given, expected = f"{shape[1]} tokens, {candidates}", "another layer or grid=(T', H', W')"
    raise ValueError(f"layer: got {given}, expected {expected}")


def _even_grids(size, tokens: bool) -> set[tuple[int, int, int]]:
    """Return the cells (T', H', W') that strides of 1, 2, ... leave, rounded down or up."""
    frames, height, width = size
    down = {(height // s, width // s) for s in range(1, min(height, width) + 1)}
    up = {(-(-height // s), -(-width // s)) for s in range(1, max(height, width) + 1)}
    times = {frames // s for s in range(1, frames + 1) if frames % s == 0 or not tokens}
    times |= set() if tokens else {-(-frames // s) for s in range(1, frames + 1)}
    return {(t, *cells) for t in times for cells in down | up}


# ------------------------------------------------------------------------------ which one is right


@torch.no_grad()
def _outputs(model, layer: str | None, clips: Tensor) -> list[Tensor]:
    with record_layer(model, len(clips), layer) as seen:
        model(clips)
    return [values.float() for values in seen.kept]


def _confirmed(model, layer, clip: Tensor, found: list[Reading]) -> Reading:
    """Return the reading by which a change in one half of the clip moves the cells of that half.

    The half becomes brighter, or noise, as a network may be blind to one of them. Both halves are
    needed: cells that answer more strongly than others would seem to be where the change is.
    """
    size = 3 * float(clip.std()) or 1.0
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0)).to(clip)
    before, clear = _outputs(model, layer, clip), torch.ones(2, 3, 2, len(found))
    for way, change in enumerate((size * torch.ones_like(clip), size * noise)):
        for axis in (0, 1, 2):
            late = change.clone()
            late.narrow(2 + axis, 0, clip.shape[2 + axis] // 2).zero_()
            for side, part in enumerate((late, change - late)):
                after = _outputs(model, layer, clip + part)  # one by one: some take no more
                moved = [(a - b).abs() for a, b in zip(after, before, strict=True)]
                leans = [_lean(reading, moved, axis, (1, -1)[side]) for reading in found]
                clear[way, axis, side] = torch.tensor(leans)
    clearest = clear.amin((1, 2)).amax(0)  # the clearest way, in the worst of cases
    told = ", ".join(f"{value:.2f}" for value in clearest)
    given = f"cells whose place in the clip no change of it tells ({told})"
    expected = 'another layer, or grid= and grid_order="thw" or "hwt" for tokens'
    require(clearest.max() > CLEAR, "layer", given, expected)
    return found[int(clearest.argmax())]


def _lean(reading: Reading, moved: list[Tensor], axis: int, sign: int) -> float:
    """Return (late − early)/(late + early) of what moved in the halves of an axis of cells."""
    if not reading.fits(moved[0].shape, 1):
        return -1.0
    cells = reading(moved, 1).transpose(0, 2 + axis).flatten(1).sum(1)
    half = len(cells) // 2
    early, late = cells[:half].sum(), cells[len(cells) - half :].sum()
    return sign * float((late - early) / (late + early).clamp(min=1e-30)) if half else 1.0


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
    together = reading(kept, len(clips))[0].detach().float()
    alone = reading(_outputs(model, layer, clips[:1]), 1)[0]
    same = (together - alone).abs().max() <= 0.05 * alone.abs().max()
    given = "frames of several clips in another order than clip by clip"
    require(bool(same), "layer", given, "batch_size=1, or frames folded as (N, T)")
