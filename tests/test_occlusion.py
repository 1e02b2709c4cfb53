"""Occlusion, RISE and LIME: the equations, second witnesses, known answers, and their promises."""

import pytest
import reference
import torch
from planted import Planted, near, noise, tube
from test_models import Watched, same_state, state_of
from torch import nn

from stepkit import attribute, methods, removal
from stepkit.attribution.occlusion import _grids, _ridge, _stretch, _switches, supervoxels
from stepkit.networks import load_model

SMALL = {
    "occlusion": {"window": (1, 3, 4)},
    "rise": {"samples": 20},
    "lime": {"samples": 20, "segments": 12},
}
NAMES = list(SMALL)
BATCHES = pytest.mark.parametrize("name", NAMES)


class Smooth(nn.Module):
    """Logits that depend on every voxel in its own way, in whatever precision the clip has."""

    def forward(self, x):
        place = torch.arange(x[0].numel(), dtype=torch.float64).view(x.shape[1:])
        sums = [(x * (place * k).sin().to(x)).sum((1, 2, 3, 4)) for k in (0.7, 1.1, 1.9)]
        return torch.stack(sums, 1) / x[0].numel() ** 0.5


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------- against literal loops


FILLINGS = {
    "fade": lambda clip: torch.zeros_like(clip),
    "black": lambda clip: reference.colour(clip, (0, 0, 0)),
    "blur": lambda clip: torch.from_numpy(reference.gaussian_blur(clip, 2.0)),
}
REMOVALS = {"fade": "fade", "black": removal.black(), "blur": removal.blur(sigma=2.0)}
WINDOWS = [((2, 3, 3), (1, 2, 2)), ((3, 4, 2), (2, 3, 2)), ((1, 5, 6), (1, 5, 1))]


@pytest.mark.parametrize("kind", REMOVALS)
@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_occlusion_agrees_with_loops(window, stride, kind):
    x = noise(4, 7, 6, n=2)
    options = {"window": window, "stride": stride, "removal": REMOVALS[kind]}
    found = attribute("occlusion", Smooth(), x, [0, 2], **options)
    for i, target in enumerate((0, 2)):
        clip = x[i].double()
        filling = FILLINGS[kind](clip)
        expected = reference.occlusion(Smooth(), clip, filling, target, window, stride)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("cells", "size"), [((2, 3, 3), (4, 7, 6)), ((1, 2, 4), (3, 5, 9))])
def test_rise_masks_agree_with_loops_and_with_interpolation(cells, size):
    bits, shifts = _grids(6, cells, size, 0.5, generator(1))
    found = _stretch(bits.float(), shifts, size)
    for mask, grid, shift in zip(found, bits, shifts, strict=True):
        expected = reference.rise_mask(grid, shift, size)
        torch.testing.assert_close(mask.double(), expected, rtol=0, atol=1e-6)
        large = [(c + 1) * -(-n // c) for c, n in zip(cells, size, strict=True)]
        large = nn.functional.interpolate(grid[None, None].float(), large, mode="trilinear")[0, 0]
        crop = tuple(slice(s, s + n) for s, n in zip(shift.tolist(), size, strict=True))
        torch.testing.assert_close(mask, large[crop], rtol=0, atol=1e-6)


@pytest.mark.parametrize("divide_by", ["expected", "observed"])
@pytest.mark.parametrize("kind", ["fade", "black"])
def test_rise_agrees_with_loops(kind, divide_by):
    x, options = noise(4, 7, 6, n=2), {"samples": 20, "cells": (2, 3, 3), "keep": 0.3}
    options["divide_by"] = divide_by
    found = attribute("rise", Smooth(), x, [0, 2], seed=[5, 6], removal=REMOVALS[kind], **options)
    for i, target in enumerate((0, 2)):
        clip = x[i].double()
        bits, shifts = _grids(20, (2, 3, 3), (4, 7, 6), 0.3, generator(5 + i))
        masks = [reference.rise_mask(*pair, (4, 7, 6)) for pair in zip(bits, shifts, strict=True)]
        keep = 0.3 if divide_by == "expected" else torch.stack(masks).mean(0)
        expected = reference.rise(Smooth(), clip, FILLINGS[kind](clip), target, masks, keep)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("samples", [8, 40])  # fewer samples than units: the penalty decides
def test_lime_coefficients_agree_with_loops(samples):
    switches = _switches(samples, 10, generator(0))
    switches[1] = 0  # the cosine of nothing
    phi = torch.rand(samples, generator=generator(1))
    expected = reference.lime_coefficients(switches, phi)
    torch.testing.assert_close(_ridge(switches, phi), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", REMOVALS)
def test_lime_agrees_with_loops(kind):
    x = noise(4, 7, 6, n=2)
    options = {"samples": 30, "segments": 8, "removal": REMOVALS[kind]}
    found = attribute("lime", Smooth(), x, [0, 2], seed=[5, 6], **options)
    for i, target in enumerate((0, 2)):
        clip, units = x[i].double(), supervoxels(x[i], 8)
        switches = _switches(30, int(units.max()) + 1, generator(5 + i))
        filling = FILLINGS[kind](clip)
        expected = reference.lime(Smooth(), clip, filling, target, units, switches)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ second witnesses


@pytest.mark.parametrize("kind", ["fade", "blur"])
@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_occlusion_agrees_with_captum(window, stride, kind):
    captum = pytest.importorskip("captum.attr")
    x, phi = noise(4, 7, 6, n=2), nn.Sequential(Smooth(), nn.Softmax(1))
    expected = captum.Occlusion(phi).attribute(
        x,
        sliding_window_shapes=(3, *window),
        strides=(3, *stride),
        baselines=removal.named(REMOVALS[kind]).nothing(x),
        target=torch.tensor([0, 2]),
        perturbations_per_eval=3,
    )
    options = {"window": window, "stride": stride, "removal": REMOVALS[kind]}
    found = attribute("occlusion", Smooth(), x, [0, 2], **options)
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-4, atol=1e-6)


def test_lime_agrees_with_captum():
    # on a clip of ones and equal units, Captum's distance (between clips) is that between vectors
    captum = pytest.importorskip("captum.attr")
    from captum._utils.models.model import Model

    class Ridge(Model):
        """Ridge regression as least squares with one more row per coefficient."""

        def fit(self, train_data):
            z, phi, weight = (part.double() for part in next(iter(train_data)))
            units = z.shape[1]
            z = torch.cat([z, torch.ones(len(z), 1)], 1) * weight.sqrt()[:, None]
            z = torch.cat([z, torch.eye(units, units + 1)])
            phi = torch.cat([phi * weight.sqrt(), torch.zeros(units)])
            self.beta = torch.linalg.lstsq(z, phi).solution[:units]

        def representation(self):
            return self.beta[None]

        def __call__(self, x):
            return x @ self.beta

    x = torch.ones(1, 3, 4, 6, 6)
    t, y, x_ = (torch.arange(n) // s for n, s in ((4, 2), (6, 3), (6, 3)))
    units = t[:, None, None] * 4 + y[:, None] * 2 + x_
    switches = _switches(50, 8, generator(5))

    def rows(*_, **__):
        yield from switches[:, None]

    explain = captum.Lime(
        nn.Sequential(Smooth(), nn.Softmax(1)),
        interpretable_model=Ridge(),
        similarity_func=captum._core.lime.get_exp_kernel_similarity_function("cosine", 0.25),
        perturb_func=rows,
    )
    mask = units.expand(1, 3, -1, -1, -1)
    expected = explain.attribute(x, target=1, feature_mask=mask, n_samples=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals_of_lime(), "supervoxels", lambda clip, segments: units)
        found = attribute("lime", Smooth(), x, 1, seed=[5], samples=50)
    torch.testing.assert_close(found, expected[:, 0].float(), rtol=1e-4, atol=1e-6)


def globals_of_lime():
    return _ridge.__globals__


# --------------------------------------------------------------------------------- known answers


class Additive(nn.Module):
    """Φ of class 1 is a half plus, for each region, its weight times how much of it is there."""

    def __init__(self, units, weights):
        super().__init__()
        share = torch.stack([(units == u).float() / (units == u).sum() for u in units.unique()])
        self.register_buffer("field", torch.einsum("r,rthw->thw", weights, share))

    def forward(self, clips):
        phi = 0.5 + torch.einsum("nthw,thw->n", clips.mean(1), self.field)
        return torch.stack([1 - phi, phi], 1).log()


def additive(cells, size):
    """Return regions in a grid, their weights (mixed signs, well apart), and the model."""
    t, y, x = (torch.arange(n) * c // n for n, c in zip(size, cells, strict=True))
    units = (t[:, None, None] * cells[1] + y[:, None]) * cells[2] + x
    regions = int(units.max()) + 1
    weights = torch.linspace(-1, 1, regions)[torch.randperm(regions, generator=generator(3))]
    weights = 0.9 * weights / weights.abs().sum()
    return units, weights, Additive(units, weights)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_lime_ranks_the_regions_of_an_additive_model_exactly(monkeypatch):
    units, weights, model = additive((2, 2, 3), (4, 12, 15))
    monkeypatch.setitem(globals_of_lime(), "supervoxels", lambda clip, segments: units)
    found = attribute("lime", model, torch.ones(1, 3, 4, 12, 15), 1, samples=400)[0]
    beta = torch.stack([found[units == u].mean() for u in range(len(weights))])
    assert torch.equal(beta.argsort(), weights.argsort())
    assert correlation(found, weights[units]) > 0.999
    torch.testing.assert_close(beta, weights, rtol=0.05, atol=1e-4)  # the ridge shrinks a little


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("occlusion", {"window": (1, 3, 3)}),
        ("rise", {"samples": 1000, "cells": (1, 7, 7), "divide_by": "observed"}),
        ("rise", {"samples": 20_000, "cells": (1, 5, 5)}),
    ],
)
def test_map_follows_the_regions_of_an_additive_model(name, options):
    units, weights, model = additive((1, 2, 2), (2, 14, 18))
    found = attribute(name, model, torch.ones(1, 3, 2, 14, 18), 1, batch_size=256, **options)[0]
    assert correlation(found, weights[units]) >= 0.9


def test_rise_divided_by_what_was_kept_has_no_noise_where_nothing_matters():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 3.0]).expand(len(x), 2)

    phi = torch.tensor([0.0, 3.0]).softmax(0)[1]
    printed, observed = (
        attribute("rise", Sure(), noise(4, 14, 18), 1, samples=200, divide_by=word)
        for word in ("expected", "observed")
    )
    torch.testing.assert_close(observed, phi.expand_as(observed), rtol=1e-5, atol=0)
    assert printed.std() > 0.02  # how often a voxel happened to be kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("occlusion", {}),
        ("rise", {"samples": 250}),
        ("lime", {"samples": 250, "segments": 200}),
    ],
)
def test_highest_voxel_lies_in_the_planted_tube(name, options):
    size = (4, 20, 28)
    region = tube(*size)
    assert near(region, 1).float().mean() < 0.1, "too easy: chance alone would come close"
    found = attribute(name, Planted(region), noise(*size, n=20), 1, batch_size=64, **options)
    hits = region.flatten()[found.flatten(1).argmax(1)].float().mean()
    assert hits >= 0.95


@BATCHES
def test_a_model_that_looks_elsewhere_is_not_pointed_at_here(name):
    size = (4, 20, 28)
    model, here = Planted(tube(*size, (0.75, 0.75))), tube(*size, (0.25, 0.25))
    found = attribute(name, model, noise(*size, n=5), 1, batch_size=64, **SMALL[name])
    hits = here.flatten()[found.flatten(1).argmax(1)].float().mean()
    assert hits <= 0.4


def test_occlusion_is_zero_where_nothing_matters():
    size = (4, 20, 28)
    region = tube(*size)
    found = attribute("occlusion", Planted(region), noise(*size), 1, window=(1, 3, 3))[0]
    far = ~near(region, 4)
    assert far.float().mean() > 0.5
    assert found[far].abs().max() < 1e-6
    assert found[region].min() > 0


# -------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_rise_masks_keep_each_voxel_as_often_as_asked(keep):
    size = (5, 11, 13)
    bits, shifts = _grids(4000, (2, 4, 3), size, keep, generator(0))
    masks = _stretch(bits.float(), shifts, size)
    assert masks.min() >= 0
    assert masks.max() <= 1
    torch.testing.assert_close(masks.mean(0), torch.full(size, keep), rtol=0, atol=0.04)
    cells = torch.tensor([-(-n // c) for n, c in zip(size, (2, 4, 3), strict=True)])
    assert torch.equal(shifts.amax(0), cells - 1)  # every place within a cell
    assert torch.equal(shifts.amin(0), torch.zeros_like(cells))


def test_lime_starts_with_the_whole_clip_and_tosses_a_coin_after_that():
    switches = _switches(2000, 12, generator(0))
    assert bool((switches[0] == 1).all())
    assert set(switches.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(switches.mean(0), torch.full((12,), 0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["rise", "lime"])
def test_seeds_are_honoured_per_clip_and_the_global_state_is_left(name):
    x, state = noise(3, 8, 10, n=3), torch.get_rng_state()
    runs = [
        attribute(name, Smooth(), x, 1, seed=seed, **SMALL[name]) for seed in (0, 0, 1, [7, 8, 9])
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    single = attribute(name, Smooth(), x[1:2], 1, seed=[8], **SMALL[name])
    assert torch.equal(runs[3][1:2], single)
    assert torch.equal(state, torch.get_rng_state())


# -------------------------------------------------------------------------------------- promises


@BATCHES
def test_neither_batch_size_nor_neighbours_change_the_map(name):
    model, x = load_model("r2plus1d_narrow", 3), noise(4, 14, 16, n=3)
    options = {"occlusion": {"window": (2, 7, 8)}}.get(name, SMALL[name])
    runs = [
        attribute(name, model, x, [0, 1, 2], seed=[1, 2, 3], batch_size=n, **options)
        for n in (1, 5)
    ]
    alone = [attribute(name, model, x[i : i + 1], i, seed=[i + 1], **options) for i in range(3)]
    for other in (*runs[1:], torch.cat(alone)):
        torch.testing.assert_close(other, runs[0], rtol=1e-4, atol=1e-6)


class Blind(nn.Module):
    """Gives no gradient, and remembers the largest batch."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    @torch.no_grad()
    def forward(self, x):
        self.largest = max(self.largest, len(x))
        return Smooth()(x)


@BATCHES
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_model_without_gradient_will_do_and_sees_no_larger_batch(name, batch_size):
    model = Blind()
    x = noise(2, 8, 10, n=7).requires_grad_()
    found = attribute(name, model, x, 1, batch_size=batch_size, **SMALL[name])
    assert torch.isfinite(found).all()
    assert not found.requires_grad
    assert model.largest == batch_size
    assert not methods().needs_gradient[name]
    with pytest.raises(ValueError, match="no gradient"):
        attribute("gradient", model, x, 1)


@BATCHES
@pytest.mark.parametrize("size", [(1, 7, 11), (2, 9, 5), (3, 13, 8), (4, 6, 17), (5, 15, 9)])
def test_any_size(name, size):
    options = {"occlusion": {}}.get(name, SMALL[name])
    found = attribute(name, Smooth(), noise(*size, n=2), [0, 1], **options)
    assert found.shape == (2, *size)
    assert torch.isfinite(found).all()
    assert (found.flatten(1).std(1) > 0).all()


class Interrupted(Watched):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().forward(x)


@BATCHES
@pytest.mark.parametrize("at", [1, 2, 4])
def test_model_is_as_it_was_after_an_interrupt(name, at):
    model = Interrupted(at)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        attribute(name, model, noise(4, 24, 32), 0, batch_size=4, **SMALL[name])
    assert same_state(before, state_of(model))


@BATCHES
def test_nan_on_a_perturbed_clip_is_named(name):
    class Divides(nn.Module):
        def forward(self, x):
            return Smooth()(x / x.abs().clamp(max=1))

    with pytest.raises(ValueError, match=f"NaN or infinity in {name}"):
        attribute(name, Divides(), noise(3, 8, 10), 1, **SMALL[name])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("occlusion", {"window": (1, 9, 3)}, r"window: got \(1, 9, 3\), expected .*\(3, 8, 10\)"),
        ("occlusion", {"window": (0, 2, 2)}, "window"),
        ("occlusion", {"window": 3}, "window: got 3"),
        ("occlusion", {"window": (1, 2.0, 2)}, "window"),
        ("occlusion", {"window": (1, 2, 2), "stride": (1, 3, 1)}, r"stride.*window=\(1, 2, 2\)"),
        ("occlusion", {"stride": (1, 0, 1)}, "stride"),
        ("rise", {"samples": 0}, "samples: got 0"),
        ("rise", {"samples": 2.5}, "samples"),
        ("rise", {"cells": (7, 7)}, "cells"),
        ("rise", {"cells": (1, 0, 7)}, "cells"),
        ("rise", {"keep": 0}, "keep: got 0"),
        ("rise", {"keep": 1.0}, "keep"),
        ("rise", {"divide_by": "n"}, "divide_by"),
        ("lime", {"samples": 0}, "samples"),
        ("lime", {"segments": 0}, "segments: got 0"),
        *((name, {"removal": "gray"}, "removal: got 'gray', expected one of") for name in NAMES),
        *((name, {"patch": 3}, "option: got 'patch'") for name in NAMES),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(name, Smooth(), noise(3, 8, 10), 1, **options)
