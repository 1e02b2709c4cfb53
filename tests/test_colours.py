"""Colours of a video: converted by the matrix and the range that its file names."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from stepkit.clips import read_frames

# Y, Cb, Cr of 8 bits; their colours lie inside the RGB cube in every space below
PATCHES = np.array(
    [(60, 128, 128), (200, 128, 128), (80, 120, 190), (140, 90, 100), (90, 180, 110)]
)
# Weights of red and blue in Y, by ITU-R BT.709 and BT.601
SPACES = {Colorspace.ITU709: (0.2126, 0.0722), Colorspace.ITU601: (0.299, 0.114)}
# What Y is at black, and how far black is from white, in Y, and in Cb and Cr
RANGES = {ColorRange.MPEG: (16, 219, 224), ColorRange.JPEG: (0, 255, 255)}


def rgb(patches, space, extent):
    """Invert Y = Kr R + Kg G + Kb B, Cb = (B - Y) / (2 - 2 Kb), Cr = (R - Y) / (2 - 2 Kr)."""
    (red, blue), (black, luma, chroma) = SPACES[space], RANGES[extent]
    y, cb, cr = ((patches - (black, 128, 128)) / (luma, chroma, chroma)).T
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return 255 * np.stack([r, g, b], -1)


def video(path, patches, space, extent):
    """Write columns of 16 pixels, one of each colour, without loss."""
    height, width = 32, 16 * len(patches)
    y = np.tile(patches[:, 0].repeat(16), (height, 1))
    chroma = [np.tile(patches[:, i].repeat(8), (height // 2, 1)) for i in (1, 2)]
    planes = np.concatenate([plane.ravel() for plane in (y, *chroma)]).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(planes.reshape(-1, width), "yuv420p")
    frame.colorspace, frame.color_range, frame.pts = space, extent, 0
    frame.time_base = Fraction(1, 25)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, extent
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("extent", RANGES, ids=lambda extent: extent.name)
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_colours_are_converted_as_the_file_says(tmp_path, space, extent):
    path = video(tmp_path / "patches.mkv", PATCHES, space, extent)
    height, width = 32, 16 * len(PATCHES)
    found = read_frames(path, size=(height, width))[0, 16, 8::16].numpy()
    expected = rgb(PATCHES, space, extent)
    assert expected.min() > 0
    assert expected.max() < 255
    # FFmpeg drops the fractions of three terms; another space or range is off by 10 and more
    assert (found > expected - 3).all()
    assert (found < expected + 1).all()
