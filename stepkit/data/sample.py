"""What every dataset of stepkit hands out: a `Sample`; several of them make a `Batch`.

A dataset is a map-style ``torch.utils.data.Dataset`` with the attributes ``name`` (an id of the
paper's tables or of a stand-in), ``split``, ``classes`` (names, in order of their index), ``ids``
(one string per sample, of which `file_name` makes the name of a file), ``targets`` (one class index
per sample), ``frames``, ``size``, ``seed`` and ``epoch``, whose items are samples. With ``facts()``
it may tell what its samples depend on, for the key of a training (`stepkit._keys.data`), which
otherwise hashes them all.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

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
