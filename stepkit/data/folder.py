"""Clips of one's own: a folder of class folders; and what every dataset of files on disk shares."""

import functools
import hashlib
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import av
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepkit import _keys
from stepkit._checks import one_of, require
from stepkit._sources import IMAGES
from stepkit.clips import frame_count, normalise, read_frames, sample_frames
from stepkit.data.sample import Sample

# of two files of one name the first listed counts: the containers that datasets come in lead
_SUFFIXES = (
    "avi mp4 webm mkv mov m4v mpg mpeg wmv flv gif ts mts m2ts m2t vob m2v m1v mpe mod tod 3gp 3g2 "
    "f4v ogv ogg asf divx xvid mxf gxf dv qt mj2 mjpeg mjpg h264 264 avc h265 265 hevc ivf av1 obu "
    "nut rm rmvb wtv y4m apng webp avif"
)
VIDEOS = tuple(f".{suffix}" for suffix in _SUFFIXES.split())
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


class ClipFiles(Dataset):
    """Clips decoded on demand; the part of a dataset that does not depend on whose files they are.

    Samples in train mode are drawn from (``seed``, ``epoch``, id): they depend neither on the
    worker that draws them nor on the global random state, which stays untouched.

    Parameters
    ----------
    name, split : str
    classes : list of str
    clips : list of (str, Path, int)
        Id, video file or folder of frames, and class index of each clip.
    frames : int, default 16
        T.
    size : int or (int, int), default 112
        Side, or height and width, in pixels; frames are squashed to it.
    mode : {"test", "train"}, default "test"
        How `stepkit.clips.sample_frames` chooses the frames.
    part : (float, float), default (0.0, 1.0)
        Share of the frames on disk to choose from: a model trained on ``(0.0, 0.7)`` has not seen
        the frames of ``(0.7, 1.0)``. Another part is another clip: ``@0.7-1`` ends its id.
    seed : int, default 0

    Attributes
    ----------
    seed, epoch : int
        Settable. Workers that live on from one epoch to the next (``persistent_workers=True``)
        keep the epoch they were started with.
    paths : list of Path
    targets : list of int

    Raises
    ------
    ValueError
        An argument outside its range, two clips of one id, no clip at all; on access, a video that
        does not decode or that has no frame in ``part``.
    """

    def __init__(
        self, name, split, classes, clips, frames=16, size=112, mode="test", part=(0, 1), seed=0
    ):
        one_of("mode", mode, ("test", "train"))
        require(len(part) == 2 and 0 <= part[0] < part[1] <= 1, "part", part, "0 <= a < b <= 1")
        require(bool(clips), "split", f"no clip in {split!r}", "at least one")
        self.name, self.split, self.classes = name, split, classes
        self.frames, self.size, self.mode, self.part = frames, size, mode, part
        self.seed, self.epoch = seed, 0
        ids, self.paths, self.targets = map(list, zip(*clips, strict=True))
        self.ids = (
            ids if tuple(part) == (0, 1) else [f"{id_}@{part[0]:g}-{part[1]:g}" for id_ in ids]
        )
        require(len(set(self.ids)) == len(self.ids), "root", "clips of one id", "unique names")
        # 0: not counted yet. Shared, so that what one worker has counted is known to all.
        self._counts = torch.zeros(len(clips), dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        indices = self.sampled(i)
        rgb = self.read(i, indices)
        clip = normalise(rgb.permute(3, 0, 1, 2).float().contiguous() / 255)
        return Sample(clip, self.targets[i], self.ids[i], self.boxes(i, indices))

    def sampled(self, i: int) -> list[int]:
        """Return the positions of the frames that clip ``i`` shows in this epoch."""
        n = self.length(i)
        start, stop = (int(share * n) for share in self.part)
        given = f"{self.part} of the {n} frames of '{self.paths[i]}'"
        require(start < stop, "part", given, "at least one frame")
        generator = None
        if self.mode == "train":
            drawn_from = f"{self.seed}/{self.epoch}/{self.ids[i]}"
            generator = torch.Generator().manual_seed(_hash(drawn_from))
        return sample_frames(n, self.frames, self.mode, start, stop, generator)

    def length(self, i: int) -> int:
        """Return how many frames clip ``i`` has on disk; they are counted once."""
        if not self._counts[i]:
            self._counts[i] = self.count(i)
        return int(self._counts[i])

    def facts(self) -> dict:
        """Return what the samples of all epochs depend on, see `stepkit._keys.data`.

        Every file is read for it, once in a process.
        """
        names = "split", "frames", "size", "mode", "part", "seed"
        facts = {name: getattr(self, name) for name in names}
        hashed = [[file_hash(file) for file in self.files(i)] for i in range(len(self))]
        labels = _keys.key(targets=self.targets, ids=self.ids, classes=list(self.classes))
        code = [_keys.library("data/", "clips.py", "sources.py", "_video.py"), av.__version__]
        return facts | {"files": _keys.key(files=hashed), "labels": labels, "code": code}

    # what a dataset may know better

    def files(self, i: int) -> list[Path]:
        """Return the files that clip ``i`` is read from, in order."""
        path = self.paths[i]
        return sorted(path.iterdir()) if path.is_dir() else [path]

    def count(self, i: int) -> int:
        """Count the frames of clip ``i`` on disk."""
        return frame_count(self.paths[i])

    def read(self, i: int, indices: list[int]) -> Tensor:
        """Return the frames of clip ``i`` at the positions ``indices``: uint8 (T, H, W, 3)."""
        return read_frames(self.paths[i], indices, self.size)

    def boxes(self, i: int, indices: list[int]) -> list[Tensor]:
        """Return the boxes of clip ``i`` at the frames ``indices``: none are known."""
        return []


class Folder(ClipFiles):
    """A folder of class folders, each with videos or folders of frames.

    Classes are sorted by name. Where every folder under ``root`` is called train, val or test,
    these are the splits; elsewhere a hash of the file name puts about 70 % of the clips into train,
    15 % into val and 15 % into test, the same on every machine and also after clips are added. Of
    a class of three clips or more at least one is in each split: in a class so small that its
    hashes leave a split empty, a clip next to the border moves, and may move back when clips are
    added. Of a video and a folder of frames of the same name the video counts. Files that are no
    clips are named in one warning.

    Parameters
    ----------
    root : str or Path
    frames, size, mode, part, seed
        As in `ClipFiles`.
    split : {None, "train", "val", "test"}, default None
        None: all clips.
    group : callable, optional
        From the path of a clip to a string that is hashed in place of the file name. Clips that
        share a scene or a recording belong into one split: of three such strings or more in the
        whole folder at least one is in each split.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        A class folder without clips, an unknown split, or as `ClipFiles`.

    Examples
    --------
    >>> Folder("my_videos", split="train").classes  # doctest: +SKIP
    ['cooking', 'running']
    """

    def __init__(
        self,
        root,
        frames: int = 16,
        size: int | tuple[int, int] = 112,
        mode: str = "test",
        split: str | None = None,
        part: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        group: Callable[[Path], str] | None = None,
    ):
        root = Path(root)
        one_of("split", split, (None, *SHARES))
        tops = {folder.name for folder in subfolders(root)}
        divided = bool(tops) and tops <= set(SHARES)
        if divided:
            one_of("split", split, (None, *sorted(tops)))
            require(group is None, "group", "a function", "None: folders make the splits")
        parts = [root / top for top in sorted(tops)] if divided else [root]
        # of all splits: a class has one index in each of them
        classes = sorted({folder.name for part_of in parts for folder in subfolders(part_of)})
        found, strays = [], []
        for folder in (each for part_of in parts for each in subfolders(part_of)):
            inside = find_clips(folder, strays=strays)
            require(bool(inside), "root", f"'{folder}' without clips", "videos or frame folders")
            found += [(folder, name, path) for name, path in inside.items()]
        if strays:
            named = ", ".join(path.relative_to(root).as_posix() for path in strays[:5])
            more = ", …" if len(strays) > 5 else ""
            said = f"root: {len(strays)} files under '{root}' are no clips and left out"
            warnings.warn(f"{said}: {named}{more}", stacklevel=2)
        pools = {}  # what is divided: the names in each class, or the groups
        for folder, name, path in found:
            pools.setdefault(None if group else folder, []).append(group(path) if group else name)
        splits = {pool: _splits(names) for pool, names in pools.items()}
        clips = []
        for folder, name, path in found:
            own = splits[None][group(path)] if group else splits[folder][name]
            if split in (None, folder.parent.name if divided else own):
                id_ = "__".join((*path.relative_to(root).parts[:-1], name))
                clips.append((id_, path, classes.index(folder.name)))
        super().__init__(
            root.resolve().name, split or "all", classes, clips, frames, size, mode, part, seed
        )


def file_hash(path: Path) -> list:
    """Return a file's name and a hash of its content; hidden files and folders have none."""
    if path.name.startswith(".") or not path.is_file():
        return [path.name]
    known = path.stat()
    return [path.name, _content_hash(path, known.st_size, known.st_mtime_ns)]


@functools.lru_cache(1_000_000)  # of all notebooks of a run, and of its workers' threads
def _content_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, sorted by name, without hidden ones."""
    if not folder.is_dir():
        raise FileNotFoundError(f"root: got '{folder}', expected an existing folder")
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def find_clips(
    folder: Path, named: re.Pattern | None = None, strays: list | None = None
) -> dict[str, Path]:
    """Find the videos and the folders of frames that lie in ``folder``, by name without suffix.

    With ``named``, only those whose name, without suffix, is matched in full: no other folder is
    looked into. Files of other kinds go to ``strays``.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or (named and not named.fullmatch(path.stem)):
            continue
        if path.is_dir() and any(file.suffix.lower() in IMAGES for file in path.iterdir()):
            found[path.name] = min(path, found.get(path.name, path), key=_preference)
        elif path.is_file() and suffix in VIDEOS:
            found[path.stem] = min(path, found.get(path.stem, path), key=_preference)
        elif path.is_file() and strays is not None:
            strays.append(path)
    return found


def find_clip(root: Path, places, name: str) -> Path | None:
    """Return the video or the folder called ``name`` of the first of ``places`` that has it."""
    for place in places:
        for suffix in (*VIDEOS, ""):
            path = root / place / f"{name}{suffix}"
            if path.is_file() if suffix else path.is_dir():
                return path
    return None


def _preference(path: Path) -> int:
    return len(VIDEOS) if path.is_dir() else VIDEOS.index(path.suffix.lower())


def position(name: str) -> float:
    """Return a number in [0, 1) that belongs to ``name`` on every machine: splits are cut by it."""
    return (_hash(name) >> 10) / 2**53


def _splits(names: list[str]) -> dict[str, str]:
    """Return the split of each name: its hash tells, but of three names none stays empty."""
    ranked = sorted(set(names), key=position)
    places = [position(name) for name in ranked]
    low = bisect_left(places, SHARES["train"])
    high = bisect_left(places, SHARES["train"] + SHARES["val"])
    if len(ranked) >= 3:
        low = min(max(low, 1), len(ranked) - 2)
        high = min(max(high, low + 1), len(ranked) - 1)
    return dict.fromkeys(ranked, "train") | {
        **dict.fromkeys(ranked[low:high], "val"),
        **dict.fromkeys(ranked[high:], "test"),
    }


def _hash(text: str) -> int:
    """Return 63 bits that are the same in every process, which ``hash`` does not promise."""
    data = text.encode("utf-8", "surrogatepass")  # a file may be called anything
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
