"""KAR and ROAR: what is kept, what is learnt from it, and that nothing is done twice."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reference
import torch
from torch import nn

from stepkit import training
from stepkit.clips import MEAN, STD
from stepkit.data import Batch
from stepkit.metrics import RATIOS, perturb, retrain
from stepkit.training import QUICK

T, H, W = 2, 8, 8
RECIPE = replace(QUICK, epochs=12, batch_size=8, learning_rate=0.02, removal_share=0.0)
BLACK = [-m / s for m, s in zip(MEAN, STD, strict=True)]


class Small(nn.Module):
    """Enough to tell a colour at a place."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.conv, self.head = nn.Conv3d(3, 4, (1, 4, 4), (1, 4, 4)), nn.Linear(16 * T, 2)

    def forward(self, clips):
        return self.head(self.conv(clips).relu().flatten(1))


def clips_of_two_classes(n, seed):
    """Noise; the class is the colour of the square at the upper left."""
    noise = torch.Generator().manual_seed(seed)
    clips = torch.randn(n, 3, T, H, W, generator=noise)
    targets = torch.arange(n) % 2
    clips[:, 0, :, :4, :4] += torch.where(targets == 0, 3.0, -3.0)[:, None, None, None]
    ids = [f"{seed}_{i}" for i in range(n)]
    return Batch(clips, targets, ids, [[] for _ in ids], None)


@pytest.fixture(scope="module")
def data():
    sizes = {"train": 32, "val": 16, "test": 16}
    return {part: clips_of_two_classes(n, seed) for seed, (part, n) in enumerate(sizes.items())}


def corner(data, row, column):
    """Maps that are 1 on one of the four squares of a frame."""
    maps = {}
    for part, batch in data.items():
        maps[part] = torch.zeros_like(batch.clips[:, 0])
        maps[part][:, :, row : row + 4, column : column + 4] = 1
    return maps


def accuracy(scores):
    return scores.groupby(["method", "ratio"])["correct"].mean()


# ------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("ratio", RATIOS)
def test_kept_share_equals_the_literal_one(ratio):
    noise = torch.Generator().manual_seed(0)
    clips = torch.randn(2, 3, 3, 5, 6, generator=noise)
    maps = torch.randint(0, 9, (2, 3, 5, 6), generator=noise).float()  # with ties
    kept = perturb(clips, maps, ratio)
    for n in range(2):
        expected = reference.keep_share(clips[n], maps[n], ratio, BLACK)
        torch.testing.assert_close(kept[n], expected)


@pytest.mark.parametrize("removal", ["black", "blur", "fade"])
def test_what_one_keeps_the_other_removes(removal):
    noise = torch.Generator().manual_seed(0)
    clips, maps = torch.randn(2, 3, 3, 8, 8, generator=noise), torch.rand(2, 3, 8, 8)
    kept = perturb(clips, maps, 0.3, "keep", removal)
    removed = perturb(clips, -maps, 0.7, "remove", removal)
    torch.testing.assert_close(kept, removed)
    same = (kept == clips).all(1)
    assert same.flatten(1).float().mean(1).tolist() == pytest.approx([0.3, 0.3], abs=0.01)


# --------------------------------------------------------------------------------- a known answer


def test_keeping_the_evidence_keeps_the_accuracy_and_removing_it_loses_it(data, tmp_path):
    maps = {"evidence": corner(data, 0, 0), "elsewhere": corner(data, 4, 4)}
    kept = accuracy(retrain(Small, data, maps, tmp_path / "kar", RECIPE, ratios=[0.2]))
    assert kept["evidence", 0.2] >= 0.95
    assert kept["elsewhere", 0.2] <= 0.8  # 16 clips, chance is a half
    removed = retrain(
        Small, data, maps, tmp_path / "roar", RECIPE, ratios=[0.25], operation="remove"
    )
    removed = accuracy(removed)
    assert removed["evidence", 0.25] <= 0.8
    assert removed["elsewhere", 0.25] >= 0.95


def test_a_row_per_method_ratio_seed_and_test_clip(data, tmp_path):
    maps = {"a": corner(data, 0, 0), "b": corner(data, 4, 0)}
    short = replace(RECIPE, epochs=1)
    table = retrain(Small, data, maps, tmp_path, short, ratios=[0.1, 0.5], seeds=[0, 1])
    assert list(table) == ["clip", "correct", "method", "operation", "ratio", "seed"]
    assert len(table) == 2 * 2 * 2 * 16
    assert set(table["clip"]) == set(data["test"].ids)
    assert set(table["correct"]) <= {0.0, 1.0}


# ----------------------------------------------------------------------------------------- manners


def test_test_clips_choose_nothing(data, tmp_path):
    maps = {"a": corner(data, 0, 0)}
    short = replace(RECIPE, epochs=3)
    retrain(Small, data, maps, tmp_path / "one", short, ratios=[0.1])
    other = {**data, "test": replace(data["test"], targets=1 - data["test"].targets)}
    retrain(Small, other, maps, tmp_path / "two", short, ratios=[0.1])
    one, two = (next((tmp_path / name / "a").iterdir()) for name in ("one", "two"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@pytest.fixture
def epochs(monkeypatch):
    """Counts the epochs that are trained; the one whose number is ``dies`` is interrupted."""
    known, real = SimpleNamespace(count=0, dies=None), training._epoch

    def counted(*given):
        known.count += 1
        if known.count == known.dies:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "_epoch", counted)
    return known


def test_what_is_done_is_not_done_again_and_a_killed_run_ends_with_the_same_bytes(
    data, tmp_path, epochs
):
    maps, short = {"a": corner(data, 0, 0)}, replace(RECIPE, epochs=4)
    words = {"ratios": [0.1, 0.3], "seeds": [0, 1]}

    def run(folder, dies=None):
        epochs.count, epochs.dies = 0, dies
        return retrain(Small, data, maps, tmp_path / folder, short, **words), epochs.count

    expected, first = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", dies=7)
    (resumed, rest), (again, none) = run("killed"), run("whole")
    assert resumed.equals(expected)
    assert again.equals(expected)
    assert (first, rest, none) == (16, 10, 0)
    names = sorted(path.name for path in (tmp_path / "whole" / "a").iterdir())
    assert len(names) == 4
    for name in names:
        files = [tmp_path / run / "a" / name / "model.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_other_maps_are_another_training(data, tmp_path):
    short = replace(RECIPE, epochs=1)
    for place in (0, 4):
        retrain(Small, data, {"a": corner(data, place, 0)}, tmp_path, short, ratios=[0.1])
    assert len(os.listdir(tmp_path / "a")) == 2


def test_global_random_state_is_untouched(data, tmp_path):
    before = torch.random.get_rng_state()
    short = replace(RECIPE, epochs=1)
    retrain(Small, data, {"a": corner(data, 0, 0)}, tmp_path, short, ratios=[0.1])
    assert before.equal(torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"operation": "insert"}, "operation"),
        ({"ratios": [0]}, "ratio"),
        ({"ratios": [1.0]}, "ratio"),
        ({"removal": "grey"}, "removal"),
        ({"data": "train"}, "data"),
        ({"maps": {"a": {}}}, r"maps\['a'\]\['train'\]"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(data, tmp_path, change, argument):
    given = {"data": data, "maps": {"a": corner(data, 0, 0)}, **change}
    if given["data"] == "train":
        given["data"] = {"train": data["train"]}
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        retrain(Small, given.pop("data"), given.pop("maps"), tmp_path, RECIPE, **given)
    assert not any(tmp_path.iterdir())
