"""Attributions from a modified backward pass (Table I): DeConvNet, guided backprop, DeepLIFT.

The score is the class's logit; each activation goes by the method's rule (`_calls.Redirect`).
"""

from functools import partial

import torch
from torch import Tensor, nn

from stepkit._checks import require
from stepkit.attribution._calls import Redirect, passing
from stepkit.attribution._methods import method
from stepkit.removal import black

__all__ = ["deconvnet", "deeplift", "guided_backprop"]

_method = partial(method, family="backprop", needs_gradient=True, reads_layers=True)


@_method("deconvnet", order=5, label="DeConvNet", source="Zeiler 2014")
def deconvnet(model, clips, targets, work) -> Tensor:
    """DeConvNet (Zeiler and Fergus 2014); (N, T, H, W).

    Each ReLU passes back ReLU(gradient), whatever the sign of its own input was: where a network
    has no max-pooling, the map does not depend on the clip. Absolute value and mean over RGB, as
    for `gradient`; its paper only shows pictures. Captum's ``Deconvolution`` agrees where every
    ReLU is a module of its own (tests/test_backprop.py).

    Raises
    ------
    ValueError
        A network without ReLU (a transformer with GELU, say), of which the method says nothing.
    """
    return _modified_relu("deconvnet", torch.ones_like, model, clips, targets, work)


@_method("guided_backprop", order=6, label="Guided BP", source="Springenberg 2015")
def guided_backprop(model, clips, targets, work) -> Tensor:
    """Guided backpropagation (Springenberg 2015); (N, T, H, W).

    Each ReLU passes back ReLU(gradient) where its input was positive. Otherwise as `deconvnet`.

    Raises
    ------
    ValueError
        A network without ReLU.
    """

    def share(x: Tensor) -> Tensor:
        return (x > 0).to(x)

    return _modified_relu("guided_backprop", share, model, clips, targets, work)


def _modified_relu(name: str, share, model: nn.Module, clips: Tensor, targets, work) -> Tensor:
    """Return the gradient of a model whose ReLUs pass back ``share`` of its positive part."""
    met = []

    def relu(_, x: Tensor, *args, **kwargs) -> Tensor:
        met.append(x.requires_grad)
        return passing(x, x.relu(), share(x), positive=True)

    clips = clips.detach().requires_grad_()
    with torch.enable_grad():
        with Redirect({"relu": relu}):
            output = model(clips)
        logit = work.score.logit(output, targets)
    require(any(met), name, "a model without ReLU", "one with ReLU to guide")
    return torch.autograd.grad(logit.sum(), clips)[0].abs().mean(1)


@_method("deeplift", order=8, label="DeepLIFT", source="Shrikumar 2017")
def deeplift(model, clips, targets, work) -> Tensor:
    """DeepLIFT with the rescale rule, against a black clip (Shrikumar 2017); (N, T, H, W).

    Each activation passes back Δout/Δin, the differences between clip and baseline, and a pixel
    gets (X − X₀) times what arrives, added up over RGB with its sign. The baseline is black in
    pixel space, as for integrated gradients (§V-B). Max-pooling, on which the paper is silent,
    passes the difference of the maxima to the place of the larger one. If all else between input
    and logit is linear, a map adds up to logit_c(X) − logit_c(X₀); products, softmax and LayerNorm
    (an LSTM's gates, attention) pass their gradient, and then it does not.

    The baseline goes first, without gradients, and leaves the inputs of all activations behind; at
    the same calls of the clip they give Δin and Δout. Not through Captum, which takes the gradient
    of both, and whose rule for pooling loses what overlapping windows share.

    Raises
    ------
    ValueError
        A network whose activations are other ones for the clip than for a black clip.
    """
    clips = clips.detach().requires_grad_()
    baseline, inputs = black().nothing(clips.detach()), []

    def remember(function, x: Tensor, *args, **kwargs) -> Tensor:
        inputs.append(x.clone())  # an activation may work in place
        return function(x, *args, **kwargs)

    with torch.no_grad(), Redirect(dict.fromkeys(_ACTIVATIONS.split(), remember)):
        model(baseline)
    before = iter(inputs)

    def against(function, x: Tensor, *args, **kwargs) -> Tensor:
        x0 = next(before, None)
        same = x0 is not None and x0.shape == x.shape
        expected = "one that calls the same activations for every clip"
        require(same, "model", "one that goes another way for a black clip", expected)
        rule = _rescale_pool if "pool" in function.__name__ else _rescale
        return rule(function, x, x0, *args, **kwargs)

    with torch.enable_grad():
        with Redirect(dict.fromkeys(_ACTIVATIONS.split(), against)):
            output = model(clips)
        logit = work.score.logit(output, targets)  # a score may call activations of its own
    (multiplier,) = torch.autograd.grad(logit.sum(), clips)
    return (multiplier * (clips.detach() - baseline)).sum(1)


def _rescale(function, x: Tensor, x0: Tensor, *args, **kwargs) -> Tensor:
    """Apply an activation that passes back Δout/Δin; where Δin is float32 noise, its slope."""
    y, y0 = (function(given.clone(), *args, **kwargs) for given in (x, x0))
    change = x.detach() - x0
    same = change.abs() < NOISE
    return torch.where(same, y, passing(x, y, (y - y0) / torch.where(same, 1, change)))


def _rescale_pool(function, x: Tensor, x0: Tensor, *args, **kwargs) -> Tensor:
    """Apply max-pooling to (N, C, ...); Δout goes to the place of the larger of the two maxima.

    There Δin is at least as large and has the same sign. Windows that share a place add up.
    """
    kwargs = kwargs | {"return_indices": True}
    (y, here), (y0, there) = (function(given.detach(), *args, **kwargs) for given in (x, x0))
    place = torch.where(y >= y0, here, there).flatten(2)
    picked, picked0 = (given.flatten(2).gather(2, place).view_as(y) for given in (x, x0))
    change = picked.detach() - picked0
    same = change.abs() < NOISE
    return passing(picked, y, torch.where(same, 1, (y - y0) / torch.where(same, 1, change)))


NOISE = 1e-6  # of float32, in a difference of inputs
_ACTIVATIONS = """
    relu sigmoid tanh softplus logsigmoid leaky_relu elu selu celu gelu silu mish hardswish relu6
    hardtanh prelu hardsigmoid threshold softsign clamp clamp_min max_pool1d max_pool2d max_pool3d
"""
