"""Datasets by name: what is known of them, a function of one's own, a list of samples."""

from pathlib import Path

import pytest
import torch

import stepkit as sk
from stepkit.data import DATASETS, Sample, Synthetic, batch, load_dataset
from stepkit.data.sample import as_dataset

SIZES = {"frames": 2, "size": 24}
GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


@pytest.fixture
def own():
    """A name of one's own, forgotten afterwards."""
    yield "mine"
    DATASETS.pop("mine", None)


def dark(n, label=0):
    clip = torch.zeros(3, 2, 24, 24)
    return [Sample(clip, (label + i) % 3, f"dark{i}", []) for i in range(n)]


def test_the_guide_lists_every_dataset_with_what_is_known_of_it():
    text = GUIDE.read_text("utf-8")
    for name, known in DATASETS.items():
        if not known.about:  # the guide's own example, where its tests ran before
            continue
        assert f"| `{name}` | {known.label} | {known.about} | {known.evidence or '—'} |" in text
    assert text.count("| `") >= len(DATASETS)


@pytest.mark.parametrize("name", [name for name, known in DATASETS.items() if known.generated])
def test_a_generated_dataset_is_what_is_known_of_it(name):
    found = load_dataset(name, "val", n=6, **SIZES)
    assert (len(found), found.name, found.split) == (6, name, "val")
    assert (batch(found).masks is not None) == (DATASETS[name].evidence == "masks")


def test_a_function_of_ones_own_is_given_what_it_names(own):
    @sk.dataset(own, label="Dark clips", generated=True)
    def clips(split, *, n, seed):
        assert (split, seed) == ("val", 3)
        return dark(n)

    found = sk.load_dataset(own, "val", n=4, seed=3, **SIZES)
    assert (found.name, found.classes, found.targets) == ("mine", ["0", "1", "2"], [0, 1, 2, 0])
    assert found.ids == ["dark0", "dark1", "dark2", "dark3"]
    assert batch(found).clips.shape == (4, 3, 2, 24, 24)
    assert sk.load_dataset(clips, "val", n=2, seed=3, **SIZES).name == "mine"


def test_a_root_without_default_needs_data(own, tmp_path):
    @sk.dataset(own, folder="below")
    def clips(root, split, parts, missing="error"):
        assert (split, parts, missing) == ("test", True, "skip")
        return dark(1 + (root.name == "below"))

    with pytest.raises(ValueError, match="data: got '', expected the folder that holds mine"):
        load_dataset(own, "test", **SIZES)
    options = {"data": str(tmp_path), "parts": True, "missing": "skip", **SIZES}
    assert len(load_dataset(own, "test", **options)) == 1
    (tmp_path / "below").mkdir()
    assert len(load_dataset(own, "test", **options)) == 2


def test_a_module_of_ones_own_is_imported(own, tmp_path, monkeypatch):
    (tmp_path / "my_clips.py").write_text(
        "import torch\nimport stepkit as sk\n\n"
        "@sk.dataset('mine')\ndef mine(frames, size):\n"
        "    clip = torch.zeros(3, frames, size, size)\n"
        "    return [sk.data.Sample(clip, 0, 'one', [])]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="dataset: got 'mine'"):
        load_dataset(own, "test", **SIZES)
    assert load_dataset(own, "test", extra="my_clips", **SIZES).ids == ["one"]
    with pytest.raises(ValueError, match="extra: got 'no_clips'"):
        load_dataset(own, "test", extra="no_clips", **SIZES)


def test_a_list_of_samples_is_a_dataset_and_a_dataset_is_itself():
    found = as_dataset(dark(3))
    assert (found.name, len(found), found[2].id) == ("samples", 3, "dark2")
    assert as_dataset(found) is found
    known = Synthetic("motion", n=2, frames=2, size=24)
    assert load_dataset(known, "test", **SIZES) is known
    for wrong in ([], [1], 7):
        with pytest.raises((ValueError, TypeError)):
            as_dataset(wrong)


def test_a_name_is_taken_once(own):
    with pytest.raises(ValueError, match="dataset: got 'motion', which is another's"):
        sk.dataset("motion")(dark)
    with pytest.raises(ValueError, match="fact of a dataset: got 'colour'"):
        sk.dataset(own, colour="dark")
