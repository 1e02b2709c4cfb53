"""Attribution methods, all behind one door: `attribute`."""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _checks
from stepkit._checks import clips as check_clips
from stepkit._checks import one_of, require
from stepkit._checks import targets as check_targets
from stepkit.attribution.backprop import deconvnet, deeplift, guided_backprop
from stepkit.attribution.cam import cam, grad_cam, grad_cam_pp, score_cam
from stepkit.attribution.excitation import excitation_backprop, lrp
from stepkit.attribution.gradients import (
    blur_ig,
    gradient,
    gradient_x_input,
    integrated_gradients,
    smoothgrad,
    smoothgrad_squared,
)
from stepkit.attribution.occlusion import lime, occlusion, rise
from stepkit.attribution.optimised import (
    EXTREMAL_OPTIONS,
    extremal_perturbation,
    fg_vis,
    i_gos,
    meaningful_perturbation,
)
from stepkit.attribution.step import (
    PRESETS,
    Settings,
    StepResult,
    _settings,
    heatmap,
    step,
)
from stepkit.attribution.xrai import xrai
from stepkit.models import check_model, device_of, frozen, inside, meet, uncompiled
from stepkit.models.scores import PROBABILITY, Read, Score
from stepkit.models.scores import named as named_score

__all__ = ["PRESETS", "Settings", "StepResult", "attribute", "heatmap", "methods", "step"]


TRIED = Path(__file__).with_name("tried.csv")
BLANK = "the same everywhere"  # of a map: nothing is more important than anything else


@dataclass(frozen=True)
class Method:
    """A row of `methods`: how to run it, and what a reader wants to know of it."""

    run: Callable[..., Tensor]
    label: str
    family: str
    needs: str
    source: str
    resolution: str


def attribute(
    method: str,
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
    method : str
        An id, such as ``"grad_cam"`` or ``"step"``.
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
    maps = quietly(method, model, clips, targets, **given, **options)
    blank = [i for i, values in enumerate(maps) if is_blank(values)]
    if blank:
        _checks.warn(f"{method}: the map of clips {blank} is {BLANK}")
    return maps


def is_blank(values: Tensor) -> bool:
    """Tell whether a map is constant: no gradient is left of a probability of exactly 0 or 1."""
    low, high = values.aminmax()
    return values.numel() > 1 and bool(low == high)


def quietly(
    method: str,
    model: nn.Module,
    clips: Tensor,
    targets,
    *,
    score: Score | str | Read = PROBABILITY,
    batch_size: int,
    progress: bool,
    seed: int | Sequence[int],
    **options,
) -> Tensor:
    """Return what `attribute` does, without its warning."""
    one_of("method", method, _METHODS)
    given = {"score": named_score(score), "batch_size": batch_size, "progress": progress}
    if method == "step":
        found = step(model, clips, targets, **given, **options)
        if found.interrupted:  # a map does not tell that it is half done; StepResult does
            raise KeyboardInterrupt
        return found.heatmap
    if method == "extremal_perturbation":
        return extremal_perturbation(model, clips, targets, **given, **options)
    run = _METHODS[method].run
    for name in options:
        one_of("option", name, _options(run))
    _checks.model(model)
    clips = check_clips(clips).detach()
    require(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "at least 1")
    seeds = _clip_seeds(seed, len(clips))
    device = device_of(model, clips.device)
    family, needs = _METHODS[method].family, _METHODS[method].needs
    looks = family == "backprop" or "activation" in needs  # at layers, and changes some
    gradient = "gradient" in needs
    if looks:
        inside(model)
    bar = functools.partial(tqdm, disable=not progress, leave=False)
    with frozen(model), uncompiled(model) if looks else contextlib.nullcontext():
        clips = clips.clone() if clips.is_inference() else clips
        targets = check_targets(targets, len(clips), device)
        maps = torch.empty(len(clips), *clips.shape[2:], device=clips.device)
        first = clips[:1].to(device), targets, given["score"]
        meet(model, *first, batch_size)
        if gradient and family == "perturbation":  # masks form without a gradient, too
            check_model(model, *first, gradient=True)
        given = {"seeds": seeds, "batch_size": batch_size, "bar": bar}
        once = _one_pass(model) if looks else contextlib.nullcontext()
        with _watched(model, method, *first, gradient) as given["score"], once:
            wanted = inspect.signature(run).parameters
            given = {name: value for name, value in given.items() if name in wanted}
            for start in bar(range(0, len(clips), batch_size), desc=method):
                chunk = slice(start, start + batch_size)
                if "seeds" in given:
                    given["seeds"] = seeds[chunk]
                part = (
                    clips[chunk].to(device, copy=True),
                    targets[chunk],
                )  # models may write into theirs
                maps[chunk] = run(model, *part, **given, **options).to(maps)
        if gradient and not maps[0].any():  # a rare answer: does any gradient arrive?
            check_model(model, *first, gradient=True)
    require(_checks.finite(maps), "model", f"NaN in {method}", "finite attributions")
    return maps


@contextlib.contextmanager
def _watched(model: nn.Module, method: str, clip: Tensor, targets: Tensor, score: Score, gradient):
    """Yield the score with an eye on what the model returns: no pass of its own is needed.

    The first output is checked as `check_model` does, all are looked at for NaN in the end. Only
    where the method fails is the model tried by itself, as its fault may be the reason.
    """
    finite = []  # on the device: looking at each would wait for it

    def looking(read):
        def call(output, asked):
            if not finite:
                score.tried(output, asked, targets.max())
            found = read(output, asked)
            finite.append(torch.isfinite(found.detach()).all())
            return found

        return read and call

    reads = {name: looking(getattr(score, name)) for name in ("value", "logit", "log")}
    try:
        yield replace(score, **reads)
    except Exception:
        check_model(model, clip, targets, score, gradient)
        raise
    if not finite:
        check_model(model, clip, targets, score, gradient)
        return
    finite = bool(torch.stack(finite).all())
    require(finite, "model", f"NaN or infinity in {method}", "finite outputs")


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


def methods() -> pd.DataFrame:
    """List the methods: Table I, and what a reader wants to know beside it.

    Returns
    -------
    DataFrame
        Indexed by id: ``label``, ``family``, ``needs``, ``source``, and the ``resolution`` that a
        map has by itself, in space and time; found by trying
        (`stepkit.attribution.trial`): the kinds of network that it ``works on``, Table I's
        ``unmodified rule``, ``all networks`` and ``unreduced resolution``, ``forward`` and
        ``backward`` passes per clip with default options; and the method's ``options``.
    """
    rows = {
        name: {column: getattr(m, column) for column in _COLUMNS} for name, m in _METHODS.items()
    }
    options = {name: ", ".join(_options(m.run)) for name, m in _METHODS.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    table = table.join(pd.read_csv(TRIED, index_col="method", keep_default_na=False))
    return table.assign(options=pd.Series(options))


def _options(run) -> list[str]:
    """Return the names of a method's own options."""
    if run is step:
        return ["preset", *Settings.__dataclass_fields__]
    if run is extremal_perturbation:
        return EXTREMAL_OPTIONS
    parameters = inspect.signature(run).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN]


def filled(method: str, options: dict, size) -> dict:
    """Return all options of a method for clips of ``size`` (T, H, W): presets and defaults as well.

    Raises
    ------
    ValueError
        An unknown method or option, or a value that does not fit.
    """
    run, score = runner(method), options.get("score", PROBABILITY)
    own = {name: value for name, value in options.items() if name not in ("score", "callback")}
    if run in (step, extremal_perturbation):
        preset = own.pop("preset", "default")
        own = {"settings": _settings(preset, own, size)}
    else:
        parameters = inspect.signature(run).parameters
        own = {name: parameters[name].default for name in _options(run)} | own
    # a function is named by its code, not as the score that bears its name
    return own | {"score": named_score(score) if isinstance(score, str) else score}


def runner(method: str) -> Callable[..., Tensor]:
    """Return the function behind a method's id."""
    one_of("method", method, _METHODS)
    return _METHODS[method].run


_COLUMNS = ("label", "family", "needs", "source", "resolution")
_GIVEN = ("score", "seeds", "batch_size", "bar")  # from `attribute`, to a method that asks


def _clip_seeds(seed: int | Sequence[int], n: int) -> list[int]:
    """Return a seed per clip, so that neither batches nor workers change what a clip draws."""
    if hasattr(seed, "__index__") and getattr(seed, "ndim", 0) == 0:
        return [(operator.index(seed) * 1_000_003 + i) % 2**63 for i in range(n)]
    many = hasattr(seed, "__len__")
    given = f"{len(seed)} seeds" if many else repr(seed)
    require(many and len(seed) == n, "seed", given, f"one, or one for each of {n} clips")
    return [operator.index(one) for one in seed]


def _random(model, clips: Tensor, targets: Tensor, *, seeds) -> Tensor:
    """Independent normal values per voxel: what every method has to beat."""
    draw = [
        torch.randn(clips.shape[2:], generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(draw)


_METHODS = {  # in the order of Table I
    "random": Method(_random, "Random", "control", "nothing", "§V-B", "pixel, frame"),
    "gradient": Method(
        gradient, "Gradient", "gradient", "gradient", "Eq. 22; Simonyan 2014", "pixel, frame"
    ),
    "integrated_gradients": Method(
        integrated_gradients,
        "Integrated Gradients",
        "gradient",
        "gradient",
        "Eq. 24; Sundararajan 2017",
        "pixel, frame",
    ),
    "smoothgrad": Method(
        smoothgrad, "SmoothGrad", "gradient", "gradient", "Eq. 25; Smilkov 2017", "pixel, frame"
    ),
    "gradient_x_input": Method(
        gradient_x_input,
        "Gradient × Input",
        "gradient",
        "gradient",
        "Eq. 23; Shrikumar 2016",
        "pixel, frame",
    ),
    "deconvnet": Method(
        deconvnet, "DeConvNet", "backprop", "gradient, ReLU", "Zeiler 2014", "pixel, frame"
    ),
    "guided_backprop": Method(
        guided_backprop,
        "Guided BP",
        "backprop",
        "gradient, ReLU",
        "Springenberg 2015",
        "pixel, frame",
    ),
    "lrp": Method(
        lrp, "LRP", "backprop", "gradient, layers with a rule", "Bach 2015", "pixel, frame"
    ),
    "deeplift": Method(
        deeplift, "DeepLIFT", "backprop", "gradient", "Shrikumar 2017", "pixel, frame"
    ),
    "excitation_backprop": Method(
        excitation_backprop,
        "Excitation BP",
        "backprop",
        "activation, gradient, ReLU",
        "§V-B; Zhang 2018, Bargal 2018",
        "cell and step of the layer",
    ),
    "smoothgrad_squared": Method(
        smoothgrad_squared,
        "SmoothGrad-Squared",
        "gradient",
        "gradient",
        "Eq. 26; Hooker 2019",
        "pixel, frame",
    ),
    "xrai": Method(xrai, "XRAI", "gradient", "gradient", "§V-B; Kapishnikov 2019", "supervoxel"),
    "blur_ig": Method(
        blur_ig, "Blur IG", "gradient", "gradient", "Eq. 27; Xu 2020", "pixel, frame"
    ),
    "cam": Method(
        cam,
        "CAM",
        "activation",
        "activation, linear classifier",
        "Zhou 2016",
        "cell and step of the layer",
    ),
    "grad_cam": Method(
        grad_cam,
        "Grad-CAM",
        "activation",
        "activation, gradient",
        "Eq. 28; Selvaraju 2017",
        "cell and step of the layer",
    ),
    "grad_cam_pp": Method(
        grad_cam_pp,
        "Grad-CAM++",
        "activation",
        "activation, gradient",
        "Chattopadhay 2018",
        "cell and step of the layer",
    ),
    "score_cam": Method(
        score_cam,
        "Score-CAM",
        "activation",
        "activation",
        "Wang 2020",
        "cell and step of the layer",
    ),
    "occlusion": Method(
        occlusion,
        "Occlusion",
        "perturbation",
        "forward",
        "Zeiler 2014",
        "window, slid by half of it",
    ),
    "lime": Method(lime, "LIME", "perturbation", "forward", "Ribeiro 2016", "supervoxel"),
    "rise": Method(
        rise, "RISE", "perturbation", "forward", "Petsiuk 2018", "cell in space-time, smoothed"
    ),
    "meaningful_perturbation": Method(
        meaningful_perturbation,
        "Meaningful Perturbation",
        "perturbation",
        "gradient",
        "Eq. 1; Fong 2017",
        "cell of 4 px at 112, frame",
    ),
    "i_gos": Method(
        i_gos, "I-GOS", "perturbation", "gradient", "Qi 2020", "cell of 4 px at 112, frame"
    ),
    "fg_vis": Method(
        fg_vis, "FG-Vis", "perturbation", "gradient, activation", "Wagner 2019", "pixel, frame"
    ),
    "extremal_perturbation": Method(
        extremal_perturbation,
        "Extremal Perturbation",
        "perturbation",
        "gradient",
        "Eq. 5; Fong 2019",
        "disc of about 11 px at 112, frame",
    ),
    "step": Method(
        step,
        "STEP",
        "perturbation",
        "gradient",
        "Eqs. 1-11; Li 2021",
        "disc of about 11 px at 112, frame",
    ),
}
