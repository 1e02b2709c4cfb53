"""The paper's three datasets as they lie on disk, tiny: three classes, generated frames."""

import csv
import json
import pickle
from pathlib import Path

import av
import numpy as np
from PIL import Image

from stepkit.clips import unnormalise
from stepkit.data import Synthetic
from stepkit.data.files import position

T, H, W = 12, 48, 64


def scenes(name: str, n: int):
    """Class, frames uint8 (T, H, W, 3), and the box of each frame as shares of its sides."""
    data = Synthetic(name, n=2 * n, frames=T, size=(H, W))
    for sample in (data[i] for i in range(2 * n) if data.targets[i] < 3):
        frames = unnormalise(sample.clip[None])[0].permute(1, 2, 3, 0).mul(255).round().byte()
        sides = np.array([W, H, W, H])
        yield sample.target, frames.numpy(), [box[0].numpy() / sides for box in sample.boxes]


def write_video(path: Path, frames, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def ucf101_24(root: Path) -> None:
    """Two videos a class to train on, one (of group 25) to choose by, two to test on."""
    classes, found = ["Basketball", "Biking", "Diving"], {}
    groups, lists = (8, 9, 25, 1, 2), {"train": [], "test": []}
    for i, (target, frames, boxes) in enumerate(scenes("appearance", 15)):
        group, label = groups[i // 3], classes[target]
        name = f"{label}/v_{label}_g{group:02d}_c01"
        lists["test" if group < 8 else "train"].append(name)
        write_video(root / f"videos/{name}.avi", frames, "mpeg4")
        corners = np.array(boxes) * [320, 240, 320, 240]
        rows = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        actor = {"label": target, "sf": 0, "ef": T, "boxes": rows.round().astype(np.uint16)}
        found[name] = {"annotations": [actor], "numf": T, "label": target}
    annotations = root / "annotations"
    annotations.mkdir()
    (annotations / "pyannot.pkl").write_bytes(pickle.dumps(found, protocol=3))
    for split, names in lists.items():
        (annotations / f"{split}list01.txt").write_text("\n".join(sorted(names)) + "\n")


def epic_object(root: Path) -> None:
    """Recordings as folders of frames for training, clips cut out of others for testing."""
    nouns, lists = ["tap", "plate", "knife"], {"train": [], "500_val": []}
    names = [f"P{person:02d}_01" for person in range(1, 99)]
    chosen = [next(n for n in names if position(n) >= 0.9)]  # a tenth chooses the checkpoint
    chosen += [n for n in names if position(n) < 0.9][:4]
    columns = ["seg_id", "video_id", "noun", "noun_label", "verb", "start_frame", "stop_frame"]
    for i, (target, frames, boxes) in enumerate(scenes("object", 15)):
        recording, start, noun = chosen[i // 3], 100 * (i + 1), nouns[target]
        tested = i >= 9
        if tested:
            write_video(root / f"videos/{noun}-take-{recording}_{i}.mp4", frames, "mpeg4")
        for t, frame in enumerate([] if tested else frames):
            name = f"frames/{recording[:3]}/{recording}/frame_{start + t:010d}.jpg"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(root / name)
        x0, y0, x1, y1 = (boxes[5] * [1920, 1080, 1920, 1080]).round().astype(int).tolist()
        annotated = {start + 5: (y0, x0, y1 - y0, x1 - x0)}
        row = [i, recording, noun, target, "take", start, start + T - 1, annotated]
        lists["500_val" if tested else "train"].append(row)
    tables = {split: [[*columns, "bounding_boxes"], *rows] for split, rows in lists.items()}
    tables["noun_labels"] = [
        ["noun", "noun_label", "num"],
        *([n, i, 5] for i, n in enumerate(nouns)),
    ]
    (root / "annotations").mkdir()
    for name, rows in tables.items():
        with (root / f"annotations/Valid_seg_top20_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def something_v2(root: Path) -> None:
    """Motions, without boxes."""
    marked = ["Pulling [something] left", "Pulling [something] right", "Lifting [something] up"]
    names = [str(number) for number in range(100, 400)]
    chosen = [n for n in names if position(n) >= 0.9][:3] + [n for n in names if position(n) < 0.9]
    lists = {"train_10000": [], "val_1000": []}
    for i, (target, frames, _) in enumerate(scenes("motion", 15)):
        write_video(root / f"20bn-something-something-v2/{chosen[i]}.webm", frames, "libvpx")
        entry = {"id": chosen[i], "label": "pulling a cup", "template": marked[target]}
        entry["placeholders"] = ["a cup"]
        lists["val_1000" if i >= 9 else "train_10000"].append(entry)
    plain = [template.replace("[", "").replace("]", "") for template in marked]
    lists["top25_labels_index"] = {template: i for i, template in enumerate(plain)}
    (root / "annotations").mkdir()
    for name, content in lists.items():
        (root / f"annotations/{name}.json").write_text(json.dumps(content))


def write(root: Path) -> Path:
    """Write all three below ``root``, as profile ``paper`` expects them; return it."""
    for make in (ucf101_24, epic_object, something_v2):
        make(root / make.__name__.replace("_", "-"))
    return root
