"""EPIC-Object: lists, boxes and the split by recording, on small fakes and on the real files."""

import csv
import os
import pickle

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stepkit.clips import read_clip, sample_frames, unnormalise
from stepkit.data import batch, load_dataset
from stepkit.data.epic import (
    ANNOTATED_AT,
    FRAME,
    EpicObject,
    EpicObjectClean,
    boxes_at,
    read_classes,
    read_list,
)

COLUMNS = ["seg_id", "video_id", "noun", "noun_label", "verb"]
COLUMNS += ["start_frame", "stop_frame", "bounding_boxes"]
NOUNS = ["tap", "plate", "knife"]
SEEN = {811: (200, 300, 500, 700), 781: (600, 100, 300, 400), 841: (0, 1500, 800, 420)}
ODD = (98, 130)  # H, W of the fake frames: neither 1080×1920 nor its aspect ratio


def row(seg_id, video, noun, start, stop, boxes):
    return [seg_id, video, noun, NOUNS.index(noun), "take", start, stop, boxes]


def write_list(path, rows, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def painted(number, boxes=SEEN, size=ODD):
    """A dark frame, white inside the box of the annotated frame nearest to it."""
    top, left, height, width = boxes[min(boxes, key=lambda known: (abs(known - number), known))]
    corners = np.array([[top, left], [top + height, left + width]]) * size / ANNOTATED_AT
    (y0, x0), (y1, x1) = corners.round().astype(int)
    image = np.full((*size, 3), 20, np.uint8)
    image[y0:y1, x0:x1] = 235
    return image


def write_images(folder, numbers, name):
    folder.mkdir(parents=True, exist_ok=True)
    for at, number in enumerate(numbers, 1):
        named = folder / name.format(number if name == FRAME else at)
        Image.fromarray(painted(number)).save(named, quality=95)


def write_video(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=60)
        stream.height, stream.width = ODD
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number in numbers:
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def bright(clip):
    """Bounds ``x0, y0, x1, y1`` of what is bright, per frame."""
    found = []
    for frame in unnormalise(clip).mean(0) > 0.5:
        rows, columns = frame.any(1).nonzero()[:, 0], frame.any(0).nonzero()[:, 0]
        found.append(torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]))
    return found


@pytest.fixture
def epic(tmp_path):
    """One clip in each of the three forms for testing; two of the recordings for training too."""
    root = tmp_path / "epic-object"
    lists = root / "annotations"
    write_list(lists / "Valid_seg_top20_noun_labels.csv", [[n, i] for i, n in enumerate(NOUNS)],
               ["noun", "noun_label"])  # fmt: skip
    several = {frame: [box] for frame, box in SEEN.items()}
    test = [
        row(3, "P01_01", "plate", 776, 850, SEEN),
        row(21, "P02_04", "tap", 776, 850, several),
        row(7, "P03_02", "knife", 776, 850, SEEN),
    ]
    train = [row(8, "P03_02", "tap", 9, 40, {31: []}), row(4, "P01_01", "knife", 1, 8, several)]
    write_list(lists / "Valid_seg_top20_500_val.csv", test)
    write_list(lists / "Valid_seg_top20_train.csv", [*train, row(5, "P04_01", "tap", 1, 9, {})])
    write_images(root / "frames/P01/P01_01", range(770, 860), FRAME)
    write_images(root / "frames/tap-turn-on-P02_04_21", np.linspace(776, 850, 16), "{:09d}.png")
    write_video(root / "videos/P03_02_7.mp4", range(776, 851))
    return root


# --- clips and boxes -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [112, (60, 96), (200, 150)])
def test_boxes_lie_on_what_they_mark(epic, size):
    """From a recording, from 16 frames of a clip, and from a clip's video file."""
    dataset = EpicObject(epic, size=size)
    assert [path.name for path in dataset.paths] == [
        "P01_01",
        "tap-turn-on-P02_04_21",
        "P03_02_7.mp4",
    ]
    for i in range(3):
        sample = dataset[i]
        assert len(sample.boxes) == 16
        for boxes, bounds in zip(sample.boxes, bright(sample.clip), strict=True):
            assert (boxes.dtype, boxes.shape) == (torch.float32, (1, 4))
            assert (boxes[0] - bounds).abs().max() <= 2.5  # compression and resizing blur the edge


def test_sample(epic):
    dataset = EpicObject(epic, frames=6, size=32)
    assert (dataset.name, dataset.split, dataset.classes) == ("epic-object", "test", NOUNS)
    assert dataset.ids == ["P01_01_3", "P02_04_21", "P03_02_7"]
    assert (dataset.frames, dataset.size, dataset.seed, dataset.epoch) == (6, 32, 0, 0)
    sample = dataset[2]
    assert sample.clip.shape == (3, 6, 32, 32)
    assert sample.clip.is_contiguous()
    assert (sample.target, sample.id, sample.mask) == (2, "P03_02_7", None)
    assert batch(dataset).targets.tolist() == [1, 0, 2]


def test_a_recording_s_clip_is_its_frames_from_start_to_stop(epic):
    dataset = EpicObject(epic, frames=5)
    assert dataset.numbers(0) == list(range(776, 851))  # the images go from 770 to 859
    assert dataset.sampled(0) == [14, 29, 44, 59, 74]  # every 15th, counted back from the last
    for number in range(776, 851, 2):
        (dataset.paths[0] / FRAME.format(number)).unlink()
    thinned = EpicObject(epic, frames=5)
    assert thinned.numbers(0) == list(range(777, 850, 2))
    for boxes, bounds in zip(thinned[0].boxes, bright(thinned[0].clip), strict=True):
        assert (boxes[0] - bounds).abs().max() <= 2.5


def test_a_recording_reads_as_a_folder_of_the_same_images_does(epic):
    one = epic / "frames/P01/P01_01"
    for number in [*range(770, 776), *range(851, 860)]:
        (one / FRAME.format(number)).unlink()
    assert torch.equal(EpicObject(epic, size=(40, 48))[0].clip, read_clip(one, size=(40, 48)))


def test_frames_of_a_clip_are_spread_from_start_to_stop(epic):
    dataset = EpicObject(epic)
    assert dataset.numbers(2) == list(range(776, 851))
    spread = dataset.numbers(1)
    assert (len(spread), spread[0], spread[-1]) == (16, 776, 850)
    assert {5} <= set(np.diff(spread)) <= {4, 5}


def test_train_mode_draws_again_each_epoch_and_boxes_follow(epic):
    dataset = EpicObject(epic, frames=4)
    dataset.mode, draws = "train", []
    for dataset.epoch in range(3):
        sample = dataset[0]
        draws.append(dataset.sampled(0))
        for boxes, bounds in zip(sample.boxes, bright(sample.clip), strict=True):
            assert (boxes[0] - bounds).abs().max() <= 2.5
    assert len(set(map(tuple, draws))) == 3


# --- boxes at frames -----------------------------------------------------------------------------


def test_boxes_in_pixels_of_the_clip():
    """Half of 1920 is 48 of 96 pixels, half of 1080 is 30 of 60: by hand, no aspect ratio kept."""
    found = boxes_at({31: [(960, 540, 480, 270)]}, [31], (60, 96))
    assert found[0].tolist() == [[48, 30, 72, 45]]
    assert boxes_at({31: [(960, 540, 480, 270)]}, [31], (1080, 1920))[0].tolist() == [
        [960, 540, 1440, 810]
    ]


def test_the_nearest_annotated_frame_within_reach():
    boxes = {31: [(0, 0, 192, 108)], 61: [(0, 0, 384, 108)], 121: [(0, 0, 576, 108)] * 3}

    def widths(frames, **options):
        found = boxes_at(boxes, frames, (108, 192), **options)
        return [[round(w / 19.2, 3) for w in (each[:, 2] - each[:, 0]).tolist()] for each in found]

    assert widths([15, 16, 31, 46, 47, 76]) == [[], [1], [1], [1], [2], [2]]  # 46: a tie
    assert widths([77, 105, 106, 121, 136, 137]) == [[], [], [3] * 3, [3] * 3, [3] * 3, []]
    assert widths([30, 31, 32], reach=0) == [[], [1], []]
    assert widths([30, 40], reach=1) == [[1], []]
    assert [each.shape for each in boxes_at({}, [1, 2], 112)] == [(0, 4)] * 2


def test_boxes_are_cut_to_the_frame():
    rows = [(1800, 1000, 300, 200), (1920, 0, 50, 50), (10, 10, 0, 40)]
    assert boxes_at({1: rows}, [1], (1080, 1920))[0].tolist() == [[1800, 1000, 1920, 1080]]


# --- lists ---------------------------------------------------------------------------------------


def test_both_forms_of_boxes_read_alike(tmp_path):
    """top, left, height, width in the file; x, y, width, height in a segment."""
    single = "{31: (1, 2, 3, 4), 61: (5, 6, 7, 8)}"
    several = "{31: [(1, 2, 3, 4)], 61: [(5, 6, 7, 8)]}"
    rows = [row(1, "P01_01", "tap", 20, 70, single), row(2, "P01_01", "tap", 20, 70, several)]
    one, other = read_list(write_list(tmp_path / "list.csv", rows), NOUNS)
    for each in (one, other):
        assert {frame: boxes.tolist() for frame, boxes in each.boxes.items()} == {
            31: [[2, 1, 4, 3]],
            61: [[6, 5, 8, 7]],
        }
    assert one[:5] == ("P01_01_1", "P01_01", 0, 20, 70)


def test_several_boxes_a_frame_and_none(tmp_path):
    text = "{31: [(1, 2, 3, 4), (5.5, 6, 7, 8)], 61: []}"
    path = write_list(tmp_path / "list.csv", [row(1, "P01_01", "tap", 20, 70, text)])
    boxes = read_list(path, NOUNS)[0].boxes
    assert boxes[31].tolist() == [[2, 1, 4, 3], [6, 5.5, 8, 7]]
    assert boxes[61].tolist() == []
    assert [len(found) for found in boxes_at(boxes, [31, 61], 112)] == [2, 0]


GOOD = dict(zip(COLUMNS, row(1, "P01_01", "tap", 20, 70, "{31: (1, 2, 3, 4)}"), strict=True))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"noun": "fridge"}, r"noun 'fridge' .*expected one of tap, plate, knife"),
        ({"noun_label": "2"}, r"noun_label 2 of 'tap' .*expected 0"),
        ({"noun_label": "zero"}, r"noun_label 'zero'"),
        ({"video_id": "../P01_01"}, r"video_id '\.\./P01_01'"),
        ({"video_id": "/etc"}, r"video_id '/etc'"),
        ({"video_id": "P01_01/.."}, r"video_id 'P01_01/\.\.'"),
        ({"video_id": "P01_01\n"}, r"video_id 'P01_01\\n'"),
        ({"video_id": "P٠١_01"}, r"video_id"),  # digits, but not those of a path
        ({"seg_id": "../7"}, r"seg_id '\.\./7'"),
        ({"seg_id": ""}, r"seg_id ''"),
        ({"start_frame": "-3"}, r"start_frame '-3'"),
        ({"start_frame": "71"}, r"start_frame 71, stop_frame 70"),
        ({"start_frame": "0"}, r"start_frame 0"),
        ({"stop_frame": "7" * 5000}, r"stop_frame"),
        ({"bounding_boxes": ""}, r"bounding_boxes ''"),
        ({"bounding_boxes": "[(1, 2, 3, 4)]"}, r"bounding_boxes '\[\(1"),
        ({"bounding_boxes": "{31: (1, 2, 3)}"}, r"bounding_boxes '{31: \(1, 2, 3\)"),
        ({"bounding_boxes": "{31: (1, 2, 3, -4)}"}, r"bounding_boxes '{31"),
        ({"bounding_boxes": "{31: (1, 2, 3, 1e999)}"}, r"bounding_boxes '{31"),
        ({"bounding_boxes": "{31: (1, 2, 3, '4')}"}, r"bounding_boxes .{31"),
        ({"bounding_boxes": "{31: 5}"}, r"bounding_boxes '{31: 5"),
        ({"bounding_boxes": "{'31': (1, 2, 3, 4)}"}, r"bounding_boxes .{'31'"),
        ({"bounding_boxes": "{[]: (1, 2, 3, 4)}"}, r"bounding_boxes"),
        ({"bounding_boxes": "{31: (1, 2, 3, 4)"}, r"bounding_boxes"),
        ({"bounding_boxes": "[" * 50_000}, r"bounding_boxes"),
        ({"bounding_boxes": "__import__('os').system('x')"}, r"bounding_boxes .__import__"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, monkeypatch, wrong, named):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    rows = [list(GOOD.values()), list((GOOD | wrong).values())]
    path = write_list(tmp_path / "list.csv", rows)
    with pytest.raises(ValueError, match=rf"^split_list: got {named}") as error:
        read_list(path, NOUNS)
    lines = path.read_text("utf-8").count("\n")
    assert f"in line {lines} of '{path}'" in str(error.value)
    assert not called


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "verb"])
def test_a_missing_column_is_named(tmp_path, column):
    kept = [name for name in COLUMNS if name != column]
    path = write_list(tmp_path / "list.csv", [[GOOD[name] for name in kept]], kept)
    with pytest.raises(ValueError, match=rf"split_list: .*list\.csv' without column {column},"):
        read_list(path, NOUNS)


class Harm:
    def __reduce__(self):
        return os.system, ("echo",)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n", pickle.dumps(Harm())])
def test_what_is_no_list_is_named(tmp_path, monkeypatch, content):
    """A pickle too: EPIC-Kitchens hands out pickles of its tables, and nothing here opens one."""
    called = []
    monkeypatch.setattr(os, "system", called.append)
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    for read, argument in ((lambda p: read_list(p, NOUNS), "split_list"), (read_classes, "class_")):
        with pytest.raises(ValueError, match=rf"^{argument}.*: got .*list\.csv'"):
            read(path)
    assert not called


def test_a_row_cut_short_is_named(tmp_path):
    path = write_list(tmp_path / "list.csv", [list(GOOD.values()), [1, "P01_01"]])
    with pytest.raises(ValueError, match=r"noun '' in line 3 of .*list\.csv"):
        read_list(path, NOUNS)


@pytest.mark.parametrize("labels", [[0, 2, 3], [1, 2, 3], [0, 0, 1], ["a", 1, 2], [-1, 0, 1]])
def test_a_class_index_with_gaps_is_refused(tmp_path, labels):
    rows = list(zip(NOUNS, labels, strict=True))
    path = write_list(tmp_path / "classes.csv", rows, ["noun", "noun_label"])
    with pytest.raises(ValueError, match=r"^class_list: got .*classes\.csv'"):
        read_classes(path)


# --- splits --------------------------------------------------------------------------------------


def test_the_published_training_list_comes_with_a_word_about_the_leak(epic):
    write_video(epic / "videos/P03_02_8.mp4", range(9, 41))
    said = "2 of the 3 recordings of the test list also occur in the training list"
    with pytest.warns(UserWarning, match="list") as caught:
        dataset = EpicObject(epic, split="train", missing="skip")
    assert [said in str(warning.message) for warning in caught] == [True, False]
    assert caught[0].filename == __file__
    assert dataset.leak == ["P01_01", "P03_02"]
    assert EpicObject(epic).leak == []  # one list alone does not tell


def write_recordings(root, n):
    """``n`` recordings of one frame a clip; most of them have clips in both lists."""
    lists = {"train": [], "500_val": []}
    for i in range(n):
        recording = f"P{i % 30 + 1:02d}_{i // 30 + 1:02d}"
        write_images(root / "frames" / recording[:3] / recording, [781], FRAME)
        for seg_id in (2 * i, 2 * i + 1):
            to = "500_val" if seg_id % 5 == 0 else "train"
            lists[to].append(row(seg_id, recording, NOUNS[i % 3], 781, 781, SEEN))
    for name, rows in lists.items():
        write_list(root / f"Valid_seg_top20_{name}.csv", rows)
    nouns = [[noun, i] for i, noun in enumerate(NOUNS)]
    write_list(root / "Valid_seg_top20_noun_labels.csv", nouns, ["noun", "noun_label"])
    return root


def recordings(dataset):
    return {segment.recording for segment in dataset.listed}


def test_the_clean_split_shares_no_recording(tmp_path):
    root = write_recordings(tmp_path / "epic-object", 100)
    options = {"frames": 2, "size": 8, "data": str(tmp_path)}
    parts = {s: load_dataset("epic-object-clean", s, **options) for s in ("train", "val", "test")}
    assert {part.name for part in parts.values()} == {"epic-object-clean"}
    found = [recordings(part) for part in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 100  # none twice, none lost
    assert sum(map(len, parts.values())) == 200
    assert 8 <= len(found[2]) <= 22  # 15 of 100 expected
    assert 3 <= len(found[1]) <= 16  # a tenth of the rest
    assert len(EpicObjectClean(root, split="all")) == 200
    # the same for ever: a change here changes everybody's split
    assert sorted(found[2])[:3] == ["P02_01", "P02_02", "P06_02"]


def test_the_validation_part_is_recordings_of_the_training_list(tmp_path):
    root = write_recordings(tmp_path, 60)
    options = {"frames": 2, "size": 8, "data": str(root)}
    with pytest.warns(UserWarning, match="also occur"):
        train, val = (load_dataset("epic-object", s, **options) for s in ("train", "val"))
    assert not recordings(train) & recordings(val)
    assert 0 < len(val) < len(train) / 3
    test = load_dataset("epic-object", "test", **options)
    assert sorted(train.ids + val.ids + test.ids) == sorted(EpicObject(root, split="all").ids)
    assert len(train) + len(val) + len(test) == 120


def test_missing_clips(epic):
    (epic / "videos/P03_02_7.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"root: 1 of 3 listed .*: P03_02_7;"):
        EpicObject(epic)
    with pytest.warns(UserWarning, match="1 of 3") as caught:
        dataset = EpicObject(epic, missing="skip")
    assert caught[0].filename == __file__
    assert (dataset.ids, dataset.missing) == (["P01_01_3", "P02_04_21"], ["P03_02_7"])
    for number in range(776, 851):  # the recording is there, the clip is not
        (epic / "frames/P01/P01_01" / FRAME.format(number)).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 listed .*: P01_01_3, P03_02_7;"):
        EpicObject(epic)


def test_all_is_what_is_listed_and_there(epic):
    write_images(epic / "frames_rgb_flow/rgb/train/P04/P04_01", range(1, 10), FRAME)
    dataset = EpicObject(epic, split="all", frames=4)
    assert sorted(dataset.ids) == ["P01_01_3", "P02_04_21", "P03_02_7", "P04_01_5"]
    assert dataset.missing == []
    assert [boxes.shape for boxes in dataset[dataset.ids.index("P04_01_5")].boxes] == [(0, 4)] * 4


def test_parts_share_no_frame(epic):
    parts = [
        load_dataset("epic-object", s, frames=9, size=16, data=str(epic.parent), parts=True)
        for s in ("train", "val", "test")
    ]
    for i in range(3):
        shown = [{part.numbers(i)[j] for j in part.sampled(i)} for part in parts]
        assert max(shown[0]) < min(shown[1]) <= max(shown[1]) < min(shown[2])


def test_a_clip_of_its_own_counts_before_its_recording(epic):
    assert EpicObject(epic).paths[0] == epic / "frames/P01/P01_01"
    write_images(epic / "frames/plate-put-down-P01_01_3", [776, 850], "{}.png")
    assert EpicObject(epic).paths[0] == epic / "frames/plate-put-down-P01_01_3"
    write_video(epic / "P01_01_3.avi", range(776, 851))
    assert EpicObject(epic).paths[0] == epic / "P01_01_3.avi"
    (epic / "videos/xP01_01_3.mp4").write_text("another name")
    (epic / "frames/P01_01_31").mkdir()
    assert EpicObject(epic).paths[0] == epic / "P01_01_3.avi"


def test_lists_may_lie_beside_the_clips(epic):
    write_list(epic / "annotations/Valid_seg_top20_500_val.csv",
               [row(7, "P03_02", "tap", 776, 850, SEEN)])  # fmt: skip
    assert EpicObject(epic).targets == [0]
    name = "Valid_seg_top20_noun_labels.csv"
    (epic / "annotations" / name).rename(epic / "elsewhere.csv")
    with pytest.raises(FileNotFoundError, match=r"root: .*noun_labels\.csv"):
        EpicObject(epic)
    (epic / "elsewhere.csv").rename(epic / name)
    assert EpicObject(epic).ids == ["P03_02_7"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "dev"}, "split: got 'dev', expected one of 'train', 'val', 'test', 'all'"),
        ({"missing": "ignore"}, "missing: got 'ignore'"),
    ],
)
def test_wrong_arguments(epic, wrong, message):
    with pytest.raises(ValueError, match=message):
        EpicObject(epic, **wrong)


# --- the real files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_epic(real_data):
    return real_data / "epic-object"


@pytest.fixture(scope="module")
def real_lists(real_epic):
    classes = read_classes(real_epic / "annotations/Valid_seg_top20_noun_labels.csv")
    names = ("500_val", "train_head2000")
    paths = [real_epic / f"annotations/Valid_seg_top20_{name}.csv" for name in names]
    return classes, *(read_list(path, classes) for path in paths)


@pytest.mark.real_data
def test_published_counts(real_lists):
    classes, test, train = real_lists
    assert (len(classes), classes[0], classes[19]) == (20, "tap", "pot")
    assert (len(test), len(train)) == (500, 1999)
    assert np.bincount([segment.target for segment in test]).tolist() == [25] * 20
    assert len({s.id for s in test} | {s.id for s in train}) == 2499
    assert len({segment.recording for segment in test}) == 150
    # of the training list only the first 1,999 rows are at hand: 43 recordings, 23 of them tested
    # on; with the whole list it is 149 of the 150
    tested = {segment.recording for segment in test}
    assert len(tested & {segment.recording for segment in train}) == 23
    assert sum(segment.recording not in tested for segment in train) == 158


@pytest.mark.real_data
def test_published_boxes(real_lists):
    total = outside = turned = 0
    for segment in [*real_lists[1], *real_lists[2]]:
        assert segment.boxes, segment.id
        for frame, boxes in segment.boxes.items():
            assert frame % 30 == 1, segment.id
            assert segment.start <= frame <= segment.stop, segment.id
            for x, y, width, height in boxes:
                assert width > 0
                assert height > 0
                total += 1
                outside += x + width > 1920 or y + height > 1080
                turned += y + height > 1920 or x + width > 1080
        for boxes in boxes_at(segment.boxes, segment.boxes, (54, 96), reach=0):
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor([96, 54])).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (total, outside) == (13_296, 6)
    assert turned > total / 2  # were the sides in another order


@pytest.mark.real_data
def test_the_share_of_frames_with_a_box_is_as_documented(real_lists):
    shares = {}
    for reach in (15, 5, 0):
        found = []
        for segment in real_lists[1]:
            shown = sample_frames(segment.stop - segment.start + 1, 16)
            numbers = [segment.start + position for position in shown]
            found += [len(b) > 0 for b in boxes_at(segment.boxes, numbers, 112, reach)]
        shares[reach] = round(float(np.mean(found)), 2)
    assert shares == {15: 0.95, 5: 0.35, 0: 0.03}


@pytest.mark.real_data
def test_the_clean_split_of_the_published_lists(real_epic, real_lists, tmp_path):
    """Without the footage: an empty image stands for each clip's first frame."""
    (tmp_path / "annotations").symlink_to(real_epic / "annotations")
    for segment in [*real_lists[1], *real_lists[2]]:
        folder = tmp_path / "frames" / segment.recording[:3] / segment.recording
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FRAME.format(segment.start)).touch()
    clean = {split: EpicObjectClean(tmp_path, split) for split in ("train", "val", "test")}
    assert sum(map(len, clean.values())) == 2499
    assert not recordings(clean["train"]) & recordings(clean["test"])
    assert len(clean["train"].leak) == 23
    assert min(np.bincount(clean["test"].targets, minlength=20)) > 0


@pytest.mark.real_data
def test_real_boxes_lie_on_the_food(real_epic, tmp_path):
    """Of 16 frames of a clip only start and stop are known: spread evenly, the boxes fit."""
    rows = list(csv.DictReader((real_epic / "annotations/clips.csv").open()))
    assert [one["noun"] for one in rows] == ["food", "cloth", "saucepan"]
    classes = [["food", 0], ["cloth", 1], ["saucepan", 2]]
    write_list(tmp_path / "Valid_seg_top20_noun_labels.csv", classes, ["noun", "noun_label"])
    for label, one in enumerate(rows):
        one["noun_label"] = label
    write_list(tmp_path / "Valid_seg_top20_val.csv", [list(one.values()) for one in rows])
    (tmp_path / "frames").symlink_to(real_epic / "frames")
    dataset = EpicObject(tmp_path, size=(128, 172))
    assert [len(dataset.numbers(i)) for i in range(3)] == [16] * 3
    sample = dataset[0]
    assert [len(boxes) for boxes in sample.boxes] == [1] * 15 + [0]  # it leaves the view
    red, green, blue = unnormalise(sample.clip)
    yellow = (red + green) / 2 - blue
    turned = {f: [(y, x, w, h) for x, y, w, h in b] for f, b in dataset.listed[0].boxes.items()}
    wrong = boxes_at(turned, dataset.numbers(0), dataset.size)
    for t in range(15):
        assert contrast(yellow[t], sample.boxes[t][0]) > 0.04
        if len(wrong[t]):
            assert contrast(yellow[t], sample.boxes[t][0]) > contrast(yellow[t], wrong[t][0])


def contrast(image, box):
    """Mean inside the box minus mean outside it."""
    x0, y0, x1, y1 = box.round().int().tolist()
    inside = torch.zeros_like(image, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    return float(image[inside].mean() - image[~inside].mean())
