"""What is asked of a model before it is explained: finite scores, a gradient, no chance."""

import weakref

import torch
from torch import Tensor, nn

from stepkit._checks import require, warn
from stepkit.models.layers import uncompiled
from stepkit.models.scores import PROBABILITY, Score
from stepkit.models.state import precision_of

__all__ = ["check_model", "check_once"]


def check_model(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    score: Score = PROBABILITY,
    gradient: bool = False,
    together: int = 2,
) -> Tensor:
    """Try the model on the first clips and return their score (n,).

    ``targets`` (N,) may be those of more clips, which are still to come. A model that has not been
    seen before is shown the first clip twice, beside another one if it may get two ``together``: a
    warning tells if dropout, batch statistics or any chance give another score.

    Raises
    ------
    ValueError
        The model fails; the score cannot be read off its output, see
        `stepkit.models.scores`; NaN; it writes into the clips that it is given.
        With ``gradient=True`` also: no gradient reaches the clips, as behind a ``torch.no_grad``.
    """
    with torch.set_grad_enabled(gradient), uncompiled(model):  # once is not worth compiling for
        leaf = clips.detach().clone().requires_grad_(gradient)
        given = leaf * 1  # in-place work on a leaf would be an error of torch's
        output = _run(model, given)
        remedy = "a forward that leaves it alone, or sk.wrap(model), which hands it a copy"
        require(torch.equal(given, clips), "model", "a forward that writes into its input", remedy)
        mine = targets[: len(clips)]
        score.check_output(output, mine, targets.max())
        found = score(output, mine).detach()
        finite = bool(torch.isfinite(found).all())
        require(finite, "model", f"NaN or infinity in its {score.name}", "finite outputs")
        if gradient:
            _check_gradient(leaf, output, score.logit(output, mine), score)
    if score.name not in _checked.get(model, ()):
        _check_repeats(model, clips[:1], mine[:1], score, found[0], together)
        _checked.setdefault(model, set()).add(score.name)
    return found


def _check_gradient(leaf: Tensor, output: object, logit: Tensor, score: Score) -> None:
    if isinstance(output, Tensor) and output.ndim == 2 and score.one_logit:
        # weights break the symmetry of a classifier whose logits sum to a constant
        logit = output * torch.arange(1, 1 + output.shape[1]).to(output)
    try:
        wanted = logit.sum(), leaf
        slope = torch.autograd.grad(*wanted, allow_unused=True) if logit.requires_grad else ()
    except RuntimeError as error:
        told = " ".join(str(error).split())[:200]
        given, expected = f"{type(error).__name__} ({told})", "one that autograd can go through"
        raise ValueError(f"model: got {given} on the way back, expected {expected}") from error
    reaches = any(part is not None and bool((part != 0).any()) for part in slope)
    expected = "a model, and a score, that are differentiable with respect to the clips"
    require(reaches, "model", "no gradient at the clips", expected)


_checked = weakref.WeakKeyDictionary()  # the names of the scores by which a model was checked


def check_once(model: nn.Module, clip: Tensor, targets: Tensor, score: Score, together: int):
    """Check a model that has not been seen with this score before, see `check_model`."""
    if score.name not in _checked.get(model, ()):
        check_model(model, clip, targets, score, together=together)


def _check_repeats(model, clip: Tensor, target: Tensor, score: Score, once: Tensor, together: int):
    """Show the clip again, beside another: chance, or what others in the batch change, is seen."""
    both = torch.cat([clip, -10 * clip])
    with torch.no_grad(), uncompiled(model):
        try:
            outputs = [_run(model, part) for part in both.split(min(together, 2))]
        except ValueError:  # a network that takes one clip at a time
            outputs = [_run(model, part) for part in both.split(1)]
        again = score(outputs[0], target.repeat(2 // len(outputs)))[0]
        if all(isinstance(output, Tensor) for output in outputs):
            score.doubt(torch.cat(outputs), target.repeat(2))
    sizes = [output.abs().max() for output in outputs[:1] if isinstance(output, Tensor)]
    least = 1e-5 * max([*sizes, once.abs()])  # a margin near 0 is all rounding
    # what rounding may change when a clip is seen in another batch, relative to its score
    share = 1e-3 if precision_of(model) in ("float32", "float64") else 0.1
    if (once - again).abs() > share * max(once.abs(), again.abs()) + least:
        warn(
            f"model: its {score.name} of one clip is {once:.4g}, and {again:.4g} when asked again "
            "beside another clip. Is dropout on, or batch statistics? Maps will differ from call "
            "to call, and with batch_size."
        )


def _run(model: nn.Module, clips: Tensor) -> object:
    """Return what the model makes of clips; its own error becomes one that says what to do."""
    try:
        return model(clips)
    except Exception as error:
        if "memory" in str(error):  # torch.OutOfMemoryError, and its kin of the CPU
            raise
        told = " ".join(str(error).split())[:300]
        given = f"{type(error).__name__} ({told}) for clips {tuple(clips.shape)}, {clips.dtype}"
        expected = "a network that takes them; sk.wrap adapts layout, precision and pathways"
        raise ValueError(f"model: got {given}, expected {expected}") from error
