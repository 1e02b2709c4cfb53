"""Clips: from a video, or a folder of frames, to the normalised tensor that models see.

Every source is read in one forward pass, from the key frame before the first frame asked for; it
keeps those asked for, already resized: memory grows with them, not with the length of the video.
"""

import operator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepkit._checks import one_of, require
from stepkit._sources import as_source, between, guess_count, lazy_frames, name_of, warn_of

MEAN = (0.43216, 0.394666, 0.37645)  # of Kinetics-400, RGB in [0, 1]
STD = (0.22803, 0.22145, 0.216989)

__all__ = [
    "MEAN",
    "STD",
    "frame_count",
    "frame_size",
    "mean_std",
    "normalise",
    "read_clip",
    "read_clips",
    "read_frames",
    "sample_frames",
    "unnormalise",
]


def normalise(frames: Tensor) -> Tensor:
    """Take RGB in [0, 1] to the space of models, maps and masks: ``(frames - MEAN) / STD``.

    ``frames`` are floating (..., 3, T, H, W), on any device; shape, dtype and device stay. Raises a
    ``ValueError`` for another shape, or no floating dtype.

    Examples
    --------
    >>> black = normalise(torch.zeros(3, 16, 112, 112))
    """
    mean, std = _constants("frames", frames)
    return (frames - mean) / std


def unnormalise(clips: Tensor) -> Tensor:
    """Undo `normalise`, for pictures: RGB, clamped to [0, 1]. Takes and raises what that does.

    Examples
    --------
    >>> unnormalise(normalise(torch.full((3, 1, 1, 1), 0.5))).flatten().tolist()
    [0.5, 0.5, 0.5]
    """
    mean, std = _constants("clips", clips)
    return (clips * std + mean).clamp(0, 1)


def sample_frames(n, frames=16, mode="test", start=0, stop=None, generator=None) -> list[int]:
    """Choose the frames of a clip (paper §V-A.2): one of each of 16 segments.

    Of a range of m frames, test mode takes every ⌊m/frames⌋-th counted back from the last, train
    mode a random one of each of ``frames`` equal segments. Where m < ``frames``, both repeat the
    frames of the range evenly.

    Parameters
    ----------
    n : int
        Frames in the source.
    frames : int, default 16
        Frames to choose.
    mode : {"test", "train"}, default "test"
    start, stop : int, default the whole source
    generator : torch.Generator, optional
        Needed in train mode: the global random state is never touched. Each call advances it by
        ``frames`` draws.

    Returns
    -------
    list of int
        ``frames`` positions in the source, from 0, never decreasing. A ``ValueError`` is raised for
        an unknown mode, an empty range or one outside the source, no generator in train mode.

    Examples
    --------
    >>> sample_frames(10, frames=4), sample_frames(3, frames=6)
    ([3, 5, 7, 9], [0, 0, 1, 1, 2, 2])
    """
    one_of("mode", mode, ("test", "train"))
    n, frames = _integer("n", n, 1), _integer("frames", frames, 1)
    start = _integer("start", start, 0, n - 1)
    stop = n if stop is None else _integer("stop", stop, start + 1, n)
    edges = [start + i * (stop - start) // frames for i in range(frames + 1)]
    if mode == "test":
        step = (stop - start) // frames
        return [stop - 1 - step * i for i in reversed(range(frames))] if step else edges[:-1]
    require(generator is not None, "generator", None, "a torch.Generator, to draw frames in train")
    # float64: a float32 draw next to 1 would round up into the segment that follows
    draws = torch.rand(
        frames, generator=generator, device=generator.device, dtype=torch.float64
    ).tolist()
    segments = zip(draws, pairwise(edges), strict=True)
    return [low + int(u * (high - low)) for u, (low, high) in segments]


def read_frames(path, indices=None, size=112, fit="squash") -> Tensor:
    """Read frames of a video, or of a folder of images, upright and resized.

    Parameters
    ----------
    path : str, Path, bytes, binary file or array
        A video that FFmpeg decodes: a file, its bytes, or an open file, read from its beginning.
        Or a folder of images (jpg, png, bmp, webp), one per frame, in the natural order of their
        names: "f2" before "f10". Or RGB frames, uint8 (T, H, W, 3), of NumPy or PyTorch. Of several
        video streams the container's default. What is transparent stands on black.
    indices : iterable of int, default all frames
        Positions from 0, wherever the names of a folder start to count; any order, repeats too.
    size : int or (int, int), default 112
        Side, or height and width, in pixels: bilinear, antialiased.
    fit : {"squash", "crop"}, default "squash"
        To ``size`` whatever the aspect ratio, as in the paper; or the middle of the frame, its
        aspect ratio kept.

    Returns
    -------
    Tensor
        uint8 (T, H, W, 3), RGB.

    Raises
    ------
    FileNotFoundError
        No such file or folder.
    ValueError
        No video; a truncated one (where its container tells its length: mp4, mov, mkv, webm, avi,
        gif, wmv); a frame asked for is damaged, or follows damage up to the next key frame; no
        images; a broken image, or one of another size; no such index.
        A warning tells of damage elsewhere, and of HDR, which is read as if it were SDR.

    Examples
    --------
    >>> read_frames("surfing.mp4", [0, 24], size=(128, 171)).shape
    torch.Size([2, 128, 171, 3])
    """
    path, how = as_source(path), (_size(size), _fit(fit))
    if indices is None:
        kept, seen = _collect(path, None, *how)
        return _stack(kept, range(seen))
    indices = [_integer("indices", index, 0) for index in indices]
    require(bool(indices), "indices", "none", "at least one frame")
    kept, seen = _collect(path, set(indices), *how, max(indices) + 1)
    given = f"0..{seen - 1}, the frames of {name_of(path)}"
    require(max(indices) < seen, "indices", max(indices), given)
    return _stack(kept, indices)


def read_clip(
    path,
    frames=16,
    size=112,
    mode="test",
    start=0,
    stop=None,
    generator=None,
    *,
    seconds=None,
    fit="squash",
    normalise=(MEAN, STD),
) -> Tensor:
    """Read one clip, sampled as in the paper (§V-A.2) and normalised: what a model takes.

    A scene far into a long video costs about its own decoding: reading begins at the key frame
    before ``start``.

    Parameters
    ----------
    path, size, fit
        As in `read_frames`.
    frames, mode, start, stop, generator
        As in `sample_frames`.
    seconds : (float, float), optional
        In place of ``start`` and ``stop``: from when to when, counted from the first frame.
    normalise : optional
        As in `mean_std`; default `MEAN` and `STD`, the space in which pictures, removal operators
        and masks of this library live. Where a model wants other numbers, leave this be and give
        them to ``sk.wrap``; here they are for a clip that you handle yourself.

    Returns
    -------
    Tensor
        float32 (3, frames, H, W). Errors are those of `read_frames`, `sample_frames` and
        `mean_std`, or name ``seconds`` of a source without times.

    Examples
    --------
    >>> read_clip("surfing.mp4").shape
    torch.Size([3, 16, 112, 112])
    """
    path, size, start = as_source(path), _size(size), _integer("start", start, 0)
    how, (mean, std) = (size, _fit(fit)), mean_std(normalise)
    if seconds is not None:
        require(start == 0 and stop is None, "seconds", seconds, "None beside start or stop")
        start, stop = between(path, seconds)
    # The metadata only guess the length: reading to the end tells it. A wrong guess costs a second
    # pass, which must draw again what the first one drew.
    n = max(guess_count(path), start + 1) if stop is None else _integer("stop", stop, start + 1)
    state = None if generator is None else generator.get_state()
    while True:
        indices = sample_frames(n, frames, mode, start, stop, generator)
        kept, seen = _collect(path, set(indices), *how, stop)
        if seen == n:
            rgb = _stack(kept, indices).permute(3, 0, 1, 2).contiguous().float() / 255
            return (rgb - _per_channel(rgb, mean)) / _per_channel(rgb, std)
        given = f"a range in the {seen} frames of {name_of(path)}"
        require(stop is None and start < seen, "start, stop", (start, stop), given)
        n = seen
        if generator is not None:
            generator.set_state(state)


def read_clips(paths, **options) -> Tensor:
    """Read several sources into one batch (N, 3, frames, H, W), in their order.

    ``options`` are the keywords of `read_clip`, whose errors it raises, also for an empty list.
    Clip after clip draws from the one ``generator``.

    Examples
    --------
    >>> read_clips(["surfing.mp4", "surfing.mp4"], frames=8).shape
    torch.Size([2, 3, 8, 112, 112])
    """
    one = isinstance(paths, (str, Path, bytes))
    require(not one, "paths", type(paths).__name__, "a list of paths")
    clips = [read_clip(path, **options) for path in paths]
    require(bool(clips), "paths", "none", "at least one path")
    return torch.stack(clips)


def frame_count(path) -> int:
    """Count the frames of a source by reading it to its end; raises as `read_frames`.

    Examples
    --------
    >>> frame_count("surfing.mp4")
    25
    """
    return _collect(as_source(path), set(), None, None)[1]


def frame_size(path) -> tuple[int, int]:
    """Return (H, W) in pixels of the source, upright; raises as `read_frames`.

    Examples
    --------
    >>> frame_size("surfing.mp4")
    (240, 320)
    """
    with closing(lazy_frames(as_source(path))) as frames:
        return next(frames)[1]().shape[:2]


def mean_std(normalise) -> tuple[tuple, tuple]:
    """Return the mean and the standard deviation per channel that a normalisation stands for.

    Parameters
    ----------
    normalise : None, (mean, std), or weights or transforms of a model
        None: RGB in [0, 1] stays as it is. ``mean`` and ``std`` are three numbers, or one for all
        channels. Of torchvision the weights (``Swin3D_T_Weights.DEFAULT``), their ``transforms()``
        or a ``Normalize``; of Hugging Face an image processor.

    Returns
    -------
    mean, std : tuple of three float
        Of RGB in [0, 1]: what a model takes is ``(rgb - mean) / std``. A ``ValueError`` is raised
        for anything else, numbers that are not finite, a ``std`` that is not above 0.

    Examples
    --------
    >>> mean_std((0.5, (0.2, 0.2, 0.25)))
    ((0.5, 0.5, 0.5), (0.2, 0.2, 0.25))
    """
    given = normalise
    if callable(getattr(given, "transforms", None)):
        given = given.transforms()
    if given is None:
        given = 0, 1
    for names in (("mean", "std"), ("image_mean", "image_std")):
        if all(np.ndim(getattr(given, name, None)) == 1 for name in names):
            given = tuple(getattr(given, name) for name in names)
    try:
        mean, std = (np.broadcast_to(np.asarray(v, float), 3) for v in given)
        fits = bool(np.isfinite([mean, std]).all() and (std > 0).all())
    except (TypeError, ValueError):
        fits = False
    expected = "None, (mean, std) of three numbers each, or weights or transforms that hold them"
    require(fits, "normalise", repr(normalise), expected)
    return tuple(mean.tolist()), tuple(std.tolist())


def _constants(argument: str, given: Tensor) -> tuple[Tensor, Tensor]:
    fits = given.is_floating_point() and given.ndim >= 4 and given.shape[-4] == 3
    found = f"{given.dtype} {tuple(given.shape)}"
    require(fits, argument, found, "floating values (..., 3, T, H, W)")
    return _per_channel(given, MEAN), _per_channel(given, STD)


def _per_channel(like: Tensor, values: tuple) -> Tensor:
    return like.new_tensor(values).view(3, 1, 1, 1)


def _integer(argument: str, given: object, low: int, high: float = float("inf")) -> int:
    value = operator.index(given) if hasattr(given, "__index__") else None
    fits = value is not None and low <= value <= high
    require(fits, argument, repr(given), f"an integer from {low} to {high}")
    return value


def _size(given: object) -> tuple[int, int]:
    sides = given if isinstance(given, (tuple, list)) else (given, given)
    require(len(sides) == 2, "size", repr(given), "a side or (height, width), in pixels")
    return tuple(_integer("size", side, 1) for side in sides)


def _fit(given: str):
    one_of("fit", given, ("squash", "crop"))
    return Image.Image.resize if given == "squash" else ImageOps.fit


def _collect(source, wanted: set | None, size, fit, stop: int | None = None):
    """Return {index: resized frame} of the ``wanted`` (None: all), and how many frames went by."""
    kept, seen, damage = {}, 0, []
    with closing(lazy_frames(source, min(wanted or [0]), damage)) as frames:
        for index, pixels in frames:
            if wanted is None or index in wanted:
                image = fit(Image.fromarray(pixels()), size[::-1], Image.Resampling.BILINEAR)
                kept[index] = np.asarray(image)
            seen = index + 1
            if seen == stop:
                break
    warn_of(source, damage)
    return kept, seen


def _stack(kept: dict, indices) -> Tensor:
    return torch.from_numpy(np.stack([kept[index] for index in indices]))
