"""Clips that published lists name: where lists and clips are, splits, boxes, what is missing."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stepkit._checks import one_of, require, warn
from stepkit.data.files import PARTS, ClipFiles, find_clips, position

__all__ = ["Listed", "Video", "boxes_in_clip", "class_names", "content", "find_list"]

HELD_OUT = 0.1  # of a training list: it chooses the checkpoint
MOST_BYTES = 2**24  # of a list or an annotation: several times the largest of the three datasets
_LISTS_IN = ("annotations", "splitfiles", "")  # under a root


class Video(NamedTuple):
    """One video of a list; what is known of its boxes is for its dataset to say."""

    id: str
    target: int
    annotation: dict | None = None


class Listed(ClipFiles):
    """Clips that published lists name, under one root; the base of the paper's three datasets.

    A dataset of this kind says in `read_lists` what its lists hold, in ``places`` or `locate` where
    its clips are, in `id_of` what their names say, and in `boxes` which boxes they have.

    Parameters
    ----------
    root : str or Path
        As the dataset's module describes.
    split : {"test", "train", "val", "all"}, default "test"
        "test" is the published list for testing or validation, "train" and "val" divide the one for
        training: `held_out` says how. "all" is every clip of the lists that is on disk.
    frames, size, seed
        As in `ClipFiles`.
    parts : bool, default False
        As in `ClipFiles`: of all clips.
    missing : {"error", "skip"}, default "error"
        What to do about clips that the list names and the disk does not have.

    Attributes
    ----------
    listed : list
        What the list says of each clip.
    missing : list of str
        The ids of those that were skipped.

    Raises
    ------
    FileNotFoundError
        No such folder or list; clips are missing and ``missing="error"``.
    ValueError
        A list that is malformed (file and place are named), or as `ClipFiles`.
    """

    name, places = "", ()

    def __init__(
        self, root, split="test", frames=16, size=112, seed=0, parts=False, missing="error"
    ):
        one_of("split", split, PARTS)
        one_of("missing", missing, ("error", "skip"))
        root, wanted = Path(root), "all" if parts else split
        self.classes, listed = self.read_lists(root, wanted)
        if wanted in ("train", "val"):
            listed = [clip for clip in listed if self.held_out(clip) == (wanted == "val")]
        where = self.locate(root, listed)
        lost = [clip.id for clip in listed if clip.id not in where]
        self.missing = [] if wanted == "all" else lost
        if self.missing:
            named = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
            told = f"root: {len(lost)} of {len(listed)} listed clips not under '{root}': {named}"
            if missing == "error":
                raise FileNotFoundError(f"{told}; missing='skip' leaves them out")
            warn(f"{told}; left out")
        self.listed = [clip for clip in listed if clip.id in where]
        clips = [(clip.id, where[clip.id], clip.target) for clip in self.listed]
        super().__init__(self.name, split, self.classes, clips, frames, size, seed, parts)

    def read_lists(self, root: Path, split: str) -> tuple[list[str], list]:
        """Return the classes, and of each listed clip a tuple with an ``id`` and a ``target``."""
        raise NotImplementedError

    def held_out(self, clip) -> bool:
        """Tell whether a clip of the training list is in "val": a tenth, drawn from its id."""
        return position(clip.id) >= 1 - HELD_OUT

    def locate(self, root: Path, listed: list) -> dict[str, Path]:
        """Return where the clips are that are there, by id: in the first of the ``places``."""
        wanted, found = {clip.id for clip in listed}, {}
        for folder in [root / place for place in reversed(self.places)]:
            if folder.is_dir():
                clips, _ = find_clips(folder, lambda name: self.id_of(name) in wanted)
                found |= {self.id_of(name): path for name, path in clips.items()}
        return found

    def id_of(self, name: str) -> str | None:
        """Return the id of the clip whose file, without suffix, or folder has this name."""
        return name


def find_list(root: Path, *patterns: str) -> Path:
    """Return the first file under ``root``, or in its ``annotations/``, that fits a pattern.

    Raises
    ------
    FileNotFoundError
        None does; the message names all places.
    """
    tried = [(root / folder, pattern) for folder in _LISTS_IN for pattern in patterns]
    for folder, pattern in tried:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                return path
    places = ", ".join(f"'{folder / pattern}'" for folder, pattern in tried)
    raise FileNotFoundError(f"root: expected one of {places}")


def content(path, argument: str) -> bytes:
    """Return the bytes of a list: of a file of at most 16 MiB, neither pipe nor device.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; a larger one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: got '{path}', expected a file")
    size = path.stat().st_size
    require(size <= MOST_BYTES, argument, f"'{path}' of {size} bytes", f"at most {MOST_BYTES}")
    return path.read_bytes()


def class_names(index: dict[str, int], path: Path) -> list[str]:
    """Return the names of ``index`` in order of their numbers, which are 0, 1, … K − 1."""
    fits = bool(index) and sorted(index.values()) == list(range(len(index)))
    given = f"numbers {sorted(index.values())} in '{path}'"
    require(fits, "class_list", given, "one number per class: 0, 1, 2, …")
    return sorted(index, key=index.get)


def boxes_in_clip(boxes, annotated_at: tuple[int, int], size: int | tuple[int, int]) -> Tensor:
    """Return boxes in pixels of a clip of ``size``, to which every frame is squashed whole.

    A box scales by the ratio of ``size`` to the frame it was annotated on: the size of the video
    file cancels out.

    Parameters
    ----------
    boxes : array-like
        (n, 4): x, y, width, height in pixels of the annotated frame; n may be 0.
    annotated_at : (int, int)
        H, W of the annotated frame.
    size : int or (int, int)
        Side, or height and width, of the clip.

    Returns
    -------
    Tensor
        float32 (m, 4), ``x0, y0, x1, y1``, cut to the frame; m < n where boxes lie outside it.
    """
    (height, width), sides = annotated_at, np.broadcast_to(size, 2)[[1, 0, 1, 0]]
    found = np.array(boxes, np.float64).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    found = np.clip(found * (sides / np.array([width, height] * 2)), 0, sides)
    seen = (found[:, 2:] > found[:, :2]).all(1)
    return torch.from_numpy(found[seen].astype(np.float32))
