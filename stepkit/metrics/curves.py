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

where p(l) = ⌊l·U/L⌋ for a clip of U units.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import count, islice, product

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import removal as removals
from stepkit._checks import clips as check_clips
from stepkit._checks import one_of, require, tensor, warn
from stepkit._checks import targets as check_targets
from stepkit.attribution.supervoxels import side_by_side, supervoxels
from stepkit.models import check_model, device_of, frozen
from stepkit.models.scores import PROBABILITY, Read, Score
from stepkit.models.scores import named as named_score
from stepkit.removal import Removal

METRICS = {  # name: operation, order
    "insertion_morf": ("insertion", "morf"),
    "insertion_lerf": ("insertion", "lerf"),
    "deletion_morf": ("deletion", "morf"),
    "deletion_lerf": ("deletion", "lerf"),
    "cm_insertion": ("insertion", "morf"),  # causal metric; from here on Table II's names
    "cm_deletion": ("deletion", "morf"),
    "aopc_morf": ("deletion", "morf"),
    "aopc_lerf": ("deletion", "lerf"),
}


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
    return _one("insertion", model, clips, maps, targets, options)


def deletion(model: nn.Module, clips: Tensor, maps: Tensor, targets, **options) -> Curve:
    """Delete the clip, unit by unit (Eqs. 17-18); under MoRF a good attribution falls fast.

    Arguments, returns and errors as for `insertion`. Deletion with MoRF is AOPC (MoRF).
    """
    return _one("deletion", model, clips, maps, targets, options)


def auc_metrics(
    model: nn.Module,
    clips: Tensor,
    maps: dict[str, Tensor],
    targets,
    names: Sequence[str] = ("cm_insertion", "cm_deletion"),
    **options,
) -> dict[str, dict[str, Curve]]:
    """Score several methods by several metrics (Table II); clips that coincide are watched once.

    End points, steps that add no unit, metrics and methods that show the network the same clip
    share the forward pass.

    Parameters
    ----------
    model, clips, targets, **options
        As for `insertion`, but for ``order``.
    maps : dict of str to Tensor
        The attributions (N, T, H, W) of each method.
    names : sequence of str
        Of `METRICS`: ``"insertion_morf"`` and so on, or the names of Table II: ``"cm_insertion"``,
        ``"cm_deletion"``, ``"aopc_morf"``, ``"aopc_lerf"``. The AUC is that of Φ_c, for AOPC as
        well; the mean drop that AOPC is named after, (1/(L+1))·Σ_{l=0..L} Φ_c(X) − Φ_c(X̃^(l)), is
        L/(L+1)·(Φ_c(X) − AUC).

    Returns
    -------
    dict of dict of Curve
        By metric, then by method. Errors as for `insertion`.

    Examples
    --------
    >>> from stepkit.networks import load_model
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> clips = torch.randn(2, 3, 8, 48, 48)
    >>> maps = {"random": torch.rand(2, 8, 48, 48), "energy": clips.square().mean(1)}
    >>> scores = auc_metrics(model, clips, maps, [0, 1], steps=4)
    >>> scores["cm_deletion"]["energy"].auc.shape
    torch.Size([2])
    """
    _check_options(options)
    named = isinstance(maps, dict) and len(maps) > 0
    require(named, "maps", f"a {type(maps).__name__} (or none)", "a dict of maps by method")
    listed = not isinstance(names, str) and len(names) > 0
    require(listed, "names", repr(names), "a list of metrics")
    for name in names:
        one_of("names", name, METRICS)
    labelled = {f"maps[{method!r}]": given for method, given in maps.items()}
    found = _perturb(model, clips, labelled, targets, [METRICS[name] for name in names], **options)
    methods = [dict(zip(maps, curves, strict=True)) for curves in found]
    return dict(zip(names, methods, strict=True))


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
    one_of("operation", operation, ("insertion", "deletion"))
    require(0 <= share <= 1, "share", share, "between 0 and 1")
    side = _patch(clip.shape[1:]) if patch is None else patch
    labels = patches(clip.shape[1:], side)
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


def _one(operation: str, model, clips, maps, targets, options: dict) -> Curve:
    _check_options(options, ["order"])
    order = options.pop("order", "morf")
    one_of("order", order, ("morf", "lerf"))
    return _perturb(model, clips, {"maps": maps}, targets, [(operation, order)], **options)[0][0]


def _check_options(options: dict, more: Sequence[str] = ()) -> None:
    parameters = inspect.signature(_perturb).parameters.values()
    known = [*more, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    for name in options:
        one_of("option", name, known)


def filled(options: dict) -> dict:
    """Return all options of `auc_metrics` that curves depend on, defaults as well."""
    _check_options(options)
    parameters = inspect.signature(_perturb).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | options
    score = known["score"]
    known |= {"score": named_score(score) if isinstance(score, str) else score}
    known |= {"baseline": removals.named(known["baseline"])}
    return {name: value for name, value in known.items() if name not in ("batch_size", "progress")}


def _perturb(
    model: nn.Module,
    clips: Tensor,
    maps: dict[str, Tensor],
    targets,
    metrics: list[tuple[str, str]],
    *,
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
) -> list[list[Curve]]:
    """Return the curves of each (operation, order), for each of the maps (by name in errors)."""
    one_of("unit", unit, ("patch", "pixel", "superpixel"))
    one_of("segments_per", segments_per, ("frame", "clip"))
    one_of("rank_by", rank_by, ("mean", "sum"))
    one_of("rule", rule, ("mean", "trapezoid"))
    check_clips(clips)
    frames = clips.shape[:1] + clips.shape[2:]  # (N, T, H, W)
    for name, given in maps.items():
        tensor(name, given, "(N, T, H, W)")
        fits = given.shape == frames
        require(fits, name, f"shape {tuple(given.shape)}", f"the clips' {tuple(frames)}")
        flat = (given.amax((1, 2, 3)) == given.amin((1, 2, 3))).nonzero()[:, 0].tolist()
        if flat and given[0].numel() > 1:
            warn(f"{name}: of clips {flat} the same everywhere; their units go in raster order")
    require(isinstance(steps, int) and steps >= 1, "steps", steps, "at least one")
    require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "at least 1")
    patch = _patch(frames[1:]) if patch is None else patch
    squares = patches(frames[1:], 1 if unit == "pixel" else patch)
    if unit == "superpixel":
        segments = int(squares[0].max()) + 1 if segments is None else segments
    else:
        steps = min(steps, int(squares.max()) + 1)

    def cut(clip):
        return superpixels(clip, segments, segments_per) if unit == "superpixel" else squares

    device = device_of(model, clips.device)
    with frozen(model), torch.no_grad():
        index = torch.empty(len(metrics), len(maps), len(clips), steps + 1, dtype=torch.long)
        clips = clips.clone() if clips.is_inference() else clips
        targets, score = check_targets(targets, len(clips), device), named_score(score)
        check_model(model, clips[:1].to(device), targets, score, together=batch_size)
        rank, nothing = partial(unit_ranks, rank_by=rank_by), removals.named(baseline).nothing
        shown = _shown(clips, maps.values(), targets, metrics, cut, rank, nothing, index)
        most = index.numel()
        bar = tqdm(shown, desc="curves", total=most, disable=not progress, leave=False)
        phi = _watch(model, bar, batch_size, score).to(clips.device)
    require(bool(torch.isfinite(phi).all()), "model", "NaN on a perturbed clip", "finite logits")
    share = torch.arange(steps + 1) / steps
    return [[Curve(auc(curve, rule), curve, share) for curve in of_map] for of_map in phi[index]]


def _shown(clips, maps, targets, metrics, cut, rank, nothing, index) -> Iterator:
    """Yield every perturbed clip (3, T, H, W) with its target, but none twice.

    Fills ``index`` (metrics, M, N, L+1): which of them each point of each curve is.
    """
    device, L, number = targets.device, index.shape[3] - 1, count()
    for n in range(len(clips)):
        clip, labels = clips[n].to(device), cut(clips[n])
        empty, places = nothing(clip[None])[0], labels.to(device)
        ranks = [rank(given[n].cpu(), labels) for given in maps]
        known = {}  # by a digest of the units that are present: pixels are many
        for (m, ranked), (i, metric) in product(enumerate(ranks), enumerate(metrics)):
            operation, order = metric
            alone = (operation == "insertion") == (order == "morf")  # else: all but the highest
            for step in range(L + 1):
                present = (ranked < step * len(ranked) // L) == alone  # (U,)
                key = blake2b(np.packbits(present.numpy())).digest()
                if key not in known:
                    known[key] = next(number)
                    yield torch.where(present.to(device)[places], clip, empty), targets[n]
                index[i, m, n, step if order == "morf" else L - step] = known[key]


def _watch(model: nn.Module, shown: Iterable, batch_size: int, score: Score) -> Tensor:
    """Return Φ_c of each (clip, target); a batch may mix clips, methods and metrics."""
    shown, phi = iter(shown), []
    while batch := tuple(islice(shown, batch_size)):
        clips, targets = map(torch.stack, zip(*batch, strict=True))
        phi.append(score(model(clips), targets).float())
    return torch.cat(phi)


def _patch(size: Sequence[int]) -> int:
    """Return the side of the paper's patch, 7 pixels at 112, for frames of another size."""
    return max(1, round(7 * min(size[1:]) / 112))


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
