"""STEP, spatio-temporal extremal perturbations (paper §III): masks by optimisation.

For each preserved share v, the mask that keeps the network sure of the class:

    M_v = argmin λ1·L_S(M) + λ2·L_K(M) − Φ_c(M⊗X)                                        (Eq. 11)

L_S holds the mask's area at v, L_K makes it hang together in space and time (both in `masks`); ⊗
removes what the mask does not keep (`stepkit.removal`). All areas of all clips of a batch are
optimised side by side.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _checks
from stepkit import removal as removals
from stepkit._checks import clips as check_clips
from stepkit._checks import in_proportion, one_of, require, warn
from stepkit._checks import targets as check_targets
from stepkit._compiling import PAYS, compiled, fused, uncompiled_if, worth_it
from stepkit.attribution._methods import Work, method
from stepkit.attribution.smoothmax import (
    MaskGeometry,
    area_loss,
    core_kernel,
    core_loss,
    kernel_length,
    random_masks,
)
from stepkit.models import batch_that_fits, check_model, device_of, frozen, precision_of, uncompiled
from stepkit.models.scores import PROBABILITY, Read, Score
from stepkit.models.scores import named as named_score
from stepkit.removal import Removal, gaussian_blur, read

FULL_RUN = 1200  # iterations of the released code, for which the weights below were set
FULL_SEEDS = 16 * 16 * 16  # seed cells of the paper's 16×112×112 clip
RANDOM_MASKS = 4  # to compare each mask with
LEAST_GAIN = 0.02  # of probability; of other scores, relative to the clip's


@dataclass(frozen=True)
class Settings:
    """What STEP can be told; lengths of None follow the clip's size.

    Attributes
    ----------
    areas : tuple of float
        Preserved shares v, of the canvas.
    iterations : int
        Steps of the optimiser. The schedules of the weights stretch with it, and SGD's learning
        rate with its inverse, so that the path is the same length.
    optimiser : str
        ``"sgd"`` (the released code's) or ``"adam"``, which gets there in a twentieth of the steps.
    learning_rate : float
        Of SGD, for 1200 iterations; Adam takes it as it is.
    momentum, dampening : float
        Of SGD.
    area_weight, area_growth, core_weight : float
        λ1, the factor by which it has grown at the end, λ2. They count per seed cell: on a clip
        with fewer cells each is pushed as hard as on the paper's 16×112×112 (SPEC §9).
    core_start : float
        λ2 is 0 for this share of the iterations.
    kernel_length, kernel_size : int or None
        T_K (0: no L_K) and H_K = W_K; by default 8 and 11 at 16×112×112, in proportion. T_K
        is at least 3 and H_K at least 5, or the clip's: smaller ellipsoids are poles with no body.
    kernel_shape : str
        ``"ellipsoid"`` or ``"cylinder"``.
    core_form : str
        L_K as ``"printed"`` or as ``"released"``, see `masks.core_loss`.
    reward : str or None
        ``"probability"`` for Φ_c, ``"log"`` for log Φ_c; by default the former, and the latter for
        the deletion variant: it begins with everything deleted, where Φ_c has no slope left. A
        score that is no probability has no logarithm, and is rewarded by what it is, in units of
        what removing the whole clip takes of it.
    removal : str or Removal
        What stands where the mask is 0.
    on_canvas : bool
        Area terms on the padded canvas, or on the visible mask only.
    variant : str
        ``"preservation"``: M⊗X keeps the class. ``"deletion"``: (1−M)⊗X loses it. ``"dual"``: both.
        Deletion goes best with ``removal="fade"``: on the blur ladder a faint mask everywhere
        already takes the finest texture away everywhere.
    step, sigma : int or None
        Of the mask generator, see `MaskGeometry`; by default 7 and 11 at 112×112, in proportion.
    """

    areas: Sequence[float] = (0.05, 0.10, 0.15, 0.20)
    iterations: int = FULL_RUN
    optimiser: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    dampening: float = 0.9
    area_weight: float = 300.0
    area_growth: float = 1.0008668**FULL_RUN
    core_weight: float = 300.0
    core_start: float = 101 / FULL_RUN
    kernel_length: int | None = None
    kernel_size: int | None = None
    kernel_shape: str = "ellipsoid"
    core_form: str = "printed"
    reward: str | None = None
    removal: str | Removal = "blur"
    on_canvas: bool = True
    variant: str = "preservation"
    step: int | None = None
    sigma: int | None = None

    def __post_init__(self):
        given = isinstance(self.areas, Iterable)
        require(given, "areas", self.areas, "rising shares between 0 and 1")
        areas = tuple(self.areas)
        ordered = all(0 < v < 1 for v in areas) and list(areas) == sorted(set(areas))
        require(len(areas) > 0 and ordered, "areas", self.areas, "rising shares between 0 and 1")
        object.__setattr__(self, "areas", areas)
        require(self.iterations is not None, "iterations", None, "a whole number, at least 1")
        lengths = ("kernel_length", 0), ("kernel_size", 1), ("step", 1), ("sigma", 1)
        for name, least in (("iterations", 1), *lengths):
            value = getattr(self, name)
            fits = value is None or (type(value) is int and value >= least)
            require(fits, name, value, f"a whole number, at least {least}")
        for name in ("learning_rate", "area_growth"):
            require(_real(getattr(self, name), above=0), name, getattr(self, name), "more than 0")
        for name in ("area_weight", "core_weight"):
            require(_real(getattr(self, name)), name, getattr(self, name), "at least 0")
        for name in ("momentum", "dampening", "core_start"):
            value = getattr(self, name)
            require(_real(value) and value <= 1, name, value, "between 0 and 1")
        one_of("optimiser", self.optimiser, ("sgd", "adam"))
        one_of("kernel_shape", self.kernel_shape, ("ellipsoid", "cylinder"))
        one_of("core_form", self.core_form, ("printed", "released"))
        one_of("reward", self.reward, (None, "probability", "log"))
        one_of("variant", self.variant, ("preservation", "deletion", "dual"))
        object.__setattr__(self, "removal", removals.named(self.removal))


def _real(value, above: float | None = None) -> bool:
    """Whether ``value`` is a finite number of at least 0, or of more than ``above``."""
    number = isinstance(value, int | float) and math.isfinite(value)
    return number and (value >= 0 if above is None else value > above)


PRESETS = {
    "default": Settings(),
    "printed": Settings(removal=removals.blur(levels=2), on_canvas=False),
    "released": Settings(areas=(0.05, 0.10, 0.15, 0.50), reward="log", core_form="released"),
    "fast": Settings(iterations=60, optimiser="adam", learning_rate=0.1, reward="log"),
}


@dataclass(frozen=True, repr=False)
class StepResult:
    """What STEP found.

    Attributes
    ----------
    masks : Tensor
        float32 (N, A, T, H, W) in [0, 1], nearly binary.
    areas : tuple of float
        The A preserved shares v that were asked for.
    probabilities : Tensor
        (N, A), Φ_c, or another score, of M⊗X; of (1−M)⊗X for the deletion variant.
    clip_probability : Tensor
        (N,), that of the whole clip.
    random_probabilities : Tensor
        (N, A), that of random masks with as many visible pixels, on average. A mask that does not
        beat them says nothing; where none of a clip's does, there is a warning. NaN where the
        optimisation was interrupted.
    visible_share : Tensor
        (N, A), mean of the visible mask; differs from v because v counts the padded canvas.
    history : DataFrame
        ``clip, area, iteration, probability, area_loss, core_loss``.
    settings : Settings
        All that was used, lengths filled in.
    score : Score
        What the masks keep.
    interrupted : bool
        Ctrl-C came before the last iteration. The masks are those reached; clips of batches that
        had not begun are left out.
    precision, device : str
        In what and where the model ran.
    """

    masks: Tensor
    areas: tuple[float, ...]
    probabilities: Tensor
    clip_probability: Tensor
    random_probabilities: Tensor
    visible_share: Tensor
    history: pd.DataFrame
    settings: Settings
    score: Score
    interrupted: bool
    precision: str
    device: str

    def __repr__(self):
        n, _, *size = self.masks.shape
        done = self.history["iteration"].nunique()
        phi = ", ".join(
            f"{area:.3g}: {values.mean():.2f}"
            for area, values in zip(self.areas, self.probabilities.T, strict=True)
        )
        return (
            f"StepResult of {n} clips {tuple(size)} after {done} iterations, {self.precision} on "
            f"{self.device}; mean probability of the clip: {self.clip_probability.mean():.2f}, by "
            f"area: {phi}"
        )

    @property
    def heatmap(self) -> Tensor:
        """The masks summed over areas, blurred with σ = 10 px at 112 (§V-A.3); (N, T, H, W)."""
        return heatmap(self.masks)

    def smallest(self, phi0: float) -> tuple[Tensor, Tensor]:
        """Return the smallest area that is enough, and its mask (Eq. 4).

        v* = min{v : Φ_c(M_v⊗X) ≥ Φ0}; for the deletion variant, Φ_c((1−M_v)⊗X) ≤ Φ0.

        Parameters
        ----------
        phi0 : float
            The probability Φ0 that has to be reached, in (0, 1); any number for other scores.

        Returns
        -------
        area : Tensor
            (N,), v*; NaN where no area is enough.
        mask : Tensor
            (N, T, H, W), M_v*; NaN where no area is enough.
        """
        known = 0 < phi0 < 1 or self.score.log is None
        require(known, "phi0", phi0, "a probability between 0 and 1")
        deletion = self.settings.variant == "deletion"
        enough = self.probabilities <= phi0 if deletion else self.probabilities >= phi0
        first = enough.int().argmax(1)
        found = enough.any(1)
        area = torch.tensor(self.areas)[first.cpu()].to(self.masks)
        mask = self.masks[torch.arange(len(first)), first]
        nan = float("nan")
        return area.where(found, nan), mask.where(found[:, None, None, None], nan)


def heatmap(masks: Tensor) -> Tensor:
    """Turn masks (N, A, T, H, W) into one attribution map (N, T, H, W): sum, then blur (§V-A.3)."""
    return gaussian_blur(masks.sum(1), in_proportion(10, masks.shape), edge="reflect")


def step(
    model: nn.Module,
    clips: Tensor,
    targets,
    preset: str = "default",
    *,
    score: Score | str | Read = PROBABILITY,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
    **options,
) -> StepResult:
    """Explain clips by STEP (Eq. 11).

    Parameters
    ----------
    model : nn.Module
        Clips (N, 3, T, H, W) to logits (N, K); left as it was.
    clips : Tensor
        float32 (N, 3, T, H, W), normalised.
    targets : Tensor or int
        Class indices (N,).
    preset : str
        ``"default"``: as printed where the paper prints, as released where it is silent, and the
        8-level blur. ``"printed"``: also the two-level blur and the visible mask. ``"released"``:
        as the authors' code. ``"fast"``: 60 steps of Adam, with log Φ_c, which
        still has a slope where large steps have lost the class.
    score : str, Score or callable
        What the masks keep: by default Φ_c, the softmax probability of the target; see
        `stepkit.models.scores`.
    batch_size : int, optional
        Clips optimised side by side; bounds the memory, does not change the result. By default 4,
        and on a CUDA device as many as its free memory takes.
    progress : bool
        Show a bar.
    callback : callable, optional
        Called in every iteration, before the masks move, with the number of iterations done, the
        masks so far (n, A, T, H, W) and their Φ_c (n, A), of the n clips at work. If it returns
        True, the optimisation ends as with Ctrl-C.
    **options
        Fields of `Settings`, which replace the preset's: ``areas=``, ``iterations=``,
        ``kernel_length=``, ``kernel_shape=``, ``variant=``, ...

    Returns
    -------
    StepResult
        ``.masks .probabilities .visible_share .history .heatmap .smallest(phi0)``. Ctrl-C ends the
        optimisation early and returns what there is. STEP draws no random numbers.

    Raises
    ------
    TypeError, ValueError
        Unknown preset or option; a value out of range; clips, targets or a model that do not fit;
        a model through which no gradient flows, or that returns NaN on the way.

    Examples
    --------
    >>> from stepkit.networks import load_model
    >>> model = load_model("r2plus1d_narrow", num_classes=6)
    >>> found = step(model, torch.randn(1, 3, 8, 48, 48), 2, iterations=2)
    >>> found.masks.shape
    torch.Size([1, 4, 8, 48, 48])
    """
    _checks.model(model)
    check_clips(clips)
    given = batch_size is None or (isinstance(batch_size, int) and batch_size >= 1)
    require(given, "batch_size", batch_size, "at least 1")
    settings, score = _settings(preset, options, clips.shape[2:]), named_score(score)
    bar = partial(tqdm, disable=not progress, leave=False)
    return _explain(model, clips.detach(), targets, settings, score, batch_size, bar, callback)


def _explain(
    model, clips, targets, settings: Settings, score: Score, batch_size, bar, callback=None
) -> StepResult:
    """Return what `step` does, of arguments that have been checked."""
    device = device_of(model, clips.device)
    with frozen(model), torch.enable_grad():
        clips = clips.clone() if clips.is_inference() else clips
        targets = check_targets(targets, len(clips), device)
        first = clips[:1].to(device), targets, score
        check_model(model, *first, gradient=True)
        if batch_size is None:
            batch_size = 4
            if device.type == "cuda":
                one = first[0], targets[:1], replace(settings, iterations=1), score
                with uncompiled(model), uncompiled_if(True):
                    batch_size = batch_that_fits(lambda: _optimise(model, *one, Work().bar), device)
        parts = []
        for start in range(0, len(clips), batch_size):
            chunk = slice(start, start + batch_size)
            # a copy: the model may write into it
            shown = clips[chunk].to(device, copy=True), targets[chunk]
            passes = len(shown[0]) * len(settings.areas) * settings.iterations
            with uncompiled_if(passes < PAYS):
                parts.append(_optimise(model, *shown, settings, score, bar, callback))
            if parts[-1][-1]:  # interrupted
                break
    *found, histories, stopped = zip(*parts, strict=True)
    masks, kept, of_clips, chance = (torch.cat(values).to(clips.device) for values in found)
    result = StepResult(
        masks=masks,
        areas=settings.areas,
        probabilities=kept,
        clip_probability=of_clips,
        random_probabilities=chance,
        visible_share=masks.mean((2, 3, 4)),
        history=_history(histories, settings),
        settings=settings,
        score=score,
        interrupted=any(stopped),
        precision=precision_of(model, clips.dtype),
        device=str(device),
    )
    if not result.interrupted:
        _warn_worthless(result)
    return result


FIELDS = tuple(Settings.__dataclass_fields__)
_method = partial(
    method,
    family="perturbation",
    resolution="disc of about 11 px at 112, frame",
    needs_gradient=True,
    whole=True,
)


def _filled(options: dict, size) -> dict:
    preset = options.pop("preset", "default")
    return {"settings": _settings(preset, options, size)}


@_method(
    "step",
    order=24,
    label="STEP",
    source="Eqs. 1-11; Li 2021",
    options=("preset", *FIELDS),
    fill=_filled,
)
def _step(model: nn.Module, clips: Tensor, targets: Tensor, work: Work, **options) -> dict:
    """Return what `step` finds; its heatmap is the map."""
    settings = _filled(options, clips.shape[2:])["settings"]
    found = _explain(model, clips, targets, settings, work.score, work.batch_size, work.bar)
    if found.interrupted:  # a map does not tell that it is half done; StepResult does
        raise KeyboardInterrupt
    names = "masks", "probabilities", "clip_probability", "random_probabilities", "visible_share"
    return {"maps": found.heatmap} | {name: getattr(found, name) for name in names}


@_method(
    "extremal_perturbation",
    order=23,
    label="Extremal Perturbation",
    source="Eq. 5; Fong 2019",
    options=("preset", *(name for name in FIELDS if not name.startswith(("kernel", "core")))),
    fill=lambda options, size: _filled(options | {"kernel_length": 0}, size),
)
def extremal_perturbation(model, clips: Tensor, targets: Tensor, work: Work, **options) -> dict:
    """Extremal Perturbation (Fong, Patrick, Vedaldi 2019): STEP without L_K, Eq. 5; (N, T, H, W).

    The map is STEP's, the masks of all areas added up and blurred.

    Parameters
    ----------
    **options
        Those of `step` that do not concern L_K: ``areas=``, ``iterations=``, ``variant=``, ...
    """
    return _step(model, clips, targets, work, **options, kernel_length=0)


def _warn_worthless(found: StepResult) -> None:
    """Warn of clips of which no mask does better than random ones."""
    gain = found.probabilities - found.random_probabilities
    gain = -gain if found.settings.variant == "deletion" else gain
    clip = found.clip_probability[:, None]
    least = LEAST_GAIN if found.score.log else LEAST_GAIN * clip.abs()
    clips = (gain < least).all(1).nonzero()[:, 0].tolist()
    if clips:
        whole, chance = clip[clips[0]].item(), found.random_probabilities[clips[0]].max().item()
        warn(
            f"step: no mask of clips {clips} does better than random masks of its area by "
            f"{LEAST_GAIN} or more (clip {clips[0]}: {found.score.name} {whole:.2f} of the whole, "
            f"up to {chance:.2f} of random masks); what they show is no evidence"
        )


def _settings(preset: str, options: dict, size) -> Settings:
    """Return the preset with ``options`` in it, and with what follows from them and the size."""
    one_of("preset", preset, PRESETS)
    names = [field.name for field in fields(Settings)]
    for name in options:
        one_of("option", name, names)
    chosen = replace(PRESETS[preset], **options)
    frames, height, width = size
    scaled = MaskGeometry.scaled(height, width)
    size = min(height, width, max(5, round(in_proportion(11, size))))
    implied = {
        "kernel_length": kernel_length(8, frames),
        "kernel_size": size - (size + 1) % 2,  # odd: an even ellipsoid has no poles
        "step": scaled.step,
        "sigma": scaled.sigma,
        "reward": "log" if chosen.variant == "deletion" else "probability",
    }
    return replace(
        chosen,
        **{name: value for name, value in implied.items() if getattr(chosen, name) is None},
    )


def _optimise(
    model, clips: Tensor, targets: Tensor, settings: Settings, score: Score, bar, callback=None
):
    """Optimise all areas of a few clips.

    Returns masks (n, A, T, H, W), their score (n, A), that of the clips (n,) and of random masks
    (n, A), history (iterations, 3, n, A), interrupted.
    """
    n, A, frames = len(clips), len(settings.areas), clips.shape[2]
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    ladder = settings.removal.ladder(clips)
    unit = score.unit(model, clips, settings.removal.nothing(clips), targets)
    objective = _Objective(settings, geometry, clips, score, unit)
    each = targets.repeat_interleave(A)
    network = compiled(model) if worth_it(clips) and getattr(model, "compiles", False) else model
    seeds = clips.new_ones(n, A, frames, *geometry.seeds, requires_grad=True)
    optimiser = _optimiser(settings, seeds)
    history = clips.new_zeros(settings.iterations, 3, n, A)
    done, interrupted = 0, False
    try:
        for done in bar(range(settings.iterations), desc="STEP"):
            canvas = geometry.spread(seeds)
            masks = geometry.crop(canvas)
            scores = _scores(network, ladder, masks, each, settings.variant, score)
            if callback is not None:
                phi = objective.values(scores)[0].detach().view(n, A)
                if callback(done, masks.detach(), phi):
                    raise KeyboardInterrupt
            energy, terms = objective(scores, canvas, done / settings.iterations)
            optimiser.zero_grad()
            energy.backward()
            optimiser.step()
            with torch.no_grad():
                seeds.clamp_(0, 1)
            history[done] = terms
        done = settings.iterations
    except KeyboardInterrupt:
        interrupted = True
    with torch.no_grad(), uncompiled_if(True):  # programs without a gradient would be others
        masks = geometry.crop(geometry.spread(seeds.detach())).contiguous()

        def seen(masks):
            found = _scores(model, ladder, masks, each, settings.variant, score)
            return objective.values(found)[0].view(n, A)

        phi, whole = seen(masks), score(model(clips), targets).to(clips)
        draws = 0 if interrupted else RANDOM_MASKS
        chance = [seen(random_masks(masks, seed)) for seed in range(draws)]
        chance = chance or [torch.full_like(phi, math.nan)]
    finite = bool(torch.isfinite(phi).all()) and bool(torch.isfinite(masks).all())
    require(finite, "model", "NaN during the optimisation", "finite logits and gradients")
    return masks, phi, whole, torch.stack(chance).mean(0), history[:done].cpu(), interrupted


def _optimiser(settings: Settings, seeds: Tensor) -> torch.optim.Optimizer:
    if settings.optimiser == "adam":
        return torch.optim.Adam([seeds], settings.learning_rate)
    rate = settings.learning_rate * FULL_RUN / settings.iterations
    return torch.optim.SGD([seeds], rate, momentum=settings.momentum, dampening=settings.dampening)


def _scores(model, ladder, masks, targets, variant, score: Score) -> list[Tensor]:
    """Return log Φ_c (another score as it is), flat (N·A,), of what the variant looks at.

    One tensor; for ``"dual"`` two, what is kept first.
    """
    views = {"preservation": [masks], "deletion": [1 - masks], "dual": [masks, 1 - masks]}[variant]
    kept = torch.cat([fused(read, view)(ladder, view).flatten(0, 1) for view in views])
    found = (score.log or score.value)(model(kept), targets.repeat(len(views)))
    return list(found.to(masks).chunk(len(views)))


class _Objective:
    """Eq. 11 for all clips and areas at once."""

    def __init__(
        self, settings: Settings, geometry: MaskGeometry, clips: Tensor, score: Score, unit: Tensor
    ):
        self.settings, self.geometry, self.logs = settings, geometry, score.log is not None
        self.unit = None if self.logs else unit.repeat_interleave(len(settings.areas))
        frames = clips.shape[2]
        cells = frames * math.prod(geometry.seeds)
        self.balance = cells / FULL_SEEDS
        self.kernel = None
        if settings.kernel_length:
            kernel = core_kernel(
                settings.kernel_length, settings.kernel_size, settings.kernel_shape
            )
            self.kernel = kernel.to(clips)

    def values(self, scores: list[Tensor]) -> list[Tensor]:
        """Return Φ_c from its logarithm; other scores are themselves."""
        return [score.exp() for score in scores] if self.logs else scores

    def __call__(self, scores: list[Tensor], canvas: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Return the energy summed over clips and areas, and its terms (3, n, A) for the record.

        ``scores`` are those of `_scores`; ``time`` in [0, 1) is the share of the iterations done.
        """
        s = self.settings
        mask = canvas if s.on_canvas else self.geometry.crop(canvas)
        area = area_loss(mask, s.areas)
        lambda1 = self.balance * s.area_weight * s.area_growth**time
        energy = lambda1 * area.sum()
        core = torch.zeros_like(area)
        if self.kernel is not None:
            core = core_loss(mask, s.areas, self.kernel, s.core_form)
            if time >= s.core_start:
                energy = energy + self.balance * s.core_weight * core.sum()
        phi = self.values(scores)
        rewards = scores if s.reward == "log" else phi
        if not self.logs:
            rewards = [score / self.unit for score in scores]
        kept = rewards[0] if s.variant != "deletion" else -rewards[0]
        energy = energy - kept.sum() + (rewards[1].sum() if s.variant == "dual" else 0)
        return energy, torch.stack([phi[0].view_as(area), area, core]).detach()


def _history(parts, settings: Settings) -> pd.DataFrame:
    """Stack histories (iterations, 3, n, A) of several batches into one long table."""
    tables, clip = [], 0
    for part in parts:
        done, _, n, _ = part.shape
        index = pd.MultiIndex.from_product(
            [range(done), range(clip, clip + n), settings.areas],
            names=["iteration", "clip", "area"],
        )
        columns = ["probability", "area_loss", "core_loss"]
        values = part.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
        tables.append(pd.DataFrame(values, index, columns).reset_index())
        clip += n
    return pd.concat(tables, ignore_index=True)
