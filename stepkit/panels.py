"""What the explorer shows of a choice: pictures, charts, files. No widget, and nothing is kept.

The charts are SVG by hand, as one is made at every move of a slider: matplotlib would take longer
than a frame lasts.
"""

import base64
import html
import io
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from stepkit import _checks, metrics, viz
from stepkit import removal as removals
from stepkit._sources import guess_count
from stepkit.attribution import heatmap
from stepkit.clips import frame_size, read_clip, unnormalise
from stepkit.models import check_model, device_of, frozen
from stepkit.viz._frames import render, top

KINDS = ("clip", "overlay", "kept", "mask", "inserted")
SUM, KEEP = "sum", 0.15  # the heatmap instead of one area's mask, and the share of it that is kept
HEIGHT = 224  # of a picture, about, in pixels
MAX_BYTES, MAX_FRAMES, MAX_SIDE = 9 << 20, 3000, 4096  # a message to Jupyter's server has 10 MB
LOOKS = (("#0072B2", ""), ("#E69F00", "6 4"))  # of A and B: dark and solid, bright and dashed


class Seen(NamedTuple):
    """What is drawn of an explanation.

    Attributes
    ----------
    drawn : Tensor
        float32 (T, H, W): a mask in [0, 1], or a map of any scale.
    keep : float or None
        The share of the clip's voxels that "kept only" shows; None: ``drawn`` is a mask.
    """

    drawn: Tensor
    keep: float | None


def see(found: Tensor, area, areas) -> Seen:
    """Choose what is drawn of a map (T, H, W), or of STEP's masks (A, T, H, W), for an area.

    ``area`` is one of ``areas`` or `SUM`. Of a map, it is the share that is kept.
    """
    if found.ndim == 3:
        return Seen(found, KEEP if area == SUM else area)
    if area == SUM:
        return Seen(heatmap(found[None])[0], KEEP)
    return Seen(found[list(areas).index(area)], None)


# --- what the network says ---


def probabilities(model: nn.Module, clip: Tensor) -> Tensor:
    """Return the softmax probabilities (K,) of one clip (3, T, H, W), on the CPU."""
    clips = clip[None].to(device_of(model, clip.device))
    with frozen(model), torch.no_grad():
        check_model(model, clips, torch.zeros(1, dtype=torch.long, device=clips.device))
        return model(clips).softmax(1)[0].float().cpu()


def keep(clip: Tensor, seen: Seen, removal="blur") -> Tensor:
    """Return the clip (3, T, H, W) with all removed but what is kept."""
    mask = seen.drawn if seen.keep is None else top(seen.drawn, seen.keep)
    mask = mask.clamp(0, 1)[None].to(clip.device)
    return removals.named(removal).apply(clip[None], mask)[0]


# --- pictures ---


def film(clip: Tensor, found: Tensor | None, seen: Seen | None, kind: str, share, look):
    """Return one of `KINDS`, a JPEG for each frame; grey where there is no map yet.

    ``share`` of the clip is inserted, as in the insertion curve; ``look``: opacity, colour map.
    """
    rgb = unnormalise(clip.detach().cpu()).permute(1, 2, 3, 0).numpy()
    if kind == "clip":
        return pictures(render("clip", rgb, None, None))
    if seen is None:
        return pictures(np.full((1, *rgb.shape[1:]), 200, np.uint8)) * len(rgb)
    if kind == "inserted":
        heat = see(found, SUM, ()).drawn
        clip = metrics.perturbed(clip.detach().cpu(), heat, share)
        return film(clip, None, None, "clip", share, look)
    return pictures(render(kind, rgb, *seen, *look))


def pictures(frames: np.ndarray) -> list[bytes]:
    """Encode frames, uint8 (T, H, W, 3), pixels repeated up to about `HEIGHT`."""
    scale = max(1, round(HEIGHT / frames.shape[1]))
    made = []
    for frame in frames:
        image = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
        image.save(data := io.BytesIO(), "JPEG", quality=90, subsampling=0)
        made.append(data.getvalue())
    return made


# --- charts ---


def energy(seen: Seen) -> list[float]:
    """Return the mean of what is drawn in each frame; a map is scaled to [0, 1] for the eye."""
    drawn = seen.drawn if seen.keep is None else viz.display(seen.drawn)
    return drawn.mean((1, 2)).tolist()


def energy_chart(values: dict[str, list[float]], frame: int) -> str:
    """Draw bars for each frame, a colour per method; a triangle marks the frame that is seen."""
    count = max(map(len, values.values()), default=1)
    high = max([max(v) for v in values.values()], default=0) or 1.0
    wide, parts = 400 / count, []
    for i, (of_method, (colour, _)) in enumerate(zip(values.values(), LOOKS, strict=False)):
        each = 0.8 * wide / len(values)
        for t, value in enumerate(of_method):
            x, tall = 50 + (t + 0.1) * wide + i * each, 120 * value / high
            parts.append(
                f'<rect x="{x:.1f}" y="{150 - tall:.1f}" width="{each:.1f}" height="{tall:.1f}" '
                f'fill="{colour}" stroke="currentColor" stroke-width="0.5"/>'
            )
    x = 50 + (min(frame, count - 1) + 0.5) * wide
    parts.append(f'<path d="M{x - 7:.1f} 164 h14 l-7 -11 z" fill="currentColor"/>')
    parts.append(_text(x, 178, str(frame), "middle"))
    ticks = {150: "0", 30: f"{high:.2g}"}
    return _chart("mask energy per frame (mean of the mask)", list(values), ticks, parts)


def curve_chart(values: dict[str, list[float]], share: float) -> str:
    """Draw insertion curves; the cursor stands at the share that is inserted."""
    parts, names = [], []
    for (name, curve), (colour, dash) in zip(values.items(), LOOKS, strict=False):
        last = len(curve) - 1
        points = " ".join(
            f"{50 + 400 * i / last:.1f},{150 - 120 * value:.1f}" for i, value in enumerate(curve)
        )
        at = curve[round(share * last)]
        style = f'fill="none" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{points}" {style}/>')
        spot = f'cx="{50 + 400 * share:.1f}" cy="{150 - 120 * at:.1f}" r="5"'
        parts.append(f'<circle {spot} fill="{colour}" stroke="currentColor"/>')
        names.append(f"{name}: Φ {at:.2f}, AUC {float(metrics.auc(torch.tensor(curve))):.2f}")
    x = 50 + 400 * share
    parts.append(f'<path d="M{x:.1f} 30 V150" stroke="currentColor" stroke-dasharray="2 3"/>')
    parts.append(f'<path d="M{x - 7:.1f} 164 h14 l-7 -11 z" fill="currentColor"/>')
    parts.append(_text(x, 178, f"{share:.0%}", "middle"))
    return _chart("Φ against the share inserted", names, {150: "0", 30: "1"}, parts)


def _chart(title: str, names: list[str], ticks: dict[int, str], parts: list[str]) -> str:
    """Return the SVG of a chart: title, legend, axes and what lies between them."""
    labels = [_text(42, y + 5, tick, "end") for y, tick in ticks.items()]
    lines = "".join(f'<path d="M50 {y} H450" stroke="currentColor" opacity=".4"/>' for y in ticks)
    legend = []
    for i, (name, (colour, dash)) in enumerate(zip(names, LOOKS, strict=False)):
        y = 204 + 22 * i
        style = f'stroke="{colour}" stroke-width="5" stroke-dasharray="{dash}"'
        legend.append(f'<path d="M50 {y - 5} h34" {style}/>' + _text(92, y, name))
    body = "".join([_text(50, 16, title), lines, *labels, *parts, *legend])
    return (
        f'<svg viewBox="0 0 470 232" role="img" aria-label="{html.escape(title)}" '
        'style="width:100%;max-width:470px;color:var(--jp-ui-font-color1,#222);'
        f'font:15px sans-serif">{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="currentColor">{html.escape(text)}</text>'


# --- files ---


def files(clip: Tensor, found: Tensor, seen: Seen, areas, look) -> dict[str, bytes]:
    """Return what can be downloaded of one explanation, by suffix: the mask, and films of it.

    The ``.npz`` holds ``mask``, what is drawn, (T, H, W), and for STEP ``masks`` (A, T, H, W) and
    ``areas`` (A,).
    """
    arrays = {"mask": seen.drawn.numpy()}
    if found.ndim == 4:
        arrays |= {"masks": found.numpy(), "areas": np.array(areas)}
    np.savez_compressed(data := io.BytesIO(), **arrays)
    made = {".npz": data.getvalue()}
    style = dict(zip(("keep", "opacity", "cmap"), (seen.keep, *look), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".mp4", ".gif"):
            path = viz.save_video(Path(folder, f"film{suffix}"), clip, seen.drawn, **style)
            made[suffix] = path.read_bytes()
    return made


def scores(seen: Seen, phi, curve, **names) -> pd.DataFrame:
    """Return a row per number that is seen, with ``names`` as columns.

    ``measure`` is "kept probability", "insertion auc", "mask energy" (``at`` a frame) or
    "insertion" (``at`` a share). Φ and the curve are None where they are not known.
    """
    rows = [] if phi is None else [("kept probability", np.nan, phi)]
    if curve is not None:
        rows.append(("insertion auc", np.nan, float(curve.auc[0])))
    rows += [("mask energy", t, value) for t, value in enumerate(energy(seen))]
    if curve is not None:
        points = zip(curve.share.tolist(), curve.curve[0].tolist(), strict=True)
        rows += [("insertion", at, value) for at, value in points]
    return pd.DataFrame(rows, columns=["measure", "at", "value"]).assign(**names)


def link(name: str, data: bytes) -> str:
    """Return an HTML link that holds a file and downloads it."""
    name = re.sub(r"[^\w.-]+", "_", name)
    text = base64.b64encode(data).decode()
    href = f"data:application/octet-stream;base64,{text}"
    return f'<a download="{name}" href="{href}" style="text-decoration:underline">{name}</a>'


def read_upload(name: str, content, frames: int, size: tuple[int, int]) -> Tensor:
    """Return an uploaded video as a clip (3, frames, H, W).

    Raises
    ------
    ValueError
        Too large, too long, damaged, no video; ``name`` names it.
    """
    length = f"{len(content) / 2**20:.1f} MB"
    fits = 0 < len(content) <= MAX_BYTES
    _checks.require(fits, name, length, f"a video of at most {MAX_BYTES >> 20} MB")
    # Without a name FFmpeg goes by content alone.
    source = io.BytesIO(content)
    try:
        count, side = guess_count(source), max(frame_size(source))
        many = f"{count} frames"
        _checks.require(count > 1, name, many, "a video of two frames or more")
        _checks.require(count <= MAX_FRAMES, name, many, f"at most {MAX_FRAMES}; cut it first")
        _checks.require(side <= MAX_SIDE, name, f"{side} pixels wide or high", f"{MAX_SIDE}")
        return read_clip(source, frames, size)
    except ValueError as error:
        raise ValueError(str(error).replace("a BytesIO", repr(name))) from None


def plain_name(name: str) -> str:
    """Return the name of a file as it may be shown: no path, nothing invisible, not long."""
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    return re.split(r"[/\\]", shown)[-1][:80] or "upload"
