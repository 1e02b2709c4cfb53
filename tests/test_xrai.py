"""Supervoxels, and XRAI's ranking of them."""

import time

import numpy as np
import pytest
import reference
import torch
from planted import Planted, near, tube
from scipy.ndimage import label

from stepkit import attribute
from stepkit.attribution.supervoxels import supervoxels
from stepkit.attribution.xrai import LEAST, rank_regions
from stepkit.data import Synthetic

CLIP = Synthetic("appearance", n=1, frames=4, size=(36, 28))[0].clip


@pytest.mark.parametrize("segments", [1, 12, 60])
def test_supervoxels_are_connected_numbered_and_about_as_many_as_asked(segments):
    found = supervoxels(CLIP, segments)
    assert found.shape == CLIP.shape[1:]
    numbers = found.unique()
    assert numbers.tolist() == list(range(len(numbers)))
    assert segments / 2 <= len(numbers) <= 2 * segments
    assert all(label((found == n).numpy())[1] == 1 for n in numbers)
    assert torch.equal(found, supervoxels(CLIP, segments))


def test_supervoxels_follow_edges():
    clip = torch.zeros(3, 4, 24, 24)
    clip[:, :, :, 9:] = 2.0
    found = supervoxels(clip, 12)
    left, right = found[..., :8].unique(), found[..., 10:].unique()  # the blur takes a pixel
    assert not set(left.tolist()) & set(right.tolist())


@pytest.mark.parametrize("segments", [0, 2.5, True])
def test_a_bad_number_of_segments_is_named(segments):
    with pytest.raises(ValueError, match=r"^segments: got"):
        supervoxels(CLIP, segments)


@pytest.mark.parametrize("seed", range(4))
def test_ranking_is_the_literal_one(seed):
    rng = np.random.default_rng(seed)
    size = (3, 12, 10)
    attribution = rng.standard_normal(size)
    if seed == 0:
        attribution = attribution.round()  # ties in plenty
    labels = [np.unique(rng.integers(0, n, size), return_inverse=True)[1] for n in (4, 9, 30)]
    labels = [found.reshape(size) for found in labels]
    least = max(1, round(LEAST * attribution.size))
    twin = reference.ranked_regions(attribution, labels, least)
    np.testing.assert_allclose(rank_regions(attribution, labels), twin, rtol=1e-9, atol=1e-12)


def test_what_is_too_small_to_add_gets_its_own_mean():
    size = (16, 112, 112)  # a region must add 50 voxels
    labels, values = np.zeros(size, int), np.zeros(size)
    labels[0, 0, :40], values[0, 0, :40] = 1, 5.0
    found = rank_regions(values, [labels])
    assert (found[0, 0, :40] == 5.0).all()
    assert np.abs(found).sum() == 200


def test_ranking_is_much_faster_than_sets():
    rng = np.random.default_rng(0)
    size = (4, 24, 24)
    attribution = rng.standard_normal(size)
    labels = [rng.permutation(np.arange(attribution.size) % n).reshape(size) for n in (10, 20, 40)]
    times = []
    for run in (rank_regions, lambda a, s: reference.ranked_regions(a, s, 1)):
        start = time.process_time()
        run(attribution, labels)
        times.append(time.process_time() - start)
    assert times[1] > 5 * times[0]  # 20 and more at full size: benchmarks/xrai.py


def scenes(region, n):
    """Fine texture in the region, smooth colours elsewhere."""
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(n, 3, 2, 3, 3, generator=draw)
    smooth = 0.3 * torch.nn.functional.interpolate(low, region.shape, mode="trilinear")
    return torch.where(region, 1.4 * torch.randn(n, 3, *region.shape, generator=draw), smooth)


def test_the_maximum_is_on_the_evidence():
    size = (4, 32, 32)
    region = tube(*size, share=0.08)
    options = {"segments": (50, 150, 400), "steps": 8}
    found = attribute("xrai", Planted(region, gain=3.0), scenes(region, 20), 1, **options)
    close = near(region, 7 * 32 / 112)  # a segment follows the edge only so well
    hits = close.flatten()[found.flatten(1).argmax(1)].float().mean()
    assert hits >= 0.95


def test_neither_batches_nor_neighbours_change_a_map():
    size = (4, 24, 24)
    region = tube(*size)
    model, clips = Planted(region, gain=3.0), scenes(region, 3)
    options = {"segments": (10, 30), "steps": 5}
    found = attribute("xrai", model, clips, 1, batch_size=2, **options)
    alone = attribute("xrai", model, clips[2:], 1, batch_size=9, **options)
    torch.testing.assert_close(found[2:], alone, rtol=1e-4, atol=1e-8)


def test_bad_segments_are_named():
    with pytest.raises(ValueError, match=r"^segments: got 50"):
        attribute("xrai", Planted(tube(4, 24, 24)), scenes(tube(4, 24, 24), 1), 1, segments=50)
