"""What the explorer shows of a choice: pictures, charts, files. No widget.

The charts are SVG by hand, as one is made at every move of a slider: matplotlib would take longer
than a frame lasts.
"""

import base64
import html
import io
import re
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from stepkit import _checks, metrics, removal, viz
from stepkit._checks import one_of, require
from stepkit._sources import guess_count
from stepkit.attribution import PRESETS, attribute, heatmap
from stepkit.clips import frame_size, read_clip, unnormalise
from stepkit.models import check_model, device_of, frozen
from stepkit.viz._frames import KINDS as OF_SHOW
from stepkit.viz._frames import render, top
from stepkit.viz._style import OPACITY

__all__ = ["KINDS", "SUM", "Seen", "State", "films", "keep", "probabilities", "read_upload", "see"]

KINDS = (*OF_SHOW, "inserted")
AREAS = (0.05, 0.10, 0.15, 0.20)
SUM, KEEP = "sum", 0.15  # the heatmap instead of one area's mask, and the share of it that is kept
HEIGHT = 224  # of a picture, about, in pixels
MAX_BYTES, MAX_FRAMES, MAX_SIDE = 9 << 20, 3000, 4096  # a message to Jupyter's server has 10 MB
LOOKS = {"A": ("#0072B2", ""), "B": ("#E69F00", "6 4")}  # of a row: dark, solid; bright, dashed


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


@lru_cache(8)  # one tensor for one choice: `_film` tells choices apart by it
def see(found: Tensor, area, areas) -> Seen:
    """Choose what is drawn of a map (T, H, W), or of STEP's masks (A, T, H, W), for an area.

    ``area`` is one of ``areas`` or `SUM`. Of a map, it is the share that is kept.
    """
    if found.ndim == 3:
        return Seen(found, KEEP if area == SUM else area)
    if area == SUM:
        return Seen(heatmap(found[None])[0], KEEP)
    return Seen(found[list(areas).index(area)], None)


def probabilities(model: nn.Module, clip: Tensor) -> Tensor:
    """Return the softmax probabilities (K,) of one clip (3, T, H, W), on the CPU."""
    clips = clip[None].to(device_of(model, clip.device))
    with frozen(model), torch.no_grad():
        check_model(model, clips, torch.zeros(1, dtype=torch.long, device=clips.device))
        return model(clips).softmax(1)[0].float().cpu()


def keep(clip: Tensor, seen: Seen, by="blur") -> Tensor:
    """Return the clip (3, T, H, W) with all removed, ``by`` an operator, but what is kept."""
    mask = seen.drawn if seen.keep is None else top(seen.drawn, seen.keep)
    mask = mask.clamp(0, 1)[None].to(clip.device)
    return removal.named(by).apply(clip[None], mask)[0]


@dataclass
class State:
    """What is explored, and all that is known of it."""

    models: dict[str, nn.Module]
    clips: dict[str, Tensor]
    targets: dict[str, int]
    classes: list[str]
    methods: dict[str, dict]
    steps: int
    facts: dict[tuple, object] = field(default_factory=dict)  # None: asked for

    @property
    def areas(self) -> tuple:
        """The areas of STEP's masks."""
        return tuple(self.methods["step"].get("areas", AREAS))

    def iterations(self, preset: str) -> int:
        """How many iterations STEP takes."""
        return self.methods["step"].get("iterations", PRESETS[preset].iterations)

    def give(self, model: str, clip: str, method: str, found: Tensor) -> None:
        """Take a map or STEP's masks that the caller has."""
        one_of("maps, model", model, self.models)
        one_of("maps, clip", clip, self.clips)
        one_of("maps, method", method, self.methods)
        areas = f"{len(self.areas)}, " if method == "step" and found.ndim == 4 else ""
        shape = ", ".join(map(str, self.clips[clip].shape[1:]))
        where = f"maps[{model!r}][{clip!r}][{method!r}]"
        found = _checks.tensor(where, found, f"({areas}{shape})").detach().cpu()
        self.facts["map", model, clip, self.targets[clip], method] = found

    def find(self, kind: str, model: str, clip: str, target=None, method=None, area=None):
        """Ask a network: Φ of the "whole" clip, a "map", Φ of what it keeps, its "curve"."""
        network, given = self.models[model], self.clips[clip]
        if kind == "whole":
            return probabilities(network, given)
        if kind == "map":
            options = self.methods[method]
            return attribute(method, network, given[None], target, **options)[0].cpu()
        found = self.facts["map", model, clip, target, method]
        if kind == "phi":
            by = self.methods["step"].get("removal", "blur")
            kept = keep(given, see(found, area, self.areas), by)
            return float(probabilities(network, kept)[target])
        heat = see(found, SUM, self.areas).drawn[None].to(given.device)
        return metrics.insertion(network, given[None], heat, target, steps=self.steps)

    def forget(self, *key) -> None:
        """Drop what was found for a model, clip, class and method."""
        for fact in [fact for fact in self.facts if fact[1 : 1 + len(key)] == key]:
            del self.facts[fact]


# --- pictures ---


def films(clip: Tensor, found: Tensor | None, area, areas, share, opacity, cmap) -> dict:
    """Return `KINDS` of a clip, a JPEG for each frame; grey where there is no map yet.

    ``share`` of the clip is inserted, as in the insertion curve. For ``area`` see `see`.
    """
    if found is None:
        return {"clip": _film(clip)} | dict.fromkeys(KINDS[1:], _film(clip, "grey"))
    seen, heat = see(found, area, areas), see(found, SUM, areas)
    made = {"clip": _film(clip), "overlay": _film(clip, "overlay", seen, opacity, cmap)}
    made |= {"kept": _film(clip, "kept", seen), "mask": _film(clip, "mask", seen, OPACITY, cmap)}
    return made | {"inserted": _film(clip, "inserted", heat, share)}


@lru_cache(32)
def _film(clip: Tensor, kind: str = "clip", seen: Seen | None = None, *look) -> list[bytes]:
    """Encode the frames of one kind, their pixels repeated up to about `HEIGHT`."""
    clip = clip.detach().cpu()
    if kind == "inserted":
        clip, kind, look = metrics.perturbed(clip, seen.drawn, *look), "clip", ()
    rgb = unnormalise(clip).permute(1, 2, 3, 0).numpy()
    if kind == "grey":
        frames = np.full(rgb.shape, 200, np.uint8)
    else:
        frames = render(kind, rgb, *(seen or (None, None)), *look)
    scale = max(1, round(HEIGHT / rgb.shape[1]))
    made = []
    for frame in frames.repeat(scale, 1).repeat(scale, 2):
        Image.fromarray(frame).save(data := io.BytesIO(), "JPEG", quality=90, subsampling=0)
        made.append(data.getvalue())
    return made


# --- charts ---


@lru_cache(8)
def energy(seen: Seen) -> list[float]:
    """Return the mean of what is drawn in each frame; a map is scaled to [0, 1] for the eye."""
    drawn = seen.drawn if seen.keep is None else viz.display(seen.drawn)
    return drawn.mean((1, 2)).tolist()


def energy_chart(values: dict[str, list[float]], frame: int) -> str:
    """Draw what each row ("A …", "B …") marks in each frame; the cursor stands at a frame."""
    last = max(map(len, values.values()), default=1) - 1
    high = max([max(v) for v in values.values()], default=0) or 1.0
    title = "mask energy per frame (mean of the mask)"
    return _chart(title, values, min(frame, last) / max(1, last), str(frame), high)


def curve_chart(values: dict[str, list[float]], share: float) -> str:
    """Draw the insertion curve of each row; the cursor stands at the share that is inserted."""
    named = {}
    for name, curve in values.items():
        phi, auc = curve[round(share * (len(curve) - 1))], float(metrics.auc(torch.tensor(curve)))
        named[f"{name}: Φ {phi:.2f}, AUC {auc:.2f}"] = curve
    return _chart("Φ against the share inserted", named, share, f"{share:.0%}", 1.0)


def _chart(title: str, curves: dict[str, list[float]], at: float, cursor: str, high: float) -> str:
    """Return an SVG: lines from 0 to ``high``, their legend, a cursor at a share of the width."""
    x = 50 + 400 * at
    parts = [_text(50, 16, title), _text(42, 155, "0", "end"), _text(42, 35, f"{high:.2g}", "end")]
    lines = f"M50 150 H450 M50 30 H450 M{x:.1f} 30 V150"
    parts += [f'<path d="{lines}" stroke="currentColor" opacity=".4"/>']
    parts += [f'<path d="M{x - 7:.1f} 164 h14 l-7 -11 z" fill="currentColor"/>']
    parts += [_text(x, 178, cursor, "middle")]
    for i, (name, values) in enumerate(curves.items()):
        colour, dash = LOOKS[name[0]]
        style = f'fill="none" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"'
        last = max(1, len(values) - 1)
        points = [(50 + 400 * j / last, 150 - 120 * v / high) for j, v in enumerate(values)]
        path = " ".join(f"{left:.1f},{down:.1f}" for left, down in points)
        left, down = points[round(at * (len(values) - 1))]
        parts += [f'<polyline points="{path}" {style}/>', _text(92, 204 + 22 * i, name)]
        parts += [f'<path d="M50 {199 + 22 * i} h34" {style}/>']
        parts += [f'<circle cx="{left:.1f}" cy="{down:.1f}" r="5" fill="{colour}"/>']
    return (
        f'<svg viewBox="0 0 470 232" role="img" aria-label="{html.escape(title)}" '
        'style="width:100%;max-width:470px;color:var(--jp-ui-font-color1,#222);'
        f'font:15px sans-serif">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="currentColor">{html.escape(text)}</text>'


# --- files ---
def files(state: State, key: tuple, area, **look) -> dict[str, bytes]:
    """Return what can be downloaded of one explanation, by name: the mask, and films of it.

    The ``.npz`` holds ``mask``, what is drawn, (T, H, W), and for STEP ``masks`` (A, T, H, W) and
    ``areas`` (A,). ``look``: opacity and cmap, as for `stepkit.save_video`.
    """
    model, clip, _, method = key
    found = state.facts["map", *key]
    seen = see(found, area, state.areas)
    arrays = {"masks": found.numpy(), "areas": np.array(state.areas)} if found.ndim == 4 else {}
    np.savez_compressed(data := io.BytesIO(), mask=seen.drawn.numpy(), **arrays)
    made = {".npz": data.getvalue()}
    with tempfile.TemporaryDirectory() as folder:
        for end in (".mp4", ".gif"):
            film = Path(folder, f"film{end}")
            viz.save_video(film, state.clips[clip], seen.drawn, keep=seen.keep, **look)
            made[end] = film.read_bytes()
    return {f"{clip}_{model}_{method}{end}": data for end, data in made.items()}


def scores(state: State, key: tuple, area) -> pd.DataFrame:
    """Return a row per number that is seen of one explanation.

    ``measure`` is "kept probability", "insertion auc", "mask energy" (``at`` a frame) or
    "insertion" (``at`` a share).
    """
    seen = see(state.facts["map", *key], area, state.areas)
    rows = [("mask energy", t, value) for t, value in enumerate(energy(seen))]
    phi, curve = state.facts.get(("phi", *key, area)), state.facts.get(("curve", *key))
    if isinstance(phi, float):
        rows.append(("kept probability", np.nan, phi))
    if isinstance(curve, metrics.Curve):
        points = zip(curve.share.tolist(), curve.curve[0].tolist(), strict=True)
        rows += [("insertion", at, value) for at, value in points]
        rows.append(("insertion auc", np.nan, float(curve.auc[0])))
    model, clip, target, method = key
    names = {"clip": clip, "model": model, "class": state.classes[target], "method": method}
    return pd.DataFrame(rows, columns=["measure", "at", "value"]).assign(**names, area=area)


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
    require(fits, name, length, f"a video of at most {MAX_BYTES >> 20} MB")
    # Without a name FFmpeg goes by content alone.
    source = io.BytesIO(content)
    try:
        count, side = guess_count(source), max(frame_size(source))
        many = f"{count} frames"
        require(count > 1, name, many, "a video of two frames or more")
        require(count <= MAX_FRAMES, name, many, f"at most {MAX_FRAMES}; cut it first")
        require(side <= MAX_SIDE, name, f"{side} pixels wide or high", f"{MAX_SIDE}")
        return read_clip(source, frames, size)
    except ValueError as error:
        raise ValueError(str(error).replace("a BytesIO", repr(name))) from None


def plain_name(name: str) -> str:
    """Return the name of a file as it may be shown: no path, nothing invisible, not long."""
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    return re.split(r"[/\\]", shown)[-1][:80] or "upload"
