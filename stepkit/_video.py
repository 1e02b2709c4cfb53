"""Video files, decoded by FFmpeg through PyAV: jumps to a scene, and damage is noticed.

Floor below `stepkit._sources`. A source here is a path or a binary file.
"""

import io
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.codec.context import CodecContext, Flags
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from stepkit._checks import require, warn

# Small files can unfold without end: what is beyond any camera is refused before it fills memory.
MOST_FRAMES = 500_000  # at a time: 5 hours at 25 a second
MOST_SECONDS = 3_600  # of decoding them
MOST_PIXELS = 2**26  # of one frame: twice 8K

# Demuxers of FFmpeg that hold their pictures themselves. Others draw text (tty, bin), or follow
# what they read to further files (hls, concat, dash, sdp): without protocols they find none.
FORMATS = (
    "apng,asf,av1,avi,bmp_pipe,dv,flv,gif,gxf,h261,h263,h264,hevc,ivf,jpeg_pipe,m4v,matroska,mjpeg,"
    "mov,mp3,mpeg,mpegts,mpegvideo,mxf,nsv,nut,obu,ogg,png_pipe,rm,tiff_pipe,vc1,vvc,wav,wtv,"
    "yuv4mpegpipe"
)
OPENING = {"protocol_whitelist": "none", "max_pixels": str(MOST_PIXELS)}  # also while probing
ITSELF = "an intact video itself, no playlist, script or text"
# Without these, FFmpeg passes over what it could notice; a JPEG it would paint grey from there on.
NOTICE = "crccheck+bitstream+buffer"
LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop the alpha of these
HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
# What these codecs write never holds so many zeros in a row: a hole in the file does.
HOLE = bytes(64)
DENSE = {"h264", "hevc", "libdav1d", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"}
GAPLESS = ("matroska,webm", "flv", "nut")  # nothing but short headers between two packets
STEADY = ("ogg", "mxf")  # a frame at every tick
TIMED = ("matroska,webm", "asf")  # the header tells the duration


def name_of(source) -> str:
    if isinstance(source, np.ndarray):
        return f"an array {source.shape}"
    source = source[0].parent if isinstance(source, list) else source
    name = source if isinstance(source, Path) else getattr(source, "name", None)
    return f"'{name}'" if name is not None else f"a {type(source).__name__}"


def refuse(source, found: str, expected: str = "an intact video"):
    """Raise a ``ValueError`` that names the source."""
    require(False, "path", f"{name_of(source)}, {found}", expected)


class _Timeline(NamedTuple):
    pts: list[int]  # of the frames, as they are shown
    keys: list[tuple[int, int]]  # pts and dts of those from which decoding can begin
    tick: Fraction  # in seconds


@contextmanager
def opened(source):
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file
    else:
        source.seek(0)
        yield source


@contextmanager
def open_video(source):
    """Open a video and yield its container, stream and decoder; errors inside name the source."""
    with opened(source) as file:
        container = None
        try:
            # a file, not its name: FFmpeg takes "a:b.mp4" for a protocol; old tags are not UTF-8
            with av.open(file, metadata_errors="replace", options=OPENING) as container:
                if not {*FORMATS.split(",")} & {*container.format.name.split(",")}:
                    found = f"of the format {container.format.name}, which is not read"
                    refuse(source, found, ITSELF)
                # FFmpeg counts cover art as video
                streams = [
                    stream
                    for stream in container.streams.video
                    if not stream.disposition & Disposition.attached_pic
                ]
                if not streams:
                    refuse(source, "in which there is no video", "a video stream")
                stream = max(streams, key=lambda each: bool(each.disposition & Disposition.default))
                yield container, stream, _decoder(source, stream)
        except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV, where a stream breaks up
            expected = "an intact video" if container else ITSELF
            refuse(source, f"not a video, damaged or truncated ({error})", expected)


def _decoder(source, stream) -> CodecContext:
    codec = stream.codec_context
    if codec is None:
        refuse(source, "for which FFmpeg has no decoder", "another codec")
    size = f"whose frames are {codec.width}x{codec.height}" if codec.width else "of no known size"
    if not 0 < codec.width * codec.height <= MOST_PIXELS:  # 0: too large while probing
        refuse(source, size, f"at most {MOST_PIXELS} pixels a frame")
    if stream.metadata.get("alpha_mode") == "1" and codec.name in LIBVPX:
        codec = CodecContext.create(LIBVPX[codec.name], "r")
    # lost parts of a raw HEVC stream show in no other way: it has neither times nor a length
    strict = codec.name == "mjpeg" or stream.container.format.name == "hevc"
    notice = NOTICE + "+explode" * strict
    codec.options = {"max_pixels": str(MOST_PIXELS), "err_detect": notice}  # a stream may grow
    codec.flags |= Flags.copy_opaque
    codec.thread_type = "AUTO"
    return codec


class _AstrayError(Exception):
    """The times told do not lead to the frames."""


def decode(source, start: int, damage: list) -> Iterator[tuple[int, av.VideoFrame, bool]]:
    """Yield position, frame, and whether it is damaged, from the key frame before ``start``."""
    line = timeline(source) if start else None
    first = _key_before(line, start) if line else None
    try:
        yield from _judged(source, line, first, damage)
    except _AstrayError:  # count them, then
        damage.clear()
        yield from _judged(source, None, None, damage)


def _judged(source, line, first, damage):
    """Hold each frame until the packets before its own have shown: it may lean on a damaged one."""
    held, waiting, sent, harmed = [], set(), -1, []  # numbers of packets

    def judge():
        index, frame, origin = held.pop(0)
        if frame.key_frame:  # from here on nothing leans on what was before
            harmed[:] = [each for each in harmed if each >= origin]
        hurt = any(each <= origin for each in harmed)
        damage.extend([index] * hurt)
        return index, frame, hurt

    for index, frame, origin, number in _decode(source, line, first, damage, harmed):
        waiting.update(range(sent + 1, number + 1))
        waiting.discard(origin)
        if frame.key_frame:
            waiting = {each for each in waiting if each > origin}
        sent = number
        held.append((index, frame, origin))
        while held and (len(held) > 32 or min(waiting, default=np.inf) > held[0][2]):
            yield judge()
    while held:
        yield judge()


def _decode(source, line, first, damage, harmed):
    """Yield position, frame, and the numbers of its packet and of the last one sent.

    To ``harmed`` go the numbers of packets that are damaged, or lost.
    """
    index, decoded = (bisect_left(line.pts, first[0]) if first else 0) - 1, 0
    end = time.monotonic() + MOST_SECONDS
    with open_video(source) as (container, stream, decoder):
        if stream.codec_context.color_trc in HDR:
            kind = HDR[stream.codec_context.color_trc]
            said = f"{kind} (HDR) is read as if it were SDR; tone-map it first (docs/guide.md)"
            warn(f"{name_of(source)}: {said}")
        if first:
            container.seek(first[1], stream=stream)
        for number, (packet, broken, lost) in enumerate(_packets(source, container, stream)):
            # a frame tells by it which packet it comes from; PyAV keeps it by its address
            packet.opaque = [number]
            if broken or lost:
                harmed.append(number if broken else number - 1)
                damage.append(index + 1)
            for frame in decoder.decode(packet):
                decoded += 1
                advice = "a part of it at a time: start and stop, or cut it first"
                if decoded > MOST_FRAMES:
                    refuse(source, f"of more than {MOST_FRAMES} frames", advice)
                if time.monotonic() > end:
                    refuse(source, f"of more than {MOST_SECONDS} seconds of decoding", advice)
                if first and frame.pts is not None and frame.pts < first[0]:
                    continue  # on the way to the key frame, or leading it
                index += 1
                if first and line.pts[index : index + 1] != [frame.pts]:
                    raise _AstrayError
                (origin,) = frame.opaque or [number]
                if frame.is_corrupt:
                    harmed.append(origin)
                yield index, frame, origin, number
        # Some writers of AVI get the length wrong: it counts only where frames are lost as well.
        complete = container.format.name == "avi" and index + 1 == stream.frames and not damage
    if not complete:
        check_end(source)
    if decoded == 0:
        refuse(source, "in which there is no frame", "a video")


def _packets(source, container, stream) -> Iterator[tuple[av.Packet, bool, bool]]:
    """Yield the packets of ``stream``, whether each is damaged, and whether some before are lost.

    Packets of all streams together leave nothing of the file unread, and no moment unfilled.
    """
    kind, codec = container.format.name, stream.codec_context.name
    gapless = kind in GAPLESS and "alpha_mode" not in stream.metadata  # alpha lies beside packets
    unread, end, until, last = 0, None, 0, None
    for packet in container.demux():
        if packet.pos is not None and packet.size:
            unread = max(unread, packet.pos - end if gapless and end else 0)
            end = max(end or 0, packet.pos + packet.size)
        if kind in TIMED and packet.pts is not None:
            ends = (packet.pts + (packet.duration or 0)) * packet.time_base
            until = max(until, float(ends))
        if packet.stream.index != stream.index:
            continue
        step = 1.5 * (packet.duration or np.inf)
        late = None not in (packet.dts, last) and packet.dts - last > step
        lost = unread > 512 or (late and (unread > 48 or kind in STEADY))
        broken = packet.is_corrupt or (codec in DENSE and _has_hole(packet, codec))
        yield packet, broken, lost
        unread, last = 0, packet.dts
    rest = 1 - (end or 0) / max(container.size, 1)
    short = (container.duration or 0) / av.time_base - until if kind in TIMED else 0
    if short > 0.25 and rest > 0.005:  # seconds, and a share of the file that no index fills
        check_end(source)
        refuse(source, f"damaged: after {until:.3f} seconds nothing more can be read")


def _has_hole(packet, codec: str) -> bool:
    data = bytes(packet).rstrip(b"\0")  # padding
    return HOLE in (data[data.find(b"\xff\xda") :] if codec == "mjpeg" else data)


def timeline(source) -> _Timeline | None:
    """Read, without decoding, when each frame is shown; None: the source does not tell."""
    with open_video(source) as (container, stream, _):
        kind, vp8 = container.format.name, stream.codec_context.name == "vp8"
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe)
            for packet in container.demux(stream)
            # of VP8 a bit tells which packets only serve others
            if packet.size and not packet.is_discard and not (vp8 and not bytes(packet)[0] & 16)
        ]
        tick = stream.time_base
    shown = [pts for pts, _, _ in packets]
    if None in shown or len(set(shown)) < len(shown) or shown[:1] != [min(shown, default=None)]:
        return None
    # APNG calls every frame a key frame, also those that change a part of the one before
    keys = [(pts, dts) for pts, dts, key in packets if key and dts is not None and kind != "apng"]
    return _Timeline(sorted(shown), sorted(keys), tick)


def _key_before(line: _Timeline, start: int) -> tuple[int, int] | None:
    """Return pts and dts of the last key frame up to frame ``start``; None: it is the first."""
    if start >= len(line.pts):
        return None
    before = bisect_right(line.keys, (line.pts[start], np.inf))
    return line.keys[before - 1] if before > 1 else None


def upright(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """Return RGB pixels on black, turned as the display matrix says, to quarter turns."""
    if frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components):
        rgba = converter.reformat(frame, format="rgba").to_ndarray()
        pixels = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(np.uint8)
    else:
        pixels = converter.reformat(frame, format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    if abs(a) < abs(b):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def check_end(source) -> None:
    """Refuse a source whose container says that it is longer."""
    with opened(source) as file:
        missing = _declared_end(file) - file.seek(0, io.SEEK_END)
    if missing > 0:
        refuse(source, f"truncated: {missing} bytes or more are missing")


def _declared_end(file) -> int:
    """Return where the container says that the file ends, in bytes; 0 if it does not say.

    Needed because FFmpeg plays a file that was cut off up to the cut, without a word.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(1024)
    if head.startswith(b"RIFF"):  # AVI; some count the 8 bytes of this header, some do not
        return int.from_bytes(head[4:8], "little")
    if head.startswith(b"GIF8"):
        file.seek(max(0, size - 64))
        # the trailer, or the end of an image where a writer left the trailer out
        return 0 if file.read().rstrip(b"\r\n ").endswith((b";", b"\0")) else size + 1
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_end(head)
    if head.startswith(b"\x30\x26\xb2\x75"):  # ASF: in its object of file properties
        at = head.find(b"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\x00\xc0\x0c\x20\x53\x65")
        return int.from_bytes(head[at + 40 : at + 48], "little") if at > 0 else 0
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
