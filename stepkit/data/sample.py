"""What every dataset of stepkit hands out: a `Sample`; several of them make a `Batch`.

A dataset has a length and its items are samples; of attributes it has ``name``, ``classes`` (names,
in order of their index), ``ids`` (one string per sample, of which `file_name` makes the name of a
file) and ``targets`` (one class index per sample). To be trained on it may have an ``epoch``, which
is counted up. With ``facts()`` it may tell what its samples depend on, for the key of a training
(`stepkit._keys.data`), which otherwise hashes them all. `as_dataset` makes one of a list of
samples, and `dataset` makes a dataset known by its name.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepkit import _keys
from stepkit._checks import require
from stepkit._registry import Registry

__all__ = ["Batch", "Sample", "as_dataset", "balanced", "batch", "collate", "dataset", "file_name"]

# What leads elsewhere, hides a file, or is reserved by some file system; the form of our own names.
_UNSAFE = re.compile(
    r'[/\\<>:"|?*]|^[.\s]|^$|~[0-9a-f]{16}$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE
)
LONGEST = 195  # bytes: file systems take 255, a suffix and a temporary name need 60


@dataclass(frozen=True)
class Sample:
    """One clip with what is known about it.

    Attributes
    ----------
    clip : Tensor
        float32 (3, T, H, W), normalised.
    target : int
        Class index.
    id : str
        Unique within the dataset; `file_name` makes it a file's name.
    boxes : list of Tensor
        One float32 (n, 4) tensor per frame, ``x0, y0, x1, y1`` in pixels of the clip; n = 0 where
        the frame has no box. Empty list: this dataset has no boxes.
    mask : Tensor or None
        bool (T, H, W), the pixels of the evidence, where they are known.
    """

    clip: Tensor
    target: int
    id: str
    boxes: list[Tensor]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Samples side by side: ``clips`` (N, 3, T, H, W), ``targets`` (N,), and lists of the rest."""

    clips: Tensor
    targets: Tensor
    ids: list[str]
    boxes: list[list[Tensor]]
    masks: Tensor | None

    @property
    def evidence(self) -> Tensor:
        """The pixels of the evidence, bool (N, T, H, W): the masks, or else the boxes filled.

        A pixel belongs to a box if its centre does. A clip without any box has no evidence.
        """
        if self.masks is not None:
            return self.masks
        N, _, T, H, W = self.clips.shape
        filled = torch.zeros(N, T, H, W, dtype=torch.bool)
        x, y = torch.arange(W) + 0.5, torch.arange(H)[:, None] + 0.5
        for clip, frames in zip(filled, self.boxes, strict=True):
            for frame, boxes in zip(clip, frames, strict=False):  # no frames: no boxes at all
                for x0, y0, x1, y1 in boxes.tolist():
                    frame |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        return filled


@dataclass(frozen=True)
class DataSource:
    """What is known of a dataset without loading it; see `dataset`."""

    name: str
    run: Callable
    label: str = ""  # as figures and tables have it
    about: str = ""  # in words: what the clips show, and whose they are
    generated: bool = False  # so many clips as are asked for, of no file
    evidence: str = ""  # what is known of where the evidence is: "masks", "boxes"
    folder: str = ""  # under the one that holds several datasets


DATASETS = Registry("dataset", DataSource)


def dataset(name: str, **facts) -> Callable[[Callable], Callable]:
    """Make what is below known to `stepkit.load_dataset`, tables, studies and sweeps, by its name.

    It is a function or a class that returns one split of a dataset, or a list of samples. It is
    given, by keyword, what it names of ``split``, ``n`` (clips to generate), ``frames``, ``size``,
    ``seed``, ``root`` (the dataset's folder) and ``parts`` (split each video in time).

    Parameters
    ----------
    name : str
    facts
        Fields of `DataSource`.

    Raises
    ------
    ValueError
        A name that is taken, a fact that is unknown.

    Examples
    --------
    >>> @dataset("dark", label="Black clips")
    ... def dark(split, n, frames, size):
    ...     clip = torch.zeros(3, frames, size, size)
    ...     return [Sample(clip, i % 2, f"{split}_{i}", []) for i in range(n)]
    """
    return DATASETS.register(name, **facts)


class Samples(Dataset):
    """A list of samples as a dataset; its classes are called by their numbers unless named."""

    def __init__(self, samples: list[Sample], name: str = "samples", classes=None):
        self.samples, self.name, self.epoch = list(samples), name, 0
        fits = bool(self.samples) and all(isinstance(each, Sample) for each in self.samples)
        require(fits, "dataset", f"{type(samples).__name__} {name!r}", "one Sample or more")
        self.ids = [sample.id for sample in self.samples]
        self.targets = [int(sample.target) for sample in self.samples]
        self.classes = list(classes or map(str, range(max(self.targets) + 1)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]


def as_dataset(given, name: str = "samples"):
    """Return a dataset as it is, and of a list of samples one that is called ``name``."""
    known = ("ids", "classes", "targets", "name")
    return given if all(hasattr(given, each) for each in known) else Samples(given, name)


def described(given, names: str, code: list, **more) -> dict:
    """Return what all samples of a dataset depend on: attributes, by their names, and labels."""
    facts = {name: getattr(given, name) for name in names.split()} | more
    labels = _keys.key(targets=given.targets, ids=given.ids, classes=list(given.classes))
    return facts | {"labels": labels, "code": code}


def file_name(id_: str) -> str:
    """Return a name for files about clip ``id_``, to which up to 60 bytes may be added.

    A harmless id is its own name. Of others (too long, slashes, a leading dot, invisible or
    reserved characters) the readable part stays, and a hash tells them apart.

    Examples
    --------
    >>> file_name("v_Diving_g01_c01"), file_name("../a b")
    ('v_Diving_g01_c01', '_a_b~438881e520593c8a')
    """
    data = id_.encode("utf-8", "surrogatepass")
    if id_.isprintable() and len(data) <= LONGEST and not _UNSAFE.search(id_):
        return id_
    readable = re.sub(r"[^\w@+=-]+", "_", id_, flags=re.ASCII)[:80]
    return f"{readable}~{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def balanced(dataset, n: int, seed: int = 0) -> list[int]:
    """Return the indices of ``n`` samples, or of all if there are fewer, drawn over the classes.

    The classes take turns, in an order that is drawn as well, each with its clips in random order:
    lists on disk are sorted by class, and their first clips are of one. More samples of one seed
    begin with the fewer. If the first ``n`` hold all classes alike, as of generated data, it is
    these.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> by_class = SimpleNamespace(targets=[0, 0, 0, 0, 1, 1, 2], classes="abc")
    >>> sorted(by_class.targets[i] for i in balanced(by_class, 5))
    [0, 0, 1, 1, 2]
    """
    targets = np.asarray(dataset.targets)
    alike = np.ptp(np.bincount(targets[:n], minlength=len(dataset.classes))) <= 1
    if alike or n >= len(targets):
        return list(range(min(n, len(targets))))
    rng = np.random.default_rng(seed)
    drawn, first = rng.permutation(len(targets)), rng.permutation(len(dataset.classes))
    of = targets[drawn]
    turn = pd.Series(of).groupby(of).cumcount()
    return drawn[np.lexsort((first[of], turn))][:n].tolist()


def batch(dataset, indices=None) -> Batch:
    """Collect samples of ``dataset`` (all of them by default) into one `Batch`."""
    return collate([dataset[i] for i in (range(len(dataset)) if indices is None else indices)])


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of equal size; the ``collate_fn`` for a ``DataLoader``."""
    known = all(sample.mask is not None for sample in samples)
    return Batch(
        clips=torch.stack([sample.clip for sample in samples]),
        targets=torch.tensor([sample.target for sample in samples]),
        ids=[sample.id for sample in samples],
        boxes=[sample.boxes for sample in samples],
        masks=torch.stack([sample.mask for sample in samples]) if known else None,
    )
