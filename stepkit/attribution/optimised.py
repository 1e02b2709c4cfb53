"""Attributions that are optimised masks, other than STEP (§II-A.3, Eqs. 1-2).

Meaningful Perturbation, I-GOS and FG-Vis. The clips of a batch are optimised side by side, each by
itself. L1 and smoothness terms are divided by the number of their values, so
that their weights mean the same on a clip of any size.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepkit._checks import one_of, require
from stepkit.attribution._methods import Work, method
from stepkit.attribution.cam import upsample
from stepkit.removal import Removal, blur, named, read

CELLS = 28  # mask cells along an edge in the sources, 8 px each on a 224×224 image
EQUATION_2 = blur(levels=2)

_method = partial(method, family="perturbation", needs_gradient=True, optimises=True)


@_method(
    "meaningful_perturbation",
    order=20,
    label="Meaningful Perturbation",
    source="Eq. 1; Fong 2017",
    resolution="cell of 4 px at 112, frame",
)
def meaningful_perturbation(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    work: Work,
    *,
    iterations: int = 300,
    learning_rate: float = 0.1,
    area_weight: float = 1e-4 * CELLS**2,
    smoothness: float = 1e-2 * CELLS**2,
    beta: float = 3.0,
    cell: int | None = None,
    removal: str | Removal = EQUATION_2,
    variant: str = "preservation",
) -> Tensor:
    """Meaningful Perturbation (Eq. 1; Fong, Vedaldi 2017): one mask of low resolution a frame.

        argmin λ1·‖M‖₁ + λ2·‖∇M‖_β^β − Φ_c(M⊗X)

    by Adam; (N, T, H, W). Eq. 1 prints the first and the last term, and ⊗ with one blur (Eq. 2),
    through which low mask values leak (see `stepkit.removal`): ``removal="blur"`` is the pyramid.
    The smoothness term within each frame, the constants and the optimiser are the source's, for
    sums over 28×28 cells. It begins at a mask of ones. The source also shifts the image by up to
    4 px of 224, starts at a disc, and up-samples with a Gaussian; none of that here.

    Parameters
    ----------
    iterations, learning_rate : int, float
        Of Adam.
    area_weight, smoothness, beta : float
        λ1, λ2, β ≥ 1; λ1 for the mean of the mask, λ2 for a mean over mask cells.
    cell : int, optional
        Pixels along a mask cell, up-sampled bilinearly; by default 1/28 of the shorter side.
    removal : str or Removal
        What stands where the mask is 0.
    variant : str
        ``"preservation"`` as printed. ``"deletion"`` as in the source: + Φ_c((1−M)⊗X), from a mask
        of zeros.
    """
    _check(iterations=iterations, learning_rate=learning_rate)
    _check_prior(area_weight, smoothness, beta)
    one_of("variant", variant, ("preservation", "deletion"))
    ladder, size = named(removal).ladder(clips), clips.shape[2:]
    unit = work.score.unit(model, clips, ladder[:, 0], targets)
    deletion = variant == "deletion"
    cells = clips.new_full(_grid(clips, cell), 0.0 if deletion else 1.0, requires_grad=True)
    optimiser = torch.optim.Adam([cells], learning_rate)
    for _ in work.bar(range(iterations), desc="Meaningful Perturbation"):
        with torch.enable_grad():
            mask = upsample(cells, size)
            phi = _kept(model, ladder, 1 - mask if deletion else mask, targets, work.score) / unit
            energy = area_weight * mask.mean((1, 2, 3)) + smoothness * variation(cells, beta)
            energy = energy + phi if deletion else energy - phi
            (cells.grad,) = torch.autograd.grad(energy.sum(), cells)
        optimiser.step()
        with torch.no_grad():
            cells.clamp_(0, 1)
    return upsample(cells.detach(), size)


@_method(
    "i_gos", order=21, label="I-GOS", source="Qi 2020", resolution="cell of 4 px at 112, frame"
)
def i_gos(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    work: Work,
    *,
    iterations: int = 15,
    steps: int = 20,
    area_weight: float = 1.0,
    smoothness: float = 20.0,
    beta: float = 2.0,
    noise: float = 0.2,
    search: str = "mask",
    cell: int | None = None,
    removal: str | Removal = EQUATION_2,
) -> Tensor:
    """I-GOS (Qi, Khorram, Li 2020): a deletion mask that descends an integrated gradient.

        F(M) = Φ_c(M⊗X) + g(M),   g(M) = λ1·‖1−M‖₁ + λ2·‖∇M‖_β^β
        M ← M − α·TG,   TG = 1/S·Σ_{s=1..S} ∂Φ_c((s/S·M)⊗X)/∂M + ∂g/∂M

    from a mask of ones, M clamped to [0, 1]; (N, T, H, W), the map is 1−M. The step α of each clip
    is found by `line_search`. That the descent is not along the gradient is why Table I says that
    the method changes the back-propagation rule. The source's code also lowers λ1 halfway when Φ_c
    has not moved; not here.

    Parameters
    ----------
    iterations, steps : int
        Steps of the descent; S, points of the path.
    area_weight, smoothness, beta : float
        λ1, λ2, β ≥ 1, both terms averaged over mask cells; the source's for 28×28 cells.
    noise : float
        Standard deviation of the normal noise on the clips along the path, in normalised space.
    search : str
        What the line search wants to fall: ``"mask"``, F(M). Where Φ_c is saturated it refuses
        almost every step, and a sure class is hardly ever deleted. ``"path"``, as in the authors'
        later code: Φ_c averaged over the path, S times the work.
    cell : int, optional
        Pixels along a mask cell, up-sampled bilinearly; by default 1/28 of the shorter side.
    removal : str or Removal
        What stands where the mask is 0; the source blends linearly with a blurred image.
    """
    _check(iterations=iterations, steps=steps)
    _check_prior(area_weight, smoothness, beta)
    require(noise >= 0, "noise", noise, "at least 0")
    one_of("search", search, ("mask", "path"))
    ladder, size = named(removal).ladder(clips), clips.shape[2:]
    unit = work.score.unit(model, clips, ladder[:, 0], targets)
    draws = [torch.Generator(clips.device).manual_seed(seed) for seed in work.seeds]
    path = [s / steps for s in range(1, steps + 1)]

    def prior(cells):
        l1 = (1 - cells).abs().mean((1, 2, 3))
        return area_weight * l1 + smoothness * variation(cells, beta)

    def loss(cells):
        mask, points = upsample(cells, size), path if search == "path" else [1.0]
        phi = [_kept(model, ladder, point * mask, targets, work.score) for point in points]
        return sum(phi) / len(phi) / unit + prior(cells)

    cells = clips.new_ones(_grid(clips, cell))
    for _ in work.bar(range(iterations), desc="I-GOS"):
        cells.requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(prior(cells).sum(), cells)
            for point in path:
                mask = point * upsample(cells, size)
                phi = _kept(model, ladder, mask, targets, work.score, noise, draws) / unit
                slope += torch.autograd.grad(phi.sum(), cells)[0] / steps
        cells = line_search(loss, cells.detach(), slope)
    return 1 - upsample(cells, size)


LONGEST, SHORTEST, SHRINK, ARMIJO = 8.0, 1e-5, 0.2, 1e-4  # of I-GOS's line search


@torch.no_grad()
def line_search(loss, cells: Tensor, slope: Tensor) -> Tensor:
    """Go down the slope as far as the loss agrees, each clip by itself.

    From α = 8 on, α shrinks to a fifth while F(M − α·TG) > F(M) − 1e-4·α·‖TG‖² (the revised Armijo
    condition of Qi 2020) and α ≥ 1e-5; the step that comes below that is taken as it is. The
    numbers belong to 28×28 cells: the slope of a mean goes as 1/cells, so α goes as cells.

    Parameters
    ----------
    loss : callable
        cells (N, T, h, w) -> F (N,).
    cells, slope : Tensor
        (N, T, h, w), M in [0, 1] and TG.
    """
    scale = cells[0].numel() / CELLS**2
    before, agreed = loss(cells), ARMIJO * scale * slope.square().sum((1, 2, 3))
    length = torch.full_like(before, LONGEST)
    refused = torch.ones_like(before, dtype=torch.bool)

    def moved():
        return (cells - scale * length[:, None, None, None] * slope).clamp(0, 1)

    for _ in range(math.ceil(math.log(SHORTEST / LONGEST, SHRINK))):
        refused = refused & (loss(moved()) > before - length * agreed)
        if not refused.any():  # waits for the device, and saves many times that
            break
        length = torch.where(refused, SHRINK * length, length)
    return moved()


@_method("fg_vis", order=22, label="FG-Vis", source="Wagner 2019", reads_layers=True)
def fg_vis(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    work: Work,
    *,
    iterations: int = 500,
    learning_rate: float = 0.1,
    area_weight: float = 1.0,
    removal: str | Removal = "fade",
) -> Tensor:
    """FG-Vis (Wagner et al. 2019): a mask of full resolution that may not create new evidence.

        argmin λ·‖M‖₁ − log Φ_c(M⊙X + (1−M)⊙R)

    (the preservation game) by gradient descent from a mask of ones, a value per pixel and colour;
    (N, T, H, W), the mask averaged over RGB. Each gradient is divided by its clip's largest
    absolute value. On its way back it is set to 0 at every hidden neuron whose activation h has
    left the range that the clip gave it:

        h(M⊗X) > max(0, h(X))  or  h(M⊗X) < min(0, h(X))

    The source finds λ for each image such that Φ_c stays near that of the image; here it is fixed.

    Parameters
    ----------
    iterations, learning_rate : int, float
        Of the descent; the learning rate is the most that a mask value moves in one step.
    area_weight : float
        λ, for the mean of the mask.
    removal : str or Removal
        R is its bottom rung; 0 in normalised space by default.

    Raises
    ------
    ValueError
        The model never calls an activation function of torch by its name (ReLU and its kin, GELU,
        SiLU, ...; as a module, a function or a method), so there is nothing to defend. What a fused
        recurrent layer or TorchScript does inside is not seen either.
    """
    _check(iterations=iterations, learning_rate=learning_rate)
    require(area_weight >= 0, "area_weight", area_weight, "at least 0")
    nothing = named(removal).nothing(clips)
    unit = work.score.unit(model, clips, nothing, targets)
    kept = work.score.log or work.score.value
    mask, bounds = torch.ones_like(clips), []
    with torch.enable_grad(), _Activations(lambda h: bounds.append(h.detach().clone())):
        model(clips.detach().requires_grad_())  # as below: fused layers differ without gradients
    expected = "ReLU, GELU or another activation function of torch.nn or torch.nn.functional"
    require(len(bounds) > 0, "model", "no activation function for fg_vis to watch", expected)
    for _ in work.bar(range(iterations), desc="FG-Vis"):
        mask.requires_grad_()
        with torch.enable_grad():
            with _Activations(_defence(bounds)):
                output = model(mask * clips + (1 - mask) * nothing)
            energy = area_weight * mask.mean((1, 2, 3, 4))
            energy = energy - kept(output, targets) / unit
            (slope,) = torch.autograd.grad(energy.sum(), mask)
        largest = slope.abs().amax((1, 2, 3, 4), keepdim=True)
        slope /= largest.clamp_min(torch.finfo(slope.dtype).tiny)
        mask = (mask.detach() - learning_rate * slope).clamp(0, 1)
    return mask.mean(1)


def _defence(bounds: list[Tensor]):
    """Return a watcher that stops the gradient at activations out of ``bounds``, call by call."""
    calls = iter(bounds)

    def see(h: Tensor) -> None:
        bound, now = next(calls), h.detach()
        within = (now <= bound.clamp(min=0)) & (now >= bound.clamp(max=0))
        if h.requires_grad:
            h.register_hook(lambda slope: slope * within)

    return see


_NAMES = {"relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"}
_NAMES |= {"hardswish", "hardtanh", "hardsigmoid", "softplus", "tanh", "sigmoid"}


class _Activations(TorchFunctionMode):
    """Shows the output of every activation function called inside to ``see``, in order.

    Listens to torch, not to the modules: a model is not touched, and it does not matter whether it
    calls one module several times, works in place, or uses functions. ``see`` is called before
    anything can change the output in place.
    """

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").rstrip("_") in _NAMES:
            self.see(out)
        return out


def variation(cells: Tensor, beta: float) -> Tensor:
    """Return ‖∇M‖_β^β within the frames of cells (N, T, h, w), divided by their number; (N,)."""
    steps = (cells.diff(dim=axis).abs().pow(beta).sum((1, 2, 3)) for axis in (2, 3))
    return sum(steps) / cells[0].numel()


def _kept(model, ladder, mask, targets, score, noise: float = 0.0, draws=()) -> Tensor:
    """Return Φ_c(M⊗X), (N,), for masks (N, T, H, W); with noise on the clips if there is any."""
    clips = read(ladder, mask[:, None])[:, 0]
    if noise:
        shape, device = clips.shape[1:], clips.device
        drawn = [torch.randn(shape, generator=draw, device=device) for draw in draws]
        clips = clips + noise * torch.stack(drawn)
    return score(model(clips), targets)


def _grid(clips: Tensor, cell: int | None) -> tuple[int, int, int, int]:
    """Return the shape (N, T, h, w) of masks with a cell every ``cell`` pixels."""
    height, width = clips.shape[-2:]
    whole = cell is None or (isinstance(cell, int) and cell >= 1)
    require(whole, "cell", cell, "a whole number of pixels, at least 1")
    cell = max(1, round(min(height, width) / CELLS)) if cell is None else cell
    return len(clips), clips.shape[2], math.ceil(height / cell), math.ceil(width / cell)


def _check(learning_rate: float = 1.0, **counts: int) -> None:
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        require(whole, name, count, "a whole number, at least 1")
    require(learning_rate > 0, "learning_rate", learning_rate, "more than 0")


def _check_prior(area_weight: float, smoothness: float, beta: float) -> None:
    require(area_weight >= 0, "area_weight", area_weight, "at least 0")
    require(smoothness >= 0, "smoothness", smoothness, "at least 0")
    require(beta >= 1, "beta", beta, "at least 1")
