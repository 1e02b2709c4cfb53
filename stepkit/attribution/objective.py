"""What STEP minimises (paper §III, Eqs. 6-11): masks' area, their shape, and what they lose."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from stepkit._checks import one_of, require
from stepkit._compiling import fused
from stepkit.removal import read

__all__ = ["Objective", "area_loss", "core_kernel", "core_loss", "top_share"]

TIE = 1e-5  # mask values closer than this are equal
FULL_SEEDS = 16 * 16 * 16  # seed cells of the paper's 16×112×112 clip
SIGNS = {"preservation": (1,), "deletion": (-1,), "dual": (1, -1)}  # of M⊗X, of (1−M)⊗X


def top_share(values: Tensor, counts: list[int]) -> Tensor:
    """Mark the ``counts[a]`` largest of ``values[:, a]``; (N, A, n) -> weights (N, A, n) in [0, 1].

    Values within 1e-5 of the threshold count as tied and share what is left of the count evenly:
    pixels that the equations make equal differ in their last bits, and which of them is ahead would
    otherwise depend on the machine.
    """
    threshold = _thresholds(values, [max(1, count) for count in counts])
    above, tied = values > threshold + TIE, (values - threshold).abs() <= TIE
    left = _constants(tuple(counts), values.device, values.dtype)[:, None] - above.sum(2, True)
    return torch.where(tied, left / tied.sum(2, True), above.to(values))


def _thresholds(values: Tensor, counts: list[int]) -> Tensor:
    """Return the ``counts[a]``-th largest of ``values[:, a]``, (N, A, 1)."""
    n = values.shape[2]
    if values.device.type == "cpu":  # a tenth of the time of torch's own selection
        rows = values.detach().numpy()
        found = [np.partition(rows[:, a], n - k, 1)[:, n - k] for a, k in enumerate(counts)]
        return torch.from_numpy(np.stack(found, 1))[..., None]
    # infinite values let one rank fit all areas: one selection fills a GPU, one for each does not
    more = _infinities(tuple(counts), values.device, values.dtype).expand(len(values), -1, -1)
    full = torch.cat([values, more], 2)
    return full.kthvalue(full.shape[2] - max(counts) + 1, 2, keepdim=True).values


@cache
def _infinities(counts: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return rows (A, ...) of ∞ and −∞ that make the counts[a]-th largest the max(counts)-th."""
    rank = torch.arange(max(counts) - min(counts))
    ahead = rank < max(counts) - torch.tensor(counts)[:, None]
    return torch.where(ahead, math.inf, -math.inf).to(device, dtype)


@cache
def _constants(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers where they are needed; copied anew, they would make a GPU wait."""
    return torch.tensor(values, device=device, dtype=dtype)


def area_loss(masks: Tensor, areas) -> Tensor:
    """L_S of Eq. 6, the squared distance of the sorted mask from v·|M| ones, divided by |M|.

    ``masks`` (N, A, T, H, W), ``areas`` A shares v -> (N, A). No sort is needed:
    ‖sort(m) − r_v‖² = Σm² − 2·Σ(largest k of m) + k, with k = v·|M|.
    """
    values = masks.flatten(2)
    n = values.shape[2]
    counts = [round(v * n) for v in areas]
    top = top_share(values.detach(), counts)
    fixed = _constants(tuple(counts), values.device, values.dtype)
    return ((values * (values - 2 * top)).sum(2) + fixed) / n


def core_kernel(length: int, size: int, shape: str = "ellipsoid") -> Tensor:
    """Return the kernel K of Eqs. 9-10, float64 (length, size, size), summing to one.

    An ellipsoid inscribed in the box, its poles on the outermost slices, or the cylinder that the
    paper mentions. One or two slices have nothing between poles: they lie at the centre, whole.
    """
    one_of("kernel_shape", shape, ("ellipsoid", "cylinder"))
    require(length >= 1, "kernel_length", length, "at least one frame")
    require(size >= 1, "kernel_size", size, "at least one pixel")
    edges = ([-1, 1] if n > 2 else [0, 0] for n in (length, size, size))
    axes = (
        torch.linspace(*ends, n, dtype=torch.float64)
        for ends, n in zip(edges, (length, size, size), strict=True)
    )
    t, i, j = torch.meshgrid(*axes, indexing="ij")
    radius = i**2 + j**2 + (t**2 if shape == "ellipsoid" else 0)
    kernel = (radius <= 1 + 1e-12).double()
    return kernel / kernel.sum()


def core_loss(masks: Tensor, areas, kernel: Tensor, form: str = "printed") -> Tensor:
    """L_K of Eqs. 7-8: the mask, averaged over small tubes, shall be full or empty as well.

    ``masks`` (N, A, T, H, W) -> (N, A). M∗K has spatial strides of the kernel's size, temporal
    stride 1, no padding.

    ``form="printed"``: L_S of M∗K at the area β·v, β = THW / ((T+T_K−1)(H+H_K−1)(W+W_K−1)).
    ``form="released"``: the k largest and the rest averaged apart and added, with
    k = ⌈v·T·H·W / ⌊0.5236·T_K·H_K·W_K⌋⌉ (0.5236 = π/6, the ellipsoid's share of its box).
    """
    one_of("core_form", form, ("printed", "released"))
    T, H, W = masks.shape[2:]
    length, size = kernel.shape[0], kernel.shape[1]
    fits = length <= T and size <= min(H, W)
    require(fits, "kernel_length", f"kernel {tuple(kernel.shape)}", f"at most the mask {(T, H, W)}")
    convolved = fused(_tubes, masks)(masks, kernel.to(masks)).flatten(2)
    if form == "printed":
        beta = T * H * W / ((T + length - 1) * (H + size - 1) * (W + size - 1))
        return area_loss(convolved[:, :, :, None, None], [beta * v for v in areas])
    n, element = convolved.shape[2], max(1, int(kernel.numel() * 0.5236))
    counts = [min(n, math.ceil(v * T * H * W / element)) for v in areas]
    top = top_share(convolved.detach(), counts)
    k = _constants(tuple(counts), convolved.device, convolved.dtype)
    full = (top * (1 - convolved) ** 2).sum(2) / k.clamp(min=1)
    return full + ((1 - top) * convolved**2).sum(2) / (n - k).clamp(min=1)


def _tubes(masks: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (N, A, T, H, W) with strides (1, H_K, W_K): (N, A, T − T_K + 1, ⌊H/H_K⌋, ⌊W/W_K⌋).

    In space the kernel's places do not overlap, so that this is one matrix product with the
    kernel's slices, whose results are then added up along time.
    """
    (length, size), (H, W) = kernel.shape[:2], masks.shape[3:]
    places = masks[..., : H - H % size, : W - W % size]
    places = places.unflatten(4, (-1, size)).unflatten(3, (-1, size)).transpose(4, 5)
    slices = places.flatten(5) @ kernel.flatten(1).T  # (N, A, T, h, w, T_K)
    steps = masks.shape[2] - length + 1
    return sum(slices[:, :, i : i + steps, ..., i] for i in range(length))


class Objective:
    """Eq. 11 for all clips and areas at once.

    Parameters
    ----------
    model, clips, targets
        The n clips at work.
    settings : Settings
    score : Score
    geometry : MaskGeometry
    """

    def __init__(self, model, clips: Tensor, targets: Tensor, settings, score, geometry):
        self.model, self.settings, self.score, self.geometry = model, settings, score, geometry
        self.signs, masks = SIGNS[settings.variant], len(settings.areas)
        self.targets = targets.repeat_interleave(masks).repeat(len(self.signs))
        self.ladder = settings.removal.ladder(clips)
        self.unit = score.unit(model, clips, self.ladder[:, 0], targets)[:, None]
        self.balance = clips.shape[2] * math.prod(geometry.seeds) / FULL_SEEDS
        self.kernel = None
        if settings.kernel_length:
            size = settings.kernel_length, settings.kernel_size
            self.kernel = core_kernel(*size, settings.kernel_shape).to(clips)

    def scores(self, masks: Tensor) -> Tensor:
        """Return log Φ_c, another score as it is, of what masks (n, A, T, H, W) leave; (1, n, A).

        Of M⊗X, or of (1−M)⊗X where a mask deletes; of both, (2, n, A), in the dual variant.
        """
        views = [masks if sign > 0 else 1 - masks for sign in self.signs]
        kept = torch.cat([fused(read, view)(self.ladder, view).flatten(0, 1) for view in views])
        found = (self.score.log or self.score.value)(self.model(kept), self.targets)
        return found.to(masks).view(len(views), *masks.shape[:2])

    def values(self, scores: Tensor) -> Tensor:
        """Return Φ_c from its logarithm; other scores are themselves."""
        return scores.exp() if self.score.log else scores

    def __call__(self, canvas: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Return the energy, summed over clips and areas, and Φ_c, L_S, L_K of each, (3, n, A).

        ``canvas`` holds the masks; ``time`` in [0, 1) is the share of the iterations done.
        """
        s, masks = self.settings, self.geometry.crop(canvas)
        scores = self.scores(masks)
        phi = self.values(scores)
        shaped = canvas if s.on_canvas else masks
        area = area_loss(shaped, s.areas)
        energy = self.balance * s.area_weight * s.area_growth**time * area.sum()
        core = torch.zeros_like(area)
        if self.kernel is not None:
            core = core_loss(shaped, s.areas, self.kernel, s.core_form)
            if time >= s.core_start:
                energy = energy + self.balance * s.core_weight * core.sum()
        rewards = scores if s.reward == "log" and self.score.log else phi / self.unit
        for sign, reward in zip(self.signs, rewards, strict=True):
            energy = energy - sign * reward.sum()
        return energy, torch.stack([phi[0], area, core]).detach()
