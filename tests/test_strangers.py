"""Files and names that a stranger made: refused by name, before they cost memory, time or more."""

import contextlib
import csv
import io
import json
import os
import pickle
import re
import resource
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import av
import matplotlib
import mistune
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import stepkit as sk
from stepkit import _settings, _sources, _video, panels, report
from stepkit._settings import read_yaml
from stepkit.clips import frame_count, read_frames
from stepkit.data import epic, listed, sample, something, ucf101
from stepkit.data._unpickle import MOST_STEPS, unpickle
from stepkit.data.files import position
from stepkit.data.sample import file_name
from stepkit.data.ucf101 import frame_numbers, read_annotations, read_split
from stepkit.networks import load_weights
from stepkit.panels import plain_name, read_upload
from stepkit.viz import plots
from tools import store

# --- ids that become names of files --------------------------------------------------------------


@pytest.mark.parametrize("id_", ["v_Diving_g01_c01", "P20_04_22332", "class__vidéo 1@0.7-1", "-"])
def test_a_harmless_id_is_its_own_file_name(id_):
    assert file_name(id_) == id_


HOSTILE = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "C:x",
    "con",
    "NUL.txt",
]
HOSTILE += ["a\0b", "a\nb", "a\u202efdp", "\udcff", "x" * 196, "é" * 98, "a|b", "a_b", "a?b", " a"]


def test_hostile_ids_become_names_that_any_file_system_takes(tmp_path):
    names = [file_name(id_) for id_ in HOSTILE]
    assert len(set(names)) == len(names)
    for name in names:
        path = tmp_path / (name + "y" * 60)
        path.write_text("")
        assert path.parent.resolve() == tmp_path
        assert path.name[0] != "."
    assert len(os.listdir(tmp_path)) == len(names)


def test_no_id_can_pass_for_another():
    """The name of a hostile id, taken as an id, is another clip's."""
    assert file_name(file_name("../x")) != file_name("../x")


def test_a_file_whose_name_is_no_text_has_a_place_in_the_splits():
    assert 0 <= position(os.fsdecode(b"\xff.mp4")) < 1


# --- annotations that are pickles ----------------------------------------------------------------

REBUILT = (
    b"\x80\x02cnumpy\ndtype\n(U\x02U1K\0K\x01tRq\0(K\x03U\x01<NNNK\x04K\x04K\x08tb0"  # a dtype, U1
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR"
    b"(K\x01K\x01K\x04\x86h\0I00\nU\x10" + b"1\0\0\0" * 4 + b"tbq\x010"  # 16 bytes of it, (1, 4)
    b"h\0(K\x03U\x01<NNNM\x40\x9cK\x04K\x08tb0"  # the dtype anew, U10000
    b"(U\x0dA/v_A_g01_c01(U\x05labelK\0U\x04numfK\x01U\x0bannotations"
    b"((U\x02sfK\0U\x02efK\x01U\x05boxesh\x01dldd."
)


def test_a_dtype_rebuilt_under_its_array_changes_nothing(tmp_path):
    """Python's own machine makes of 16 bytes an array of 160,000: whoever reads it may crash."""
    boxes = unpickle(REBUILT)["A/v_A_g01_c01"]["annotations"][0]["boxes"]
    assert boxes.nbytes == 16
    assert boxes.tolist() == [["1", "1", "1", "1"]]
    path = tmp_path / "pyannot.pkl"
    path.write_bytes(REBUILT)
    with pytest.raises(ValueError, match=r"pyannot\.pkl.*boxes: got <U1"):
        read_annotations(path)


def entry(boxes, sf=0, actors=1):
    actor = {"sf": sf, "ef": sf + 1, "boxes": boxes}
    return {"label": 0, "numf": 1, "annotations": [actor] * actors}


def shared(depth):
    rows = [1.0] * 10
    for _ in range(depth):
        rows = [rows] * 10
    return {"A/v_A_g01_c01": entry(rows)}


def unfolding():
    """A thousand videos of a thousand actors, all of one array of 4,000 boxes."""
    video = entry(np.ones((4000, 4)), actors=1000)
    return {f"A/v_A_g01_c{i:02d}": video for i in range(1000)}


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (shared(8), "boxes: got <class 'list'>"),
        (unfolding(), "boxes: got more, expected at most"),
        ({"A/v": entry(np.array([[np.nan, 0, 1, 1]]))}, "boxes: got NaN"),
        ({"A/v": entry(np.array([[0, 0, 1e300, 1]]))}, "boxes: got NaN or more"),
        ({"A/v": entry(np.array([[-(2**63), 0, 1, 1]]))}, "boxes: got NaN or more"),
        ({"A/v": entry(np.array([["1", "1", "1", "1"]]))}, "boxes: got <U1"),
        ({"A/v": entry(np.ones((2, 3)))}, r"boxes: got float64 \(2, 3\)"),
        ({"A/v": [1] * 3}, "TypeError"),
    ],
)
def test_hostile_annotations_are_named_and_cost_no_memory(tmp_path, found, named):
    path = tmp_path / "pyannot.pkl"
    data = pickle.dumps(found, protocol=3)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"pyannot\.pkl.*{named}"):
        read_annotations(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"(" * 1000 + b".", "IndexError"),  # STOP on an empty stack
        (b"]" * 1001 + b".", "more steps"),
        # tuples in tuples, whose hash would recurse
        (b"]" + b"\x85" * 100_000 + b"s.", "IndexError"),
        (b"}]" + b"\x85" * 100_000 + b"Ns.", "keys of text"),
        (b"I1\n(" + b"l" * 3 + b".", "IndexError"),
        (b"cos\nsystem\n(S'echo'\ntR.", r"os\.system"),
        (b"(S'echo'\nios\nsystem\n.", "opcode INST"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"Pid\n.", "opcode PERSID"),
        (b"cnumpy\nndarray\n(K\x01tR.", "a call of ndarray"),
        (b"S'x'\n(K\x01tR.", "a call of a str"),
        (b"}(S'a'\nK\x01ub.", "IndexError"),
    ],
)
def test_what_a_pickle_may_not_ask_for_is_named(tmp_path, monkeypatch, data, named):
    if named == "more steps":
        monkeypatch.setattr("stepkit.data._unpickle.MOST_STEPS", 1000)
    path = tmp_path / "pyannot.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"pyannot\.pkl.*{named}"):
        read_annotations(path)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_values_and_arrays_are_read_as_python_reads_them(protocol):
    values = {"text": "ä\n", "none": None, "sum": [1, -1, 2**40, -(2**80), 0.5, True, False]}
    values |= {"nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"a": {}}, [[]])}
    if protocol > 2:  # before, Python 3 writes bytes as a call of a codec
        arrays = [np.arange(6, dtype=code).reshape(2, 3) for code in ("u1", ">i2", "<f4", "f8")]
        arrays += [np.asfortranarray(arrays[2]), arrays[3].T, arrays[0] > 2, np.array(["é", "bc"])]
        values |= {"arrays": arrays, "again": arrays[0], "scalar": np.float32(0.25)}
        values |= {"bytes": b"\xff\0", "name": np.str_("é")}
    found = unpickle(pickle.dumps(values, protocol=protocol))
    arrays, expected = found.pop("arrays", []), values.pop("arrays", [])
    for array, right in zip(arrays, expected, strict=True):
        assert array.dtype == right.dtype
        assert array.tolist() == right.tolist()
    assert found.pop("again", None) is (arrays[0] if arrays else None)
    values.pop("again", None)
    assert found == values


@pytest.mark.real_data
def test_the_published_annotation_reads_as_with_pythons_own_machine(real_data):
    path = real_data / "ucf101-24/annotations/pyannot.pkl"
    began = time.process_time()
    found = read_annotations(path)
    assert time.process_time() - began < 10
    right = pickle.loads(path.read_bytes(), encoding="latin1")
    assert found.keys() == {str(name) for name in right}
    for name, video in right.items():
        assert (found[name]["label"], found[name]["numf"]) == (video["label"], video["numf"])
        for actor, expected in zip(found[name]["annotations"], video["annotations"], strict=True):
            assert actor["sf"] == expected["sf"]
            assert np.array_equal(actor["boxes"], expected["boxes"])


# --- lists ---------------------------------------------------------------------------------------

READERS = {
    "annotations": read_annotations,
    "split_list": read_split,
    "class_list": epic.read_classes,
}


@pytest.mark.parametrize("argument", READERS)
def test_lists_are_files_of_bounded_size(tmp_path, argument):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"{argument}: got '{path}', expected a file"):
            READERS[argument](path)
    with (tmp_path / "long").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ValueError, match=f"{argument}: got '.*long' of 16777217 bytes"):
        READERS[argument](tmp_path / "long")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stop_frame": "999999999"}, "start_frame 31, stop_frame 999999999 .*at most 108000"),
        ({"stop_frame": "nan"}, "stop_frame 'nan' .*a whole number"),
        ({"start_frame": "-1"}, "start_frame '-1' .*a whole number"),
        ({"seg_id": "1" * 300}, "seg_id '1+' .*a whole number"),
        ({"video_id": f"P01_{'1' * 300}"}, "video_id 'P01_1+' .*P01_01"),
        ({"bounding_boxes": "{31: (1e999, 0, 5, 5)}"}, "bounding_boxes '{31: .1e999"),
        ({"bounding_boxes": "{31: (nan, 0, 5, 5)}"}, "bounding_boxes '{31: .nan"),
        ({"bounding_boxes": "-" * 100_000 + "1"}, "bounding_boxes '-+'"),
        ({"bounding_boxes": "{31: 5*5*5}"}, "bounding_boxes '{31: 5"),
    ],
)
def test_a_hostile_row_of_epic_is_named(tmp_path, wrong, named):
    row = {"seg_id": "7", "video_id": "P01_01", "noun": "pan", "noun_label": "0"}
    row |= {"start_frame": "31", "stop_frame": "90", "bounding_boxes": "{31: (0, 0, 5, 5)}"}
    for content in (row, row | wrong):
        with (tmp_path / "list.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(content)
        if content == row:
            assert len(epic.read_list(tmp_path / "list.csv", ["pan"])) == 1
    with pytest.raises(ValueError, match=f"^split_list: got {named}"):
        epic.read_list(tmp_path / "list.csv", ["pan"])


def test_a_list_that_is_wrong_from_the_start_is_not_read_to_its_end(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"noun,noun_label\n" + b"a\n" * 2**20)
    began = time.process_time()
    with pytest.raises(ValueError, match="class_list: got noun_label '' in line 2 of"):
        epic.read_classes(tmp_path / "list.csv")
    assert time.process_time() - began < 1


def test_an_id_of_something_that_no_file_could_bear_is_named(tmp_path):
    entries = [{"id": "7" * 300, "template": "Opening [something]"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"split_list: got id '7+' in entry 0 of"):
        something.read_list(tmp_path / "list.json", ["Opening something"])


# --- images --------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A file of 100 bytes that says it is so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def gif(width, height):
    frames = [Image.new("L", (8, 8), 50 * i) for i in range(4)]
    frames[0].save(file := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("name", "data"), [("1.png", png(13000, 13000)), ("1.png", gif(13000, 13000))]
)
def test_an_image_beyond_any_camera_is_refused_by_its_header(tmp_path, name, data, last):
    (tmp_path / name).write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sources = [tmp_path, tmp_path / name, data]
    for source in sources:
        with pytest.raises(ValueError, match=r"13000x13000|of no known size.*at most 67108864"):
            read_frames(source, [3] if last and source is data else [0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100 * 1024


def test_a_png_takes_no_memory_for_what_it_only_says_that_follows(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    data = (tmp_path / "1.png").read_bytes()
    at = data.index(b"IDAT")
    (tmp_path / "1.png").write_bytes(data[: at - 4] + b"\x7f\xff\xff\xff" + data[at:])
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        read_frames(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_raw_stream_that_lost_a_part_is_refused():
    """It tells neither times nor length: of 30 frames, 8 were missing in silence."""
    with av.open(file := io.BytesIO(), "w", format="hevc") as container:
        stream = container.add_stream("libx265", rate=25, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 10
        for t in range(30):
            rgb = np.random.default_rng(t).integers(0, 255, (8, 8, 3), np.uint8)
            rgb = np.ascontiguousarray(rgb.repeat(8, 0).repeat(8, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    data = file.getvalue()
    assert frame_count(data) == 30
    for at in (len(data) // 3, len(data) // 2):
        with pytest.raises(ValueError, match="damaged or truncated"):
            frame_count(data[:at] + data[at + len(data) // 8 :])


def test_an_image_file_that_is_too_long_is_refused_unread(tmp_path):
    with (tmp_path / "1.png").open("wb") as file:
        file.write(png(8, 8))
        file.truncate(2**30)
    with pytest.raises(ValueError, match="of 1073741824 bytes, expected at most 536870912 bytes"):
        read_frames(tmp_path)


def test_a_format_that_starts_other_programs_is_no_image(tmp_path, monkeypatch):
    """Pillow calls Ghostscript for EPS, under whatever name."""
    words = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "1.png").write_bytes(words)
    with Image.open(tmp_path / "1.png") as image:
        assert image.format == "EPS"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("called"))
    with pytest.raises(ValueError, match=r"1\.png', which does not decode"):
        read_frames(tmp_path)


GIF = bytes.fromhex(  # three frames of 4x4
    "4749463839610400040081000000000000000000000000000021ff0b4e45545343415045322e3003010000002c"
    "00000000040004000008090001081c48b02080800021f90401000001002c000000000400040081323232000000"
    "00000000000008090001081c48b02080800021f90401000001002c000000000400040081646464000000000000"
    "00000008090001081c48b0208080003b"
)


@pytest.mark.parametrize(("at", "put"), [(68, b"\1"), (83, b"\xff"), (68, b""), (110, b"")])
def test_what_pillow_raises_unasked_is_said_as_a_damaged_image(at, put):
    """An IndexError, twice, and a struct.error, twice."""
    assert len(read_frames(GIF)) == 3
    with pytest.raises(ValueError, match=r"^path: got a BytesIO, .*expected an intact"):
        read_frames(GIF[:at] + put + GIF[at + 1 :])


def test_pipes_and_devices_are_neither_videos_nor_frames(tmp_path):
    os.mkfifo(tmp_path / "v_A_g01_c01.0001.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "v_A_g01_c01.0002.png")
    assert len(read_frames(tmp_path)) == 1
    assert frame_numbers(tmp_path) == [1]  # of the one that is read
    for path in (tmp_path / "v_A_g01_c01.0001.png", "/dev/zero"):
        with pytest.raises(FileNotFoundError, match=r"^path: got '.*', expected a video"):
            read_frames(path)


# --- uploads -------------------------------------------------------------------------------------


def test_an_upload_opens_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("secret.png")
    for words in ("ffconcat version 1.0\nfile secret.png\n", "#EXTM3U\n#EXTINF:1,\nsecret.png\n"):
        with pytest.raises(ValueError, match=r"'list\.mp4', .*no playlist"):
            read_upload("list.mp4", words.encode(), 4, (8, 8))


def test_an_upload_that_is_too_long_is_not_copied():
    content = memoryview(bytes(9 * 2**20 + 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.mp4: got 9\.0 MB, expected a video of at most 9 MB"):
        read_upload("a.mp4", content, 4, (8, 8))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("my video.mp4", "my video.mp4"),
        ("../../etc/passwd", "passwd"),
        ("a\u202e4pm.exe", "a\ufffd4pm.exe"),
        ("C:\\x\\v\0.mp4", "v\ufffd.mp4"),
        ("é" * 300, "é" * 80),
        ("/", "upload"),
    ],
)
def test_the_name_of_an_upload_shows_as_it_is(name, shown):
    assert plain_name(name) == shown


# --- YAML ----------------------------------------------------------------------------------------


def test_yaml_as_deep_as_any_profile_is_read():
    assert read_yaml("x", "[" * 20 + "]" * 20) == json.loads("[" * 20 + "]" * 20)
    assert read_yaml("x", "{a: &name [1], b: 2}") == {"a": [1], "b": 2}


LAUGHS = "a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 20_000 + "]" * 20_000, "more than 20 levels"),
        ("{a: " * 21, "more than 20 levels"),
        ("- " * 20_000, "more than 20 levels"),
        (LAUGHS, "an alias in .* line 2"),
        ("&a [*a]", "an alias"),
        ("x" * 100_001, "got 100001 characters, expected at most 100000"),
        ("!!int ''", "plain values"),
        ("!!bool x", "plain values"),
        ("!!timestamp x", "plain values"),
        ("9" * 5000, "plain values"),
        ("!!python/object/apply:os.system [x]", "plain values"),
    ],
)
def test_yaml_beyond_plain_values_is_named(text, named):
    began = time.process_time()
    with pytest.raises(ValueError, match=f"^--set seed: .*{named}"):
        read_yaml("--set seed", text)
    assert time.process_time() - began < 2


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "0.weight",
            torch.ones(3, 2, dtype=torch.int8),
            "torch.int8 as 0.weight, expected torch.float32",
        ),
        ("0.weight", torch.ones(3, 2, dtype=torch.complex64), "torch.complex64 as 0.weight"),
        ("0.weight", torch.ones(3, 2, dtype=torch.bool), "torch.bool as 0.weight"),
        ("0.weight", torch.ones(3, 2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn as 0.weight"),
        ("0.bias", torch.tensor([0, 1, torch.nan]), "NaN or inf in 0.bias"),
        ("0.bias", torch.tensor([0, 1, 1e300], dtype=torch.float64), "NaN or inf in 0.bias"),
        ("1.num_batches_tracked", torch.tensor(1.0), "torch.float32 as 1.num_batches_tracked"),
        (
            "1.num_batches_tracked",
            torch.tensor(1, dtype=torch.int8),
            "torch.int8 as 1.num_batches_tracked",
        ),
        ("0.weight", torch.ones(2, 3), r"other tensors: \['0.weight'\]"),
        ("0.weight", None, r"other tensors: \['0.weight'\]"),
        ("0.extra", torch.ones(1), r"other tensors: \['0.extra'\]"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_is_named(tmp_path, key, value, named):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {k: v for k, v in (model.state_dict() | {key: value}).items() if v is not None}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"^weights .*w\.safetensors: got {named}"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_other_precision_is_loaded(tmp_path, dtype):
    model = nn.Linear(2, 3)
    wanted = {"weight": torch.tensor([[1, 2], [3, 4], [5, -0.5]]), "bias": torch.ones(3)}
    save_file({k: v.to(dtype) for k, v in wanted.items()}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert all(tensor.equal(wanted[name]) for name, tensor in model.state_dict().items())


# --- names that become text ----------------------------------------------------------------------

NAMES = ["$x^2$", r"$\frac{", "a|b", "<script>alert(1)</script>", "_a_", "a\\", "\u202eb", "`c`"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_formula_and_no_tex(name):
    clip, curve = torch.zeros(3, 2, 8, 8), ([0, 0.5, 1], [[0.1, 0.8, 0.9]])
    history = pd.DataFrame({"epoch": [0], "loss": [1.0], "val_top1": [0.5]})
    pictures = [sk.show(clip, {name: torch.rand(2, 8, 8)}), plots.plot_curves({name: curve})]
    pictures += [plots.plot_training({name: history}), sk.show(clip, title=name)]
    for picture in pictures:
        with matplotlib.rc_context({"svg.fonttype": "none", "text.usetex": False}):
            picture.savefig(file := io.StringIO(), format="svg")
        drawn = " ".join(ElementTree.fromstring(file.getvalue()).itertext())
        if name[0] == "$":
            assert name in drawn


def test_names_in_the_table_of_claims_show_as_they_are():
    rows = [{"claim": name, "dataset": name, "model": name, "against": name} for name in NAMES]
    table = pd.DataFrame(rows).assign(profile="quick", unit="", ratio=0.0, verdict="holds")
    page = store.claims_page(table.assign(mean=0.1, low=0.0, high=0.2))
    lines = page[page.index("## Profile") :].splitlines()[2:]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {len(NAMES) + 3}
    html = mistune.create_markdown(escape=False, plugins=["table"])("\n".join(lines))
    table = ElementTree.fromstring(html.replace("<br>", "\n"))
    head, *body = (["".join(cell.itertext()) for cell in row] for row in table.iter("tr"))
    shown = [name.replace("\u202e", "\ufffd") for name in NAMES]
    assert sorted(head[1:]) == sorted(f"{name}\n{name}" for name in shown)
    assert [row[0] for row in body] == shown
    for name, row in zip(shown, body, strict=True):
        assert [cell for cell in row[1:] if cell] == [f"holds\n0.1 [0, 0.2]\nagainst {name}"]


def damaged(path):
    path.write_bytes(path.read_bytes()[:200])


def test_a_damaged_notebook_is_named_and_the_others_are_shown(tmp_path):
    cell = nbformat.v4.new_markdown_cell("# Fine")
    book = nbformat.v4.new_notebook(cells=[cell])
    book.metadata["papermill"] = {"start_time": "2020-01-01T00:00:00", "parameters": {}}
    (tmp_path / "notebooks").mkdir()
    sources = [tmp_path / f"{name}.ipynb" for name in ("00", "01", "02", "03")]
    for source in sources:
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), source)
        nbformat.write(book, tmp_path / "notebooks" / source.name)
    damaged(tmp_path / "notebooks" / "01.ipynb")
    (tmp_path / "notebooks" / "02.ipynb").write_text("[]")
    (tmp_path / "notebooks" / "03.ipynb").write_bytes(b"")
    executed = [tmp_path / "notebooks" / source.name for source in sources]
    given = tmp_path / "report.html", executed, sources, SimpleNamespace(name="<i>")
    with pytest.warns(UserWarning, match=r"0[123]\.ipynb' is damaged") as warned:
        page = report.write(*given).read_text("utf-8")
    assert len(warned) == 3
    assert page.count('<td class="damaged">damaged</td>') == 3
    assert page.count('<td class="done">') == 1
    assert "<i>" not in page.split("<section")[0]


# --- the page ------------------------------------------------------------------------------------


def test_the_page_names_the_limits_that_the_code_has():
    page = (Path(__file__).parents[1] / "docs/security.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")][2:]
    said = [[int(each.replace(",", "")) for each in re.findall(r"\d[\d,]*", row)] for row in rows]
    assert said == [
        [_video.MOST_PIXELS, _video.MOST_FRAMES, _video.MOST_SECONDS],
        [_sources.MOST_BYTES],
        [panels.MAX_BYTES >> 20, panels.MAX_FRAMES, panels.MAX_SIDE],
        [listed.MOST_BYTES, MOST_STEPS, ucf101.MOST_BOXES],
        [listed.MOST_BYTES, epic.LONGEST],
        [_settings.MOST_SIGNS, _settings.MOST_LEVELS],
        [],
        [sample.LONGEST],
    ]
