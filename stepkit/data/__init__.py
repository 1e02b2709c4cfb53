"""Datasets: three generated stand-ins, the paper's three from disk, a plain folder of videos."""

from functools import partial
from pathlib import Path

from stepkit._checks import one_of, require
from stepkit.data.epic import EpicObject
from stepkit.data.folder import Folder
from stepkit.data.sample import Batch, Sample, batch, collate
from stepkit.data.something import SomethingV2
from stepkit.data.synthetic import CLASSES, Synthetic
from stepkit.data.ucf101 import UCF101

__all__ = [
    "UCF101",
    "Batch",
    "EpicObject",
    "Folder",
    "Sample",
    "SomethingV2",
    "Synthetic",
    "batch",
    "collate",
    "load_dataset",
]

# Parts of each video for training, choosing a checkpoint, and explaining, where too few videos are
# at hand to hold whole ones out.
PARTS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}

# What of its list each split is: a tenth of the training list chooses the checkpoint, the last
# group of scenes of UCF101.
SHARES = {"train": (0.0, 0.9), "val": (0.9, 1.0), "test": (0.0, 1.0)}
GROUPS = {"train": range(1, 25), "val": [25], "test": None}

ON_DISK = {
    "ucf101-24": UCF101,
    "epic-object": EpicObject,
    "epic-object-clean": partial(EpicObject, clean=True),
    "something-v2": SomethingV2,
}


def load_dataset(
    name: str,
    split: str,
    *,
    frames: int,
    size: int | tuple[int, int],
    n: int = 0,
    data: str = "",
    parts: bool = False,
    seed: int = 0,
):
    """Return one split of a dataset by its name, as the notebooks ask for it.

    Parameters
    ----------
    name : str
        ``"appearance"``, ``"object"``, ``"motion"`` (generated); ``"ucf101-24"``,
        ``"epic-object"``, ``"something-v2"`` (the paper's); ``"epic-object-clean"``, divided by
        recording, see `EpicObject`; or ``"folder"``.
    split : str
        ``"train"``, ``"val"`` or ``"test"``; of data on disk also ``"all"``: every clip that is
        there. Of the paper's datasets "test" is the published validation list, and "val" a part of
        the training list: of UCF101-24 the last group of scenes, g25, else a tenth of the
        recordings or videos.
    frames, size : int
        T, and H = W or (H, W).
    n : int
        Number of clips for generated data.
    data : str
        Folder that holds real data: the class folders for ``"folder"``, else the dataset itself
        or a folder with the dataset's (``ucf101-24``, ``epic-object``, ``something-v2``) in it.
    parts : bool
        Split each video in time instead of splitting the list of videos: a demonstration for a
        handful of videos, not a benchmark. Every annotated video on disk is then used.
    seed : int
        Of generation and of training-time sampling.
    """
    one_of("name", name, (*CLASSES, *ON_DISK, "folder"))
    one_of("split", split, PARTS if name in CLASSES else (*PARTS, "all"))
    if name in CLASSES:
        return Synthetic(name, split, n=n, frames=frames, size=size, seed=seed)
    require(bool(data), "data", repr(data), f"the folder that holds {name}")
    mode = "train" if split == "train" else "test"
    options = {"frames": frames, "size": size, "mode": mode, "seed": seed}
    whole = parts or split == "all"
    if parts and split != "all":
        options["part"] = PARTS[split]
    if name == "folder":
        return Folder(data, split=None if whole else split, **options)
    root = Path(data) / name.removesuffix("-clean")
    root = root if root.is_dir() else Path(data)
    if whole:
        return ON_DISK[name](root, split="all", **options)
    if name == "ucf101-24":
        options["groups"] = GROUPS[split]
    else:
        options["share"] = SHARES[split]
    return ON_DISK[name](root, split="test" if split == "test" else "train", **options)
