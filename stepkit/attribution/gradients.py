"""Attributions from the gradient of Φ_c (paper §V-B, Eqs. 22-27).

Methods that average gradients over points (noisy copies, points of a path) share one engine,
`mean_gradient`: it makes the points of a clip chunk by chunk, and keeps nothing but their sum.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from stepkit._checks import in_proportion, one_of, require
from stepkit.attribution._methods import Work, method
from stepkit.models.scores import Score
from stepkit.removal import gaussian_blur, named

__all__ = [
    "blur_ig",
    "blur_path_gradient",
    "gradient",
    "gradient_x_input",
    "input_gradient",
    "integrated_gradients",
    "mean_gradient",
    "path_gradient",
    "smoothgrad",
    "smoothgrad_squared",
]

DIFFERENCE = 0.01  # pixels of blur, for ∂g/∂σ in blur IG; the released code's

_method = partial(method, family="gradient", needs_gradient=True)


def input_gradient(model: nn.Module, clips: Tensor, targets: Tensor, score: Score) -> Tensor:
    """Return ∂Φ_c/∂X, (N, 3, T, H, W)."""
    clips = clips.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(score(model(clips), targets).sum(), clips)
    return slope


def mean_gradient(model, clips, targets, work: Work, points: int, at, squared=False) -> Tensor:
    """Return the mean of weight·∂Φ_c/∂x over the points x of each clip; (N, 3, T, H, W).

    Parameters
    ----------
    points : int
        Points per clip.
    at : callable
        (i, k) -> x, weight: points ``k`` (K,) of clip ``i``, numbered from 1 and asked for in
        order, as (K, 3, T, H, W), with weights that broadcast to them.
    squared : bool
        Square the gradients first.
    """
    total = torch.zeros_like(clips)
    for i, target in enumerate(targets):
        for k in work.bar(torch.arange(1, points + 1).split(work.batch_size), desc="points"):
            x, weight = at(i, k)
            slope = input_gradient(model, x, target.expand(len(k)), work.score)
            total[i] += (weight * (slope.square() if squared else slope)).sum(0)
    return total / points


def path_gradient(model, clips, targets, work: Work, baseline: Tensor, steps, rule="right"):
    """Integrated gradients, signed and per colour: (X − X̄)·mean ∂Φ_c/∂x, (N, 3, T, H, W).

    The points of the straight path are X̄ + k/m·(X − X̄) with k = 1..m, ``rule="right"`` (Eq. 24),
    or k = 0..m−1, ``"left"`` (the released code). The sum approaches Φ_c(X) − Φ_c(X̄).
    """
    one_of("rule", rule, ("right", "left"))
    _check_count("steps", steps)
    way, first = clips - baseline, 0 if rule == "right" else 1

    def at(i, k):
        return baseline[i] + ((k - first) / steps).to(clips).view(-1, 1, 1, 1, 1) * way[i], 1

    return way * mean_gradient(model, clips, targets, work, steps, at)


@_method("gradient", order=1, label="Gradient", source="Eq. 22; Simonyan 2014")
def gradient(model, clips, targets, work) -> Tensor:
    """Gradient / saliency (Eq. 22): |∂Φ_c/∂X|, averaged over RGB; (N, T, H, W).

    The paper prints the derivative only; the absolute value and the mean are the released code's.
    Source: Simonyan 2014.
    """
    return input_gradient(model, clips, targets, work.score).abs().mean(1)


@_method("gradient_x_input", order=4, label="Gradient × Input", source="Eq. 23; Shrikumar 2016")
def gradient_x_input(model, clips, targets, work) -> Tensor:
    """Gradient × input (Eq. 23): |Σ_RGB X ⊙ ∂Φ_c/∂X|; (N, T, H, W).

    X is what the network takes, the normalised clip. The sum and the absolute value are the
    released code's. Source: Shrikumar 2016.
    """
    return (clips * input_gradient(model, clips, targets, work.score)).sum(1).abs()


@_method(
    "integrated_gradients",
    order=2,
    label="Integrated Gradients",
    source="Eq. 24; Sundararajan 2017",
)
def integrated_gradients(
    model, clips, targets, work, *, steps=50, rule="right", baseline="black"
) -> Tensor:
    """Integrated gradients (Eq. 24), absolute and averaged over RGB; (N, T, H, W).

    Parameters
    ----------
    steps : int
        m, points of the path. Printed: 50; released: 25.
    rule : str
        ``"right"``: k = 1..m as printed. ``"left"``: k = 0..m−1 as released.
    baseline : Removal or str
        X̄ is its bottom rung: black pixels, printed and released.

    Source: Sundararajan 2017. Absolute value and mean are the released code's.
    """
    nothing = named(baseline).nothing(clips)
    return path_gradient(model, clips, targets, work, nothing, steps, rule).abs().mean(1)


@_method("smoothgrad", order=3, label="SmoothGrad", source="Eq. 25; Smilkov 2017")
def smoothgrad(model, clips, targets, work, *, samples=50, noise=0.15) -> Tensor:
    """SmoothGrad (Eq. 25): |mean gradient at noisy copies|, summed over RGB; (N, T, H, W).

    Parameters
    ----------
    samples : int
        n, noisy copies. Printed: 50; released: 25.
    noise : float
        σ as a share of the clip's range, max − min. Not printed; the released code's.

    Source: Smilkov 2017. Absolute value and sum are the released code's.
    """
    return _noisy(model, clips, targets, work, samples, noise).abs().sum(1)


@_method("smoothgrad_squared", order=10, label="SmoothGrad-Squared", source="Eq. 26; Hooker 2019")
def smoothgrad_squared(model, clips, targets, work, *, samples=50, noise=0.15) -> Tensor:
    """SmoothGrad-Squared (Eq. 26): mean squared gradient, summed over RGB; (N, T, H, W).

    Options as for `smoothgrad`. Source: Hooker 2019.
    """
    return _noisy(model, clips, targets, work, samples, noise, squared=True).sum(1)


@_method("blur_ig", order=12, label="Blur IG", source="Eq. 27; Xu 2020")
def blur_ig(model, clips, targets, work, *, steps=50, sigma_max=None) -> Tensor:
    """Blur integrated gradients (Eq. 27), absolute and averaged over RGB; (N, T, H, W).

    The path runs from the clip into its blur: σ_k = (k−1)·σ_max/m, each frame blurred alone, zeros
    beyond the border. ∂g/∂σ is the difference over 0.01 px, as released. All blurs of the path are
    truncated at ⌈4·σ_max⌉, so that nothing but σ changes along it.

    Parameters
    ----------
    steps : int
        m. Printed: 50; released: 25.
    sigma_max : float, optional
        Strongest blur in pixels; by default the printed 50 px at 112, in proportion to the frame's
        shorter side.

    Source: Xu 2020. Absolute value and mean are the released code's.
    """
    return blur_path_gradient(model, clips, targets, work, steps, sigma_max).abs().mean(1)


def blur_path_gradient(
    model, clips, targets, work: Work, steps: int, sigma_max: float | None = None
) -> Tensor:
    """Eq. 27, signed and per colour, (N, 3, T, H, W); its sum approaches Φ_c(blurred) − Φ_c(X)."""
    _check_count("steps", steps)
    strongest = in_proportion(50, clips.shape) if sigma_max is None else sigma_max
    require(strongest > 0, "sigma_max", sigma_max, "a positive number of pixels")
    reach = math.ceil(4 * strongest)

    def at(i, k):
        sigmas = [(number - 1) * strongest / steps for number in k.tolist()]
        x, more = (
            torch.stack([gaussian_blur(clips[i], sigma + d, reach=reach) for sigma in sigmas])
            for d in (0, DIFFERENCE)
        )
        return x, (more - x) / DIFFERENCE

    return strongest * mean_gradient(model, clips, targets, work, steps, at)


def _noisy(model, clips, targets, work: Work, samples, noise, squared=False) -> Tensor:
    """Return the mean gradient (or its square) at noisy copies of each clip."""
    _check_count("samples", samples)
    require(noise >= 0, "noise", noise, "at least 0")
    draws = [torch.Generator(clips.device).manual_seed(seed) for seed in work.seeds]
    sigma = noise * (clips.amax((1, 2, 3, 4)) - clips.amin((1, 2, 3, 4)))

    def at(i, k):
        # copy by copy, so that chunks do not change what is drawn
        drawn = [torch.randn(clips[i].shape, generator=draws[i], device=clips.device) for _ in k]
        return clips[i] + sigma[i] * torch.stack(drawn).to(clips), 1

    return mean_gradient(model, clips, targets, work, samples, at, squared)


def _check_count(argument: str, given) -> None:
    require(type(given) is int and given >= 1, argument, given, "a whole number, at least 1")
