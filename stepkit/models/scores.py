"""What is explained: a score, one number per clip, read off what the network returns.

The paper's is Φ_c, the softmax probability of the target class; every method and every metric takes
another by ``score=``:

====================  ==============================================================================
``"probability"``     softmax probability of the target class (the default)
``"sigmoid"``         sigmoid of the target's logit: several labels at once, or one-logit heads
``"value"``           the output as it is: a regression, or probabilities already
``"logit"``           the same, of a classifier before its softmax
`group`               probability of a group of classes (all dogs)
`at_step`             one of these at one time step of an output (N, T, K)
any callable          (output, targets) -> (N,), higher where there is more to explain
====================  ==============================================================================
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkit._checks import one_of, require, warn

__all__ = ["PROBABILITY", "SIGMOID", "VALUE", "Score", "at_step", "group", "named", "probability"]

Read = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """A number per clip; call it with a network's output and the targets (N,).

    Attributes
    ----------
    name : str
        Says what it is; part of the key of what is stored.
    value : callable
        (output, targets) -> (N,): what perturbations watch, and what gradients are taken of.
    logit : callable
        (output, targets) -> (N,): what ``value`` squashes; where methods begin that go back through
        layers (the CAM family, LRP, DeepLIFT, ...). Nothing squashed: ``value``.
    log : callable or None
        (output, targets) -> log of ``value``, for a value that is a probability; None: it is none,
        and may be of any size and sign.
    check : callable
        (output, targets) -> None; raises for an output that the score cannot be read off.
    doubt : callable
        (output, targets) -> None; warns of an output that may be meant in another way. It is that
        of a clip and of one with ten times its contrast.
    one_logit : bool
        ``logit`` is one column of an output (N, K).
    """

    name: str
    value: Read
    logit: Read
    log: Read | None = None
    check: Callable[[Any, Tensor], None] = lambda output, targets: None
    doubt: Callable[[Any, Tensor], None] = lambda output, targets: None
    one_logit: bool = False

    def __call__(self, output: Any, targets: Tensor) -> Tensor:
        """Return ``value``."""
        return self.value(output, targets)

    def __repr__(self):
        return self.name

    def unit(self, model, clips: Tensor, nothing: Tensor, targets: Tensor) -> Tensor:
        """Return what counts as one in an objective beside other terms, (N,).

        1 for a probability. Of a score of any size what removal takes of it, |s(X) − s(X̄)|, where X̄
        is ``nothing``.
        """
        if self.log is not None:
            return clips.new_ones(len(clips))
        with torch.no_grad():
            taken = self(model(clips), targets) - self(model(nothing), targets)
        return torch.where(taken == 0, 1, taken.abs()).to(clips)

    def check_output(self, output: Any, targets: Tensor, last: Tensor) -> None:
        """Check an output for clips of ``targets``, and the numbers that are read off it.

        ``last`` is the largest target of all clips, those that are still to come as well.

        Raises
        ------
        ValueError
            An output or targets that do not fit; not one number for each clip.
        """
        self.check(output, torch.cat([targets[:-1], last.view(1)]))
        found, n, name = self.value(output, targets), len(targets), f"score {self.name}"
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        require(given == (n,), name, f"{given} for {n} clips", f"a tensor ({n},)")
        real = found.dtype.is_floating_point
        require(real, name, f"dtype {found.dtype}", "floating numbers")


def group(classes: Sequence[int] | Sequence[Sequence[int]]) -> Score:
    """Return the softmax probability of a group of classes: the sum over its members.

    Parameters
    ----------
    classes : sequence of int, or of sequences of int
        The members of one group, ``range(151, 269)`` for ImageNet's dogs; targets are then 0. Or of
        several groups, which the targets number.

    Examples
    --------
    >>> group([0, 2])(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.5000])
    """
    listed = classes.tolist() if hasattr(classes, "tolist") else classes
    try:
        groups = [[*each] for each in (listed if hasattr(listed[0], "__iter__") else [listed])]
    except (TypeError, IndexError):
        groups = [[]]
    whole = all(each and all(map(_is_class, each)) for each in groups)
    require(whole, "classes", repr(classes)[:80], "class indices, at least one in each group")
    groups = [[operator.index(c) for c in each] for each in groups]
    last = max(map(max, groups))

    def logit(output, targets):
        members = torch.zeros(len(groups), output.shape[1], dtype=torch.bool)
        for row, each in zip(members, groups, strict=True):
            row[each] = True
        others = ~members.to(output.device)[targets]
        return output.masked_fill(others, -torch.inf).logsumexp(1)

    def log(output, targets):
        return logit(output, targets) - output.logsumexp(1)

    def value(output, targets):
        return log(output, targets).exp()

    def check(output, targets):
        _check_softmax(output, torch.full_like(targets, last))
        _check_targets(targets, len(groups), "groups")

    return Score(f"group({groups})", value, logit, log, check, _doubt_softmax)


def _is_class(given) -> bool:
    return hasattr(given, "__index__") and not isinstance(given, bool) and given >= 0


def at_step(step: int, score: "Score | str | Read" = "probability") -> Score:
    """Return a score at one time step of an output (N, T, K); -1 is the last.

    Examples
    --------
    >>> at_step(-1, "value")(torch.arange(6.0).view(1, 2, 3), torch.tensor([1]))
    tensor([4.])
    """
    of = named(score)
    require(isinstance(step, int), "step", repr(step), "a whole number")

    def at(read):
        def read_step(output, targets):
            _check_shape(output, targets, (3,), "(N, T, K)")
            steps = output.shape[1]
            require(-steps <= step < steps, "step", step, f"one of the model's {steps} time steps")
            return read(output[:, step], targets)

        return read and read_step

    reads = {name: at(getattr(of, name)) for name in ("value", "logit", "log", "check", "doubt")}
    return replace(of, name=f"{of.name} at step {step}", one_logit=False, **reads)


def named(score: "Score | str | Read") -> Score:
    """Return the score that a word names; scores pass through, other callables become one.

    Raises
    ------
    ValueError, TypeError
        An unknown word; no callable.
    """
    if isinstance(score, Score):
        return score
    if isinstance(score, str):
        one_of("score", score, _NAMED)
        return _NAMED[score]
    if not callable(score):
        given = type(score).__name__
        raise TypeError(f"score: got {given}, expected (output, targets) -> (N,), or a name")
    name = f"{getattr(score, '__module__', '')}.{getattr(score, '__qualname__', repr(score))}"
    return Score(name, score, score)


def probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Return Φ_c, the softmax probability (N,) of each row's target."""
    return _column(logits.softmax(1), targets)


def _column(output: Tensor, targets: Tensor) -> Tensor:
    """Return each row's target of (N, K); the only number of (N,)."""
    return output if output.ndim == 1 else output.gather(1, targets[:, None])[:, 0]


def _check_softmax(logits: Any, targets: Tensor) -> None:
    expected = 'logits (N, K); sk.wrap picks them out of an output, score="value" takes others'
    _check_shape(logits, targets, (2,), expected)
    one = "one logit per clip, of which the softmax is always 1"
    remedy = 'score="sigmoid" for a yes-no head, score="value" for a regression'
    require(logits.shape[1] > 1, "model", one, remedy)
    sums = logits.detach().sum(1)
    rounding = 1e-4 if logits.dtype.itemsize >= 4 else 1e-2
    simplex = logits.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=rounding)
    given, remedy = "probabilities (rows sum to 1)", 'logits, or score="value"'
    require(not simplex, "model", given, remedy)
    _check_targets(targets, logits.shape[1], "classes")


def _doubt_softmax(logits: Tensor, targets: Tensor) -> None:
    if logits.min() >= 0 and logits.max() <= 1:
        warn(
            "model: for a clip and for ten times its contrast, all outputs lie between 0 and 1 and "
            "do not sum to 1, as sigmoids would. Their softmax is explained; "
            'score="value" takes them as they are.'
        )


def _check_column(output: Any, targets: Tensor) -> None:
    expected = "numbers (N, K) or (N,), or a score that reads them"
    _check_shape(output, targets, (1, 2), expected)
    _check_targets(targets, 1 if output.ndim == 1 else output.shape[1], "outputs")


def _check_shape(output: Any, targets: Tensor, axes: tuple[int, ...], expected: str) -> None:
    """Raise unless ``output`` is a tensor of so many axes, with one entry for each clip."""
    given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    fits = isinstance(output, Tensor) and output.ndim in axes and len(output) == len(targets)
    require(fits, "model", f"output {given} for {len(targets)} clips", expected)


def _check_targets(targets: Tensor, number: int, what: str) -> None:
    high = int(targets.max())  # none is negative: _checks.targets
    expected = f"{what} 0..{number - 1}" if number > 1 else f"0, the only one of the {what}"
    require(high < number, "targets", high, expected)


def _log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    return _column(logits.log_softmax(1), targets)


def _sigmoid(logits: Tensor, targets: Tensor) -> Tensor:
    return _column(logits, targets).sigmoid()


def _log_sigmoid(logits: Tensor, targets: Tensor) -> Tensor:
    return F.logsigmoid(_column(logits, targets))


VALUE = Score("value", _column, _column, check=_check_column, one_logit=True)
LOGIT = replace(VALUE, name="logit")
SIGMOID = replace(VALUE, name="sigmoid", value=_sigmoid, log=_log_sigmoid)
_softmax = {"value": probability, "log": _log_probability, "check": _check_softmax}
PROBABILITY = replace(VALUE, name="probability", **_softmax, doubt=_doubt_softmax)
_NAMED = {score.name: score for score in (PROBABILITY, SIGMOID, VALUE, LOGIT)}
