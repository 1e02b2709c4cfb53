"""The equations once more: slow, literal, in float64, one loop for each sum or index of the paper.

Written from the paper (§III, §IV) and SPEC §2, not from `stepkit`, which it does not import. Where
the library had to choose something that the paper leaves open, the choice is stated here.
"""

import math
from functools import cache
from itertools import pairwise, product

import numpy as np
import torch
from scipy.ndimage import correlate1d, gaussian_filter
from scipy.stats import spearmanr
from skimage.segmentation import slic

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
    """K of Eqs. 9-10. Choice: an axis of length one (0/0 in Eq. 9) or two lies in the centre."""

    def place(i, n):
        return 2 * i / (n - 1) - 1 if n > 2 else 0.0

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
    reward=None,
    variant="preservation",
    on_canvas=True,
    optimiser="sgd",
    learning_rate=0.05,
    area_weight=300,
    core_weight=300,
    core_start=101 / 1200,
):
    """One clip (3, T, H, W), one area, float64; ``levels`` are the clip's for `look_up`.

    λ1 grows ×1.0008668 per iteration of 1200, λ2 counts from ``core_start`` on; both times the
    number of seed cells over the paper's 16·16·16. SGD's learning rate is for 1200 iterations. The
    reward is Φ, for deletion log Φ, unless one is named. Returns the visible mask and the record of
    (Φ_c, L_S, L_K) before each step.
    """
    T, H, W = clip.shape[1:]
    s = step
    seeds = torch.ones(T, math.ceil(H / s), math.ceil(W / s), dtype=torch.float64)
    balance = seeds.numel() / 16**3
    K = kernel(kernel_length, kernel_size, kernel_size, kernel_shape) if kernel_length else None
    core = {"printed": core_loss_printed, "released": core_loss_released}[core_form]
    reward = reward or ("log" if variant == "deletion" else "probability")

    def phi(mask):
        return model(look_up(levels, mask)[None]).softmax(1)[0, target]

    def gain(mask):
        return phi(mask).log() if reward == "log" else phi(mask)

    velocity, record = None, []
    mean = square = 0
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
        if optimiser == "adam":
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            size = (square / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8
            seeds = (seeds.detach() - learning_rate * mean / (1 - 0.9 ** (i + 1)) / size).clamp(
                0, 1
            )
            continue
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


# ------------------------------------------------------- Table I: CAM, Grad-CAM++, Score-CAM


def enlarge(cells, T, H, W):
    """Maps (t, h, w) to frames: bilinear about cell centres, no further than the outermost; in time
    the frame that the cell covers."""
    t, h, w = cells.shape

    def place(i, length, n):
        at = min(max((i + 0.5) * n / length - 0.5, 0), n - 1)
        low = min(math.floor(at), max(n - 2, 0))
        return low, min(low + 1, n - 1), at - low

    cells, out = cells.tolist(), np.zeros((T, H, W))
    for f, y, x in np.ndindex(T, H, W):
        (y0, y1, a), (x0, x1, b) = place(y, H, h), place(x, W, w)
        frame = cells[f * t // T]
        upper = (1 - b) * frame[y0][x0] + b * frame[y0][x1]
        lower = (1 - b) * frame[y1][x0] + b * frame[y1][x1]
        out[f, y, x] = (1 - a) * upper + a * lower
    return torch.from_numpy(out)


def cam(activation, weights):
    """Zhou 2016, Eq. 2: M(x, y) = Σ_k w_k f_k(x, y); activation (K, T, H, W)."""
    K, *cells = activation.shape
    out = torch.zeros(cells, dtype=torch.float64)
    for place in np.ndindex(*cells):
        for k in range(K):
            out[place] += weights[k] * activation[(k, *place)]
    return out


def grad_cam_pp(activation, slope):
    """Chattopadhay 2018, Eqs. 7 and 19 with Y = S instead of exp(S), at each time step by itself.

    Choice: the factor exp(S) of its derivatives is left out; a place without slope has α = 0.
    """
    K, T, H, W = activation.shape
    out = torch.zeros(T, H, W, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            total = sum(activation[k, t, a, b].item() for a, b in np.ndindex(H, W))
            weight = 0.0
            for i, j in np.ndindex(H, W):
                g = slope[k, t, i, j].item()
                if g != 0:
                    alpha = g**2 / (2 * g**2 + total * g**3)
                    weight += alpha * max(g, 0)
            for i, j in np.ndindex(H, W):
                out[t, i, j] += weight * activation[k, t, i, j]
        for i, j in np.ndindex(H, W):
            out[t, i, j] = max(out[t, i, j], 0)
    return out


def score_cam(score, clip, activation):
    """Wang 2020, algorithm 1; ``score`` maps a clip (3, T, H, W) to the class's number.

    Choice: a channel that is the same everywhere gets no weight.
    """
    K, *cells = activation.shape
    exponents = []
    for k in range(K):
        mask = enlarge(activation[k], *clip.shape[1:])
        low, high = min(mask.flatten().tolist()), max(mask.flatten().tolist())
        if high > low:
            exponents.append(math.exp(score((mask - low) / (high - low) * clip)))
        else:
            exponents.append(0.0)
    out = torch.zeros(cells, dtype=torch.float64)
    for place in np.ndindex(*cells):
        for k in range(K):
            out[place] += exponents[k] / sum(exponents) * activation[(k, *place)]
        out[place] = max(out[place], 0)
    return out


# ------------------------------------------ Table I: DeConvNet, Guided BP, DeepLIFT (rescale rule)


def relu_backward(rule, arrives, into, into_baseline):
    """What a layer of ReLUs passes back, unit by unit, of what arrives at its outputs."""
    passed = []
    for g, z, z0 in zip(arrives.tolist(), into.tolist(), into_baseline.tolist(), strict=True):
        if rule == "deconvnet":
            passed.append(max(g, 0))
        elif rule == "guided_backprop":
            passed.append(max(g, 0) if z > 0 else 0)
        elif z == z0:
            passed.append(g if z > 0 else 0)
        else:
            passed.append(g * (max(z, 0) - max(z0, 0)) / (z - z0))
    return torch.tensor(passed, dtype=torch.float64)


def residual_net_backward(rule, W1, W2, W3, x, x0):
    """What reaches the input of logit = W3·relu(z + W2·relu(z)), z = W1·x; all but ReLU linear.

    W1, W2 are matrices, W3 a row; x and the baseline x0 are vectors. Both ways to z count.
    """
    z, z0 = W1 @ x, W1 @ x0
    h, h0 = (a + W2 @ a.clamp(min=0) for a in (z, z0))
    to_h = relu_backward(rule, W3, h, h0)
    to_z = to_h + relu_backward(rule, W2.T @ to_h, z, z0)
    return W1.T @ to_z


# ---------------------------------------------- occlusion, RISE and LIME (Table I: 15, 40, 39)


def phi_of(model, clip, target):
    """Φ_c of one clip (C, T, H, W)."""
    with torch.no_grad():
        return model(clip[None]).softmax(1)[0, target].item()


def occlusion(model, clip, filling, target, window, stride):
    """The mean drop of Φ_c over the cuboids that cover a voxel; ``filling`` stands in them.

    Choice: cuboids begin at 0, s, 2s, ... until one reaches the far border, where it is cut.
    """

    def places(length, w, s):
        first = [0]
        while first[-1] + w < length:
            first.append(first[-1] + s)
        return [range(f, min(f + w, length)) for f in first]

    size = clip.shape[1:]
    drops = {voxel: [] for voxel in np.ndindex(*size)}
    intact = phi_of(model, clip, target)
    axes = [places(*axis) for axis in zip(size, window, stride, strict=True)]
    for frames in axes[0]:
        for rows in axes[1]:
            for columns in axes[2]:
                voxels = [(t, y, x) for t in frames for y in rows for x in columns]
                occluded = clip.clone()
                for t, y, x in voxels:
                    occluded[:, t, y, x] = filling[:, t, y, x]
                drop = intact - phi_of(model, occluded, target)
                for voxel in voxels:
                    drops[voxel].append(drop)
    means = [sum(found) / len(found) for found in drops.values()]
    return torch.tensor(means, dtype=torch.float64).reshape(size)


def rise_mask(bits, shift, size):
    """Bits (t, h, w) up-sampled to c + 1 cells of ⌈n/c⌉ voxels each way, cropped at ``shift``.

    Choice: linear between the centres of cells, constant beyond the outer ones.
    """
    bits, mask = np.asarray(bits, dtype=np.float64), np.zeros(size)
    for voxel in np.ndindex(*size):
        sides = []  # per axis: the two nearest cells and their weights
        for i, first, n, c in zip(voxel, shift, size, bits.shape, strict=True):
            place = (i + int(first) + 0.5) * c / ((c + 1) * math.ceil(n / c)) - 0.5
            low = math.floor(place)
            pair = [(low, low + 1 - place), (low + 1, place - low)]
            sides.append([(min(max(cell, 0), c - 1), weight) for cell, weight in pair])
        for t, a in sides[0]:
            for y, b in sides[1]:
                for x, c in sides[2]:
                    mask[voxel] += a * b * c * bits[t, y, x]
    return torch.from_numpy(mask)


def rise(model, clip, filling, target, masks, keep):
    """1/(N·p)·Σ Φ_c(M_i⊗X)·M_i."""
    total = torch.zeros(clip.shape[1:], dtype=torch.float64)
    for mask in masks:
        total += phi_of(model, mask * clip + (1 - mask) * filling, target) * mask
    return total / (len(masks) * keep)


def lime_coefficients(switches, phi):
    """β that minimises Σ π·(Φ − b − β·z)² + |β|², from its normal equations; (N, U), (N,) -> (U,).

    π = exp(−D²/(2·0.25²)), D = 1 − cos(z, 1), the cosine of no bits at all being 0.
    """
    N, U = len(switches), len(switches[0])
    left, right = np.zeros((U + 1, U + 1)), np.zeros(U + 1)
    for i in range(N):
        z = [float(bit) for bit in switches[i]]
        length = math.sqrt(sum(bit**2 for bit in z))
        distance = 1 - (sum(z) / (length * math.sqrt(U)) if length else 0)
        weight = math.exp(-(distance**2) / (2 * 0.25**2))
        row = [*z, 1.0]  # the intercept comes last
        for a in range(U + 1):
            right[a] += weight * row[a] * float(phi[i])
            for b in range(U + 1):
                left[a, b] += weight * row[a] * row[b]
    for a in range(U):  # not the intercept
        left[a, a] += 1
    return torch.from_numpy(np.linalg.solve(left, right)[:U])


def lime(model, clip, filling, target, units, switches):
    """β of each voxel's unit, units (T, H, W)."""
    phi = []
    for z in switches:
        mask = torch.zeros(clip.shape[1:], dtype=torch.float64)
        for voxel in np.ndindex(*mask.shape):
            mask[voxel] = z[units[voxel]]
        phi.append(phi_of(model, mask * clip + (1 - mask) * filling, target))
    return lime_coefficients(switches, phi)[units]


# --------------------------------------- Eq. 1: masks by optimisation (Table I: 16, 41, 42)


def bilinear(cells, H, W):
    """Cells (T, h, w) up-sampled frame by frame, pixel by pixel; (T, H, W).

    Choice: pixels and cells are little squares that fill the frame; beyond the outermost centres
    the border value goes on.
    """
    T, h, w = cells.shape
    frames = []
    for t in range(T):
        for y in range(H):
            for x in range(W):
                v = min(max((y + 0.5) * h / H - 0.5, 0), h - 1)
                u = min(max((x + 0.5) * w / W - 0.5, 0), w - 1)
                i, j = math.floor(v), math.floor(u)
                a, b = v - i, u - j
                k, m = min(i + 1, h - 1), min(j + 1, w - 1)
                upper = (1 - b) * cells[t, i, j] + b * cells[t, i, m]
                lower = (1 - b) * cells[t, k, j] + b * cells[t, k, m]
                frames.append((1 - a) * upper + a * lower)
    return torch.stack(frames).reshape(T, H, W)


def variation(cells, beta):
    """‖∇M‖_β^β: differences of neighbours in a frame; divided by the number of cells."""
    T, h, w = cells.shape
    total = 0
    for t in range(T):
        for i in range(h):
            for j in range(w):
                if i + 1 < h:
                    total = total + abs(cells[t, i + 1, j] - cells[t, i, j]) ** beta
                if j + 1 < w:
                    total = total + abs(cells[t, i, j + 1] - cells[t, i, j]) ** beta
    return total / (T * h * w)


def equation_1(model, clip, levels, cells, target, l1, l2, beta, variant="preservation"):
    """λ1·‖M‖₁ + λ2·‖∇M‖_β^β − Φ_c(M⊗X); for deletion + Φ_c((1−M)⊗X).

    Choice: |m| is m on [0, 1], so that it has the derivative 1 at 0 as well.
    """
    mask = bilinear(cells, *clip.shape[2:])
    norm = sum(mask.flatten()) / mask.numel()
    if variant == "preservation":
        reward = model(look_up(levels, mask)[None]).softmax(1)[0, target]
    else:
        reward = -model(look_up(levels, 1 - mask)[None]).softmax(1)[0, target]
    return l1 * norm + l2 * variation(cells, beta) - reward


def meaningful_perturbation(model, clip, levels, target, grid, iterations, l1, l2, beta, variant):
    """Adam (β1 = 0.9, β2 = 0.999, lr 0.1) on Eq. 1, one clip; the mask up-sampled."""
    cells = torch.full(grid, 1.0 if variant == "preservation" else 0.0, dtype=torch.float64)
    first, second = torch.zeros_like(cells), torch.zeros_like(cells)
    for i in range(1, iterations + 1):
        cells.requires_grad_(True)
        energy = equation_1(model, clip, levels, cells, target, l1, l2, beta, variant)
        (slope,) = torch.autograd.grad(energy, cells)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        move = (first / (1 - 0.9**i)) / ((second / (1 - 0.999**i)).sqrt() + 1e-8)
        cells = (cells.detach() - 0.1 * move).clamp(0, 1)
    return bilinear(cells, *clip.shape[2:])


def i_gos_prior(cells, l1, l2, beta):
    """g(M) = λ1·‖1−M‖₁ + λ2·‖∇M‖_β^β, both divided by the number of cells.

    Choice: the derivative of |·| at 0 is 0, as in the source's code.
    """
    norm = sum(abs(1 - value) for value in cells.flatten()) / cells.numel()
    return l1 * norm + l2 * variation(cells, beta)


def i_gos_slope(model, clip, levels, cells, target, S, l1, l2, beta, noise):
    """TG(M): the gradient of Φ_c at s/S·M with respect to M, averaged over s, and that of g.

    ``noise`` holds S clips that are added along the path.
    """
    cells = cells.clone().requires_grad_(True)
    (total,) = torch.autograd.grad(i_gos_prior(cells, l1, l2, beta), cells)
    for s in range(1, S + 1):
        shown = look_up(levels, s / S * bilinear(cells, *clip.shape[2:])) + noise[s - 1]
        phi = model(shown[None]).softmax(1)[0, target]
        total = total + torch.autograd.grad(phi, cells)[0] / S
    return total


def line_search(loss, cells, slope):
    """The source's revised Armijo condition, for the cells and the slope of one clip.

    Choice: α counts for 28×28 cells, and is stretched by the number of cells over that.
    """
    stretch = cells.numel() / 28**2
    alpha = 8.0
    while True:
        there = (cells - alpha * stretch * slope).clamp(0, 1)
        enough = loss(cells) - 1e-4 * alpha * stretch * (slope**2).sum()
        if loss(there) <= enough or alpha < 1e-5:
            return there, alpha
        alpha = alpha * 0.2


def i_gos(model, clip, levels, target, grid, iterations, S, l1, l2, beta, noise, search="mask"):
    """One clip; ``noise`` (iterations, S) clips. Returns 1−M.

    The line search looks at Φ_c of M⊗X, or of the clips along the path, averaged (no noise).
    """
    cells = torch.ones(grid, dtype=torch.float64)

    def loss(cells):
        phi = []
        for s in range(1, S + 1) if search == "path" else [S]:
            shown = look_up(levels, s / S * bilinear(cells, *clip.shape[2:]))
            phi.append(model(shown[None]).softmax(1)[0, target])
        return (sum(phi) / len(phi) + i_gos_prior(cells, l1, l2, beta)).detach()

    for i in range(iterations):
        slope = i_gos_slope(model, clip, levels, cells, target, S, l1, l2, beta, noise[i])
        cells, _ = line_search(loss, cells, slope)
    return 1 - bilinear(cells, *clip.shape[2:])


def defended_gradient(W, V, x, e, target):
    """∂(−log Φ_c)/∂e of the net z = V·max(0, W·e), neuron by neuron, with FG-Vis's rule.

    Returns the gradient and which neurons the rule stopped.
    """
    neurons, inputs = W.shape
    before, h, h_x = [], [], []
    for j in range(neurons):
        before.append(sum(W[j, i] * e[i] for i in range(inputs)))
        h.append(max(0.0, before[j]))
        h_x.append(max(0.0, sum(W[j, i] * x[i] for i in range(inputs))))
    z = [sum(V[k, j] * h[j] for j in range(neurons)) for k in range(len(V))]
    p = [math.exp(value - max(z)) for value in z]
    p = [value / sum(p) for value in p]
    gradient, stopped = [0.0] * inputs, []
    for j in range(neurons):
        signal = sum((p[k] - (k == target)) * V[k, j] for k in range(len(V)))
        stopped.append(h[j] > max(0.0, h_x[j]) or h[j] < min(0.0, h_x[j]))
        if not stopped[j] and before[j] > 0:
            for i in range(inputs):
                gradient[i] += signal * W[j, i]
    return np.array(gradient), stopped


def fg_vis(W, V, x, target, iterations, l1, learning_rate=0.1):
    """The preservation game for that net and one input x, reference 0; the mask of every input."""
    mask = np.ones_like(x)
    for _ in range(iterations):
        slope = defended_gradient(W, V, x, mask * x, target)[0] * x + l1 / len(x)
        mask = (mask - learning_rate * slope / abs(slope).max()).clip(0, 1)
    return mask


# ---------------------------------------------- refs. 24, 25, 27: excitation backprop and LRP


def handed_down(parents, activations, weights, biases, gamma, epsilon=0.0):
    """What children i and the biases receive of the relevance of parents j, weights[j][i].

    LRP in the usual form: R_i = Σ_j (c_ij + γ·c_ij⁺) / (Σ_i (c_ij + γ·c_ij⁺) ± ε) · R_j, where
    c_ij = a_i·w_ji and the bias is a child as well; γ = ∞ leaves c⁺ alone. Excitation backprop
    (P(child | parent) ∝ a·w⁺, no biases) is γ = ∞ with biases of None. Nothing is handed down by
    a parent whose sum is 0.
    """

    def weighed(c):
        return max(c, 0) if math.isinf(gamma) else c + gamma * max(c, 0)

    below, taken = [0.0] * len(activations), 0.0
    for j, relevance in enumerate(parents):
        parts = [weighed(a * w) for a, w in zip(activations, weights[j], strict=True)]
        bias = 0.0 if biases is None else weighed(biases[j])
        total = sum(parts) + bias
        if total == 0:
            continue
        total += epsilon if total > 0 else -epsilon
        for i, part in enumerate(parts):
            below[i] += part / total * relevance
        taken += bias / total * relevance
    return below, taken


def convolution_matrix(kernel, sizes, padding):
    """Stride 1, weights[j][i] over (C, T, H, W) in raster order, and the output's sizes."""
    out = [n + 2 * p - k + 1 for n, p, k in zip(sizes, padding, kernel.shape[2:], strict=True)]
    C, (T, H, W) = kernel.shape[1], sizes
    rows = []
    for k in range(kernel.shape[0]):
        for t, y, x in np.ndindex(*out):
            row = [0.0] * (C * T * H * W)
            for c, dt, dy, dx in np.ndindex(*kernel.shape[1:]):
                at = (t + dt - padding[0], y + dy - padding[1], x + dx - padding[2])
                if all(0 <= i < n for i, n in zip(at, sizes, strict=True)):
                    i = ((c * T + at[0]) * H + at[1]) * W + at[2]
                    row[i] += float(kernel[k, c, dt, dy, dx])
            rows.append(row)
    return rows, out


def lstm_handed_down(lstm, x, hidden, excitatory, activate):
    """Relevance (T, D) of the features x (T, D), from that of the hidden states (T, hidden).

    Signal takes all: gates are constants, so the cell c = f·c' + i·g shares between c' and g, and
    the candidate g between features and last state, by a·w (excitatory: a·w⁺; else the bias is a
    child). ``lstm`` holds W (4h, D), U (4h, h), b (4h); gates lie in the order i, f, g, o.
    """
    W, U, b = lstm
    T, n = len(x), len(hidden[0])
    h, c, steps = [0.0] * n, [0.0] * n, []
    for t in range(T):
        z = [
            float(sum(W[k][d] * x[t][d] for d in range(len(x[t]))) + b[k])
            + float(sum(U[k][m] * h[m] for m in range(n)))
            for k in range(4 * n)
        ]
        i, f, o = ([1 / (1 + math.exp(-z[k * n + m])) for m in range(n)] for k in (0, 1, 3))
        g = [activate(z[2 * n + m]) for m in range(n)]
        cell = [f[m] * c[m] + i[m] * g[m] for m in range(n)]
        steps.append((h, c, i, f, g, cell))
        h, c = [o[m] * activate(cell[m]) for m in range(n)], cell
    found, of_state, of_cell = [None] * T, [0.0] * n, [0.0] * n
    for t in reversed(range(T)):
        h, c, i, f, g, cell = steps[t]
        of_candidate = [0.0] * n
        for m in range(n):
            R = float(hidden[t][m]) + of_state[m] + of_cell[m]
            of_candidate[m] = R * i[m] * g[m] / cell[m] if cell[m] else 0.0
            of_cell[m] = R * f[m] * c[m] / cell[m] if cell[m] else 0.0
        children = [float(v) for v in x[t]] + h
        rows = [[float(w) for w in (*W[2 * n + m], *U[2 * n + m])] for m in range(n)]
        biases = None if excitatory else [float(b[2 * n + m]) for m in range(n)]
        gamma = math.inf if excitatory else 0
        below, _ = handed_down(of_candidate, children, rows, biases, gamma)
        found[t], of_state = below[: len(x[t])], below[len(x[t]) :]
    return found


# ----------------------------------------------------------------------- Eqs. 20-21: reliability


def beating_random(A, r, p, lower_is_better):
    """Eq. 21: w_p."""
    M = len(A[p])
    better = [A[p][m] < r[p] if lower_is_better else A[p][m] > r[p] for m in range(M)]
    return sum(better) / M


def spearman(a, b):
    """Spearman's ρ with mean ranks for ties; None where all of a row tie."""
    if len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)


def reliability(A, r, drawn=None, lower_is_better=False, include_random=False):
    """Eq. 20: α of the samples ``drawn`` (all of them, once each); None without a pair.

    Choices: a pair without ρ is in neither sum, nor is a sample paired with a copy of itself.
    """
    rows = [list(map(float, row)) for row in A]
    if include_random:
        rows = [[*row, float(x)] for row, x in zip(rows, r, strict=True)]
    drawn = range(len(r)) if drawn is None else drawn
    above = below = 0.0
    for i in range(len(drawn) - 1):
        for j in range(i + 1, len(drawn)):
            p, q = int(drawn[i]), int(drawn[j])
            rho = None if p == q else spearman(rows[p], rows[q])
            if rho is not None:
                w_p = beating_random(A, r, p, lower_is_better)
                w_q = beating_random(A, r, q, lower_is_better)
                above += w_p * w_q * rho
                below += w_p * w_q
    return above / below if below else None


def reliability_interval(A, r, samples, level, seed, **options):
    """Percentile bootstrap over samples; those without a pair count for nothing."""
    rng, n = np.random.default_rng(seed), len(r)
    alphas = [reliability(A, r, rng.integers(n, size=n), **options) for _ in range(samples)]
    alphas = [alpha for alpha in alphas if alpha is not None]
    return np.quantile(alphas, [(1 - level) / 2, (1 + level) / 2]).tolist()


# ----------------------------------------------------------- §V-H: the pointing game; pixel masks


def maximum(frame):
    """Row and column of the first maximum of (H, W) in raster order."""
    best = (0, 0)
    for y, x in np.ndindex(*frame.shape):
        if float(frame[y, x]) > float(frame[best]):
            best = (y, x)
    return best


def circle_meets(box, point, radius):
    """Whether the disc around the pixel's centre has a point in common with the box."""
    x0, y0, x1, y1 = map(float, box)
    cx, cy = point[1] + 0.5, point[0] + 0.5
    nearest = min(max(cx, x0), x1), min(max(cy, y0), y1)
    return math.hypot(nearest[0] - cx, nearest[1] - cy) <= radius


def in_grown_box(box, point, radius):
    x0, y0, x1, y1 = map(float, box)
    cx, cy = point[1] + 0.5, point[0] + 0.5
    return x0 - radius <= cx <= x1 + radius and y0 - radius <= cy <= y1 + radius


def pointing_game(maps, boxes, radius, meets=circle_meets):
    """Hits (N lists of T), None for a frame without box, and their share among the others."""
    hits = []
    for n in range(len(maps)):
        hits.append([])
        for t in range(len(maps[n])):
            of_frame = boxes[n][t] if len(boxes[n]) else []
            point = maximum(maps[n][t])
            met = any(meets(box, point, radius) for box in of_frame)
            hits[n].append(met if len(of_frame) else None)
    counted = [hit for of_clip in hits for hit in of_clip if hit is not None]
    return hits, sum(counted) / len(counted)


def relevance_mass(relevance, mask):
    """Share of the positive relevance of one clip (T, H, W) inside the mask."""
    inside = total = 0.0
    for p in np.ndindex(*relevance.shape):
        positive = max(float(relevance[p]), 0.0)
        total += positive
        inside += positive if mask[p] else 0.0
    return inside / total if total and mask.any() else math.nan


def iou(relevance, mask):
    """Overlap of the mask of one clip with as many of the highest voxels.

    What they have in common, averaged over all orders that sort the map: two of them, in which
    those of B come first and last among equals, hold the extremes, but only the mean is fair.
    """
    value = {p: float(relevance[p]) for p in np.ndindex(*relevance.shape)}
    B = [p for p in value if mask[p]]
    if not B or len(set(value.values())) == 1:
        return math.nan
    common = 0.0
    for p in B:  # the chance that p is among the first len(B)
        ahead = sum(v > value[p] for v in value.values())
        equal = sum(v == value[p] for v in value.values())
        common += min(max(len(B) - ahead, 0) / equal, 1)
    return common / (2 * len(B) - common)


# ---------------------------------------------------------------- Eqs. 22-27: averaged gradients


def probability_gradient(model, x, c):
    """∂Φ_c/∂X of one clip (3, T, H, W)."""
    x = x.clone().requires_grad_()
    phi = torch.softmax(model(x[None])[0], 0)[c]
    return torch.autograd.grad(phi, x)[0]


def integrated_gradient(model, x, baseline, c, m, rule):
    """Eq. 24, with k = 1..m ("right") or 0..m−1 ("left"); signed, (3, T, H, W)."""
    total = torch.zeros_like(x)
    for k in range(1, m + 1) if rule == "right" else range(m):
        total += probability_gradient(model, baseline + k / m * (x - baseline), c)
    return (x - baseline) * total / m


def smooth_gradient(model, x, c, noises, squared=False):
    """Eqs. 25-26 for given noise, a list of (3, T, H, W)."""
    total = torch.zeros_like(x)
    for noise in noises:
        slope = probability_gradient(model, x + noise, c)
        total += slope**2 if squared else slope
    return total / len(noises)


def blur_integrated_gradient(model, x, c, m, sigma_max):
    """Eq. 27 with ∂g/∂σ as a difference over 0.01 px; signed, (3, T, H, W).

    Choice: all blurs of the path are truncated at ⌈4·σ_max⌉.
    """

    def g(sigma):
        blurred = torch.empty_like(x)
        for colour in range(x.shape[0]):
            for t in range(x.shape[1]):
                frame = x[colour, t].numpy()
                if sigma > 0:
                    options = {"mode": "constant", "radius": math.ceil(4 * sigma_max)}
                    frame = gaussian_filter(frame, sigma, **options)
                blurred[colour, t] = torch.from_numpy(np.array(frame))
        return blurred

    total = torch.zeros_like(x)
    for k in range(1, m + 1):
        sigma = (k - 1) * sigma_max / m
        change = (g(sigma + 0.01) - g(sigma)) / 0.01
        total += probability_gradient(model, g(sigma), c) * change * sigma_max / m
    return total


# ------------------------------------------------------------------------------- ref. 34: XRAI


def ranked_regions(attribution, labels, least):
    """Greedy cover by the highest mean attribution of what a region adds, with sets of voxels."""
    voxels = list(np.ndindex(*attribution.shape))
    regions = []
    for scale in labels:
        members = {}
        for voxel in voxels:
            members.setdefault(int(scale[voxel]), set()).add(voxel)
        regions += [members[label] for label in sorted(members)]
    found = np.full(attribution.shape, np.nan)
    covered = set()
    while True:
        best, gain = None, -math.inf
        for region in regions:
            added = region - covered
            if len(added) >= least:
                mean = math.fsum(attribution[voxel] for voxel in added) / len(added)
                if mean > gain:
                    best, gain = added, mean
        if best is None:
            break
        for voxel in best:
            found[voxel] = gain
        covered |= best
    rest = set(voxels) - covered
    for voxel in rest:
        found[voxel] = math.fsum(attribution[v] for v in rest) / len(rest)
    return found


# ------------------------------------------------ §IV-A, §V-C: superpixels as units of the curves


def superpixels(clip, segments, per):
    """Superpixels of a normalised clip (3, T, H, W), each a list of (t, y, x).

    Every frame by itself (printed), or the frames' parts of supervoxels of the clip (released).
    Choice: σ = 1 for both; the units of the first frame come first, in a frame by SLIC's label.
    """
    T, H, W = clip.shape[1:]
    volume = np.empty((T, H, W, 3))
    for t, y, x, c in np.ndindex(T, H, W, 3):
        volume[t, y, x, c] = min(max(float(clip[c, t, y, x]) * STD[c] + MEAN[c], 0.0), 1.0)
    options = {"slic_zero": True, "sigma": 1, "start_label": 0, "channel_axis": -1}
    if per == "frame":
        labels = [slic(volume[t : t + 1], segments, **options)[0] for t in range(T)]
    else:
        labels = slic(volume, segments, **options)
    found = []
    for t in range(T):
        members = {}
        for y, x in np.ndindex(H, W):
            members.setdefault(int(labels[t][y, x]), []).append((t, y, x))
        found += [members[label] for label in sorted(members)]
    return found


def split_units(relevance, blocks, L, order, rank_by):
    """I^(1) ... I^(L) of any units, as `subsets`; with more steps than units, some are empty."""
    worth = []
    for block in blocks:
        total = sum(float(relevance[p]) for p in block)
        worth.append(total / len(block) if rank_by == "mean" else total)
    ranked = sorted(range(len(blocks)), key=lambda u: -worth[u])  # stable
    split = []
    for step in range(1, L + 1):
        chosen = ranked[(step - 1) * len(blocks) // L : step * len(blocks) // L]
        split.append([pixel for u in chosen for pixel in blocks[u]])
    return split if order == "morf" else split[::-1]


# ----------------------------------------------------------------- §V-I: what KAR keeps of a clip


def keep_share(clip, values, ratio, colour):
    """The clip (3, T, H, W) with all but its highest voxels painted over; raster order in ties."""
    _, T, H, W = clip.shape
    places = list(product(range(T), range(H), range(W)))
    places.sort(key=lambda p: -values[p].item())  # Python's sort is stable
    painted = clip.clone()
    for t, i, j in places[round(ratio * len(places)) :]:
        for c in range(3):
            painted[c, t, i, j] = colour[c]
    return painted
