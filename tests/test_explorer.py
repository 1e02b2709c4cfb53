"""The explorer without a browser: controls are set, pictures and texts looked at."""

import base64
import io
import re
import subprocess
import sys
import time

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import stepkit as sk
from stepkit import panels
from stepkit.attribution import heatmap
from stepkit.panels import KINDS, SUM

T, SIZE = 4, 24
AREAS = (0.05, 0.10, 0.15, 0.20)
FEW = {"step": {"preset": "fast", "iterations": 3}, "gradient": {}, "random": {}}


class Quadrants(nn.Module):
    """Four classes: how bright each quarter of the frame is."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, clips):
        cells = torch.tanh(clips).mean((1, 2)).unfold(1, SIZE // 2, SIZE // 2)
        return self.gain * cells.unfold(2, SIZE // 2, SIZE // 2).mean((3, 4)).flatten(1)


def clip(seed=0, frames=T):
    return torch.randn(3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def masks(seed=1):
    return torch.rand(4, T, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).round()


@pytest.fixture
def explorer():
    maps = {"net": {"one": {"step": masks()}}}
    clips = {"one": clip(0), "two": clip(1, frames=6)}
    targets = {"one": 2, "two": 0}
    return settle(sk.explore({"net": Quadrants()}, clips, targets, maps=maps, methods=FEW, steps=4))


def settle(explorer):
    """Wait until the thread has found all that is asked for."""
    explorer._queue.join()
    return explorer


def pictures(explorer) -> dict:
    rows = explorer.rows.items()
    return {(name, kind): row.images[kind].value for name, row in rows for kind in KINDS}


def changed(explorer, before: dict) -> set:
    now = pictures(settle(explorer))
    return {f"{row} {kind}" for row, kind in now if now[row, kind] != before[row, kind]}


def both(*kinds) -> set:
    return {f"{row} {kind}" for row in "AB" for kind in kinds}


def downloads(explorer) -> dict[str, bytes]:
    explorer.prepare.click()
    settle(explorer)
    found = re.findall(r'download="([^"]+)" href="data:[^,]+,([^"]+)"', explorer.links.value)
    return {name: base64.b64decode(data) for name, data in found}


def test_import_brings_no_jupyter_dask_or_captum():
    code = "import stepkit, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ipywidgets", "IPython", "dask", "captum"} & set(found.stdout.split())


# --- what is seen ---


def test_what_is_drawn_for_an_area():
    found = masks()
    assert panels.see(found, 0.10, AREAS).drawn.equal(found[1])
    assert panels.see(found, 0.10, AREAS).keep is None
    summed = panels.see(found, SUM, AREAS)
    assert summed.drawn.equal(heatmap(found[None])[0])
    assert (summed.keep, panels.see(found[0], 0.2, AREAS).keep) == (panels.KEEP, 0.2)


def test_what_is_kept_is_what_the_mask_or_the_top_share_leaves():
    found, given = masks(), clip()
    kept = panels.keep(given, panels.see(found, 0.05, AREAS), "black")
    expected = sk.removal.black().apply(given[None], found[:1])[0]
    assert kept.equal(expected)
    kept = panels.keep(given, panels.Seen(torch.arange(T * SIZE**2.0).view(T, SIZE, SIZE), 0.25))
    torch.testing.assert_close(kept[:, -1], given[:, -1], rtol=0, atol=1e-5)
    assert not torch.allclose(kept[:, 0], given[:, 0], atol=0.1)


def test_a_film_has_a_picture_for_each_frame():
    look = 0.1, AREAS, 0.5, 0.7, "inferno"
    films = panels.films(clip(), masks(), *look)
    for kind in KINDS:
        film = films[kind]
        assert len(film) == T
        sizes = {Image.open(io.BytesIO(data)).size for data in film}
        assert sizes == {(216, 216)}
    assert len(panels.films(clip(), None, *look)["mask"]) == T


def test_charts_have_a_line_per_method_and_a_cursor():
    drawn = torch.zeros(T, SIZE, SIZE)
    drawn[1, : SIZE // 2] = 1
    values = panels.energy(panels.Seen(drawn, None))
    assert values == [0, 0.5, 0, 0]
    chart = panels.energy_chart({"A": values, "B <i>": values}, 1)
    assert chart.count("<polyline") == 2
    assert re.search(r'points="50.0,150.0 183.3,30.0 316.7,150.0 450.0,150.0"', chart)
    assert "B &lt;i&gt;" in chart
    assert chart != panels.energy_chart({"A": values, "B <i>": values}, 2)
    curve = panels.curve_chart({"A": [0.0, 0.5, 1.0]}, 0.5)
    assert "A: Φ 0.50, AUC 0.75" in curve
    assert "50%" in curve
    assert "<svg" in panels.energy_chart({}, 0)


def test_it_opens_on_what_is_known_and_computes_the_rest(explorer):
    assert isinstance(explorer, ipywidgets.Widget)
    assert explorer.target.value == 2
    assert "Φ of the whole clip" in explorer.heading.value
    assert "<b>A  STEP</b> keeps Φ" in explorer.rows["A"].title.value
    assert "<b>B  Gradient</b> keeps the top 15 %, Φ" in explorer.rows["B"].title.value
    assert explorer.rows["A"].found.equal(masks())
    expected = sk.attribute("gradient", Quadrants(), clip()[None], 2)[0]
    torch.testing.assert_close(explorer.rows["B"].found, expected)
    assert explorer.energy.value.count("<polyline") == 2
    assert explorer.status.value == ""


def test_the_written_numbers_are_those_of_the_library(explorer):
    model, given = Quadrants().requires_grad_(False), clip()[None]
    kept = sk.removal.blur().apply(given, masks()[None, 2])
    phi = float(model(kept).softmax(1)[0, 2])
    assert f"{phi:.2f}" in explorer.rows["A"].title.value
    curve = sk.insertion(model, given, heatmap(masks()[None]), 2, steps=4)
    told = f"A STEP: Φ {curve.curve[0, 1]:.2f}, AUC {curve.auc[0]:.2f}"
    assert told in explorer.curve.value


@pytest.mark.parametrize(
    ("control", "value", "expected"),
    [
        ("opacity", 0.2, both("overlay")),
        ("cmap", "gray", both("overlay", "mask")),
        ("area", 0.05, {"A overlay", "A kept", "A mask", "B kept"}),
        ("area", SUM, {"A overlay", "A kept", "A mask"}),
        ("share", 0.5, both("inserted")),
        ("frame", 2, both(*KINDS)),
        ("clip", "two", both(*KINDS)),
        ("b", "random", {"B overlay", "B kept", "B mask", "B inserted"}),
        ("a", "random", {"A overlay", "A kept", "A mask", "A inserted"}),
    ],
)
def test_a_control_changes_what_it_must_and_nothing_else(explorer, control, value, expected):
    before = pictures(explorer)
    getattr(explorer, control).value = value
    assert changed(explorer, before) == expected


def test_a_clip_brings_its_class_and_its_length(explorer):
    explorer.frame.value = 3
    explorer.clip.value = "two"
    assert (explorer.target.value, explorer.frame.max, explorer.play.max) == (0, 5, 5)
    assert "press <i>Explain</i>" in explorer.rows["A"].title.value
    explorer.target.value = 3
    explorer.clip.value = "one"
    explorer.clip.value = "two"
    assert explorer.target.value == 3


def test_the_cursors_move(explorer):
    energy, curve = explorer.energy.value, explorer.curve.value
    explorer.frame.value = 1
    assert explorer.energy.value != energy
    assert explorer.curve.value == curve
    explorer.share.value = 0.75
    assert explorer.curve.value != curve


# --- STEP ---


def test_explain_runs_step(explorer):
    explorer.clip.value = "two"
    explorer.explain.click()
    settle(explorer)
    assert "STEP finished 3 iterations" in explorer.status.value
    expected = sk.step(Quadrants(), clip(1, 6)[None], 0, "fast", iterations=3)
    assert explorer.rows["A"].found.equal(expected.masks[0])
    assert f"{expected.probabilities[0, 2]:.2f}" in explorer.rows["A"].title.value
    assert "A STEP: Φ" in explorer.curve.value
    assert (explorer.explain.disabled, explorer.stop.disabled) == (False, True)


def test_stop_ends_it_and_masks_come_on_the_way(explorer, monkeypatch):
    monkeypatch.setattr("stepkit.explorer.PERIOD", 0)
    explorer.state.methods = {**FEW, "step": {"iterations": 10**6}}
    explorer.a.value = "random"
    explorer.b.value = "gradient"
    settle(explorer)
    explorer.explain.click()
    assert explorer.a.value == "step"
    until(lambda: explorer.progress.value > 2)
    first = explorer.rows["A"].found
    assert first.shape == masks().shape
    until(lambda: not explorer.rows["A"].found.equal(first))
    explorer.b.value = "random"  # another computation gets its turn
    until(lambda: "Random</b> keeps" in explorer.rows["B"].title.value)
    explorer.explain.click()  # while it runs, once is enough
    explorer.stop.click()
    settle(explorer)
    assert "STEP stopped after" in explorer.status.value
    assert explorer.explain.disabled is False
    assert "keeps" in explorer.rows["A"].title.value


def until(what) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_in_the_thread_is_shown(explorer):
    explorer.state.methods = {**FEW, "step": {"learning_rate": -1.0}}
    explorer.explain.click()
    settle(explorer)
    assert "learning_rate" in explorer.status.value
    assert 'role="alert"' in explorer.status.value
    assert explorer.explain.disabled is False


def test_a_method_that_refuses_says_why_and_the_other_stays():
    given = sk.explore(Quadrants(), clip(), methods={"grad_cam": {}, "gradient": {}}, steps=2)
    settle(given)
    assert "layer: got no name" in given.rows["A"].title.value
    assert "keeps the top" in given.rows["B"].title.value


def test_the_model_is_left_as_it_was():
    model = Quadrants().train()
    settle(sk.explore(model, clip(), methods=FEW, steps=2)).explain.click()
    assert model.training
    assert model.gain.requires_grad


# --- in and out ---


def test_downloads_read_back(explorer):
    files = downloads(explorer)
    assert [name.rpartition(".")[2] for name in files] == ["npz", "mp4", "gif"] * 2 + ["csv"]
    held = np.load(io.BytesIO(files["one_net_step.npz"]))
    assert np.array_equal(held["masks"], masks().numpy())
    assert np.array_equal(held["mask"], masks()[2].numpy())
    assert held["areas"].tolist() == list(AREAS)
    assert Image.open(io.BytesIO(files["one_net_step.gif"])).n_frames == T
    assert panels.read_upload("f.mp4", files["one_net_gradient.mp4"], T, (8, 8)).shape[1] == T
    table = pd.read_csv(io.BytesIO(files["one_scores.csv"]))
    assert set(table["method"]) == {"step", "gradient"}
    assert table.groupby("measure").size().to_dict() == {
        "insertion": 2 * 5,
        "insertion auc": 2,
        "kept probability": 2,
        "mask energy": 2 * T,
    }
    explorer.area.value = 0.05
    assert explorer.links.value == ""  # they were of another mask


def test_a_download_follows_the_colours(explorer):
    before = downloads(explorer)["one_net_step.gif"]
    explorer.cmap.value = "gray"
    assert downloads(explorer)["one_net_step.gif"] != before


def upload(explorer, name: str, content: bytes) -> None:
    file = {"name": name, "type": "video/mp4", "size": len(content), "content": content}
    explorer.upload.value = ({**file, "last_modified": pd.Timestamp(0, tz="UTC")},)
    settle(explorer)


def test_an_uploaded_video_becomes_a_clip(explorer, tmp_path):
    video = sk.save_video(tmp_path / "a.mp4", clip(5, frames=9))
    upload(explorer, "my video.mp4", video.read_bytes())
    assert "choose its class" in explorer.status.value
    assert explorer.clip.value == "my video.mp4"
    assert explorer.frame.max == T - 1
    expected = sk.read_clip(video, T, SIZE)
    assert explorer.state.clips["my video.mp4"].equal(expected)
    assert explorer.target.value == int(Quadrants()(expected[None]).argmax())
    explorer.explain.click()
    settle(explorer)
    assert "STEP finished" in explorer.status.value
    upload(explorer, "my video.mp4", sk.save_video(tmp_path / "b.gif", clip(6)).read_bytes())
    assert "press <i>Explain</i>" in explorer.rows["A"].title.value


def test_uploads_that_are_no_such_video_are_refused(explorer, tmp_path, monkeypatch):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    video = sk.save_video(tmp_path / "a.mp4", clip(frames=9)).read_bytes()
    cases = {"a.txt": (b"words", "not a video"), "a.png": (picture.getvalue(), "1 frames")}
    cases |= {"empty.mp4": (b"", "0.0 MB"), "cut.mp4": (video[: len(video) // 2], "cut.mp4")}
    for name, (content, message) in cases.items():
        upload(explorer, name, content)
        assert message in explorer.status.value
        assert "upload." not in explorer.status.value  # no path of the server
    monkeypatch.setattr(panels, "MAX_FRAMES", 5)
    upload(explorer, "long.mp4", video)
    assert "long.mp4: got 9 frames, expected at most 5" in explorer.status.value
    monkeypatch.setattr(panels, "MAX_BYTES", 100)
    upload(explorer, "large.mp4", video)
    assert "large.mp4: got" in explorer.status.value
    assert explorer.clip.options == ("one", "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models: got none"),
        ({"clips": {}}, "clips: got none"),
        ({"clips": clip()[0]}, r"clips\['clip'\]: got shape"),
        ({"targets": 4}, "targets: got 4, expected classes 0..3"),
        ({"classes": ["a", "b"]}, "classes: got 2 names, expected 4"),
        ({"methods": {"magic": {}}}, "methods: got 'magic'"),
        ({"maps": {"other": {"clip": {"step": masks()}}}}, "maps, model: got 'other'"),
        ({"maps": {"model": {"clip": {"step": masks()[:2]}}}}, r"\['step'\]: got shape \(2"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"models": Quadrants(), "clips": clip(), "targets": 1, "methods": FEW} | change
    with pytest.raises((ValueError, TypeError), match=message):
        sk.explore(**given)


def test_without_targets_the_class_is_the_one_the_model_names():
    given = sk.explore(Quadrants(), clip(), methods=FEW, classes=list("abcd"))
    assert given.target.value == int(Quadrants()(clip()[None]).argmax())
    assert settle(given).heading.value.startswith("Φ of the whole clip")
