"""Insertion and deletion curves and their AUC (paper §IV-A, Eqs. 12-19, Table II).

A clip is cut into units (pixels, patches or superpixels of a frame), the units are ranked by the
attribution, and the network watches while they appear or disappear. The four pairs of operation and
order look at two families of clips, so that the identities of §V-C hold by construction:

================  ========================  ==========================
operation, order  units present at step l   Table II
================  ========================  ==========================
insertion, MoRF   the p(l) highest          CM (Insertion)
deletion, LeRF    the p(L−l) highest        AOPC (LeRF)
deletion, MoRF    all but the p(l) highest  CM (Deletion), AOPC (MoRF)
insertion, LeRF   all but the p(L−l) …
================  ========================  ==========================

where p(l) = ⌊l·U/L⌋ for a clip of U units. The AUC is that of Φ_c, for AOPC as well; the mean drop
that AOPC is named after, (1/(L+1))·Σ_{l=0..L} Φ_c(X) − Φ_c(X̃^(l)), is L/(L+1)·(Φ_c(X) − AUC).
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from stepkit import removal as removals
from stepkit._checks import clips as check_clips
from stepkit._checks import in_proportion, one_of, require, tensor, warn
from stepkit._checks import targets as check_targets
from stepkit.attribution.supervoxels import side_by_side, supervoxels
from stepkit.data import Batch
from stepkit.metrics._metric import metric
from stepkit.metrics.pointing import relevance_mass
from stepkit.models import check_model, device_of, frozen
from stepkit.models.scores import PROBABILITY, Read, Score
from stepkit.models.scores import named as named_score
from stepkit.removal import Removal

__all__ = ["Curve", "auc", "deletion", "insertion", "perturbed", "watch"]

BOTH = "insertion", "deletion"
_CUT = WeakIdKeyDictionary()  # units of clips: superpixels, which all methods and both curves share


@dataclass(frozen=True, repr=False)
class Curve:
    """A metric's result for N clips.

    Attributes
    ----------
    auc : Tensor
        (N,), by the rule that was asked for.
    curve : Tensor
        (N, L+1), Φ_c after 0..L steps.
    share : Tensor
        (L+1,), share of the steps taken, l/L; that of a clip's U units differs by less than 1/U.
    """

    auc: Tensor
    curve: Tensor
    share: Tensor

    def __repr__(self):
        n, steps = len(self.auc), len(self.share) - 1
        return f"Curve of {n} clips in {steps} steps; mean AUC: {self.auc.mean():.3f}"


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
        ``"patch"`` (default), ``"pixel"`` or ``"superpixel"`` (SLIC-zero, σ = 1).
    patch : int, optional
        Side of a patch in pixels; by default 7 at 112, in proportion to the shorter side.
    segments : int, optional
        About how many superpixels; by default as many as patches in a frame, 256 at 112×112.
    segments_per : str
        ``"frame"`` (default, printed in §V-C): each frame is cut by itself. ``"clip"`` (released):
        the clip is cut at once into supervoxels, of which every frame's part is a unit.
    rank_by : str
        ``"mean"`` (default) or ``"sum"`` of the map over a unit. The released code takes the mean
        of a patch and the sum of a superpixel, which favours large ones; the paper does not say.
    steps : int
        L, 128 by default (the released code's). At most one step per patch or pixel; superpixels
        differ in number from clip to clip, and where they are fewer than L, some steps add none.
    baseline : Removal or str
        Its bottom rung is X̄; by default `stepkit.removal.fade`, the released code's. The paper's
        "mean of the training data" is ``stepkit.removal.mean(training_clips)``.
    score : str, Score or callable
        What the network is asked; Φ_c by default, see `stepkit.models.scores`.
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
    global over the clip; the inequality printed in §IV-A has its sign wrong. Units that tie keep
    their raster order; superpixels that of the frames, then of SLIC's labels.

    Examples
    --------
    >>> from stepkit.networks import load_model
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> clips = torch.randn(2, 3, 8, 48, 48)
    >>> insertion(model, clips, clips.abs().mean(1), [0, 1], steps=4).curve.shape
    torch.Size([2, 5])
    """
    return _curve("insertion", model, clips, maps, targets, **_known(options))


def deletion(model: nn.Module, clips: Tensor, maps: Tensor, targets, **options) -> Curve:
    """Delete the clip, unit by unit (Eqs. 17-18); under MoRF a good attribution falls fast.

    Arguments, returns and errors as for `insertion`. Deletion with MoRF is AOPC (MoRF).
    """
    return _curve("deletion", model, clips, maps, targets, **_known(options))


@metric("auc", label="AUC", columns=BOTH, lower_is_better=("deletion",), baseline=True)
def auc_of_both(model: nn.Module, batch: Batch, maps: Tensor, **options) -> dict[str, Tensor]:
    """Return both AUCs (N,), and the curves (N, L+1); ``options`` are those of `insertion`."""
    found, given = {}, (model, batch.clips, maps, batch.targets)
    for operation in BOTH:
        curve = _curve(operation, *given, **_known(options))
        found |= {operation: curve.auc, f"{operation} curve": curve.curve}
    return found


@metric("smallest_mask", label="what the smallest mask keeps", reads="masks")
def smallest_mask(
    model: nn.Module, batch: Batch, masks: Tensor, *, removal: Removal | str = "blur"
) -> dict[str, Tensor]:
    """Compare Φ_c of the smallest mask, Φ_c(M_v ⊗ X) of Eq. 4, with Φ_c of the whole clip.

    Of masks (N, A, T, H, W) the first is scored. Returns, (N,) each: Φ of the clip, Φ of what the
    mask keeps, whether that is ``higher``; the share of the mask, and of the clip (``chance``),
    that is on evidence.
    """
    first = tensor("masks", masks, "(N, A, T, H, W)")[:, 0].contiguous()
    shown = batch.clips, removals.named(removal).apply(batch.clips, first)
    phi, kept = (watch(model, clips, batch.targets) for clips in shown)
    found = {"Φ clip": phi, "Φ smallest mask": kept, "higher": (kept > phi).float()}
    found["on evidence"] = relevance_mass(first, batch.evidence)
    return found | {"chance": batch.evidence.float().mean((1, 2, 3))}


def watch(
    model: nn.Module, clips, targets: Tensor, score: Score = PROBABILITY, batch_size: int = 32
) -> Tensor:
    """Return Φ_c (N,) of clips, (N, 3, T, H, W) or one by one; the model is left as it was."""
    device, shown, phi = device_of(model, "cpu"), zip(clips, targets, strict=True), []
    with frozen(model), torch.no_grad():
        while batch := tuple(islice(shown, batch_size)):
            seen, classes = (torch.stack(part).to(device) for part in zip(*batch, strict=True))
            phi.append(score(model(seen), classes).float().cpu())
    return torch.cat(phi)


def perturbed(
    clip: Tensor,
    values: Tensor,
    share: float,
    operation: str = "insertion",
    *,
    patch: int | None = None,
    baseline: Removal | str = "fade",
) -> Tensor:
    """Return what the network is shown once a ``share`` of the patches is inserted, or deleted.

    ``clip`` (3, T, H, W), ``values`` (T, H, W) -> (3, T, H, W); most relevant first, see
    `insertion`. The picture beside a curve (Fig. 4).
    """
    one_of("operation", operation, BOTH)
    require(0 <= share <= 1, "share", share, "between 0 and 1")
    (labels,) = _units(clip[None], "patch", patch)
    ranks = unit_ranks(values.cpu(), labels)
    first = (ranks < share * len(ranks))[labels].to(clip.device)
    empty = removals.named(baseline).nothing(clip[None])[0]
    return torch.where(first == (operation == "insertion"), clip, empty)


def auc(curve: Tensor, rule: str = "mean") -> Tensor:
    """Return the area under curves (..., L+1): Eq. 19's mean over l = 1..L, or the trapezoid's."""
    one_of("rule", rule, ("mean", "trapezoid"))
    if rule == "mean":
        return curve[..., 1:].mean(-1)
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1))


def _known(options: dict) -> dict:
    parameters = inspect.signature(_curve).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        one_of("option", name, known)
    return options


def _curve(
    operation: str,
    model: nn.Module,
    clips: Tensor,
    maps: Tensor,
    targets,
    *,
    order: str = "morf",
    unit: str = "patch",
    patch: int | None = None,
    segments: int | None = None,
    segments_per: str = "frame",
    rank_by: str = "mean",
    steps: int = 128,
    baseline: Removal | str = "fade",
    rule: str = "mean",
    score: Score | str | Read = PROBABILITY,
    batch_size: int = 32,
    progress: bool = False,
) -> Curve:
    one_of("order", order, ("morf", "lerf"))
    one_of("rank_by", rank_by, ("mean", "sum"))
    one_of("rule", rule, ("mean", "trapezoid"))
    _check_maps(clips, maps)
    require(isinstance(steps, int) and steps >= 1, "steps", steps, "at least one")
    require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "at least 1")
    clips = clips.clone() if clips.is_inference() else clips
    units = _units(clips, unit, patch, segments, segments_per)
    if unit != "superpixel":  # their number differs from clip to clip
        steps = min(steps, int(units[0].max()) + 1)
    device = device_of(model, clips.device)
    targets, score = check_targets(targets, len(clips), device), named_score(score)
    with frozen(model), torch.no_grad():
        check_model(model, clips[:1].to(device), targets, score, together=batch_size)
        alone = (operation == "insertion") == (order == "morf")  # else: all but the highest
        given = zip(clips, maps, units, strict=True)
        shown = _shown(given, rank_by, removals.named(baseline), steps, alone, device)
        total = len(clips) * (steps + 1)
        bar = tqdm(shown, operation, total, disable=not progress, leave=False)
        phi = watch(model, bar, targets.repeat_interleave(steps + 1), score, batch_size)
    require(bool(torch.isfinite(phi).all()), "model", "NaN on a perturbed clip", "finite logits")
    phi = phi.view(len(clips), -1).to(clips.device)
    phi = phi if order == "morf" else phi.flip(1)
    return Curve(auc(phi, rule), phi, torch.arange(steps + 1) / steps)


def _check_maps(clips: Tensor, maps: Tensor) -> None:
    check_clips(clips)
    tensor("maps", maps, "(N, T, H, W)")
    given, frames = tuple(maps.shape), (len(clips), *clips.shape[2:])
    require(given == frames, "maps", f"shape {given}", f"the clips' {frames}")
    flat = (maps.amax((1, 2, 3)) == maps.amin((1, 2, 3))).nonzero()[:, 0].tolist()
    if flat and maps[0].numel() > 1:
        warn(f"maps: of clips {flat} the same everywhere; their units go in raster order")


def _shown(clips: Iterable, rank_by, removal: Removal, L: int, alone: bool, device) -> Iterator:
    """Yield each clip (3, T, H, W) with its p(l) highest units ``alone``, or without them."""
    for clip, values, labels in clips:
        clip = clip.to(device)
        empty, ranks = removal.nothing(clip[None])[0], unit_ranks(values.cpu(), labels, rank_by)
        places = ranks[labels].to(device)
        for step in range(L + 1):
            yield torch.where((places < step * len(ranks) // L) == alone, clip, empty)


def _units(clips: Tensor, unit: str, patch, segments=None, segments_per="frame") -> list[Tensor]:
    """Number the units of each clip, int64 (T, H, W)."""
    one_of("unit", unit, ("patch", "pixel", "superpixel"))
    one_of("segments_per", segments_per, ("frame", "clip"))
    size = clips.shape[2:]
    if patch is None:  # the paper's, 7 pixels at 112
        patch = max(1, round(in_proportion(7, size)))
    squares = patches(size, 1 if unit == "pixel" else patch)
    if unit != "superpixel":
        return [squares] * len(clips)
    segments = int(squares[0].max()) + 1 if segments is None else segments
    known, key = _CUT.setdefault(clips, {}), (segments, segments_per, clips._version)
    if key not in known:
        known[key] = [superpixels(clip, segments, segments_per) for clip in clips]
    return known[key]


def patches(size: Sequence[int], side: int) -> Tensor:
    """Number squares of ``side`` pixels in raster order, smaller at the far border; (T, H, W)."""
    require(isinstance(side, int) and side >= 1, "patch", side, "at least one pixel")
    T, H, W = size
    rows, columns = torch.arange(H) // side, torch.arange(W) // side
    frame = rows[:, None] * (columns[-1] + 1) + columns
    return torch.arange(T)[:, None, None] * (frame.max() + 1) + frame


def superpixels(clip: Tensor, segments: int, segments_per: str) -> Tensor:
    """Number the superpixels of a clip (3, T, H, W), frame after frame; int64 (T, H, W)."""
    clip = clip.cpu()
    pieces = clip.split(1, dim=1) if segments_per == "frame" else [clip]
    cut = partial(supervoxels, segments=segments, sigma=1.0)
    labels = torch.cat(side_by_side(cut, pieces))
    apart = labels + torch.arange(len(labels))[:, None, None] * (labels.max() + 1)
    return apart.unique(return_inverse=True)[1]


def unit_ranks(values: Tensor, labels: Tensor, rank_by: str = "mean") -> Tensor:
    """Rank the units of a clip by the mean or the sum of its map, over the whole clip.

    ``values`` and ``labels`` (T, H, W), units 0..U−1 -> int64 (U,), 0 for the highest unit. Ties
    keep the order of the units.
    """
    flat = labels.flatten()
    # in float64 means of 9 and of 3 equal values tie, as they must
    worth = torch.bincount(flat, values.flatten().double())
    if rank_by == "mean":
        worth /= torch.bincount(flat)
    return worth.argsort(descending=True, stable=True).argsort()
