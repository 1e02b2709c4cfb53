import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stepkit import stats
from stepkit.clips import unnormalise
from stepkit.data import Synthetic, batch, load_dataset, scenes
from stepkit.data.sample import collate
from stepkit.data.scenes import CLASSES, PHOTOGRAPHS, SCENES, Scenes
from stepkit.networks import NarrowResNet

NAMES = list(CLASSES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(8, 48), (5, (40, 64))])
def test_shapes_classes_and_values(name, size):
    frames, side = size
    found = batch(Scenes(name, n=16, frames=frames, size=side))
    height, width = (side, side) if isinstance(side, int) else side
    assert found.clips.shape == (16, 3, frames, height, width)
    assert found.masks.shape == (16, frames, height, width)
    assert (found.clips.dtype, found.masks.dtype) == (torch.float32, torch.bool)
    assert found.targets.bincount().tolist() == [2] * 8
    assert len(set(found.ids)) == 16
    rgb = unnormalise(found.clips)
    assert 0 <= rgb.min() < 0.2
    assert 0.8 < rgb.max() <= 1
    assert 0.3 < rgb.mean() < 0.7


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_is_the_same_alone_in_a_batch_and_from_a_loader(name):
    data = Scenes(name, n=9)
    alone, loaded = data[4], next(iter(DataLoader(data, 9, collate_fn=collate)))
    assert alone.clip.equal(data[4].clip)
    assert alone.mask.equal(loaded.masks[4])
    torch.testing.assert_close(alone.clip, loaded.clips[4], atol=1e-4, rtol=0)
    for other in (Scenes(name, n=9, seed=1), Scenes(name, "train", n=9), Scenes(name, "val", n=9)):
        assert (other[4].clip - alone.clip).abs().mean() > 0.1
    data.epoch = 1
    assert (data[4].clip - alone.clip).abs().mean() > 0.1
    assert len(list(data)) == 9


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    scenes._texture(5)
    Scenes("decoy", n=1)[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_random_numbers_are_those_of_the_hash_in_pure_integers():
    def hashed(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    given = [0, 1, 31, 2**31 - 1, 2**32 - 1]
    assert scenes._hashed(torch.tensor(given)).tolist() == [hashed(x) for x in given]
    draws = scenes._Draws(0, torch.arange(4000))(0, 1, 20)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(np.corrcoef(draws.T.numpy()) - np.eye(20)).max() < 0.07
    assert abs(draws.mean(0) - 0.5).max() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_draws_the_same_clips(name):
    clips, masks = Scenes(name, n=16, frames=16, size=112).render(range(16))
    found, theirs = Scenes(name, n=16, frames=16, size=112, device="cuda").render(range(16))
    assert found.is_cuda
    assert (found.cpu() - clips).abs().mean() < 1e-4
    assert (theirs.cpu() != masks).float().mean() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_tight_around_the_masks(name):
    for sample in (Scenes(name, n=6)[i] for i in range(6)):
        for box, mask in zip(sample.boxes, sample.mask, strict=True):
            assert len(box) == mask.any()
            for x0, y0, x1, y1 in box.int().tolist():
                assert mask[y0:y1, x0:x1].sum() == mask.sum()
                edges = mask[[y0, y1 - 1]].any(1), mask[:, [x0, x1 - 1]].any(0)
                assert torch.cat(edges).all()


@pytest.mark.parametrize(
    ("name", "shown", "low", "high"),
    [("needle", 2, 0.015, 0.03), ("decoy", 4, 0.015, 0.03), ("course", 8, 0.025, 0.05)],
)
def test_share_of_the_evidence_in_time_and_space_is_as_documented(name, shown, low, high):
    masks = batch(Scenes(name, n=48)).masks
    assert low < masks.float().mean() < high
    seen = masks.flatten(2).any(2).sum(1)
    assert (seen <= shown).all()
    assert seen.float().mean() > 0.95 * shown


def probe(known, classes, asked, truth):
    """Accuracy of a linear classifier by least squares."""
    level, spread = known.mean(0), known.std(0) + 1e-6
    known, asked = (
        torch.cat([(x - level) / spread, torch.ones(len(x), 1)], 1) for x in (known, asked)
    )
    weights = torch.linalg.lstsq(known, F.one_hot(classes, 8).float()).solution
    return ((asked @ weights).argmax(1) == truth).float().mean().item()


def simple(clips):
    """Colour, contrast and where it is bright, of the clip and of each frame."""
    rgb = unnormalise(clips)
    bright = rgb.mean(1)
    place = torch.linspace(-1, 1, bright.shape[-1])
    parts = [
        rgb.mean((3, 4)).flatten(1),
        rgb.std((3, 4)).flatten(1),
        (bright.mean(2) * place).mean(2),
        (bright.mean(3) * place).mean(2),
        bright.diff(dim=1).abs().mean((2, 3)),
        rgb.diff(dim=-1).abs().mean((1, 2, 3, 4))[:, None],
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", NAMES)
def test_simple_statistics_do_not_tell_the_class(name):
    data = Scenes(name, "train", n=1800, size=32)
    given = [data.render(range(i, i + 100)) for i in range(0, 1800, 100)]
    clips, masks = (torch.cat(parts) for parts in zip(*given, strict=True))
    target = torch.tensor(data.targets)
    place = masks.float().mean(1)  # where evidence is, in the clip
    axis = torch.arange(32.0)
    place = torch.stack([(place.sum(d) * axis).sum(1) for d in (1, 2)] + [place.sum((1, 2))], 1)
    told = target < 8  # the ninth class is plain to see, if in a contrast that says no more
    clips, place, target = clips[told], place[told], target[told]
    features = [simple(clips)] + ([place] if name != "course" else [])
    for found in features:
        right = probe(found[:1000], target[:1000], found[1000:], target[1000:])
        # by chance 600 guesses are right within 3.3 standard errors of 1/8 in 999 of 1000 cases
        assert abs(right - 1 / 8) < 0.045


@pytest.mark.parametrize("split", ["train", "test"])
def test_decoys_tell_nothing_in_training_and_are_of_other_classes_elsewhere(split, monkeypatch):
    painted, paint = [], Scenes._paint

    def spy(self, frames, draw, camera, label, *rest):
        painted.append(label)
        return paint(self, frames, draw, camera, label, *rest)

    monkeypatch.setattr(Scenes, "_paint", spy)
    data = Scenes("decoy", split, n=900, frames=1, size=24)
    data.render(range(900))
    *decoys, target = painted
    assert target.tolist() == data.targets
    told = target < 8
    assert told.sum() == (800 if split == "train" else 900)
    target = target[told]
    for label in (each[told] for each in decoys):
        assert label.max() == 7
        same = (label == target).float().mean()
        assert 0.08 < same < 0.17 if split == "train" else same == 0
        gaps = ((label - target) % 8).bincount(minlength=8)[1:]
        assert gaps.min() > 60


@pytest.mark.parametrize("name", ["needle", "decoy"])
def test_filmed_again_only_what_was_asked_for_differs(name):
    data, at = Scenes(name, n=16), list(range(16))
    clips, masks = data.render(at)
    others = [(i + 3) % 8 for i in at]
    around = F.max_pool3d(masks[:, None].float(), (1, 5, 5), 1, (0, 2, 2)) > 0  # soft outlines
    for way in ({"targets": others}, {"plain": True}):
        found, theirs = data.render(at, **way)
        assert theirs.equal(masks)
        changed = (found - clips).abs().amax(1, keepdim=True) > 0.02
        assert changed.flatten(1).any(1).all()
        assert not (changed & ~around).any()
    plain = data.render(at, plain=True)[0]
    assert plain.equal(data.render(at, plain=True, targets=others)[0])
    found, theirs = data.render(at, around=1)
    assert theirs.equal(masks)
    outside = F.max_pool3d(1 - F.pad(masks.float(), (1, 1, 1, 1)), (1, 3, 3), 1)[:, None]
    core, inside = outside == 0, masks[:, None].expand_as(clips)
    torch.testing.assert_close(found * core, clips * core, atol=1e-4, rtol=0)
    assert (found - clips)[~inside].abs().mean() > 0.3


def test_a_course_filmed_again_goes_elsewhere_or_stands_still():
    data, at = Scenes("course", n=16, frames=5), list(range(16))
    clips, masks = data.render(at)
    still = data.render(at, plain=True)[1]
    assert (still == still[:, :1]).all()
    turned = data.render(at, targets=[(i + 4) % 8 for i in at])[1]
    assert (turned != masks).any()
    # halfway all courses cross: this frame is the very same in every class
    for k in range(8):
        halfway = data.render(at, targets=[k] * 16)[0][:, :, 2]
        torch.testing.assert_close(halfway, clips[:, :, 2], atol=1e-4, rtol=0)
    assert data.render(at, around=2)[1].equal(masks)


def courses(n: int, seed: int):
    data = Scenes("course", "test", n=n, size=24, seed=seed)
    parts = [data.render(range(i, i + 100))[1] for i in range(0, n, 100)]
    return torch.cat(parts).float(), torch.tensor(data.targets)


class Looks(nn.Module):
    """A small network on frames (N, 3, H, W)."""

    def __init__(self):
        super().__init__()
        self.features, self.classify = NarrowResNet(4), nn.Linear(256, 8)

    def forward(self, frames):
        return self.classify(self.features(frames))


def learn(known, classes, asked, truth, epochs=10):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Looks()
    adam = torch.optim.AdamW(network.parameters(), 3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(known), generator=order).split(50):
            adam.zero_grad()
            F.cross_entropy(network(known[part]), classes[part]).backward()
            adam.step()
    with torch.no_grad():
        return (network.eval()(asked).argmax(1) == truth).float().mean().item()


def test_a_network_trained_on_still_frames_of_courses_is_at_chance():
    # shown the actor alone, cut out, the easiest case; three frames are the control
    (known, classes), (asked, truth) = courses(1200, 0), courses(800, 1)
    three = [masks[:, [3, 4, 5]] for masks in (known, asked)]
    assert learn(three[0], classes, three[1], truth) > 0.4
    for frame in (0, 7):
        one = [masks[:, [frame] * 3] for masks in (known, asked)]
        # by chance 800 guesses are right within 3.3 standard errors of 1/8
        assert abs(learn(one[0], classes, one[1], truth) - 1 / 8) < 0.039


@pytest.mark.parametrize("name", NAMES)
def test_a_ninth_class_is_an_actor_that_tells_nothing_and_not_in_the_test_part(name):
    data, tested = Scenes(name, "train", n=18), Scenes(name, n=18)
    assert len(data.classes) == 9
    assert data.targets == [i % 9 for i in range(18)]
    assert tested.targets == [i % 8 for i in range(18)]
    assert data.render(range(8, 18, 9))[0].equal(data.render(range(8, 18, 9), plain=True)[0])


def test_parts_share_no_image_and_a_scene_has_all_classes():
    names = [name for part in PHOTOGRAPHS.values() for name in part]
    assert len(set(names)) == len(names)
    banks = [scenes._bank(part, 24, torch.device("cpu"))[0].flatten(1) for part in PHOTOGRAPHS]
    apart = torch.cdist(torch.cat(banks), torch.cat(banks)).fill_diagonal_(1e9)
    assert apart.min() > 1
    data = Scenes("needle", n=8 * SCENES)
    seen = pd.DataFrame({"scene": data.scenes, "target": data.targets}).drop_duplicates()
    assert (seen.groupby("scene").size() == 8).all()
    assert len(set(data.scenes)) == SCENES >= 60
    assert all(i.startswith(s) for i, s in zip(data.ids, data.scenes, strict=True))


def test_intervals_go_over_scenes():
    data = Scenes("needle", n=122)
    found = stats.by_scene(pd.DataFrame({"x": np.arange(122) % SCENES}), data.scenes)
    once = stats.by_scene(pd.DataFrame({"x": np.arange(SCENES)}), range(SCENES))
    assert found.loc["x", ["mean", "low", "high"]].equals(once.loc["x", ["mean", "low", "high"]])


class Reads(nn.Module):
    """Sure of the class that the generator painted where it looks: a truth to be verified."""

    def __init__(self, data, blind=()):
        super().__init__()
        self.data, self.blind = data, blind

    def forward(self, clips):
        wanted = torch.stack([self.data.render(range(8), targets=[k] * 8)[0] for k in range(8)], 1)
        masks = self.data.render(range(8))[1][:, None, None]
        gap = (((clips[:, None] - wanted) ** 2) * masks).mean((2, 3, 4, 5))
        logits = -1e4 * gap
        logits[list(self.blind)] = 0
        return logits


def test_verify_tells_who_reads_the_actor_and_who_does_not():
    data = Scenes("needle", n=8)
    found = scenes.verify(Reads(data, blind=[2]), data, range(8))
    assert found["follows"].tolist() == [i != 2 for i in range(8)]
    assert found["stays"].tolist() == [i != 2 for i in range(8)]
    assert not found["falls"][2]


def test_three_times_as_fast_on_a_core_as_the_older_ones():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [best(Synthetic("object", "train", n=100, frames=16, size=112))]
        seconds += [best(Scenes(name, "train", n=100, frames=16, size=112)) for name in NAMES]
    finally:
        torch.set_num_threads(before)
    print([f"{1000 * each:.1f} ms" for each in seconds])
    assert np.mean(seconds[1:]) < seconds[0] / 2  # 3 where nothing else runs


def best(data):
    several = getattr(data, "__getitems__", lambda at: [data[i] for i in at])
    tries = []
    for k in range(8):  # the first loads the photographs; what else runs here must not count
        start = time.process_time()
        several([*range(4 * k, 4 * k + 4)])
        tries.append((time.process_time() - start) / 4)
    return min(tries)


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"name": "object"}, "name"), ({"split": "dev"}, "split"), ({"size": 8}, "size")],
)
def test_bad_arguments_are_named(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        Scenes(**({"name": "course"} | options))
    with pytest.raises(IndexError):
        Scenes("course", n=3)[3]


def test_load_dataset_by_name():
    found = load_dataset("decoy", "val", frames=4, size=32, n=5, device="cpu")
    assert (len(found), found.name, found.classes[0]) == (5, "decoy", "across")
