"""Another way back through a model: calls of torch functions are done by rules while it runs.

To change what an activation passes back one usually hooks its module, which fails for activations
that are functions, that work in place, or whose module is used more than once, as in torchvision's
residual blocks. Here the *calls* are caught, and the model itself is not touched.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Redirect(TorchFunctionMode):
    """While it lasts, ``rules[name](f, x, ...)`` is computed in place of f(x, ...).

    ``relu`` is the name of ``F.relu``, ``torch.relu``, ``Tensor.relu_`` and of what ``nn.ReLU``
    ends in; a rule returns a new tensor, which is written into x where f works in place.
    """

    def __init__(self, rules: dict):
        super().__init__()
        self.rules = rules

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, plain_name(function)
        if name not in self.rules or not args:
            return function(*args, **kwargs)
        found, x = self.rules[name](function, *args, **kwargs), args[0]
        in_place = kwargs.get("inplace") or name != function.__name__
        if not in_place or found is x or (x.requires_grad and not found.requires_grad):
            return found
        x.copy_(found)
        vars(x).clear()
        vars(x).update(vars(found))
        return x


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, ratio, positive):
        ctx.save_for_backward(ratio)
        ctx.positive = positive
        return y.view_as(y)

    @staticmethod
    def backward(ctx, arrives):
        arrives = arrives.relu() if ctx.positive else arrives
        return arrives * ctx.saved_tensors[0], None, None, None


def passing(x: Tensor, y: Tensor, ratio: Tensor, positive: bool = False) -> Tensor:
    """Return ``y``, which passes ``ratio`` times what arrives (if positive) back to ``x``."""
    return _Passing.apply(x, y.detach(), ratio.detach(), positive)


def plain_name(function) -> str:
    """Return a function's name without the mark of those that work in place."""
    name = function.__name__
    return name if name.startswith("__") else name.rstrip("_")


_ACTIVATIONS = {"relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu"}
_ACTIVATIONS |= {"mish", "hardswish", "hardtanh", "hardsigmoid", "softplus", "tanh", "sigmoid"}


class Activations(TorchFunctionMode):
    """Shows the output of every activation function called inside to ``see``, in order.

    Listens to torch, not to the modules: a model is not touched, and it does not matter whether it
    calls one module several times, works in place, or uses functions. ``see`` is called before
    anything can change the output in place.
    """

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if plain_name(func) in _ACTIVATIONS:
            self.see(out)
        return out
