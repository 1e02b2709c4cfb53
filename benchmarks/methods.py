"""The other methods and the curves against Captum, PAIR's saliency, and plain loops.

    python benchmarks/methods.py [--clips 8] [--repeats 5]

Captum looks at the model as it comes, at equal batches; stepkit once at the same model and once at
the prepared one. The time of a stepkit call includes its checks of model and clips.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from captum import attr
from common import record, row, seconds
from saliency.core import XRAI, XRAIParameters
from torch import nn

import stepkit as sk
from stepkit import metrics
from stepkit.attribution.supervoxels import supervoxels
from stepkit.attribution.xrai import LEAST, rank_regions
from stepkit.data import Synthetic
from stepkit.models import find_layer, out_of_place
from stepkit.removal import black

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import ranked_regions

POINTS, BATCH = 8, 8
WINDOW, STRIDE = (2, 12, 12), (2, 12, 12)


class Probability(nn.Module):
    """What Captum is to differentiate: Φ of all classes."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, clips):
        return self.network(clips).softmax(1)


def pairs(model, clips, targets) -> dict[str, tuple]:
    """Return for each method Captum's call, and ours, which takes a model."""
    phi, still = Probability(model), out_of_place(model)
    empty, given = black().nothing(clips), {"target": targets}
    ig = attr.IntegratedGradients(phi)
    tunnel = attr.NoiseTunnel(attr.Saliency(phi))
    occlusion, cam = attr.Occlusion(phi), attr.LayerGradCam(model, find_layer(model))
    cuboid = {"sliding_window_shapes": (3, *WINDOW), "strides": (3, *STRIDE)}

    def ours(method, **options):
        return lambda network: sk.attribute(
            method, network, clips, targets, batch_size=BATCH, **options
        )

    def each(call):  # Captum slides its window over all clips of a batch at once
        return lambda: [call(clips[i : i + 1], targets[i : i + 1]) for i in range(len(clips))]

    def up(cells):
        return nn.functional.interpolate(cells, clips.shape[2:], mode="trilinear")

    several = {"internal_batch_size": BATCH, "n_steps": POINTS, "method": "riemann_right"}
    noisy = {"nt_samples": POINTS, "nt_samples_batch_size": 1, "abs": False, **given}
    slide = partial(occlusion.attribute, perturbations_per_eval=BATCH, baselines=0, **cuboid)
    return {
        "gradient": (lambda: attr.Saliency(phi).attribute(clips, **given), ours("gradient")),
        "integrated_gradients": (
            lambda: ig.attribute(clips, empty, **several, **given),
            ours("integrated_gradients", steps=POINTS),
        ),
        "smoothgrad": (
            lambda: tunnel.attribute(clips, **noisy),
            ours("smoothgrad", samples=POINTS),
        ),
        "grad_cam": (lambda: up(cam.attribute(clips, **given)), ours("grad_cam")),
        "occlusion": (
            each(lambda clip, target: slide(clip, target=target)),
            ours("occlusion", window=WINDOW, stride=STRIDE),
        ),
        "deeplift": (
            lambda: attr.DeepLift(still).attribute(clips, empty, **given),
            ours("deeplift"),
        ),
    }


def curve_pair(model, clips, maps, targets, steps):
    """Return insertion and deletion curves of a map, each step of each clip by itself; and ours."""
    values = maps.flatten(1)

    def loop():
        found = []
        with torch.no_grad():
            for clip, value, target in zip(clips, values, targets, strict=True):
                for sign in (1, -1):
                    ranked = value.argsort(descending=True)
                    for step in range(steps + 1):
                        seen = torch.zeros_like(value)
                        seen[ranked[: step * len(ranked) // steps]] = 1
                        seen = (seen if sign == 1 else 1 - seen).view_as(maps[0])
                        found.append(model((clip * seen)[None]).softmax(1)[0, target])
        return torch.stack(found)

    def ours(network):
        given = {"unit": "pixel", "steps": steps, "batch_size": 32}
        both = metrics.insertion, metrics.deletion
        return [curve(network, clips, maps, targets, **given) for curve in both]

    return loop, ours


def frame_of_xrai() -> dict:
    """Return the ranking of the regions of one frame, T=1: saliency's and ours, same segments."""
    clip = Synthetic("appearance", n=1, frames=8, size=(112, 112))[0].clip[:, :1]
    draw = torch.Generator().manual_seed(0)
    values = (clip.mean(0) * torch.randn(1, 112, 112, generator=draw)).double().numpy()
    labels = [supervoxels(clip, count).numpy() for count in (50, 100, 150, 250, 500, 1200)]
    least = max(1, round(LEAST * values.size))
    masks = [scale[0] == k for scale in labels for k in range(scale.max() + 1)]
    settings = XRAIParameters(flatten_xrai_segments=False)
    settings.experimental_params = {"min_pixel_diff": least}
    image = values[0][..., None]  # its own worth, if it has one channel
    known = {"segments": masks, "base_attribution": image}
    theirs = partial(XRAI().GetMask, image, None, extra_parameters=settings, **known)
    return {"saliency": theirs, "ours": partial(rank_regions, values, labels)}


def clip_of_xrai() -> dict:
    """Return the ranking of a whole clip at the released code's scales: a twin with sets, ours."""
    size = (16, 112, 112)
    clip = Synthetic("appearance", n=1, frames=size[0], size=size[1:])[0].clip
    draw = torch.Generator().manual_seed(0)
    values = (clip.mean(0) * torch.randn(size, generator=draw)).double().numpy()
    labels = [supervoxels(clip, count).numpy() for count in (10, 20, 50, 60, 80, 100)]
    twin = partial(ranked_regions, values, labels, round(LEAST * values.size))
    return {"twin": twin, "ours": partial(rank_regions, values, labels)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # Captum says that it sets hooks
    raw = sk.load_model("r2plus1d_narrow", 6).requires_grad_(False)
    ready = sk.prepare(raw)
    draw = torch.Generator().manual_seed(0)
    clips = torch.randn(asked.clips, 3, 8, 48, 48, generator=draw)
    targets = torch.arange(asked.clips) % 6
    maps = torch.rand(asked.clips, 8, 48, 48, generator=draw)
    cases = pairs(raw, clips, targets)
    cases["curves, 32 steps"] = curve_pair(raw, clips, maps, targets, 32)
    rows, case = [], f"r2plus1d_narrow, {asked.clips} clips of 8x48x48"
    for name, (theirs, ours) in cases.items():
        calls = {"theirs": theirs, "same": partial(ours, raw), "prepared": partial(ours, ready)}
        took = seconds(calls, asked.repeats)
        other = "loop" if name.startswith("curves") else "Captum"
        ensemble = name in ("integrated_gradients", "smoothgrad")
        ratio, best = took["theirs"] / took["same"], took["theirs"] / took["prepared"]
        what, goal = f"(d) {name}: {other} / ours", ">= 1.3" if ensemble else ">= 1"
        rows.append(row(f"{what}, same model", case, ratio, "ratio", ">= 1"))
        rows.append(row(f"{what}, prepared", case, best, "ratio", goal))
    with torch.no_grad():
        loop, ours = cases["curves, 32 steps"]
        curves = [found.curve for found in ours(raw)]
        gap = (loop() - torch.stack(curves, 1).flatten()).abs().max()
    rows.append(row("curves: largest difference", case, float(gap)))
    for case, calls in {"1x112x112": frame_of_xrai(), "16x112x112": clip_of_xrai()}.items():
        (other, theirs), (_, ours) = calls.items()
        took = seconds(calls, 1)  # minutes on one side, tenths of a second on the other
        ratio = took[other] / took["ours"]
        what = f"(d) XRAI's ranking: {other} / ours"
        rows.append(row(what, case, ratio, "ratio", ">= 20"))
        gap = np.abs(np.squeeze(theirs()) - np.squeeze(ours())).max()
        rows.append(row("XRAI's ranking: largest difference", case, gap))
    record("methods", rows)


if __name__ == "__main__":
    main()
