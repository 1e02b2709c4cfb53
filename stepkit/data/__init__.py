"""Datasets: generated stand-ins, the paper's three from disk, a plain folder of videos."""

import inspect
from pathlib import Path

from stepkit._checks import require
from stepkit._registry import bring
from stepkit.data import epic, scenes, something, ucf101  # noqa: F401  # they register themselves
from stepkit.data.files import Folder
from stepkit.data.sample import DATASETS, Batch, Sample, as_dataset, batch, dataset
from stepkit.data.synthetic import Synthetic

__all__ = ["DATASETS", "Batch", "Folder", "Sample", "Synthetic", "batch", "dataset", "load_dataset"]


def load_dataset(
    name, split, *, frames, size, n=0, data="", parts=False, seed=0, extra="", **options
):
    """Return one split of a dataset by its name, as the notebooks ask for it.

    Parameters
    ----------
    name : str, callable, dataset or list of Sample
        ``"appearance"``, ``"object"``, ``"motion"`` (generated), ``"needle"``, ``"decoy"``,
        ``"course"`` (generated, harder); ``"ucf101-24"``,
        ``"epic-object"``, ``"something-v2"`` (the paper's); ``"epic-object-clean"``, divided by
        recording, see `stepkit.data.epic`; ``"folder"``; what `dataset` made known, or could have.
        A dataset or a list of samples is itself, for every split.
    split : str
        ``"train"``, ``"val"`` or ``"test"``; of data on disk also ``"all"``: every clip that is
        there. Of the paper's datasets "test" is the published validation list, and "val" a part of
        the training list: of UCF101-24 the last group of scenes, g25, else a tenth of the
        recordings or videos.
    frames : int
    size : int or (int, int)
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
    extra : str
        A module of one's own, by its dotted name: what it registers is known.
    options
        Of the dataset itself, as ``missing="skip"``.

    Raises
    ------
    ValueError
        An unknown name, no ``data`` where it is needed, or as the dataset.

    Examples
    --------
    >>> load_dataset("motion", "test", n=6, frames=8, size=48).classes[:2]
    ['left', 'right']
    """
    bring(extra)
    if not (isinstance(name, str) or callable(name)):
        return as_dataset(name)
    known = DATASETS.find(name)
    takes = inspect.signature(known.run).parameters
    needs = "root" in takes and takes["root"].default is inspect.Parameter.empty
    require(bool(data) or not needs, "data", repr(data), f"the folder that holds {known.name}")
    root = Path(data) / known.folder
    given = {"split": split, "n": n, "frames": frames, "size": size, "seed": seed, "parts": parts}
    given["root"] = root if root.is_dir() else Path(data)
    given = {argument: value for argument, value in given.items() if argument in takes}
    return as_dataset(known.run(**given, **options), known.name)
