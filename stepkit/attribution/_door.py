"""One door for every method of attribution: `attribute`."""

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _checks
from stepkit._checks import clips as check_clips
from stepkit._checks import require
from stepkit._checks import targets as check_targets
from stepkit.attribution._methods import METHODS, Method, Work
from stepkit.models import check_model, check_once, device_of, frozen, uncompiled, unwrapped
from stepkit.models.scores import PROBABILITY, Read, Score
from stepkit.models.scores import named as named_score

__all__ = ["attribute", "is_blank", "results"]

BLANK = "the same everywhere"  # of a map: nothing is more important than anything else


def attribute(
    method: str | Callable,
    model: nn.Module,
    clips: Tensor,
    targets,
    *,
    score: Score | str | Read = PROBABILITY,
    batch_size: int = 8,
    progress: bool = False,
    seed: int | Sequence[int] = 0,
    **options,
) -> Tensor:
    """Explain clips by any method of `methods`.

    Parameters
    ----------
    method : str or callable
        An id, such as ``"grad_cam"`` or ``"step"``, or a function of one's own,
        ``f(model, clips, targets, work, **options) -> maps`` (`stepkit.method`).
    model : nn.Module
        Clips (N, 3, T, H, W) to logits (N, K). The work is done where the model is; it is left as
        it was (mode, ``requires_grad``, hooks, gradients), also after an error or an interrupt.
    clips : Tensor
        float32 (N, 3, T, H, W), normalised.
    targets : Tensor or int
        Class indices (N,), or one class for all clips.
    score : str, Score or callable
        What is explained: by default Φ_c, the softmax probability of the target; ``"sigmoid"``,
        ``"value"``, ``"logit"``, a group of classes, a time step, a function of one's own, see
        `stepkit.models.scores`. Methods that go back through layers begin at its logit.
    batch_size : int
        Clips worked on at once; bounds the memory, does not change the result.
    progress : bool
        Show a bar.
    seed : int or sequence of N int
        For methods that draw random numbers; clip i draws from (seed, i), or from its own. The
        global random state is never touched.
    **options
        The method's own.

    Returns
    -------
    Tensor
        float32 (N, T, H, W) on the clips' device, higher = more important, not normalised. A
        warning names clips whose map is the same everywhere.

    Raises
    ------
    TypeError, ValueError
        An unknown method or option; clips, targets or a model that do not fit.

    Examples
    --------
    >>> from stepkit.networks import load_model
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> attribute("gradient", model, torch.randn(2, 3, 8, 48, 48), [0, 1]).shape
    torch.Size([2, 8, 48, 48])
    """
    given = {"batch_size": batch_size, "progress": progress, "seed": seed, "score": score}
    maps = results(method, model, clips, targets, **given, **options)["maps"]
    blank = [i for i, values in enumerate(maps) if is_blank(values)]
    if blank:
        _checks.warn(f"{METHODS.find(method).name}: the map of clips {blank} is {BLANK}")
    return maps


def is_blank(values: Tensor) -> bool:
    """Tell whether a map is constant: no gradient is left of a probability of exactly 0 or 1."""
    low, high = values.aminmax()
    return values.numel() > 1 and bool(low == high)


def results(
    method, model, clips, targets, *, score=PROBABILITY, batch_size=8, progress=False, seed=0, **own
) -> dict[str, Tensor]:
    """Return what `attribute` does, as ``"maps"``, and what else a method gives; blank ones too.

    Tensors have a row for each clip and lie where the clips do. ``own`` are the method's options;
    ``method`` may be a `Method` as well.
    """
    row = method if isinstance(method, Method) else METHODS.find(method)
    score = named_score(score)
    row.check_options(own)
    _checks.model(model)
    clips = check_clips(clips).detach()
    require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "at least 1")
    seeds = _clip_seeds(seed, len(clips))
    device = device_of(model, clips.device)
    bar = functools.partial(tqdm, disable=not progress, leave=False)
    with frozen(model), contextlib.ExitStack() as within:
        clips = clips.clone() if clips.is_inference() else clips
        targets = check_targets(targets, len(clips), device)
        first = clips[:1].to(device), targets, score
        if row.reads_layers:
            unwrapped(model)
            within.enter_context(uncompiled(model))
        if row.optimises:
            check_model(model, *first, row.needs_gradient, batch_size)
        else:
            check_once(model, *first, batch_size)
        if row.reads_layers:
            within.enter_context(_one_pass(model))
        parts = []
        with _watched(model, row, *first) as watched:
            for start in bar(range(0, len(clips), batch_size), desc=row.name):
                chunk = slice(start, start + batch_size)
                work = Work(watched, seeds[chunk], batch_size, bar)
                shown = clips[chunk].to(device, copy=True)  # models may write into theirs
                found = row.run(model, shown, targets[chunk], work, **own)
                parts.append(_checked(row, found, shown, clips.device))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if row.needs_gradient and not found["maps"][0].any():  # rare: does any gradient arrive?
            check_model(model, *first, gradient=True)
    finite = _checks.finite(found["maps"])
    require(finite, "model", f"NaN in {row.name}", "finite attributions")
    row.review(found, score, own)
    return found


def _checked(row: Method, found, clips: Tensor, device) -> dict[str, Tensor]:
    """Return a method's tensors on ``device``, maps as float32 (n, T, H, W)."""
    found = found if isinstance(found, dict) else {"maps": found}
    maps = found.get("maps")
    n, _, *size = clips.shape
    given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
    require(given == (n, *size), row.name, given, f"maps {(n, *size)}, one for each clip")
    found = {name: values.detach().to(device) for name, values in found.items()}
    return found | {"maps": found["maps"].to(clips.dtype)}


@contextlib.contextmanager
def _watched(model: nn.Module, row: Method, clip: Tensor, targets: Tensor, score: Score):
    """Yield the score with an eye on what the model returns: no pass of its own is needed.

    The first output is checked as `check_model` does, all are looked at for NaN in the end. Only
    where the method fails is the model tried by itself, as its fault may be the reason.
    """
    finite = []  # on the device: looking at each would wait for it

    def looking(read):
        def call(output, asked):
            if not finite:
                score.check_output(output, asked, targets.max())
            found = read(output, asked)
            finite.append(torch.isfinite(found.detach()).all())
            return found

        return read and call

    reads = {name: looking(getattr(score, name)) for name in ("value", "logit", "log")}
    try:
        yield replace(score, **reads)
    except Exception:
        check_model(model, clip, targets, score, row.needs_gradient)
        raise
    if not finite:
        check_model(model, clip, targets, score, row.needs_gradient)
        return
    finite = bool(torch.stack(finite).all())
    require(finite, "model", f"NaN or infinity in {row.name}", "finite outputs")


@contextlib.contextmanager
def _one_pass(model: nn.Module):
    """Refuse a network that runs layers once more on the way back (activation checkpointing).

    What a method watches or changes in the forward pass would not be so in the second one.
    """

    def look(*_):
        given = "activation checkpointing, which runs layers once more on the way back"
        expected = "it switched off (model.gradient_checkpointing_disable() and its like)"
        require(torch._C._current_graph_task_id() == -1, "model", given, expected)

    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clip_seeds(seed: int | Sequence[int], n: int) -> list[int]:
    """Return a seed per clip, so that neither batches nor workers change what a clip draws."""
    if hasattr(seed, "__index__") and getattr(seed, "ndim", 0) == 0:
        return [(operator.index(seed) * 1_000_003 + i) % 2**63 for i in range(n)]
    many = hasattr(seed, "__len__")
    given = f"{len(seed)} seeds" if many else repr(seed)
    require(many and len(seed) == n, "seed", given, f"one, or one for each of {n} clips")
    return [operator.index(one) for one in seed]
