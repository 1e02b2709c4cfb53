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

import csv
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from stepkit._checks import require, warn
from stepkit.data.files import position
from stepkit.data.listed import Listed, boxes_in_clip, class_names, content, find_list
from stepkit.data.sample import dataset

__all__ = ["EpicObject", "EpicObjectClean", "boxes_at", "read_classes", "read_list"]

ANNOTATED_AT = (1080, 1920)  # H, W of every box in the lists
REACH = 15  # frames: half of the way from one annotated frame to the next
FRAME = "frame_{:010d}.jpg"  # of a recording, as EPIC-Kitchens names it
LONGEST = 30 * 60 * 60  # half an hour: each of its frames is looked for on disk
CLEAN_TEST = 0.15  # share of the recordings that the clean split tests on

_RECORDINGS_IN = ("frames", "frames_rgb_flow/rgb/train", "")
_LISTS = {"train": "Valid_seg_top20*train*.csv", "test": "Valid_seg_top20*val*.csv"}
_WHOLE = ("[0-9]{1,9}", "a whole number")
_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{0,20})?"
_BOX = rf"\({_NUMBER}(?:, ?{_NUMBER}){{3}}\)"
_FRAME = rf"[0-9]{{1,9}}: ?(?:{_BOX}|\[(?:{_BOX}(?:, ?)?)*\])"
_COLUMNS = {  # ids become parts of paths
    **dict.fromkeys(("seg_id", "noun_label", "start_frame", "stop_frame"), _WHOLE),
    "video_id": ("P[0-9]{1,9}_[0-9]{1,9}", "P01_01, …"),
    "bounding_boxes": (
        rf"\{{(?:{_FRAME}(?:, ?)?)*\}}",
        "{frame: (top, left, height, width)}, or a list of these per frame",
    ),
}


class Segment(NamedTuple):
    """One row of a list; frames are numbered as in the recording, from 1, ``stop`` included."""

    id: str  # P20_04_22332: recording and seg_id
    recording: str
    target: int
    start: int
    stop: int
    boxes: dict[int, np.ndarray]  # of a frame (n, 4): x, y, width, height at 1920×1080


_FACTS = {
    "about": "20 things of the kitchen, from a camera worn on the head; boxes twice a second",
    "evidence": "boxes",
    "folder": "epic-object",
}


@dataset("epic-object", label="EPIC-Object", **_FACTS)
class EpicObject(Listed):
    """EPIC-Object (paper §V-A.1): the 20 most frequent nouns, 25 test clips of each.

    The published split is random over clips, and clips of one recording show the same kitchen
    minutes apart: 149 of the 150 recordings of the test list occur in the training list too. "val"
    is a tenth of the recordings of the training list. A frame has the boxes of the annotated frame
    nearest to it, at most 15 frames away; the paper does not say how it matches the two. At T = 16
    that gives boxes to 95 % of the frames of the test list, on average 7 frames old or new; 5
    would give them to 35 %; the annotated frames alone are 3 %. Boxes 30 frames apart overlap by
    half (median IoU 0.52).

    Parameters
    ----------
    root, split, frames, size, seed, parts, missing
        As in `stepkit.data.listed.Listed`; the layout on disk is the module's.

    Attributes
    ----------
    listed : list of Segment
    leak : list of str
        The recordings that both published lists have, where both were read; the published training
        list comes with a warning of it.

    Examples
    --------
    >>> EpicObject("epic-object")[0].clip.shape  # doctest: +SKIP
    torch.Size([3, 16, 112, 112])
    """

    name, places = "epic-object", ("videos", "", "frames")
    clean = False

    def read_lists(self, root: Path, split: str) -> tuple[list[str], list[Segment]]:
        """Return the classes, in order of their labels, and the clips of a list."""
        classes = read_classes(find_list(root, "Valid_seg_top20*noun_labels.csv"))
        names = _LISTS if self.clean or split != "test" else ["test"]
        lists = {name: read_list(find_list(root, _LISTS[name]), classes) for name in names}
        recordings = [{segment.recording for segment in each} for each in lists.values()]
        self.leak = sorted(recordings[0] & recordings[1]) if len(lists) == 2 else []
        if self.clean or split == "all":
            every = {segment.id: segment for each in lists.values() for segment in each}.values()
            return classes, [s for s in every if split == "all" or _tested(s) == (split == "test")]
        if self.leak and split != "test":
            told = f"{len(self.leak)} of the {len(recordings[1])} recordings of the test list also"
            warn(f"split: {told} occur in the training list; epic-object-clean divides by them")
        return classes, lists["test" if split == "test" else "train"]

    def held_out(self, clip: Segment) -> bool:
        """Tell whether a clip is of the tenth of the recordings that is in "val"."""
        return super().held_out(clip._replace(id=clip.recording))

    def locate(self, root: Path, listed: list[Segment]) -> dict[str, Path]:
        """Return where the clips are, by id: their own videos or folders before a recording."""
        found = super().locate(root, listed)
        for segment in listed:  # a recording is asked for names, not listed: it may be huge
            person = segment.recording.partition("_")[0]
            folders = [root / place / who for place in _RECORDINGS_IN for who in (person, "")]
            for folder in (each / segment.recording for each in folders):
                if segment.id not in found and next(_images(folder, segment), None):
                    found[segment.id] = folder
        return found

    def id_of(self, name: str) -> str | None:
        """Return the id with which the name of a clip's own video or folder ends."""
        match = re.fullmatch("(?:.*-)?(P[0-9]+_[0-9]+_[0-9]+)", name)
        return match and match[1]

    def source(self, i: int):
        """Return what clip ``i`` is read from: of a recording, the images that belong to it."""
        segment, path = self.listed[i], self.paths[i]
        return list(_images(path, segment)) if path.name == segment.recording else path

    def numbers(self, i: int) -> list[int]:
        """Return the frame number in the recording of each frame that clip ``i`` has on disk."""
        segment, source = self.listed[i], self.source(i)
        if isinstance(source, list):
            return [int(image.stem.partition("_")[2]) for image in source]
        even = np.linspace(segment.start, segment.stop, self.length(i))
        return even.round().astype(int).tolist()

    def boxes(self, i: int, indices: list[int]) -> list[Tensor]:
        """Return the boxes of clip ``i`` at the positions ``indices``, as in `boxes_at`."""
        numbers = self.numbers(i)
        return boxes_at(self.listed[i].boxes, [numbers[index] for index in indices], self.size)


@dataset("epic-object-clean", label="EPIC-Object, by recording", **_FACTS)
class EpicObjectClean(EpicObject):
    """The clips of both lists of `EpicObject`, divided anew: 15 % of the recordings for testing.

    (Striking the recordings of the test list from the training list would leave 158 of its first
    1,999 rows.) The paper's numbers do not belong beside this split, so it has a name of its own.
    """

    name = "epic-object-clean"
    clean = True


def boxes_at(boxes: dict, frames, size, reach: int = REACH) -> list[Tensor]:
    """Return the boxes at some frames, in pixels of a clip of ``size``.

    Parameters
    ----------
    boxes : dict
        `Segment.boxes`.
    frames : list of int
        Frame numbers of the recording.
    size : int or (int, int)
        Side, or height and width, of the clip.
    reach : int, default 15
        How far the annotated frame may be; of two equally near, the earlier counts.

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


def read_classes(path) -> list[str]:
    """Read the class index, columns ``noun`` and ``noun_label``: the nouns in order.

    Raises
    ------
    ValueError
        No such columns, or labels other than 0, 1, … K − 1.
    """
    columns = {"noun": (".+", "a word"), "noun_label": _WHOLE}
    rows = _rows(path, "class_list", columns)
    return class_names({row["noun"]: int(row["noun_label"]) for _, row in rows}, path)


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
    nouns, found = ("|".join(map(re.escape, classes)), "one of " + ", ".join(classes)), []
    for at, row in _rows(path, "split_list", {"noun": nouns} | _COLUMNS):
        label, start, stop = (int(row[k]) for k in ("noun_label", "start_frame", "stop_frame"))
        target = classes.index(row["noun"])
        given = f"noun_label {label} of {row['noun']!r} {at}"
        require(label == target, "split_list", given, f"{target}, as in the class index")
        given = f"start_frame {start}, stop_frame {stop} {at}"
        require(1 <= start <= stop, "split_list", given, "1 <= start_frame <= stop_frame")
        require(stop - start < LONGEST, "split_list", given, f"at most {LONGEST} frames")
        id_, boxes = f"{row['video_id']}_{row['seg_id']}", _boxes(row["bounding_boxes"])
        found.append(Segment(id_, row["video_id"], target, start, stop, boxes))
    return found


def _rows(path, argument: str, columns: dict) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row of a CSV file, and in words where it is.

    ``columns`` has for each column that is needed a pattern of its values, and what that is in
    words. Rows are read one by one: a file that is wrong from the start is not read to its end.

    Raises
    ------
    ValueError
        No text, no rows, a column that is not there, a value that does not fit.
    """
    row = None
    try:
        reader = csv.DictReader(io.StringIO(content(path, argument).decode(), newline=""))
        lacking = ", ".join(column for column in columns if column not in (reader.fieldnames or ()))
        require(not lacking, argument, f"'{path}' without column {lacking}", ", ".join(columns))
        for row in reader:
            at = f"in line {reader.line_num} of '{path}'"
            for column, (pattern, expected) in columns.items():
                given = f"{column} {(row[column] or '')[:60]!r} {at}"
                require(bool(re.fullmatch(pattern, row[column] or "")), argument, given, expected)
            yield at, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: got '{path}' ({error}), expected a CSV file") from error
    require(row is not None, argument, f"'{path}' without rows", "at least one")


def _boxes(text: str) -> dict[int, np.ndarray]:
    """Return of each frame the boxes, (n, 4): x, y, width, height."""
    boxes = {}
    for frame, rows in re.findall(r"([0-9]+): ?(\(.*?\)|\[.*?\])", text):
        sides = np.array(re.findall(_NUMBER, rows), float).reshape(-1, 4)
        boxes[int(frame)] = sides[:, [1, 0, 3, 2]]
    return boxes


def _tested(segment: Segment) -> bool:
    """Tell whether the clean split tests on a segment: not drawn as `held_out` draws."""
    return position(f"clean/{segment.recording}") >= 1 - CLEAN_TEST


def _images(folder: Path, segment: Segment):
    """Yield the images of a segment that are in the folder of its recording."""
    if folder.is_dir():
        for number in range(segment.start, segment.stop + 1):
            image = folder / FRAME.format(number)
            if image.is_file():
                yield image
