"""Clips: what is read is the right frame, upright, in order; what is broken is refused by name."""

import doctest
import os
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models import video as zoo

from stepkit import _video, clips
from stepkit.clips import (
    MEAN,
    STD,
    frame_count,
    frame_size,
    mean_std,
    normalise,
    read_clip,
    read_clips,
    read_frames,
    sample_frames,
    unnormalise,
)

# --- making sources ---


def grey(level, height=48, width=64):
    return np.full((height, width, 3), level, np.uint8)


def ramp(n, step=4, **size):
    return [grey(i * step, **size) for i in range(n)]


def corners(height=48, width=64):
    """Red, green, blue and white quarters, clockwise from the top left."""
    frame = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    frame[:h, :w], frame[:h, w:] = (255, 0, 0), (0, 255, 0)
    frame[h:, w:], frame[h:, :w] = (0, 0, 255), (255, 255, 255)
    return frame


def noise(n, height=48, width=64):
    """Frames that no codec predicts, so that a cut loses some."""
    return list(np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8))


def video(
    path, frames, codec="mpeg4", pix_fmt="yuv420p", pts=None, options=None, fmt=None, **encoder
):
    with av.open(str(path), "w", fmt, options=options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=encoder)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = (pts or range(len(frames)))[i], Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def folder(path, frames, name="frame_{}.png", first=1):
    path.mkdir()
    for i, pixels in enumerate(frames):
        Image.fromarray(pixels).save(path / name.format(first + i))
    return path


def shorten(path, share):
    """A file with the end cut off, beside the whole one."""
    data = path.read_bytes()
    short = path.with_name("cut_" + path.name)
    short.write_bytes(data[: int(len(data) * share)])
    return short


def levels(frames):
    """Mean brightness per frame of a uint8 (T, H, W, 3)."""
    return frames.float().mean((1, 2, 3)).tolist()


def refusal(path, call=read_clip, **options):
    with pytest.raises(ValueError, match="expected") as caught:
        call(path, **options)
    assert Path(path).name in str(caught.value)
    return str(caught.value)


# --- normalisation ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (2, 3, 2, 4, 5), (2, 6, 3, 1, 1, 1)])
def test_normalise_and_back(shape, dtype):
    rgb = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    normal = normalise(rgb)
    assert normal.dtype == dtype
    for c in range(3):
        expected = (rgb.double().select(-4, c) - MEAN[c]) / STD[c]
        assert torch.allclose(normal.double().select(-4, c), expected, atol=2e-2, rtol=1e-2)
    assert torch.allclose(unnormalise(normal), rgb, atol=8 * torch.finfo(dtype).eps)


def test_unnormalise_clamps():
    wild = torch.tensor([-50.0, 50.0]).view(1, 2, 1, 1).expand(3, 2, 1, 1)
    assert unnormalise(wild)[:, :, 0, 0].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("call", [normalise, unnormalise])
@pytest.mark.parametrize("wrong", [torch.zeros(16, 3, 8, 8), torch.zeros(3, 8, 8)])
def test_normalise_refuses_other_shapes_and_bytes(call, wrong):
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, T, H, W\)"):
        call(wrong)
    with pytest.raises(ValueError, match="uint8"):
        call(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))


WEIGHTS = [zoo.R2Plus1D_18_Weights, zoo.MViT_V1_B_Weights, zoo.Swin3D_T_Weights]


@pytest.mark.parametrize("weights", [each.DEFAULT for each in WEIGHTS], ids=str)
def test_the_normalisation_of_weights_is_that_of_their_own_transforms(weights):
    rgb = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    own = weights.transforms(resize_size=[256, 256], crop_size=[256, 256])  # normalises only
    for given in (weights, own, (own.mean, torch.tensor(own.std))):
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in mean_std(given))
        assert torch.allclose((rgb.transpose(0, 1) - mean) / std, own(rgb), atol=1e-5)


def test_what_else_stands_for_a_normalisation():
    assert mean_std(None) == ((0.0,) * 3, (1.0,) * 3)
    half = ((0.5,) * 3, (0.25,) * 3)
    assert mean_std((0.5, 0.25)) == mean_std(transforms.Normalize([0.5] * 3, [0.25] * 3)) == half

    class Processor:  # of Hugging Face
        image_mean, image_std = [0.5] * 3, [0.25] * 3

    assert mean_std(Processor()) == half
    for wrong in ("imagenet", 3, (1, 2, 3), (0.5, 0), (float("nan"), 1), ((1, 2), (1, 2))):
        with pytest.raises(ValueError, match=r"^normalise: got .*, expected None, \(mean, std\)"):
            mean_std(wrong)


# --- sampling ---


@pytest.mark.parametrize("n", [16, 17, 31, 32, 33, 100, 10_000])
@pytest.mark.parametrize("frames", [1, 8, 16])
def test_sampling_in_test_mode_is_the_paper_s(n, frames):
    counted_back, frame = [], n - 1
    for _ in range(frames):
        counted_back.append(frame)
        frame -= n // frames
    assert sample_frames(n, frames) == counted_back[::-1]
    assert min(counted_back) >= 0


@pytest.mark.parametrize("n", [1, 3, 15])
@pytest.mark.parametrize("mode", ["test", "train"])
def test_short_sources_repeat_their_frames_evenly(n, mode):
    chosen = sample_frames(n, 16, mode, generator=torch.Generator())
    assert chosen == [i * n // 16 for i in range(16)]
    repeats = [chosen.count(i) for i in range(n)]
    assert max(repeats) - min(repeats) <= 1


def test_sampling_in_train_mode_draws_one_frame_of_each_segment():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_frames(100, 16, "train", generator=generator) for _ in range(300)]
    for segment, frames in enumerate(zip(*drawn, strict=True)):
        low, high = segment * 100 // 16, (segment + 1) * 100 // 16
        assert set(frames) == set(range(low, high))


def test_train_mode_repeats_with_its_generator_and_leaves_the_global_one():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (
        sample_frames(500, 16, "train", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1)
    )
    other = sample_frames(500, 16, "train", generator=torch.Generator().manual_seed(2))
    assert first == second != other
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_in_a_range_is_sampling_shifted():
    assert sample_frames(100, 8, start=30, stop=70) == [30 + i for i in sample_frames(40, 8)]
    assert sample_frames(100, 8, start=30, stop=33) == [30 + i for i in sample_frames(3, 8)]
    assert sample_frames(100, 8, start=60) == sample_frames(100, 8, start=60, stop=100)
    drawn = sample_frames(100, 8, "train", 30, 70, torch.Generator().manual_seed(3))
    assert all(30 + 5 * i <= frame < 35 + 5 * i for i, frame in enumerate(drawn))


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"n": 0}, "n"),
        ({"frames": 0}, "frames"),
        ({"frames": 2.5}, "frames"),
        ({"mode": "val"}, "mode"),
        ({"start": -1}, "start"),
        ({"start": 10}, "start"),
        ({"start": 5, "stop": 5}, "stop"),
        ({"stop": 11}, "stop"),
        ({"mode": "train"}, "generator"),
    ],
)
def test_sampling_refuses(wrong, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        sample_frames(**{"n": 10, **wrong})


# --- content: order, size, orientation ---

KINDS = {
    "plain.mp4": {"codec": "libx264"},
    "fragments.mp4": {"codec": "libx264", "g": "5", "options": {"movflags": "frag_keyframe"}},
    "first.mp4": {"codec": "libx264", "options": {"movflags": "faststart"}},
    "bframes.mkv": {"codec": "libx264", "bf": "3"},
    "old.avi": {},
    "motion.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "web.webm": {"codec": "libvpx", "deadline": "realtime"},
    "web9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
    "palette.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "deep.mkv": {"codec": "ffv1", "pix_fmt": "yuv420p10le"},
    "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "stream.ts": {"codec": "mpeg2video"},
}


@pytest.mark.parametrize("name", KINDS)
def test_containers_give_every_frame_in_order(tmp_path, name):
    path = video(tmp_path / name, ramp(40, 6), **KINDS[name])
    assert frame_count(path) == 40
    assert frame_size(path) == (48, 64)
    # rgb8, the palette of the GIF, has 8 levels of red and green, 4 of blue
    tolerance = 30 if name.endswith("gif") else 5
    assert levels(read_frames(path)) == pytest.approx([6 * i for i in range(40)], abs=tolerance)
    wanted = [39, 0, 20, 20]
    picked = read_frames(path, wanted)
    assert levels(picked) == pytest.approx([6 * i for i in wanted], abs=tolerance)
    assert torch.equal(picked, read_frames(path)[wanted])


@pytest.mark.parametrize("size", [(40, 50), (31, 200), 16])
def test_resize_is_bilinear_and_antialiased_for_both_kinds_of_source(tmp_path, size):
    frames = noise(2, 97, 131)
    height, width = size if isinstance(size, tuple) else (size, size)
    lossless = video(tmp_path / "v.mkv", frames, "ffv1", "bgr0")
    images = folder(tmp_path / "frames", frames)
    got = read_frames(lossless, size=size)
    assert got.shape == (2, height, width, 3)
    assert got.dtype == torch.uint8
    assert torch.equal(got, read_frames(images, size=size))
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    smooth = torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    assert (got.float() - smooth).abs().max() < 2
    by_pillow = np.asarray(
        Image.fromarray(frames[1]).resize((width, height), Image.Resampling.BILINEAR)
    )
    assert np.abs(got[1].numpy().astype(int) - by_pillow).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(97, 131), (33, 48), (48, 33)])
def test_odd_sizes_keep_colours_where_they_are(tmp_path, height, width):
    path = video(tmp_path / "odd.mkv", [corners(height, width)], "libx264", "yuv444p", crf="1")
    assert frame_size(path) == (height, width)
    got = read_frames(path, size=(height, width))[0].numpy().astype(int)
    assert np.abs(got - corners(height, width)).mean() < 4


MATRICES = {  # a, b, c, d of x' = ax + cy, y' = bx + dy, and what it does to an array
    "none": ((1, 0, 0, 1), lambda x: x),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "anticlockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirror": ((-1, 0, 0, 1), np.fliplr),
    "flip": ((1, 0, 0, -1), np.flipud),
    "transpose": ((0, 1, 1, 0), lambda x: np.swapaxes(x, 0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_rotated_video_comes_upright(tmp_path, name):
    (a, b, c, d), turn = MATRICES[name]
    path = video(tmp_path / "phone.mp4", [corners()] * 3, "libx264")
    data = bytearray(path.read_bytes())
    # tkhd, version 0: the matrix starts 40 bytes into the box, after its 8 bytes of header
    at = data.find(b"tkhd") + 4 + 40
    fixed = [int(v * 65536) for v in (a, b)] + [0] + [int(v * 65536) for v in (c, d)] + [0]
    assert data[at : at + 4] == b"\x00\x01\x00\x00"
    data[at : at + 24] = b"".join(v.to_bytes(4, "big", signed=True) for v in fixed)
    path.write_bytes(data)
    upright = turn(corners())
    assert frame_size(path) == upright.shape[:2]
    got = read_frames(path, size=upright.shape[:2])[0].numpy().astype(int)
    assert np.abs(got - upright).mean() < 8


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    moments = [0, 1, 2, 30, 31, 90, 91, 92, 93, 200]
    path = video(tmp_path / "phone.mp4", ramp(10, 20), "libx264", pts=moments, bf="0")
    assert frame_count(path) == 10
    expected = [20 * i for i in sample_frames(10, 5)]
    shown = unnormalise(read_clip(path, 5, 32)).mul(255).mean((0, 2, 3)).tolist()
    assert shown == pytest.approx(expected, abs=4)


def test_first_frame_of_a_16_bit_grey_folder_keeps_its_brightness(tmp_path):
    path = tmp_path / "deep"
    path.mkdir()
    Image.fromarray(np.full((8, 8), 100 * 256, np.uint16)).save(path / "0.png")
    assert levels(read_frames(path)) == [100]


def test_photographs_with_an_orientation_come_upright(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(corners()).save(path / "0.png", exif=exif)
    assert frame_size(path) == (64, 48)
    upright = np.rot90(corners(), -1)
    assert np.array_equal(read_frames(path, size=(64, 48))[0].numpy(), upright)


# --- clips ---


def test_clip_is_the_sampled_frames_normalised(tmp_path):
    frames = noise(40)
    path = video(tmp_path / "v.mkv", frames, "ffv1", "bgr0")
    clip = read_clip(path, 8, (24, 32), start=3, stop=35)
    assert clip.shape == (3, 8, 24, 32)
    assert clip.dtype == torch.float32
    chosen = read_frames(path, sample_frames(40, 8, start=3, stop=35), (24, 32))
    assert torch.equal(clip, normalise(chosen.permute(3, 0, 1, 2).float() / 255))
    assert clip.mean((1, 2, 3)).abs().max() < 1  # normalised: noise would be near 127 otherwise


def test_train_clips_follow_the_generator(tmp_path):
    path = video(tmp_path / "v.mkv", ramp(60), "ffv1", "bgr0")
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    clip = read_clip(path, 6, 8, "train", generator=generators[0])
    drawn = sample_frames(60, 6, "train", generator=generators[1])
    shown = unnormalise(clip)[0, :, 0, 0].mul(255 / 4).round().int().tolist()
    assert shown == drawn
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("claimed", [1, 20, 45])
def test_a_wrong_count_in_the_metadata_changes_nothing(tmp_path, claimed):
    path = video(tmp_path / "liar.avi", ramp(30))
    honest = video(tmp_path / "honest.avi", ramp(30))
    data = bytearray(path.read_bytes())
    at = data.find(b"strh") + 8 + 32  # dwLength
    assert int.from_bytes(data[at : at + 4], "little") == 30
    data[at : at + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(data)
    for options in ({}, {"start": 25}, {"mode": "train"}):
        pair = []
        for source in (path, honest):
            generator = torch.Generator().manual_seed(1)
            clip = read_clip(source, 8, 16, generator=generator, **options)
            pair.append((clip, generator.get_state()))
        assert torch.equal(pair[0][0], pair[1][0])
        assert torch.equal(pair[0][1], pair[1][1])


def test_three_frames_fill_a_clip_of_sixteen(tmp_path):
    path = video(tmp_path / "short.avi", ramp(3, 80))
    shown = unnormalise(read_clip(path)).mul(255).mean((0, 2, 3)).tolist()
    assert shown == pytest.approx([0] * 6 + [80] * 5 + [160] * 5, abs=4)


def test_several_sources_make_a_batch_in_their_order(tmp_path):
    dark = video(tmp_path / "dark.avi", [grey(10)] * 4)
    light = folder(tmp_path / "light", [grey(240)] * 4)
    batch = read_clips([light, str(dark)], frames=2, size=(8, 12))
    assert batch.shape == (2, 3, 2, 8, 12)
    assert torch.equal(batch[0], read_clip(light, 2, (8, 12)))
    assert torch.equal(batch[1], read_clip(dark, 2, (8, 12)))
    with pytest.raises(ValueError, match="paths: got none"):
        read_clips([])
    with pytest.raises(ValueError, match="a list of paths"):
        read_clips(str(dark))


def test_a_name_that_looks_like_a_protocol_and_old_tags_are_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = video(tmp_path / "tag.avi", ramp(5))
    data = bytearray(path.read_bytes())
    at = data.find(b"ISFT") + 8  # the name of the software, here in Latin-1
    data[at : at + 4] = "é è ".encode("latin-1")
    Path("clip:1 %03d.avi").write_bytes(data)
    assert frame_count("clip:1 %03d.avi") == 5


def test_ten_thousand_frames_take_the_memory_of_sixteen(tmp_path):
    path = video(tmp_path / "long.avi", [grey(i % 256, 16, 16) for i in range(10_000)])
    tracemalloc.start()
    try:
        shown = unnormalise(read_clip(path, size=64)).mul(255).mean((0, 2, 3)).tolist()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6  # all of them: 8 MB as they come, 120 MB resized
    assert shown == pytest.approx([i % 256 for i in sample_frames(10_000)], abs=6)


def test_files_are_closed(tmp_path):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")
    whole = video(tmp_path / "v.avi", noise(30))
    images = folder(tmp_path / "frames", ramp(5))
    short = shorten(whole, 0.5)
    read_clip(whole)
    before = len(os.listdir("/proc/self/fd"))
    read_frames(whole, [1])
    frame_size(whole)
    read_clip(images)
    refusal(short)
    refusal(whole, read_frames, indices=[30])
    assert len(os.listdir("/proc/self/fd")) == before


# --- folders ---


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "jpg", "jpeg", "webp"])
def test_folders_are_in_the_order_of_their_numbers(tmp_path, suffix):
    path = folder(tmp_path / "a b.c", ramp(14, 15), "img 1_{}." + suffix, first=95)
    (path / ".img 1_96.png").write_bytes(b"a hidden file")
    (path / "._img 1_97.png").write_bytes(b"a hidden file")
    (path / "notes.txt").write_text("no frame")
    (path / "flow").mkdir()
    assert frame_count(path) == 14
    assert levels(read_frames(path)) == pytest.approx([15 * i for i in range(14)], abs=3)
    assert levels(read_frames(path, [3])) == pytest.approx([45], abs=3)


def test_palette_and_transparent_images_become_rgb(tmp_path):
    path = tmp_path / "mixed"
    path.mkdir()
    picture = Image.fromarray(corners())
    picture.quantize(8).save(path / "0.png")
    picture.convert("RGBA").save(path / "1.png")
    picture.convert("L").save(path / "2.png")
    got = read_frames(path, size=(48, 64)).int()
    expected = torch.from_numpy(corners()).int()
    assert (got[:2] - expected).abs().max() <= 2
    assert (got[2, 0, 0] == 76).all()  # the luma of red


def test_folder_errors_name_the_file(tmp_path):
    path = folder(tmp_path / "frames", ramp(5))
    Image.fromarray(grey(9, 20, 30)).save(path / "frame_4.png")
    message = refusal(path)
    assert "frame_4.png" in message
    assert "20x30" in message
    assert "48x64" in message
    good = (path / "frame_2.png").read_bytes()
    for broken in (good[: len(good) // 2], b"", b"no image"):
        (path / "frame_4.png").write_bytes(broken)
        assert "frame_4.png" in refusal(path)
    assert levels(read_frames(path, [0, 1])) == [0, 4]  # what is not asked for is not opened
    empty = tmp_path / "nothing here"
    empty.mkdir()
    for call in (read_clip, read_frames, frame_count, frame_size):
        assert "without images" in refusal(empty, call)


# --- what is broken ---

CALLS = [read_clip, read_frames, frame_count, frame_size]


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_video_is_refused(tmp_path, call):
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4.*expected"):
        call(tmp_path / "missing.mp4")
    for name in ("text.mp4", "text.txt", "text.bin", "text.avi"):
        (tmp_path / name).write_text("not a video\n" * 300)
        refusal(tmp_path / name, call)
    (tmp_path / "empty.mp4").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.mp4", call)


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp3", rate=44100)
        silence = np.zeros((2, 4608), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("call", CALLS)
def test_sound_is_no_video_not_even_with_a_cover(tmp_path, call):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "NONE"))
        file.writeframes(bytes(8000))
    assert "no video" in refusal(tmp_path / "sound.wav", call)
    song = sound(tmp_path / "song.mp3")
    Image.fromarray(corners()).save(tmp_path / "cover.png")
    picture = b"\0image/png\0\x03\0" + (tmp_path / "cover.png").read_bytes()
    block = b"APIC" + len(picture).to_bytes(4, "big") + b"\0\0" + picture
    digits = [len(block) >> shift & 127 for shift in (21, 14, 7, 0)]
    song.write_bytes(b"ID3\x03\0\0" + bytes(digits) + block + song.read_bytes())
    with av.open(str(song)) as container:
        assert len(container.streams.video) == 1  # FFmpeg does see the cover
    assert "no video" in refusal(song, call)


def test_a_video_without_frames_or_decoder_is_refused(tmp_path):
    path = video(tmp_path / "v.avi", ramp(5))
    strange = tmp_path / "strange.avi"
    strange.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    assert "no decoder" in refusal(strange)
    data = path.read_bytes()
    head = tmp_path / "head.avi"
    head.write_bytes(data[:4] + bytes(4) + data[8 : data.find(b"movi") + 4])
    assert "no frame" in refusal(head)


LOSSY = [name for name in KINDS if name != "stream.ts"]  # MPEG-TS tells its length nowhere


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", LOSSY)
def test_truncated_videos_are_refused(tmp_path, name, share):
    path = video(tmp_path / name, noise(20, 32, 32), **KINDS[name])
    assert frame_count(path) == 20
    short = shorten(path, share)
    for call in (read_clip, read_frames, frame_count):
        assert "truncated" in refusal(short, call)


def test_avi_with_a_wrong_length_and_all_its_frames_is_read(tmp_path):
    path = video(tmp_path / "v.avi", ramp(20))
    data = bytearray(path.read_bytes())
    data[4:8] = (len(data) + 5000).to_bytes(4, "little")
    path.write_bytes(data)
    assert frame_count(path) == 20
    data[4:8] = bytes(4)  # a writer that never came back to fill it in
    path.write_bytes(data)
    assert frame_count(path) == 20


def test_avi_cut_inside_its_last_frame_is_refused(tmp_path):
    data = video(tmp_path / "v.avi", noise(20)).read_bytes()
    path = tmp_path / "cut.avi"
    last = data.rfind(b"00dc", 0, data.find(b"idx1"))
    length = int.from_bytes(data[last + 4 : last + 8], "little")
    path.write_bytes(data[: last + 8 + length // 2])
    assert "truncated" in refusal(path, frame_count)
    assert "frame 19 is damaged" in refusal(path)


def test_gif_may_lack_its_trailer_or_end_in_a_new_line(tmp_path):
    path = video(tmp_path / "v.gif", ramp(20, 12), **KINDS["palette.gif"])
    data = path.read_bytes()
    assert data.endswith(b"\0;")
    for variant in (data + b"\r\n", data[:-1]):
        path.write_bytes(variant)
        assert frame_count(path) == 20


def test_bytes_after_the_end_do_not_count_as_truncation(tmp_path):
    for name in ("plain.mp4", "old.avi", "web.webm"):
        path = video(tmp_path / name, ramp(20), **KINDS[name])
        path.write_bytes(path.read_bytes() + b"\x7f\xff\xff\xffSEFTmaker's notes")
        assert frame_count(path) == 20


def test_mp4_tells_its_length_in_three_ways(tmp_path):
    path = video(tmp_path / "v.mp4", noise(20), "libx264", options={"movflags": "faststart"})
    data = path.read_bytes()
    at = data.find(b"mdat") - 12  # behind an empty box of 8 bytes, room for a number of 64 bits
    assert data[at : at + 8] == b"\0\0\0\x08free"
    length = len(data) - at
    large = data[:at] + b"\0\0\0\x01mdat" + length.to_bytes(8, "big") + data[at + 16 :]
    open_end = data[: at + 8] + b"\0\0\0\0mdat" + data[at + 16 :]
    for variant in (large, open_end):
        path.write_bytes(variant)
        assert frame_count(path) == 20
    path.write_bytes(large[:-2000])
    assert "truncated" in refusal(path)


def test_recordings_of_unknown_length_are_read(tmp_path):
    path = video(tmp_path / "live.mkv", ramp(10), options={"live": "1"})
    assert b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" in path.read_bytes()
    assert frame_count(path) == 10


@pytest.mark.parametrize("make", [video, folder])
def test_frames_outside_the_source_are_refused(tmp_path, make):
    path = make(tmp_path / "v.avi", ramp(10))
    assert "0..9" in refusal(path, read_frames, indices=[0, 10])
    assert "the 10 frames" in refusal(path, stop=11)
    assert "the 10 frames" in refusal(path, start=10)
    refusal(path, stop=11, mode="train", generator=torch.Generator())
    assert levels(read_frames(path, [9])) == pytest.approx([36], abs=4)


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"size": 0}, "size"),
        ({"size": (8,)}, "size"),
        ({"size": (8, 8, 8)}, "size"),
        ({"size": "large"}, "size"),
        ({"size": (8, 2.5)}, "size"),
        ({"frames": 0}, "frames"),
        ({"start": -1}, "start"),
        ({"start": None}, "start"),
        ({"start": 4, "stop": 4}, "stop"),
        ({"mode": "train"}, "generator"),
        ({"mode": "both"}, "mode"),
    ],
)
def test_bad_arguments_are_named(tmp_path, wrong, argument):
    path = folder(tmp_path / "frames", ramp(5, height=8, width=8))
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        read_clip(path, **wrong)
    for indices in ([], [-1], [0.5]):
        with pytest.raises(ValueError, match=r"^indices: got .*, expected "):
            read_frames(path, indices)


def test_examples_of_the_docstrings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video(Path("surfing.mp4"), ramp(25, height=240, width=320), "libx264", preset="ultrafast")
    result = doctest.testmod(clips)
    assert result.failed == 0
    assert result.attempted >= 8


# --- real clips ---


@pytest.mark.real_data
def test_all_real_sources_decode(real_data):
    videos = [path for path in real_data.rglob("*") if path.suffix in (".avi", ".mp4")]
    nested = ("ucf101-24/frames/*/*", "epic-object/frames/*", "kinetics-frames/*")
    folders = [path for pattern in nested for path in real_data.glob(pattern)]
    assert len(videos) >= 315
    assert len(folders) >= 11
    assert any(" " in path.name for path in folders)
    for path in [*videos, *folders]:
        assert frame_count(path) >= 16, path


@pytest.mark.real_data
def test_real_clips_are_the_frames_they_claim_to_be(real_data):
    sources = [
        *(real_data / "clips").glob("*.avi"),
        *(real_data / "ucf101-24/videos").glob("*/*g01_c02*"),
        *(real_data / "kinetics-frames").glob("playing*"),
    ]
    for path in sources:
        clip = read_clip(path, size=32)
        chosen = read_frames(path, sample_frames(frame_count(path)), 32)
        assert torch.equal(clip, normalise(chosen.permute(3, 0, 1, 2).float() / 255)), path
        assert clip.std() > 0.2, path


@pytest.mark.real_data
def test_real_videos_cut_short_are_refused(real_data, tmp_path):
    names = ("SoccerJuggling/v_SoccerJuggling_g23_c01.avi", "Basketball/v_Basketball_g01_c01.avi")
    for name in names:
        whole = real_data / "ucf101-24/videos" / name
        for share in (0.4, 0.9):
            short = tmp_path / whole.name
            data = whole.read_bytes()
            short.write_bytes(data[: int(len(data) * share)])
            assert "truncated" in refusal(short)


# ---------------------------------------------------------------------------------- without end


def test_a_video_that_unfolds_into_too_many_frames_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_video, "MOST_FRAMES", 5)
    path = video(tmp_path / "a.mp4", noise(8))
    for read in (frame_count, read_frames, read_clip):
        with pytest.raises(ValueError, match="of more than 5 frames, expected a part of it"):
            read(path)


def test_a_video_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_video, "MOST_SECONDS", -1)
    path = video(tmp_path / "a.mp4", noise(8))
    for read in (read_frames, read_clip):
        with pytest.raises(ValueError, match="seconds of decoding, expected a part of it"):
            read(path)


def test_frames_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(_video, "MOST_PIXELS", 100)
    monkeypatch.setattr(_video, "_packets", lambda *a: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"whose frames are \d+x\d+, expected at most 100 pixels"):
        read_frames(video(tmp_path / "a.mp4", noise(3)))


def test_a_folder_of_too_many_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_video, "MOST_FRAMES", 2)
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="of 3 images, expected at most 2"):
        read_frames(tmp_path)
