"""UCF101-24: videos of 24 actions, with a box around every actor in every frame of the action."""

import re
from pathlib import Path

import numpy as np
from torch import Tensor

from stepkit._checks import one_of, require
from stepkit._sources import _images as list_images
from stepkit.data._unpickle import unpickle
from stepkit.data.annotations import boxes_in_clip, content, find_list, report_missing
from stepkit.data.folder import ClipFiles, find_clips, subfolders

MOST_BOXES = 2**22  # of a file: several times pyannot.pkl
ANNOTATED_AT = (240, 320)  # H, W of every box in the annotation, whatever size a video file has

# Where the videos are under a root, and what the lists are called: the layout of this project's
# documentation first, then what the archives that people have unpack to.
_CLIPS_IN = ("videos", "", "frames", "rgb-images")
_LISTS = {
    "train": ("trainlist01.txt", "thumos13_ucf24_trainlist01.txt"),
    "test": ("testlist01.txt", "thumos13_ucf24_testlist01.txt"),
}
_ENTRY = re.compile(r"([\w-]+/[\w-]+?)(?:\.\w+)?(?:\s+\d+)?")
_FRAME = re.compile(r"(.*?)(\d+)")


class UCF101(ClipFiles):
    """The 24 classes of UCF101 that carry boxes (THUMOS'13): 2,284 training and 910 test videos.

    The published training list names 9 videos more that have no annotation; they are kept where
    they are on disk, with their class and without boxes.

    Parameters
    ----------
    root : str or Path
        Holds ``annotations/`` and, in ``videos/``, ``frames/`` or directly, ``Class/v_….avi`` (or
        another container) or ``Class/v_…/`` with one image per frame. Where a video is there in
        both forms, the file counts. An image is numbered as in the video, from 1, and images may
        be missing.
    split : {"test", "train", "all"}, default "test"
        "all": every annotated video on disk, whatever the lists say.
    frames, size, mode, part, seed
        As in `ClipFiles`.
    groups : iterable of int, optional
        Only the videos of these groups; UCF101 numbers its scenes, ``_g01_`` to ``_g25_``, and
        videos of one group share actor and place.
    missing : {"error", "skip"}, default "error"
        What to do about videos that the list names and the disk does not have.
    annotations, split_list : str or Path, optional
        By default ``annotations/pyannot.pkl`` and ``annotations/trainlist01.txt`` or
        ``testlist01.txt``, also with ``thumos13_ucf24_`` before the name.

    Attributes
    ----------
    annotations : dict
        As `read_annotations` returns it.
    missing : list of str
        The videos of the list that were skipped, ``Class/v_Class_gXX_cYY``.

    Raises
    ------
    FileNotFoundError
        No such folder, annotation or list; videos are missing and ``missing="error"``.
    ValueError
        A list entry that is no UCF101-24 video, or as `read_annotations` and `ClipFiles`.

    Examples
    --------
    >>> UCF101("ucf101-24", split="test")[0].clip.shape  # doctest: +SKIP
    torch.Size([3, 16, 112, 112])
    """

    def __init__(
        self,
        root,
        split: str = "test",
        frames: int = 16,
        size: int | tuple[int, int] = 112,
        mode: str = "test",
        part: tuple[float, float] = (0.0, 1.0),
        missing: str = "error",
        annotations=None,
        split_list=None,
        seed: int = 0,
        groups=None,
    ):
        one_of("split", split, (*_LISTS, "all"))
        one_of("missing", missing, ("error", "skip"))
        root = Path(root)
        self.annotations = read_annotations(annotations or find_list(root, ["pyannot.pkl"]))
        classes = _classes(self.annotations)
        paths = _index(root, classes)
        if split == "all":
            require(split_list is None, "split_list", split_list, "None for split 'all'")
            names = sorted(name for name in self.annotations if name in paths)
        else:
            names = read_split(split_list or find_list(root, _LISTS[split]))
        if groups is not None:
            wanted = {f"_g{group:02d}_" for group in groups}
            names = [name for name in names if any(group in name for group in wanted)]
        unknown = [name for name in names if name.split("/")[0] not in classes]
        require(not unknown, "split_list", unknown[:3], "videos of " + ", ".join(classes))
        self.missing = [name for name in names if name not in paths]
        report_missing(root, self.missing, len(names), missing)
        self._names = [name for name in names if name in paths]
        clips = [(n.split("/")[1], paths[n], classes.index(n.split("/")[0])) for n in self._names]
        super().__init__("ucf101-24", split, classes, clips, frames, size, mode, part, seed)

    def boxes(self, i: int, indices: list[int]) -> list[Tensor]:
        """Return the boxes of clip ``i`` at the positions ``indices``, as in `boxes_at`.

        A position counts the frames on disk, which are not always those of the video.
        """
        path = self.paths[i]
        if path.is_dir():
            numbers = frame_numbers(path)
            indices = [numbers[index] for index in indices]
        return boxes_at(self.annotations.get(self._names[i]), indices, self.size)


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
    stems = [file.stem for file in list_images(folder)]
    found = [_FRAME.fullmatch(stem) for stem in stems]
    numbered = all(found) and len({match[1] for match in found}) == 1
    numbers = sorted(int(match[2]) - 1 for match in found) if numbered else [-1]
    expected = "images named alike and numbered from 1, as v_Diving_g01_c01.0001.jpg"
    require(numbers[0] >= 0, "root", f"'{folder}' with {min(stems)!r}", expected)
    return numbers


# --- finding files -------------------------------------------------------------------------------


def _classes(annotations: dict) -> list[str]:
    names = {video["label"]: name.split("/")[0] for name, video in annotations.items()}
    return [names[label] for label in sorted(names)]


def _index(root: Path, classes: list[str]) -> dict[str, Path]:
    """Return where each video is: of several places the one that `_CLIPS_IN` lists first."""
    return {
        f"{folder.name}/{name}": path
        for place in reversed(_CLIPS_IN)
        if (root / place).is_dir()
        for folder in subfolders(root / place)
        if folder.name in classes
        for name, path in find_clips(folder).items()
    }
