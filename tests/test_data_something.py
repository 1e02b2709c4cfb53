"""Something-Something-V2: lists and videos, on small fakes and on the real lists."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from stepkit.clips import unnormalise
from stepkit.data import batch, load_dataset
from stepkit.data.something import SomethingV2, read_classes, read_list

CLASSES = ["Opening something", "Putting something into something", "Folding something"]
MARKED = ["Opening [something]", "Putting [something] into [something]", "Folding [something]"]


def entry(id_, target, **more):
    return {"id": id_, "label": "opening a jar", "template": MARKED[target], **more}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_video(path, levels, codec="libvpx"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 86, "yuv420p"
        for level in levels:
            image = np.full((48, 86, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder, levels):
    folder.mkdir(parents=True)
    for at, level in enumerate(levels, 1):
        Image.new("RGB", (86, 48), (level,) * 3).save(folder / f"{at:06d}.png")


@pytest.fixture
def something(tmp_path):
    """A webm, a folder of frames and an mp4 for testing; two webm for training."""
    root = tmp_path / "something-v2"
    write(root / "annotations/top25_labels_index.json", {n: i for i, n in enumerate(CLASSES)})
    write(root / "annotations/val_1000.json", [entry("78", 1), entry("9", 0), entry("100", 2)])
    write(root / "annotations/train_10000.json", [entry("5", 2), entry("6", 0)])
    write_video(root / "videos/78.webm", range(0, 240, 20))
    write_frames(root / "frames/9", range(100, 140, 10))
    write_video(root / "100.mp4", [50] * 20, codec="mpeg4")
    write_video(root / "20bn-something-something-v2/5.webm", [0] * 3)
    write_video(root / "20bn-something-something-v2/6.webm", [0] * 3)
    return root


def levels(sample):
    return unnormalise(sample.clip).mul(255).mean((0, 2, 3)).tolist()


def test_samples(something):
    dataset = SomethingV2(something, frames=6, size=(32, 40))
    assert (dataset.name, dataset.split, dataset.classes) == ("something-v2", "test", CLASSES)
    assert (dataset.ids, dataset.targets) == (["78", "9", "100"], [1, 0, 2])
    assert (dataset.frames, dataset.size, dataset.seed, dataset.epoch) == (6, (32, 40), 0, 0)
    sample = dataset[0]
    assert sample.clip.shape == (3, 6, 32, 40)
    assert (sample.target, sample.id, sample.boxes, sample.mask) == (1, "78", [], None)
    # every second of 12 frames, counted back from the last
    assert levels(sample) == pytest.approx([20, 60, 100, 140, 180, 220], abs=4)
    # 4 frames repeat
    assert levels(dataset[1]) == pytest.approx([100, 100, 110, 120, 120, 130], abs=1)
    assert batch(dataset).targets.tolist() == [1, 0, 2]


def test_train_mode_draws_from_seed_epoch_and_id(something):
    def draws(seed, epoch):
        dataset = SomethingV2(something, frames=3, seed=seed)
        dataset.mode, dataset.epoch = "train", epoch
        return dataset.sampled(0)

    runs = [draws(*run) for run in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert runs[0] == runs[3]
    assert len(set(map(tuple, runs))) == 3
    assert all(low <= drawn < low + 4 for drawn, low in zip(runs[0], (0, 4, 8), strict=True))


def test_where_videos_are_looked_for(something):
    black = [0] * 3
    assert SomethingV2(something).paths[2] == something / "100.mp4"
    write_frames(something / "frames/100", black)
    assert SomethingV2(something).paths[2] == something / "frames/100"
    write_video(something / "20bn-something-something-v2/100.webm", black)
    write_video(something / "videos/100.webm", black)
    assert SomethingV2(something).paths[2] == something / "videos/100.webm"
    (something / "videos/78.webm.json").write_text("{}")
    (something / "videos/1000.webm").write_text("another id")
    assert SomethingV2(something).paths[0] == something / "videos/78.webm"


def test_missing_videos(something):
    (something / "100.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"root: 1 of 3 listed .*: 100;"):
        SomethingV2(something)
    with pytest.warns(UserWarning, match="1 of 3") as caught:
        dataset = SomethingV2(something, missing="skip")
    assert caught[0].filename == __file__
    assert (dataset.ids, dataset.missing) == (["78", "9"], ["100"])
    everything = SomethingV2(something, split="all")
    assert (sorted(everything.ids), everything.missing) == (["5", "6", "78", "9"], [])


def test_splits_by_name_share_no_video(tmp_path):
    root = tmp_path / "something-v2"
    ids = [str(n) for n in range(1, 401)]
    write(root / "top25_labels_index.json", {n: i for i, n in enumerate(CLASSES)})
    write(root / "train_10000.json", [entry(id_, int(id_) % 3) for id_ in ids[:300]])
    write(root / "val_1000.json", [entry(id_, int(id_) % 3) for id_ in ids[300:]])
    for id_ in ids:
        (root / "videos").mkdir(exist_ok=True)
        (root / f"videos/{id_}.webm").touch()
    options = {"frames": 4, "size": 8, "data": str(tmp_path)}
    train, val, test = (
        load_dataset("something-v2", s, **options) for s in ("train", "val", "test")
    )
    assert (train.mode, val.mode, test.mode) == ("train", "test", "test")
    assert sorted(train.ids + val.ids, key=int) == ids[:300]
    assert sorted(test.ids, key=int) == ids[300:]
    assert 15 <= len(val) <= 45  # a tenth of 300
    assert load_dataset("something-v2", "val", **options | {"data": str(root)}).ids == val.ids
    # the same for ever: a change here changes everybody's split
    assert val.ids[:3] == ["1", "7", "10"]
    parts = load_dataset("something-v2", "test", **options, parts=True)
    assert (len(parts), parts.ids[0]) == (400, "1@0.75-1")


def test_lists_may_lie_beside_the_videos(something):
    write(something / "annotations/val_1000.json", [entry("9", 1)])
    assert SomethingV2(something).targets == [1]
    index = (something / "annotations/top25_labels_index.json").rename(something / "index")
    with pytest.raises(FileNotFoundError, match=r"root: .*labels_index\.json"):
        SomethingV2(something)
    index.rename(something / "top25_labels_index.json")
    assert SomethingV2(something).ids == ["9"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "dev"}, "split: got 'dev', expected one of 'train', 'val', 'test', 'all'"),
        ({"missing": "ignore"}, "missing: got 'ignore'"),
        ({"split": "val"}, "split: got no clip"),
    ],
)
def test_wrong_arguments(something, wrong, message):
    with pytest.raises(ValueError, match=message):
        SomethingV2(something, **wrong)


def test_other_keys_and_unmarked_templates(tmp_path):
    path = write(tmp_path / "list.json", [{"id": "3", "template": "Folding something", "x": None}])
    assert read_list(path, CLASSES) == {"3": 2}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"id": "../9"}, r"id '\.\./9'"),
        ({"id": "/etc/passwd"}, r"id '/etc/passwd'"),
        ({"id": ".."}, r"id '\.\.'"),
        ({"id": "9\n"}, r"id '9\\n'"),
        ({"id": "٩"}, r"id"),  # a digit, but not one of a path
        ({"id": ""}, r"id ''"),
        ({"id": 9}, r"no text as id"),
        ({"id": "78"}, r"id '78' .*again"),
        ({"template": "Juggling [something]"}, r"template 'Juggling \[something\]'"),
        ({"template": ["Opening something"]}, r"no text as template"),
        ({"template": None}, r"no text as template"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path, wrong, named):
    path = write(tmp_path / "list.json", [entry("78", 1), entry("9", 0) | wrong])
    with pytest.raises(ValueError, match=rf"^split_list: got {named}") as error:
        read_list(path, CLASSES)
    assert f"in entry 1 of '{path}'" in str(error.value)


@pytest.mark.parametrize("key", ["id", "template"])
def test_a_missing_key_is_named(tmp_path, key):
    lacking = {name: value for name, value in entry("9", 0).items() if name != key}
    path = write(tmp_path / "list.json", [lacking])
    with pytest.raises(ValueError, match=rf"no text as {key} in entry 0 of .*list\.json"):
        read_list(path, CLASSES)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"[1]", b"7", b"\xff\xfe", b"[" * 50_000, b"[NaN]"]
)
def test_what_is_no_list_is_named(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^split_list: got .*list\.json'"):
        read_list(path, CLASSES)
    with pytest.raises(ValueError, match=r"^class_list: got .*list\.json'"):
        read_classes(path)


@pytest.mark.parametrize("index", [{"a": 1}, {"a": 0, "b": 2}, {"a": 0, "b": 0}, {"a": "0"}, []])
def test_a_class_index_with_gaps_is_refused(tmp_path, index):
    with pytest.raises(ValueError, match=r"^class_list: got .*index\.json'"):
        read_classes(write(tmp_path / "index.json", index))


# --- the real lists ------------------------------------------------------------------------------


@pytest.mark.real_data
def test_published_counts(real_data):
    folder = real_data / "something-v2/annotations"
    classes = read_classes(folder / "top25_labels_index.json")
    lists = [read_list(folder / f"{name}.json", classes) for name in ("train_10000", "val_1000")]
    assert (len(classes), classes[0]) == (25, "Tearing something into two pieces")
    assert [np.bincount(list(each.values())).tolist() for each in lists] == [[400] * 25, [40] * 25]
    assert not lists[0].keys() & lists[1].keys()


@pytest.mark.real_data
def test_a_video_of_the_real_list(real_data, tmp_path):
    """There is no footage at hand: a video of our own under a published id."""
    (tmp_path / "annotations").symlink_to(real_data / "something-v2/annotations")
    write_video(tmp_path / "videos/139242.webm", range(0, 240, 20))
    with pytest.warns(UserWarning, match="999 of 1000"):
        dataset = SomethingV2(tmp_path, missing="skip", frames=4, size=24)
    assert (len(dataset), len(dataset.missing)) == (1, 999)
    sample = dataset[0]
    pushed = "Pushing something so that it falls off the table"
    assert (sample.id, dataset.classes[sample.target]) == ("139242", pushed)
    assert levels(sample) == pytest.approx([40, 100, 160, 220], abs=4)
