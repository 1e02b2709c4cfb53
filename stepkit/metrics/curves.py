"""Insertion and deletion curves and their AUC (paper §IV-A, Eqs. 12-19, Table II).

A clip is cut into units (patches of a frame), the units are ordered by the attribution, and the
network watches while they appear or disappear. Both operations look at clips in which the j highest
(or lowest) units are present, so one function serves them all, and the identities of Table II hold
by construction: deletion in one order is insertion in the other, read backwards.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from stepkit import removal as removals
from stepkit.checks import clips as check_clips
from stepkit.checks import one_of, require, tensor
from stepkit.checks import targets as check_targets
from stepkit.models import check_model, device_of, frozen, probability
from stepkit.removal import Removal


@dataclass(frozen=True)
class Curve:
    """A metric's result for N clips.

    Attributes
    ----------
    auc : Tensor
        (N,), by the rule that was asked for.
    curve : Tensor
        (N, L+1), Φ_c after 0..L steps.
    share : Tensor
        (L+1,), share of the units that has been perturbed, from 0 to 1.
    """

    auc: Tensor
    curve: Tensor
    share: Tensor


def insertion(model: nn.Module, clips: Tensor, maps: Tensor, targets, **options) -> Curve:
    """Insert the clip into a baseline, unit by unit (Eqs. 13-14); a good attribution rises fast.

    Parameters
    ----------
    model : nn.Module
        Clips (N, 3, T, H, W) to logits (N, K); left as it was.
    clips, maps : Tensor
        float32 (N, 3, T, H, W), normalised, and the attributions (N, T, H, W), raw: display
        normalisation clips values and creates ties.
    targets : Tensor or int
        Class indices (N,).
    order : str
        ``"morf"`` (default): most relevant first; ``"lerf"``: least relevant first.
    unit : str
        ``"patch"`` (default) or ``"pixel"``.
    patch : int, optional
        Side of a patch in pixels; by default 7 at 112, in proportion to the shorter side.
    steps : int
        L, 128 by default (the released code's); at most one step per unit.
    baseline : Removal or str
        Its bottom rung is X̄; by default `stepkit.removal.fade`. The paper's "mean of the training
        data" is ``stepkit.removal.mean(training_clips)``.
    rule : str
        ``"mean"`` (default): Eq. 19, the mean over l = 1..L; ``"trapezoid"``: the released code's.
    batch_size : int
        Clips per forward pass; bounds the memory, does not change the result.
    progress : bool
        Show a bar.

    Returns
    -------
    Curve
        ``.auc (N,) .curve (N, L+1) .share (L+1,)``.

    Raises
    ------
    TypeError, ValueError
        Unknown words; shapes that do not fit; NaN.

    Notes
    -----
    Insertion with MoRF is Petsiuk's insertion; it is also AOPC (LeRF) read backwards. The order is
    global over the clip. Units that tie keep their raster order.

    Examples
    --------
    >>> from stepkit.models import load_model
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> clips = torch.randn(2, 3, 8, 48, 48)
    >>> insertion(model, clips, clips.abs().mean(1), [0, 1], steps=4).curve.shape
    torch.Size([2, 5])
    """
    _check_options(options)
    return _perturb(model, clips, maps, targets, deletion=False, **options)


def deletion(model: nn.Module, clips: Tensor, maps: Tensor, targets, **options) -> Curve:
    """Delete the clip, unit by unit (Eqs. 17-18); under MoRF a good attribution falls fast.

    Arguments, returns and errors as for `insertion`. Deletion with MoRF is AOPC (MoRF).
    """
    _check_options(options)
    return _perturb(model, clips, maps, targets, deletion=True, **options)


def _check_options(options: dict) -> None:
    parameters = inspect.signature(_perturb).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "deletion"]
    for name in options:
        one_of("option", name, known)


def _perturb(
    model,
    clips: Tensor,
    maps: Tensor,
    targets,
    *,
    deletion: bool,
    order: str = "morf",
    unit: str = "patch",
    patch: int | None = None,
    steps: int = 128,
    baseline: Removal | str = "fade",
    rule: str = "mean",
    batch_size: int = 32,
    progress: bool = False,
) -> Curve:
    one_of("order", order, ("morf", "lerf"))
    one_of("unit", unit, ("patch", "pixel"))
    one_of("rule", rule, ("mean", "trapezoid"))
    check_clips(clips)
    tensor("maps", maps, "(N, T, H, W)")
    fits = maps.shape == clips[:, 0].shape
    require(fits, "maps", f"shape {tuple(maps.shape)}", f"the clips' {tuple(clips[:, 0].shape)}")
    require(isinstance(steps, int) and steps >= 1, "steps", steps, "at least one")
    require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "at least 1")
    if patch is None:
        patch = max(1, round(7 * min(clips.shape[-2:]) / 112))
    side = 1 if unit == "pixel" else patch
    ranks, units = unit_ranks(maps, side)
    if order == "lerf":
        ranks = units - 1 - ranks
    steps = min(steps, units)
    # Units present after each step; deletion with MoRF leaves the lowest, which is what insertion
    # with LeRF puts in, read backwards.
    present = torch.arange(steps + 1) * units // steps
    if deletion:
        ranks = units - 1 - ranks
    if deletion != (order == "lerf"):  # the steps h(l) are those of the order, Eqs. 14 and 18
        present = units - present.flip(0)
    device = device_of(model, clips.device)
    with frozen(model), torch.no_grad():
        classes = check_model(model, clips[:1].to(device))
        targets = check_targets(targets, len(clips), classes, device)
        curve = _watch(
            model, clips, ranks, present, targets, removals.named(baseline), batch_size, progress
        )
    require(bool(torch.isfinite(curve).all()), "model", "NaN on a perturbed clip", "finite logits")
    share = present / units
    if deletion:
        curve, share = curve.flip(1), 1 - share.flip(0)
    return Curve(auc(curve, rule).to(clips.device), curve.to(clips.device), share)


def _watch(model, clips, ranks, present, targets, baseline, batch_size, progress) -> Tensor:
    """Return Φ_c (N, L+1) of the clips in which the units of rank < present[l] are present."""
    device = targets.device
    curve = torch.empty(len(clips), len(present))
    bar = tqdm(total=curve.numel(), desc="curves", disable=not progress, leave=False)
    for n in range(len(clips)):
        clip, rank = clips[n : n + 1].to(device), ranks[n].to(device)
        nothing = baseline.nothing(clip)
        for counts, phi in zip(present.split(batch_size), curve[n].split(batch_size), strict=True):
            shown = rank < counts.to(device)[:, None, None, None]  # (l, T, H, W)
            logits = model(torch.where(shown[:, None], clip, nothing))
            phi.copy_(probability(logits, targets[n].expand(len(counts))))
            bar.update(len(counts))
    bar.close()
    return curve


def auc(curve: Tensor, rule: str = "mean") -> Tensor:
    """Return the area under curves (..., L+1): Eq. 19's mean over l = 1..L, or the trapezoid's."""
    one_of("rule", rule, ("mean", "trapezoid"))
    if rule == "mean":
        return curve[..., 1:].mean(-1)
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1))


def unit_ranks(maps: Tensor, side: int) -> tuple[Tensor, int]:
    """Rank square units of ``side`` pixels by the mean of the map, over the whole clip.

    ``maps`` (N, T, H, W) -> the rank of each pixel's unit, int64 (N, T, H, W), 0 for the highest;
    and the number of units. Units at the far border are smaller where ``side`` does not divide the
    frame. Ties keep raster order.
    """
    require(isinstance(side, int) and side >= 1, "patch", side, "at least one pixel")
    H, W = maps.shape[-2:]
    # in float64 means of 9 and of 3 equal values tie, as they must
    values = F.avg_pool2d(maps.double(), side, ceil_mode=True) if side > 1 else maps
    flat = values.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    )
    pixels = rank.view_as(values).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return pixels[:, :, :H, :W], flat.shape[1]
