"""EPIC-Object: clips of EPIC-Kitchens-55, each of one of 20 objects, with boxes twice a second.

On disk, under ``root`` (each clip where it is found first, from top to bottom)::

    annotations/Valid_seg_top20_500_val.csv       the test list: seg_id, video_id, noun, …
    annotations/Valid_seg_top20_train.csv         the training list
    annotations/Valid_seg_top20_noun_labels.csv   the 20 classes: noun, noun_label
    videos/fridge-open-P20_04_22332.mp4           one clip in a file, or
    fridge-open-P20_04_22332/…                    (any container; any name that ends in
    frames/fridge-open-P20_04_22332/…png          <video>_<segment>), or as a folder of images
    frames/P20/P20_04/frame_0000117350.jpg        a recording as EPIC-Kitchens hands it out, also
    frames_rgb_flow/rgb/train/P20/P20_04/…        without P20/; images may be missing

The images of a recording carry EPIC's frame numbers (from 1, 60 a second), and a clip is those from
start_frame to stop_frame. Whoever cut clips out need not have kept all frames: the n frames of a
clip's own file or folder are taken to be spread evenly from start_frame to stop_frame.
"""

import ast
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepkit._checks import one_of, require
from stepkit._sources import _image as read_image
from stepkit.data.annotations import (
    boxes_in_clip,
    class_names,
    csv_rows,
    find_list,
    height_width,
    in_share,
    report_missing,
)
from stepkit.data.folder import ClipFiles, find_clips, position

ANNOTATED_AT = (1080, 1920)  # H, W of every box in the lists
EVERY = 30  # frames from one annotated frame to the next
FRAME = "frame_{:010d}.jpg"  # of a recording, as EPIC-Kitchens names it
LONGEST = 30 * 60 * 60  # half an hour: each of its frames is looked for on disk
CLEAN_TEST = 0.15  # share of the recordings that the clean split tests on

_CLIPS_IN = ("videos", "", "frames")
_RECORDINGS_IN = ("frames", "frames_rgb_flow/rgb/train", "")
_LISTS = {"train": ["Valid_seg_top20*train*.csv"], "test": ["Valid_seg_top20*val*.csv"]}
_CLASSES = ["Valid_seg_top20*noun_labels.csv"]
_COLUMNS = ("seg_id", "video_id", "noun", "noun_label", "start_frame", "stop_frame")
_CLIP = re.compile(r"(?:.*-)?(P[0-9]+_[0-9]+_[0-9]+)")


class Segment(NamedTuple):
    """One row of a list; frames are numbered as in the recording, from 1, ``stop`` included."""

    id: str  # P20_04_22332: recording and seg_id
    recording: str
    target: int
    start: int
    stop: int
    boxes: dict[int, list]  # frame to rows of x, y, width, height in pixels at 1920×1080


class EpicObject(ClipFiles):
    """EPIC-Object (paper §V-A.1): the 20 most frequent nouns, 25 test clips of each.

    The published split is random over clips, and clips of one recording show the same kitchen
    minutes apart: 149 of the 150 recordings of the test list occur in the training list too. With
    ``clean=True`` the clips of both lists are divided anew, by recording, 15 % of them for testing.
    (Striking the recordings of the test list from the training list would leave 158 of its first
    1,999 rows.) The paper's numbers do not belong beside this split, so it has a name of its own,
    ``"epic-object-clean"``.

    Parameters
    ----------
    root : str or Path
        As the module describes.
    split : {"test", "train", "all"}, default "test"
        "all": every clip of both lists that is on disk.
    frames, size, mode, part, seed
        As in `ClipFiles`.
    missing : {"error", "skip"}, default "error"
        What to do about clips that the list names and the disk does not have.
    split_list, class_list : str or Path, optional
        By default the lists in ``annotations/``.
    share : (float, float), default (0.0, 1.0)
        Only the recordings whose `position`, drawn from their name, lies in this range: (0, 0.9)
        and (0.9, 1) make a training and a validation part of "train".
    clean : bool, default False
        Divide by recording.
    reach : int, default 15
        A frame has the boxes of the annotated frame nearest to it, at most so many frames away;
        the paper does not say how it matches the two. At T = 16, 15 gives boxes to 95 % of the
        frames of the test list, on average 7 frames old or new; 5 to 35 %; 0, the annotated frames
        alone, to 3 %. Boxes 30 frames apart overlap by half (median IoU 0.52).

    Attributes
    ----------
    segments : list of Segment
    leak : list of str
        The recordings that both published lists have, where both were read; the published training
        list comes with a warning of it.
    missing : list of str
        The clips of the list that were skipped.

    Raises
    ------
    FileNotFoundError
        No such list; clips are missing and ``missing="error"``.
    ValueError
        A list that is malformed (file, line and column are named), or as `ClipFiles`.

    Examples
    --------
    >>> EpicObject("epic-object")[0].clip.shape  # doctest: +SKIP
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
        split_list=None,
        class_list=None,
        seed: int = 0,
        share: tuple[float, float] = (0.0, 1.0),
        clean: bool = False,
        reach: int = EVERY // 2,
    ):
        one_of("split", split, (*_LISTS, "all"))
        one_of("missing", missing, ("error", "skip"))
        require(reach >= 0, "reach", reach, "frames, 0 or more")
        divided = clean or split == "all"
        require(not (divided and split_list), "split_list", split_list, "None: both are read")
        root = Path(root)
        classes = read_classes(class_list or find_list(root, _CLASSES))
        wanted = [split] if split_list or (split == "test" and not divided) else list(_LISTS)
        lists = {
            name: read_list(split_list or find_list(root, _LISTS[name]), classes) for name in wanted
        }
        self.leak = shared_recordings(*lists.values()) if len(lists) == 2 else []
        listed = _divide(lists, split) if divided else lists[split]
        if self.leak and not divided:
            recordings = len({segment.recording for segment in lists["test"]})
            said = f"{len(self.leak)} of the {recordings} recordings of the test list also occur"
            told = f"split: {said} in the training list; clean=True divides by recording"
            warnings.warn(told, stacklevel=2)
        listed = in_share(listed, share, lambda segment: position(segment.recording))
        where = _locate(root, listed)
        if split == "all":
            listed = [segment for segment in listed if segment.id in where]
        self.missing = [segment.id for segment in listed if segment.id not in where]
        report_missing(root, self.missing, len(listed), missing)
        self.segments, self.reach = [s for s in listed if s.id in where], reach
        clips = [(s.id, where[s.id], s.target) for s in self.segments]
        name = "epic-object-clean" if clean else "epic-object"
        super().__init__(name, split, classes, clips, frames, size, mode, part, seed)

    def numbers(self, i: int) -> list[int]:
        """Return the frame number in the recording of each frame that clip ``i`` has on disk."""
        segment, path = self.segments[i], self.paths[i]
        if self._in_recording(i):
            return list(_on_disk(path, segment))
        even = np.linspace(segment.start, segment.stop, self.length(i))
        return even.round().astype(int).tolist()

    def count(self, i: int) -> int:
        """Count the frames of clip ``i``: of a recording, those that belong to it."""
        return len(self.numbers(i)) if self._in_recording(i) else super().count(i)

    def read(self, i: int, indices: list[int]) -> Tensor:
        """Return the frames of clip ``i`` at ``indices``: uint8 (T, H, W, 3).

        The images of a recording are opened by name: their folder may hold 100,000 of them.
        """
        if not self._in_recording(i):
            return super().read(i, indices)
        numbers, (height, width) = self.numbers(i), height_width(self.size)
        files = [self.paths[i] / FRAME.format(numbers[index]) for index in indices]
        images = (Image.fromarray(read_image(file)) for file in files)
        resized = [image.resize((width, height), Image.Resampling.BILINEAR) for image in images]
        return torch.from_numpy(np.stack(resized))

    def files(self, i: int) -> list[Path]:
        """Return the files that clip ``i`` is read from: of a recording, those that are its own."""
        if not self._in_recording(i):
            return super().files(i)
        return [self.paths[i] / FRAME.format(number) for number in self.numbers(i)]

    def boxes(self, i: int, indices: list[int]) -> list[Tensor]:
        """Return the boxes of clip ``i`` at the positions ``indices``, as in `boxes_at`."""
        numbers = self.numbers(i)
        found = [numbers[index] for index in indices]
        return boxes_at(self.segments[i].boxes, found, self.size, self.reach)

    def _in_recording(self, i: int) -> bool:
        return self.paths[i].name == self.segments[i].recording


def boxes_at(boxes: dict, frames, size, reach: int = EVERY // 2) -> list[Tensor]:
    """Return the boxes at some frames, in pixels of a clip of ``size``.

    Parameters
    ----------
    boxes : dict
        `Segment.boxes`.
    frames : list of int
        Frame numbers of the recording.
    size, reach
        As in `EpicObject`; of two annotated frames equally near, the earlier counts.

    Returns
    -------
    list of Tensor
        Per frame float32 (n, 4), ``x0, y0, x1, y1``, inside the frame; n instances.

    Examples
    --------
    >>> boxes_at({31: [(960, 540, 480, 270)]}, [31, 46, 47], 112)[1].tolist()
    [[56.0, 56.0, 84.0, 84.0]]
    """
    found = []
    for frame in frames:
        nearest = min(boxes, key=lambda known: (abs(known - frame), known), default=math.inf)
        rows = boxes[nearest] if abs(nearest - frame) <= reach else []
        found.append(boxes_in_clip(rows, ANNOTATED_AT, size))
    return found


def shared_recordings(train: list[Segment], test: list[Segment]) -> list[str]:
    """Return the recordings that both lists have, sorted: what a random split over clips leaks."""
    return sorted({s.recording for s in train} & {s.recording for s in test})


# --- reading lists -------------------------------------------------------------------------------


def read_classes(path) -> list[str]:
    """Read the class index, columns ``noun`` and ``noun_label``: the nouns in order.

    Raises
    ------
    ValueError
        No such columns, or labels other than 0, 1, … K − 1.
    """
    rows = csv_rows(path, "class_list", ("noun", "noun_label"))
    index = {row["noun"]: _whole(row, "noun_label", "class_list", at) for at, row in rows}
    return class_names(index, path)


def read_list(path, classes: list[str]) -> list[Segment]:
    """Read a list of clips, whose boxes come in either of two forms.

    ``{frame: (top, left, height, width)}`` or ``{frame: [(top, left, height, width), …]}``, at
    1920×1080. Other columns than those used are ignored.

    Raises
    ------
    ValueError
        A missing column; a noun that is no class or has another label than in the class index; an
        id, a frame or a box of another form. The message names file, line and column.

    Examples
    --------
    >>> len(read_list("Valid_seg_top20_500_val.csv", classes))  # doctest: +SKIP
    500
    """
    found = []
    for at, row in csv_rows(path, "split_list", (*_COLUMNS, "bounding_boxes")):
        noun, recording, seg_id = row["noun"], row["video_id"], row["seg_id"]
        one = "one of " + ", ".join(classes)
        require(noun in classes, "split_list", f"noun {noun!r} {at}", one)
        target, label = classes.index(noun), _whole(row, "noun_label", "split_list", at)
        expected = f"{target}, as in the class index"
        require(label == target, "split_list", f"noun_label {label} of {noun!r} {at}", expected)
        # they become parts of paths
        given = f"video_id {recording!r} {at}"
        require(
            bool(re.fullmatch("P[0-9]{1,9}_[0-9]{1,9}", recording)),
            "split_list",
            given,
            "P01_01, …",
        )
        given = f"seg_id {seg_id!r} {at}"
        require(bool(re.fullmatch("[0-9]{1,9}", seg_id)), "split_list", given, "a number")
        start, stop = (_whole(row, key, "split_list", at) for key in _COLUMNS[-2:])
        given = f"start_frame {start}, stop_frame {stop} {at}"
        require(1 <= start <= stop, "split_list", given, "1 <= start_frame <= stop_frame")
        require(stop - start < LONGEST, "split_list", given, f"at most {LONGEST} frames")
        boxes = _boxes(row["bounding_boxes"], at)
        found.append(Segment(f"{recording}_{seg_id}", recording, target, start, stop, boxes))
    return found


def _whole(row: dict, column: str, argument: str, at: str) -> int:
    given = f"{column} {row[column]!r} {at}"
    require(bool(re.fullmatch("[0-9]{1,9}", row[column])), argument, given, "a whole number")
    return int(row[column])


def _boxes(text: str, at: str) -> dict[int, list]:
    """Return {frame: [(x, y, width, height), …]} of either form."""
    try:
        # Values only, nothing is run. No operators, which can be nested until a parser breaks.
        found = (
            None if re.search(r"[^-0-9eE\s.,:'(){}\[\]]|-\s*-", text) else ast.literal_eval(text)
        )
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    expected = "{frame: (top, left, height, width)}, or a list of these per frame"
    given = f"bounding_boxes {text[:60]!r} {at}"
    require(isinstance(found, dict), "split_list", given, expected)
    boxes = {}
    for frame, value in found.items():
        rows = value if isinstance(value, list) else [value]
        fits = type(frame) is int and all(map(_is_box, rows))
        require(fits, "split_list", f"bounding_boxes {frame!r}: {value!r} {at}", expected)
        boxes[frame] = [(left, top, width, height) for top, left, height, width in rows]
    return boxes


def _is_box(row) -> bool:
    return (
        isinstance(row, (tuple, list))
        and len(row) == 4
        and all(type(side) in (int, float) and 0 <= side <= 1e5 for side in row)
    )


# --- finding files -------------------------------------------------------------------------------


def _divide(lists: dict[str, list[Segment]], split: str) -> list[Segment]:
    """Return the clips of all lists that belong to a split by recording, each once."""
    every = {segment.id: segment for listed in lists.values() for segment in listed}.values()
    if split == "all":
        return list(every)
    # not the draw that `share` makes: any share of a split has recordings
    tested = [position(f"clean/{segment.recording}") >= 1 - CLEAN_TEST for segment in every]
    return [s for s, held in zip(every, tested, strict=True) if held == (split == "test")]


def _locate(root: Path, segments: list[Segment]) -> dict[str, Path]:
    """Return where each segment is, by id: its own video or folder before its recording."""
    found = {}
    for place in reversed(_CLIPS_IN):
        if (root / place).is_dir():
            clips = find_clips(root / place, _CLIP)
            found |= {_CLIP.fullmatch(name)[1]: path for name, path in clips.items()}
    for segment in segments:  # a recording is asked for names, not listed: it may be huge
        person = segment.recording.partition("_")[0]
        folders = [root / place / who for place in _RECORDINGS_IN for who in (person, "")]
        for folder in folders:
            folder = folder / segment.recording
            if segment.id not in found and next(_on_disk(folder, segment), None):
                found[segment.id] = folder
    return found


def _on_disk(folder: Path, segment: Segment):
    """Yield the frame numbers of a segment whose image is in ``folder``."""
    if folder.is_dir():
        for number in range(segment.start, segment.stop + 1):
            if (folder / FRAME.format(number)).is_file():
                yield number
