"""Insertion and deletion curves against Eqs. 12-19 done unit by unit, and the identities of §IV."""

from itertools import pairwise

import pytest
import reference
import torch
from torch import nn

from stepkit import removal
from stepkit.data import Batch
from stepkit.metrics import METRICS, auc, curves, deletion, insertion

OPERATIONS = {"insertion": insertion, "deletion": deletion}
SIZE = (3, 6, 8)  # T, H, W
UNITS = {"patch of 2": (2, 36), "patch of 3": (3, 18), "patch of 4": (4, 12), "pixel": (1, 144)}
RULES = {"mean": reference.auc_mean, "trapezoid": reference.auc_trapezoid}


class Sensor(nn.Module):
    """Every voxel votes, not quite linearly, on four classes."""

    def __init__(self, size=SIZE):
        super().__init__()
        T, H, W = size
        draw = torch.randn(4, 3 * T * H * W, generator=torch.Generator().manual_seed(7))
        self.weight = nn.Parameter(3 * draw / draw.shape[1] ** 0.5)

    def forward(self, clips):
        return (torch.tanh(clips).flatten(1)[:, None] * self.weight).sum(2)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    return Sensor(), noise(2, 3, *SIZE), noise(2, *SIZE, seed=1), [2, 0]


def unit_ranks(maps, side):
    """The rank of each pixel's patch, (N, T, H, W), and the number of patches."""
    labels = curves.patches(maps.shape[1:], side)
    return torch.stack([curves.unit_ranks(m, labels)[labels] for m in maps]), int(labels.max()) + 1


def options(unit):
    return {"unit": "pixel"} if unit == "pixel" else {"patch": UNITS[unit][0]}


def twin(model, clips, maps, targets, operation, order, side, L, baseline=0.0):
    curves = []
    for clip, relevance, target in zip(clips, maps, targets, strict=True):
        split = reference.subsets(relevance, side, L, order)
        nothing = torch.zeros_like(clip) + baseline
        curves.append(reference.curve(model, clip, nothing, target, split, operation))
    return torch.tensor(curves)


# ---------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("unit", "L"), [("patch of 2", 12), ("patch of 3", 18), ("pixel", 16)])
def test_curve_equals_perturbing_unit_by_unit(problem, unit, L, operation, order):
    side, units = UNITS[unit]
    assert units % L == 0
    found = OPERATIONS[operation](*problem, order=order, steps=L, **options(unit))
    expected = twin(*problem, operation, order, side, L)
    assert found.curve.shape == (2, L + 1)
    torch.testing.assert_close(found.curve, expected, rtol=0, atol=1e-6)
    steps = torch.arange(L + 1).float() / L
    torch.testing.assert_close(found.share, steps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("unit", "L"), [("patch of 2", 7), ("patch of 4", 5), ("pixel", 10)])
def test_curve_of_uneven_steps_equals_perturbing_unit_by_unit(problem, unit, L, operation, order):
    # §IV-A splits the pixels into I^(1) ... I^(L) by the order alone, and Eqs. 14 and 18 add and
    # take away the same h^(l), also where the steps are uneven.
    side, units = UNITS[unit]
    assert units % L != 0
    found = OPERATIONS[operation](*problem, order=order, steps=L, **options(unit))
    expected = twin(*problem, operation, order, side, L)
    torch.testing.assert_close(found.curve, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize(("unit", "L"), [("patch of 2", 12), ("patch of 2", 7), ("pixel", 10)])
def test_insertion_has_inserted_what_deletion_has_deleted(problem, unit, L, order):
    inserted = insertion(*problem, order=order, steps=L, **options(unit)).share
    deleted = deletion(*problem, order=order, steps=L, **options(unit)).share
    torch.testing.assert_close(inserted, deleted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 5, 7), (2, 1, 9), (4, 3, 3)])
def test_curve_of_another_clip_size_equals_perturbing_unit_by_unit(size):
    arguments = Sensor(size), noise(1, 3, *size), noise(1, *size, seed=1), [1]
    side, units = 2, len(reference.units(*size, 2))
    found = insertion(*arguments, patch=side, steps=units)
    expected = twin(*arguments, "insertion", "morf", side, units)
    torch.testing.assert_close(found.curve, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_auc_follows_its_rule(problem, operation, rule):
    found = OPERATIONS[operation](*problem, rule=rule, steps=9, patch=2)
    expected = [RULES[rule](values) for values in found.curve.tolist()]
    torch.testing.assert_close(found.auc, torch.tensor(expected), rtol=0, atol=1e-6)
    assert auc(found.curve, rule).equal(found.auc)


def test_default_rule_is_equation_19(problem):
    assert insertion(*problem).auc.equal(insertion(*problem, rule="mean").auc)


def test_auc_of_a_straight_line():
    line = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    assert auc(line, "mean").item() == 0.625
    assert auc(line, "trapezoid").item() == 0.5


# --------------------------------------------------------------------------------- the identities


@pytest.mark.parametrize(("unit", "L"), [("patch of 2", 12), ("patch of 2", 7), ("pixel", 10)])
@pytest.mark.parametrize(("order", "opposite"), [("morf", "lerf"), ("lerf", "morf")])
def test_insertion_is_deletion_in_the_other_order_read_backwards(problem, order, opposite, unit, L):
    model, clips, maps, targets = problem
    maps = maps.round()  # many ties: they must be broken alike
    arguments = {"steps": L, "rule": "trapezoid", **options(unit)}
    inserted = insertion(model, clips, maps, targets, order=order, **arguments)
    deleted = deletion(model, clips, maps, targets, order=opposite, **arguments)
    assert inserted.curve.equal(deleted.curve.flip(1))
    torch.testing.assert_close(inserted.auc, deleted.auc, rtol=0, atol=1e-6)
    torch.testing.assert_close(inserted.share, 1 - deleted.share.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("baseline", ["fade", "black", "blur", removal.constant((1, 0, 0.5))])
def test_end_points_are_exactly_the_baseline_and_the_clip(problem, order, baseline):
    model, clips, maps, targets = problem
    # one at a time, as a clip and its baseline are seen with batch_size=1
    whole, nothing = (
        torch.stack(
            [model(x[n : n + 1]).softmax(1)[0, targets[n]].detach() for n in range(len(clips))]
        )
        for x in (clips, removal.named(baseline).nothing(clips))
    )
    for operation, (first, last) in {
        insertion: (nothing, whole),
        deletion: (whole, nothing),
    }.items():
        found = operation(
            model, clips, maps, targets, order=order, baseline=baseline, steps=5, batch_size=1
        )
        assert found.curve[:, 0].equal(first)
        assert found.curve[:, -1].equal(last)
        assert found.share[0] == 0
        assert found.share[-1] == 1


def test_baseline_stands_where_units_are_missing(problem):
    model, clips, maps, targets = problem
    colour = reference.colour(clips[0], (0.3, 0.6, 0.1)).float()
    found = insertion(
        model, clips, maps, targets, patch=2, steps=12, baseline=removal.constant((0.3, 0.6, 0.1))
    )
    expected = twin(*problem, "insertion", "morf", 2, 12, baseline=colour)
    torch.testing.assert_close(found.curve, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_result_does_not_depend_on_the_batch_size(problem, operation, batch_size):
    expected = OPERATIONS[operation](*problem, steps=9)
    found = OPERATIONS[operation](*problem, steps=9, batch_size=batch_size)
    torch.testing.assert_close(found.curve, expected.curve, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.auc, expected.auc, rtol=0, atol=1e-6)


def test_result_does_not_depend_on_the_other_clips(problem):
    model, clips, maps, targets = problem
    together = insertion(*problem, steps=9)
    for n in range(2):
        alone = insertion(model, clips[n : n + 1], maps[n : n + 1], targets[n], steps=9)
        assert alone.curve[0].equal(together.curve[n])


def test_the_right_map_scores_better_than_the_opposite():
    model, clips = Sensor(), noise(1, 3, *SIZE)
    votes = (torch.tanh(clips[0]).flatten() * model.weight[1]).detach().view(3, *SIZE).sum(0)[None]
    good, bad = (
        {name: f(model, clips, m, 1, unit="pixel").auc for name, f in OPERATIONS.items()}
        for m in (votes, -votes)
    )
    assert good["insertion"] > bad["insertion"] + 0.3
    assert good["deletion"] < bad["deletion"] - 0.3


# ---------------------------------------------------------------------------------------- units


def test_units_of_the_paper():
    ranks, units = unit_ranks(noise(1, 16, 112, 112), 7)
    assert units == 4096
    assert ranks.unique().tolist() == list(range(4096))
    assert bool((torch.bincount(ranks.flatten()) == 49).all())
    found = insertion(Sensor((1, 112, 112)), noise(1, 3, 1, 112, 112), noise(1, 1, 112, 112), 0)
    assert found.curve.shape == (1, 129)  # 7 px patches are the default, 256 a frame, L = 128
    torch.testing.assert_close(found.share * 256, torch.arange(129) * 2.0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 9])
def test_ranks_sort_the_mean_of_each_unit(side):
    maps = noise(2, 3, 5, 7)
    ranks, units = unit_ranks(maps, side)
    blocks = reference.units(3, 5, 7, side)
    assert units == len(blocks)
    for n in range(2):
        means = [sum(float(maps[n][p]) for p in block) / len(block) for block in blocks]
        ordered = sorted(range(units), key=lambda u, m=means: -m[u])
        for rank, u in enumerate(ordered):
            assert {int(ranks[n][p]) for p in blocks[u]} == {rank}


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3])
@pytest.mark.parametrize(("side", "edge"), [(1, 6), (4, 8), (3, 10), (7, 16)])
def test_units_that_tie_keep_their_raster_order(side, edge, value):
    # float32 means of 9 and of 3 equal numbers differ by rounding, where a patch does not divide
    # the frame (0.1 + 0.1 + 0.1 over 3 is not 0.1)
    ranks, units = unit_ranks(torch.full((1, 2, edge, edge), value), side)
    assert ranks[0, :, ::side, ::side].flatten().tolist() == list(range(units))


def test_order_is_over_the_whole_clip_and_not_by_frame():
    maps = torch.zeros(1, 3, 4, 4)
    maps[:, 1] = noise(4, 4).abs() + 1
    maps[:, 2] = 0.5
    ranks, _ = unit_ranks(maps, 2)
    assert sorted(ranks[0, 1].unique().tolist()) == [0, 1, 2, 3]
    assert sorted(ranks[0, 2].unique().tolist()) == [4, 5, 6, 7]


def test_there_are_no_more_steps_than_units(problem):
    found = insertion(*problem, patch=3, steps=1000)
    assert found.curve.shape == (2, 19)
    assert found.curve.equal(insertion(*problem, patch=3, steps=18).curve)


# ---------------------------------------------------------------------------------- superpixels

LARGE = (3, 16, 20)
PER = ["frame", "clip"]


@pytest.fixture
def scene():
    """Two clips, two maps, targets; a clip has some 20 superpixels per frame."""
    return Sensor(LARGE), noise(2, 3, *LARGE), noise(2, *LARGE, seed=1), [2, 0]


def blocks_of(labels):
    found = [[] for _ in range(int(labels.max()) + 1)]
    for p in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        found[labels[tuple(p)]].append(tuple(p))
    return found


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("segments", [6, 20, 320])
def test_superpixels_equal_the_literal_ones(segments, per):
    for clip in noise(4, 3, *LARGE, seed=5):
        labels = curves.superpixels(clip, segments, per)
        assert blocks_of(labels) == reference.superpixels(clip, segments, per)


@pytest.mark.parametrize(("L", "rank_by"), [(7, "mean"), (12, "sum"), (150, "mean")])
@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("per", PER)
def test_curve_of_superpixels_equals_perturbing_one_by_one(
    scene, per, operation, order, L, rank_by
):
    model, clips, maps, targets = scene
    words = {"segments": 20, "segments_per": per, "rank_by": rank_by}
    found = OPERATIONS[operation](*scene, unit="superpixel", order=order, steps=L, **words)
    assert found.curve.shape == (2, L + 1)
    assert found.share.tolist() == pytest.approx([step / L for step in range(L + 1)])
    for n in range(2):
        blocks = reference.superpixels(clips[n], 20, per)
        assert len(blocks) < 150  # so that the longest curve repeats steps
        split = reference.split_units(maps[n], blocks, L, order, rank_by)
        nothing = torch.zeros_like(clips[n])
        expected = reference.curve(model, clips[n], nothing, targets[n], split, operation)
        torch.testing.assert_close(found.curve[n], torch.tensor(expected), rtol=0, atol=1e-6)


def test_superpixels_of_the_paper_and_of_the_released_code():
    clip = torch.nn.functional.interpolate(noise(1, 3, 4, 14, 14), (16, 112, 112))[0]
    printed = curves.superpixels(clip, 256, "frame")
    for frame in printed:
        assert 230 <= len(frame.unique()) <= 280
    released = curves.superpixels(clip, 256, "clip")
    # some 256 supervoxels, each the longer for it, cut by frame: fewer and larger units
    assert 256 <= int(released.max()) + 1 <= 0.8 * (int(printed.max()) + 1)
    for labels in (printed, released):
        ends = [(int(frame.min()), int(frame.max())) for frame in labels]
        assert ends[0][0] == 0
        for (_, last), (first, _) in pairwise(ends):  # every unit within a frame, none left out
            assert first == last + 1


@pytest.mark.parametrize(("size", "segments"), [((1, 112, 112), 256), ((2, 24, 30), 180)])
def test_default_number_of_superpixels_is_that_of_patches_in_a_frame(size, segments):
    where = Sensor(size), noise(1, 3, *size), noise(1, *size, seed=1), 0
    found = insertion(*where, unit="superpixel", steps=5)
    assert found.curve.equal(
        insertion(*where, unit="superpixel", steps=5, segments=segments, rank_by="mean").curve
    )
    assert len(reference.units(1, *size[1:], round(7 * size[1] / 112))) == segments


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 3), (1, 1, 7), (4, 6, 8)])
def test_tiny_frames_have_superpixels(size, per):
    where = Sensor(size), noise(1, 3, *size), noise(1, *size, seed=1), 0
    found = insertion(*where, unit="superpixel", segments_per=per, steps=9)
    assert found.curve.shape == (1, 10)
    whole = where[0](where[1]).softmax(1)[0, 0].item()
    assert found.curve[0, -1].item() == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("per", PER)
def test_superpixels_of_one_clip_do_not_depend_on_the_other(scene, per, operation):
    model, clips, maps, targets = scene
    clips[1] = clips[1].mean()  # flat: another number of superpixels
    segments = {"frame": 20, "clip": 100}[per]
    words = {"unit": "superpixel", "segments": segments, "segments_per": per, "steps": 150}
    together = OPERATIONS[operation](model, clips, maps, targets, **words)
    numbers = {int(curves.superpixels(clip, segments, per).max()) for clip in clips}
    assert len(numbers) == 2
    for n in range(2):
        one = slice(n, n + 1)
        alone = OPERATIONS[operation](model, clips[one], maps[one], targets[n], **words)
        torch.testing.assert_close(alone.curve[0], together.curve[n], rtol=0, atol=1e-6)
        assert alone.share.equal(together.share)


def test_sum_favours_what_is_large_and_mean_does_not():
    labels = torch.tensor([[[0, 1, 1, 1], [2, 1, 1, 1]]])
    values = torch.tensor([[[3.0, 1.0, 1, 1], [2, 1, 1, 1]]])
    assert curves.unit_ranks(values, labels, "mean").tolist() == [0, 2, 1]
    assert curves.unit_ranks(values, labels, "sum").tolist() == [1, 0, 2]


@pytest.mark.parametrize("rank_by", ["mean", "sum"])
@pytest.mark.parametrize("unit", [{"patch": 3}, {"unit": "superpixel", "segments": 9}])
def test_unit_is_ranked_by_what_was_asked_for(problem, unit, rank_by):
    # patches at the border are smaller, so the two differ there as well
    model, clips, maps, targets = problem
    words = {"steps": 9, **unit}
    found = insertion(model, clips, maps.abs(), targets, rank_by=rank_by, **words)
    for n, clip in enumerate(clips):
        patches = reference.units(*SIZE, 3)
        blocks = reference.superpixels(clip, 9, "frame") if "unit" in unit else patches
        split = reference.split_units(maps[n].abs(), blocks, 9, "morf", rank_by)
        nothing = torch.zeros_like(clip)
        expected = reference.curve(model, clip, nothing, targets[n], split, "insertion")
        torch.testing.assert_close(found.curve[n], torch.tensor(expected), rtol=0, atol=1e-6)
    other = {"mean": "sum", "sum": "mean"}[rank_by]
    assert not found.curve.equal(
        insertion(model, clips, maps.abs(), targets, rank_by=other, **words).curve
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("per", PER)
def test_superpixels_that_tie_keep_their_order(per, value):
    labels = curves.superpixels(noise(3, *LARGE), 20, per)
    ranks = curves.unit_ranks(torch.full(LARGE, value), labels)
    assert ranks.tolist() == list(range(int(labels.max()) + 1))


# ---------------------------------------------------------------------------------- both at once


TRIED = 3  # clips that a new model is tried with: one, and it beside another


class Recorder(Sensor):
    """Keeps what it was shown; the first clip is that of the check at the door."""

    def __init__(self, size=SIZE):
        super().__init__(size)
        self.seen, self.batches = [], []

    def forward(self, clips):
        self.seen += list(clips.clone())
        self.batches.append(len(clips))
        return super().forward(clips)


@pytest.fixture
def shown(problem):
    _, clips, maps, targets = problem
    return Batch(clips, torch.tensor(targets), ["a", "b"], [[], []], None), maps


UNIT = [{"patch": 2}, {"unit": "pixel"}, {"unit": "superpixel", "segments": 9}]


@pytest.mark.parametrize("unit", UNIT)
def test_the_metric_is_insertion_and_deletion(shown, unit):
    batch, maps = shown
    words = {"steps": 7, "baseline": "blur", "rule": "trapezoid", **unit}
    found = METRICS["auc"].run(Sensor(), batch, maps, **words)
    for name, operation in OPERATIONS.items():
        alone = operation(Sensor(), batch.clips, maps, batch.targets, **words)
        assert found[name].equal(alone.auc)
        assert found[f"{name} curve"].equal(alone.curve)
    assert list(found) == ["insertion", "insertion curve", "deletion", "deletion curve"]
    with pytest.raises(ValueError, match=r"^option: got 'stepps'"):
        METRICS["auc"].run(Sensor(), batch, maps, stepps=3)


def test_superpixels_are_cut_once_for_all_methods_and_both_curves(shown, monkeypatch):
    batch, maps = shown
    cut, calls = curves.superpixels, []
    monkeypatch.setattr(curves, "superpixels", lambda *given: calls.append(given) or cut(*given))
    words = {"unit": "superpixel", "segments": 9, "steps": 3}
    for given in (maps, -maps):
        METRICS["auc"].run(Sensor(), batch, given, **words)
    assert len(calls) == len(batch.clips)
    METRICS["auc"].run(Sensor(), batch, maps, **words | {"segments": 6})
    assert len(calls) == 2 * len(batch.clips)


def test_mean_drop_that_aopc_is_named_after_follows_from_the_auc(problem):
    found = deletion(*problem, steps=9)
    for n in range(2):
        drops = [(found.curve[n, 0] - phi).item() for phi in found.curve[n]]
        aopc = 9 / 10 * (found.curve[n, 0] - found.auc[n]).item()
        assert sum(drops) / 10 == pytest.approx(aopc, abs=1e-6)


@pytest.mark.parametrize("unit", UNIT)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_step_is_shown_once_and_the_end_points_exactly(problem, operation, unit):
    _, clips, maps, targets = problem
    model = Recorder()
    OPERATIONS[operation](model, clips, maps, targets, steps=5, baseline="blur", **unit)
    assert len(model.seen) == TRIED + 2 * 6
    for whole, empty in zip(clips, removal.named("blur").nothing(clips), strict=True):
        for end in (whole, empty):
            assert sum(shown.equal(end) for shown in model.seen[TRIED:]) == 1


def test_more_steps_than_superpixels_repeat_some(scene):
    model, clips, maps, targets = scene
    found = insertion(model, clips, maps, targets, unit="superpixel", segments=20, steps=500)
    units = [len(reference.superpixels(clip, 20, "frame")) for clip in clips]
    assert [len(curve.unique_consecutive()) for curve in found.curve] == [U + 1 for U in units]
    assert found.curve.shape == (2, 501)


@pytest.mark.parametrize("batch_size", [1, 3, 64, 1000])
def test_batches_are_full(problem, batch_size):
    _, *rest = problem
    model = Recorder()
    insertion(model, *rest, batch_size=batch_size, steps=9)
    full, left = divmod(2 * 10, batch_size)
    expected = [batch_size] * full + [left] * (left > 0)
    assert model.batches[2 + (batch_size == 1) :] == expected  # clips share batches


@pytest.mark.parametrize("operation", OPERATIONS)
def test_picture_of_a_step_is_what_the_network_was_shown(problem, operation):
    _, clips, maps, _ = problem
    model = Recorder()
    OPERATIONS[operation](model, clips[:1], maps[:1], 0, steps=6, patch=2, baseline="black")
    for step in range(7):
        words = {"operation": operation, "patch": 2, "baseline": "black"}
        picture = curves.perturbed(clips[0], maps[0], step / 6, **words)
        assert any(picture.equal(shown) for shown in model.seen[TRIED:]), step


# ---------------------------------------------------------------------------------------- manners


def test_each_clip_has_its_own_target(problem):
    model, clips, maps, _ = problem
    both = insertion(model, clips, maps, [3, 1], steps=4)
    for n, target in enumerate((3, 1)):
        same = insertion(model, clips, maps, target, steps=4)
        assert same.curve[n].equal(both.curve[n])


def test_model_is_left_as_it_was(problem):
    model, *rest = problem
    model.train()
    model.weight.grad = torch.ones_like(model.weight)
    state = torch.get_rng_state()
    found = deletion(model, *rest, steps=4)
    assert model.training
    assert model.weight.requires_grad
    assert model.weight.grad.equal(torch.ones_like(model.weight))
    assert not found.curve.requires_grad
    assert torch.get_rng_state().equal(state)


def test_dropout_is_off_while_the_model_watches(problem):
    model, *rest = problem
    noisy = nn.Sequential(nn.Dropout(0.5), model).train()
    assert deletion(noisy, *rest, steps=4).curve.equal(deletion(model, *rest, steps=4).curve)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"order": "best"}, "order"),
        ({"unit": "cube"}, "unit"),
        ({"rule": "simpson"}, "rule"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"baseline": "grey"}, "removal"),
        ({"patch": -1}, "patch"),
        ({"patch": 0}, "patch"),  # not the same as none given
        ({"segments_per": "video"}, "segments_per"),
        ({"rank_by": "max"}, "rank_by"),
        ({"unit": "superpixel", "segments": 0}, "segments"),
        ({"unit": "superpixel", "segments": 2.5}, "segments"),
        ({"maps": noise(2, 3, 6, 7)}, "maps"),
        ({"maps": noise(1, *SIZE)}, "maps"),
        ({"maps": torch.full((2, *SIZE), float("nan"))}, "maps"),
        ({"clips": noise(2, 1, *SIZE)}, "clips"),
        ({"targets": [0, 4]}, "targets"),
        ({"targets": [0]}, "targets"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(problem, change, argument):
    model, clips, maps, targets = problem
    given = {"clips": clips, "maps": maps, "targets": targets, "steps": 4, **change}
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        insertion(model, **given)


def test_auc_refuses_a_rule_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"^rule: got 'simpson'"):
        auc(torch.zeros(1, 5), "simpson")


def test_float64_maps_are_refused_by_name(problem):
    model, clips, maps, targets = problem
    with pytest.raises(TypeError, match=r"^maps: got dtype torch\.float64"):
        insertion(model, clips, maps.double(), targets)


def test_a_model_that_turns_to_nan_is_refused(problem):
    model, *rest = problem

    class Fragile(nn.Module):
        def forward(self, clips):
            logits = model(clips)
            return logits / (clips != 0).all().float()  # NaN or infinity where voxels are zero

    with pytest.raises(ValueError, match=r"^model: got NaN"):
        insertion(Fragile(), *rest, steps=4)
