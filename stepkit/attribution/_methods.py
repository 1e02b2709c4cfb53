"""What a method of attribution is: a function, and facts that say how to call it.

    @method("mine", label="My method", needs_gradient=True)
    def mine(model, clips, targets, work, *, steps=20):
        return maps

Clips (n, 3, T, H, W) give maps (n, T, H, W). The decorator is all that a method needs to be found:
by `attribute`, in the table of `methods`, in sweeps, notebooks and pages.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepkit._checks import one_of
from stepkit._registry import Registry
from stepkit.models.scores import PROBABILITY, Score, named

__all__ = ["METHODS", "Method", "Work", "method"]


@dataclass(frozen=True)
class Work:
    """What `attribute` hands to every method beside model, clips and targets.

    Attributes
    ----------
    score : Score
        What is explained: ``work.score(output, targets)`` is (n,).
    seeds : sequence of int
        One for each clip; all that is drawn at random comes from these.
    batch_size : int
        Clips, or perturbed copies of a clip, in memory at once.
    bar : callable
        ``bar(steps, desc="...")`` wraps a loop, and shows how far it is if that was asked for.
    """

    score: Score = PROBABILITY
    seeds: Sequence[int] = (0,)
    batch_size: int = 8
    bar: Callable[..., Any] = lambda steps, desc="": steps


@dataclass(frozen=True)
class Method:
    """A method and what is known of it.

    Attributes
    ----------
    name : str
        Its id.
    run : callable
        ``run(model, clips, targets, work, **options)`` gives maps (n, T, H, W), or a dict of
        tensors (n, ...) with those as ``"maps"``.
    label, source : str
        For figures and tables; where it was published.
    family : str
        ``"gradient"``, ``"backprop"``, ``"activation"``, ``"perturbation"``, ``"control"`` or
        ``"own"``.
    resolution : str
        What a map has by itself, in space and time.
    order : int
        Place in the table, Table I's; what has none stands behind, as it was registered.
    needs_gradient : bool
        Of the score, by the clips or by a layer: a model that gives none is refused.
    reads_layers : bool
        It watches or changes what layers and activations do: not of TorchScript, and not of a model
        that runs layers once more on the way back.
    optimises : bool
        Its maps take form even where no gradient arrives, so the model is tried out beforehand.
    review : callable, optional
        ``review(found, score, options)`` may warn of what was found for all clips.
    options : tuple of str, optional
        Names of its options; by default those that its signature tells.
    fill : callable, optional
        (options, size) -> all options with defaults for clips of size (T, H, W); by default those
        of the signature.
    """

    name: str
    run: Callable[..., Tensor | dict[str, Tensor]]
    label: str = ""
    family: str = "own"
    source: str = ""
    resolution: str = "pixel, frame"
    order: int = 1000
    needs_gradient: bool = False
    reads_layers: bool = False
    optimises: bool = False
    review: Callable[[dict, Score, dict], None] = lambda found, score, options: None
    options: tuple[str, ...] | None = None
    fill: Callable[[dict, Sequence[int]], dict] | None = None

    def option_names(self) -> list[str]:
        """Return the names of the method's own options."""
        return list(self._own() if self.options is None else self.options)

    def check_options(self, options: dict) -> None:
        """Raise ValueError for an option that the method does not have."""
        kinds = {p.kind for p in inspect.signature(self.run).parameters.values()}
        if self.options is None and inspect.Parameter.VAR_KEYWORD in kinds:
            return
        for name in options:
            one_of("option", name, self.option_names())

    def filled(self, options: dict, size: Sequence[int]) -> dict:
        """Return all options for clips of ``size`` (T, H, W), defaults and ``score`` as well.

        Raises
        ------
        ValueError
            An unknown option, or a value that does not fit.
        """
        own, score = dict(options), options.get("score", PROBABILITY)
        own.pop("score", None)
        self.check_options(own)
        defaults = {n: p.default for n, p in self._own().items() if p.default is not p.empty}
        own = self.fill(own, size) if self.fill else defaults | own
        # a function is named by its code, not as the score that bears its name
        return own | {"score": named(score) if isinstance(score, str) else score}

    def _own(self) -> dict[str, inspect.Parameter]:
        """Return what the signature says beside model, clips, targets and work."""
        several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        parameters = list(inspect.signature(self.run).parameters.values())[4:]
        return {p.name: p for p in parameters if p.kind not in several}


class _Methods(Registry):
    """The rows in the order of the table, whatever file was imported first."""

    def __iter__(self):
        return iter(sorted(super().__iter__(), key=lambda name: self[name].order))


METHODS = _Methods("method", Method)
method = METHODS.register
