"""Attributions from the gradient of Φ_c (paper §V-B, Eqs. 22-26)."""

import torch
from torch import Tensor, nn

from stepkit.models import probability


def input_gradient(model: nn.Module, clips: Tensor, targets: Tensor) -> Tensor:
    """Return ∂Φ_c/∂X, (N, 3, T, H, W)."""
    clips = clips.detach().requires_grad_()
    with torch.enable_grad():
        phi = probability(model(clips), targets)
        (slope,) = torch.autograd.grad(phi.sum(), clips)
    return slope


def gradient(model: nn.Module, clips: Tensor, targets: Tensor, *, seeds) -> Tensor:
    """Gradient / saliency (Eq. 22): |∂Φ_c/∂X|, averaged over RGB; (N, T, H, W).

    The paper prints the derivative only; the absolute value and the mean are the released code's.
    """
    return input_gradient(model, clips, targets).abs().mean(1)
