"""Three generated stand-ins for the paper's datasets, with boxes and pixel masks of the evidence.

===============  ==================  ==============================================================
name             stands in for       what decides the class
===============  ==================  ==============================================================
``appearance``   UCF101-24           the pattern on a walking actor (6-12 % of the frame)
``object``       EPIC-Object         the pattern on a small round object (3-5 %) that rides on a
                                     panning and zooming camera
``motion``       Something-V2        how the actor moves: left, right, up, down, nearer, farther;
                                     neither its pattern nor a still frame says anything, nor do
                                     the blobs that sway
===============  ==================  ==============================================================

No still frame of ``motion`` tells its class, not even whether one is told by place or by size.
Height, breadth and (log) size of the actor each have a phase, drawn uniformly from [0, 1) in every
class; the class says which phase runs on, and which way. At 1 it goes on from 0: the actor jumps
back, at a time that is random too. A uniform phase that is moved along a circle is uniform again,
so at each instant place and size are distributed alike, and independently, in every class.

Backgrounds are real photographs (those that ship inside scikit-image); the training, validation and
test parts use different ones. Two distractors move in every clip. Colours are drawn at random, so
that none gives a class away. All of it was chosen once, before any attribution was computed on it.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import skimage
import skimage.data
import skimage.transform
import skimage.util
import torch
from torch.utils.data import Dataset

from stepkit import _keys
from stepkit._checks import one_of, require
from stepkit.clips import normalise
from stepkit.data.sample import Sample, dataset, described

__all__ = ["CLASSES", "PHOTOGRAPHS", "Synthetic"]

CLASSES = {
    "appearance": ["stripes across", "stripes along", "checks", "dots", "rings", "halves"],
    "object": ["stripes across", "stripes along", "checks", "dots", "rings", "halves"],
    "motion": ["left", "right", "up", "down", "nearer", "farther"],
}
PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "coffee", "grass", "hubble_deep_field", "rocket", "moon"),
    "val": ("camera", "immunohistochemistry"),
    "test": ("cat", "coins", "gravel"),
}
_SALT = {"train": 1, "val": 2, "test": 3}


class Synthetic(Dataset):
    """Generated clips with exact ground truth; sample i of a seed is always the same clip.

    Parameters
    ----------
    name : str
        ``"appearance"``, ``"object"`` or ``"motion"``.
    split : str
        ``"train"``, ``"val"`` or ``"test"``: other random numbers on other photographs.
    n : int
        Number of clips; classes take turns, so that they are balanced.
    frames, size : int
        T, and H or (H, W), in pixels. Everything scales with the shorter side.
    seed : int
        Another seed is another dataset.

    Attributes
    ----------
    epoch : int
        0; a training loop counts it up to get fresh clips of the same kind in every epoch.

    Examples
    --------
    >>> sample = Synthetic("appearance", n=4)[0]
    >>> sample.clip.shape, sample.mask.shape, sample.boxes[0].shape
    (torch.Size([3, 8, 48, 48]), torch.Size([8, 48, 48]), torch.Size([1, 4]))
    """

    known, code = CLASSES, ("data/synthetic.py",)

    def __init__(self, name, split="test", n=100, frames=8, size=48, seed=0):
        one_of("name", name, self.known)
        one_of("split", split, PHOTOGRAPHS)
        height, width = (size, size) if isinstance(size, int) else size
        require(n > 0, "n", n, "at least one clip")
        require(frames > 0, "frames", frames, "at least one frame")
        require(min(height, width) >= 24, "size", size, "at least 24 pixels")
        self.name, self.split, self.n, self.seed, self.epoch = name, split, n, seed, 0
        self.frames, self.size = frames, (height, width)
        self.classes = self.known[name]
        self.targets = [i % len(self.classes) for i in range(n)]
        self.ids = [f"{name}_{split}_{seed}_{i:05d}" for i in range(n)]

    def __len__(self):
        return self.n

    def facts(self) -> dict:
        """Return what the samples of all epochs depend on, see `stepkit._keys.data`."""
        code = [_keys.library(*self.code, "clips.py"), skimage.__version__]
        return described(self, "name split n frames size seed", code)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.n:
            raise IndexError(f"clip {i} of {self.n}")
        kind = list(CLASSES).index(self.name)
        rng = np.random.default_rng((self.seed, _SALT[self.split], kind, self.epoch, i))
        target = self.targets[i]
        camera = _camera(rng, self.name, self.frames)
        frames = _background(rng, PHOTOGRAPHS[self.split], camera, self.size)
        for distractor in _distractors(rng, self.name, camera):
            distractor.paint(frames)
        mask = _evidence(rng, self.name, target, camera).paint(frames) > 0.5
        frames += 0.015 * rng.standard_normal(frames.shape, np.float32)
        clip = torch.from_numpy(np.ascontiguousarray(frames.clip(0, 1).transpose(3, 0, 1, 2)))
        boxes = [_box(frame) for frame in mask]
        return Sample(normalise(clip), target, self.ids[i], boxes, torch.from_numpy(mask))


for _name, _about in {
    "appearance": "the pattern on a walking actor tells the class; for UCF101-24",
    "object": "the pattern on a small object before a fast camera does; for EPIC-Object",
    "motion": "how the actor moves does, no still frame; for Something-V2",
}.items():
    _facts = {"label": _name.capitalize(), "about": _about, "generated": True, "evidence": "masks"}
    dataset(_name, **_facts)(functools.partial(Synthetic, _name))


_COURSES = {  # which of the phases of y, x and size runs on, and which way
    "left": (0, -1, 0),
    "right": (0, 1, 0),
    "up": (-1, 0, 0),
    "down": (1, 0, 0),
    "nearer": (0, 0, 1),
    "farther": (0, 0, -1),
}

# Scene lengths are in 1/48 of the frame's shorter side, positions measured from its centre.


@dataclass
class _Camera:
    shift: np.ndarray  # (T, 2) y, x
    zoom: np.ndarray  # (T,)


@dataclass
class _Thing:
    """Something painted over the scene: a silhouette filled with a two-coloured pattern."""

    centre: np.ndarray  # (T, 2) y, x
    scale: np.ndarray  # (T,)
    silhouette: str
    pattern: str
    colours: np.ndarray  # (2, 3)

    def paint(self, frames: np.ndarray) -> np.ndarray:
        """Paint over ``frames`` (T, H, W, 3) in place; return the opacity (T, H, W)."""
        edges = frames.shape[1:3]
        unit = min(edges) / 48
        axes = [(np.arange(e, dtype=np.float32) + 0.5 - e / 2) / unit for e in edges]
        reach = 13 * self.scale.max() + 1  # no silhouette is larger: the rest of the frame stays
        window = tuple(
            slice(*np.searchsorted(at, (path.min() - reach, path.max() + reach)))
            for at, path in zip(axes, self.centre.T, strict=True)
        )
        y, x = (at[part] for at, part in zip(axes, window, strict=True))
        scale = self.scale.astype(np.float32)[:, None, None]
        centre = self.centre.astype(np.float32)[:, :, None, None]
        v = (y[:, None] - centre[:, 0]) / scale  # (T, h, 1)
        u = (x - centre[:, 1]) / scale  # (T, 1, w)
        alpha = np.zeros(frames.shape[:3], np.float32)
        inside = (slice(None), *window)
        alpha[inside] = (_SILHOUETTES[self.silhouette](u, v) * scale * unit + 0.5).clip(0, 1)
        ink = _PATTERNS[self.pattern](u, v)
        shape = (*alpha[inside].shape, 1)
        ink = np.broadcast_to(ink, shape[:-1]).reshape(shape)
        colour = ink * self.colours[0] + (1 - ink) * self.colours[1]
        frames[inside] += alpha[inside][..., None] * (colour - frames[inside])
        return alpha


def _square_wave(phase):
    """0..1 with edges about a pixel wide; ``phase`` in periods."""
    return 0.5 + 0.5 * np.tanh(4 * np.sin(2 * np.pi * phase))


_PATTERNS = {
    "stripes across": lambda u, v: _square_wave(v / 5),
    "stripes along": lambda u, v: _square_wave(u / 5),
    "checks": lambda u, v: (
        0.5 + 0.5 * np.tanh(5 * np.sin(np.pi * u / 3.2) * np.sin(np.pi * v / 3.2))
    ),
    "dots": lambda u, v: (
        0.5 + 0.5 * np.tanh(4 * (np.cos(np.pi * u / 3) * np.cos(np.pi * v / 3) - 0.5))
    ),
    "rings": lambda u, v: _square_wave(np.hypot(u, v) / 5),
    "halves": lambda u, v: 0.5 + 0.5 * np.tanh(2 * v),
    "plain": lambda u, v: np.float32(1),
}

# Signed distance to the outline, positive inside.
_SILHOUETTES = {
    "actor": lambda u, v: np.maximum(
        5.5 - np.hypot(u, np.maximum(np.abs(v - 2) - 5, 0)), 3.2 - np.hypot(u, v + 8)
    ),
    "blob": lambda u, v: 6 - np.hypot(u / 1.2, v * 1.1),
    "disc": lambda u, v: 5.5 - np.hypot(u, v),
}


def _camera(rng, name: str, frames: int) -> _Camera:
    """Slow drift; for ``object`` a fast pan and a zoom, as of a camera worn on the head."""
    clock = np.linspace(-0.5, 0.5, frames)
    reach, zoom = (14, 0.25) if name == "object" else (3, 0.0)
    shift = clock[:, None] * rng.uniform(-reach, reach, 2)
    return _Camera(shift, 1 + clock * rng.uniform(-zoom, zoom))


def _background(rng, photographs, camera: _Camera, size) -> np.ndarray:
    """Film a photograph: float32 (T, H, W, 3) in [0, 1]."""
    photo = _photograph(photographs[rng.integers(len(photographs))], min(size))
    unit = min(size) / 48
    margin = [(length - edge) / 2 for length, edge in zip(photo.shape, size, strict=False)]
    start = [rng.uniform(-1, 1) * max(0, m - 14 * unit) for m in margin]
    flip = rng.random() < 0.5
    frames = np.empty((len(camera.zoom), *size, 3), np.float32)
    for t, zoom in enumerate(camera.zoom):
        at = [
            (np.arange(edge) + 0.5 - edge / 2) / zoom - camera.shift[t, axis] * unit / zoom
            for axis, edge in enumerate(size)
        ]
        at = [
            (a + start[axis] + photo.shape[axis] / 2 - 0.5).clip(0, photo.shape[axis] - 1.001)
            for axis, a in enumerate(at)
        ]
        first = int(at[1][0])  # columns out of sight need no interpolation between rows
        frame, at[1] = photo[:, first : int(at[1][-1]) + 2], at[1] - first
        for axis in (0, 1):
            low = at[axis].astype(int)
            part = (at[axis] - low).astype(np.float32).reshape((-1,) + (1,) * (2 - axis))
            frame = (1 - part) * frame.take(low, axis) + part * frame.take(low + 1, axis)
        frames[t] = frame
    return frames[:, :, ::-1].copy() if flip else frames


@functools.cache
def _photograph(name: str, size: int) -> np.ndarray:
    """Load one of scikit-image's photographs, its shorter side at about 2.4 frames."""
    photo = skimage.util.img_as_float32(getattr(skimage.data, name)())
    if photo.ndim == 2:
        photo = np.repeat(photo[..., None], 3, 2)
    factor = 2.4 * size / min(photo.shape[:2])
    shape = [round(factor * length) for length in photo.shape[:2]]
    return skimage.transform.resize(photo, shape, anti_aliasing=factor < 1).astype(np.float32)


def _evidence(rng, name: str, target: int, camera: _Camera) -> _Thing:
    """Return the thing that decides the class."""
    kind = CLASSES[name][target]
    clock = np.linspace(-0.5, 0.5, len(camera.zoom))
    if name == "object":
        centre = rng.uniform(-12, 12, 2) + camera.shift + clock[:, None] * rng.uniform(-3, 3, 2)
        scale = camera.zoom * rng.uniform(0.9, 1.15)
        return _Thing(centre, scale, "disc", kind, _colours(rng))
    if name == "appearance":
        path = np.stack(
            [rng.uniform(-2, 2) * clock, rng.choice([-1, 1]) * rng.uniform(8, 16) * clock], 1
        )
        path[:, 0] += np.sin(2 * np.pi * (2 * clock + rng.random()))  # the bob of a walk
        scale = np.full(len(clock), rng.uniform(0.85, 1.1))
        return _Thing(rng.uniform(-11, 11, 2) + path, scale, "actor", kind, _colours(rng))
    start, course = rng.random((3, 1)), np.array(_COURSES[kind])[:, None]
    y, x, growth = (start + course * rng.uniform(0.5, 0.65) * clock) % 1
    scale = 0.4 * (1.75 / 0.4) ** growth
    pattern = rng.choice(CLASSES["appearance"])
    return _Thing(40 * np.stack([y, x], 1) - 20, scale, "actor", pattern, _colours(rng))


def _distractors(rng, name: str, camera: _Camera) -> list[_Thing]:
    """Return two things that move and mean nothing."""
    clock = np.linspace(-0.5, 0.5, len(camera.zoom))
    things = []
    for _ in range(2):
        start, scale = rng.uniform(-20, 20, 2), np.full(len(clock), rng.uniform(0.8, 1.2))
        if name == "motion":  # to and fro: much movement, no direction
            sway = 4 * np.sin(2 * np.pi * (2 * clock[:, None] + rng.random())) * _unit_vector(rng)
            things.append(_Thing(start + sway, scale, "blob", "plain", _colours(rng)))
        else:
            path = start + clock[:, None] * rng.uniform(6, 18) * _unit_vector(rng)
            silhouette = "actor" if name == "appearance" else "blob"
            things.append(_Thing(path, scale, silhouette, "plain", _colours(rng)))
    return things


def _unit_vector(rng) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.sin(angle), math.cos(angle)])


def _colours(rng) -> np.ndarray:
    """Two random colours, one dark and one bright, in random order."""
    pair = np.stack([rng.uniform(0, 0.45, 3), rng.uniform(0.55, 1, 3)])
    return pair[rng.permutation(2)].astype(np.float32)


def _box(mask: np.ndarray) -> torch.Tensor:
    """Return the tight box (1, 4) around a frame's mask, (0, 4) where it is empty."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return torch.zeros(0, 4)
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float()
