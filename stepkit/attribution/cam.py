"""Attributions from a layer's activations: the CAM family (paper §V-B, Eq. 28; Table I).

All of them are Σ_k w_k·A_k over the channels A_k of one layer, in convolutional networks and in
video transformers alike; they differ in the weights. The score is the class's logit. Maps are
up-sampled bilinearly in space and by repetition in time.
"""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepkit.checks import require
from stepkit.models import find_layer


def cam(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    *,
    layer: str | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """CAM, class activation mapping (Zhou 2016); (N, T, H, W).

    Σ_k w_k·A_k, where w is the class's row of a linear classifier that reads the average of the
    layer over time and space. No ReLU, no bias, as in its paper. The average over time is part of
    the network here, so one weight per channel is all that there is.

    Parameters
    ----------
    layer, grid
        As for `grad_cam`.

    Raises
    ------
    ValueError
        No linear layer (or 1×1×1 convolution) on the average of ``layer`` gives the logits.
    """
    with torch.no_grad(), _observed(model, clips, layer) as (kept, seen):
        logits = model(clips)
    activation = _arranged(kept, clips, grid, seen)
    pooled = activation.mean((2, 3, 4))
    for weight, bias in _linear_maps(model, pooled.shape[1], logits.shape[1]):
        again = F.linear(pooled, weight)
        rounding = (1e-3 if kept[-1].dtype == again.dtype else 2e-2) * float(again.abs().max())
        again = again if bias is None else again + bias
        if torch.allclose(again, logits, rtol=0, atol=rounding):
            found = torch.einsum("nk,nkthw->nthw", weight[targets], activation)
            return upsample(found, clips.shape[2:])
    raise ValueError(
        "cam: needs a network that ends, after its layer, in an average over time and space and "
        "one linear classifier; none gives this model's logits (grad_cam works for any)"
    )


def grad_cam(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    *,
    layer: str | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """Grad-CAM with one weight per channel and time step (Eq. 28); (N, T, H, W).

    ReLU(Σ_k α_k(t)·A_k(t)), where α_k(t) is ∂logit_c/∂A_k averaged over space at time t. Elsewhere
    the gradient is averaged over time as well; the two agree where the layer has one time step.
    Up-sampled bilinearly in space and by repetition in time. Selvaraju 2017.

    Parameters
    ----------
    layer : str, optional
        Name of a layer; see `stepkit.models.find_layer` for the default. Its output may be
        (N, K, T', H', W'), (N, T', H', W', K), (N·T', K, H', W') in a network that works frame by
        frame, or tokens (N, L, K) with or without a class token in front.
    grid : (T', H', W'), optional
        How tokens lie in the clip, for a layer where that cannot be told.
    """
    activation, slope = _activation_and_slope(model, clips, targets, layer, grid)
    found = (slope.mean((3, 4), keepdim=True) * activation).sum(1).relu()
    return upsample(found, clips.shape[2:])


def grad_cam_pp(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    *,
    layer: str | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """Grad-CAM++ with one weight per channel and time step (Chattopadhay 2018); (N, T, H, W).

    ReLU(Σ_k w_k(t)·A_k(t)) with w_k = Σ_ij α_ij·ReLU(g_ij) and α_ij = g²/(2g² + g³·Σ_ab A_ab), g
    the gradient ∂logit_c/∂A_k; sums over space at time t, where elsewhere they run over time as
    well. Its score is exp(logit_c): what that adds is one positive factor per clip, exp(logit_c)
    itself, which is left out. The weight is for layers behind a ReLU (A ≥ 0).

    Parameters
    ----------
    layer, grid
        As for `grad_cam`.
    """
    activation, slope = _activation_and_slope(model, clips, targets, layer, grid)
    # α with g² cancelled, which would underflow; where g is 0 so is its term of the sum
    below = 2 + slope * activation.sum((3, 4), keepdim=True)
    alpha = torch.where(below == 0, 0, 1 / below)
    weight = (alpha * slope.relu()).sum((3, 4), keepdim=True)
    return upsample((weight * activation).sum(1).relu(), clips.shape[2:])


@torch.no_grad()
def score_cam(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    *,
    layer: str | None = None,
    grid: tuple[int, int, int] | None = None,
    batch_size: int,
    bar,
) -> Tensor:
    """Score-CAM: channels as masks, no gradient (Wang 2020); (N, T, H, W).

    ReLU(Σ_k w_k·A_k), w = softmax over channels of the score of X⊙s(U(A_k)): the clip, multiplied
    in normalised space (so it fades to the mean colour) by the up-sampled channel that s brings to
    [0, 1] over the whole clip. The score is the logit, as its paper's algorithm has it; what it
    subtracts, the score of a baseline, cancels in the softmax. One weight per channel for all time
    steps, for a mask spans the clip. A constant channel marks no place and gets no weight.

    Costs one forward pass per channel: 512 for R(2+1)D-18, 1024 for R50L.

    Parameters
    ----------
    layer, grid
        As for `grad_cam`.
    """
    with _observed(model, clips, layer) as (kept, seen):
        model(clips)
    activation = _arranged(kept, clips, grid, seen)
    n, channels = activation.shape[:2]
    scores = activation.new_empty(n * channels)
    for start in bar(range(0, n * channels, batch_size), desc="Score-CAM"):
        pair = torch.arange(start, min(start + batch_size, n * channels), device=clips.device)
        clip, channel = pair // channels, pair % channels
        mask = upsample(activation[clip, channel], clips.shape[2:])  # (B, T, H, W)
        low, high = mask.amin((1, 2, 3)), mask.amax((1, 2, 3))
        span = torch.where(high > low, high - low, 1)[:, None, None, None]
        shown = (mask - low[:, None, None, None]) / span
        logits = model(clips[clip] * shown[:, None])
        score = logits.gather(1, targets[clip, None])[:, 0]
        scores[pair] = score.masked_fill(high == low, -math.inf)
    weight = scores.view(n, channels).softmax(1).nan_to_num()  # NaN: every channel is constant
    found = torch.einsum("nk,nkthw->nthw", weight, activation).relu()
    return upsample(found, clips.shape[2:])


def upsample(maps: Tensor, size) -> Tensor:
    """Up-sample maps (N, t, h, w) to ``size`` (T, H, W): repeated in time, bilinear in space."""
    maps = F.interpolate(maps, size[1:], mode="bilinear", align_corners=False)
    return maps[:, torch.arange(size[0], device=maps.device) * maps.shape[1] // size[0]]


@contextlib.contextmanager
def captured(layer: nn.Module):
    """Collect what ``layer`` puts out while the context lasts; of a tuple, the first.

    The network goes on with a copy, so that in-place operations behind the layer do not spoil what
    was collected. Where gradients are on, they begin here: what lies before is not recorded.
    """
    kept = []

    def keep(_, __, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor):
            return output
        kept.append(first.detach().requires_grad_(torch.is_grad_enabled()))
        first = kept[-1]
        return (first.clone(), *rest) if isinstance(output, tuple) else first.clone()

    handle = layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def in_time(activation: Tensor, n: int, size, grid=None, seen=()) -> Tensor:
    """Return a layer's output for n clips of ``size`` (T, H, W) as (N, K, T', H', W').

    Undoes frames folded into the batch, channels put last and space-time flattened to tokens. How
    tokens lie is told from their number: it is that of a grid in ``seen``, those of the
    convolutions that ran (an embedding of patches, say), or else of an even division of the clip.
    """
    shape = tuple(activation.shape)
    expected = "(N, K, T, H, W), (N, T, H, W, K), (N·T, K, H, W) or tokens (N, L, K)"
    fits = activation.ndim in (3, 4, 5) and shape[0] % n == 0
    require(fits and (activation.ndim < 5 or shape[0] == n), "layer", f"output {shape}", expected)
    whole = grid is None or (len(grid) == 3 and all(isinstance(i, int) and i > 0 for i in grid))
    require(whole, "grid", grid, "three numbers (T', H', W')")
    if activation.ndim == 3:
        return _from_tokens(activation, n, size, grid, seen)
    if activation.ndim == 4:  # frames were folded into the batch
        activation = activation.unflatten(0, (n, -1)).transpose(1, 2)
        last = (activation.shape[2], activation.shape[1], activation.shape[3])
    else:
        last = shape[1:4]
    first = tuple(activation.shape[2:])
    if grid is None:
        even = _frame_grids(*size[1:])
        turn = first[1:] not in even and last[1:] in even and last[0] <= size[0]
    else:
        turn = first != tuple(grid)
        require(not turn or last == tuple(grid), "grid", grid, f"{first} or {last}, of the layer")
    if not turn:
        return activation
    return activation.permute(0, 4, 2, 1, 3) if len(shape) == 4 else activation.movedim(-1, 1)


def _from_tokens(tokens: Tensor, n: int, size, grid, seen) -> Tensor:
    """Return tokens (N, L, K), or (N·T', L, K) of single frames, as (N, K, T', H', W')."""
    length, steps = tokens.shape[1], len(tokens) // n
    if steps > 1:  # each frame has tokens of its own
        size, seen = (1, *size[1:]), {(1, *cells[1:]) for cells in seen}
        grid = None if grid is None else (grid[0] // steps, *grid[1:])
    if grid is None:
        grid = _token_grid(length, size, seen)
    fits = len(grid) == 3 and math.prod(grid) in (length, length - 1)
    require(fits, "grid", grid, f"(T', H', W') for {length} tokens, or one less: a class token")
    cells = tokens[:, length - math.prod(grid) :].unflatten(1, grid).unflatten(0, (n, steps))
    return cells.flatten(1, 2).movedim(-1, 1)


def _token_grid(length: int, size, seen) -> tuple[int, int, int]:
    """Return the one grid (T', H', W') of so many tokens, or of one less (a class token)."""
    times = [t for t in range(1, size[0] + 1) if size[0] % t == 0]
    even = {(t, *cells) for t in times for cells in _frame_grids(*size[1:])}
    for known in (seen, even):
        found = sorted(cells for cells in known if math.prod(cells) in (length, length - 1))
        if len(found) == 1:
            return found[0]
    candidates = " or ".join(map(str, found)) or "no even division of the clip"
    raise ValueError(
        f"layer: got {length} tokens, {candidates}, expected another layer or grid=(T', H', W')"
    )


def _frame_grids(height: int, width: int) -> set[tuple[int, int]]:
    """Return the cells (H', W') that strides of 1, 2, ... pixels leave, rounded down or up."""
    down = {(height // s, width // s) for s in range(1, min(height, width) + 1)}
    return down | {(-(-height // s), -(-width // s)) for s in range(1, max(height, width) + 1)}


@contextlib.contextmanager
def _observed(model: nn.Module, clips: Tensor, layer: str | None):
    """Collect the layer's outputs, and the grids (T', H', W') of all convolutions that run."""
    seen, handles = set(), []

    def note(_, __, output):
        steps = output.shape[2:-2] if output.ndim == 5 else (len(output) // len(clips),)
        seen.add((*steps, *output.shape[-2:]))

    with captured(find_layer(model, layer)) as kept:
        try:
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Conv3d):
                    handles.append(module.register_forward_hook(note))
            yield kept, seen
        finally:
            for handle in handles:
                handle.remove()


def _at_least_float32(values: Tensor) -> Tensor:
    """Sums over a clip lose too much in bfloat16, in which a prepared model may compute."""
    return values.float() if values.dtype.itemsize < 4 else values


def _arranged(kept: list[Tensor], clips: Tensor, grid, seen) -> Tensor:
    require(len(kept) > 0, "layer", "one that did not run", "a layer in use that returns a tensor")
    return in_time(_at_least_float32(kept[-1].detach()), len(clips), clips.shape[2:], grid, seen)


def _activation_and_slope(model, clips: Tensor, targets: Tensor, layer, grid):
    """Return a layer's activation A and ∂logit_c/∂A, both (N, K, T', H', W')."""
    with _observed(model, clips, layer) as (kept, seen), torch.enable_grad():
        logits = model(clips.detach())
        score = logits.gather(1, targets[:, None]).sum()
        activation = _arranged(kept, clips, grid, seen)
        reached = score.requires_grad
        slope = torch.autograd.grad(score, kept[-1], allow_unused=True)[0] if reached else None
    require(slope is not None, "layer", "one that the logits do not depend on", "another layer")
    arranged = in_time(_at_least_float32(slope), len(clips), clips.shape[2:], grid, seen)
    # behind the last attention of a classifier that reads the class token, all others are idle
    only_class = slope.ndim == 3 and bool(slope.any()) and not bool(arranged.any())
    require(
        not only_class, "layer", "tokens of which only the class token counts", "an earlier one"
    )
    return activation, arranged


def _linear_maps(model: nn.Module, inputs: int, outputs: int):
    """Yield weight (outputs, inputs) and bias of the linear layers that fit."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            weight = module.weight
            if weight.shape[:2] == (outputs, inputs) and weight[0, 0].numel() == 1:
                yield _at_least_float32(weight.flatten(1)), module.bias
