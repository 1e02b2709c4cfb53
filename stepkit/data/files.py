"""Clips in files: a folder of class folders, and what every dataset of files shares.

Datasets whose clips are named by lists: `stepkit.data.listed`.
"""

import functools
import hashlib
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import av
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepkit import _keys
from stepkit._checks import one_of, require, warn
from stepkit._sources import IMAGES, images
from stepkit.clips import frame_count, normalise, read_frames, sample_frames
from stepkit.data.sample import Sample, dataset, described

__all__ = ["PARTS", "SHARES", "VIDEOS", "ClipFiles", "Folder", "find_clips", "position"]

# of two files of one name the first listed counts: the containers that datasets come in lead
_SUFFIXES = (
    "avi mp4 webm mkv mov m4v mpg mpeg wmv flv gif ts mts m2ts m2t vob m2v m1v mpe mod tod 3gp 3g2 "
    "f4v ogv ogg asf divx xvid mxf gxf dv qt mj2 mjpeg mjpg h264 264 avc h265 265 hevc ivf av1 obu "
    "nut rm rmvb wtv y4m apng webp avif"
)
VIDEOS = tuple(f".{suffix}" for suffix in _SUFFIXES.split())
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}  # of the clips of a folder
# Of the frames of each video, where too few videos are at hand to hold whole ones out.
PARTS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0), "all": (0.0, 1.0)}


class ClipFiles(Dataset):
    """Clips decoded on demand; the part of a dataset that does not depend on whose files they are.

    Samples of the split "train" are drawn from (``seed``, ``epoch``, id): they depend neither on
    the worker that draws them nor on the global random state, which stays untouched.

    Parameters
    ----------
    name : str
    split : {"train", "val", "test", "all"}
        Frames are chosen as `stepkit.clips.sample_frames` does: at random for "train".
    classes : list of str
    clips : list of (str, Path, int)
        Id, video file or folder of frames, and class index of each clip.
    frames : int, default 16
        T.
    size : int or (int, int), default 112
        Side, or height and width, in pixels; frames are squashed to it.
    seed : int, default 0
    parts : bool, default False
        Choose from a part of each clip's frames: "train" from the first 60 %, "val" from the next
        15 %, "test" from the rest. These are other clips: ``@0.75-1`` ends their ids.

    Attributes
    ----------
    seed, epoch : int
        Settable. Workers that live on from one epoch to the next (``persistent_workers=True``)
        keep the epoch they were started with.
    mode : {"train", "test"}
        Settable.
    paths : list of Path
    targets : list of int

    Raises
    ------
    ValueError
        Two clips of one id, no clip at all; on access, a video that does not decode or that has no
        frame in its part.
    """

    def __init__(self, name, split, classes, clips, frames=16, size=112, seed=0, parts=False):
        require(bool(clips), "split", f"no clip in {split!r}", "at least one")
        self.name, self.split, self.classes = name, split, classes
        self.frames, self.size, self.seed, self.epoch = frames, size, seed, 0
        self.mode = "train" if split == "train" else "test"
        self.part = PARTS[split if parts else "all"]
        ids, self.paths, self.targets = map(list, zip(*clips, strict=True))
        suffix = "" if self.part == PARTS["all"] else "@{:g}-{:g}".format(*self.part)
        self.ids = [id_ + suffix for id_ in ids]
        require(len(set(self.ids)) == len(self.ids), "root", "clips of one id", "unique names")
        # 0: not counted yet. Shared, so that what one worker has counted is known to all.
        self._counts = torch.zeros(len(clips), dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        indices = self.sampled(i)
        rgb = read_frames(self.source(i), indices, self.size)
        clip = normalise(rgb.permute(3, 0, 1, 2).float().contiguous() / 255)
        return Sample(clip, self.targets[i], self.ids[i], self.boxes(i, indices))

    def sampled(self, i: int) -> list[int]:
        """Return the positions of the frames that clip ``i`` shows in this epoch."""
        n = self.length(i)
        start, stop = (int(share * n) for share in self.part)
        given = f"{self.part} of the {n} frames of '{self.paths[i]}'"
        require(start < stop, "parts", given, "at least one frame")
        drawn_from = f"{self.seed}/{self.epoch}/{self.ids[i]}"
        generator = torch.Generator().manual_seed(_hash(drawn_from))
        return sample_frames(n, self.frames, self.mode, start, stop, generator)

    def length(self, i: int) -> int:
        """Return how many frames clip ``i`` has on disk; they are counted once."""
        if not self._counts[i]:
            self._counts[i] = frame_count(self.source(i))
        return int(self._counts[i])

    def facts(self) -> dict:
        """Return what the samples of all epochs depend on, see `stepkit._keys.data`.

        Every file is read for it, once in a process.
        """
        files = _keys.key(files=[_hashes(self.source(i)) for i in range(len(self))])
        code = [_keys.library("data/", "clips.py", "_sources.py", "_video.py"), av.__version__]
        return described(self, "split frames size mode part seed", code, files=files)

    # what a dataset may know better

    def source(self, i: int):
        """Return what clip ``i`` is read from: a video, a folder of images, or a list of these."""
        return self.paths[i]

    def boxes(self, i: int, indices: list[int]) -> list[Tensor]:
        """Return the boxes of clip ``i`` at the frames ``indices``: none are known."""
        return []


@dataset("folder", label="Own videos", about="a folder of class folders, with videos of your own")
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
    split : {"all", "train", "val", "test"}, default "all"
    frames, size, seed, parts
        As in `ClipFiles`; ``parts`` are of all clips.
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

    def __init__(self, root, split="all", frames=16, size=112, seed=0, parts=False, group=None):
        one_of("split", split, PARTS)
        root, wanted = Path(root), "all" if parts else split
        tops = [folder.name for folder in subfolders(root)]
        divided = bool(tops) and set(tops) <= set(SHARES)
        if divided:
            one_of("split", wanted, ("all", *tops))
            require(group is None, "group", "a function", "None: folders make the splits")
        above = [root / top for top in tops] if divided else [root]
        folders = [folder for each in above for folder in subfolders(each)]
        classes = sorted({folder.name for folder in folders})  # of all splits: one index in each
        found, strays = [], []
        for folder in folders:
            inside, others = find_clips(folder)
            require(bool(inside), "root", f"'{folder}' without clips", "videos or frame folders")
            found += inside.items()
            strays += others
        if strays:
            named = ", ".join(path.relative_to(root).as_posix() for path in strays[:5])
            told = f"root: {len(strays)} files under '{root}' are no clips and left out: {named}"
            warn(told + (", …" if len(strays) > 5 else ""))
        own = [p.parent.parent.name for _, p in found] if divided else _divide(found, group)
        clips = [
            ("__".join((*path.relative_to(root).parts[:-1], name)), path)
            for (name, path), split_of in zip(found, own, strict=True)
            if wanted in ("all", split_of)
        ]
        clips = [(id_, path, classes.index(path.parent.name)) for id_, path in clips]
        super().__init__(root.resolve().name, split, classes, clips, frames, size, seed, parts)


def _divide(found: list[tuple[str, Path]], group: Callable[[Path], str] | None) -> list[str]:
    """Return the split of each clip: of its name among those of its class, or of its group."""
    units = [(None, group(path)) if group else (path.parent, name) for name, path in found]
    pools = {pool for pool, _ in units}
    splits = {pool: _splits({name for of, name in units if of == pool}) for pool in pools}
    return [splits[pool][unit] for pool, unit in units]


def _splits(names: set[str]) -> dict[str, str]:
    """Return the split of each name: its hash tells, but of three names none stays empty."""
    ranked = sorted(names, key=position)
    places = [position(name) for name in ranked]
    low = bisect_left(places, SHARES["train"])
    high = bisect_left(places, SHARES["train"] + SHARES["val"])
    if len(ranked) >= 3:
        low = min(max(low, 1), len(ranked) - 2)
        high = min(max(high, low + 1), len(ranked) - 1)
    parts = {"train": ranked[:low], "val": ranked[low:high], "test": ranked[high:]}
    return {name: split for split, part in parts.items() for name in part}


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, sorted by name, without hidden ones."""
    if not folder.is_dir():
        raise FileNotFoundError(f"root: got '{folder}', expected an existing folder")
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def find_clips(folder: Path, wanted=lambda name: True) -> tuple[dict[str, Path], list[Path]]:
    """Find the videos and the folders of frames that lie in ``folder``, by name without suffix.

    Of two of one name the first of `VIDEOS` counts, a folder last. Only names that are ``wanted``
    are looked at. Files of other kinds are returned, too.
    """
    found, strays = {}, []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not wanted(path.stem):
            continue
        if path.is_dir() and any(file.suffix.lower() in IMAGES for file in path.iterdir()):
            found[path.name] = min(path, found.get(path.name, path), key=_preference)
        elif path.is_file() and path.suffix.lower() in VIDEOS:
            found[path.stem] = min(path, found.get(path.stem, path), key=_preference)
        elif path.is_file():
            strays.append(path)
    return found, strays


def _preference(path: Path) -> int:
    return len(VIDEOS) if path.is_dir() else VIDEOS.index(path.suffix.lower())


def position(name: str) -> float:
    """Return a number in [0, 1) that belongs to ``name`` on every machine: splits are cut by it."""
    return (_hash(name) >> 10) / 2**53


def _hash(text: str) -> int:
    """Return 63 bits that are the same in every process, which ``hash`` does not promise."""
    data = text.encode("utf-8", "surrogatepass")  # a file may be called anything
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def _hashes(source) -> list:
    """Return name and hash of each file that a source is read from."""
    is_file = isinstance(source, Path) and source.is_file()
    files = [source] if is_file else images(source)
    return [[f.name, _content_hash(f, f.stat().st_size, f.stat().st_mtime_ns)] for f in files]


@functools.lru_cache(1_000_000)  # of all notebooks of a run, and of its workers' threads
def _content_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
