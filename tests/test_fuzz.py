"""Five hundred damaged files in one process of bounded memory: documented errors, no crash.

Run as a script, with a folder, this file is that process: ``python tests/test_fuzz.py FOLDER``.
"""

import csv
import faulthandler
import io
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import av
import nbformat
import numpy as np
import pytest
import torch
from nbconvert import HTMLExporter
from PIL import Image
from safetensors.torch import save
from torch import nn

from stepkit import _files, report
from stepkit._settings import read_yaml
from stepkit.clips import read_clip, read_frames
from stepkit.data import epic, something
from stepkit.data.ucf101 import read_annotations, read_split
from stepkit.networks import load_weights
from stepkit.panels import read_upload

MORE_MEMORY = 3 << 29  # bytes of address space beyond what the imports take
SECONDS = 10  # for one input
DOCUMENTED = (ValueError, FileNotFoundError, TypeError)
# what text is spliced with
WORDS = (
    "nan inf -1 1e999 999999999999 {} [] ( { [ , : : ' \" | * & &a *a ! !!int !!python/none ../x"
)
WORDS = [
    *WORDS.split(" "),
    "\n",
    "\0",
    "\u202e",
    "\\",
    "$x$",
    "<b>",
    "- " * 50,
    "[" * 50,
    "é" * 300,
]


# --- intact files ---


def video(suffix: str, codec: str, **options) -> bytes:
    with av.open(file := io.BytesIO(), "w", format=suffix) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = 48
        stream.pix_fmt, stream.gop_size = "yuv420p", 4
        for t in range(10):
            rgb = np.random.default_rng(t).integers(0, 255, (6, 6, 3), np.uint8).repeat(8, 0)
            rgb = np.ascontiguousarray(rgb.repeat(8, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def image(kind: str, frames: int = 1, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (frames, 24, 24, 3), np.uint8)
    first, *rest = map(Image.fromarray, noise)
    more = {"save_all": True, "append_images": rest} if rest else {}
    first.save(file := io.BytesIO(), kind, **more, **options)
    return file.getvalue()


def annotation(protocol: int) -> bytes:
    boxes = np.asfortranarray(np.arange(12, dtype=np.uint16).reshape(3, 4))
    actor = {"sf": 1, "ef": 4, "boxes": boxes}
    entry = {"label": 0, "numf": np.uint8(5), "annotations": [actor, dict(actor)]}
    found = {np.str_(f"A/v_A_g01_c0{i}"): entry for i in range(3)}
    return pickle.dumps(found, protocol=protocol)


def segments() -> bytes:
    row = {"seg_id": 7, "video_id": "P01_01", "noun": "pan", "noun_label": 0, "start_frame": 31}
    row |= {"stop_frame": 90, "bounding_boxes": "{31: (0, 0, 5, 5), 61: [(1.5, 2, 5, 5)]}"}
    writer = csv.DictWriter(file := io.StringIO(), row)
    writer.writeheader()
    writer.writerows([row] * 3)
    return file.getvalue().encode()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 2, 1), nn.BatchNorm3d(2))


def notebook() -> bytes:
    output = nbformat.v4.new_output("stream", text="0.5\n")
    table = nbformat.v4.new_output("display_data", {"text/html": "<table></table>"})
    cells = [nbformat.v4.new_markdown_cell("# A title\n$x$")]
    cells.append(nbformat.v4.new_code_cell("print(1)", outputs=[output, table], execution_count=1))
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["papermill"] = {"start_time": "2020-01-01T00:00:00", "parameters": {"seed": 1}}
    return nbformat.writes(book).encode()


# --- who reads them ---


def read_folder(folder: Path):
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes((folder / "input").read_bytes())
    return read_frames(folder)


def read_notebook(folder: Path):
    (folder / "notebooks").mkdir(exist_ok=True)
    (folder / "notebooks" / "00.ipynb").write_bytes((folder / "input").read_bytes())
    (folder / "00.ipynb").write_bytes(notebook())
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        section = report._section(
            folder, folder / "notebooks" / "00.ipynb", folder / "00.ipynb", exporter
        )
    if section["status"] != "done":
        raise ValueError(next(str(each.message) for each in said if "damaged" in str(each.message)))


def of_file(read, *more):
    return lambda folder: read(folder / "input", *more)


def of_bytes(read):
    return lambda folder: read((folder / "input").read_bytes())


def cases() -> dict:
    """Return how many, of what intact ones, and who reads them."""
    videos = [video("mp4", "libx264", bf="2"), video("avi", "mpeg4"), video("matroska", "mpeg4")]
    videos += [video("mpegts", "libx264"), video("webm", "libvpx-vp9"), video("flv", "flv1")]
    films = [image("GIF", 4), image("WEBP", 4), image("PNG", 4)]
    entries = [{"id": str(i), "template": "Opening [something]"} for i in range(3)]
    listed = b"A/v_A_g01_c01.avi 1\nA/v_A_g01_c02.avi 1\n"
    yaml = b"about: x\ndefaults: {seed: 1, areas: [0.05, 1e-1]}\nnotebooks:\n  '01':\n    - a: None"
    weights, maps = save(network().state_dict()), save({"map": torch.ones(4, 4)}, {"key": "k"})
    images = [image("PNG"), image("JPEG"), image("BMP"), image("WEBP")]
    return {
        "video": (110, videos, of_file(read_clip, 4, 16)),
        "upload": (30, videos, of_bytes(lambda data: read_upload("a.mp4", data, 4, (16, 16)))),
        "film": (40, films, of_bytes(read_frames)),
        "image": (80, images, read_folder),
        "pickle": (100, [annotation(3), annotation(4)], of_file(read_annotations)),
        "csv": (30, [segments()], of_file(epic.read_list, ["pan"])),
        "json": (
            20,
            [json.dumps(entries).encode()],
            of_file(something.read_list, ["Opening something"]),
        ),
        "list": (10, [listed], of_file(read_split)),
        "yaml": (30, [yaml], of_bytes(lambda data: read_yaml("x", data.decode(errors="replace")))),
        "weights": (20, [weights], of_file(lambda path: load_weights(network(), path))),
        "map": (10, [maps], of_file(_files.read_tensors, "k")),
        "notebook": (20, [notebook()], read_notebook),
    }


# --- damage ---


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with one to four places changed."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 1, 2, 4, 8, 64])
        if rng.random() < 0.5:
            at = rng.randrange(min(len(data), 200) + 1)  # headers are where sizes stand
        change = rng.randrange(6)
        if change == 0:
            data[at : at + n] = rng.randbytes(n)
        elif change == 1:
            data[at : at + n] = rng.choice([b"\0", b"\xff", b"\x7f"]) * n
        elif change == 2:
            del data[at : at + rng.randrange(1, len(data) // 4 + 2)]
        elif change == 3:
            data[at:at] = data[rng.randrange(len(data) + 1) :][:n]
        elif change == 4:
            data[at : at + rng.choice([0, n])] = rng.choice(WORDS).encode()
        elif data[at : at + 1]:
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def main(folder: Path) -> None:
    """Print ``kind number outcome`` of each input; end with a traceback at one that goes wrong."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("too slow"))
    known = cases()
    for _, intact, read in known.values():
        for data in intact:
            (folder / "input").write_bytes(data)
            read(folder)  # whoever refuses an intact one proves nothing below
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    warnings.simplefilter("ignore")
    for kind, (n, intact, read) in known.items():
        for i in range(n):
            print(kind, i, end=" ", flush=True)
            (folder / "input").write_bytes(
                damaged(intact[i % len(intact)], random.Random(f"{kind} {i}"))
            )
            signal.alarm(SECONDS)
            try:
                read(folder)
                print("read")
            except DOCUMENTED as error:
                told = str(error)
                house = type(error) in DOCUMENTED and ": " in told
                if not (house and ("expected" in told or "damaged" in told)):
                    raise
                print("refused")
            signal.alarm(0)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
def test_five_hundred_damaged_files_bring_documented_errors_only(tmp_path):
    command = [sys.executable, "-X", "faulthandler", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1]}: {done.stderr[-3000:]}"
    assert len(lines) == 500
    refused = {kind for kind, _, outcome in lines if outcome == "refused"}
    assert refused == {kind for kind, _, _ in lines} - {"map"}  # a damaged map is computed anew


if __name__ == "__main__":
    main(Path(sys.argv[1]))
