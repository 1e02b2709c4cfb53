"""Attributions from a layer's activations: the CAM family (paper §V-B, Eq. 28; Table I).

All of them are Σ_k w_k·A_k over the channels A_k of one layer, in convolutional networks and in
video transformers alike; they differ in the weights. The score is the class's logit. Maps are
up-sampled bilinearly in space and by repetition in time.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepkit._checks import require
from stepkit.attribution._cells import reader, record_layer
from stepkit.attribution._methods import method
from stepkit.attribution.occlusion import masked_scores
from stepkit.removal import fade

__all__ = ["cam", "grad_cam", "grad_cam_pp", "score_cam", "upsample"]

_method = partial(
    method, family="activation", reads_layers=True, resolution="cell and step of the layer"
)


@_method("cam", order=13, label="CAM", source="Zhou 2016")
def cam(model, clips, targets, work, *, layer=None, grid=None, grid_order=None) -> Tensor:
    """CAM, class activation mapping (Zhou 2016); (N, T, H, W).

    Σ_k w_k·A_k, where w is the class's row of a linear classifier that reads the average of the
    layer over time and space. No ReLU, no bias, as in its paper. The average over time is part of
    the network here, so one weight per channel is all that there is.

    Parameters
    ----------
    layer, grid, grid_order
        As for `grad_cam`.

    Raises
    ------
    ValueError
        No linear layer (or 1×1×1 convolution) on the average of ``layer`` gives the logits.
    """
    score = work.score
    require(score.one_logit, "score", score.name, "the score of a class, for CAM's classifier")
    activation, logits, _ = _activation(model, clips, targets, work, layer, grid, grid_order)
    require(logits.ndim == 2, "model", f"output {tuple(logits.shape)}", "logits (N, K), for CAM")
    pooled = activation.mean((2, 3, 4))
    exact = all(values.dtype.itemsize >= 4 for values in model.parameters())
    for weight, bias in _linear_maps(model, pooled.shape[1], logits.shape[1]):
        again = F.linear(pooled, weight)
        rounding = (1e-3 if exact else 2e-2) * float(again.abs().max())
        again = again if bias is None else again + bias
        if torch.allclose(again, logits, rtol=0, atol=rounding):
            found = torch.einsum("nk,nkthw->nthw", weight[targets], activation)
            return upsample(found, clips.shape[2:])
    raise ValueError(
        "cam: needs a network that ends, after its layer, in an average over time and space and "
        "one linear classifier; none gives this model's logits (grad_cam works for any)"
    )


@_method(
    "grad_cam", order=14, label="Grad-CAM", source="Eq. 28; Selvaraju 2017", needs_gradient=True
)
def grad_cam(model, clips, targets, work, *, layer=None, grid=None, grid_order=None) -> Tensor:
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
        A layer that runs once for every part of the clip, as in a loop over frames, is stacked in
        time.
        It has to see the whole clip: cells of a crop are stretched over all of it. An output
        (N, T', K, H', W') is not told from (N, K, T', H', W') if K may be a number of steps.
    grid : (T', H', W'), optional
        How many cells there are along each axis, for a layer where that cannot be told. A token
        more than these is a class token, in front.
    grid_order : str, optional
        Of tokens, the last axis fastest: ``"thw"`` (VideoMAE, ViViT, MViT) or ``"hwt"``
        (TimeSformer). By default it is found out by changing halves of a clip
        (`stepkit.attribution._cells`).
    """
    activation, _, slope = _activation(model, clips, targets, work, layer, grid, grid_order)
    slope = slope()
    found = (slope.mean((3, 4), keepdim=True) * activation).sum(1).relu()
    return upsample(found, clips.shape[2:])


@_method(
    "grad_cam_pp", order=15, label="Grad-CAM++", source="Chattopadhay 2018", needs_gradient=True
)
def grad_cam_pp(model, clips, targets, work, *, layer=None, grid=None, grid_order=None) -> Tensor:
    """Grad-CAM++ with one weight per channel and time step (Chattopadhay 2018); (N, T, H, W).

    ReLU(Σ_k w_k(t)·A_k(t)) with w_k = Σ_ij α_ij·ReLU(g_ij) and α_ij = g²/(2g² + g³·Σ_ab A_ab), g
    the gradient ∂logit_c/∂A_k; sums over space at time t, where elsewhere they run over time as
    well. Its score is exp(logit_c): what that adds is one positive factor per clip, exp(logit_c)
    itself, which is left out. The weight is for layers behind a ReLU (A ≥ 0).

    Parameters
    ----------
    layer, grid, grid_order
        As for `grad_cam`.
    """
    activation, _, slope = _activation(model, clips, targets, work, layer, grid, grid_order)
    slope = slope()
    # α with g² cancelled, which would underflow; where g is 0 so is its term of the sum
    below = 2 + slope * activation.sum((3, 4), keepdim=True)
    alpha = torch.where(below == 0, 0, 1 / below)
    weight = (alpha * slope.relu()).sum((3, 4), keepdim=True)
    return upsample((weight * activation).sum(1).relu(), clips.shape[2:])


@_method("score_cam", order=16, label="Score-CAM", source="Wang 2020")
@torch.no_grad()
def score_cam(model, clips, targets, work, *, layer=None, grid=None, grid_order=None) -> Tensor:
    """Score-CAM: channels as masks, no gradient (Wang 2020); (N, T, H, W).

    ReLU(Σ_k w_k·A_k), w = softmax over channels of the score of X⊙s(U(A_k)): the clip, multiplied
    in normalised space (so it fades to the mean colour) by the up-sampled channel that s brings to
    [0, 1] over the whole clip. The score is the logit, as its paper's algorithm has it; what it
    subtracts, the score of a baseline, cancels in the softmax. One weight per channel for all time
    steps, for a mask spans the clip. A constant channel marks no place and gets no weight.

    Costs one forward pass per channel: 512 for R(2+1)D-18, 1024 for R50L.

    Parameters
    ----------
    layer, grid, grid_order
        As for `grad_cam`.
    """
    activation, *_ = _activation(model, clips, targets, work, layer, grid, grid_order)
    least = torch.finfo(activation.dtype).tiny

    def masks(channels: Tensor) -> Iterator[Tensor]:
        for part in work.bar(channels.split(work.batch_size), desc="Score-CAM"):
            mask = upsample(part, clips.shape[2:])
            mask = mask - mask.amin((1, 2, 3), keepdim=True)
            yield mask / mask.amax((1, 2, 3), keepdim=True).clamp(min=least)

    scores = []
    for clip, target, channels in zip(clips, targets, activation, strict=True):
        given = masked_scores(model, clip, target, work.score.logit, fade(), masks(channels))
        flat = channels.flatten(1).amax(1) == channels.flatten(1).amin(1)
        scores.append(torch.cat([logit for _, logit in given]).masked_fill(flat, -math.inf))
    weight = torch.stack(scores).softmax(1).nan_to_num()  # NaN: every channel is constant
    found = torch.einsum("nk,nkthw->nthw", weight.to(activation), activation).relu()
    return upsample(found, clips.shape[2:])


def upsample(maps: Tensor, size) -> Tensor:
    """Up-sample maps (N, t, h, w) to ``size`` (T, H, W): repeated in time, bilinear in space."""
    maps = F.interpolate(maps, size[1:], mode="bilinear", align_corners=False)
    return maps[:, torch.arange(size[0], device=maps.device) * maps.shape[1] // size[0]]


def _at_least_float32(values: Tensor) -> Tensor:
    """Sums over a clip lose too much in bfloat16, in which a prepared model may compute."""
    return values.float() if values.dtype.itemsize < 4 else values


def _activation(model, clips: Tensor, targets: Tensor, work, layer, grid, grid_order):
    """Return a layer's activation A (N, K, T', H', W'), what the network put out, and a function.

    That returns ∂logit_c/∂A, as A is arranged.
    """
    with record_layer(model, len(clips), layer) as seen, torch.enable_grad():
        output = model(clips.detach())
        logit = work.score.logit(output, targets).sum()
    placed = reader(model, layer, clips, seen, grid, grid_order)
    activation = placed([_at_least_float32(values.detach()) for values in seen.kept])

    def slope() -> Tensor:
        given = [None]
        if logit.requires_grad:
            given = torch.autograd.grad(logit, seen.kept, allow_unused=True)
        reached = any(each is not None for each in given)
        require(reached, "layer", "one that the score does not depend on", "another layer")
        pairs = zip(seen.kept, given, strict=True)
        given = [torch.zeros_like(kept) if each is None else each for kept, each in pairs]
        found = placed([_at_least_float32(each) for each in given])
        # behind the last attention of a classifier that reads the class token, all others are idle
        idle = given[0].ndim == 3 and bool(given[0].any()) and not bool(found.any())
        of_class = "tokens of which only the class token counts"
        require(not idle, "layer", of_class, "an earlier one")
        return found

    return activation, output, slope


def _linear_maps(model: nn.Module, inputs: int, outputs: int):
    """Yield weight (outputs, inputs) and bias of the linear layers that fit."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            weight = module.weight
            if weight.shape[:2] == (outputs, inputs) and weight[0, 0].numel() == 1:
                yield _at_least_float32(weight.flatten(1)), module.bias
