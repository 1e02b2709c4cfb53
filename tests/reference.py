"""The equations once more: slow, literal, in float64, one loop for each sum or index of the paper.

Written from the paper (§III, §IV) and SPEC §2, not from `stepkit`, which it does not import. Where
the library had to choose something that the paper leaves open, the choice is stated here.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from scipy.ndimage import correlate1d, gaussian_filter

MEAN = (0.43216, 0.394666, 0.37645)
STD = (0.22803, 0.22145, 0.216989)

# ------------------------------------------------------------------- SPEC §2.1: the mask generator


def canvas_sides(H, W, s, sigma):
    """Canvas side s·(⌈H/s⌉ + 2p − 2r) − s + 1.

    Choice: where that is less than H + 2σ, p keeps the formula's value (it also says which cells a
    pixel sees) and the canvas grows at its far side, in blocks of s, until the frame fits.
    """
    r, p = 1 + math.ceil(sigma / s), 1 + math.ceil(2 * sigma / s)
    sides = []
    for edge in (H, W):
        side = s * (math.ceil(edge / s) + 2 * p - 2 * r) - s + 1
        while side < edge + 2 * sigma:
            side += s
        sides.append(side)
    return tuple(sides)


@cache
def cells_seen(H, W, s, sigma):
    """For each canvas pixel the (2r+1)² cells that it sees and their weights, (SH, SW, (2r+1)²).

    A cell is given as its raster index in the seed grid; one beyond the grid as the grid's length.
    """
    rows, columns = math.ceil(H / s), math.ceil(W / s)
    r, p = 1 + math.ceil(sigma / s), 1 + math.ceil(2 * sigma / s)
    SH, SW = canvas_sides(H, W, s, sigma)
    index = np.empty((SH, SW, (2 * r + 1) ** 2), dtype=int)
    weight = np.empty((SH, SW, (2 * r + 1) ** 2))
    for y in range(SH):
        for x in range(SW):
            k = 0
            for i in range(y // s - p, y // s - p + 2 * r + 1):
                for j in range(x // s - p, x // s - p + 2 * r + 1):
                    d = math.hypot(y - (sigma + s * i), x - (sigma + s * j))
                    inside = 0 <= i < rows and 0 <= j < columns
                    index[y, x, k] = i * columns + j if inside else rows * columns
                    weight[y, x, k] = math.exp(-2 * max(d / sigma - 0.5, 0) ** 2)
                    k += 1
    return torch.from_numpy(index), torch.from_numpy(weight)


def smooth_max(z):
    """Σ z·softmax(20·z) over the last axis."""
    e = torch.exp(20 * z)
    return (z * e).sum(-1) / e.sum(-1)


def spread(seeds, H, W, s, sigma):
    """Seeds (..., h, w), float64 -> canvas (..., SH, SW), pixel by pixel."""
    index, weight = cells_seen(H, W, s, sigma)
    cells = torch.cat([seeds.flatten(-2), seeds.new_zeros(*seeds.shape[:-2], 1)], -1)
    rows = []
    for y in range(index.shape[0]):
        row = [smooth_max(weight[y, x] * cells[..., index[y, x]]) for x in range(index.shape[1])]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2).clamp(0, 1)


def crop(canvas, H, W, sigma):
    return canvas[..., sigma : sigma + H, sigma : sigma + W]


# ---------------------------------------------------------------------- Eq. 2, SPEC §2.2: removal


def gaussian_weights(sigma):
    reach = math.ceil(4 * sigma)
    weights = [math.exp(-(o**2) / (2 * sigma**2)) for o in range(-reach, reach + 1)]
    return np.array(weights) / sum(weights)


def gaussian_blur(frames, sigma):
    """k∗X_t: rows, then columns, zeros beyond the border; frames (..., H, W) as an array."""
    frames = np.asarray(frames, dtype=np.float64)
    if sigma == 0:
        return frames
    weights = gaussian_weights(sigma)
    for axis in (-2, -1):
        frames = correlate1d(frames, weights, axis, mode="constant", cval=0)
    return frames


def pyramid(clip, levels=8, sigma=20.0):
    """Level l is the clip (C, T, H, W) blurred with σ·(1 − l/(levels−1)); (levels, C, T, H, W)."""
    rungs = [gaussian_blur(clip, sigma * (1 - i / (levels - 1))) for i in range(levels)]
    return torch.from_numpy(np.stack(rungs))


def colour(clip, rgb):
    """The clip in one colour, in normalised space."""
    values = [(c - m) / s for c, m, s in zip(rgb, MEAN, STD, strict=True)]
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(clip.shape)


def look_up(levels, mask):
    """Mask value m reads the levels (L, C, T, H, W) at (L−1)·m, linearly; (C, T, H, W)."""
    top = len(levels) - 1
    voxels = []
    for t, y, x in np.ndindex(*mask.shape):
        height = top * mask[t, y, x]
        low = min(math.floor(height.item()), top - 1)
        above = height - low
        voxels.append((1 - above) * levels[low, :, t, y, x] + above * levels[low + 1, :, t, y, x])
    return torch.stack(voxels, -1).reshape(levels.shape[1:])


def equation_2(clip, mask, sigma):
    """M⊙X + (1−M)⊙(k∗X)."""
    return mask * clip + (1 - mask) * torch.from_numpy(gaussian_blur(clip, sigma))


# ------------------------------------------------------------------------- Eqs. 6-10: L_S and L_K


def area_loss(mask, v):
    """L_S of Eq. 6 over |M|: sort, subtract the template, square, add up.

    Choice: v·|M| is rounded to a whole number.
    """
    n = mask.numel()
    ones = round(v * n)
    template = torch.tensor([1.0] * ones + [0.0] * (n - ones), dtype=mask.dtype)
    ordered = mask.flatten().sort(descending=True).values
    return ((ordered - template) ** 2).sum() / n


TIE = 1e-5


def shares_of_ones(values, ones):
    """For each of the values: the share of the orders that sort them in which it meets a one.

    Values that tie with the one that meets the template's last 1 may be sorted in any order.
    """
    numbers = values.tolist()
    if ones == 0:
        return torch.zeros_like(values)
    last = sorted(numbers, reverse=True)[ones - 1]
    above = sum(v > last + TIE for v in numbers)
    tied = sum(abs(v - last) <= TIE for v in numbers)
    met = (ones - above) / tied
    shares = [1.0 if v > last + TIE else met if v >= last - TIE else 0.0 for v in numbers]
    return torch.tensor(shares, dtype=values.dtype)


def area_loss_with_ties(mask, v):
    """`area_loss`, averaged over all orders that sort the mask: same value, a gradient for ties."""
    values = mask.flatten()
    p = shares_of_ones(values, round(v * len(values)))
    return (p * (values - 1) ** 2 + (1 - p) * values**2).sum() / len(values)


def kernel(TK, HK, WK, shape="ellipsoid"):
    """K of Eqs. 9-10. Choice: an axis of length one (0/0 in Eq. 9) lies in the centre."""

    def place(i, n):
        return 2 * i / (n - 1) - 1 if n > 1 else 0.0

    k = np.zeros((TK, HK, WK))
    for t, i, j in np.ndindex(TK, HK, WK):
        d = place(i, HK) ** 2 + place(j, WK) ** 2
        if shape == "ellipsoid":
            d += place(t, TK) ** 2
        k[t, i, j] = 0 if d > 1 + 1e-9 else 1  # 1e-9: the poles lie on the surface
    return torch.from_numpy(k / k.sum())


def convolve(mask, K):
    """M∗K with strides (1, H_K, W_K), no padding; mask (T, H, W)."""
    T, H, W = mask.shape
    TK, HK, WK = K.shape
    out = []
    for t in range(T - TK + 1):
        for y in range(0, H - HK + 1, HK):
            for x in range(0, W - WK + 1, WK):
                out.append((mask[t : t + TK, y : y + HK, x : x + WK] * K).sum())
    return torch.stack(out)


def core_loss_printed(mask, v, K):
    """Eqs. 7-8: L_S^{βv}(M∗K)."""
    (T, H, W), (TK, HK, WK) = mask.shape, K.shape
    beta = T * H * W / ((T + TK - 1) * (H + HK - 1) * (W + WK - 1))
    return area_loss_with_ties(convolve(mask, K), beta * v)


def core_loss_released(mask, v, K):
    """SPEC §2: the k largest and the rest averaged apart and added, no β."""
    T, H, W = mask.shape
    values = convolve(mask, K)
    n = len(values)
    k = min(n, math.ceil(v * T * H * W / int(K.numel() * 0.5236)))
    p = shares_of_ones(values, k)
    full = (p * (values - 1) ** 2).sum() / k if k else 0
    return full + (((1 - p) * values**2).sum() / (n - k) if n > k else 0)


# ------------------------------------------------------------------------------------ Eq. 11: STEP


def step(
    model,
    clip,
    target,
    area,
    *,
    levels,
    iterations,
    step,
    sigma,
    kernel_length,
    kernel_size,
    kernel_shape="ellipsoid",
    core_form="printed",
    reward="probability",
    variant="preservation",
    on_canvas=True,
    learning_rate=0.05,
    area_weight=300,
    core_weight=300,
    core_start=101 / 1200,
):
    """One clip (3, T, H, W), one area, float64; ``levels`` are the clip's for `look_up`.

    λ1 grows ×1.0008668 per iteration of 1200, λ2 counts from ``core_start`` on; both times the
    number of seed cells over the paper's 16·16·16. The learning rate is for 1200 iterations.
    Returns the visible mask and the record of (Φ_c, L_S, L_K) before each step.
    """
    T, H, W = clip.shape[1:]
    s = step
    seeds = torch.ones(T, math.ceil(H / s), math.ceil(W / s), dtype=torch.float64)
    balance = seeds.numel() / 16**3
    K = kernel(kernel_length, kernel_size, kernel_size, kernel_shape) if kernel_length else None
    core = {"printed": core_loss_printed, "released": core_loss_released}[core_form]

    def phi(mask):
        return model(look_up(levels, mask)[None]).softmax(1)[0, target]

    def gain(mask):
        return phi(mask).log() if reward == "log" else phi(mask)

    velocity, record = None, []
    for i in range(iterations):
        seeds.requires_grad_(True)
        canvas = spread(seeds, H, W, s, sigma)
        mask = crop(canvas, H, W, sigma)
        weighed = canvas if on_canvas else mask
        lambda1 = balance * area_weight * 1.0008668 ** (1200 * i / iterations)
        lambda2 = balance * core_weight if i / iterations >= core_start else 0
        L_S = area_loss_with_ties(weighed, area)
        L_K = core(weighed, area, K) if K is not None else torch.zeros(())
        energy = lambda1 * L_S + lambda2 * L_K
        if variant in ("preservation", "dual"):
            energy = energy - gain(mask)
        if variant in ("deletion", "dual"):
            energy = energy + gain(1 - mask)
        seen = phi(1 - mask if variant == "deletion" else mask)
        record.append([seen.item(), L_S.item(), L_K.item()])
        (slope,) = torch.autograd.grad(energy, seeds)
        # torch.optim.SGD: the first velocity is the slope itself, dampening comes in afterwards
        velocity = slope if velocity is None else 0.9 * velocity + (1 - 0.9) * slope
        seeds = (seeds.detach() - learning_rate * 1200 / iterations * velocity).clamp(0, 1)
    return crop(spread(seeds, H, W, s, sigma), H, W, sigma), record


def smallest(probabilities, areas, phi0, variant="preservation"):
    """Eq. 4 for one clip: the index of the smallest v that is enough, or None."""
    enough = []
    for a, (p, v) in enumerate(zip(probabilities, areas, strict=True)):
        if (p <= phi0) if variant == "deletion" else (p >= phi0):
            enough.append((v, a))
    return min(enough)[1] if enough else None


def heatmap(masks):
    """Sum the masks (A, T, H, W) over areas, blur each frame with σ = 10 px at 112 (§V-A.3)."""
    total = np.zeros(masks.shape[1:])
    for mask in masks:
        total += np.asarray(mask, dtype=np.float64)
    sigma = 10 * min(total.shape[1:]) / 112
    reach = math.ceil(4 * sigma)
    return np.stack(
        [gaussian_filter(frame, sigma, mode="reflect", radius=reach) for frame in total]
    )


# ------------------------------------------------------------------------- Eqs. 12-19: the curves


def units(T, H, W, side):
    """Patches of a frame in raster order, each a list of (t, y, x); smaller at the far border."""
    found = []
    for t in range(T):
        for top in range(0, H, side):
            for left in range(0, W, side):
                rows, columns = range(top, min(top + side, H)), range(left, min(left + side, W))
                found.append([(t, y, x) for y in rows for x in columns])
    return found


def subsets(relevance, side, L, order):
    """The index set I split into I^(1) ... I^(L), each a list of pixels (§IV-A).

    Units go by the mean of the map over their pixels, ties in raster order. Choice: after l steps
    of MoRF ⌊l·U/L⌋ of the U units are done; LeRF takes the same subsets, the last one first, as
    the identities of Table II demand.
    """
    blocks = units(*relevance.shape, side)
    mean = [sum(float(relevance[p]) for p in block) / len(block) for block in blocks]
    ranked = sorted(range(len(blocks)), key=lambda u: -mean[u])  # stable
    L = min(L, len(blocks))
    split = []
    for step in range(1, L + 1):
        chosen = ranked[(step - 1) * len(blocks) // L : step * len(blocks) // L]
        split.append([pixel for u in chosen for pixel in blocks[u]])
    return split if order == "morf" else split[::-1]


def curve(model, clip, baseline, target, split, operation):
    """Φ_c after 0..L steps: Eqs. 12-18, one perturbed clip at a time."""
    H = np.full(clip.shape[1:], 0 if operation == "insertion" else 1)
    values = []
    for chosen in [[], *split]:
        h = np.zeros_like(H)
        for pixel in chosen:
            h[pixel] = 1
        H = H + h if operation == "insertion" else H - h
        shown = torch.from_numpy(H)
        with torch.no_grad():
            logits = model((shown * clip + (1 - shown) * baseline)[None])
        values.append(logits.softmax(1)[0, target].item())
    return values


def auc_mean(values):
    """Eq. 19: the mean over l = 1 ... L."""
    return sum(values[1:]) / (len(values) - 1)


def auc_trapezoid(values):
    return sum((a + b) / 2 for a, b in pairwise(values)) / (len(values) - 1)


# -------------------------------------------------------------------------------------- bootstrap


def bootstrap_mean(values, samples, level, seed):
    """Mean and percentile interval: resample with replacement, average, sort, read off."""
    rng, n = np.random.default_rng(seed), len(values)
    means = sorted(sum(values[i] for i in rng.integers(n, size=n)) / n for _ in range(samples))

    def percentile(q):
        place = q * (samples - 1)
        below = math.floor(place)
        above = min(below + 1, samples - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    return sum(values) / n, percentile((1 - level) / 2), percentile((1 + level) / 2)
