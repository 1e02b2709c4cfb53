"""Sources of frames: a video decoded by PyAV, images, or an array; damage is noticed.

Floor below `stepkit.clips`, which chooses frames, resizes and normalises them. A source is a path,
a list of images, a binary file, or an array: `as_source` makes one of what a caller has.
"""

import io
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from stepkit import _video
from stepkit._checks import require, warn
from stepkit._video import check_end, decode, name_of, open_video, opened, refuse, timeline, upright

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Pillow tells by content, not by name, and knows formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "AVIF")
MOST_BYTES = 8 * _video.MOST_PIXELS  # of a file of images, which is read whole


def as_source(path):
    """Return the source that ``path`` stands for; raises ``ValueError``, ``FileNotFoundError``."""
    if isinstance(path, (bytes, bytearray, memoryview)):
        path = io.BytesIO(path)
    if hasattr(path, "ndim"):
        frames = np.asarray(path)
        fits = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
        expected = "RGB frames, uint8 (T, H, W, 3)"
        require(fits and frames.size > 0, "path", f"{frames.dtype} {frames.shape}", expected)
        return frames
    if isinstance(path, list):
        return path
    if hasattr(path, "read"):
        fits = not isinstance(path, io.TextIOBase) and path.seekable()
        require(fits, "path", repr(path), "a binary file that can be read from its beginning again")
        size = path.seek(0, io.SEEK_END)
    else:
        path = Path(path)
        if not (path.is_file() or path.is_dir()):
            expected = "a video or a folder of its frames"
            raise FileNotFoundError(f"path: got {name_of(path)}, expected {expected}")
        size = path.is_dir() or path.stat().st_size
    require(size > 0, "path", f"{name_of(path)} of 0 bytes", "a video")
    return path


def lazy_frames(source, start=0, damage=None) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Yield each frame as its position and a call that makes its pixels (H, W, 3).

    Videos that tell their times begin at the key frame before ``start``, others at frame 0. To
    ``damage`` goes the position of each frame that is damaged, or before which some are missing;
    the call of a damaged one raises a ``ValueError``.
    """
    with _stills(source) as stills:
        if stills is not None:
            yield from enumerate(stills)
            return
    converter = VideoReformatter()  # setting one up per frame costs ten times the conversion
    for index, frame, harmed in decode(source, start, [] if damage is None else damage):
        expected = "frames outside the damage (start, stop), or the video encoded anew"
        said = partial(refuse, source, f"whose frame {index} is damaged", expected)
        yield index, said if harmed else partial(upright, frame, converter)


@contextmanager
def _stills(source):
    """Yield calls that make the pixels of an array's, a folder's or a GIF's frames; None: video."""
    if isinstance(source, np.ndarray):
        yield [partial(np.asarray, frame) for frame in source]
    elif isinstance(source, list) or (isinstance(source, Path) and source.is_dir()):
        files = images(source)
        shape = _image(files[0]).shape
        yield [partial(_image, file, shape) for file in files]
    elif _is_picture(source):
        check_end(source)
        with opened(source) as file:
            image = _open(source, file)
            with _decoding(source):
                count = image.n_frames
            if count > _video.MOST_FRAMES:
                refuse(source, f"of {count} frames", f"at most {_video.MOST_FRAMES}")
            yield [partial(_turn, source, image, i) for i in range(count)]
    else:
        yield None


def guess_count(source) -> int:
    """Return what the metadata say of the number of frames: a guess for videos."""
    with _stills(source) as stills:
        if stills is not None:
            return len(stills)
    with open_video(source) as (container, stream, _):
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def between(source, seconds) -> tuple[int, int]:
    """Return ``start, stop`` of the frames that a video shows in ``seconds`` from its first."""
    fits = len(seconds) == 2 and 0 <= seconds[0] < seconds[1]
    require(fits, "seconds", seconds, "(from, to), with 0 <= from < to")
    with _stills(source) as stills:
        line = timeline(source) if stills is None else None
    told = f"{name_of(source)}, which tells no times"
    require(line is not None, "seconds", told, "start and stop")
    # a thousandth: the precision of Matroska, where 1/30 is written as 0.033
    shown = [float((pts - line.pts[0]) * line.tick) + 1e-3 for pts in line.pts]
    start, stop = (bisect_left(shown, moment) for moment in seconds)
    given = f"{seconds}, of {name_of(source)}, whose last frame is at {shown[-1]:.3f}"
    require(start < stop, "seconds", given, "a range with a frame in it")
    return start, stop


def warn_of(source, damage: list[int]) -> None:
    """Warn of ``damage``, the frames that `lazy_frames` found damaged, if there is any."""
    if damage:
        where = f"damaged between the frames {min(damage)} and {max(damage)}"
        told = "none of these is used, but some may be missing, and later ones count too low"
        warn(f"{name_of(source)}: {where}; {told}")


# --- images ---


def _is_picture(source) -> bool:
    """Tell gif, webp and avif: FFmpeg passes over damage, does not read, drops alpha, in turn."""
    with opened(source) as file:
        head = file.read(12)
    named = head[8:] == b"WEBP" or head[4:] in (b"ftypavis", b"ftypavif")
    return named or head.startswith(b"GIF8")


@contextmanager
def _decoding(source, what: str = "which"):
    try:
        yield
    except Exception as error:  # Pillow's readers raise whatever they stumble on
        refuse(source, f"{what} does not decode ({error})", "an intact image")


def _open(source, file) -> Image.Image:
    """Open an image whose header keeps the limits; nothing is decoded."""
    size = file.seek(0, io.SEEK_END)
    if size > MOST_BYTES:
        refuse(source, f"of {size} bytes", f"at most {MOST_BYTES} bytes, or a video")
    file.seek(0)
    Image.init()
    content = io.BytesIO(file.read())  # of a file Pillow takes memory for all a PNG says it has
    with _decoding(source):
        image = Image.open(content, formats=[name for name in FORMATS if name in Image.OPEN])
    _check_size(source, image)
    return image


def _check_size(source, image: Image.Image) -> None:
    if image.width * image.height > _video.MOST_PIXELS:
        size = f"of {image.width}x{image.height} pixels"
        refuse(source, size, f"at most {_video.MOST_PIXELS} pixels a frame")


def _turn(source, image: Image.Image, i: int) -> np.ndarray:
    with _decoding(source, f"whose frame {i}"):
        image.seek(i)
    return _rgb(source, image)


def images(folder: Path | list[Path]) -> list[Path]:
    """Return the images of a folder in the natural order of their names; of a list, the list."""
    if isinstance(folder, list):
        return folder
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES]
    files = [file for file in files if not file.name.startswith(".") and file.is_file()]
    if not files:
        refuse(folder, "a folder without images", "one image per frame: " + " ".join(IMAGES))
    if len(files) > _video.MOST_FRAMES:
        refuse(folder, f"of {len(files)} images", f"at most {_video.MOST_FRAMES}")
    numbers = re.compile("[0-9]+")
    padded = {file: numbers.sub(lambda found: found[0].zfill(20), file.name) for file in files}
    return sorted(files, key=lambda file: (padded[file], file.name))


def _image(file: Path, shape: tuple | None = None) -> np.ndarray:
    with file.open("rb") as content, _open(file, content) as image:
        pixels = _rgb(file, image)
    if shape not in (None, pixels.shape):
        expected = "{}x{} (HxW), as the first frame of its folder".format(*shape[:2])
        refuse(file, "{}x{}".format(*pixels.shape[:2]), expected)
    return pixels


def _rgb(source, image: Image.Image) -> np.ndarray:
    """Return RGB pixels, upright, what is transparent on black."""
    _check_size(source, image)  # later frames may be larger
    with _decoding(source):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # grey of 16 bits: Pillow would clip it at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))
