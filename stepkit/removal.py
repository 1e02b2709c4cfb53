"""What stands where evidence was taken away (the ⊗ of Eqs. 1-5), as one family of operators.

Every operator builds a *ladder* of clips, from "nothing left" (rung 0) up to the clip itself (the
last rung). A mask value m in [0, 1] reads the ladder at height m, linearly between rungs:

====================  =====  =======================================================================
`blur` (default)      8      rungs less and less blurred; what the authors' code does
`blur` with levels=2  2      Eq. 2: M⊙X + (1−M)⊙(k∗X)
`fade`                2      towards 0 in normalised space, the mean of the normalisation constants
`black`               2      towards black pixels
`mean`                2      towards the mean colour of given clips (the paper's AUC baseline)
`constant`            2      towards a given colour
====================  =====  =======================================================================

The linear blend of Eq. 2 leaks: a mask value of 0.25 leaves a recognisable ghost of the object. A
low rung of the 8-level ladder is a strong blur instead (notebook 07 shows the difference).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkit._checks import clips as check_clips
from stepkit._checks import in_proportion, one_of, require, tensor
from stepkit.clips import normalise, unnormalise

__all__ = ["Removal", "black", "blur", "constant", "fade", "gaussian_blur", "gaussian_matrix"]
__all__ += ["mean", "named", "read", "remove_at_random"]


@dataclass(frozen=True)
class Removal:
    """An operator of the family: a `ladder` of clips, read by `apply` at the height of a mask.

    Attributes
    ----------
    name : str
        The call that makes it, as in ``"blur(levels=8, sigma=20.0)"``; part of a run's key.
    ladder : callable
        clips (N, C, T, H, W) -> rungs (N, L, C, T, H, W); the last rung is the clip.
    """

    name: str
    ladder: Callable[[Tensor], Tensor]

    def apply(self, clips: Tensor, mask: Tensor) -> Tensor:
        """Keep what the mask keeps, M⊗X.

        Parameters
        ----------
        clips : Tensor
            float32 (N, C, T, H, W), normalised.
        mask : Tensor
            (N, T, H, W) in [0, 1]; or (N, A, T, H, W), several masks per clip.

        Returns
        -------
        Tensor
            (N, C, T, H, W), or (N, A, C, T, H, W) for several masks.

        Examples
        --------
        >>> clips = torch.randn(2, 3, 4, 16, 16)
        >>> kept = blur().apply(clips, torch.ones(2, 4, 16, 16))
        >>> bool(torch.allclose(kept, clips, atol=1e-5))
        True
        """
        check_clips(clips)
        single = mask.ndim == 4
        mask = tensor("mask", mask[:, None] if single else mask, "(N, A, T, H, W)")
        fits = mask.shape[0] == clips.shape[0] and mask.shape[2:] == clips.shape[2:]
        expected = f"the frames of clips {tuple(clips.shape)}"
        require(fits, "mask", f"shape {tuple(mask.shape)}", expected)
        low, high = mask.aminmax()
        require(low >= 0 and high <= 1, "mask", f"values {low:.3g}..{high:.3g}", "values in [0, 1]")
        kept = read(self.ladder(clips), mask)
        return kept[:, 0] if single else kept

    def nothing(self, clips: Tensor) -> Tensor:
        """Return the bottom rung, (N, C, T, H, W): what is left where everything is removed."""
        return self.ladder(clips)[:, 0]

    def __repr__(self):
        return self.name


def read(ladder: Tensor, mask: Tensor) -> Tensor:
    """Read a ladder at the height of a mask, linearly between rungs.

    ``ladder`` (N, L, C, T, H, W), ``mask`` (N, A, T, H, W) in [0, 1] -> (N, A, C, T, H, W). The
    ladder is not copied per mask: each voxel gathers the two rungs that it needs.
    """
    steps = ladder.shape[1] - 1
    height = mask[:, :, None] * steps  # (N, A, 1, T, H, W)
    # NaN, from a model gone wrong, must not become an index; it stays in ``height``
    rung = height.detach().floor().clamp_(0, steps - 1).nan_to_num_()
    index = rung.long().expand(-1, -1, ladder.shape[2], -1, -1, -1)
    below = ladder.gather(1, index)
    return torch.addcmul(below, height - rung, ladder.gather(1, index + 1) - below)


def blur(levels: int = 8, sigma: float | None = None) -> Removal:
    """Blur pyramid: rung l holds the clip blurred with σ_l = σ·(1 − l/(levels−1)).

    Each frame alone; a separable Gaussian truncated at ⌈4σ⌉, zeros beyond the border, in normalised
    space. ``levels=2`` is Eq. 2 exactly.

    Parameters
    ----------
    levels : int
        Rungs, at least 2.
    sigma : float, optional
        Strongest blur in pixels; by default 20 px at the paper's 112, in proportion to the shorter
        side of the frame.
    """
    require(levels >= 2, "levels", levels, "at least 2")
    require(sigma is None or sigma > 0, "sigma", sigma, "a positive number of pixels")

    def ladder(clips: Tensor) -> Tensor:
        strongest = in_proportion(20, clips.shape) if sigma is None else sigma
        rungs = [gaussian_blur(clips, strongest * (1 - i / (levels - 1))) for i in range(levels)]
        return torch.stack(rungs, 1)

    return Removal(f"blur(levels={levels}, sigma={sigma})", ladder)


def constant(rgb) -> Removal:
    """Fade to one colour, ``rgb`` in [0, 1]."""
    rgb = [float(value) for value in rgb]
    fits = len(rgb) == 3 and all(0 <= value <= 1 for value in rgb)
    require(fits, "rgb", rgb, "3 values in [0, 1]")

    def ladder(clips: Tensor) -> Tensor:
        colour = normalise(clips.new_tensor(rgb).view(3, 1, 1, 1))
        return torch.stack([colour.expand_as(clips), clips], 1)

    return Removal(f"constant({', '.join(f'{value:.6g}' for value in rgb)})", ladder)


def fade() -> Removal:
    """Fade to 0 in normalised space (the released AUC baseline)."""
    return Removal("fade", lambda clips: torch.stack([torch.zeros_like(clips), clips], 1))


def black() -> Removal:
    """Fade to black pixels (the baseline of integrated gradients)."""
    return Removal("black", constant((0, 0, 0)).ladder)


def mean(clips: Tensor) -> Removal:
    """Fade to the mean colour of ``clips`` (N, 3, T, H, W): §IV-A, "mean of the training data"."""
    average = check_clips(clips).mean((0, 2, 3, 4), keepdim=True)
    colour = constant(unnormalise(average).flatten())
    return Removal(f"mean of {len(clips)} clips: {colour.name}", colour.ladder)


def named(removal: str | Removal) -> Removal:
    """Return the operator that "blur", "fade" or "black" names; operators pass through."""
    if isinstance(removal, Removal):
        return removal
    makers = {"blur": blur, "fade": fade, "black": black}
    one_of("removal", removal, makers)
    return makers[removal]()


def remove_at_random(
    clips: Tensor, share: float, removal: Removal, generator: torch.Generator
) -> Tensor:
    """Remove moving random blobs from a random ``share`` of the clips; labels stay as they are.

    The blobs are level sets of smooth noise in space-time; between a fifth and nine tenths of a
    clip is kept. ``clips`` (N, 3, T, H, W) -> the same shape.
    """
    chosen = (torch.rand(len(clips), generator=generator) < share).nonzero()[:, 0]
    if not len(chosen):
        return clips
    noise = torch.randn(len(chosen), 1, 3, 6, 6, generator=generator)
    noise = F.interpolate(noise, clips.shape[2:], mode="trilinear", align_corners=True)[:, 0]
    kept = torch.empty(len(chosen)).uniform_(0.2, 0.9, generator=generator)
    fields = zip(noise.flatten(1), kept, strict=True)
    level = torch.stack([field.quantile(1 - q) for field, q in fields])
    mask = (noise > level[:, None, None, None]).float()
    mask = gaussian_blur(mask, 0.02 * min(clips.shape[-2:])).clamp(0, 1).to(clips.device)
    clips = clips.clone()
    chosen = chosen.to(clips.device)
    clips[chosen] = removal.apply(clips[chosen], mask)
    return clips


def gaussian_blur(
    frames: Tensor, sigma: float, edge: str = "zero", reach: int | None = None
) -> Tensor:
    """Blur frames (..., H, W) with a Gaussian of ``sigma`` pixels, truncated at ⌈4σ⌉.

    ``edge`` says what lies beyond the border: "zero", or "reflect" (d c b a | a b c d). ``reach``
    truncates elsewhere, in pixels: ⌈4σ⌉ jumps with σ, which blurs that are compared must not do.
    """
    if sigma == 0:
        return frames
    sides = frames.shape[-2:]
    rows, columns = (gaussian_matrix(side, sigma, edge, reach).to(frames) for side in sides)
    return rows @ frames @ columns.T


def gaussian_matrix(
    length: int, sigma: float, edge: str = "zero", reach: int | None = None
) -> Tensor:
    """Return the matrix (length, length), float64, that blurs a row of pixels.

    The kernel sums to one before the border cuts it: with ``edge="zero"`` the rows near the border
    sum to less, as if zeros stood outside.
    """
    reach = math.ceil(4 * sigma) if reach is None else reach
    offsets = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(length, -1)
    source = torch.arange(length)[:, None] + offsets  # (length, 2·reach + 1)
    if edge == "reflect":
        source = source % (2 * length)
        source = torch.minimum(source, 2 * length - 1 - source)
    else:
        inside = (source >= 0) & (source < length)
        kernel, source = kernel * inside, source.clamp(0, length - 1)
    return torch.zeros(length, length, dtype=torch.float64).scatter_add_(1, source, kernel)
