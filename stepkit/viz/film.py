"""Short videos of a clip and its attributions."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from stepkit._checks import one_of, require
from stepkit._files import write_whole
from stepkit.viz._frames import KINDS, inputs, render
from stepkit.viz._style import CMAP, OPACITY

__all__ = ["save_video"]


def save_video(path, clip, maps=None, *, fps=8, keep=0.15, opacity=OPACITY, cmap=CMAP) -> Path:
    """Write the clip as a short video; with a map: clip, overlay and what is kept, side by side.

    Parameters
    ----------
    path : str or Path
        ``.mp4`` (H.264, or MPEG-4 where PyAV lacks it; yuv420p, which browsers play) or ``.gif``
        (looping). It is written whole or not at all.
    clip : Tensor
        float32 (3, T, H, W) or (1, 3, T, H, W), normalised. Pixels are repeated up to a height of
        about 224.
    maps : Tensor, optional
        float32 (T, H, W), drawn through `stepkit.viz.display`, or bool, a mask.
    fps : float, default 8
        Frames a second.
    keep : float or None, default 0.15
        As for `stepkit.show`.
    opacity : float, default 0.75
        Of the colour where the map is 1.
    cmap : str, default "inferno"
        A colour map of matplotlib.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        As `show`; no such folder; another suffix, a rate that is not positive, such an opacity.

    Examples
    --------
    >>> save_video("surfing.gif", clip, maps)  # doctest: +SKIP
    """
    path = Path(path)
    write = {".mp4": _write_mp4, ".gif": _write_gif}
    one_of("suffix of path", path.suffix.lower(), write)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: got '{path}', expected a file in a folder that exists")
    require(fps > 0, "fps", fps, "a positive rate")
    require(0 <= opacity <= 1, "opacity", opacity, "a number in [0, 1]")
    rgb, maps, _ = inputs(clip, {} if maps is None else {"": maps}, None, keep)
    scale, strips = max(1, round(224 / rgb.shape[1])), []
    for kind in KINDS[:3] if maps else KINDS[:1]:
        strip = render(kind, rgb, maps.get(""), keep, opacity, cmap)
        strip = strip.repeat(scale, 1).repeat(scale, 2)
        strips += [strip, np.full_like(strip[:, :, :8], 255)]
    frames = np.concatenate(strips[:-1], axis=2)
    # yuv420p holds one colour for 2 x 2 pixels: an odd side gets its last line twice.
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    padded, rate = np.pad(frames, odd, mode="edge"), Fraction(fps)
    write_whole(path, lambda part: write[path.suffix.lower()](part, padded, rate))
    return path


def _write_mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # The index goes first, so that a page can start to play before it has the whole file.
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=fps.limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    # One palette for all frames and no dithering, so that what stands still does not flicker.
    every = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    palette = every.quantize(256, Image.Quantize.FASTOCTREE)  # the default loses rare colours
    images = [
        Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames
    ]
    duration = round(1000 / fps)  # ms
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
