"""XRAI: regions, ranked by how much attribution they bring (paper §V-B, ref. 34)."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from stepkit._checks import require
from stepkit.attribution._methods import method
from stepkit.attribution.gradients import path_gradient
from stepkit.attribution.supervoxels import side_by_side, supervoxels
from stepkit.removal import constant

__all__ = ["rank_regions", "xrai"]

_method = partial(method, family="gradient", needs_gradient=True)

LEAST = 50 / (16 * 112 * 112)  # share of the clip that a region must add: 50 voxels, released


@_method("xrai", order=11, label="XRAI", source="§V-B; Kapishnikov 2019", resolution="supervoxel")
def xrai(
    model, clips, targets, work, *, segments=(50, 100, 150, 250, 500, 1200), steps=50
) -> Tensor:
    """XRAI over 3-D supervoxels; (N, T, H, W), in each voxel its region's mean attribution.

    The clip is cut at several scales (`supervoxels`). Integrated gradients, summed over RGB and
    averaged over a black and a white baseline, say what a region is worth, see
    `rank_regions`. Unlike in the source, segments are not widened by 5 px, and unlike in the
    released code, the baselines do not depend on the other clips of a batch.

    Parameters
    ----------
    segments : tuple of int
        About how many supervoxels, for each scale. Printed: the default; released: 10, 20, 50, 60,
        80, 100.
    steps : int
        Points of the path, for each baseline.

    Source: Kapishnikov 2019.
    """
    scales = isinstance(segments, tuple | list) and len(segments) > 0
    require(scales, "segments", segments, "numbers of supervoxels, one for each scale")
    attribution = torch.zeros_like(clips[:, 0])
    for colour in ((0, 0, 0), (1, 1, 1)):
        baseline = constant(colour).nothing(clips)
        paths = path_gradient(model, clips, targets, work, baseline, steps)
        attribution += paths.sum(1) / 2

    def ranked(clip, values):
        labels = [supervoxels(clip, number).numpy() for number in segments]
        return torch.from_numpy(rank_regions(values.double().numpy(), labels))

    return torch.stack(side_by_side(ranked, clips.cpu(), attribution.cpu())).to(clips)


def rank_regions(attribution: np.ndarray, labels: list[np.ndarray]) -> np.ndarray:
    """Cover a clip with regions, the one that adds the highest mean attribution first.

    What a region adds are its voxels that no region before it covered; it must add at least
    50/(16·112·112) of the clip. Each voxel gets the mean attribution of what came with it, and
    those that no region could add the mean of their own. Ties go to the coarser scale, and there
    to the lower label. A region can be worth more than one chosen before it, once the part that
    they share is gone: the map holds what each is worth, as the source's does.

    Parameters
    ----------
    attribution : ndarray
        float64 (T, H, W).
    labels : list of ndarray
        For each scale integers (T, H, W) from 0 without gaps.

    Returns
    -------
    ndarray
        float64 (T, H, W).
    """
    values = attribution.ravel()
    flat = np.stack([scale.ravel() for scale in labels])
    flat = flat + np.cumsum([0, *flat.max(1)[:-1] + 1])[:, None]  # a number for each region
    left = np.bincount(flat.ravel())  # voxels not covered yet
    sums = np.bincount(flat.ravel(), np.tile(values, len(flat)))
    voxels = flat.argsort(axis=None, kind="stable") % values.size
    regions = np.split(voxels, left.cumsum()[:-1])
    least = max(1, round(LEAST * values.size))
    found, covered = np.empty_like(values), np.zeros(values.size, bool)
    while (left >= least).any():
        gain = np.where(left >= least, sums / np.maximum(left, 1), -np.inf)
        best = int(gain.argmax())
        new = regions[best][~covered[regions[best]]]
        found[new], covered[new] = gain[best], True
        gone = flat[:, new].ravel()
        left -= np.bincount(gone, minlength=len(left))
        sums -= np.bincount(gone, np.tile(values[new], len(flat)), minlength=len(left))
    if not covered.all():
        found[~covered] = values[~covered].mean()
    return found.reshape(attribution.shape)
