"""UCF101-24: videos of 24 actions, with a box around every actor in every frame of the action."""

import re
from pathlib import Path

import numpy as np
from torch import Tensor

from stepkit._checks import require
from stepkit._sources import images
from stepkit.data._unpickle import unpickle
from stepkit.data.listed import Listed, Video, boxes_in_clip, content, find_list
from stepkit.data.sample import dataset

__all__ = ["UCF101", "boxes_at", "frame_numbers", "read_annotations", "read_split"]

MOST_BOXES = 2**22  # of a file: several times pyannot.pkl
ANNOTATED_AT = (240, 320)  # H, W of every box in the annotation, whatever size a video file has

# The layout of this project's documentation first, then what archives that people have unpack to.
_CLIPS_IN = ("videos", "", "frames", "rgb-images")
_ENTRY = re.compile(r"([\w-]+/[\w-]+?)(?:\.\w+)?(?:\s+\d+)?")
_FRAME = re.compile(r"(.*?)(\d+)")


@dataset(
    "ucf101-24",
    label="UCF101-24",
    about="24 actions of people, from YouTube; a box around every actor in every frame",
    evidence="boxes",
    folder="ucf101-24",
)
class UCF101(Listed):
    """The 24 classes of UCF101 that carry boxes (THUMOS'13): 2,284 training and 910 test videos.

    The published training list names 9 videos more that have no annotation; they are kept where
    they are on disk, with their class and without boxes. Videos of one group, ``_g01_`` to
    ``_g25_``, share actor and place: "val" is the last group of the training list.

    On disk, under ``root``: ``annotations/`` with ``pyannot.pkl``, ``trainlist01.txt`` and
    ``testlist01.txt`` (of which ``thumos13_ucf24_`` may lead the names); and in ``videos/``,
    ``frames/`` or directly ``Class/v_….avi`` (or another container) or ``Class/v_…/`` with one
    image per frame. Where a video is there in both forms, the file counts. An image is numbered as
    in the video, from 1, and images may be missing.

    Parameters
    ----------
    root, split, frames, size, seed, parts, missing
        As in `stepkit.data.listed.Listed`; "all" is every annotated video on disk, whatever the
        lists say.

    Examples
    --------
    >>> UCF101("ucf101-24", split="test")[0].clip.shape  # doctest: +SKIP
    torch.Size([3, 16, 112, 112])
    """

    name = "ucf101-24"

    def read_lists(self, root: Path, split: str) -> tuple[list[str], list[Video]]:
        """Return the classes, in order of their labels, and the videos of a list."""
        found = read_annotations(find_list(root, "pyannot.pkl"))
        labels = {video["label"]: name.split("/")[0] for name, video in found.items()}
        classes = [labels[label] for label in sorted(labels)]
        self.places = [Path(place, name) for place in _CLIPS_IN for name in classes]
        names = sorted(found)
        if split != "all":
            name = f"{'test' if split == 'test' else 'train'}list01.txt"
            names = read_split(find_list(root, name, f"thumos13_ucf24_{name}"))
        parts = [(name, *name.split("/")) for name in names]
        unknown = [name for name, kind, _ in parts if kind not in classes]
        require(not unknown, "split_list", unknown[:3], "videos of " + ", ".join(classes))
        return classes, [Video(id_, classes.index(of), found.get(name)) for name, of, id_ in parts]

    def held_out(self, clip: Video) -> bool:
        """Tell whether a video is of the last group of scenes."""
        return "_g25_" in clip.id

    def boxes(self, i: int, indices: list[int]) -> list[Tensor]:
        """Return the boxes of clip ``i`` at the positions ``indices``, as in `boxes_at`.

        A position counts the frames on disk, which are not always those of the video.
        """
        if self.paths[i].is_dir():
            numbers = frame_numbers(self.paths[i])
            indices = [numbers[index] for index in indices]
        return boxes_at(self.listed[i].annotation, indices, self.size)


def read_annotations(path) -> dict:
    """Read ``pyannot.pkl`` without running what a pickle could make Python run.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    dict
        ``Class/v_Class_gXX_cYY`` to ``{"label": int, "numf": int, "annotations": [...]}`` with one
        entry per actor: ``{"sf": int, "ef": int, "boxes": float32 (ef - sf, 4)}``, boxes as x, y,
        width, height in pixels at 320×240 for the frames sf, …, ef − 1, counted from 0.

    Raises
    ------
    ValueError
        Not an annotation of this structure; the file asks for anything but plain values and numpy
        arrays; boxes that are not finite.

    Examples
    --------
    >>> len(read_annotations("annotations/pyannot.pkl"))  # doctest: +SKIP
    3194
    """
    try:
        found, boxes = unpickle(content(path, "annotations")), 0
        for entry in found.values():  # a small file can name one list a million times
            for actor in entry["annotations"]:
                boxes += 1 + len(actor["boxes"])
                require(boxes <= MOST_BOXES, "boxes", "more", f"at most {MOST_BOXES}")
        return {name: _video(entry) for name, entry in found.items()}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"annotations: got '{path}' ({type(error).__name__}: {error}), expected pyannot.pkl"
        ) from error


def _video(entry: dict) -> dict:
    actors = []
    for actor in entry["annotations"]:
        sf, boxes = int(actor["sf"]), actor["boxes"]
        given = f"{getattr(boxes, 'dtype', type(boxes))} {getattr(boxes, 'shape', '')}"
        fits = isinstance(boxes, np.ndarray) and boxes.dtype.kind in "uif" and boxes.ndim == 2
        require(fits and boxes.shape[1] == 4, "boxes", given, "an array of numbers (n, 4)")
        fits = bool((np.abs(boxes.astype(np.float64)) <= 1e5).all())  # not if NaN
        require(fits, "boxes", "NaN or more than 100,000", "pixels")
        # the file stores lengths and boxes as uint8 and uint16, in which x + width wraps around
        boxes = boxes.astype(np.float32)
        # no more frames than boxes, whatever ef says
        actors.append({"sf": sf, "ef": min(int(actor["ef"]), sf + len(boxes)), "boxes": boxes})
    return {"label": int(entry["label"]), "numf": int(entry["numf"]), "annotations": actors}


def read_split(path) -> list[str]:
    """Read a list of videos, one per line, with or without ``.avi`` and a class index after it.

    Returns
    -------
    list of str
        ``Class/v_Class_gXX_cYY``, in the order of the file, each once.

    Raises
    ------
    ValueError
        An empty list; a line of another form, absolute paths and ``..`` among them.

    Examples
    --------
    >>> read_split("annotations/testlist01.txt")[0]  # doctest: +SKIP
    'Basketball/v_Basketball_g01_c01'
    """
    text = content(path, "split_list").decode(errors="replace")
    names = {}  # a dict keeps the order
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            entry = _ENTRY.fullmatch(line.strip())
            given = f"{line.strip()!r} in line {number} of '{path}'"
            require(entry is not None, "split_list", given, "Class/v_Class_gXX_cYY")
            names[entry[1]] = None
    require(bool(names), "split_list", f"'{path}' without entries", "at least one video")
    return list(names)


def boxes_at(video: dict | None, frames: list[int], size: int | tuple[int, int]) -> list[Tensor]:
    """Return the boxes of a video at some of its frames, in pixels of a clip of ``size``.

    Parameters
    ----------
    video : dict or None
        A value of `read_annotations`; None: not annotated, every frame comes without box.
    frames : list of int
        Frame numbers in the video, from 0; none has a box outside the annotated ranges.
    size : int or (int, int)
        Side, or height and width, of the clip in pixels.

    Returns
    -------
    list of Tensor
        Per frame float32 (n, 4), ``x0, y0, x1, y1``, inside the frame; n actors.

    Examples
    --------
    >>> actor = {"sf": 5, "ef": 6, "boxes": np.array([[160, 120, 80, 60]])}
    >>> boxes_at({"annotations": [actor]}, [5], 112)[0].tolist()
    [[56.0, 56.0, 84.0, 84.0]]
    """
    boxes = []
    for frame in frames:
        rows = [
            actor["boxes"][frame - actor["sf"]]
            for actor in (video["annotations"] if video else [])
            if actor["sf"] <= frame < actor["ef"]
        ]
        boxes.append(boxes_in_clip(rows, ANNOTATED_AT, size))
    return boxes


def frame_numbers(folder: Path) -> list[int]:
    """Return the number in the video, from 0, of each image in ``folder``, in ascending order.

    Raises
    ------
    ValueError
        Names that do not end in a number of at least 1, or that differ in anything else: their
        order would say nothing about the video.
    """
    stems = [file.stem for file in images(folder)]
    found = [_FRAME.fullmatch(stem) for stem in stems]
    numbered = all(found) and len({match[1] for match in found}) == 1
    numbers = sorted(int(match[2]) - 1 for match in found) if numbered else [-1]
    expected = "images named alike and numbered from 1, as v_Diving_g01_c01.0001.jpg"
    require(numbers[0] >= 0, "root", f"'{folder}' with {min(stems)!r}", expected)
    return numbers
