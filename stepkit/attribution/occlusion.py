"""Attributions from forward passes alone: take evidence away, watch Φ_c (Table I, refs 15, 39, 40).

The three methods differ in the masks that they try and in how they read the answers; all masks go
through `masked_scores`. They are written here and not taken from Captum: what stands where evidence
is gone is then any `stepkit.removal.Removal`, and nothing has to be installed. Captum's
``Occlusion`` and ``Lime`` agree (tests/test_occlusion.py).
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkit._checks import one_of, require
from stepkit.attribution._methods import method
from stepkit.attribution.supervoxels import supervoxels
from stepkit.removal import Removal, named, read

__all__ = ["lime", "masked_scores", "occlusion", "rise"]

LIME_WIDTH = 0.25  # of the kernel that weighs a sample by its distance from the clip
LIME_RIDGE = 1.0  # penalty on the squared coefficients

_method = partial(method, family="perturbation")


@_method(
    "occlusion", order=17, label="Occlusion", source="Zeiler 2014", resolution="window, half of it"
)
@torch.no_grad()
def occlusion(model, clips, targets, work, *, window=None, stride=None, removal="fade") -> Tensor:
    """Occlusion: the mean drop of Φ_c over the cuboids that cover a voxel; (N, T, H, W).

    A cuboid slides over the clip from its first corner; one that reaches over the far border is cut
    there. The paper (ref. 15) slides a grey square over an image; a cuboid is ours.

    Parameters
    ----------
    window, stride : tuple of 3 int, optional
        Of the cuboid, in frames and pixels (t, y, x). By default a quarter of the frames and a
        seventh of each side, moved by half of that: 1,183 cuboids at 16×112×112.
    removal : Removal or str
        What stands in the cuboid, its bottom rung; by default grey, 0 in normalised space.

    Source: Zeiler & Fergus 2014, §4.2.
    """
    removal, size = named(removal), clips.shape[2:]
    T, H, W = size
    window = window or tuple(max(1, round(n)) for n in (T / 4, H / 7, W / 7))
    _check_triple("window", window, size, f"frames and pixels (t, y, x) up to {tuple(size)}")
    stride = stride or tuple((n + 1) // 2 for n in window)
    _check_triple("stride", stride, window, f"frames and pixels (t, y, x) up to window={window}")
    # the last start is the first whose cuboid reaches the far border
    each = zip(size, window, stride, strict=True)
    corners = torch.cartesian_prod(*(torch.arange(0, n - w + s, s) for n, w, s in each))  # (P, 3)
    maps = torch.zeros_like(clips[:, 0])
    for clip, target, drops in zip(clips, targets, maps, strict=True):
        intact = work.score(model(clip[None]), target[None]).float()
        covered = torch.zeros_like(drops)
        chunks = work.bar(corners.split(work.batch_size), desc="occlusion")
        masks = (_cuboids(chunk, window, size).to(clip) for chunk in chunks)
        for mask, phi in masked_scores(model, clip, target, work.score, removal, masks):
            drops += torch.einsum("k,kthw->thw", intact - phi, 1 - mask)
            covered += (1 - mask).sum(0)
        drops /= covered
    return maps


@_method(
    "rise", order=19, label="RISE", source="Petsiuk 2018", resolution="cell in space-time, smoothed"
)
@torch.no_grad()
def rise(
    model,
    clips,
    targets,
    work,
    *,
    samples=4000,
    cells=(4, 7, 7),
    keep=0.5,
    divide_by="expected",
    removal="fade",
) -> Tensor:
    """RISE: the mean of random masks, weighed by the Φ_c that each leaves; (N, T, H, W).

    Σ_i Φ_c(M_i⊗X)·M_i / (N·p) (ref. 40, Eq. 6), an estimate of the Φ_c to be expected where a
    voxel is kept (its Eq. 1). A mask is a grid of random bits, up-sampled linearly to one cell more
    than the clip and cropped at a random place within a cell.

    Parameters
    ----------
    samples : int
        N. The paper's 4,000 for VGG-16 (8,000 for ResNet-50); as many forward passes as STEP takes
        forward and backward ones for four areas.
    cells : tuple of 3 int
        Grid (t, y, x). 7×7 is the paper's, for images; 4 along time are ours. An axis has at most
        one cell per frame or pixel.
    keep : float
        p, the probability that a bit is 1; the paper's 0.5.
    divide_by : str
        ``"expected"``: N·p, as printed. ``"observed"``: Σ_i M_i, how much of each voxel was kept;
        it estimates the same, without the noise of how often a voxel happened to be kept, which
        drowns the map where Φ_c stays high under most masks.
    removal : Removal or str
        By default fading to 0 in normalised space: the masks multiply the clip, as in the paper.

    Source: Petsiuk 2018.
    """
    removal, size = named(removal), clips.shape[2:]
    _check_samples(samples)
    _check_triple("cells", cells, (float("inf"),) * 3, "3 whole numbers (t, y, x), at least 1")
    require(isinstance(keep, int | float) and 0 < keep < 1, "keep", keep, "a share in (0, 1)")
    one_of("divide_by", divide_by, ("expected", "observed"))
    cells = tuple(min(pair) for pair in zip(cells, size, strict=True))
    maps = torch.zeros_like(clips[:, 0])
    for clip, target, seed, total in zip(clips, targets, work.seeds, maps, strict=True):
        grids, shifts = _grids(samples, cells, size, keep, _generator(clip, seed))
        chunks = zip(grids.split(work.batch_size), shifts.split(work.batch_size), strict=True)
        chunks = work.bar(list(chunks), desc="rise")
        masks = (_stretch(grid, shift, size) for grid, shift in chunks)
        kept = torch.zeros_like(total)
        for mask, phi in masked_scores(model, clip, target, work.score, removal, masks):
            total += torch.einsum("k,kthw->thw", phi, mask)
            kept += mask.sum(0)
        total /= samples * keep if divide_by == "expected" else kept.clamp(min=1e-6)
    return maps


@_method("lime", order=18, label="LIME", source="Ribeiro 2016", resolution="supervoxel")
@torch.no_grad()
def lime(model, clips, targets, work, *, segments=100, samples=1000, removal="fade") -> Tensor:
    """LIME: weights of regions in a linear model of Φ_c around the clip; (N, T, H, W).

    Minimises Σ_i π_i·(Φ_c(z_i⊗X) − b − β·z_i)² + |β|² (ref. 39, Eq. 1) over random on/off vectors
    z_i, each bit 1 with probability ½, the first vector all ones; a voxel gets the β of its
    region. π = exp(−D²/2σ²), D = 1 − cos(z, 1) and σ = 0.25, as in the authors' code for
    images, whose exponent is half of the printed one; so are the ridge's penalty of 1 and N.

    Parameters
    ----------
    segments : int
        About how many regions, equal cuboids (the authors cut images by quickshift).
    samples : int
        N, the number of vectors.
    removal : Removal or str
        What stands in a region that is off, its bottom rung; by default grey, 0 in normalised
        space. The authors' code fills a region with its own mean colour.

    Source: Ribeiro 2016.
    """
    removal = named(removal)
    _check_samples(samples)
    require(isinstance(segments, int) and segments >= 1, "segments", segments, "at least 1")
    maps = torch.zeros_like(clips[:, 0])
    for clip, target, seed, weights in zip(clips, targets, work.seeds, maps, strict=True):
        units = supervoxels(clip, segments).to(clip.device)  # (T, H, W)
        switches = _switches(samples, int(units.max()) + 1, _generator(clip, seed))
        chunks = work.bar(switches.split(work.batch_size), desc="lime")
        masks = (chunk[:, units] for chunk in chunks)
        given = masked_scores(model, clip, target, work.score, removal, masks)
        phi = torch.cat([phi for _, phi in given])
        weights.copy_(_ridge(switches, phi).to(weights)[units])
    return maps


def masked_scores(
    model, clip: Tensor, target: Tensor, score, removal: Removal, masks: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each of the ``masks`` (k, T, H, W) with the score (k,) of what it leaves of one clip.

    ``masks`` is a generator, so that no more than one chunk is in memory. Clips go one after the
    other: there are many masks for each, and a chunk of them fills a batch. Scores are float32; in
    half precision small drops would be lost.
    """
    ladder = removal.ladder(clip[None])
    for mask in masks:
        kept = read(ladder, mask[None])[0]  # (k, 3, T, H, W)
        yield mask, score(model(kept), target.expand(len(kept))).float()


def _cuboids(corners: Tensor, window, size) -> Tensor:
    """Return masks that leave out cuboids with first ``corners`` (k, 3); (k, T, H, W)."""
    masks = torch.ones(len(corners), *size)
    for mask, corner in zip(masks, corners.tolist(), strict=True):
        mask[tuple(slice(a, a + w) for a, w in zip(corner, window, strict=True))] = 0
    return masks


def _grids(samples: int, cells, size, keep: float, generator) -> tuple[Tensor, Tensor]:
    """Draw RISE's bits (N, t, h, w) and where each mask is cropped, int64 (N, 3).

    All at once, so that chunks do not change what is drawn; a bit is far smaller than its mask.
    """
    draw = {"generator": generator, "device": generator.device}
    bits = torch.rand(samples, *cells, **draw) < keep
    sides = [-(-n // c) for n, c in zip(size, cells, strict=True)]  # of a cell, in pixels
    return bits, torch.stack([torch.randint(side, (samples,), **draw) for side in sides], 1)


def _stretch(grid: Tensor, shift: Tensor, size) -> Tensor:
    """Up-sample grids (k, t, h, w) to c + 1 cells of ⌈n/c⌉ pixels, crop at ``shift`` (k, 3).

    Linear along each axis, constant beyond the centres of the outer cells; (k, T, H, W).
    """
    large = [(c + 1) * -(-n // c) for c, n in zip(grid.shape[1:], size, strict=True)]
    masks = F.interpolate(grid[:, None].float(), large, mode="trilinear")[:, 0]
    crops = [[slice(a, a + n) for a, n in zip(s, size, strict=True)] for s in shift.tolist()]
    return torch.stack([mask[tuple(crop)] for mask, crop in zip(masks, crops, strict=True)])


def _switches(samples: int, units: int, generator) -> Tensor:
    """Draw LIME's on/off vectors, float32 (N, U); the first leaves the clip as it is."""
    on = torch.rand(samples, units, generator=generator, device=generator.device) < 0.5
    on[0] = True
    return on.float()


def _ridge(switches: Tensor, phi: Tensor) -> Tensor:
    """Return β of `lime` for vectors (N, U) and their Φ_c (N,); float64 (U,), on the CPU."""
    z, phi = switches.double().cpu(), phi.double().cpu()
    distance = 1 - z.mean(1).sqrt()  # cos(z, 1) = Σz / √(Σz·U)
    weight = torch.exp(-(distance**2) / (2 * LIME_WIDTH**2))
    # the intercept is not penalised: taking the weighted means away leaves none
    z, phi = z - weight @ z / weight.sum(), phi - weight @ phi / weight.sum()
    penalty = LIME_RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.linalg.solve(z.T @ (weight[:, None] * z) + penalty, z.T @ (weight * phi))


def _generator(clip: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(clip.device).manual_seed(seed)


def _check_samples(samples) -> None:
    require(isinstance(samples, int) and samples >= 1, "samples", samples, "at least 1")


def _check_triple(argument: str, given, limits, expected: str) -> None:
    """Check three whole numbers (t, y, x) from 1 to ``limits``."""
    three = isinstance(given, tuple | list) and [type(n) for n in given] == [int] * 3
    fits = three and all(1 <= n <= most for n, most in zip(given, limits, strict=True))
    require(fits, argument, given, expected)
