"""Video in: every input and container, jumps to a scene, damage noticed, nothing else opened."""

import io
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image, features
from test_clips import corners, folder, grey, levels, ramp, refusal, video
from torchvision.models.video import MViT_V1_B_Weights
from torchvision.transforms.v2 import functional as tv

from stepkit import _video
from stepkit.clips import (
    frame_count,
    read_clip,
    read_clips,
    read_frames,
    sample_frames,
    unnormalise,
)


def moving(n, height=64, width=96):
    """A window that slides over noise: frames that differ, and that codecs predict."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    wide = np.asarray(small.resize((2 * width + 2 * n, height * 2)))
    return [wide[i % height :][:height, 2 * i : 2 * i + width].copy() for i in range(n)]


def quietly(call, *args):
    """What a call returns, or the ValueError that it raises; and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call(*args), [str(each.message) for each in caught]
        except ValueError as error:
            return error, [str(each.message) for each in caught]


# --- what is a source ---


def test_bytes_files_and_arrays_are_read_as_the_path_is(tmp_path):
    frames = moving(20)
    path = video(tmp_path / "v.mkv", frames, "ffv1", "bgr0")
    expected, data = read_clip(path, 8, 32), path.read_bytes()
    with path.open("rb") as file:
        file.seek(100)  # wherever it stands
        sources = [str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file]
        sources += [np.stack(frames), torch.from_numpy(np.stack(frames))]
        for source in sources:
            assert torch.equal(read_clip(source, 8, 32), expected)
            assert frame_count(source) == 20
    assert torch.equal(read_clips([data, path], frames=8, size=32)[0], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"", "a BytesIO of 0 bytes"),
        (b"no video" * 100, "a BytesIO, .*no playlist, script or text"),
        (io.StringIO("text"), "a binary file"),
        (np.zeros((4, 8, 8, 3)), r"float64 \(4, 8, 8, 3\), expected RGB frames, uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"expected RGB frames, uint8 \(T, H, W, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"expected RGB frames, uint8"),
    ],
)
def test_what_is_no_source_is_refused(wrong, message):
    with pytest.raises(ValueError, match=f"path: got .*{message}"):
        read_clip(wrong)


def test_truncation_is_noticed_in_bytes_too(tmp_path):
    data = video(tmp_path / "v.webm", moving(20), "libvpx", deadline="realtime").read_bytes()
    assert "truncated" in str(quietly(frame_count, data[: len(data) // 2])[0])


def test_a_path_that_is_neither_file_nor_folder_is_no_source():
    with pytest.raises(FileNotFoundError, match="'/dev/null', expected a video or a folder"):
        read_clip("/dev/null")


CONTAINERS = {
    "a.mts": {"codec": "libx264", "fmt": "mpegts"},
    "a.m2ts": {"codec": "libx264"},
    "a.3gp": {},
    "a.ogv": {"codec": "libvpx"},
    "a.vob": {"codec": "mpeg2video"},
    "a.mpg": {"codec": "mpeg1video"},
    "a.mxf": {"codec": "mpeg2video"},
    "a.f4v": {"codec": "libx264"},
    "a.flv": {"codec": "flv"},
    "a.wmv": {"codec": "wmv2"},
    "a.divx": {"fmt": "avi"},
    "a.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "a.h264": {"codec": "libx264"},
    "a.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "a.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "a.ivf": {"codec": "libvpx"},
    "a.nut": {"codec": "ffv1"},
    "a.y4m": {"codec": "wrapped_avframe"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_read_without_a_warning(tmp_path, name):
    path = video(tmp_path / name, ramp(30, 8), **CONTAINERS[name])
    got, said = quietly(read_frames, path)
    assert levels(got) == pytest.approx([8 * i for i in range(30)], abs=5)
    assert not said


@pytest.mark.parametrize("suffix", ["webp", "avif"])
def test_animated_images_are_videos(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow does not write AVIF")
    first, *rest = (Image.fromarray(frame) for frame in ramp(12, 20))
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=rest)
    assert levels(read_frames(path)) == pytest.approx([20 * i for i in range(12)], abs=3)
    with pytest.raises(ValueError, match="tells no times"):
        read_clip(path, seconds=(0, 1))


def test_the_default_stream_is_read_not_the_first(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        for i in range(5):
            for stream, level in zip(streams, (10, 200), strict=True):
                frame = av.VideoFrame.from_ndarray(grey(level), "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    assert levels(read_frames(path)) == [200] * 5


# --- what is shown: alpha, HDR, fit, normalisation ---

CLEAR = {
    "a.mov": ("prores_ks", "yuva444p10le"),
    "a.webm": ("libvpx-vp9", "yuva420p"),
    "b.webm": ("libvpx", "yuva420p"),
    "a.apng": ("apng", "rgba"),
    "a.mkv": ("ffv1", "bgra"),
}


@pytest.mark.parametrize("name", [*CLEAR, "a.webp", "a.gif", "folder"])
def test_what_is_transparent_stands_on_black(tmp_path, name):
    rgba = np.full((48, 64, 4), 255, np.uint8)
    rgba[:24, ..., 3] = 0  # white, but not to be seen
    rgba[24:, :32, 3] = 0 if name == "a.gif" else 128  # gif is all or nothing
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        Image.fromarray(rgba).save(path / "0.png")
    elif name in CLEAR:
        codec, kind = CLEAR[name]
        plain = {"auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=plain)
            stream.width, stream.height, stream.pix_fmt = 64, 48, kind
            frame = av.VideoFrame.from_ndarray(rgba, "rgba")
            for i in range(3):
                frame.pts, frame.time_base = i, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        others = [Image.fromarray(rgba // 2 * 2) for _ in range(2)]
        Image.fromarray(rgba).save(path, save_all=True, append_images=others, lossless=True)
    got = read_frames(path, [0], (48, 64))[0].float()
    assert got[:20].max() <= 3
    assert got[28:, :28].mean().item() == pytest.approx(0 if name == "a.gif" else 128, abs=3)
    assert got[28:, 36:].mean().item() == pytest.approx(255, abs=3)


@pytest.mark.parametrize(("transfer", "kind"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_read_with_a_warning(tmp_path, transfer, kind):
    path = video(tmp_path / "v.mp4", ramp(4), "libx264", color_trc=transfer)
    for call in (read_clip, read_frames):
        with pytest.warns(UserWarning, match=rf"v\.mp4': {kind} \(HDR\).*tone-map") as caught:
            call(path)
        assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize(("height", "width"), [(60, 120), (120, 60)])
def test_fit_crop_is_the_middle_with_its_aspect_ratio(tmp_path, height, width):
    frame = np.asarray(Image.fromarray(corners()).resize((width, height)))
    path = folder(tmp_path / "frames", [frame])
    got = read_frames(path, size=30, fit="crop")[0].permute(2, 0, 1)
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)
    scaled = tv.resize(pixels, [30], antialias=True)
    assert (got.int() - tv.center_crop(scaled, [30, 30]).int()).abs().max() <= 2
    assert torch.equal(
        unnormalise(read_clip(path, 1, 30, fit="crop"))[:, 0].mul(255).round(), got.float()
    )
    with pytest.raises(ValueError, match="fit: got 'pad'"):
        read_frames(path, fit="pad")


def test_a_clip_in_the_normalisation_of_weights_is_what_their_transforms_give(tmp_path):
    path = video(tmp_path / "v.mkv", moving(8), "ffv1", "bgr0")
    weights = MViT_V1_B_Weights.DEFAULT
    rgb = read_frames(path, sample_frames(8, 8), 64).permute(0, 3, 1, 2)
    own = weights.transforms(resize_size=[64, 64], crop_size=[64, 64])(rgb)
    assert torch.allclose(read_clip(path, 8, 64, normalise=weights), own, atol=1e-5)
    assert read_clip(path, 8, 64, normalise=None).aminmax().max <= 1
    with pytest.raises(ValueError, match="normalise: got 'imagenet'"):
        read_clip(path, normalise="imagenet")


# --- jumps ---

LONG = {
    "bframes.mp4": {"codec": "libx264", "bf": "3", "g": "40"},
    "open.ts": {"codec": "libx264", "bf": "3", "g": "30", "x264-params": "open-gop=1"},
    "refresh.mkv": {"codec": "libx264", "g": "30", "x264-params": "intra-refresh=1"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "keyint=30:open-gop=1:log-level=none"},
    "hidden.webm": {"codec": "libvpx", "g": "40", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "40", "cpu-used": "8", "deadline": "realtime"},
    "a.mpg": {"codec": "mpeg2video", "g": "15", "bf": "2"},
    "a.avi": {"g": "20", "bf": "2"},
    "a.flv": {"codec": "libx264", "g": "30", "bf": "2"},
    "a.wmv": {"codec": "wmv2", "g": "20"},
    "a.mxf": {"codec": "mpeg2video", "g": "15", "bf": "2"},
    "raw.h264": {"codec": "libx264", "g": "30"},  # tells no times: counted from the start
    "a.apng": {"codec": "apng", "pix_fmt": "rgb24"},
}


@pytest.mark.parametrize("name", LONG)
def test_a_jump_gives_the_frames_that_counting_gives(tmp_path, name):
    path = video(tmp_path / name, moving(130), **LONG[name])
    every = read_frames(path, size=32)
    assert len(every) == 130
    for start in (1, 29, 30, 41, 80, 129):
        wanted = [min(start + 2, 129), start]
        assert torch.equal(read_frames(path, wanted, 32), every[wanted]), start
    clip = unnormalise(read_clip(path, 4, 32, start=70)).mul(255).round()
    chosen = every[sample_frames(130, 4, start=70)]
    assert torch.equal(clip, chosen.permute(3, 0, 1, 2).float())


def test_times_that_lead_astray_are_noticed_and_frames_counted(tmp_path, monkeypatch):
    path = video(tmp_path / "v.mp4", moving(60), "libx264", threads="1", g="10", bf="0")
    every, line = read_frames(path, size=32), _video.timeline(path)
    for wrong in (line.pts[:35] + line.pts[36:], [pts + 1 for pts in line.pts]):
        monkeypatch.setattr(_video, "timeline", lambda _, pts=wrong: line._replace(pts=pts))
        assert torch.equal(read_frames(path, [33, 40], 32), every[[33, 40]])


def test_a_late_scene_costs_its_own_decoding_and_the_limit_counts_that(tmp_path, monkeypatch):
    frames = [grey(i % 200, 16, 16) for i in range(1500)]
    path = video(tmp_path / "long.mp4", frames, "libx264", g="25", preset="ultrafast")
    monkeypatch.setattr(_video, "MOST_FRAMES", 60)  # decoding more is refused
    shown = levels(read_frames(path, range(1450, 1480)))
    assert shown == pytest.approx([i % 200 for i in range(1450, 1480)], abs=3)
    read_clip(path, start=1450, stop=1480)
    assert "more than 60 frames, expected a part of it" in refusal(path)


def test_a_range_in_seconds_is_in_seconds_where_the_rate_varies(tmp_path):
    moments = [0, 1, 2, 30, 31, 90, 91, 92, 93, 200]  # in 25ths of a second
    path = video(tmp_path / "v.mp4", ramp(10, 20), "libx264", pts=moments, bf="0")
    for seconds in ((0, 99), (1.2, 3.7), (0.04, 1.2), (3.6, 3.65), (3, 100)):
        inside = [i for i, m in enumerate(moments) if seconds[0] <= m / 25 < seconds[1]]
        got = read_clip(path, 5, 32, seconds=seconds)
        assert torch.equal(got, read_clip(path, 5, 32, start=inside[0], stop=inside[-1] + 1))
    for wrong in ((2, 1), (-1, 2), (4, 5), (8.5, 9), (1,)):
        assert "seconds: got" in str(quietly(lambda s=wrong: read_clip(path, seconds=s))[0])
    with pytest.raises(ValueError, match=r"seconds: got .* None beside start or stop"):
        read_clip(path, seconds=(0, 1), stop=5)
    with pytest.raises(ValueError, match="tells no times, expected start and stop"):
        read_clip(folder(tmp_path / "frames", ramp(3)), seconds=(0, 1))


# --- damage ---

HURT = {
    "mpeg4.avi": {"g": "10"},
    "h264.avi": {"codec": "libx264", "threads": "1", "g": "10", "bf": "0"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.ts": {"codec": "libx264", "threads": "1", "g": "10"},
    "mpeg2.ts": {"codec": "mpeg2video", "g": "10"},
    "mpeg2.mpg": {"codec": "mpeg2video", "g": "10"},
    "vp8.webm": {"codec": "libvpx", "g": "10"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "10", "deadline": "realtime", "cpu-used": "8"},
    "vp8.ogv": {"codec": "libvpx", "g": "10"},
    "h264.mkv": {"codec": "libx264", "threads": "1", "g": "10"},
    "h264.mp4": {"codec": "libx264", "threads": "1", "g": "10"},
    "h264.flv": {"codec": "libx264", "threads": "1", "g": "10", "bf": "0"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    # without header: nothing tells how many frames there should be
    "raw.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "raw.h264": {"codec": "libx264", "threads": "1", "g": "10"},
    "raw.m2v": {"codec": "mpeg2video", "g": "10"},
}


@pytest.mark.parametrize("zeros", [300, 4000])
@pytest.mark.parametrize("name", HURT)
def test_a_hole_in_the_middle_is_noticed_and_no_frame_of_it_is_read(tmp_path, name, zeros):
    path = video(tmp_path / name, moving(60), **HURT[name])
    intact, said = quietly(read_frames, path, None, 32)
    assert len(intact) == 60
    assert not said
    data = path.read_bytes()
    at = len(data) // 2
    path.write_bytes(data[:at] + bytes(zeros) + data[at + zeros :])
    got, said = quietly(read_frames, path)
    if isinstance(got, ValueError):  # all frames were asked for
        assert name in str(got)
    else:  # the damage ends at a key frame: frames are missing, and that is said
        assert len(got) < 60
        assert name in said[0]
    count, said = quietly(frame_count, path)
    assert said or isinstance(count, ValueError) or name == "a.gif"  # counted undecoded
    for i in (0, 25, 28, 31, 40, 50, 58):
        got, _ = quietly(read_frames, path, [i], 32)
        if not isinstance(got, ValueError):  # then it is a frame of the intact video
            assert (intact.float() - got.float()).abs().mean((1, 2, 3)).min() == 0, i


def test_a_key_frame_with_a_hole_is_not_read(tmp_path):
    path = video(tmp_path / "v.mkv", moving(30), "libx264", threads="1", g="10", bf="0")
    with av.open(str(path)) as container:
        places = [(each.pos, each.size) for each in container.demux() if each.is_keyframe]
    data = path.read_bytes()
    at = places[1][0] + places[1][1] // 2
    path.write_bytes(data[:at] + bytes(150) + data[at + 150 :])
    for i in range(30):
        hurt = isinstance(quietly(read_frames, path, [i])[0], ValueError)
        assert hurt == (10 <= i < 20)


def test_a_clip_beside_the_damage_is_read_and_the_damage_told_once(tmp_path):
    path = video(tmp_path / "v.ts", moving(60), "libx264", threads="1", g="10", bf="0")
    whole = read_frames(path)
    data = path.read_bytes()
    at = len(data) // 2 // 188 * 188
    path.write_bytes(data[:at] + data[at + 188 * 4 :])
    with pytest.warns(UserWarning, match=r"v\.ts': damaged between the frames \d+ and \d+") as seen:
        got = read_frames(path, [3, 55])
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert torch.equal(got[0], whole[3])
    assert (whole[50:].float() - got[1].float()).abs().mean((1, 2, 3)).min() == 0
    before, said = quietly(lambda: read_clip(path, 4, stop=15))
    assert torch.equal(before, read_clip(whole[:15].numpy(), 4))
    assert not said
    hurt = [i for i in range(25, 45) if isinstance(quietly(read_frames, path, [i])[0], ValueError)]
    assert hurt == list(range(hurt[0], hurt[-1] + 1))
    assert "start, stop" in refusal(path, read_frames, indices=hurt)


def test_the_lost_end_of_a_wmv_is_noticed(tmp_path):
    path = video(tmp_path / "v.wmv", moving(60), "wmv2")
    data = path.read_bytes()
    path.write_bytes(data[:-6400])
    assert "truncated" in refusal(path, frame_count)
    path.write_bytes(data[:7000] + bytes(len(data) - 7000))
    assert "nothing more can be read" in refusal(path, frame_count)


def test_still_pictures_are_no_damage(tmp_path):
    for name, options in {**HURT, "av1.mp4": {"codec": "libsvtav1", "preset": "12"}}.items():
        for level in (0, 128):
            path = video(tmp_path / f"{level}{name}", [grey(level, 64, 96)] * 30, **options)
            assert quietly(frame_count, path) == (30, [])


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [
        ("a.mkv", "libx264", "aac"),
        ("a.webm", "libvpx", "libopus"),
        ("a.flv", "libx264", "aac"),
        ("a.ts", "libx264", "aac"),
        ("a.mxf", "mpeg2video", "pcm_s16le"),
        ("a.vob", "mpeg2video", "mp2"),
    ],
)
def test_sound_between_the_frames_is_no_damage_and_no_obstacle(tmp_path, name, codec, sound):
    path, rng = tmp_path / name, np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "25"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        audio = container.add_stream(sound, rate=48000, layout="stereo")
        for i, pixels in enumerate(moving(75)):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
            noise = rng.normal(0, 0.1, (2, 1920)).astype(np.float32)
            heard = av.AudioFrame.from_ndarray(noise, "fltp", "stereo")
            heard.rate, heard.pts, heard.time_base = 48000, i * 1920, Fraction(1, 48000)
            container.mux(audio.encode(heard))
        container.mux(stream.encode(None))
        container.mux(audio.encode(None))
    every, said = quietly(read_frames, path, None, 32)
    part, more = quietly(read_frames, path, [60, 62], 32)
    assert not said + more
    assert len(every) == 75
    assert torch.equal(part, every[[60, 62]])


def test_a_video_whose_last_picture_stands_is_no_damage(tmp_path):
    moments = [*range(20), 300]
    path = video(tmp_path / "v.mkv", moving(21), "libx264", pts=moments, bf="0")
    assert quietly(frame_count, path) == (21, [])


# --- what would open other files ---


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "concat.mp4"])
def test_playlists_and_scripts_are_refused(tmp_path, monkeypatch, name, as_bytes):
    monkeypatch.chdir(tmp_path)
    video(tmp_path / "secret.ts", ramp(30), "libx264")
    text = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nsecret.ts\n#EXT-X-ENDLIST\n"
    if name.startswith("concat"):
        text = "ffconcat version 1.0\nfile secret.ts\n"
        (tmp_path / name).write_text(text)
        with av.open(name) as container:  # FFmpeg does follow it
            assert container.format.name == "concat"
    (tmp_path / name).write_text(text)
    opened = []
    monkeypatch.setattr(_video, "decode", lambda *a: opened.append(a))
    with pytest.raises(ValueError, match="expected an intact video itself, no playlist"):
        frame_count(text.encode() if as_bytes else name)
    assert not opened


def test_two_videos_read_in_turn_keep_their_own_damage(tmp_path):
    """PyAV finds what goes with a packet by its address: numbers below 257 share theirs."""
    path = video(tmp_path / "v.mkv", moving(40), "libx264", threads="1", g="10", bf="0")
    with av.open(str(path)) as container:
        places = [(each.pos, each.size) for each in container.demux() if each.size]
    data = bytearray(path.read_bytes())
    at = places[15][0] + places[15][1] // 2
    data[at : at + 100] = bytes(100)
    path.write_bytes(data)

    def hurt(frames):
        return [(index, harmed) for index, _, harmed in frames]

    alone = hurt(_video.decode(path, 0, []))
    assert 0 < sum(harmed for _, harmed in alone) <= 10
    for first in (5, 13, 16):
        frames = _video.decode(path, 0, [])
        started = hurt(next(frames) for _ in range(first))
        assert hurt(_video.decode(path, 0, [])) == alone
        assert started + hurt(frames) == alone
