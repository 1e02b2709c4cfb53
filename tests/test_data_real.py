"""Datasets of files on disk: UCF101-24 and plain folders, on small fakes and on the real files."""

import os
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stepkit.clips import frame_count, unnormalise
from stepkit.data import load_dataset
from stepkit.data.files import SHARES, Folder
from stepkit.data.sample import batch, collate
from stepkit.data.ucf101 import UCF101, boxes_at, frame_numbers, read_annotations, read_split

ODD = (98, 130)  # H, W of the fake videos: neither 320x240 nor its aspect ratio
CUT = {"sf": 4, "ef": 10, "boxes": [[250, 60, 60, 90]] * 6}  # x + width leaves uint8
DIVE = {"sf": 0, "ef": 12, "boxes": [[20 + 10 * t, 30, 80, 120] for t in range(12)]}


def painted(actors, frame, height, width):
    """A dark frame, white inside the boxes that the actors have in it."""
    image = np.full((height, width, 3), 20, np.uint8)
    scale = np.array([width / 320, height / 240])
    for actor in actors:
        if actor["sf"] <= frame < actor["ef"]:
            x, y, w, h = actor["boxes"][frame - actor["sf"]]
            (x0, y0), (x1, y1) = np.round([[x, y], [x + w, y + h]] * scale).astype(int)
            image[y0:y1, x0:x1] = 235
    return image


def write_video(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder, images, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(images[number - 1]).save(folder / f"{folder.name}.{number:04d}.png")


def write_annotations(path, videos):
    """Pickle as the published file does: numpy 1 names, the smallest unsigned types, numpy keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (label, numf, actors) in videos.items():
        stored = [
            {
                "label": label,
                "ef": actor["ef"],
                "sf": actor["sf"],
                "boxes": np.asfortranarray(np.array(actor["boxes"], np.min_scalar_type(310))),
            }
            for actor in actors
        ]
        found[np.str_(name)] = {"annotations": stored, "numf": np.uint8(numf), "label": label}
    path.write_bytes(pickle.dumps(found, protocol=3).replace(b"numpy._core.", b"numpy.core."))


@pytest.fixture
def ucf(tmp_path):
    """Two videos, one folder of frames, and a listed video that nobody annotated."""
    root = tmp_path / "ucf"
    videos = {
        "Biking/v_Biking_g01_c01": (1, 12, [CUT, DIVE]),
        "Archery/v_Archery_g01_c01": (0, 12, [DIVE]),
        "Archery/v_Archery_g09_c01": (0, 12, []),
    }
    write_annotations(root / "annotations/pyannot.pkl", videos)
    for name, (_, numf, actors) in videos.items():
        images = [painted(actors, frame, *ODD) for frame in range(numf)]
        if name.startswith("Biking"):
            write_video(root / f"videos/{name}.avi", images)
        else:
            # from frame 3 on, frame 6 lost
            write_frames(root / f"frames/{name}", images, [3, 4, 5, 7, 8, 9, 10, 11, 12])
    write_video(root / "videos/Biking/v_Biking_g02_c01.mp4", images)
    lists = {
        "testlist01.txt": "Archery/v_Archery_g01_c01\nBiking/v_Biking_g01_c01\n",
        "thumos13_ucf24_trainlist01.txt": "Archery/v_Archery_g09_c01.avi 1\n\n"
        "Biking/v_Biking_g02_c01.avi 2\n",
    }
    for name, text in lists.items():
        (root / "annotations" / name).write_text(text)
    return root


# --- the annotation file -------------------------------------------------------------------------


def test_annotations_in_the_published_form(ucf):
    found = read_annotations(ucf / "annotations/pyannot.pkl")
    video = found["Biking/v_Biking_g01_c01"]
    assert all(type(name) is str for name in found)
    assert (video["label"], video["numf"]) == (1, 12)
    assert type(video["numf"]) is int
    cut = video["annotations"][0]
    assert (cut["sf"], cut["ef"], cut["boxes"].shape) == (4, 10, (6, 4))
    assert cut["boxes"].dtype == np.float32
    assert cut["boxes"][0].tolist() == [250, 60, 60, 90]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_annotations_saved_again_under_numpy_2(tmp_path, protocol):
    entry = {"label": 0, "numf": 1, "annotations": [{"sf": 0, "ef": 1, "boxes": np.ones((1, 4))}]}
    path = tmp_path / "pyannot.pkl"
    path.write_bytes(pickle.dumps({"A/v_A_g01_c01": entry}, protocol=protocol))
    if protocol == 2:  # stores bytes as text, through a codec that the published file does without
        with pytest.raises(ValueError, match=r"_codecs\.encode"):
            read_annotations(path)
    else:
        assert read_annotations(path)["A/v_A_g01_c01"]["annotations"][0]["boxes"].sum() == 4


def test_more_frames_annotated_than_boxes(tmp_path):
    actor = {"sf": 2, "ef": 9, "boxes": [[0, 0, 10, 10]] * 3}
    write_annotations(tmp_path / "a.pkl", {"A/v_A_g01_c01": (0, 20, [actor])})
    video = read_annotations(tmp_path / "a.pkl")["A/v_A_g01_c01"]
    assert [len(boxes) for boxes in boxes_at(video, [1, 2, 4, 5, 8, 30], 112)] == [0, 1, 1, 0, 0, 0]


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [
        (os.system, "echo", rf"{os.name}\.system"),
        (eval, "1", "eval"),
        (getattr, (os, "system"), "getattr"),
        (np.load, "x.npy", r"numpy\.load"),
        (np.lib.format.open_memmap, "x", "open_memmap"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_is_refused(tmp_path, monkeypatch, function, argument, named, protocol):
    called = []
    path = tmp_path / "pyannot.pkl"
    harmful = {"A/v_A_g01_c01": {"label": 0, "numf": Call(function, argument), "annotations": []}}
    try:
        path.write_bytes(pickle.dumps(harmful, protocol=protocol))
    except TypeError:  # a module as argument: only the name of the function matters
        path.write_bytes(pickle.dumps(Call(function, "x"), protocol=protocol))
    monkeypatch.setattr(os, "system", called.append)
    with pytest.raises(ValueError, match=named) as error:
        read_annotations(path)
    assert str(path) in str(error.value)
    assert not called


def test_arrays_of_objects_are_refused(tmp_path):
    path = tmp_path / "pyannot.pkl"
    path.write_bytes(pickle.dumps({"A/v": np.array([None, {}], object)}, protocol=3))
    with pytest.raises(ValueError, match="'O8'"):
        read_annotations(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({1: 2})])
def test_what_is_no_annotation_is_named(tmp_path, content):
    path = tmp_path / "pyannot.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"annotations: .*pyannot\.pkl"):
        read_annotations(path)


def test_a_cut_annotation_is_named(ucf):
    path = ucf / "annotations/pyannot.pkl"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"annotations: .*pyannot\.pkl"):
        read_annotations(path)


# --- split lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".avi", ".avi 1", " 1", ".avi\r", "  "])
def test_list_styles(tmp_path, ending):
    path = tmp_path / "list.txt"
    names = ["Basketball/v_Basketball_g01_c01", "Biking/v_Biking_g02_c10"]
    path.write_text("\n".join(name + ending for name in names) + "\n\n")
    assert read_split(path) == names


@pytest.mark.parametrize(
    "line",
    [
        "/etc/passwd",
        "/v_Biking_g01_c01.avi",
        "../Biking/v_Biking_g01_c01",
        "Biking/../v_Biking_g01_c01.avi",
        "../v_Biking_g01_c01",
        "Biking/..",
        "Biking/...avi",
        r"C:\Biking\v_Biking_g01_c01.avi",
        r"Biking\..\x",
        "v_Biking_g01_c01.avi",
        "Biking/v_Biking_g01_c01.avi 1 2",
        "Biking/v Biking",
    ],
)
def test_list_entries_refused(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"Biking/v_Biking_g01_c01\n{line}\n")
    with pytest.raises(ValueError, match=r"split_list: got .* in line 2 of .*expected Class/v_"):
        read_split(path)


def test_empty_list(tmp_path):
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="without entries"):
        read_split(tmp_path / "list.txt")


# --- UCF101 --------------------------------------------------------------------------------------


def bright(clip):
    """Bounds ``x0, y0, x1, y1`` of what is bright, per frame; None where nothing is."""
    found = []
    for frame in unnormalise(clip).mean(0) > 0.5:
        rows, columns = frame.any(1).nonzero()[:, 0], frame.any(0).nonzero()[:, 0]
        found.append(
            torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None
        )
    return found


@pytest.mark.parametrize("size", [112, (60, 96), (200, 150)])
def test_boxes_lie_on_what_they_mark(ucf, size):
    dataset = UCF101(ucf, frames=12, size=size)
    for i, actors in enumerate(([DIVE], [CUT, DIVE])):
        sample = dataset[i]
        assert len(sample.boxes) == 12
        for boxes, bounds in zip(sample.boxes, bright(sample.clip), strict=True):
            assert boxes.dtype == torch.float32
            assert 1 <= len(boxes) <= len(actors)
            union = torch.cat([boxes[:, :2].min(0)[0], boxes[:, 2:].max(0)[0]])
            assert (union - bounds).abs().max() <= 2.5  # compression and resizing blur the edge


def test_sample(ucf):
    dataset = UCF101(ucf, frames=6, size=32)
    assert (dataset.name, dataset.split, dataset.classes) == (
        "ucf101-24",
        "test",
        ["Archery", "Biking"],
    )
    assert dataset.ids == ["v_Archery_g01_c01", "v_Biking_g01_c01"]
    sample = dataset[-1]
    assert sample.clip.shape == (3, 6, 32, 32)
    assert sample.clip.dtype == torch.float32
    assert sample.clip.is_contiguous()
    assert (sample.target, sample.id, sample.mask) == (1, "v_Biking_g01_c01", None)
    assert [len(boxes) for boxes in sample.boxes] == [1, 1, 2, 2, 2, 1]  # frames 1, 3, … 11
    assert batch(dataset).clips.shape == (2, 3, 6, 32, 32)


def test_boxes_are_clipped_to_the_frame():
    boxes = [[-20, -20, 40, 40], [300, 200, 90, 90], [330, 10, 20, 20], [5, 5, 0, 9]]
    actors = [{"sf": 0, "ef": 1, "boxes": np.array([box], np.float32)} for box in boxes]
    found = boxes_at({"annotations": actors}, [0], (240, 320))
    assert found[0].tolist() == [[0, 0, 20, 20], [300, 200, 320, 240]]


def test_without_annotation_there_are_no_boxes(ucf):
    for boxes in boxes_at(None, [0, 5], 112):
        assert boxes.shape == (0, 4)
    unannotated = UCF101(ucf, split="train", frames=4)[1]
    assert (unannotated.id, unannotated.target) == ("v_Biking_g02_c01", 1)
    assert [boxes.shape for boxes in unannotated.boxes] == [(0, 4)] * 4


def test_frame_numbers(tmp_path):
    images = [np.zeros((4, 4, 3), np.uint8)] * 12
    write_frames(tmp_path / "a", images, [10, 2, 9])
    assert frame_numbers(tmp_path / "a") == [1, 8, 9]
    Image.fromarray(images[0]).save(tmp_path / "a/other.0003.png")
    with pytest.raises(ValueError, match=r"numbered from 1"):
        frame_numbers(tmp_path / "a")
    write_frames(tmp_path / "zero", images, [0, 1])
    with pytest.raises(ValueError, match=r"numbered from 1"):
        frame_numbers(tmp_path / "zero")


def test_parts_share_no_frame(ucf):
    parts = [UCF101(ucf, s, frames=30, parts=True) for s in ("train", "val", "test")]
    parts[0].mode = "test"
    for i in range(3):
        n = frame_count(parts[0].paths[i])
        shown = [part.sampled(i) for part in parts]
        assert sorted(set().union(*shown)) == list(range(n))
        assert max(shown[0]) < min(shown[1]) <= max(shown[1]) < min(shown[2])
    assert parts[0].ids[0] == "v_Archery_g01_c01@0-0.6"
    assert len(set().union(*(part.ids for part in parts))) == 9
    assert [len(boxes) for boxes in parts[2][2].boxes] == [2] * 10 + [1] * 20  # frames 9, 10, 11
    write_frames(ucf / "frames/Archery/v_Archery_g09_c01", [np.zeros((8, 8, 3), np.uint8)], [1])
    for number in range(3, 13):
        (ucf / f"frames/Archery/v_Archery_g09_c01/v_Archery_g09_c01.{number:04d}.png").unlink(True)
    with pytest.raises(ValueError, match=r"parts: .* of the 1 frames of .*v_Archery_g09_c01"):
        UCF101(ucf, "train", parts=True)[1]


def test_missing_videos(ucf):
    (ucf / "videos/Biking/v_Biking_g01_c01.avi").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 listed .*: v_Biking_g01_c01;"):
        UCF101(ucf)
    with pytest.warns(UserWarning, match="1 of 2") as caught:
        dataset = UCF101(ucf, missing="skip")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (len(dataset), dataset.missing) == (1, ["v_Biking_g01_c01"])
    # classes come from the annotation, not from what happens to be there
    assert dataset.classes == ["Archery", "Biking"]


def test_all_is_what_is_there_and_annotated(ucf):
    names = ["v_Archery_g01_c01", "v_Archery_g09_c01", "v_Biking_g01_c01"]
    assert UCF101(ucf, split="all").ids == names
    (ucf / "videos/Biking/v_Biking_g01_c01.avi").unlink()
    assert UCF101(ucf, split="all").ids == names[:2]


def test_all_by_name_is_all_of_it(ucf):
    options = {"frames": 2, "size": 8, "data": str(ucf)}
    for parts in (False, True):
        found = load_dataset("ucf101-24", "all", parts=parts, **options)
        assert found.ids == UCF101(ucf, split="all").ids


def test_files_count_before_frames_and_wherever_they_are(ucf):
    name = "Archery/v_Archery_g01_c01"
    black = [np.zeros((*ODD, 3), np.uint8)] * 12
    assert UCF101(ucf).paths[0] == ucf / "frames" / name
    write_video(ucf / f"{name}.mp4", black)
    assert UCF101(ucf).paths[0] == ucf / f"{name}.mp4"
    write_video(ucf / f"videos/{name}.webm.mkv", black)  # another name
    write_video(ucf / f"videos/{name}.mp4", black)
    assert UCF101(ucf).paths[0] == ucf / f"videos/{name}.mp4"
    write_video(ucf / f"videos/{name}.avi", black)
    assert UCF101(ucf).paths[0] == ucf / f"videos/{name}.avi"
    (ucf / f"videos/{name}.txt").write_text("a note")
    assert len(UCF101(ucf)) == 2


def test_lists_may_lie_beside_the_videos_and_name_annotated_classes(ucf):
    mine = ucf / "annotations/testlist01.txt"
    mine.write_text("Biking/v_Biking_g01_c01.avi\n")
    moved = (ucf / "annotations/pyannot.pkl").rename(ucf / "boxes.pkl")
    with pytest.raises(FileNotFoundError, match=r"root: .*pyannot\.pkl"):
        UCF101(ucf)
    moved.rename(ucf / "pyannot.pkl")
    assert UCF101(ucf).ids == ["v_Biking_g01_c01"]
    mine.write_text("Typing/v_Typing_g01_c01.avi\n")
    with pytest.raises(ValueError, match=r"split_list: got .*Typing.*Archery, Biking"):
        UCF101(ucf)


def test_the_last_group_of_the_training_list_validates(ucf):
    black = [np.zeros((16, 16, 3), np.uint8)] * 3
    write_video(ucf / "videos/Biking/v_Biking_g25_c02.avi", black)
    with (ucf / "annotations/thumos13_ucf24_trainlist01.txt").open("a") as file:
        file.write("Biking/v_Biking_g25_c02\n")
    assert UCF101(ucf, "train").ids == ["v_Archery_g09_c01", "v_Biking_g02_c01"]
    assert UCF101(ucf, "val").ids == ["v_Biking_g25_c02"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "dev"}, "split: got 'dev', expected one of 'train', 'val', 'test', 'all'"),
        ({"missing": "ignore"}, "missing: got 'ignore'"),
        ({"split": "val"}, "split: got no clip in 'val'"),
    ],
)
def test_wrong_arguments(ucf, wrong, message):
    with pytest.raises(ValueError, match=message):
        UCF101(ucf, **wrong)


def test_wrong_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: "):
        UCF101(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="root: "):
        Folder(tmp_path / "nowhere")


def test_train_mode_draws_from_seed_epoch_and_id(ucf):
    def draws(seed, epoch):
        dataset = UCF101(ucf, frames=3, seed=seed)
        dataset.mode, dataset.epoch = "train", epoch
        return [dataset.sampled(i) for _ in range(2) for i in range(2)]

    before = torch.random.get_rng_state()
    runs = {seed_epoch: draws(*seed_epoch) for seed_epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert runs[0, 0] == draws(0, 0)
    assert len({str(run) for run in runs.values()}) == 4
    assert all(run[:2] == run[2:] for run in runs.values())


def test_workers_give_the_same_samples(ucf):
    dataset = UCF101(ucf, frames=4, size=24)
    dataset.mode = "train"
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=collate)
    there = list(loader)
    assert dataset._counts.tolist() == [9, 12]  # counted once, by the workers
    for i, found in enumerate(there):
        assert torch.equal(found.clips[0], dataset[i].clip)
        assert all(map(torch.equal, found.boxes[0], dataset[i].boxes))


# --- Folder --------------------------------------------------------------------------------------


def write_class(folder, names, n=3):
    for shade, name in enumerate(names):
        write_frames(
            folder / name, [np.full((6, 8, 3), shade % 9 * 9, np.uint8)] * n, range(1, n + 1)
        )


def test_folder(tmp_path):
    write_class(tmp_path / "zebra", ["one", "two"])
    write_class(tmp_path / "ant", ["one"])
    write_video(tmp_path / "ant/two.mp4", [np.zeros((16, 16, 3), np.uint8)] * 5)
    write_class(tmp_path / "ant", ["two"])
    (tmp_path / "ant/notes.txt").write_text("…")
    (tmp_path / ".cache").mkdir()
    with pytest.warns(UserWarning, match=r"1 files under .* are no clips and left out: ant/notes"):
        dataset = Folder(tmp_path, frames=4, size=(10, 12))
    assert (dataset.name, dataset.split) == (tmp_path.name, "all")
    assert dataset.classes == ["ant", "zebra"]
    assert dataset.ids == ["ant__one", "ant__two", "zebra__one", "zebra__two"]
    assert dataset.targets == [0, 0, 1, 1]
    assert dataset.paths[1] == tmp_path / "ant/two.mp4"
    sample = dataset[3]
    assert (sample.clip.shape, sample.target, sample.boxes) == ((3, 4, 10, 12), 1, [])
    assert unnormalise(sample.clip).mul(255).round().unique().tolist() == [9]


def test_folder_without_clips_in_a_class(tmp_path):
    write_class(tmp_path / "ant", ["one"])
    (tmp_path / "bee/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"root: got '.*bee' without clips"):
        Folder(tmp_path)


def test_folder_split_by_name(tmp_path):
    for name in ("ant", "bee"):
        write_class(tmp_path / name, [f"clip{i:03d}" for i in range(100)], n=1)
    found = {split: Folder(tmp_path, split=split).ids for split in SHARES}
    assert sorted(found["train"] + found["val"] + found["test"]) == Folder(tmp_path).ids
    assert {split: len(ids) for split, ids in found.items()} == {
        "train": 134,
        "val": 34,
        "test": 32,
    }
    # the same for ever: a change here changes everybody's splits
    assert [i for i in found["test"] if i < "ant__clip020"] == [
        f"ant__clip{n}" for n in ("005", "011", "018")
    ]


def test_folder_groups_stay_together(tmp_path):
    write_class(tmp_path / "ant", [f"scene{i // 2}_{i}" for i in range(60)], n=1)
    scenes = [
        {id_.split("_")[2] for id_ in Folder(tmp_path, split=split, group=_scene).ids}
        for split in ("train", "test")
    ]
    assert scenes[0]
    assert scenes[1]
    assert not scenes[0] & scenes[1]


def _scene(path: Path) -> str:
    return path.name.split("_")[0]


def test_folder_with_split_folders(tmp_path):
    write_class(tmp_path / "train/bee", ["0001", "0002"])
    write_class(tmp_path / "train/ant", ["0001"])
    write_class(tmp_path / "val/bee", ["0001"])
    val = Folder(tmp_path, split="val")
    assert (val.ids, val.targets, val.classes) == (["val__bee__0001"], [1], ["ant", "bee"])
    assert len(Folder(tmp_path, split="train")) == 3
    assert len(Folder(tmp_path)) == 4
    with pytest.raises(
        ValueError, match="split: got 'test', expected one of 'all', 'train', 'val'"
    ):
        Folder(tmp_path, split="test")
    with pytest.raises(ValueError, match="group: got"):
        Folder(tmp_path, group=_scene)


def test_folder_wrong_arguments(tmp_path):
    write_class(tmp_path / "ant", ["one"])
    with pytest.raises(ValueError, match="split: got 'dev'"):
        Folder(tmp_path, split="dev")
    with pytest.raises(ValueError, match="split: got no clip in"):
        [Folder(tmp_path, split=split) for split in SHARES]


# --- the real files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_ucf(real_data):
    return real_data / "ucf101-24"


@pytest.mark.real_data
def test_published_counts(real_ucf):
    folder = real_ucf / "annotations"
    found = read_annotations(folder / "pyannot.pkl")
    lists = {path.name: read_split(path) for path in folder.glob("*list01.txt")}
    train, test = lists["thumos13_ucf24_trainlist01.txt"], lists["testlist01.txt"]
    assert len(found) == 3194
    assert len({name.split("/")[0] for name in found}) == 24
    assert {video["label"] for video in found.values()} == set(range(24))
    assert sorted(test) == sorted(lists["thumos13_ucf24_testlist01.txt"])
    assert len(test) == 910
    assert set(test) <= set(found)
    # 9 videos of the training list have no annotation: that is why there are 3,194, not 3,203
    assert (len(train), len(set(train) - set(found))) == (2293, 9)
    assert set(train) | set(test) >= set(found)
    assert not set(train) & set(test)


@pytest.mark.real_data
def test_published_boxes(real_ucf):
    for name, video in read_annotations(real_ucf / "annotations/pyannot.pkl").items():
        assert video["annotations"], name
        for actor in video["annotations"]:
            boxes = actor["boxes"]
            assert 0 <= actor["sf"] < actor["ef"] <= video["numf"], name
            assert len(boxes) == actor["ef"] - actor["sf"], name
            assert boxes.min() >= 0, name
            assert (boxes[:, 2:] > 0).all(), name
            assert (boxes[:, :2] + boxes[:, 2:] <= [320, 240]).all(), name


@pytest.mark.real_data
def test_real_samples(real_ucf):
    dataset = UCF101(real_ucf, split="all", frames=8, size=(56, 72))
    assert len(dataset) == 12
    boxed = 0
    for i, sample in enumerate(dataset[i] for i in range(12)):
        assert sample.clip.shape == (3, 8, 56, 72)
        assert dataset.ids[i].split("_")[1] == dataset.classes[sample.target]
        annotated = dataset.listed[i].annotation
        if dataset.paths[i].is_file():
            assert dataset._counts[i] == annotated["numf"], sample.id
        else:  # the folders hold a part of their video
            assert dataset._counts[i] < annotated["numf"], sample.id
        for boxes in sample.boxes:
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor([72, 56])).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
        boxed += sum(len(boxes) > 0 for boxes in sample.boxes)
    assert boxed > 60  # of 96 frames; not all of them show the action


@pytest.mark.real_data
def test_real_frames_are_matched_by_number(real_ucf):
    dive = real_ucf / "frames/CliffDiving/v_CliffDiving_g05_c07"
    assert frame_numbers(dive) == list(range(5, 74))
    ride = frame_numbers(real_ucf / "frames/HorseRiding/v_HorseRiding_g02_c03")
    assert (len(ride), ride[0], ride[-1]) == (59, 0, 62)
    with pytest.warns(UserWarning, match="901 of 910"):
        dataset = UCF101(real_ucf, frames=69, missing="skip")
    i = dataset.ids.index("v_CliffDiving_g05_c07")
    # the action is over at frame 70 of the video: the last four images show the water
    assert [len(boxes) for boxes in dataset[i].boxes] == [1] * 65 + [0] * 4


@pytest.mark.real_data
def test_real_folder_split_by_source(real_data):
    root = real_data / "surveillance-fights"
    rows = [line.split(",") for line in (root / "index.csv").read_text().splitlines()[1:]]
    source = {row[0]: row[2] for row in rows}

    def group(path):
        return source[path.relative_to(root).as_posix()]

    parts = {split: Folder(root, split=split, group=group) for split in SHARES}
    assert sum(map(len, parts.values())) == 300
    assert parts["val"].classes == ["fight", "noFight"]
    sources = [{group(path) for path in part.paths} for part in parts.values()]
    assert sum(map(len, sources)) == len(set().union(*sources))
    assert parts["test"][0].clip.shape == (3, 16, 112, 112)
