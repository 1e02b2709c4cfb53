"""STEP, spatio-temporal extremal perturbations (paper §III): masks by optimisation.

For each preserved share v, the mask that keeps the network sure of the class:

    M_v = argmin λ1·L_S(M) + λ2·L_K(M) − Φ_c(M⊗X)                                        (Eq. 11)

L_S holds the mask's area at v, L_K makes it hang together in space and time (see `objective`); ⊗
removes what the mask does not keep (`stepkit.removal`). All areas of all clips of a batch are
optimised side by side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from stepkit._checks import clips as check_clips
from stepkit._checks import in_proportion, require, warn
from stepkit._checks import model as check_net
from stepkit._checks import targets as check_targets
from stepkit._compiling import PAYS, compiled, uncompiled_if, worth_it
from stepkit.attribution._door import results
from stepkit.attribution._methods import METHODS, Work, method
from stepkit.attribution.objective import Objective
from stepkit.attribution.settings import FULL_RUN, Settings, settings_for
from stepkit.attribution.smoothmax import MaskGeometry, random_masks
from stepkit.models import batch_that_fits, device_of, frozen, precision_of, uncompiled
from stepkit.models.scores import PROBABILITY, Read, Score
from stepkit.models.scores import named as named_score
from stepkit.removal import gaussian_blur

__all__ = ["StepResult", "filled", "heatmap", "optimised", "step", "step_map", "warn_worthless"]

RANDOM_MASKS = 4  # to compare each mask with
LEAST_GAIN = 0.02  # of probability; of other scores, relative to the clip's


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
        phi = zip(self.areas, self.probabilities.mean(0).tolist(), strict=True)
        return (
            f"StepResult of {n} clips {tuple(size)} after {self.history['iteration'].nunique()} "
            f"iterations, {self.precision} on {self.device}; mean probability of the clip: "
            f"{self.clip_probability.mean():.2f}, by area: "
            + ", ".join(f"{area:.3g}: {value:.2f}" for area, value in phi)
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
    settings = settings_for(preset, options, check_clips(clips).shape[2:])
    if batch_size is None:
        batch_size = _batch_size(check_net(model), clips, targets, settings, score)
    parts = []

    def run(*given):
        parts.append(optimised(*given, settings, callback))
        if parts[-1]["interrupted"].any():
            raise KeyboardInterrupt
        return parts[-1] | {"maps": parts[-1]["masks"].sum(1)}

    review = lambda *given: warn_worthless(*given[:2], options)  # noqa: E731
    row = replace(METHODS["step"], run=run, review=review)
    given = {"score": score, "batch_size": batch_size, "progress": progress}
    try:
        results(row, model, clips, targets, **given)
    except KeyboardInterrupt:
        if not parts or not parts[-1]["interrupted"].any():
            raise
    found = {name: torch.cat([part[name] for part in parts]).to(clips.device) for name in parts[0]}
    return StepResult(
        areas=settings.areas,
        settings=settings,
        score=named_score(score),
        precision=precision_of(model, clips.dtype),
        device=str(device_of(model, clips.device)),
        history=_history(found.pop("history"), settings.areas),
        interrupted=bool(found.pop("interrupted").any()),
        **found,
    )


def warn_worthless(found: dict[str, Tensor], score: Score, options: dict) -> None:
    """Warn of clips of which no mask does better than random ones."""
    gain = found["probabilities"] - found["random_probabilities"]
    gain = -gain if options.get("variant") == "deletion" else gain
    clip = found["clip_probability"][:, None]
    least = LEAST_GAIN if score.log else LEAST_GAIN * clip.abs()
    clips = (gain < least).all(1).nonzero()[:, 0].tolist()
    if clips:
        whole, chance = clip[clips[0]].item(), found["random_probabilities"][clips[0]].max().item()
        warn(
            f"step: no mask of clips {clips} does better than random masks of its area by "
            f"{LEAST_GAIN} or more (clip {clips[0]}: {score.name} {whole:.2f} of the whole, "
            f"up to {chance:.2f} of random masks); what they show is no evidence"
        )


discs = partial(
    method,
    family="perturbation",
    resolution="disc of about 11 px at 112, frame",
    needs_gradient=True,
    optimises=True,
    review=warn_worthless,
)
OPTIONS = ("preset", *Settings.__dataclass_fields__)


def filled(options: dict, size) -> dict:
    """Return the settings that options of "step" come to."""
    return {"settings": settings_for(options.pop("preset", "default"), options, size)}


@discs("step", order=24, label="STEP", source="Eqs. 1-11; Li 2021", options=OPTIONS, fill=filled)
def step_map(model, clips, targets, work, **options) -> dict:
    """Return what `step` finds; its heatmap is the map."""
    found = optimised(model, clips, targets, work, **filled(options, clips.shape[2:]))
    if found.pop("interrupted").any():  # a map does not tell that it is half done
        raise KeyboardInterrupt
    found.pop("history")
    return {"maps": heatmap(found["masks"])} | found


def _batch_size(model, clips: Tensor, targets, settings: Settings, score) -> int:
    """Return how many clips to optimise side by side: 4, or as many as a GPU's memory takes."""
    device = device_of(model, clips.device)
    if device.type != "cuda":
        return 4
    once, work = replace(settings, iterations=1), Work(named_score(score))
    one = clips[:1].detach().to(device), check_targets(targets, len(clips), device)[:1], work, once
    with frozen(model), uncompiled(model):
        return batch_that_fits(lambda: optimised(model, *one), device)


@torch.enable_grad()
def optimised(model, clips, targets, work: Work, settings: Settings, callback=None) -> dict:
    """Optimise all areas of n clips side by side.

    Returns the tensors of a `StepResult`, ``"history"`` (n, iterations, 3, A), NaN where it was
    interrupted, and ``"interrupted"`` (n,).
    """
    with uncompiled_if(len(clips) * len(settings.areas) * settings.iterations < PAYS):
        return _optimise(model, clips, targets, work, settings, callback)


def _optimise(model, clips, targets, work: Work, settings: Settings, callback) -> dict:
    shape, interrupted = (len(clips), len(settings.areas)), False
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    network = compiled(model) if worth_it(clips) and getattr(model, "compiles", False) else model
    objective = Objective(network, clips, targets, settings, work.score, geometry)
    seeds = clips.new_ones(*shape, clips.shape[2], *geometry.seeds, requires_grad=True)
    optimiser = _optimiser(settings, seeds)
    history = clips.new_full((settings.iterations, 3, *shape), math.nan)
    try:
        for done in work.bar(range(settings.iterations), desc="STEP"):
            canvas = geometry.spread(seeds)
            energy, terms = objective(canvas, done / settings.iterations)
            if callback and callback(done, geometry.crop(canvas).detach(), terms[0]):
                raise KeyboardInterrupt
            (seeds.grad,) = torch.autograd.grad(energy, seeds)
            optimiser.step()
            with torch.no_grad():
                seeds.clamp_(0, 1)
            history[done] = terms
    except KeyboardInterrupt:
        interrupted = True
    objective.model = model
    with torch.no_grad(), uncompiled_if(True):  # programs without a gradient would be others
        masks = geometry.crop(geometry.spread(seeds)).contiguous()
        tried = [masks, *(random_masks(masks, seed) for seed in range(RANDOM_MASKS))]
        tried = tried[:1] if interrupted else tried
        phi, *chance = (objective.values(objective.scores(each))[0] for each in tried)
        whole = work.score(model(clips), targets).to(clips)
    finite = bool(torch.isfinite(phi).all()) and bool(torch.isfinite(masks).all())
    require(finite, "model", "NaN during the optimisation", "finite logits and gradients")
    return {
        "masks": masks,
        "probabilities": phi,
        "clip_probability": whole,
        "random_probabilities": sum(chance) / len(chance) if chance else phi * math.nan,
        "visible_share": masks.mean((2, 3, 4)),
        "history": history.permute(2, 0, 1, 3),
        "interrupted": torch.full_like(whole, interrupted, dtype=torch.bool),
    }


def _optimiser(settings: Settings, seeds: Tensor) -> torch.optim.Optimizer:
    if settings.optimiser == "adam":
        return torch.optim.Adam([seeds], settings.learning_rate)
    rate = settings.learning_rate * FULL_RUN / settings.iterations
    return torch.optim.SGD([seeds], rate, momentum=settings.momentum, dampening=settings.dampening)


def _history(values: Tensor, areas) -> pd.DataFrame:
    """Turn histories (N, iterations, 3, A) into one long table."""
    counts = (range(n) for n in values.shape[:2])
    index = pd.MultiIndex.from_product([*counts, areas], names=["clip", "iteration", "area"])
    columns = ["probability", "area_loss", "core_loss"]
    table = pd.DataFrame(values.transpose(2, 3).reshape(-1, 3).cpu().numpy(), index, columns)
    return table.dropna().reset_index()  # without what was interrupted
