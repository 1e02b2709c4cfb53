"""Attributions from a modified backward pass (Table I): DeConvNet, guided backprop, DeepLIFT.

The score is the class's logit. To change what an activation passes back one usually hooks its
module, which fails for activations that are functions, that work in place, or whose module is used
more than once, as in torchvision's residual blocks. Here the *calls* are caught while the model
runs (`_Redirect`), and the model itself is not touched.
"""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stepkit._checks import require
from stepkit.attribution._methods import Work, method
from stepkit.removal import black

_method = partial(method, family="backprop", needs_gradient=True, reads_layers=True)


@_method("deconvnet", order=5, label="DeConvNet", source="Zeiler 2014")
def deconvnet(model: nn.Module, clips: Tensor, targets: Tensor, work: Work) -> Tensor:
    """DeConvNet (Zeiler and Fergus 2014), through Captum; (N, T, H, W).

    Each ReLU passes back ReLU(gradient), whatever the sign of its own input was: where a network
    has no max-pooling, the map does not depend on the clip. Absolute value and mean over RGB, as
    for `gradient`; its paper only shows pictures.

    Raises
    ------
    ValueError
        A network without ReLU (a transformer with GELU, say), of which the method says nothing.
    ImportError
        Captum is not installed.
    """
    return _modified_relu("deconvnet", "Deconvolution", model, clips, targets, work.score)


@_method("guided_backprop", order=6, label="Guided BP", source="Springenberg 2015")
def guided_backprop(model: nn.Module, clips: Tensor, targets: Tensor, work: Work) -> Tensor:
    """Guided backpropagation (Springenberg 2015), through Captum; (N, T, H, W).

    Each ReLU passes back ReLU(gradient) where its input was positive. Otherwise as `deconvnet`.

    Raises
    ------
    ValueError
        A network without ReLU.
    ImportError
        Captum is not installed.
    """
    return _modified_relu("guided_backprop", "GuidedBackprop", model, clips, targets, work.score)


@_method("deeplift", order=8, label="DeepLIFT", source="Shrikumar 2017")
def deeplift(model: nn.Module, clips: Tensor, targets: Tensor, work: Work) -> Tensor:
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
    maps = []
    for chunk in torch.arange(len(clips)).split(work.batch_size):
        part = clips[chunk].detach().requires_grad_()
        baseline = black().nothing(part.detach())
        with torch.no_grad(), _Remember() as seen:
            model(baseline)
        with torch.enable_grad(), _Against(seen.inputs):
            output = model(part)
        logit = work.score.logit(output, targets[chunk]).sum()
        (multiplier,) = torch.autograd.grad(logit, part)
        maps.append((multiplier * (part.detach() - baseline)).sum(1))
    return torch.cat(maps)


class _Redirect(TorchFunctionMode):
    """While it lasts, ``rules[f](f, x, ...)`` is computed in place of f(x, ...).

    Only where f, a function that nn.ReLU and its like also end in, sees what depends on the clips.
    """

    def __init__(self, rules: dict):
        super().__init__()
        self.rules = rules

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        caught = function in self.rules and args and args[0].requires_grad
        if not (caught and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        result = self.instead(function, *args, **kwargs)
        in_place = kwargs.get("inplace") or function in _IN_PLACE
        return args[0].copy_(result) if in_place else result

    def instead(self, function, x: Tensor, *args, **kwargs) -> Tensor:
        # a copy: a residual branch may read the same tensor, whose gradient is not the rule's
        return self.rules[function](function, x.clone(), *args, **kwargs)


_IN_PLACE = (torch.relu_, Tensor.relu_, torch.sigmoid_, Tensor.sigmoid_, torch.tanh_, Tensor.tanh_)
_RELU = (F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_)


# ---------------------------------------------------------------- DeConvNet and guided backprop


def _modified_relu(name: str, rule: str, model: nn.Module, clips: Tensor, targets, score) -> Tensor:
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(f'{name} needs Captum: pip install "stepkit[captum]"') from error
    clips = clips.detach().clone().requires_grad_()
    stand_in = _OneModulePerCall(model, clips[:1], lambda output: score.logit(output, targets))
    require(len(stand_in.relus) > 0, name, "a model without ReLU", "one with ReLU to guide")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
        slope = getattr(captum.attr, rule)(stand_in).attribute(clips)
    return slope.detach().abs().mean(1)


class _OneModulePerCall(nn.Module):
    """A model whose i-th call of ReLU goes through the module ``relus[i]``, for Captum to hook."""

    def __init__(self, model: nn.Module, clips: Tensor, logit):
        super().__init__()
        self.model = [model]  # in a list Captum does not see it, and leaves its modules alone
        self.logit = logit
        self.relus = nn.ModuleList()

        def count(function, x, **_):
            self.relus.append(nn.ReLU())
            return x.relu()

        with torch.enable_grad(), _Redirect(dict.fromkeys(_RELU, count)):
            model(clips)

    def forward(self, clips: Tensor) -> Tensor:
        relus = iter(self.relus)
        with _Redirect(dict.fromkeys(_RELU, lambda function, x, **_: next(relus)(x))):
            return self.logit(self.model[0](clips))


# ------------------------------------------------------------- DeepLIFT: the baseline, then clips


class _Remember(TorchFunctionMode):
    """Collect in ``inputs`` what the activations are given, call by call."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _RULES and args:
            self.inputs.append(args[0].clone())  # an activation may work in place
        return function(*args, **(kwargs or {}))


class _Against(_Redirect):
    """Redirect activations to their rules, which get the baseline's input of the same call, too."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__(_RULES)
        self.inputs = iter(inputs)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.rules and args:
            self.baseline = next(self.inputs, None)
            same = self.baseline is not None and self.baseline.shape == args[0].shape
            expected = "one that calls the same activations for every clip"
            require(same, "model", "one that goes another way for a black clip", expected)
        return super().__torch_function__(function, types, args, kwargs)

    def instead(self, function, x: Tensor, *args, **kwargs) -> Tensor:
        return self.rules[function](function, x, self.baseline, *args, **kwargs)


class _Passing(torch.autograd.Function):
    """y in the forward pass; backward, x gets ``ratio`` times what arrives."""

    @staticmethod
    def forward(ctx, x, y, ratio):
        ctx.save_for_backward(ratio)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, arrives):
        return arrives * ctx.saved_tensors[0], None, None


def _rescale(function, x: Tensor, x0: Tensor, *args, **kwargs) -> Tensor:
    """Apply an activation that passes back Δout/Δin; where Δin is float32 noise, its slope."""
    x_, x0 = x.detach(), x0.detach()
    y, y0 = (function(given.clone(), *args, **kwargs) for given in (x_, x0))
    change = x_ - x0
    same = change.abs() < 1e-6
    ratio = (y - y0) / torch.where(same, 1, change)
    if same.any():
        with torch.enable_grad():
            given = x_.clone().requires_grad_()
            slope = torch.autograd.grad(function(given.clone(), *args, **kwargs).sum(), given)[0]
        ratio = torch.where(same, slope, ratio)
    return _Passing.apply(x, y, ratio)


def _rescale_pool(function, x: Tensor, x0: Tensor, *args, **kwargs) -> Tensor:
    """Apply max-pooling to (N, C, ...); Δout goes to the place of the larger of the two maxima.

    There Δin is at least as large and has the same sign. Windows that share a place add up.
    """
    kwargs = kwargs | {"return_indices": True}
    (y, here), (y0, there) = (function(given.detach(), *args, **kwargs) for given in (x, x0))
    place = torch.where(y >= y0, here, there).flatten(2)
    picked, picked0 = (given.flatten(2).gather(2, place).view_as(y) for given in (x, x0))
    change = picked.detach() - picked0
    same = change.abs() < 1e-6
    ratio = torch.where(same, 1, (y - y0) / torch.where(same, 1, change))
    return _Passing.apply(picked, y, ratio)


_CURVES = (torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, F.softplus, F.logsigmoid)
_UNITS = (F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.relu6)
_UNITS += (F.hardtanh, F.prelu, F.hardsigmoid, F.threshold, F.softsign)  # nn.ReLU6 is a hardtanh
_UNITS += (torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min)
_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_RULES = dict.fromkeys((*_RELU, *_IN_PLACE, *_CURVES, *_UNITS), _rescale)
_RULES |= dict.fromkeys(_POOLS, _rescale_pool)
