import io
import os
import re
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from PIL import Image

import stepkit as sk
from stepkit import viz
from stepkit.clips import normalise
from stepkit.viz import display, plots, save_video, show
from stepkit.viz._frames import inputs, render
from stepkit.viz.plots import plot_curves, plot_history

T, H, W = 4, 20, 24
LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture
def clip():
    """Blue above, orange below: normalised, (3, T, H, W)."""
    rgb = torch.zeros(3, T, H, W)
    rgb[2, :, : H // 2] = 0.8
    rgb[0, :, H // 2 :], rgb[1, :, H // 2 :] = 0.9, 0.5
    return normalise(rgb)


@pytest.fixture
def corner():
    """Hot in the top left 5 x 6 pixels of every frame, 1/16 of the clip."""
    maps = torch.zeros(T, H, W)
    maps[:, :5, :6] = 3.0
    return maps


@pytest.fixture(autouse=True)
def nothing_open():
    yield
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def frames_rgb(clip, maps=None, **look):
    """Return the clip, under a map if one is given, as uint8 (T, H, W, 3)."""
    rgb, maps, _ = inputs(clip, {} if maps is None else {"": maps}, None, 1)
    return render("overlay" if maps else "clip", rgb, maps.get(""), 1, **look)


def pictures(figure):
    """Return the images of a figure by row label, each row a list."""
    grid, label = {}, None
    for ax in figure.axes:
        if ax.images:
            label = ax.get_ylabel() or label
            grid.setdefault(label, []).append(np.asarray(ax.images[0].get_array()))
    return grid


def png(figure):
    return io.BytesIO(figure._repr_png_())


def test_display_scales_each_clip_by_its_percentile():
    maps = torch.stack([torch.arange(8000.0).reshape(8, 20, 50), torch.zeros(8, 20, 50)])
    maps[1] -= torch.linspace(0, 1, 8000).reshape(8, 20, 50)
    shown = display(maps)
    top = np.percentile(np.arange(8000), 99.9)
    np.testing.assert_allclose(shown[0].flatten(), np.arange(8000).clip(max=top) / top, atol=1e-6)
    assert (shown[0] == 1).sum() == 8  # ceil(0.1 % of 8000): the outliers are clipped
    torch.testing.assert_close(shown[1], shown[0].flip(0, 1, 2), atol=1e-6, rtol=0)
    assert shown.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, -2.5, 1e30])
def test_display_of_a_constant_is_zero(value):
    assert torch.equal(display(torch.full((2, T, H, W), value)), torch.zeros(2, T, H, W))


def test_display_shows_a_single_voxel():
    maps = torch.full((8, 20, 50), -1.0)
    maps[3, 4, 5] = -0.5
    assert display(maps).nonzero().tolist() == [[3, 4, 5]]
    assert display(maps).max() == 1


def test_plain_frames_are_the_clip(clip):
    frames = frames_rgb(clip)
    assert frames.shape == (T, H, W, 3)
    assert frames.dtype == np.uint8
    assert frames[1, 2, 3].tolist() == [0, 0, 204]
    assert frames[1, -2, 3].tolist() == [230, 128, 0]
    assert np.array_equal(frames, frames_rgb(clip[None]))


def test_overlay_is_bright_and_warm_where_the_map_is_hot(clip, corner):
    frames = frames_rgb(clip, corner).astype(float)
    hot, cold = frames[:, :5, :6], frames[:, 5:]
    assert (hot @ LUMA).min() > 1.5 * (cold @ LUMA).max()
    assert (hot[..., 0] > hot[..., 2] + 50).all()  # on a blue sky
    assert (cold.max(-1) - cold.min(-1)).max() <= 1  # the rest is grey
    # The brightest background stays darker than heat on the darkest.
    worst = normalise(torch.ones(3, T, H, W))
    worst[:, :, :5, :6] = normalise(torch.zeros(3, T, 5, 6))
    frames = frames_rgb(worst, corner) @ LUMA
    assert frames[:, :5, :6].min() > frames[:, 5:].max() + 10


def test_opacity_and_colour_map(clip, corner):
    full = frames_rgb(clip, corner, opacity=1, cmap="gray")
    assert (full[:, :5, :6] == 255).all()
    none = frames_rgb(clip, corner, opacity=0)
    assert np.ptp(none[:, : H // 2]) == 0


def test_bool_mask_is_drawn_as_it_is(clip):
    full = torch.ones(T, H, W, dtype=torch.bool)
    assert (frames_rgb(clip, full, opacity=1, cmap="gray") == 255).all()  # a constant map: black


def test_show_one_map(clip, corner):
    figure = show(clip, corner, frames=3, title="a title")
    grid = pictures(figure)
    assert list(grid) == ["clip", "overlay", "top 15 %", "map"]
    assert [len(row) for row in grid.values()] == [3, 3, 3, 3]
    assert len(figure.axes) == 13  # and the colour bar
    assert [ax.get_title() for ax in figure.axes[:3]] == ["0", "2", "3"]
    assert figure.axes[-1].get_ylabel() == "attribution, scaled"
    texts = [text.get_text() for text in figure.texts]
    assert {"frame", "a title"} <= {*texts, figure.get_suptitle()}
    assert np.array_equal(grid["overlay"][1], frames_rgb(clip, corner)[2])
    assert (grid["map"][0][:5, :6] @ LUMA).min() > (grid["map"][0][5:] @ LUMA).max()


def test_show_several_maps(clip, corner):
    maps = {"grad_cam": corner, "integrated_gradients": corner.flip(1), "step": corner[None]}
    grid = pictures(show(clip, maps, frames=[3, 0]))
    assert list(grid) == ["clip", "Grad-CAM", "Integrated\nGradients", "STEP"]
    assert [len(row) for row in grid.values()] == [2, 2, 2, 2]
    assert np.array_equal(grid["Integrated\nGradients"][0], frames_rgb(clip, corner.flip(1))[3])
    grid = pictures(show(clip, maps, frames=1, rows=("clip", "kept", "mask")))
    assert len(grid) == 7
    assert "Integrated\nGradients\ntop 15 %" in grid
    figure = show(clip, maps, rows=("clip", "kept"))
    assert len(figure.axes) == 16  # 4 rows of 4 frames; nothing is coloured, so there is no bar


def test_show_scales_a_map_over_the_clip_not_per_frame(clip):
    maps = torch.arange(1.0, T + 1)[:, None, None] * torch.rand(T, H, W).round()
    one = pictures(show(clip, maps, frames=[1], rows=["mask"], cmap="gray"))["map"][0]
    assert one.max() == round(255 * 2 / T)


@pytest.mark.parametrize("keep", [0.01, 0.15, 0.5])
def test_kept_row_leaves_exactly_the_top_share(clip, keep):
    maps = torch.randn(T, H, W, generator=torch.Generator().manual_seed(0))
    kept = np.stack(pictures(show(clip, maps, keep=keep, rows=["kept"]))[f"top {100 * keep:g} %"])
    same = (kept == frames_rgb(clip)).all(-1)
    assert same.sum() == round(keep * T * H * W)
    assert maps[torch.from_numpy(same)].min() > maps[torch.from_numpy(~same)].max()
    rest = kept[~same].astype(int)
    assert np.ptp(rest, axis=-1).max() <= 1  # grey
    assert rest.min() > 100  # and pale
    assert rest.max() < 220


def test_kept_row_with_ties_and_clipped_tops(clip, corner):
    # Both are beyond the percentile, where `display` would tie them and the first would win.
    corner[0, 0, 0], corner[-1, -1, -1] = 1000.0, 2000.0
    kept = np.stack(
        pictures(show(clip, corner, keep=1 / corner.numel(), rows=["kept"]))["top 0.0521 %"]
    )
    assert np.argwhere((kept == frames_rgb(clip)).all(-1)).tolist() == [[T - 1, H - 1, W - 1]]
    flat = torch.zeros(T, H, W)
    first = np.stack(pictures(show(clip, flat, keep=0.25, rows=["kept"]))["top 25 %"])
    assert (first == frames_rgb(clip)).all(-1).reshape(T, -1).sum(1).tolist() == [H * W, 0, 0, 0]


def test_masks_are_weights(clip):
    mask = torch.full((T, H, W), 0.5)
    mask[:, :, :8], mask[:, :, 8:16] = 1, 0
    grid = pictures(show(clip, mask, keep=None, frames=1, cmap="gray"))
    assert list(grid) == ["clip", "overlay", "kept", "mask"]
    kept, plain = grid["kept"][0].astype(float), frames_rgb(clip)[0]
    assert np.array_equal(kept[:, :8], plain[:, :8])
    assert np.ptp(kept[:, 8:16], axis=-1).max() <= 1
    colour = np.ptp(plain[0, -1].astype(float))
    assert np.ptp(kept[0, -1]) == pytest.approx(colour / 2, abs=1)
    assert np.unique(grid["mask"][0]).tolist() == [0, 128, 255]
    figure = show(clip, mask > 0.9, frames=1)  # bool: a mask without being told
    assert figure.axes[-1].get_ylabel() == "mask"
    same = pictures(figure)["kept"][0]
    assert np.array_equal(same[:, :8], plain[:, :8])
    assert np.ptp(same[:, 8:].astype(int), axis=-1).max() <= 1


def test_boxes_are_patches_on_clip_and_overlay(clip, corner):
    boxes = [[[3.0 + t, 13.0, 10.0 + t, 18.0]] for t in range(T)]
    figure = show(clip, corner, boxes=boxes, frames=[2])
    clip_ax, overlay, kept, alone, _ = figure.axes
    for ax in (clip_ax, overlay):
        (patch,) = ax.patches
        assert patch.get_bbox().bounds == (5, 13, 7, 5)
    assert clip_ax.patches[0].get_linewidth() > overlay.patches[0].get_linewidth()
    assert not kept.patches
    assert not alone.patches
    # On the page: white on the box's edge, dark beside it, on orange.
    page = np.asarray(Image.open(png(figure)).convert("L"))
    cell = clip_ax.get_window_extent()
    x, y = cell.x0 + cell.width * 8.5 / W, len(page) - cell.y1 + cell.height * 13 / H
    line = page[round(y) - 4 : round(y) + 5, round(x)]
    assert abs(line.argmax() - 4) <= 1
    assert line.max() > 200
    assert line.min() < 60


def test_pixels_are_drawn_evenly_and_the_file_is_small():
    noise = torch.randn(3, 8, 56, 56, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2) * 3  # about a photograph's entropy
    figure = show(smooth, smooth[0])
    data = png(figure).getvalue()
    assert len(data) < 300_000
    page = np.asarray(Image.open(png(figure)).convert("RGB"))
    box = figure.axes[0].get_window_extent()
    top, left = round(len(page) - box.y1), round(box.x0)
    times = round(box.width / 56)
    assert times == 3
    drawn = page[top : top + 168, left : left + 168]
    assert np.array_equal(drawn, frames_rgb(smooth)[0].repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(
    ("n", "size"), [(12, (20, 24)), (1, (40, 20)), (5, (112, 112)), (5, (9, 16))]
)
def test_nothing_overlaps_and_all_is_on_the_page(n, size):
    clip, maps = torch.randn(3, 16, *size), torch.rand(16, *size)
    title = "A rather long title of the kind that a notebook makes out of three variables, step"
    figure = show(
        clip,
        {"smoothgrad_squared": maps, "excitation_backprop": maps},
        frames=n,
        rows=("overlay", "kept"),
        title=title,
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [*figure.texts]
    for ax in figure.axes:
        texts += [ax.title, ax.yaxis.label, *ax.yaxis.get_ticklabels()]
    texts = [text for text in texts if text.get_text()]
    extents = [text.get_window_extent(renderer) for text in texts]
    frames = [ax.get_window_extent() for ax in figure.axes]
    for i, one in enumerate(extents):
        assert figure.bbox.x0 <= one.x0 < one.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= one.y0 < one.y1 <= figure.bbox.y1
        assert not any(one.overlaps(other) for other in [*extents[i + 1 :], *frames])
    # Readable also where a page shows the picture no wider than 9 inches.
    assert min(t.get_fontsize() for t in texts) * min(1, 9 / figure.get_figwidth()) >= 8.99


def test_show_without_maps(clip):
    figure = show(clip, frames=9)  # more than there are
    assert list(pictures(figure)) == ["clip"]
    assert len(figure.axes) == T


def test_inputs_are_left_alone(clip, corner):
    clip.requires_grad_(), corner.requires_grad_()
    boxes = [torch.tensor([[1.0, 2.0, 8.0, 9.0]])] * T
    before = [x.detach().clone() for x in (clip, corner, boxes[0])]
    show(clip, corner, boxes=boxes)
    frames_rgb(clip, corner)
    display(corner)
    for old, new in zip(before, (clip, corner, boxes[0]), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": torch.zeros(T, H, W)}, r"clip: got shape \(4, 20, 24\), expected \(3, T, H, W\)"),
        ({"clip": torch.zeros(2, 3, T, H, W)}, r"clip: got shape \(2, 3, 4, .*\(1, 3, T, H, W\)"),
        ({"clip": torch.full((3, T, H, W), torch.nan)}, "clip: got NaN"),
        ({"maps": torch.zeros(T, H, 9)}, r"maps: got shape \(4, 20, 9\), expected \(4, 20, 24\)"),
        (
            {"maps": {"a": torch.zeros(2, H, W)}},
            r"maps\['a'\]: got shape \(2, 20, 24\), expected \(4, 20",
        ),
        ({"maps": torch.full((T, H, W), torch.inf)}, "maps: got NaN or infinity"),
        ({"maps": torch.full((T, H, W), 2.0), "keep": None}, r"maps: got 2\.\.2, expected a mask"),
        ({"frames": [0, T]}, r"frames: got \[0, 4\], expected indices in 0\.\.3"),
        ({"frames": [-1]}, "frames: got"),
        ({"frames": []}, "frames: got"),
        ({"frames": 0}, "frames: got 0, expected at least 1"),
        ({"rows": ["clip", "heat"]}, "rows: got 'heat', expected one of 'clip', 'overlay'"),
        ({"rows": []}, "rows: got"),
        ({"rows": ["kept"], "maps": None}, r"rows \(without maps\): got 'kept'"),
        ({"keep": 0.0}, "keep: got 0.0"),
        ({"boxes": [torch.zeros(0, 4)]}, "boxes: got length 1, expected 4 frames"),
        ({"boxes": [torch.zeros(1, 5)] * T}, r"boxes\[0\]: got shape \(1, 5\)"),
        ({"boxes": [torch.full((1, 4), torch.nan)] * T}, r"boxes\[0\]: got NaN"),
    ],
)
def test_errors_of_show(clip, corner, change, message):
    given = {"clip": clip, "maps": corner} | change
    with pytest.raises(ValueError, match=message):
        show(**given)


def test_wrong_types(clip):
    with pytest.raises(TypeError, match="maps: got ndarray"):
        show(clip, np.zeros((T, H, W)))
    with pytest.raises(TypeError, match=r"clip: got dtype torch\.float64"):
        show(clip.double())
    with pytest.raises(ValueError, match=r"maps: got shape \(3, 3\), expected \(T, H, W\)"):
        display(torch.zeros(3, 3))


def test_a_notebook_shows_the_figure_without_pyplot(clip):
    for figure in (show(clip), plot_curves({"step": ([0, 1], [[0.0, 1.0]])})):
        formats, _ = DisplayFormatter().format(figure)
        assert Image.open(io.BytesIO(formats["image/png"])).width == figure.bbox.width


def read(path: Path) -> np.ndarray:
    if path.suffix == ".gif":
        with Image.open(path) as gif:
            found = []
            for t in range(gif.n_frames):
                gif.seek(t)
                found.append(np.asarray(gif.convert("RGB")))
        return np.stack(found)
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"
        assert container.streams.video[0].average_rate == 5
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_video_reads_back(tmp_path, clip, corner, suffix):
    corner = corner.roll(2, 2) * torch.arange(1, T + 1)[:, None, None]  # no two frames alike
    path = save_video(tmp_path / f"clip{suffix}", clip, corner, fps=5, keep=30 / (T * H * W))
    assert os.listdir(tmp_path) == [path.name]
    frames = read(path).astype(int)
    scale, gap = 11, 8  # 224 / 20 rows
    wide = scale * W
    assert frames.shape == (T, scale * H, 3 * wide + 2 * gap, 3)
    panel = [frames[:, :, i * (wide + gap) :][:, :, :wide] for i in range(3)]
    middle = slice(scale // 2, None, scale)  # of every original pixel
    small = [p[:, middle, middle] for p in panel]
    plain, hot = frames_rgb(clip).astype(int), frames_rgb(clip, corner).astype(int)
    away = np.ones((H, W), bool)
    away[9:11] = False  # from the horizon, where 4:2:0 mixes colours
    assert np.abs(small[0] - plain)[:, away].mean() < 6
    assert np.abs(small[1] - hot)[:, away].mean() < 6
    kept = np.abs(small[2] - plain).max(-1) < 40
    assert kept[3, :5, 2:8].all()  # the 30 highest voxels are the last frame's corner
    assert kept.sum() < 45


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_odd_sizes_and_no_map(tmp_path, suffix):
    clip = normalise(torch.rand(3, T, 225, 13))
    path = save_video(tmp_path / f"Clip{suffix.upper()}", clip, fps=5)
    assert path.name == f"Clip{suffix.upper()}"
    got = Image.open(path).size if suffix == ".gif" else read(path.rename(tmp_path / "a.mp4")).shape
    assert got == ((14, 226) if suffix == ".gif" else (T, 226, 14, 3))


def test_video_without_h264(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    path = save_video(tmp_path / "a.mp4", clip, fps=5)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert read(path)[0, 5, 5, 2] > 150  # blue above


def test_gif_loops_at_its_rate(tmp_path, clip, corner):
    corner = corner * torch.arange(1, T + 1)[:, None, None]
    with Image.open(save_video(tmp_path / "a.gif", clip, corner, fps=5)) as gif:
        assert gif.info["loop"] == 0
        assert gif.info["duration"] == 200


def test_video_is_written_whole_or_not_at_all(tmp_path, clip, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_text("older")

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_video(path, clip)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_text() == "older"


def test_errors_of_save_video(tmp_path, clip):
    with pytest.raises(ValueError, match=re.escape("'.avi', expected one of '.mp4', '.gif'")):
        save_video(tmp_path / "a.avi", clip)
    with pytest.raises(ValueError, match="fps: got 0"):
        save_video(tmp_path / "a.gif", clip, fps=0)
    with pytest.raises(ValueError, match=r"opacity: got 1\.5"):
        save_video(tmp_path / "a.gif", clip, torch.zeros(T, H, W), opacity=1.5)
    with pytest.raises(TypeError, match="maps: got dict"):
        save_video(tmp_path / "a.gif", clip, {"step": torch.zeros(T, H, W)})
    with pytest.raises(FileNotFoundError, match=r"path: got '.*a\.gif'"):
        save_video(tmp_path / "no" / "a.gif", clip)
    assert os.listdir(tmp_path) == []


def test_curves():
    x = torch.linspace(0, 1, 11)
    low = x * torch.tensor([[0.2], [0.4], [0.6]])
    figure = plot_curves({"random": (x, low), "grad_cam": (x, low + 0.3)}, title="insertion")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "share of the clip inserted"
    assert ax.get_ylabel() == "probability of the class"
    assert ax.get_title("left") == "insertion"
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["Random", "Grad-CAM"]  # as in Table I
    assert "3 clips" in legend.get_title().get_text()
    assert "95 % bootstrap" in legend.get_title().get_text()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0.4 * x, atol=1e-6)
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.lines[:2]}
    assert len(looks) == 2  # told apart without colour
    band, _ = ax.collections
    edge = band.get_paths()[0].vertices
    at_end = edge[np.isclose(edge[:, 0], 1), 1]
    # Of the 27 resamples of three clips, 1 has the mean 0.2: more than 2.5 %, so it is the edge.
    np.testing.assert_allclose([at_end.min(), at_end.max()], [0.2, 0.6], atol=1e-6)


def test_curve_of_one_clip_has_no_band():
    figure = plot_curves({"step": ([0, 0.5, 1], [[0.0, 0.5, 1.0]])}, xlabel="share deleted")
    assert not figure.axes[0].collections
    assert figure.legends[0].get_title().get_text() == "one clip"
    assert figure.axes[0].get_xlabel() == "share deleted"


def test_curves_do_not_look_alike():
    values = {str(i): ([0.0, 1.0], [[0.0, i]]) for i in range(27)}
    lines = plot_curves(values).axes[0].lines[:27]
    looks = {(line._unscaled_dash_pattern[1], line.get_marker()) for line in lines}
    assert len(looks) == 27


def test_a_method_has_one_look_in_every_plot():
    looks = plots.palette(["mine"])
    assert list(looks.index) == [*sk.methods().index, "mine"]
    assert not looks[["marker", "dashes"]].astype(str).duplicated().any()  # in grey, too
    shown = ["random", "gradient", "integrated_gradients", "smoothgrad", "excitation_backprop"]
    shown += ["smoothgrad_squared", "xrai", "grad_cam", "extremal_perturbation", "step"]
    assert not looks["colour"][shown].duplicated().any()
    white = np.array([1.05 / (0.05 + LUMA @ np.array(c) ** 2.2) for c in looks["colour"]])
    assert white.min() > 2  # contrast, by about WCAG's formula
    curve = [0, 1], [[0.0, 1.0], [0.5, 0.5]]
    alone, among = (dict.fromkeys(names, curve) for names in (["step"], ["grad_cam", "step"]))
    for curves in (alone, among):
        line = plot_curves(curves).axes[0].lines[len(curves) - 1]
        assert line.get_color() == looks["colour"]["step"]
        assert line.get_marker() == looks["marker"]["step"]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "curves: got none"),
        (
            {"a": ([0, 1], [[1.0, 2.0, 3.0]])},
            r"curves\['a'\]: got fractions \(2,\), values \(1, 3\)",
        ),
        ({"a": ([0, 1], [1.0, 2.0])}, r"curves\['a'\]"),
        ({"a": ([0, 1], [[1.0, np.nan]])}, r"curves\['a'\]: got NaN"),
    ],
)
def test_errors_of_curves(curves, message):
    with pytest.raises(ValueError, match=message):
        plot_curves(curves)


@pytest.fixture
def history():
    rows = [
        (clip, np.float32(area), i, 0.1 * clip + area, 1 / (1 + i), 0.0)
        for clip in range(2)
        for area in (0.05, 0.2)
        for i in range(30)
    ]
    names = ["clip", "area", "iteration", "probability", "area_loss", "core_loss"]
    return pd.DataFrame(rows, columns=names)


def test_history(history):
    before = history.copy()
    figure = plot_history(history)
    assert [ax.get_title("left") for ax in figure.axes] == ["probability", "area loss", "core loss"]
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log", "linear"]
    assert all(ax.get_xlabel() == "iteration" for ax in figure.axes)
    assert [len([x for x in ax.lines if len(x.get_xdata())]) for ax in figure.axes] == [2, 2, 2]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), 0.25, atol=1e-6)  # of 2 clips
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["5 %", "20 %"]
    figure._repr_png_()
    pd.testing.assert_frame_equal(history, before)


def test_errors_of_history(history):
    with pytest.raises(ValueError, match=r"history: got no column \['core_loss'\]"):
        plot_history(history.drop(columns="core_loss"))
    with pytest.raises(ValueError, match="history: got no row"):
        plot_history(history[:0])


# ------------------------------------------------------------------------------ tables as pictures


@pytest.fixture
def table():
    index = pd.MultiIndex.from_product([["d1", "d2"], ["m1", "m2"], ["step", "grad_cam"]])
    mean = np.linspace(0.1, 0.8, 8)
    return pd.DataFrame({"mean": mean, "low": mean - 0.05, "high": mean + 0.1}, index)


def test_intervals_are_drawn_at_their_values(table):
    figure = plots.plot_intervals(table.drop(("d2", "m2", "step")), xlabel="AUC", zero=True)
    first, second = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["d1", "d2"]
    assert [t.get_text() for t in first.get_yticklabels()] == [
        "Grad-CAM",
        "STEP",
    ]  # Table I's order
    spans, dots = first.collections[:2]
    np.testing.assert_allclose(dots.get_offsets()[:, 0], [0.1, 0.2])
    np.testing.assert_allclose([s[:, 0] for s in spans.get_segments()], [[0.05, 0.2], [0.15, 0.3]])
    assert dots.get_offsets()[0, 1] > dots.get_offsets()[1, 1]  # STEP is the lower row
    assert second.collections[3].get_offsets()[:, 0].tolist() == pytest.approx([0.8])


def test_what_is_not_known_is_not_drawn(table, tmp_path):
    nothing = table.assign(mean=np.nan, low=np.nan, high=np.nan)
    both = pd.concat([table.loc[["d1"]], nothing.loc[["d2"]]])
    figure = plots.plot_intervals(both, xlabel="hits")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["d1"]
    for figure in (
        plots.plot_intervals(nothing, xlabel="hits", zero=True),
        plots.plot_pairs(nothing[["low", "high"]].rename_axis([*"abc"]), label="c"),
    ):
        figure.savefig(tmp_path / "empty.png")  # axes, and nothing in them
        dots = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
        assert all(np.ma.masked_invalid(c.get_offsets()).mask.any(1).all() for c in dots)


def test_the_papers_numbers_are_crosses(table):
    figure = plots.plot_intervals(table.assign(paper=table["mean"] / 2), xlabel="AUC")
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["m1", "m1 in the paper", "m2", "m2 in the paper"]


def test_a_forest_wraps_its_panels_and_can_be_read_at_420_pixels(table):
    table = pd.concat([table, table.rename({"d1": "d3", "m2": "m3"}).loc[["d3"]]])
    figure = plots.forest(table, xlabel="AUC", margin=0.02)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["d1", "d2", "d3"]
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)
    # the legend has what any panel has; a panel makes room for its own markers only
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["m1", "m2", "m3"]
    assert len(figure.axes[2].lines) == 3  # m1, m3, zero
    per_point = 420 / figure.get_figwidth() / 72
    sizes = [
        t.get_fontsize() for ax in figure.axes for t in [ax._left_title, *ax.get_yticklabels()]
    ]
    assert min(sizes) * per_point > 9
    figure._repr_png_()


def test_a_method_has_one_colour_as_row_and_as_marker(table):
    def colours(figure, i):
        return figure.axes[0].collections[i].get_edgecolors()[:, :3].tolist()

    swapped = table.rename_axis(list("abc")).swaplevel("b", "c")
    rows = plots.forest(table, xlabel="AUC")
    marks = plots.forest(swapped, xlabel="AUC")
    step, grad_cam = colours(rows, 1)
    assert step != grad_cam
    dots = [c for c in range(4) if c % 2]  # intervals, dots of each marker
    assert [colours(marks, c)[0] for c in dots] == [grad_cam, step]


def test_pairs_have_a_marker_each_and_their_correlation(table):
    pairs = pd.DataFrame(
        {"α": [0.1, 0.2, 0.3], "ρ": [0.3, 0.2, 0.1]}, pd.Index(list("aab"), name="k")
    )
    figure = plots.plot_pairs(pairs, label="k")
    (dots,) = figure.axes[0].collections
    assert len(dots.get_offsets()) == 3
    assert len({str(path.vertices) for path in dots.get_paths()}) == 2
    assert "r = -1.00" in figure.legends[0].get_title().get_text()


def test_pairs_of_several_markers_at_one_place_are_drawn():
    places = [[*"aabbc"], [*"mmmmm"], [*"klklk"]]  # a, m has two markers
    index = pd.MultiIndex.from_arrays(places, names=["dataset", "model", "metric"])
    pairs = pd.DataFrame({"α": [0.1, 0.2, np.nan, 0.4, 0.5], "ρ": [0.3, np.nan, 0.1, 0, 0]}, index)
    figure = plots.plot_pairs(pairs, label="metric")
    assert np.isfinite(figure.axes[0].collections[0].get_offsets()).all(1).sum() == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: plots.plot_intervals(t.droplevel(0), xlabel="x"), "^table: got 2"),
        (lambda t: plots.plot_pairs(t, label="x"), "^table: got 3 columns"),
        (lambda t: plots.plot_pairs(t[["low", "high"]].iloc[:0], label="x"), "^table: got no row"),
    ],
)
def test_errors_of_tables(table, call, message):
    with pytest.raises(ValueError, match=message):
        call(table)


def test_several_clips_below_each_other(clip):
    figure = viz.show_clips({"before": clip, "a_long name of it": -clip}, frames=3)
    assert len(figure.axes) == 6
    assert figure.axes[3].get_ylabel() == "a long name of\nit"
    shown = [figure.axes[i].images[0].get_array() for i in (0, 3)]
    assert abs(shown[0].astype(float) - shown[1]).mean() > 0.1


def test_clips_of_different_sizes_are_refused(clip):
    with pytest.raises(ValueError, match=r"^clips: got sizes"):
        viz.show_clips({"a": clip, "b": clip[:, :-1]})
