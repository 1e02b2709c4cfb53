"""Attributions from a layer's activations (paper §V-B, Eq. 28)."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepkit.checks import require
from stepkit.models import find_layer


def grad_cam(
    model: nn.Module, clips: Tensor, targets: Tensor, *, seeds, layer: str | None = None
) -> Tensor:
    """Grad-CAM with one weight per channel and time step (Eq. 28); (N, T, H, W).

    ReLU(Σ_k α_k(t)·A_k(t)), where α_k(t) is ∂logit_c/∂A_k averaged over space at time t. Elsewhere
    the gradient is averaged over time as well; the two agree where the layer has one time step.
    Up-sampled bilinearly in space and by repetition in time.

    Parameters
    ----------
    layer : str, optional
        Name of a layer with output (N, K, T', H', W'), or (N·T, K, H', W') in a network that works
        frame by frame; see `stepkit.models.find_layer` for the default.
    """
    with captured(find_layer(model, layer)) as kept, torch.enable_grad():
        logits = model(clips.detach().requires_grad_())
        score = logits.gather(1, targets[:, None]).sum()
        require(len(kept) > 0, "layer", f"{layer!r}, which did not run", "a layer in use")
        (slope,) = torch.autograd.grad(score, kept[-1])
    activation, slope = (in_time(x, len(clips)) for x in (kept[-1].detach(), slope))
    cam = (slope.mean((3, 4), keepdim=True) * activation).sum(1).relu()
    return upsample(cam, clips.shape[2:])


@contextlib.contextmanager
def captured(layer: nn.Module):
    """Collect what ``layer`` puts out while the context lasts.

    The network goes on with a copy, so that in-place operations behind the layer do not spoil what
    was collected.
    """
    kept = []

    def keep(_, __, output):
        kept.append(output)
        return output.clone() if isinstance(output, Tensor) else output

    handle = layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def in_time(activation: Tensor, n: int) -> Tensor:
    """Return a layer's output as (N, K, T', H', W'), also if frames were folded into the batch."""
    shape = tuple(activation.shape)
    if activation.ndim == 4 and len(activation) % n == 0:
        return activation.unflatten(0, (n, -1)).transpose(1, 2)
    expected = "(N, K, T, H, W) or (N·T, K, H, W)"
    require(activation.ndim == 5 and shape[0] == n, "layer", f"output {shape}", expected)
    return activation


def upsample(maps: Tensor, size) -> Tensor:
    """Up-sample maps (N, t, h, w) to ``size`` (T, H, W): repeated in time, bilinear in space."""
    maps = F.interpolate(maps, size[1:], mode="bilinear", align_corners=False)
    return maps[:, torch.arange(size[0], device=maps.device) * maps.shape[1] // size[0]]
