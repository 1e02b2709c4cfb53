"""Folders of one's own clips: every class in every split, what is left out is named."""

from collections import Counter

import pytest
from test_data_real import write_class

from stepkit.data import load_dataset
from stepkit.data.files import SHARES, Folder


def counts(root, **options):
    return {split: Counter(Folder(root, split=split, **options).targets) for split in SHARES}


@pytest.mark.parametrize("n", [3, 4, 8])
def test_small_classes_are_in_every_split(tmp_path, n):
    for name in ("boxing", "diving", "skiing"):
        write_class(tmp_path / name, [f"{name}{i}" for i in range(n)], n=1)
    found = counts(tmp_path)
    for each in found.values():
        assert sorted(each) == [0, 1, 2]
    assert sum(sum(each.values()) for each in found.values()) == 3 * n
    assert found == counts(tmp_path)


def test_added_clips_move_none_of_a_class_whose_splits_were_filled(tmp_path):
    write_class(tmp_path / "ant", [f"clip{i}" for i in range(30)], n=1)
    before = {split: set(Folder(tmp_path, split=split).ids) for split in SHARES}
    write_class(tmp_path / "ant", [f"more{i}" for i in range(30)], n=1)
    for split, ids in before.items():
        assert ids <= set(Folder(tmp_path, split=split).ids)


def test_groups_fill_every_split_and_stay_whole_across_classes(tmp_path):
    for name in ("ant", "bee"):
        write_class(tmp_path / name, [f"g{i}_{name}" for i in range(4)], n=1)
    scenes = [
        {path.name[:2] for path in Folder(tmp_path, split=split, group=_scene).paths}
        for split in SHARES
    ]
    assert all(scenes)
    assert sum(map(len, scenes)) == len(set().union(*scenes)) == 4


def _scene(path):
    return path.name[:2]


def test_what_cameras_write_is_a_clip_and_the_rest_is_named_in_one_warning(tmp_path):
    folder = tmp_path / "ant"
    folder.mkdir()
    suffixes = "mts m2ts TS 3gp ogv vob mxf f4v asf divx webp avif apng MP4"
    for i, suffix in enumerate(suffixes.split()):
        (folder / f"clip{i}.{suffix}").touch()
    for name in ("list.csv", "cover.jpg", "notes.txt", ".hidden"):
        (folder / name).touch()
    with pytest.warns(UserWarning, match="3 files") as caught:
        assert len(Folder(tmp_path)) == 14
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).endswith("ant/cover.jpg, ant/list.csv, ant/notes.txt")


@pytest.mark.parametrize("parts", [False, True])
def test_all_clips_of_a_folder_by_name(tmp_path, parts):
    write_class(tmp_path / "ant", [f"clip{i}" for i in range(9)], n=1)
    options = {"frames": 2, "size": 8, "data": str(tmp_path), "parts": parts}
    assert len(load_dataset("folder", "all", **options)) == 9
    with pytest.raises(ValueError, match=r"split: got 'whole', expected one of .*'all'"):
        load_dataset("folder", "whole", **options)
    with pytest.raises(ValueError, match="split: got 'all'"):
        load_dataset("motion", "all", frames=8, size=64, n=2)
