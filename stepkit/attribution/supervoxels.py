"""Cutting a clip into pieces that hang together: SLIC supervoxels, by scikit-image."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from skimage.segmentation import slic
from torch import Tensor

from stepkit._checks import require, tensor
from stepkit.clips import unnormalise

__all__ = ["side_by_side", "supervoxels"]


def supervoxels(clip: Tensor, segments: int, sigma: float = 0.8) -> Tensor:
    """Cut a clip into about ``segments`` connected supervoxels (SLIC-zero, §V-B).

    Every option whose default has changed between versions of scikit-image is fixed here.

    Parameters
    ----------
    clip : Tensor
        float32 (3, T, H, W), normalised; cut by its colours in Lab and the place in space-time.
    segments : int
        About how many.
    sigma : float
        Blur before cutting, in voxels; the released code's for XRAI is 0.8.

    Returns
    -------
    Tensor
        int64 (T, H, W), labels 0..K−1 without gaps.

    Examples
    --------
    >>> supervoxels(torch.randn(3, 4, 16, 16), 10).shape
    torch.Size([4, 16, 16])
    """
    tensor("clip", clip, "(3, T, H, W)")
    require(type(segments) is int and segments >= 1, "segments", segments, "at least 1")
    volume = unnormalise(clip).permute(1, 2, 3, 0).cpu().double().numpy()
    labels = slic(volume, segments, sigma=sigma, slic_zero=True, start_label=0, channel_axis=-1)
    numbered = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    return torch.from_numpy(numbered.astype(np.int64)).to(clip.device)


def side_by_side(cut: Callable, *pieces: Iterable) -> list:
    """Return ``cut(*piece)`` of each piece, on as many threads as torch has.

    scikit-image lets go of the interpreter while it cuts.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(cut, *pieces))
