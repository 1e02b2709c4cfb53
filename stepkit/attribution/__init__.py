"""Attribution methods, all behind one door: `attribute`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit.attribution.cam import grad_cam
from stepkit.attribution.gradients import gradient
from stepkit.attribution.step import Settings, StepResult, heatmap, step
from stepkit.checks import clips as check_clips
from stepkit.checks import one_of, require
from stepkit.checks import targets as check_targets
from stepkit.models import check_model, device_of, frozen

__all__ = ["Settings", "StepResult", "attribute", "heatmap", "methods", "step"]


@dataclass(frozen=True)
class Method:
    """A row of `methods`: how to run it, and what a reader wants to know of it."""

    run: Callable[..., Tensor]
    label: str
    family: str
    needs: str
    source: str


def attribute(
    method: str,
    model: nn.Module,
    clips: Tensor,
    targets,
    *,
    batch_size: int = 8,
    progress: bool = False,
    seed: int | Sequence[int] = 0,
    **options,
) -> Tensor:
    """Explain clips by any method of `methods`.

    Parameters
    ----------
    method : str
        An id, such as ``"grad_cam"`` or ``"step"``.
    model : nn.Module
        Clips (N, 3, T, H, W) to logits (N, K). The work is done where the model is; it is left as
        it was (mode, ``requires_grad``, hooks, gradients), also after an error or an interrupt.
    clips : Tensor
        float32 (N, 3, T, H, W), normalised.
    targets : Tensor or int
        Class indices (N,), or one class for all clips.
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
        float32 (N, T, H, W) on the clips' device, higher = more important, not normalised.

    Raises
    ------
    TypeError, ValueError
        An unknown method or option; clips, targets or a model that do not fit.

    Examples
    --------
    >>> from stepkit.models import load_model
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> attribute("gradient", model, torch.randn(2, 3, 8, 48, 48), [0, 1]).shape
    torch.Size([2, 8, 48, 48])
    """
    one_of("method", method, _METHODS)
    if method == "step":
        return step(
            model, clips, targets, batch_size=batch_size, progress=progress, **options
        ).heatmap
    run = _METHODS[method].run
    for name in options:
        one_of("option", name, _options(run))
    check_clips(clips)
    require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "at least 1")
    seeds = _clip_seeds(seed, len(clips))
    device = device_of(model, clips.device)
    maps = torch.empty(len(clips), *clips.shape[2:], device=clips.device)
    with frozen(model):
        needs_gradient = _METHODS[method].needs != "nothing"
        classes = check_model(model, clips[:1].to(device), gradient=needs_gradient)
        targets = check_targets(targets, len(clips), classes, device)
        starts = range(0, len(clips), batch_size)
        for start in tqdm(starts, desc=method, disable=not progress, leave=False):
            chunk = slice(start, start + batch_size)
            part = clips[chunk].to(device)
            maps[chunk] = run(model, part, targets[chunk], seeds=seeds[chunk], **options).to(maps)
    require(bool(torch.isfinite(maps).all()), "model", f"NaN in {method}", "finite attributions")
    return maps


def methods() -> pd.DataFrame:
    """List the methods: one row per id with its label, family, needs, source and options."""
    rows = {
        name: {
            "label": m.label,
            "family": m.family,
            "needs": m.needs,
            "source": m.source,
            "options": ", ".join(_options(m.run)),
        }
        for name, m in _METHODS.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _options(run) -> list[str]:
    """Return the names of a method's own options."""
    if run is step:
        return list(Settings.__dataclass_fields__)
    parameters = inspect.signature(run).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "seeds"]


def _clip_seeds(seed: int | Sequence[int], n: int) -> list[int]:
    """Return a seed per clip, so that neither batches nor workers change what a clip draws."""
    if isinstance(seed, int):
        return [(seed * 1_000_003 + i) % 2**63 for i in range(n)]
    require(len(seed) == n, "seed", f"{len(seed)} seeds", f"one, or one for each of {n} clips")
    return list(seed)


def _random(model, clips: Tensor, targets: Tensor, *, seeds) -> Tensor:
    """Independent normal values per voxel: what every method has to beat."""
    draw = [
        torch.randn(clips.shape[2:], generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(draw)


_METHODS = {
    "random": Method(_random, "Random", "control", "nothing", "§V-B"),
    "gradient": Method(gradient, "Gradient", "gradient", "gradient", "Eq. 22; Simonyan 2014"),
    "grad_cam": Method(
        grad_cam, "Grad-CAM", "activation", "activation, gradient", "Eq. 28; Selvaraju 2017"
    ),
    "step": Method(step, "STEP", "perturbation", "gradient", "Eqs. 1-11; Li 2021"),
}
