"""Relevance: a class's score handed back layer by layer, as `excitation` needs it.

A network is read as neurons (what an activation, a pooling or the clip puts out) and sums between
them (convolutions, dense layers, batch-norms, residual sums, means, LSTM cells). A parent z shares
its relevance R among its children a in proportion of what each added to a *rule's* sum e:

    R_a = Σ_parents (contribution of a to e) / e · R_parent

That is gradient × input of a rewritten forward pass, in which each neuron has its own value but is
differentiated as value/e · e, value/e held constant: reshapes, means, branches and frames that
share a network need no rule of their own. The rewriting is done on the fly, on the calls of torch
functions, so neither the model nor its layers are touched.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stepkit._checks import require
from stepkit.models.scores import Score


def relevance(score: Tensor, neurons: list[Tensor], argument: str) -> list[Tensor]:
    """Return what of ``score`` (N,) reaches each of the ``neurons``, in their shapes."""
    given, expected = "no path from the class back", "one of layers that have a rule"
    require(score.requires_grad, argument, given, expected)
    slopes = torch.autograd.grad(score, neurons, torch.ones_like(score), allow_unused=True)
    require(any(slope is not None for slope in slopes), argument, given, expected)
    pairs = zip(neurons, slopes, strict=True)
    return [n.detach() * (0 if slope is None else slope) for n, slope in pairs]


class Rules(TorchFunctionMode):
    """Inside, whatever is computed from a tensor that asks for its gradient passes on relevance.

    Such a tensor is called a signal. It may be a rule's sum e, whose true value z goes along as its
    attribute ``_value``; a signal without one is its own value.

    Attributes
    ----------
    keep : float
        Share of a negative contribution that counts in convolutions: 1/(1+γ) of LRP-γ; the rule's
        usual form, w + γ·w⁺, is this times 1+γ, which would outweigh a residual branch.
    epsilon : float
        Of LRP-ε in dense layers.
    excitatory : bool
        Excitation backprop: positive weights only, in dense layers as well, and no biases.
    """

    def __init__(self, keep: float, epsilon: float = 0.0, excitatory: bool = False):
        super().__init__()
        self.keep, self.epsilon, self.excitatory = keep, epsilon, excitatory
        self.in_shares = False  # a log-softmax has been met: from there on, logs of shares

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run ``func`` by its rule where it works on a signal."""
        kwargs, name = kwargs or {}, func.__name__
        if not _signals((args, kwargs)):
            return func(*args, **kwargs)
        rule = _RULES.get(name if name.startswith("__") else name.rstrip("_"))
        if rule is not None or name in _LINEAR:
            if rule is not _batch_norm:
                args, kwargs = (_each(self.summed, given) for given in (args, kwargs))
            return rule(self, *args, **kwargs) if rule else _linear(func, args, kwargs)
        changes = name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
        if not changes:  # shapes, comparisons and fresh tensors are no signals
            with torch.no_grad():
                found = func(*_each(_value, args), **_each(_value, kwargs))
            if name.startswith("new_") or name.endswith("_like") or not _floats(found):
                return found
        raise _refusal(name)

    def score(self, output: Tensor, targets: Tensor, score: Score) -> Tensor:
        """Return the relevance (N,) to start from: the class's logit, or one if excitatory."""
        score.check(_value(output).detach(), targets)
        with torch.enable_grad():
            sums = self.summed(output)
            if self.excitatory and not self.in_shares:
                sums = _relay(sums, torch.ones_like(sums), _ratio(1, sums))
            elif not self.excitatory:
                sums = self.neuron(sums)
            return score.logit(sums, targets)

    def neuron(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """Make a sum a neuron with the activation ``active``, by default the sum's true value."""
        z = _value(x)
        if active is None and x is z:
            return x
        a = z if active is None else active
        if self.excitatory:
            found = _relay(x, a.clamp(min=0), _ratio(a.clamp(min=0), x))
            return found if active is not None else _pair(found, z)  # below zero none wins
        if x is z:
            return _relay(z, a, _ratio(a, z))
        # e ≥ z, so the rule is safe where z > 0; neurons below zero go by the plain sum, LRP-0
        a, up = a.detach(), z.detach() > 0
        found = _relay(x, a, _ratio(a * up, x))
        return found + _relay(z, 0, _ratio(a * ~up, z)) if bool((a < 0).any()) else found

    def weighed(self, op, x: Tensor, weight: Tensor, bias: Tensor | None, dense=False) -> Tensor:
        """Return the value of a layer with weights; its rule's sum follows when it is needed."""
        n = self.neuron(x)
        z = op(_value(n), weight, bias)
        z._made = (op, n, weight, bias, dense)
        return z.requires_grad_()  # a signal, also where only the sum will have a gradient

    def summed(self, x: Tensor) -> Tensor:
        """Give the value of a layer with weights its rule's sum; leave other signals alone."""
        if not hasattr(x, "_made"):
            return x
        op, n, weight, bias, dense = x._made
        if self.excitatory:
            return _pair(op(n, weight.clamp(min=0), None), x)
        if dense:
            z = x.detach()
            return _relay(x, z, _ratio(z, z + self.epsilon * z.sign())) if self.epsilon else x
        bias = None if bias is None else self.damped(bias)
        e = op(n.clamp(min=0), self.damped(weight), bias)
        if bool((n < 0).any()):  # here a positive weight makes a negative contribution
            e = e + op(n.clamp(max=0), -self.damped(-weight), None)
        return _pair(e, x)

    def damped(self, weight: Tensor) -> Tensor:
        """Return w⁺ + keep·w⁻."""
        return weight.clamp(min=0) + self.keep * weight.clamp(max=0)


def _relay(e: Tensor, value, ratio: Tensor) -> Tensor:
    """Return ``value``, which passes back ratio times its own gradient to ``e``."""
    value = value.detach() if isinstance(value, Tensor) else value
    return value + ratio * (e - e.detach())


def _ratio(a, e: Tensor) -> Tensor:
    """Return a/e, and 0 where there is no sum to share among."""
    e = e.detach()
    a = a.detach() if isinstance(a, Tensor) else a
    return torch.where(e == 0, 0.0, a / e)


def _pair(e: Tensor, z: Tensor) -> Tensor:
    """Return the rule's sum e with its true value z on it."""
    e._value = z
    return e


def _value(x: Tensor) -> Tensor:
    return getattr(x, "_value", x)


def _each(do, given):
    """Apply ``do`` to every signal in a call's arguments."""
    if isinstance(given, Tensor):
        return do(given) if given.requires_grad else given
    if isinstance(given, (list, tuple)):
        return type(given)(_each(do, one) for one in given)
    if isinstance(given, dict):
        return {key: _each(do, one) for key, one in given.items()}
    return given


def _signals(given) -> list[Tensor]:
    found = []
    _each(found.append, given)
    return found


def _floats(given) -> bool:
    """Tell whether a result holds a tensor of real numbers."""
    if isinstance(given, (list, tuple)):
        return any(_floats(one) for one in given)
    return isinstance(given, Tensor) and given.is_floating_point()


def _refusal(name: str) -> ValueError:
    expected = (
        "convolution, dense, batch-norm, pooling, ReLU-like and LSTM layers, sums and sigmoid gates"
        " (no rule of relevance propagation is known for the rest)"
    )
    return ValueError(f"model: got {name}, expected {expected}")


def _linear(func, args, kwargs):
    """Rearrange, or add up with positive weights: the same on sums and on values."""
    found = func(*args, **kwargs)
    if not any(hasattr(x, "_value") for x in _signals((args, kwargs))):
        return found
    values = func(*_each(_value, args), **_each(_value, kwargs))
    if isinstance(found, Tensor):
        return _pair(found, values)
    return type(found)(_pair(e, z) for e, z in zip(found, values, strict=True))


def _dense(rules: Rules, x, weight, bias=None):
    return rules.weighed(F.linear, x, weight, bias, dense=True)


def _convolution(func, rules: Rules, x, weight, bias=None, *rest, **options):
    return rules.weighed(lambda n, w, b: func(n, w, b, *rest, **options), x, weight, bias)


def _scale(n: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return n * weight if bias is None else n * weight + bias


def _batch_norm(
    rules: Rules, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    require(not training, "model", "batch-norm on a batch's statistics", "its running statistics")
    slope = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = -mean * slope if bias is None else bias - mean * slope
    along = (-1, *[1] * (x.ndim - 2))  # the channel's place in x
    op, n, kernel, old, dense = getattr(x, "_made", (_scale, None, None, None, False))
    if op is _scale or (dense and x.ndim > 2):
        x = rules.summed(x)
        return rules.weighed(_scale, x, slope.view(along), shift.view(along))
    z = x * slope.view(along) + shift.view(along)
    bias = shift if old is None else shift + old * slope
    z._made = (op, n, kernel * slope.view(-1, *[1] * (kernel.ndim - 1)), bias, dense)
    return z


def _activation(name: str, rules: Rules, x, *rest, inplace=False, **options):
    """Handle an activation with f(0) = 0: it keeps its relevance."""
    if rules.excitatory and name not in ("relu", "relu6"):
        given, expected = f"{name}, which goes below zero", "ReLU everywhere behind the layer"
        require(False, "model", given, f"{expected} (excitation backprop, §V-B)")
    return rules.neuron(x, getattr(F, name)(_value(x), *rest, **options))


def _gate(func, rules: Rules, x, *rest, inplace=False):
    return func(_value(x).detach(), *rest)


def _largest(func, rules: Rules, x, *rest, **options):
    """Handle a maximum: the winner takes all."""
    return _linear(func, (rules.neuron(x), *rest), options)


def _add(rules: Rules, x, y, alpha=1):
    if alpha != 1:
        y = _mul(rules, y, alpha) if _signals(y) else y * alpha
    if _signals(x) and _signals(y):
        return _linear(torch.add, (x, y), {})
    x, constant = (x, y) if _signals(x) else (y, x)
    if not rules.excitatory and x is _value(x):
        return x + constant  # a bias
    e = x.clone() if rules.excitatory else x + constant  # a clone: the value is put on it
    return _pair(e, _value(x) + constant)


def _mul(rules: Rules, x, y):
    if _signals(x) and _signals(y):
        raise _refusal("a product of two signals")
    x, weight = (x, y) if _signals(x) else (y, x)
    n = rules.neuron(x)
    if not rules.excitatory:
        return n * weight
    return _pair(n * torch.as_tensor(weight).clamp(min=0), _value(n) * weight)


def _div(rules: Rules, x, y):
    if _signals(y):
        raise _refusal("a division by a signal")
    return _mul(rules, x, 1 / y)


def _log_softmax(rules: Rules, x, *rest, **options):
    """Go on with shares: the normalising sum is a constant, so relevance is the logit's."""
    shares, rules.in_shares = F.log_softmax(_value(x), *rest, **options), True
    if not rules.excitatory:
        return _relay(rules.neuron(x), shares, torch.ones_like(shares))
    return _relay(x, shares, _ratio(1, x))  # a logit wins with the probability that comes back


def _log_mean(rules: Rules, x, *rest, **options):
    """Share among steps by their part in the mean softmax, which is the gradient."""
    if not rules.in_shares:
        raise _refusal("logsumexp of anything but a log-softmax")
    return _value(x).logsumexp(*rest, **options)


def _lstm(
    rules: Rules, x, state, weights, bias, layers, dropout, training, bidirectional, batch_first
):
    """Unroll ``nn.LSTM``, so that its steps go by the rules of their parts."""
    sides, per = 2 if bidirectional else 1, 4 if bias else 2
    plain = isinstance(state, (list, tuple)) and len(weights) == layers * sides * per
    if not plain:
        raise _refusal("nn.LSTM with packed sequences or projections")
    time, ends = 1 if batch_first else 0, []
    with rules:
        steps = x.unbind(time)
        for layer in range(layers):
            found = []
            for k in range(layer * sides, (layer + 1) * sides):
                backwards = slice(None, None, -1 if k % sides else 1)
                given = weights[k * per : (k + 1) * per]
                hidden, end = _unrolled(steps[backwards], state[0][k], state[1][k], *given)
                found.append(hidden[backwards])
                ends.append(end)
            steps = [torch.cat(step, -1) for step in zip(*found, strict=True)]
        h, c = (torch.stack(last) for last in zip(*ends, strict=True))
        return torch.stack(steps, time), h, c


def _unrolled(steps, h, c, of_input, of_state, *biases):
    """Run an LSTM over (N, D) each; return its hidden states and its last state."""
    hidden = []
    for x in steps:
        moved = F.linear(x, of_input, *biases[:1]) + F.linear(h, of_state, *biases[1:])
        i, f, g, o = moved.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hidden.append(h)
    return hidden, (h, c)


_LINEAR = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze"),
    *("unsqueeze", "expand", "expand_as", "repeat", "contiguous", "clone", "to", "float", "chunk"),
    *(
        "bfloat16",
        "split",
        "unbind",
        "select",
        "narrow",
        "__getitem__",
        "flip",
        "roll",
        "stack",
        "cat",
    ),
    *("mean", "sum", "pad", "interpolate", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *(f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)),
}
_RULES = {
    "detach": lambda rules, x: x,
    "linear": _dense,
    **{f"conv{d}d": partial(_convolution, getattr(F, f"conv{d}d")) for d in (1, 2, 3)},
    "batch_norm": _batch_norm,
    **{
        name: partial(_activation, name)
        for name in ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "tanh")
    },
    **{name: partial(_gate, getattr(F, name)) for name in ("sigmoid", "hardsigmoid")},
    **{
        name: partial(_largest, getattr(F, name))
        for name in (f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
    },
    "amax": partial(_largest, torch.amax),
    "add": _add,
    "sub": lambda rules, x, y, alpha=1: _add(rules, x, y, -alpha),
    "__rsub__": lambda rules, x, y: _add(rules, y, x, -1),
    "mul": _mul,
    "div": _div,
    "neg": lambda rules, x: _mul(rules, x, -1),
    "log_softmax": _log_softmax,
    "logsumexp": _log_mean,
    "lstm": _lstm,
}
