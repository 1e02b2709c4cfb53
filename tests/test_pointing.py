"""The pointing game and the mask scores against plain loops, and on boxes made by hand."""

import math

import numpy as np
import pytest
import reference
import torch

import stepkit as sk
from stepkit.data import Synthetic, batch
from stepkit.metrics import iou, pointing_game, relevance_mass


def peak(row, column, H=20, W=30):
    """One map of one frame with its maximum at a pixel, (1, 1, H, W)."""
    found = torch.zeros(1, 1, H, W)
    found[0, 0, row, column] = 1
    return found


def hit(row, column, box, radius, shape="circle"):
    found = pointing_game(peak(row, column), [[torch.tensor([box]).float()]], radius, shape=shape)
    return found.hits.item()


def problem(seed, N=4, T=5, H=13, W=18, values=None):
    """Maps, many ties among them if of few values, and 0 to 3 boxes a frame; clip 1 has none."""
    rng = np.random.default_rng(seed)
    maps = (
        rng.normal(size=(N, T, H, W)) if values is None else rng.integers(values, size=(N, T, H, W))
    )
    boxes = []
    for _ in range(N):
        corners = [rng.uniform(0, 1, size=(rng.integers(4), 2, 2)) * [W, H] for _ in range(T)]
        flat = [np.concatenate([c.min(1), c.max(1)], 1) for c in corners]
        boxes.append([torch.from_numpy(c).float() for c in flat])
    boxes[1] = []
    return torch.from_numpy(maps).float(), boxes


@pytest.mark.parametrize("values", [None, 3])
@pytest.mark.parametrize("radius", [0, 1.5, 4])
@pytest.mark.parametrize(
    ("shape", "meets"),
    [("circle", reference.circle_meets), ("square", reference.in_grown_box)],
)
def test_hits_equal_the_plain_loop(shape, meets, radius, values):
    for seed in range(3):
        maps, boxes = problem(seed, values=values)
        found = pointing_game(maps, boxes, radius, shape=shape)
        hits, rate = reference.pointing_game(maps, boxes, radius, meets)
        assert found.boxed.tolist() == [[h is not None for h in clip] for clip in hits]
        assert found.hits.tolist() == [[bool(h) for h in clip] for clip in hits]
        assert found.rate == pytest.approx(rate, abs=1e-6)


def test_x_is_the_column_and_y_the_row():
    assert hit(2, 25, [24, 1, 27, 4], 0)
    assert not hit(2, 25, [1, 24, 4, 27], 0)
    assert hit(15, 3, [2, 14, 5, 17], 0)


def test_radius_zero_asks_for_a_pixel_that_the_box_covers():
    box = torch.tensor([[4.0, 6, 7, 8]])  # columns 4 to 6, rows 6 and 7
    maps = torch.eye(10 * 12).view(1, -1, 10, 12)  # frame by frame, every pixel is a maximum
    found = pointing_game(maps, [[box] * 120], 0).hits.view(10, 12).nonzero().tolist()
    assert found == [[y, x] for y in (6, 7) for x in (4, 5, 6)]


@pytest.mark.parametrize("shape", ["circle", "square"])
@pytest.mark.parametrize(
    ("row", "column"),
    # next to the middle of each side of the box: the centre is 2.5 pixels off
    [(9, 7), (9, 16), (5, 12), (14, 12)],
)
def test_distance_to_a_side_is_that_from_the_pixels_centre(row, column, shape):
    box = [10, 8, 14, 12]
    assert hit(row, column, box, 2.5, shape)  # to touch is to meet
    assert not hit(row, column, box, 2.49, shape)


@pytest.mark.parametrize(("row", "column"), [(5, 7), (5, 16), (14, 7), (14, 16)])
def test_a_circle_misses_the_corner_that_a_square_reaches(row, column):
    box = [10, 8, 14, 12]  # 2.5 pixels off in x and in y
    assert hit(row, column, box, 2.5, "square")
    assert not hit(row, column, box, 2.5)
    assert hit(row, column, box, 2.5 * math.sqrt(2) + 1e-6)
    assert not hit(row, column, box, 2.5 * math.sqrt(2) - 1e-6)


def test_corners_of_the_frame():
    for row, column, box in [
        (0, 0, [0, 0, 1, 1]),
        (0, 29, [29, 0, 30, 1]),
        (19, 0, [0, 19, 1, 20]),
        (19, 29, [29, 19, 30, 20]),
    ]:
        assert hit(row, column, box, 0)
        assert not hit(19 - row, 29 - column, box, 7)
    assert hit(0, 0, [-5, -5, -3, 25], 3.5)  # a box may stick out of the frame, or lie outside
    assert not hit(0, 0, [-5, -5, -3, 25], 3.4)


def test_default_radius_is_seven_at_112_and_follows_the_shorter_side():
    box = [[torch.tensor([[50.0, 50.0, 60.0, 60.0]])]]
    for x, expected in ((66, True), (67, False)):  # 6.5 and 7.5 off
        assert pointing_game(peak(55, x, 112, 150), box).hits.item() is expected
    for x, expected in ((62, True), (64, False)):  # 2.5 and 4.5 off, 4.375 allowed
        assert pointing_game(peak(55, x, 70, 90), box).hits.item() is expected


def test_one_of_several_boxes_is_enough():
    far, near = [[0.0, 0.0, 2.0, 2.0]], [[24.0, 1.0, 27.0, 4.0]]
    for rows in (far + near, near + far, far + near + far):
        assert pointing_game(peak(2, 25), [[torch.tensor(rows)]], 0).hits.item()
    assert not pointing_game(peak(2, 25), [[torch.tensor(far + far)]], 0).hits.item()


def test_maxima_that_tie_point_at_the_first_in_raster_order():
    maps = peak(4, 20)
    maps[0, 0, 4, 22] = maps[0, 0, 5, 0] = 1
    first, later = torch.tensor([[20.0, 4.0, 21.0, 5.0]]), torch.tensor([[22.0, 4.0, 23.0, 5.0]])
    assert pointing_game(maps, [[first]], 0).hits.item()
    assert not pointing_game(maps, [[later]], 0).hits.item()


@pytest.mark.parametrize("value", [0.0, -2.0, 1.0])
def test_a_frame_of_equal_values_points_nowhere_and_is_left_out(value):
    maps = peak(0, 0).repeat(2, 4, 1, 1)
    maps[0, 1:3] = value
    maps[1] = value
    corner, none = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(0, 4)
    found = pointing_game(maps, [[corner, corner, none, corner - 99], [corner] * 4], 0)
    assert found.flat.tolist() == [[False, True, True, False], [True] * 4]
    assert found.hits.tolist() == [[True, False, False, False], [False] * 4]
    assert found.rate == 1 / 2  # a hit, and a box elsewhere
    assert found.by_clip.tolist() == pytest.approx([1 / 2, math.nan], nan_ok=True)
    with pytest.warns(UserWarning, match="flat wherever there is one; the rate is NaN"):
        assert math.isnan(pointing_game(maps[1:], [[corner] * 4]).rate)


@pytest.mark.parametrize("form", [torch.tensor, np.array])
def test_one_box_or_several_for_all_frames_of_a_clip(form):
    maps = torch.cat([peak(2, 3), peak(9, 9), peak(5, 5)], 1).repeat(2, 1, 1, 1)
    near, far = [3.0, 2.0, 4.0, 3.0], [9.0, 9.0, 10.0, 10.0]
    each = [torch.tensor([near, far])] * 3
    found = pointing_game(maps, [form([near, far]), form(near)], 0)
    assert found.hits.tolist() == [[True, True, False], [True, False, False]]
    assert found.hits.equal(pointing_game(maps, [each, [torch.tensor([near])] * 3], 0).hits)
    whole = pointing_game(maps, form([near, far]), 0)  # a row for each clip
    assert whole.hits.tolist() == [[True, False, False], [False, True, False]]


def test_every_frame_is_a_map_of_its_own():
    maps = torch.cat([peak(2, 3), 100 * peak(9, 9)], 1)  # the clip's maximum is in frame 1
    box = torch.tensor([[3.0, 2.0, 4.0, 3.0]])
    assert pointing_game(maps, [[box, box]], 0).hits.tolist() == [[True, False]]


def rates():
    """Four clips of 2 frames, a hit in the frames named, no box in clip 2, one in clip 3."""
    here, there = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[8.0, 8.0, 9.0, 9.0]])
    none = torch.zeros(0, 4)
    boxes = [[here, here], [here, there], [], [none, there]]
    return pointing_game(peak(0, 0, 9, 9).repeat(4, 2, 1, 1), boxes, 0)


def test_rates():
    found = rates()
    assert found.boxed.tolist() == [[True, True], [True, True], [False, False], [False, True]]
    assert found.rate == pytest.approx(3 / 5)
    assert found.by_clip.tolist() == pytest.approx([1, 0.5, math.nan, 0], nan_ok=True)
    assert found.unboxed == pytest.approx(3 / 8)
    released = found.rate * (1 - found.unboxed)  # frames without a box are misses
    assert released == pytest.approx(3 / 8)


@pytest.mark.parametrize("boxes", [[[], []], [[torch.zeros(0, 4)] * 3, []], [[[]] * 3] * 2])
def test_no_box_at_all_is_said_and_gives_nan(boxes):
    with pytest.warns(UserWarning, match="of boxes, no frame has one; the rate is NaN"):
        found = sk.pointing_game(torch.zeros(2, 3, 8, 8), boxes)
    assert math.isnan(found.rate)
    assert found.by_clip.isnan().all()
    assert found.unboxed == 1
    assert not found.hits.any()


def test_perfect_maps_of_generated_clips_hit_everywhere_and_opposite_ones_nowhere():
    found = batch(Synthetic("appearance", "test", n=4, frames=4, size=48))
    shown = torch.tensor([[len(frame) > 0 for frame in clip] for clip in found.boxes])
    perfect = pointing_game(found.masks.float(), found.boxes, 0)
    assert torch.equal(perfect.boxed, shown)
    assert perfect.rate == 1
    assert relevance_mass(found.masks.float(), found.masks).tolist() == [1] * 4
    assert iou(found.masks.float(), found.masks).tolist() == [1] * 4
    away = (~found.masks).float() - 2 * found.masks.float()
    assert relevance_mass(away, found.masks).tolist() == [0] * 4
    assert iou(away, found.masks).tolist() == [0] * 4


def test_inputs_stay_as_they_were():
    maps, boxes = problem(0)
    before = maps.clone(), [[box.clone() for box in clip] for clip in boxes]
    pointing_game(maps, boxes)
    assert torch.equal(maps, before[0])
    assert all(
        torch.equal(a, b)
        for x, y in zip(boxes, before[1], strict=True)
        for a, b in zip(x, y, strict=True)
    )


def masked(seed, values=None, N=4, T=3, H=7, W=10):
    rng = np.random.default_rng(seed)
    maps = (
        rng.normal(size=(N, T, H, W))
        if values is None
        else rng.integers(-2, values, size=(N, T, H, W))
    )
    masks = rng.uniform(size=(N, T, H, W)) < rng.uniform(0.05, 0.9, size=(N, 1, 1, 1))
    masks[2] = False
    return torch.from_numpy(maps).float(), torch.from_numpy(masks)


@pytest.mark.parametrize("values", [None, 2])
@pytest.mark.parametrize("name", ["relevance_mass", "iou"])
def test_mask_scores_equal_the_plain_loop(name, values):
    for seed in range(4):
        maps, masks = masked(seed, values)
        maps[0] = -maps[0].abs() if seed == 3 else maps[0]  # no positive relevance
        found = getattr(sk.metrics, name)(maps, masks)
        expected = [getattr(reference, name)(a, b) for a, b in zip(maps, masks, strict=True)]
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert found[2].isnan()  # an empty mask


def test_mask_scores_by_hand():
    maps = torch.tensor([[[[4.0, 1.0, 1.0], [-9.0, 1.0, 3.0]]]])
    masks = torch.tensor([[[[True, False, True], [True, False, False]]]])
    assert relevance_mass(maps, masks).item() == pytest.approx((4 + 1) / 10)
    # the highest three: 4, 3 and any of three ones, one of which is in the mask beside the 4
    common = 1 + 1 / 3
    assert iou(maps, masks).item() == pytest.approx(common / (3 + 3 - common))
    masks = torch.tensor([[[[True, True, True], [False, True, True]]]])
    assert iou(maps, masks).item() == 1


def test_voxels_that_tie_favour_no_place():
    maps = torch.zeros(2, 2, 40, 50)
    masks = torch.zeros(2, 2, 40, 50, dtype=torch.bool)
    masks.view(2, -1)[:, :1000] = True
    assert iou(maps, masks).isnan().all()  # a map that says nothing ranks nothing
    maps[0, 0, 0, :9] = maps[1, -1, -1, -9:] = 1  # nine inside, or outside; a quarter of the rest
    common = torch.tensor([9 + 991 * 991 / 3991, 991 * 1000 / 3991])
    torch.testing.assert_close(iou(maps, masks), common / (2000 - common))
    assert iou(maps, masks).equal(iou(maps.flip(1, 2, 3), masks.flip(1, 2, 3)))


def test_relevance_mass_does_not_depend_on_scale_and_sums_without_loss():
    maps, masks = masked(5)
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(
            relevance_mass(scale * maps, masks), relevance_mass(maps, masks), equal_nan=True
        )
    many = torch.full((1, 16, 112, 112), 1e-4)
    many[0, 0, 0, 0] = 1e4
    inside = torch.ones(1, 16, 112, 112, dtype=torch.bool)
    inside[0, 0, 0, 0] = False
    rest = (16 * 112 * 112 - 1) * many[0, 0, 0, 1].item()
    assert relevance_mass(many, inside).item() == pytest.approx(rest / (rest + 1e4), rel=1e-6)


BOX = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
SHAPE = (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": torch.zeros(3, 8, 8)}, ValueError, r"maps: got shape \(3, 8, 8\)"),
        ({"maps": torch.zeros(SHAPE).double()}, TypeError, "maps: got dtype torch.float64"),
        ({"maps": torch.full(SHAPE, math.nan)}, ValueError, "maps: got NaN"),
        ({"boxes": None}, TypeError, "boxes: got NoneType, expected 2 clips"),
        ({"boxes": [[BOX] * 3]}, ValueError, "boxes: got length 1, expected 2 clips"),
        ({"boxes": [[BOX] * 3, None]}, TypeError, r"boxes\[1\]: got NoneType, expected 3 frames"),
        ({"boxes": [[BOX] * 3, [BOX] * 2]}, ValueError, r"boxes\[1\]: got length 2, expected 3"),
        ({"boxes": [[BOX] * 3, [BOX, BOX, BOX[0]]]}, ValueError,
         r"boxes\[1\]\[2\]: got shape \(4,\), expected \(K, 4\)"),
        ({"boxes": [[BOX, BOX[:, :3], BOX], []]}, ValueError,
         r"boxes\[0\]\[1\]: got shape \(1, 3\)"),
        ({"boxes": [[BOX, None, BOX], []]}, TypeError, r"boxes\[0\]\[1\]: got NoneType"),
        ({"boxes": [[BOX, BOX * math.inf, BOX], []]}, ValueError, r"boxes\[0\]\[1\]: got NaN"),
        ({"boxes": [[BOX, BOX[:, [2, 1, 0, 3]], BOX], []]}, ValueError,
         r"boxes\[0\]\[1\]: got \[\[2.0, 1.0, 1.0, 2.0\]\], expected x0 < x1"),
        ({"boxes": [[BOX, 0 * BOX, BOX], []]}, ValueError, r"boxes\[0\]\[1\]: .*expected x0 < x1"),
        ({"radius": -1}, ValueError, "radius: got -1"),
        ({"radius": math.nan}, ValueError, "radius: got nan"),
        ({"radius": math.inf}, ValueError, "radius: got inf"),
        ({"radius": "7"}, ValueError, "radius: got 7"),
        ({"shape": "disc"}, ValueError, "shape: got 'disc', expected one of 'circle', 'square'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(change, error, message):
    call = {"maps": torch.zeros(SHAPE), "boxes": [[BOX] * 3, [BOX] * 3]} | change
    with pytest.raises(error, match="^" + message):
        pointing_game(**call)


@pytest.mark.parametrize("score", [relevance_mass, iou])
def test_a_wrong_mask_is_refused_by_name(score):
    maps, masks = torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"^masks: got dtype torch.float32, expected torch.bool"):
        score(maps, masks.float())
    with pytest.raises(ValueError, match=r"^masks: got shape \(1, 3, 8, 8\), expected the maps'"):
        score(maps, masks[:1])
    with pytest.raises(TypeError, match=r"^masks: got NoneType"):
        score(maps, None)
    with pytest.raises(ValueError, match=r"^maps: got NaN"):
        score(maps / 0, masks)
