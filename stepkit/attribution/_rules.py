"""Relevance: a class's score handed back layer by layer, as LRP and excitation backprop need it.

A network is read as neurons (what an activation, a pooling or the clip puts out) and sums between
them (convolutions, dense layers, batch-norms, residual sums, means, LSTM cells). A parent z shares
its relevance R among its children a in proportion of what each added to a *rule's* sum e:

    R_a = Σ_parents (contribution of a to e) / e · R_parent

That is gradient × input of a rewritten forward pass, in which each neuron has its own value but is
differentiated as value/e · e, value/e held constant: reshapes, means, branches and frames that
share a network need no rule of their own. A sum z has with it, as ``_parts``, what adds to it and
what takes from it, each a sum of its own; e weighs the two. A rule for another function is an entry
of ``_RULES``: rule(rules, function, x, ...) returns a tensor that passes relevance on.
"""

from functools import partial

import torch
from torch import Tensor
from torch._decomp.decompositions import lstm_impl
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from stepkit._checks import require
from stepkit.attribution._calls import Redirect, passing, plain_name
from stepkit.models.scores import Score


def relevance(score: Tensor, neurons: list[Tensor], argument: str) -> list[Tensor]:
    """Return what of ``score`` (N,) reaches each of the ``neurons``, in their shapes."""
    given, expected = "no path from the class back", "one of layers that have a rule"
    require(score.requires_grad, argument, given, expected)
    slopes = torch.autograd.grad(score, neurons, torch.ones_like(score), allow_unused=True)
    require(any(slope is not None for slope in slopes), argument, given, expected)
    pairs = zip(neurons, slopes, strict=True)
    return [n.detach() * (0 if slope is None else slope) for n, slope in pairs]


class Rules(Redirect):
    """Inside, whatever is computed from a tensor that asks for its gradient passes on relevance.

    Attributes
    ----------
    keep : float
        Share of a negative contribution that counts in convolutions: 1/(1+γ) of LRP-γ; the rule's
        usual form, w + γ·w⁺, is this times 1+γ, which would outweigh a residual branch.
    epsilon : float
        Of LRP-ε in dense layers.
    excitatory : bool
        Excitation backprop: positive weights only, in dense layers as well, and no biases; neurons
        below zero do not win.
    """

    def __init__(self, keep: float, epsilon: float = 0.0, excitatory: bool = False):
        super().__init__({name: partial(rule, self) for name, rule in _RULES.items()})
        self.keep, self.epsilon, self.excitatory = keep, epsilon, excitatory
        self.in_shares = False  # a log-softmax has been met: from there on, logs of shares

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run ``function`` by its rule where it works on a tensor that asks for its gradient."""
        kwargs, name = kwargs or {}, function.__name__
        if not _signals(args, kwargs):
            return function(*args, **kwargs)
        if plain_name(function) in self.rules:
            return super().__torch_function__(function, types, args, kwargs)
        if name != "__setitem__" and name == plain_name(function):
            with torch.no_grad():  # shapes, comparisons and fresh tensors pass nothing on
                found = function(*args, **kwargs)
            fresh = name.startswith("new_") or name.endswith("_like")
            if fresh or not any(_is_float(one) for one in tree_leaves(found)):
                return found
        raise _refusal(name)

    def score(self, output: Tensor, targets: Tensor, score: Score) -> Tensor:
        """Return the relevance (N,) to start from: the class's logit, or one if excitatory."""
        score.check(output.detach(), targets)
        with torch.enable_grad():
            return score.logit(self.start(output), targets)

    def start(self, x: Tensor) -> Tensor:
        """Return the logits as neurons, or as winners with a probability of one."""
        if self.in_shares:
            return x
        if not self.excitatory:
            return self.neuron(x)
        e = self.sum(x)
        return passing(e, torch.ones_like(e), _ratio(torch.ones_like(e), e))

    def sum(self, x: Tensor) -> Tensor:
        """Return the rule's sum e behind x; a neuron is its own."""
        if not hasattr(x, "_parts"):
            return x
        up, down = x._parts
        return up + self.keep * down if self.keep else up

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what adds to x and what takes from it; a neuron does one of them by itself."""
        up, down = getattr(x, "_parts", None) or _signs(x)
        return up, down * 0 if self.excitatory and not hasattr(x, "_parts") else down

    def neuron(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """Make a sum a neuron with the activation ``active``, by default the sum itself."""
        if active is None and not hasattr(x, "_parts"):
            return x
        a, e = (x if active is None else active).detach(), self.sum(x)
        if self.excitatory:
            won = passing(e, a.relu(), _ratio(a.relu(), e))
            return won if active is not None else _with(x.view_as(x), won, 0 * won)
        # e ≥ z, so the rule is safe where z > 0; neurons below zero go by the plain sum, LRP-0
        e = torch.where(x > 0, e, x) if bool((a < 0).any()) else e
        return passing(e, a, _ratio(a, e))

    def layer(self, op, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return op(x, weight, bias), a sum, with its parts."""
        n = self.neuron(x)
        (up, down), (more, less) = self.parts(n), _signs(weight)
        over, under = (None, None) if bias is None or self.excitatory else _signs(bias)
        parts = op(up, more, over), op(up, less, under)
        if bool((down < 0).any()):  # here a positive weight takes away
            parts = parts[0] + op(down, less, None), parts[1] + op(down, more, None)
        return _with(op(n, weight, bias), *parts)

    def scaled(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return x·weight + bias, with the parts of x: what takes may add by a negative weight.

        The bias is a child as well, if not excitatory.
        """
        (up, down), (more, less) = self.parts(x), _signs(weight)
        over, under = _signs(0 * bias if self.excitatory else bias)
        up, down = up * more + down * less + over, up * less + down * more + under
        return _with(x * weight + bias, up, down)


def _signals(*given) -> list[Tensor]:
    return [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]


def _is_float(given) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


def _signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x⁺ and x⁻; the model may write into x, so that it is not kept for the way back."""
    return x.relu(), -(-x).relu()


def _ratio(a: Tensor, e: Tensor) -> Tensor:
    """Return a/e, and 0 where there is no sum to share among."""
    return torch.where(e == 0, 0.0, a / e)


def _with(z: Tensor, up: Tensor, down: Tensor) -> Tensor:
    z._parts = up, down
    return z


def _refusal(name: str) -> ValueError:
    expected = (
        "convolution, dense, batch-norm, pooling, ReLU-like and LSTM layers, sums and sigmoid gates"
        " (no rule of relevance propagation is known for the rest)"
    )
    return ValueError(f"model: got {name}, expected {expected}")


def _linear(rules: Rules, function, *args, **kwargs):
    """Rearrange, or add up with positive weights: the same on a sum and on its parts."""
    found = function(*args, **kwargs)
    if not rules.excitatory and not any(hasattr(x, "_parts") for x in _signals(args, kwargs)):
        return found

    def part(i: int):
        one = partial(tree_map_only, Tensor, lambda x: rules.parts(x)[i] if _is_float(x) else x)
        return function(*one(args), **one(kwargs))

    if isinstance(found, Tensor):
        return _with(found, part(0), part(1))
    return type(found)(map(_with, found, part(0), part(1)))


def _dense(rules: Rules, function, x, weight, bias=None):
    if rules.excitatory:
        return rules.layer(F.linear, x, weight, bias)
    z = F.linear(rules.neuron(x), weight, bias)
    return passing(z, z, _ratio(z, z + rules.epsilon * z.sign()))


def _convolution(rules: Rules, function, x, weight, bias=None, *rest, **options):
    return rules.layer(lambda n, w, b: function(n, w, b, *rest, **options), x, weight, bias)


def _batch_norm(
    rules: Rules, _, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    require(not training, "model", "batch-norm on a batch's statistics", "its running statistics")
    slope = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * slope
    along = (-1, *[1] * (x.ndim - 2))  # the channel's place in x
    return rules.scaled(x, slope.view(along), shift.view(along))


def _activation(rules: Rules, function, x, *rest, **options):
    """Handle an activation with f(0) = 0: it keeps its relevance."""
    name = plain_name(function)
    given, expected = f"{name}, which goes below zero", "ReLU everywhere behind the layer"
    allowed = not rules.excitatory or name in ("relu", "relu6")
    require(allowed, "model", given, f"{expected} (excitation backprop, §V-B)")
    return rules.neuron(x, function(x.detach().clone(), *rest, **options))


def _gate(rules: Rules, function, x, *rest, **options):
    return function(x.detach().clone(), *rest, **options)


def _largest(rules: Rules, function, x, *rest, **options):
    """Handle a maximum: the winner takes all."""
    return _linear(rules, function, rules.neuron(x), *rest, **options)


def _add(rules: Rules, function, x, y, alpha=1):
    if alpha != 1:
        y = _mul(rules, function, y, alpha) if _signals(y) else y * alpha
    if _signals(x) and _signals(y):
        return _linear(rules, torch.add, x, y)
    x, bias = (x, y) if _signals(x) else (y, x)
    if not rules.excitatory and not hasattr(x, "_parts"):
        return x + bias
    return rules.scaled(x, torch.ones(()), torch.as_tensor(bias))


def _mul(rules: Rules, function, x, y):
    if _signals(x) and _signals(y):
        raise _refusal("a product or quotient of two signals")
    x, weight = (x, y) if _signals(x) else (y, x)
    if not rules.excitatory and not hasattr(x, "_parts"):
        return x * weight
    return rules.scaled(x, torch.as_tensor(weight), torch.zeros(()))


def _log_softmax(rules: Rules, function, x, *rest, **options):
    """Go on with shares: the normalising sum is a constant, so relevance is the logit's."""
    logits, shares = rules.start(x), function(x.detach(), *rest, **options)
    rules.in_shares = True
    return passing(logits, shares, torch.ones_like(shares))


def _log_mean(rules: Rules, function, x, *rest, **options):
    """Share among steps by their part in the mean softmax, which is the gradient."""
    if not rules.in_shares:
        raise _refusal("logsumexp of anything but a log-softmax")
    return function(x, *rest, **options)


def _lstm(rules: Rules, function, x, state, *rest):
    """Take ``nn.LSTM`` apart, so that its steps go by the rules of their parts."""
    if isinstance(state, Tensor):
        raise _refusal("nn.LSTM with packed sequences")
    with rules:
        return lstm_impl(x, state, *rest)


_SHAPES = """
    view reshape flatten unflatten transpose permute movedim squeeze unsqueeze expand expand_as
    repeat contiguous clone to float bfloat16 chunk split unbind select narrow __getitem__ flip roll
    stack cat mean sum pad interpolate dropout dropout1d dropout2d dropout3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
"""
_LARGEST = """
    amax max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d
"""
_KINDS = {
    _SHAPES: _linear,
    _LARGEST: _largest,
    "conv1d conv2d conv3d": _convolution,
    "relu relu6 leaky_relu elu gelu silu hardswish tanh": _activation,
    "sigmoid hardsigmoid": _gate,
}
_RULES = {name: rule for names, rule in _KINDS.items() for name in names.split()} | {
    "detach": lambda rules, function, x: x,
    "linear": _dense,
    "batch_norm": _batch_norm,
    "add": _add,
    "sub": lambda rules, function, x, y, alpha=1: _add(rules, function, x, y, -alpha),
    "__rsub__": lambda rules, function, x, y: _add(rules, function, y, x, -1),
    "mul": _mul,
    "div": lambda rules, function, x, y: _mul(rules, function, x, 1 / y),
    "neg": lambda rules, function, x: _mul(rules, function, x, -1),
    "log_softmax": _log_softmax,
    "logsumexp": _log_mean,
    "lstm": _lstm,
}
