"""Three generated stand-ins in which no glimpse decides, each clip one that can be filmed again.

============  ==================================  ===============================================
name          what tells the class                what else there is
============  ==================================  ===============================================
``needle``    the pattern on a walking figure,    two blobs with patterns of other classes, in
              in a quarter of the frames          all frames
``decoy``     the pattern on a small round thing  three square things with patterns of other
              with a stem, in half of the frames  classes, in all frames; a fast, zooming camera
``course``    where a small figure goes in the    a blob that goes elsewhere; a camera that pans
              frame: left, up and left, up, ...   and shakes
============  ==================================  ===============================================

Patterns are soft (0.12 to 0.25 to either side of a plain colour), as light on dark as dark on
light, and alike in mean and strength. Outside the test part a ninth class shows none, or stands
still: else a network calls that one of the eight, whose evidence could not be removed. In training
a decoy's class is drawn regardless of the clip's, so that it tells nothing; elsewhere it is another
one, so that nothing but the actor shows the clip's. No still frame of ``course`` tells its class:
the figure goes round a torus, off the frame and back on the other side, from anywhere alike.

A scene is one of 61 images of a part, procedural textures (noise with random spectrum, direction,
sharpness and colours), mixed in patches with a photograph (of those that ship inside scikit-image);
each clip cuts, turns and warps both anew, with a random gain. No two parts share either. Clips take
turns in scenes and in classes; 61 is prime, so that each scene has all classes. Random numbers are
a hash of integers: a clip is the same on each device, within rounding, whatever its batch. All of
it was chosen once, before any attribution was computed on it.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepkit.clips import normalise
from stepkit.data.sample import Sample, dataset
from stepkit.data.synthetic import _PATTERNS, _SILHOUETTES, Synthetic, _box, _photograph

__all__ = ["CLASSES", "KINDS", "PHOTOGRAPHS", "SCENES", "Scenes", "verify"]

SCENES = 61  # of each part
PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "coffee", "grass", "hubble_deep_field", "rocket", "moon"),
    "val": ("camera", "immunohistochemistry", "cell"),
    "test": ("cat", "coins", "gravel", "retina", "clock"),
}
_SHOWN = ["across", "along", "rising", "falling", "checks", "diamonds", "rings", "spokes", "none"]
_COURSES = ["right", "down right", "down", "down left", "left", "up left", "up", "up right", "none"]
CLASSES = {"needle": _SHOWN, "decoy": _SHOWN, "course": _COURSES}


class Kind(NamedTuple):
    """What sets one of the datasets apart; lengths in 1/48 of the frame's shorter side."""

    actor: str  # silhouettes
    decoy: str
    decoys: int
    scale: tuple[float, float]
    shown: float  # share of the frames in which the actor shows its pattern
    path: float  # how far things go in a clip, at most, besides the camera
    pan: float  # how far the camera goes, at most
    zoom: float


KINDS = {
    "needle": Kind("actor", "blob", 2, (0.85, 1.1), 0.25, 14, 6, 0),
    "decoy": Kind("round", "square", 3, (0.9, 1.15), 0.5, 5, 16, 0.25),
    "course": Kind("actor", "blob", 1, (0.55, 0.75), 1, 30, 12, 0),
}
_REACH = {"actor": (12.7, 5.7), "round": (10, 5.7), "blob": (5.7, 7.4), "square": (5.2, 5.2)}
_HALF = 15  # of a sprite, whose outline is then far inside
_sample = functools.partial(F.grid_sample, align_corners=False)


class Scenes(Synthetic):
    """Generated clips with exact ground truth, drawn many at a time, on any device.

    Parameters
    ----------
    name, ...
        ``"needle"``, ``"decoy"`` or ``"course"``; the others as of `stepkit.data.Synthetic`.
    device : where clips are drawn, and stay

    Attributes
    ----------
    scenes : list of str
        Of each clip, for `stepkit.stats.by_scene`; an id begins with it.

    Examples
    --------
    >>> data = Scenes("needle", n=4)
    >>> data[0].clip.shape, data.ids[3], data.scenes[3]
    (torch.Size([3, 8, 48, 48]), 'needle_test_0_s03_00003', 'needle_test_0_s03')
    """

    known, code = CLASSES, ("data/scenes.py", "data/synthetic.py")

    def __init__(self, name, split="test", n=100, frames=8, size=48, seed=0, device="cpu"):
        super().__init__(name, split, n, frames, size, seed)
        self.device, K = torch.device(device), len(self.classes)
        self.targets = [i % (K - (split == "test")) for i in range(n)]
        self.scenes = [f"{name}_{split}_{seed}_s{i % SCENES:02d}" for i in range(n)]
        self.ids = [f"{scene}_{i:05d}" for i, scene in enumerate(self.scenes)]

    def __getitem__(self, i: int) -> Sample:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return several samples, drawn at once; a ``DataLoader`` calls this."""
        indices = [range(self.n)[i] for i in indices]
        return [
            Sample(clip, self.targets[i], self.ids[i], [*map(_box, mask.cpu().numpy())], mask)
            for i, clip, mask in zip(indices, *self.render(indices), strict=True)
        ]

    def render(self, indices, *, targets=None, around=0, plain=False) -> tuple[Tensor, Tensor]:
        """Return clips (N, 3, T, H, W) and where evidence is, or would be, bool (N, T, H, W).

        Parameters
        ----------
        targets : sequence of int, optional
            Other classes for the actors; all else stays as it is.
        around : int
            1, 2, ...: other scenes and decoys; actor and camera stay as they are.
        plain : bool
            All are of the ninth class.
        """
        kind, last = KINDS[self.name], len(self.classes) - 1
        at = torch.as_tensor(indices, device=self.device)
        own_class = at % (last + (self.split != "test"))
        label = own_class if targets is None else torch.as_tensor(targets, device=self.device)
        label = torch.full_like(label, last) if plain else label
        facts = self.seed, [*PHOTOGRAPHS].index(self.split), [*KINDS].index(self.name), self.epoch
        own, other = (_Draws(*facts, stream, at) for stream in (0, 1 + around))
        camera = _camera(own, kind, self.frames)
        scene = (at + self.epoch * self.n + 7 * around) % SCENES
        frames = _background(other, self, scene, camera)
        order = torch.arange(self.frames, device=self.device)
        for _ in range(kind.decoys):
            shift = other(0 if self.split == "train" else 1, last).long()
            self._paint(frames, other, camera, (own_class + shift) % last, kind.decoy, order >= 0)
        length = max(1, round(kind.shown * self.frames))
        order = order - (own(0, 1, 1) * (self.frames - length + 1)).floor()
        shown = (order >= 0) & (order < length)
        alpha = self._paint(frames, own, camera, label, kind.actor, shown)
        return frames, (alpha > 0.5) & shown[..., None, None]

    def _paint(self, frames, draw, camera, label, silhouette, shown) -> Tensor:
        """Paint one thing into each clip; return its opacity (N, T, H, W)."""
        kind, unit, (clock, shift, zoom) = KINDS[self.name], min(self.size) / 48, camera
        scale, start, way = draw(*kind.scale, 1), draw(-0.5, 0.5, 1, 2), draw(0, 8)
        room, pattern = torch.tensor(self.size, device=self.device) / unit, label % 8
        going, inked = 1, (label < 8)[:, None, None]
        if self.name == "course":
            way, pattern, going, inked = label, way.long(), inked, 1
        way = torch.stack([(way * math.pi / 4).sin(), (way * math.pi / 4).cos()], 1)[:, None]
        path = clock[:, None] * way * draw(0.7, 1, 1, 1) * kind.path * going
        if self.name == "course":  # round the torus
            path = (start * room + room / 2 + path) % room - room / 2
        else:
            path = start * (room - 2 * room.new_tensor(_REACH[silhouette])) + path
        if kind.zoom:  # it lies in the scene
            path = path * zoom[..., None] + shift
        tone = draw(-1, 1, 1).sign() * draw(0.12, 0.25, 1) * draw(0.8, 1.2, 3)
        colours = draw(0.2, 0.8, 3)[..., None], tone[..., None] * shown.unsqueeze(-2) * inked
        largest = unit * kind.scale[1] * (1 + kind.zoom / 2)
        sides = [2 * math.ceil(each * largest + 1) for each in _REACH[silhouette]]
        sprite = _sprites(self.device)[[*_REACH].index(silhouette), pattern]
        return _blend(frames, sprite, path * unit, scale * zoom * unit, colours, sides)


for _name, _about in {
    "needle": "the pattern on a walking figure tells the class, in a quarter of the frames",
    "decoy": "the pattern on a small round object does, among square ones, before a fast camera",
    "course": "where a figure goes does, no still frame",
}.items():
    _facts = {"label": _name.capitalize(), "about": _about, "generated": True, "evidence": "masks"}
    dataset(_name, **_facts)(functools.partial(Scenes, _name))


def _hashed(x: Tensor) -> Tensor:
    """Hash integers to 32 bits (C. Wellons' "lowbias32")."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class _Draws:
    """Uniform random numbers (N, *shape), of ``facts``, the last one (N,); others every call."""

    def __init__(self, *facts, count: int = 128):
        keys = torch.zeros_like(facts[-1])
        for fact in facts:
            keys = _hashed(keys * 31 + fact)
        counter = _hashed(torch.arange(count, device=keys.device) + 0x9E3779B9)
        self.numbers, self.used = (_hashed(counter ^ keys[:, None]) >> 8) / 2**24, 0

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        first, self.used = self.used, self.used + math.prod(shape)
        return low + (high - low) * self.numbers[:, first : self.used].reshape(-1, *shape)


def _camera(draw: _Draws, kind: Kind, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the time (T,), how far the camera moved the scene, (N, T, 2), and its zoom (N, T)."""
    clock = torch.linspace(-0.5, 0.5, frames, device=draw.numbers.device)
    shake = (2 * math.pi * (1.5 * clock[:, None] + draw(0, 1, 1, 2))).sin() * draw(0, 1.5, 1, 2)
    shift = clock[:, None] * draw(-kind.pan, kind.pan, 1, 2) + shake
    return clock, shift, 1 + clock * draw(-kind.zoom, kind.zoom, 1)


def _background(draw: _Draws, data: Scenes, scene: Tensor, camera) -> Tensor:
    """Film a scene: a canvas, which the camera moves over."""
    (_, shift, zoom), kind, size, unit = camera, KINDS[data.name], data.size, min(data.size) / 48
    reach = (max(size) / 2 + (kind.pan / 2 + 1.5) * unit) / (1 - kind.zoom / 2)  # of the canvas
    canvas = _canvas(draw, _bank(data.split, max(size), data.device), scene, math.ceil(2 * reach))
    y, x = (
        ((torch.arange(edge, device=scene.device) + (1 - edge) / 2) - shift[..., axis, None] * unit)
        / (zoom[..., None] * reach)
        for axis, edge in enumerate(size)
    )
    return _sample(canvas, _grid(y, x), padding_mode="border").unflatten(2, (-1, size[0]))


def _grid(y: Tensor, x: Tensor) -> Tensor:
    """Return the points (N, T * H, W, 2) of frames with these rows (N, T, H) and columns."""
    return torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), -1).flatten(1, 2)


def _canvas(draw: _Draws, bank, scene: Tensor, side: int, coarse: int = 16) -> Tensor:
    """Cut, turn and warp a scene's texture and photograph, and mix them in patches."""
    place = torch.linspace(-1, 1, coarse, device=scene.device)
    grid = torch.stack(torch.broadcast_tensors(place, place[:, None]), -1)

    def waves():  # (N, coarse, coarse, 2), about a period over the canvas
        phase = torch.einsum("ncd,hwc->nhwd", draw(-0.8, 0.8, 2, 2), grid)
        return (2 * math.pi * (phase + draw(0, 1, 1, 1, 2))).sin()

    fields = [(2 * waves().sum(3, keepdim=True)).tanh()]
    for _ in bank:
        angle, zoom, mirrored = draw(-0.5, 0.5), draw(0.5, 0.8), draw(-1, 1).sign()
        c, s = zoom * angle.cos(), zoom * angle.sin()
        turn = torch.stack([mirrored * c, -s, mirrored * s, c], 1).view(-1, 2, 2)
        at = torch.einsum("hwc,ncd->nhwd", grid, turn) + 0.06 * waves()
        fields.append(at + draw(-0.25, 0.25, 1, 1, 2))
    fields = torch.cat(fields, 3).movedim(3, 1)
    fields = F.interpolate(fields, (side, side), mode="bilinear", align_corners=True)
    share, *places = fields.split([1, 2, 2], 1)
    one, two = (
        _sample(images[scene % len(images)], at.movedim(1, 3), padding_mode="reflection")
        for images, at in zip(bank, places, strict=True)
    )
    canvas = torch.lerp(one, two, 0.5 + 0.45 * share) - 0.5
    canvas = canvas * draw(0.6, 1.2, 3, 1, 1) + draw(0.35, 0.65, 1, 1, 1)
    return normalise(canvas.clamp(0, 1)[:, :, None])[:, :, 0]


def _blend(frames, sprite, path, scale, colours, sides) -> Tensor:
    """Paint ``sprite`` (N, 2, A, A), pattern and outline, over ``frames``, in windows around it."""
    N, _, T, H, W = frames.shape
    axes = []
    for axis, (side, edge) in enumerate(zip(sides, (H, W), strict=True)):
        centre = path[..., axis, None] + edge / 2
        pixel = (centre - side / 2).long() + torch.arange(side, device=path.device)
        local = (pixel + 0.5 - centre) / (_HALF * scale[..., None])
        axes.append((local, (pixel >= 0) & (pixel < edge), pixel.clamp(0, edge - 1)))
    (v, rows, y), (u, columns, x) = axes  # (N, T, side)
    found = _sample(sprite, _grid(v, u), padding_mode="border")
    ink, distance = found.unflatten(2, (T, -1)).flatten(3).unbind(1)  # (N, T, pixels)
    inside = (rows[..., None] & columns[:, :, None]).flatten(2)
    alpha = ((distance * scale[..., None] + 0.5).clamp(0, 1) * inside).flatten(1)
    y = y + torch.arange(T, device=path.device)[:, None] * H
    index = (y[..., None] * W + x[:, :, None]).flatten(1)
    shade = 0.8 + 0.05 * distance.clamp(0, 4)  # as if it were round
    colour = (colours[0][..., None] + colours[1][..., None] * ink[:, None]) * shade[:, None]
    colour = normalise(colour.clamp_(0, 1)[..., None]).flatten(2)
    flat, each = frames.flatten(2), index[:, None].expand(-1, 3, -1)
    flat.scatter_add_(2, each, alpha[:, None] * (colour - flat.gather(2, each)))
    return frames.new_zeros(N, T * H * W).scatter_add_(1, index, alpha).view(N, T, H, W)


@functools.cache
def _sprites(device: torch.device, side: int = 96) -> Tensor:
    """Return (silhouettes, patterns, 2, side, side): pattern, standardised, and depth inside."""
    v, u = (((np.mgrid[:side, :side] * 2 + 1) / side - 1) * _HALF).astype(np.float32)
    turns = (u, v), ((u + v) / math.sqrt(2), (u - v) / math.sqrt(2))
    ink = [_PATTERNS[f"stripes {way}"](*at) for at in turns for way in ("across", "along")]
    ink += [_PATTERNS["checks"](*at) for at in turns] + [_PATTERNS["rings"](u, v)]
    ink = np.stack([*ink, np.tanh(3 * np.sin(6 * np.arctan2(v, u)))])
    stem = np.minimum(1.5 - abs(u), np.minimum(10 - v, v))
    distance = [  # in the order of _REACH
        _SILHOUETTES["actor"](u, v),
        np.maximum(_SILHOUETTES["disc"](u, v), stem),
        _SILHOUETTES["blob"](u, v),
        5 - np.maximum(abs(u), abs(v)),
    ]
    sprites = []
    for outline in distance:
        seen = ink[:, outline > 0].T
        level, spread = (each[:, None, None] for each in (seen.mean(0), seen.std(0)))
        sprites.append(np.stack([(ink - level) / spread, np.broadcast_to(outline, ink.shape)], 1))
    return torch.from_numpy(np.stack(sprites)).float().to(device)


@functools.lru_cache(maxsize=4)
def _bank(split: str, edge: int, device: torch.device) -> list[Tensor]:
    """Return a part's textures and photographs, each (n, 3, side, side) in [0, 1]."""
    salt = [*PHOTOGRAPHS].index(split) * SCENES
    textures = [_texture(salt + scene) for scene in range(SCENES)]
    photographs = [torch.from_numpy(_photograph(name, edge)) for name in PHOTOGRAPHS[split]]
    photographs = [p.movedim(2, 0)[:, : min(p.shape[:2]), : min(p.shape[:2])] for p in photographs]
    fit = functools.partial(F.interpolate, size=[2 * edge] * 2, mode="bilinear", antialias=True)
    parts = textures, photographs
    return [torch.cat([fit(image[None]) for image in part]).to(device) for part in parts]


def _texture(seed: int, side: int = 256) -> Tensor:
    """Return a procedural texture (3, side, side) in [0, 1]: noise, sharpened, coloured."""
    draw = _Draws(torch.tensor([seed]))
    noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))
    y, x = torch.fft.fftfreq(side)[:, None] * side, torch.fft.rfftfreq(side) * side
    angle, stretch = draw(0, math.pi), draw(0, 1.2).exp()
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    radius = torch.hypot(along * stretch, across / stretch).clamp(min=1)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * radius ** -draw(1.2, 2.2), s=(side, side))
    sharp = (field / field.std((1, 2), keepdim=True) * draw(0.5, 4)).tanh()
    mixed = torch.einsum("chw,cd->dhw", sharp, draw(-1, 1, 3, 3)[0])
    return (draw(0.35, 0.65, 3).view(3, 1, 1) + 0.2 * mixed / mixed.std()).clamp(0, 1)


def verify(model: nn.Module, data: Scenes, indices) -> dict[str, Tensor]:
    """Tell of each clip whether a network reads its class off the actor, by filming it again.

    Bool (N,): ``follows`` (it sees another class on the actor), ``stays`` (it sees the class in
    another scene with other decoys), ``falls`` (its probability halves where the actor is plain).
    """
    at, K = torch.as_tensor(indices, device=data.device), len(data.classes)
    target = torch.tensor([data.targets[i] for i in indices], device=data.device)
    other = (target + 1 + at % (K - 2)) % (K - 1)

    def seen(**way) -> Tensor:
        with torch.no_grad():
            return model(data.render(at, **way)[0]).softmax(1)

    whole, plain = (seen(plain=p).gather(1, target[:, None])[:, 0] for p in (False, True))
    follows, stays = seen(targets=other).argmax(1) == other, seen(around=1).argmax(1) == target
    return {"follows": follows, "stays": stays, "falls": plain <= whole / 2}
