"""The compiled loops against the plain torch that serves the other dtypes and devices."""

import pytest
import torch

from stepkit import _kernels, removal
from stepkit.attribution.objective import area_loss, top_share
from stepkit.attribution.smoothmax import MaskGeometry

SIZES = [(12, 10, 3, 2), (9, 13, 2, 3), (5, 3, 1, 1), (2, 7, 7, 11), (48, 48, 3, 5)]


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def with_gradient(function, values, upstream=None):
    """Return function(values) and the gradient of its product with ``upstream``."""
    values = values.clone().requires_grad_(True)
    out = function(values)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out)
    return out.detach(), torch.autograd.grad(out, values, upstream)[0]


def agree(ours, expected, atol):
    # exp(20z) carries 20 rounding errors of z: 5e-6 relative is what torch's own float32 reaches
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=5e-6, atol=atol)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
def test_smooth_max(size, threads):
    geometry = MaskGeometry(*size)
    seeds, upstream = draw(2, 3, *geometry.seeds), draw(2, 3, *geometry.canvas, seed=1)
    ours = with_gradient(geometry.spread, seeds, upstream)
    agree(ours, with_gradient(geometry.spread, seeds.double(), upstream), 2e-5)


def test_smooth_max_does_not_depend_on_the_number_of_threads():
    geometry, found = MaskGeometry(48, 48, 3, 5), []
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(with_gradient(geometry.spread, draw(5, *geometry.seeds)))
    torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_power_of_two_over_all_exponents_it_can_meet():
    x = torch.linspace(0, kernels_limit := 29.0, 100_001)
    assert kernels_limit > 20 / torch.tensor(2.0).log()
    found = torch.tensor([_kernels._exp2.py_func(value) for value in x.numpy()[::50]])
    assert (found / x[::50].double().exp2() - 1).abs().max() < 3e-7


@pytest.mark.parametrize("levels", [2, 8])
def test_read(levels, threads):
    ladder = draw(2, levels, 3, 4, 5, 6) - 0.5
    mask = draw(2, 3, 4, 5, 6, seed=1)
    mask[0, 0, 0, 0, :3] = torch.tensor([0.0, 1.0, 0.5])
    upstream = draw(2, 3, 3, 4, 5, 6, seed=2)
    ours = with_gradient(lambda m: removal.read(ladder, m), mask, upstream)
    double = ladder.double()
    agree(ours, with_gradient(lambda m: removal.read(double, m), mask.double(), upstream), 3e-6)


def test_gradient_to_the_ladder():
    ladder = draw(1, 2, 3, 2, 4, 4).requires_grad_(True)
    removal.read(ladder, torch.full((1, 1, 2, 4, 4), 0.25)).sum().backward()
    expected = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1, 1).expand(ladder.shape[1:])
    torch.testing.assert_close(ladder.grad[0], expected)


VALUES = {
    "random": draw(3, 2, 200),
    "signed": draw(3, 2, 200) - 0.5,
    "ties": draw(3, 2, 200).mul(5).round().div(5),
    "equal": torch.full((3, 2, 200), 0.25),
    "zeros of both signs": torch.tensor([0.0, -0.0]).repeat(3, 2, 100),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("counts", [[0, 1], [10, 199], [200, 77]])
def test_top_share(values, counts, threads):
    ours = top_share(values, counts)
    torch.testing.assert_close(ours.double(), top_share(values.double(), counts), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sum(2), torch.tensor([counts] * 3).float())


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_area_loss(values):
    masks, upstream = values.view(3, 2, 2, 10, 10), draw(3, 2, seed=1)
    ours = with_gradient(lambda m: area_loss(m, (0.1, 0.5)), masks, upstream)
    expected = with_gradient(lambda m: area_loss(m, (0.1, 0.5)), masks.double(), upstream)
    agree(ours, expected, 1e-6)


def test_nan_stays_nan():
    geometry = MaskGeometry(12, 10, 3, 2)
    seeds = draw(2, *geometry.seeds)
    seeds[1] = float("nan")
    canvas = geometry.spread(seeds)
    assert canvas[0].isfinite().all()
    assert canvas[1].isnan().any()
    mask = torch.full((1, 1, 1, 2, 2), float("nan"))
    assert removal.read(draw(1, 8, 3, 1, 2, 2), mask).isnan().all()
    assert area_loss(mask, (0.5,)).isnan().all()
