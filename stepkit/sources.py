"""Sources of frames: a video file decoded by PyAV, or a folder of images; damage is noticed.

Floor below `stepkit.clips`, which chooses frames, resizes and normalises them.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from stepkit.checks import require

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Small files can unfold without end: what is beyond any camera is refused before it fills memory.
MOST_FRAMES = 500_000  # 5 hours at 25 a second
MOST_PIXELS = 2**26  # of one frame: twice 8K


def lazy_frames(path: Path) -> Iterator[Callable[[], np.ndarray]]:
    """Yield each frame as a call that makes its pixels (H, W, 3): most of them nobody wants."""
    if path.is_dir():
        files = _images(path)
        shape = _image(files[0]).shape
        yield from (partial(_image, file, shape) for file in files)
    else:
        converter = VideoReformatter()  # setting one up per frame costs ten times the conversion
        yield from (partial(_upright, frame, converter) for frame in _decode(path))


def guess_count(path: Path) -> int:
    """Return what the metadata say of the number of frames: a guess for videos."""
    if path.is_dir():
        return len(_images(path))
    with _video(path) as (container, stream):
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


# --- video files ---


@contextmanager
def _video(path: Path):
    """Open a video and yield its container and stream; errors inside name the file."""
    try:
        # absolute, as FFmpeg takes "a:b.mp4" for a protocol; old tags are not always UTF-8
        with av.open(str(path.absolute()), metadata_errors="replace") as container:
            # FFmpeg counts cover art as video, and draws text files as such ("tty", "bin")
            streams = [
                stream
                for stream in container.streams.video
                if container.format.name not in ("tty", "bin")
                and not stream.disposition & av.stream.Disposition.attached_pic
            ]
            if not streams:
                refuse(path, "in which there is no video", "a video stream")
            if streams[0].codec_context is None:
                refuse(path, "for which FFmpeg has no decoder", "another codec")
            codec = streams[0].codec_context
            size = f"whose frames are {codec.width}x{codec.height}"
            if codec.width * codec.height > MOST_PIXELS:
                refuse(path, size, f"at most {MOST_PIXELS} pixels a frame")
            codec.options = {"max_pixels": str(MOST_PIXELS)}  # a stream may grow on its way
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV, where a stream breaks up
        refuse(path, f"not a video, damaged or truncated ({error})")


def _decode(path: Path) -> Iterator[av.VideoFrame]:
    with _video(path) as (container, stream):
        seen, damaged = 0, False
        for packet in container.demux(stream):
            damaged |= packet.is_corrupt
            for frame in packet.decode():
                seen += 1
                if seen > MOST_FRAMES:
                    refuse(path, f"of more than {MOST_FRAMES} frames", "a part of it at a time")
                yield frame
        # Some writers of AVI get the length wrong: it counts only where frames are lost as well.
        complete = container.format.name == "avi" and seen == stream.frames and not damaged
    missing = _declared_end(path) - path.stat().st_size
    if missing > 0 and not complete:
        refuse(path, f"truncated after {seen} frames: {missing} bytes or more are missing")
    if seen == 0:
        refuse(path, "in which there is no frame", "a video")


def _upright(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """Return RGB pixels, turned and mirrored as the display matrix says, to quarter turns."""
    pixels = converter.reformat(frame, format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    if abs(a) < abs(b):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _declared_end(path: Path) -> int:
    """Return where the container says that the file ends, in bytes; 0 if it does not say.

    Needed because FFmpeg plays a file that was cut off up to the cut, without a word.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
        if head.startswith(b"RIFF"):  # AVI; some count the 8 bytes of this header, some do not
            return int.from_bytes(head[4:8], "little")
        if head.startswith(b"GIF8"):
            file.seek(max(0, size - 64))
            # the trailer, or the end of an image where a writer left the trailer out
            return 0 if file.read().rstrip(b"\r\n ").endswith((b";", b"\0")) else size + 1
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            return _matroska_end(head)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _mp4_end(file, size)
    return 0


def _matroska_end(head: bytes) -> int:
    at = head.find(b"\x18\x53\x80\x67") + 4  # the segment; leading zeros tell the bytes of a number
    if at < 8:
        return 0
    width = 9 - head[at].bit_length()
    unknown = (1 << 7 * width) - 1  # a recording that was never closed
    length = int.from_bytes(head[at : at + width], "big") & unknown
    return 0 if length == unknown else at + width + length


def _mp4_end(file, size: int) -> int:
    end = 0
    while end < size:
        file.seek(end)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8:  # 0: up to the end of the file, wherever that is
            return 0
        end += length
    return end if kind in (b"moov", b"mdat", b"moof") else 0  # others: bytes that a camera appends


# --- folders of images ---


def _images(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES]
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        refuse(folder, "a folder without images", "one image per frame: " + " ".join(IMAGES))
    if len(files) > MOST_FRAMES:
        refuse(folder, f"of {len(files)} images", f"at most {MOST_FRAMES}")
    numbers = re.compile("[0-9]+")
    padded = {file: numbers.sub(lambda found: found[0].zfill(20), file.name) for file in files}
    return sorted(files, key=lambda file: (padded[file], file.name))


def _image(file: Path, shape: tuple | None = None) -> np.ndarray:
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # grey of 16 bits: Pillow would clip it at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        refuse(file, f"which does not decode ({error})", "an intact image")
    if shape not in (None, pixels.shape):
        expected = "{}x{} (HxW), as the first frame of its folder".format(*shape[:2])
        refuse(file, "{}x{}".format(*pixels.shape[:2]), expected)
    return pixels


def refuse(path: Path, found: str, expected: str = "an intact video"):
    """Raise a ``ValueError`` that names the source."""
    require(False, "path", f"'{path}', {found}", expected)
