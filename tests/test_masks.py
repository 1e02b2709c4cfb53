"""Mask generator, L_S and L_K against the slow twins in `reference`, and what holds of them."""

import math
import shutil
from functools import cache

import pytest
import reference
import torch

from stepkit import _compiling
from stepkit.attribution import objective, smoothmax
from stepkit.attribution.objective import area_loss, core_kernel, core_loss, top_share
from stepkit.attribution.settings import kernel_length, settings_for
from stepkit.attribution.smoothmax import MaskGeometry
from stepkit.removal import read

PAPER = (112, 112, 7, 11)
SIZES = [(12, 10, 3, 2), (9, 13, 2, 3), (16, 16, 4, 6), (5, 3, 1, 1), (2, 7, 7, 11), (1, 1, 1, 1)]
AREAS = (0.05, 0.1, 0.15, 0.2, 0.5)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shuffled(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def gradient(loss, values):
    values = values.clone().requires_grad_(True)
    return torch.autograd.grad(loss(values).sum(), values)[0]


# ------------------------------------------------------------------------------------- geometry


def test_geometry_of_the_paper():
    geometry = MaskGeometry(*PAPER)
    assert geometry.canvas == (134, 134)
    assert geometry.seeds == (16, 16)
    assert (geometry.radius, geometry.padding) == (3, 5)


@pytest.mark.parametrize("size", [PAPER, *SIZES, (56, 56, 4, 6), (112, 80, 7, 11)])
def test_canvas_is_that_of_the_formula_or_the_smallest_that_holds_the_frame(size):
    H, W, s, sigma = size
    geometry = MaskGeometry(*size)
    assert geometry.seeds == (math.ceil(H / s), math.ceil(W / s))
    assert geometry.canvas == reference.canvas_sides(H, W, s, sigma)
    assert geometry.canvas[0] >= H + 2 * sigma
    assert geometry.canvas[1] >= W + 2 * sigma
    canvas = draw(2, *geometry.canvas)
    assert geometry.crop(canvas).equal(canvas[:, sigma : sigma + H, sigma : sigma + W])


def test_canvas_grows_where_the_formula_is_too_small():
    assert MaskGeometry(56, 56, 4, 6).canvas == (69, 69)  # the formula says 61, the frame needs 68


@pytest.mark.parametrize(
    ("frame", "step", "sigma"),
    [
        ((112, 112), 7, 11),
        ((56, 56), 4, 6),
        ((224, 112), 7, 11),
        ((112, 224), 7, 11),
        ((3, 5), 1, 1),
    ],
)
def test_scaled_geometry_follows_the_shorter_side(frame, step, sigma):
    assert MaskGeometry.scaled(*frame) == MaskGeometry(*frame, step, sigma)


@pytest.mark.parametrize("argument", ["step", "sigma"])
def test_geometry_without_extent_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"^{argument}: got 0"):
        MaskGeometry(8, 8, **{argument: 0})


# ----------------------------------------------------------------------------------- smooth max


def test_all_ones_seeds_give_the_initial_state_of_the_paper():
    geometry = MaskGeometry(*PAPER)
    canvas = geometry.spread(torch.ones(16, 16, dtype=torch.float64))
    mask = geometry.crop(canvas)
    assert mask.shape == (112, 112)
    assert round(mask.min().item(), 3) == 0.863
    assert round(mask.max().item(), 4) == 0.9998  # never exactly 1
    assert round(mask.mean().item(), 3) == 0.987
    assert round(canvas.mean().item(), 3) == 0.886


@pytest.mark.parametrize("size", [PAPER, *SIZES])
def test_spread_equals_the_formula_pixel_by_pixel(size):
    geometry = MaskGeometry(*size)
    seeds = draw(2, *geometry.seeds)
    expected = reference.spread(seeds, *size)
    assert geometry.spread(seeds).shape == expected.shape
    torch.testing.assert_close(geometry.spread(seeds), expected, rtol=0, atol=1e-13)
    # float32: exp(20z) carries 20 rounding errors of z
    single = geometry.spread(seeds.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_spread_equals_autograd_through_the_formula(size):
    geometry = MaskGeometry(*size)
    seeds, upstream = draw(2, *geometry.seeds), draw(2, *geometry.canvas, seed=1)
    ours = gradient(lambda s: geometry.spread(s) * upstream, seeds)
    expected = gradient(lambda s: reference.spread(s, *size) * upstream, seeds)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_spread():
    geometry = MaskGeometry(4, 5, 3, 1)
    seeds = 0.1 + 0.8 * draw(2, *geometry.seeds)
    assert torch.autograd.gradcheck(geometry.spread, seeds.requires_grad_(True))


@pytest.mark.filterwarnings("error:STEP goes uncompiled")
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_as_for_a_gpu_the_smooth_max_is_the_same(monkeypatch):
    geometry = MaskGeometry(12, 10, 3, 2)
    seeds = draw(3, *geometry.seeds)
    expected = geometry.spread(seeds), gradient(geometry.spread, seeds)
    found = record_compiled(monkeypatch)
    new = geometry.spread(seeds), gradient(geometry.spread, seeds)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-12)
    assert found == [smoothmax._smooth_max] * 2 + [smoothmax._smooth_max_back]


@pytest.mark.filterwarnings("error:STEP goes uncompiled")
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_as_for_a_gpu_core_loss_and_removal_are_the_same(monkeypatch):
    masks, ladder, kernel = draw(1, 2, 4, 12, 10), draw(1, 3, 3, 4, 12, 10), core_kernel(3, 5)

    def losses(masks):
        return core_loss(masks, (0.1, 0.3), kernel)

    def removed(masks):
        return objective.fused(read, masks)(ladder, masks)

    expected = [(call(masks), gradient(call, masks)) for call in (losses, removed)]
    found = record_compiled(monkeypatch)
    new = [(call(masks), gradient(call, masks)) for call in (losses, removed)]
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-12)
    assert found == [objective._tubes] * 2 + [read] * 2


def record_compiled(monkeypatch):
    """Compile as on a GPU; return the list to which each function is added."""
    found, once = [], cache(_compiling.compiled)
    for module in (smoothmax, objective):
        monkeypatch.setattr(module, "fused", lambda call, _: found.append(call) or once(call))
    return found


def test_where_nothing_compiles_the_smooth_max_says_so_and_goes_on(monkeypatch):
    def fails(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda loop, **how: fails)
    run = _compiling.compiled(lambda value: value + 1)
    with pytest.warns(UserWarning, match="STEP goes uncompiled, more slowly: no compiler"):
        assert run(1) == 2
    assert run(2) == 3


def test_spread_of_zeros_is_zero():
    geometry = MaskGeometry(12, 10, 3, 2)
    assert not geometry.spread(torch.zeros(3, *geometry.seeds)).any()


def test_spread_treats_frames_and_leading_axes_one_by_one():
    geometry = MaskGeometry(12, 10, 3, 2)
    seeds = draw(2, 3, 4, *geometry.seeds, dtype=torch.float32)
    together = geometry.spread(seeds)
    assert together.shape == (2, 3, 4, *geometry.canvas)
    assert together[1, 2, 3].equal(geometry.spread(seeds[1, 2, 3]))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 1)])
def test_spread_refuses_seeds_of_another_size(shape):
    with pytest.raises(ValueError, match=r"^seeds: got .* expected \(4, 4\)"):
        MaskGeometry(12, 10, 3, 2).spread(torch.ones(shape))


def test_corner_cell_costs_about_as_much_canvas_as_one_in_the_middle():
    geometry = MaskGeometry(*PAPER)

    def area(i, j):
        seeds = torch.zeros(16, 16, dtype=torch.float64)
        seeds[i, j] = 1
        canvas = geometry.spread(seeds)
        return torch.stack([canvas.sum(), geometry.crop(canvas).sum()])

    canvas, visible = area(0, 0) / area(8, 8)
    assert canvas > 0.92
    assert visible < 0.28


# ------------------------------------------------------------------------------------ top_share


def tied_values(n=24, levels=5):
    """Few different values, each many times, in an order that means nothing; (2, 3, n)."""
    return torch.randint(levels, (2, 3, n), generator=torch.Generator().manual_seed(0)).double()


def test_top_share_marks_the_largest():
    values = draw(2, 3, 20)
    marks = top_share(values, [0, 7, 20])
    for row in range(2):
        for a, count in enumerate((0, 7, 20)):
            largest = sorted(range(20), key=lambda i, r=values[row, a]: -r[i])[:count]
            expected = torch.zeros(20, dtype=torch.float64)
            expected[largest] = 1
            assert marks[row, a].equal(expected)


@pytest.mark.parametrize("counts", [[0, 1, 2], [5, 11, 13], [22, 23, 24]])
def test_top_share_of_ties_sums_to_the_count(counts):
    # also in float64, though the share is a quotient of two integer tensors
    marks = top_share(tied_values(), counts)
    assert bool((marks >= 0).all())
    assert bool((marks <= 1).all())
    torch.testing.assert_close(
        marks.sum(2), torch.tensor([counts] * 2).double(), rtol=0, atol=1e-12
    )


def test_top_share_is_blind_to_the_order_of_ties():
    values, counts = tied_values(), [5, 11, 13]
    marks = top_share(values, counts)
    for a in range(3):
        for value in values[:, a].unique():
            for row in range(2):
                assert len(marks[row, a][values[row, a] == value].unique()) <= 1
    order = shuffled(24, seed=1)
    assert top_share(values[:, :, order], counts).equal(marks[:, :, order])


def test_top_share_of_equal_values_is_even():
    marks = top_share(torch.full((1, 1, 8), 0.3), [2])
    assert marks.equal(torch.full((1, 1, 8), 0.25))


# ------------------------------------------------------------------------------------ L_S, Eq. 6


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 4, 4), (2, 1, 1)])
def test_area_loss_equals_sorting_against_the_template(shape):
    masks, areas = draw(2, 5, *shape), AREAS
    expected = torch.tensor(
        [[reference.area_loss(masks[n, a], v) for a, v in enumerate(areas)] for n in range(2)]
    ).double()
    torch.testing.assert_close(area_loss(masks, areas), expected, rtol=0, atol=1e-14)
    single = area_loss(masks.float(), areas)
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-6)


def test_gradient_of_area_loss_equals_autograd_through_sorting():
    masks = draw(1, 5, 3, 7, 5)
    ours = gradient(lambda m: area_loss(m, AREAS), masks)
    for a, v in enumerate(AREAS):
        expected = gradient(lambda m, v=v: reference.area_loss(m, v), masks[0, a])
        torch.testing.assert_close(ours[0, a], expected, rtol=0, atol=1e-15)


def test_gradcheck_of_area_loss():
    masks = (shuffled(24).double() / 24).view(1, 1, 2, 3, 4).repeat(1, 2, 1, 1, 1)
    assert torch.autograd.gradcheck(
        lambda m: area_loss(m, (0.25, 0.6)), masks.requires_grad_(True), eps=1e-4
    )


def test_area_loss_of_the_template_is_zero():
    mask = torch.zeros(1, 1, 2, 5, 10, dtype=torch.float64)
    mask.view(-1)[shuffled(100)[:15]] = 1
    assert area_loss(mask, (0.15,)).item() == 0
    assert area_loss(mask, (0.20,)).item() == pytest.approx(0.05, abs=1e-15)
    assert area_loss(1 - mask, (0.85,)).item() == 0


def test_area_loss_of_ties_is_the_mean_over_all_sorting_orders():
    masks = tied_values().view(2, 3, 2, 3, 4) / 4
    areas = (0.2, 0.5, 0.8)
    ours = gradient(lambda m: area_loss(m, areas), masks)
    for n in range(2):
        for a, v in enumerate(areas):
            mask = masks[n, a]
            value = area_loss(masks, areas)[n, a]
            torch.testing.assert_close(value, reference.area_loss(mask, v), rtol=0, atol=1e-14)
            expected = gradient(lambda m, v=v: reference.area_loss_with_ties(m, v), mask)
            torch.testing.assert_close(ours[n, a], expected, rtol=0, atol=1e-15)


def test_area_loss_and_its_gradient_follow_when_voxels_or_frames_are_permuted():
    masks = tied_values().view(2, 3, 4, 3, 2) / 4
    areas = (0.2, 0.5, 0.8)
    slope = gradient(lambda m: area_loss(m, areas), masks)
    frames = masks[:, :, [2, 0, 3, 1]]
    assert gradient(lambda m: area_loss(m, areas), frames).equal(slope[:, :, [2, 0, 3, 1]])
    torch.testing.assert_close(
        area_loss(frames, areas), area_loss(masks, areas), rtol=0, atol=1e-14
    )
    turned = gradient(lambda m: area_loss(m, areas), masks.flip(2, 3, 4))
    assert turned.equal(slope.flip(2, 3, 4))
    # equal values, equal slopes: swapping them cannot be seen
    for n in range(2):
        for a in range(3):
            for value in masks[n, a].unique():
                assert len(slope[n, a][masks[n, a] == value].unique()) == 1


@pytest.mark.parametrize("size", [(112, 112, 7, 11), (56, 56, 4, 6), (12, 12, 3, 2)])
def test_all_ones_seeds_are_pushed_alike_along_rows_and_columns(size):
    # Pixels that tie in the equation, (y, x) and (x, y), leave `spread` a rounding error apart. Did
    # rounding pick which of them count as the largest, the gradients would differ by up to 4 %.
    geometry = MaskGeometry(*size)
    seeds = torch.ones(1, len(AREAS), 1, *geometry.seeds)
    slope = gradient(lambda s: area_loss(geometry.spread(s), AREAS), seeds)
    torch.testing.assert_close(
        slope, slope.transpose(3, 4), rtol=0, atol=1e-5 * slope.abs().max().item()
    )


# ------------------------------------------------------------------------------- K, Eqs. 9 and 10


@pytest.mark.parametrize("shape", ["ellipsoid", "cylinder"])
@pytest.mark.parametrize(("length", "size"), [(8, 11), (5, 7), (14, 3), (4, 5), (1, 11), (2, 1)])
def test_kernel_is_that_of_equations_9_and_10(length, size, shape):
    kernel = core_kernel(length, size, shape)
    assert kernel.shape == (length, size, size)
    expected = reference.kernel(length, size, size, shape)
    torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-16)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-14)
    for turned in (kernel.flip(0), kernel.flip(1), kernel.flip(2), kernel.transpose(1, 2)):
        assert turned.equal(kernel)


def test_kernel_of_one_frame_is_a_disc():
    disc = core_kernel(1, 11)
    assert disc.equal(core_kernel(1, 11, "cylinder"))
    assert (disc > 0).sum() == 81
    assert disc[0, 5, 0] > 0  # the poles lie on the surface
    assert disc[0, 0, 0] == 0


def test_ellipsoid_and_cylinder_fill_their_boxes():
    ellipsoid, cylinder = ((core_kernel(8, 11, s) > 0) for s in ("ellipsoid", "cylinder"))
    assert cylinder.sum() == 8 * 81
    assert bool((cylinder | ~ellipsoid).all())
    assert ellipsoid.sum() == 2 * (1 + 37 + 69 + 69)


def test_kernel_of_unknown_shape_or_no_length_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^kernel_shape: got 'cube'.*'ellipsoid', 'cylinder'"):
        core_kernel(8, 11, "cube")
    with pytest.raises(ValueError, match=r"^kernel_length: got 0"):
        core_kernel(0, 11)

    with pytest.raises(ValueError, match=r"^kernel_size: got 0"):
        core_kernel(8, 0)


def test_kernel_of_two_frames_is_two_discs():
    tube = core_kernel(2, 5)  # by Eq. 9 to the letter: two voxels, the poles
    assert tube.equal(core_kernel(2, 5, "cylinder"))
    assert (tube > 0).sum((1, 2)).tolist() == [13, 13]


@pytest.mark.parametrize("size", [5, 7, 9, 11, 23])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 11, 14, 16])
def test_kernel_has_about_the_volume_of_the_ellipsoid(length, size):
    # more for discs (3/2); less for short axes: they end at the centres of the outermost voxels
    voxels = int((core_kernel(length, size) > 0).sum())
    assert 1 / 3 < voxels / (math.pi / 6 * length * size**2) < 3 / 2


@pytest.mark.parametrize("edge", [8, 32, 56, 112])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 16])
def test_core_loss_looks_at_a_good_part_of_any_clip(frames, edge):
    """A part of the canvas is looked at if it has a slope; inscribed discs would see π/4 of it."""
    s = settings_for("default", {}, (frames, edge, edge))
    kernel = core_kernel(s.kernel_length, s.kernel_size)
    canvas = draw(1, 1, frames, *MaskGeometry(edge, edge, s.step, s.sigma).canvas)
    seen = gradient(lambda m: core_loss(m, (0.1,), kernel, "released"), canvas) != 0
    assert seen.double().mean() > 0.15


@pytest.mark.parametrize(
    ("printed", "frames", "length"),
    [
        *[(0, 16, 0), (5, 16, 5), (8, 16, 8), (14, 16, 14), (8, 32, 16)],
        *[(0, 8, 0), (5, 8, 3), (8, 8, 4), (11, 8, 6), (14, 8, 7)],
        *[(5, 4, 3), (8, 4, 3), (14, 4, 4), (8, 3, 3), (8, 2, 2), (14, 1, 1)],
    ],
)
def test_kernel_length_follows_the_clip(printed, frames, length):
    assert kernel_length(printed, frames) == length


# -------------------------------------------------------------------------------- L_K, Eqs. 7 and 8

FORMS = {"printed": reference.core_loss_printed, "released": reference.core_loss_released}


@pytest.mark.parametrize("shape", ["ellipsoid", "cylinder"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("frames", "height", "width", "length", "size"),
    [(5, 13, 10, 3, 3), (3, 9, 14, 3, 4), (1, 12, 12, 1, 3), (4, 6, 6, 2, 1), (3, 5, 5, 2, 5)],
)
def test_core_loss_equals_its_equation(frames, height, width, length, size, shape, form):
    masks, kernel = draw(2, 3, frames, height, width), core_kernel(length, size, shape)
    areas = (0.05, 0.3, 0.7)
    expected = torch.tensor(
        [[FORMS[form](m, v, kernel) for m, v in zip(clip, areas, strict=True)] for clip in masks]
    ).double()
    loss = core_loss(masks, areas, kernel, form)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
    single = core_loss(masks.float(), areas, kernel, form)
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=2e-6)
    ours = gradient(lambda m: core_loss(m, areas, kernel, form), masks)
    for a, v in enumerate(areas):
        slope = gradient(lambda m, v=v: FORMS[form](m, v, kernel), masks[1, a])
        torch.testing.assert_close(ours[1, a], slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_core_loss_equals_its_equation_at_the_size_of_the_paper(form):
    mask, kernel = draw(16, 134, 134), core_kernel(8, 11)
    loss = core_loss(mask[None, None], (0.1,), kernel, form)
    torch.testing.assert_close(loss[0, 0], FORMS[form](mask, 0.1, kernel), rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_core_loss(form):
    masks = draw(1, 2, 3, 3, 6)
    kernel = core_kernel(2, 3, "cylinder")
    assert torch.autograd.gradcheck(
        lambda m: core_loss(m, (0.2, 0.6), kernel, form), masks.requires_grad_(True), eps=1e-7
    )


def test_released_core_loss_is_another_than_the_printed_one():
    masks, kernel = draw(1, 1, 5, 12, 12), core_kernel(3, 3)
    printed, released = (core_loss(masks, (0.2,), kernel, form).item() for form in FORMS)
    assert abs(printed - released) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_core_loss_and_its_gradient_follow_when_time_is_reversed(form):
    # values of M∗K that tie are a rounding error apart, and here one of them is the last of the k
    masks, kernel = draw(1, 2, 5, 9, 9).round(decimals=1), core_kernel(3, 3)
    slope = gradient(lambda m: core_loss(m, (0.2, 0.6), kernel, form), masks)
    turned = gradient(lambda m: core_loss(m, (0.2, 0.6), kernel, form), masks.flip(2))
    torch.testing.assert_close(turned.flip(2), slope, rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_core_loss_of_equal_frames_pushes_mirrored_frames_alike(form):
    geometry = MaskGeometry(12, 12, 3, 2)
    seeds = torch.ones(1, 2, 6, *geometry.seeds)
    kernel = core_kernel(3, 3)
    slope = gradient(lambda s: core_loss(geometry.spread(s), (0.1, 0.3), kernel, form), seeds)
    torch.testing.assert_close(slope, slope.flip(2), rtol=0, atol=1e-6 * slope.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_core_loss_of_a_full_or_an_empty_mask(form):
    kernel, areas = core_kernel(2, 3), (1e-9, 1 - 1e-9)  # nothing, everything
    loss = core_loss(torch.zeros(1, 2, 4, 6, 6), areas, kernel, form)
    assert loss[0, 0] <= (1 if form == "released" else 0)  # released: one voxel at least is wanted
    full = core_loss(torch.ones(1, 2, 4, 6, 6), areas, kernel, form)
    assert full[0, 0].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_core_loss_with_a_kernel_of_one_voxel_is_finite(form):
    # released: ⌊0.5236·1⌋ = 0, and k = v·THW / 0 would be infinite
    loss = core_loss(draw(1, 1, 2, 3, 4), (0.1,), core_kernel(1, 1), form)
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize(("length", "size"), [(5, 3), (2, 7)])
def test_kernel_larger_than_the_mask_is_refused_by_name(length, size):
    with pytest.raises(ValueError, match=r"^kernel_length: got kernel .* at most the mask"):
        core_loss(draw(1, 1, 4, 6, 8), (0.1,), core_kernel(length, size))
    with pytest.raises(ValueError, match=r"^core_form: got 'paper'"):
        core_loss(draw(1, 1, 4, 6, 8), (0.1,), core_kernel(2, 3), "paper")
