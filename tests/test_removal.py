"""Removal operators and their blur against the slow twins in `reference`."""

import math

import pytest
import reference
import torch
from scipy.ndimage import gaussian_filter

from stepkit import removal
from stepkit.clips import unnormalise
from stepkit.removal import gaussian_blur, gaussian_matrix, read

OPERATORS = {
    "pyramid": removal.blur(sigma=2.5),
    "three levels": removal.blur(levels=3, sigma=1.0),
    "equation 2": removal.blur(levels=2, sigma=1.5),
    "fade": removal.fade(),
    "black": removal.black(),
    "constant": removal.constant((0.2, 0.5, 0.9)),
    "mean": removal.mean(torch.ones(1, 3, 1, 2, 2) / 7),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------- the blur


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.86, 20.0])
@pytest.mark.parametrize("size", [(7, 11), (1, 5), (16, 16), (1, 1)])
def test_blur_equals_a_convolution_with_zeros_outside(size, sigma):
    frames = noise(2, 3, *size).double()
    expected = torch.from_numpy(reference.gaussian_blur(frames, sigma))
    torch.testing.assert_close(gaussian_blur(frames, sigma), expected, rtol=0, atol=1e-14)
    single = gaussian_blur(frames.float(), sigma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.86, 20.0])
@pytest.mark.parametrize("size", [(7, 11), (1, 5), (16, 16), (1, 1)])
def test_reflecting_blur_equals_that_of_scipy(size, sigma):
    frame = noise(*size).double()
    reach = math.ceil(4 * sigma)
    expected = gaussian_filter(frame.numpy(), sigma, mode="reflect", radius=reach)
    ours = gaussian_blur(frame, sigma, edge="reflect")
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-14)


def test_blur_with_sigma_zero_leaves_the_frames():
    frames = noise(3, 5, 6)
    assert gaussian_blur(frames, 0).equal(frames)


def test_rows_of_the_blur_matrix_sum_to_one_but_for_zeros_outside():
    reflecting = gaussian_matrix(40, 2.0, "reflect").sum(1)
    torch.testing.assert_close(reflecting, torch.ones(40).double(), rtol=0, atol=1e-14)
    zero = gaussian_matrix(40, 2.0, "zero").sum(1)
    inner = zero[8:-8]  # truncated at ⌈4σ⌉ = 8: zeros outside reach no further
    torch.testing.assert_close(inner, torch.ones(24).double(), rtol=0, atol=1e-14)
    assert zero[7] < 1 - 1e-5
    assert 0.5 < zero[0] < 0.7


def test_blur_is_truncated_at_four_sigma():
    matrix = gaussian_matrix(41, 2.1)
    assert matrix[20, 20 + 9] > 0  # ⌈4·2.1⌉ = 9
    assert matrix[20, 20 + 10] == 0


# ------------------------------------------------------------------------------------ the ladders


@pytest.mark.parametrize("levels", [2, 3, 8])
@pytest.mark.parametrize("shape", [(3, 1, 9, 7), (3, 2, 8, 8)])
def test_pyramid_equals_its_definition(shape, levels):
    clips = noise(2, *shape)
    rungs = removal.blur(levels, sigma=3.0).ladder(clips)
    assert rungs.shape == (2, levels, *shape)
    assert rungs.dtype == torch.float32
    for clip, ladder in zip(clips, rungs, strict=True):
        expected = reference.pyramid(clip, levels, 3.0)
        torch.testing.assert_close(ladder, expected.float(), rtol=0, atol=1e-6)
        assert ladder[-1].equal(clip)


@pytest.mark.parametrize(("size", "sigma"), [((112, 120), 20), ((28, 14), 2.5), ((14, 28), 2.5)])
def test_default_blur_follows_the_shorter_side(size, sigma):
    clips = noise(1, 3, 1, *size)
    bottom = removal.blur().nothing(clips)[0]
    expected = torch.from_numpy(reference.gaussian_blur(clips[0], sigma)).float()
    torch.testing.assert_close(bottom, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pyramid", "three levels"])
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 5, 7)])
def test_blur_reads_the_pyramid_linearly(name, shape):
    levels, sigma = {"pyramid": (8, 2.5), "three levels": (3, 1.0)}[name]
    clips, mask = noise(2, 3, *shape), masks(2, *shape)
    kept = OPERATORS[name].apply(clips, mask)
    for n in range(2):
        rungs = reference.pyramid(clips[n], levels, sigma)
        expected = reference.look_up(rungs, mask[n].double())
        torch.testing.assert_close(kept[n], expected.float(), rtol=0, atol=2e-6)


def test_two_levels_are_equation_2():
    clips, mask = noise(2, 3, 2, 9, 6), masks(2, 2, 9, 6)
    kept = removal.blur(levels=2, sigma=1.5).apply(clips, mask)
    for n in range(2):
        expected = reference.equation_2(clips[n].double(), mask[n].double(), 1.5)
        torch.testing.assert_close(kept[n], expected.float(), rtol=0, atol=1e-6)


def test_frames_are_blurred_one_by_one():
    clips = torch.zeros(1, 3, 3, 8, 8)
    clips[:, :, 1] = noise(3, 8, 8)
    nothing = removal.blur(sigma=2.0).nothing(clips)
    assert nothing[:, :, 1].any()
    assert not nothing[:, :, [0, 2]].any()


@pytest.mark.parametrize(
    ("operator", "rgb"),
    [
        (removal.fade(), reference.MEAN),
        (removal.black(), (0, 0, 0)),
        (removal.constant((0.2, 0.5, 0.9)), (0.2, 0.5, 0.9)),
        (removal.constant((1, 1, 1)), (1, 1, 1)),
    ],
)
def test_fading_goes_linearly_to_its_colour(operator, rgb):
    clips, mask = noise(2, 3, 2, 5, 4), masks(2, 2, 5, 4)
    colour = reference.colour(clips[0], rgb)
    torch.testing.assert_close(
        operator.nothing(clips), colour.float().expand_as(clips), rtol=0, atol=1e-6
    )
    shown = unnormalise(operator.nothing(clips)[0])
    wanted = torch.tensor(rgb)[:, None, None, None].expand_as(shown)
    torch.testing.assert_close(shown, wanted.float(), rtol=0, atol=1e-6)
    m = mask[:, None].double()
    expected = m * clips + (1 - m) * colour
    torch.testing.assert_close(operator.apply(clips, mask), expected.float(), rtol=0, atol=1e-6)


def test_mean_is_the_mean_colour_of_the_clips():
    clips = 0.3 * noise(4, 3, 2, 5, 6) + torch.tensor([0.5, -0.2, 0.1]).view(3, 1, 1, 1)
    nothing = removal.mean(clips).nothing(noise(1, 3, 2, 3, 3, seed=1))
    for c in range(3):
        values = clips[:, c].flatten().tolist()
        assert nothing[:, c].unique().tolist() == pytest.approx(
            [math.fsum(values) / len(values)], abs=1e-6
        )


# -------------------------------------------------------------------- what holds of all operators


@pytest.mark.parametrize("name", OPERATORS)
def test_mask_one_gives_the_clip_and_mask_zero_the_bottom_rung(name):
    operator, clips = OPERATORS[name], noise(2, 3, 2, 7, 5)
    one, zero = torch.ones(2, 2, 7, 5), torch.zeros(2, 2, 7, 5)
    torch.testing.assert_close(operator.apply(clips, one), clips, rtol=0, atol=1e-6)
    assert operator.apply(clips, zero).equal(operator.nothing(clips))
    assert operator.nothing(clips).equal(operator.ladder(clips)[:, 0])


@pytest.mark.parametrize("name", OPERATORS)
def test_several_masks_of_a_clip_equal_one_at_a_time(name):
    operator, clips, several = OPERATORS[name], noise(2, 3, 2, 7, 5), masks(2, 4, 2, 7, 5)
    together = operator.apply(clips, several)
    assert together.shape == (2, 4, 3, 2, 7, 5)
    for a in range(4):
        assert together[:, a].equal(operator.apply(clips, several[:, a]))
    alone = operator.apply(
        clips[1:], several[1:]
    )  # the blur is a product of matrices: it may round
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_apply_leaves_its_arguments(name):
    clips, mask = noise(1, 3, 2, 5, 5), masks(1, 2, 5, 5)
    before = clips.clone(), mask.clone()
    OPERATORS[name].apply(clips, mask)
    assert clips.equal(before[0])
    assert mask.equal(before[1])


@pytest.mark.parametrize("rungs", [2, 3, 8])
def test_gradcheck_of_reading_a_ladder(rungs):
    ladder = noise(1, rungs, 2, 2, 2, 3).double()
    # between rungs, never on one: there the slope jumps
    mask = 0.05 + 0.1 * masks(1, 2, 2, 2, 3).double()
    mask = (mask + torch.arange(12).view(1, 1, 2, 2, 3) % (rungs - 1)) / (rungs - 1)
    assert torch.autograd.gradcheck(read, (ladder.requires_grad_(True), mask.requires_grad_(True)))


@pytest.mark.parametrize("rungs", [2, 8])
def test_slope_at_the_ends_of_the_ladder_is_that_of_the_last_step(rungs):
    ladder = noise(1, rungs, 1, 1, 1, 2).double()
    mask = torch.tensor([0.0, 1.0]).double().view(1, 1, 1, 1, 2).requires_grad_(True)
    (slope,) = torch.autograd.grad(read(ladder, mask).sum(), mask)
    below, above = ladder[0, 1] - ladder[0, 0], ladder[0, -1] - ladder[0, -2]
    expected = (rungs - 1) * torch.stack([below[..., 0], above[..., 1]], -1)
    torch.testing.assert_close(slope[0], expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------- names and errors


def test_named_operators():
    clips = noise(1, 3, 1, 6, 6)
    for name, operator in [
        ("blur", removal.blur()),
        ("fade", removal.fade()),
        ("black", removal.black()),
    ]:
        assert removal.named(name).nothing(clips).equal(operator.nothing(clips))
        assert removal.named(name).name == operator.name
    mine = removal.constant((0.1, 0.2, 0.3))
    assert removal.named(mine) is mine
    with pytest.raises(ValueError, match=r"^removal: got 'grey'.*'blur', 'fade', 'black'"):
        removal.named("grey")


def test_every_operator_has_its_own_name_for_the_key_of_a_run():
    operators = [*OPERATORS.values(), removal.blur(), removal.blur(sigma=2.0)]
    assert len({operator.name for operator in operators}) == len(operators)
    assert all(repr(operator) == operator.name for operator in operators)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: removal.blur(levels=1), "levels"),
        (lambda: removal.blur(sigma=0), "sigma"),
        (lambda: removal.blur(sigma=-1.0), "sigma"),
        (lambda: removal.constant((0.1, 0.2)), "rgb"),
        (lambda: removal.constant((0.1, 0.2, 1.2)), "rgb"),
        (lambda: removal.mean(torch.full((1, 3, 1, 2, 2), float("nan"))), "clips"),
    ],
)
def test_an_operator_that_makes_no_sense_is_refused_by_name(call, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        call()


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((2, 2, 5, 5), 1.01),
        torch.full((2, 2, 5, 5), -0.01),
        torch.full((2, 2, 5, 5), float("nan")),
        torch.ones(1, 2, 5, 5),
        torch.ones(2, 2, 5, 4),
        torch.ones(2, 3, 2, 5, 4),
        torch.ones(2, 5, 5),
        torch.ones(2, 0, 2, 5, 5),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(mask):
    with pytest.raises(ValueError, match=r"^mask: got"):
        removal.fade().apply(noise(2, 3, 2, 5, 5), mask)


def test_float64_is_refused_by_name():
    clips, mask = noise(2, 3, 2, 5, 5), masks(2, 2, 5, 5)
    with pytest.raises(TypeError, match=r"^mask: got dtype torch\.float64"):
        removal.fade().apply(clips, mask.double())
    with pytest.raises(TypeError, match=r"^clips: got dtype torch\.float64"):
        removal.fade().apply(clips.double(), mask)
