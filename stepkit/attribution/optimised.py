"""Methods that optimise masks, other than STEP (§II-A.3, Eqs. 1-2, 5).

The clips of a batch are optimised side by side, each by itself. L1 and smoothness terms are divided
by the number of their values, so that their weights mean the same on a clip of any size.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from stepkit._checks import one_of, require
from stepkit.attribution._calls import Activations
from stepkit.attribution._methods import method
from stepkit.attribution.cam import upsample
from stepkit.attribution.step import OPTIONS, discs, filled, step_map
from stepkit.removal import blur, named, read

__all__ = [
    "descend",
    "extremal_perturbation",
    "fg_vis",
    "i_gos",
    "line_search",
    "meaningful_perturbation",
    "variation",
]

CELLS = 28  # mask cells along an edge in the sources, 8 px each on a 224×224 image
EQUATION_2 = blur(levels=2)

_method = partial(method, family="perturbation", needs_gradient=True, optimises=True)
_cells = partial(_method, resolution="cell of 4 px at 112, frame")


@discs(
    "extremal_perturbation",
    order=23,
    label="Extremal Perturbation",
    source="Eq. 5; Fong 2019",
    options=tuple(name for name in OPTIONS if not name.startswith(("kernel", "core"))),
    fill=lambda options, size: filled(options | {"kernel_length": 0}, size),
)
def extremal_perturbation(model, clips, targets, work, **options) -> dict:
    """Extremal Perturbation (Fong, Patrick, Vedaldi 2019): STEP without L_K, Eq. 5; (N, T, H, W).

    The map is STEP's. Its options are those of `step` that do not concern L_K.
    """
    return step_map(model, clips, targets, work, **options, kernel_length=0)


def descend(mask: Tensor, terms: Callable[[Tensor], Iterable[Tensor]], move, steps) -> Tensor:
    """Move a mask (N, ...) in [0, 1] down the slope of a sum of ``terms`` (N,), ``steps`` times.

    ``terms(mask)`` makes one after the other, so that one graph is in memory at a time;
    ``move(mask, slope)`` returns where to go.
    """
    for _ in steps:
        mask.requires_grad_()
        with torch.enable_grad():
            slope = sum(torch.autograd.grad(term.sum(), mask)[0] for term in terms(mask))
        mask = move(mask.detach(), slope).clamp(0, 1)
    return mask


@_cells(
    "meaningful_perturbation", order=20, label="Meaningful Perturbation", source="Eq. 1; Fong 2017"
)
def meaningful_perturbation(
    model,
    clips,
    targets,
    work,
    *,
    iterations=300,
    learning_rate=0.1,
    area_weight=1e-4 * CELLS**2,
    smoothness=1e-2 * CELLS**2,
    beta=3.0,
    cell=None,
    removal=EQUATION_2,
    variant="preservation",
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
    _check(area_weight, smoothness, beta, learning_rate, iterations=iterations)
    one_of("variant", variant, ("preservation", "deletion"))
    size, deletion = clips.shape[2:], variant == "deletion"
    phi, _ = _masked_score(model, clips, targets, work, removal)

    def terms(cells):
        mask = upsample(cells, size)
        left = phi(1 - mask) if deletion else -phi(mask)
        yield area_weight * mask.mean((1, 2, 3)) + smoothness * variation(cells, beta) + left

    cells = clips.new_full(_grid(clips, cell), 0.0 if deletion else 1.0)
    optimiser = torch.optim.Adam([at := cells.clone()], learning_rate)

    def move(cells, slope):
        at.copy_(cells)
        at.grad = slope
        optimiser.step()
        return at

    steps = work.bar(range(iterations), desc="Meaningful Perturbation")
    return upsample(descend(cells, terms, move, steps), size)


@_cells("i_gos", order=21, label="I-GOS", source="Qi 2020")
def i_gos(
    model,
    clips,
    targets,
    work,
    *,
    iterations=15,
    steps=20,
    area_weight=1.0,
    smoothness=20.0,
    beta=2.0,
    noise=0.2,
    search="mask",
    cell=None,
    removal=EQUATION_2,
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
    _check(area_weight, smoothness, beta, iterations=iterations, steps=steps)
    require(noise >= 0, "noise", noise, "at least 0")
    one_of("search", search, ("mask", "path"))
    size, path = clips.shape[2:], [s / steps for s in range(1, steps + 1)]
    points = path if search == "path" else [1.0]
    phi, noisy = _masked_score(model, clips, targets, work, removal, noise)

    def prior(cells):
        l1 = (1 - cells).abs().mean((1, 2, 3))
        return area_weight * l1 + smoothness * variation(cells, beta)

    def terms(cells):
        yield prior(cells)
        for point in path:
            yield noisy(point * upsample(cells, size)) / steps

    def loss(cells):
        mask = upsample(cells, size)
        return sum(phi(point * mask) for point in points) / len(points) + prior(cells)

    cells = clips.new_ones(_grid(clips, cell))
    bar = work.bar(range(iterations), desc="I-GOS")
    return 1 - upsample(descend(cells, terms, partial(line_search, loss), bar), size)


LONGEST, SHORTEST, SHRINK, ARMIJO = 8.0, 1e-5, 0.2, 1e-4  # of I-GOS's line search


@torch.no_grad()
def line_search(loss, cells: Tensor, slope: Tensor) -> Tensor:
    """Go down the slope as far as the loss agrees, each clip by itself.

    From α = 8 on, α shrinks to a fifth while F(M − α·TG) > F(M) − 1e-4·α·‖TG‖² (the revised Armijo
    condition of Qi 2020) and α ≥ 1e-5; the step that comes below that is taken as it is. The
    numbers belong to 28×28 cells: the slope of a mean goes as 1/cells, so α goes as cells. F is
    ``loss``, cells (N, T, h, w) -> (N,); ``cells`` is M in [0, 1], ``slope`` TG.
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
    model,
    clips,
    targets,
    work,
    *,
    iterations=500,
    learning_rate=0.1,
    area_weight=1.0,
    removal="fade",
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
        The model calls no activation function of torch by its name (as a module, a function or a
        method); what a fused recurrent layer or TorchScript does inside is not seen.
    """
    _check(area_weight, learning_rate=learning_rate, iterations=iterations)
    nothing, score, bounds = named(removal).nothing(clips), work.score, []
    unit, kept = score.unit(model, clips, nothing, targets), score.log or score.value
    with torch.enable_grad(), Activations(lambda h: bounds.append(h.detach().clone())):
        model(clips.detach().requires_grad_())  # as below: fused layers differ without gradients
    expected = "ReLU, GELU or another activation function of torch.nn or torch.nn.functional"
    require(len(bounds) > 0, "model", "no activation function for fg_vis to watch", expected)

    def terms(mask):
        with Activations(_defence(bounds)):
            output = model(mask * clips + (1 - mask) * nothing)
        yield area_weight * mask.mean((1, 2, 3, 4)) - kept(output, targets) / unit

    def move(mask, slope):
        largest = slope.abs().amax((1, 2, 3, 4), keepdim=True)
        return mask - learning_rate * (slope / largest.clamp_min(torch.finfo(slope.dtype).tiny))

    steps = work.bar(range(iterations), desc="FG-Vis")
    return descend(torch.ones_like(clips), terms, move, steps).mean(1)


def _defence(bounds: list[Tensor]):
    """Return a watcher that stops the gradient at activations out of ``bounds``, call by call."""
    calls = iter(bounds)

    def see(h: Tensor) -> None:
        bound, now = next(calls), h.detach()
        within = (now <= bound.clamp(min=0)) & (now >= bound.clamp(max=0))
        if h.requires_grad:
            h.register_hook(lambda slope: slope * within)

    return see


def variation(cells: Tensor, beta: float) -> Tensor:
    """Return ‖∇M‖_β^β within the frames of cells (N, T, h, w), divided by their number; (N,)."""
    steps = (cells.diff(dim=axis).abs().pow(beta).sum((1, 2, 3)) for axis in (2, 3))
    return sum(steps) / cells[0].numel()


def _masked_score(model, clips, targets, work, removal, noise: float = 0.0):
    """Return two calls, masks (N, T, H, W) to score of M⊗X in its unit (N,); one adds noise."""
    ladder, score = named(removal).ladder(clips), work.score
    unit = score.unit(model, clips, ladder[:, 0], targets)
    draws = [torch.Generator(clips.device).manual_seed(seed) for seed in work.seeds]

    def phi(mask, drawn=0.0):
        return score(model(read(ladder, mask[:, None])[:, 0] + drawn), targets) / unit

    def noisy(mask):
        shape, device = clips.shape[1:], clips.device
        drawn = [torch.randn(shape, generator=draw, device=device) for draw in draws]
        return phi(mask, noise * torch.stack(drawn))

    return phi, noisy


def _grid(clips: Tensor, cell: int | None) -> tuple[int, int, int, int]:
    """Return the shape (N, T, h, w) of masks with a cell every ``cell`` pixels."""
    height, width = clips.shape[-2:]
    whole = cell is None or (isinstance(cell, int) and cell >= 1)
    require(whole, "cell", cell, "a whole number of pixels, at least 1")
    cell = max(1, round(min(height, width) / CELLS)) if cell is None else cell
    return len(clips), clips.shape[2], math.ceil(height / cell), math.ceil(width / cell)


def _check(area_weight, smoothness=0.0, beta=1.0, learning_rate=1.0, **counts: int) -> None:
    for name, count in counts.items():
        require(type(count) is int and count >= 1, name, count, "a whole number, at least 1")
    require(learning_rate > 0, "learning_rate", learning_rate, "more than 0")
    require(area_weight >= 0, "area_weight", area_weight, "at least 0")
    require(smoothness >= 0, "smoothness", smoothness, "at least 0")
    require(beta >= 1, "beta", beta, "at least 1")
