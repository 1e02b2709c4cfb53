"""Datasets: the three generated stand-ins, UCF101-24, and a plain folder of videos."""

from pathlib import Path

from stepkit.checks import one_of, require
from stepkit.data.folder import Folder
from stepkit.data.sample import Batch, Sample, batch, collate
from stepkit.data.synthetic import CLASSES, Synthetic
from stepkit.data.ucf101 import UCF101

__all__ = ["UCF101", "Batch", "Folder", "Sample", "Synthetic", "batch", "collate", "load_dataset"]

# Parts of each video for training, choosing a checkpoint, and explaining, where too few videos are
# at hand to hold whole ones out.
PARTS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}


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
        For UCF101-24 the last group of scenes of the training list, g25, is the validation part.
        ``"appearance"``, ``"object"``, ``"motion"`` (generated), ``"ucf101-24"`` or ``"folder"``.
    split : str
        ``"train"``, ``"val"`` or ``"test"``.
    frames, size : int
        T, and H = W or (H, W).
    n : int
        Number of clips for generated data.
    data : str
        Folder that holds real data: the class folders for ``"folder"``, and for ``"ucf101-24"``
        the dataset itself or a folder with ``ucf101-24`` in it.
    parts : bool
        Split each video in time instead of splitting the list of videos: a demonstration for a
        handful of videos, not a benchmark. Every annotated video on disk is then used.
    seed : int
        Of generation and of training-time sampling.
    """
    one_of("name", name, (*CLASSES, "ucf101-24", "folder"))
    one_of("split", split, PARTS)
    if name in CLASSES:
        return Synthetic(name, split, n=n, frames=frames, size=size, seed=seed)
    require(bool(data), "data", repr(data), f"the folder that holds {name}")
    mode = "train" if split == "train" else "test"
    options = {"frames": frames, "size": size, "mode": mode, "seed": seed}
    if parts:
        options["part"] = PARTS[split]
    if name == "folder":
        return Folder(data, split=None if parts else split, **options)
    root = Path(data) / name if (Path(data) / name).is_dir() else Path(data)
    if parts:
        return UCF101(root, split="all", **options)
    listed = "test" if split == "test" else "train"
    groups = {"train": range(1, 25), "val": [25], "test": None}[split]
    return UCF101(root, split=listed, groups=groups, **options)
