"""Fewer iterations against the 1200 of the released code: quality clip by clip, and time.

Preset "fast", 60 iterations, and *a fifth*: the default's own path in 240, with log Φ_c.

    python benchmarks/fast.py [--clips 6] [--data ../shared/data] [--out runs/benchmarks]

On generated clips, and on real ones where --data is given (networks as the notebooks train them;
what is found is kept in --out, so that a run that was stopped goes on). Intervals are paired
bootstraps over clips. *Reached* is "yes" where fast is not worse by more than the half-width of the
interval, that is, where the interval does not end below zero.
"""

import argparse
import shutil
import time

import pandas as pd
import torch
from common import difference, record, row

import stepkit as sk
from stepkit.attribution import PRESETS
from stepkit.models import precision_of
from stepkit.study import Experiment

SLOW, FAST, FIFTH = "step@default", "step@fast", "step@fifth"
VARIANTS = {
    SLOW: {"preset": "default"},
    FAST: {"preset": "fast"},
    FIFTH: {"preset": "default", "iterations": 240, "reward": "log"},
}
QUICKER = {FAST: "(c) ", FIFTH: "(c) a fifth: "}  # what their rows begin with


def roughness(masks: torch.Tensor) -> torch.Tensor:
    """Return the mean step from voxel to voxel along t, y and x; (N, A, T, H, W) -> (N,)."""
    steps = [masks.diff(dim=axis).abs().flatten(1).mean(1) for axis in (2, 3, 4)]
    return torch.stack(steps).mean(0)


def quality(run: Experiment, model: str, dataset: str, removal: str) -> pd.DataFrame:
    """Return one row per variant and clip, a column per measure; more is better in all."""
    variants = {name: kw | {"removal": removal} for name, kw in VARIANTS.items()}
    tables = []
    for unit in ("patch", "superpixel"):
        scores = run.auc(variants, [model], [dataset], [unit], steps=16, name=f"auc_{unit}")
        scores = scores.set_index(["method", "clip"])["insertion"]
        tables.append(scores.rename(f"insertion AUC, {unit}"))
    located = run.located(variants, [model], [dataset]).set_index(["method", "clip"])
    tables.append(located["hit"].rename("pointing"))
    for name, kw in variants.items():
        found = run.explain(name, model, dataset, **kw)
        index = pd.MultiIndex.from_product([[name], run.batch(dataset).ids])
        for a, area in enumerate((0.05, 0.10, 0.15, 0.20)):
            phi = pd.Series(found["probabilities"][:, a].numpy(), index)
            tables.append(phi.rename(f"probability at {area:.0%}"))
        tables.append(pd.Series(-roughness(found["masks"]).numpy(), index, name="smoothness"))
    names = list(dict.fromkeys(table.name for table in tables))
    columns = [pd.concat([t for t in tables if t.name == name]).rename(name) for name in names]
    return pd.concat(columns, axis=1).rename_axis(["method", "clip"])


def compared(table: pd.DataFrame, where: str) -> list[dict]:
    """Return a row for each measure: fast minus 1200 iterations, and a fifth minus them."""
    tables = {name: table[name].unstack("method").dropna() for name in table}
    return [
        difference(label + name, where, found[quicker] - found[SLOW])
        for quicker, label in QUICKER.items()
        for name, found in tables.items()
    ]


def iterations(kw: dict) -> int:
    """Return how many a variant takes."""
    return kw.get("iterations", PRESETS[kw["preset"]].iterations)


def whole_clip(size: int, frames: int) -> list[dict]:
    """Time one clip with R(2+1)D-18 at the paper's size, by both."""
    raw = sk.load_model("r2plus1d_18", 24)
    model = sk.prepare(raw, "auto", compiled=shutil.which("c++") is not None)
    clip = torch.randn(1, 3, frames, size, size, generator=torch.Generator().manual_seed(0))
    sk.step(model, clip, 1, "fast", iterations=1)  # warm, compiled
    case = f"r2plus1d_18, 1 clip of {frames}x{size}x{size}, 4 areas, {precision_of(model)}"
    rows = []
    for name, what in ((FAST, "fast"), (FIFTH, "a fifth of the iterations")):
        start = time.perf_counter()
        sk.step(model, clip, 1, **VARIANTS[name])
        taken = time.perf_counter() - start
        rows.append(row(f"(b)x(c) a clip by {what}", case, taken, "s", "<= 240"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--data", default="", help="folder with ucf101-24/")
    parser.add_argument("--out", default="runs/benchmarks")
    asked = parser.parse_args()
    cells = [(m, d) for d in ("appearance", "object", "motion") for m in ("r2plus1d_narrow",)]
    cells.append(("r50l_narrow", "appearance"))
    run = Experiment(asked.out, clips=asked.clips, progress=True)
    places = [(run, model, dataset, "blur") for model, dataset in cells]
    if asked.data:  # as in params/ucf101-clips.yaml
        real = {"data": asked.data, "parts": True, "epochs": 40, "batch_size": 12}
        real = Experiment(asked.out, 16, 64, asked.clips, progress=True, **real)
        places.insert(1, (real, "r2plus1d_narrow", "ucf101-24", "fade"))
    rows = []
    for run, model, dataset, removal in places:
        where = f"{dataset}, {model}"
        rows += compared(quality(run, model, dataset, removal), where)
    for name, what in ((FAST, "fast"), (FIFTH, "a fifth")):
        share = iterations(VARIANTS[name]) / iterations(VARIANTS[SLOW])
        rows.append(row(f"(c) iterations of {what} / 1200", "", share, "ratio", "<= 0.2"))
    rows += whole_clip(112, 16)
    record("fast", rows)


if __name__ == "__main__":
    main()
