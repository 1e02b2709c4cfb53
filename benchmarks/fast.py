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
from dataclasses import replace

import pandas as pd
import torch
from common import difference, record, row

import stepkit as sk
from stepkit.attribution import PRESETS
from stepkit.models import precision_of
from stepkit.study import Study

SLOW, FAST, FIFTH = "default", "fast", "fifth"
VARIANTS = {
    SLOW: ("step", {"preset": "default"}),
    FAST: ("step", {"preset": "fast"}),
    FIFTH: ("step", {"preset": "default", "iterations": 240, "reward": "log"}),
}
QUICKER = {FAST: "(c) ", FIFTH: "(c) a fifth: "}  # what their rows begin with


def roughness(masks: torch.Tensor) -> torch.Tensor:
    """Return the mean step from voxel to voxel along t, y and x; (N, A, T, H, W) -> (N,)."""
    steps = [masks.diff(dim=axis).abs().flatten(1).mean(1) for axis in (2, 3, 4)]
    return torch.stack(steps).mean(0)


def quality(study: Study, model: str, dataset: str, removal: str) -> pd.DataFrame:
    """Return one row per variant and clip, a column per measure; more is better in all."""
    variants = {name: (run, kw | {"removal": removal}) for name, (run, kw) in VARIANTS.items()}
    where = {"models": [model], "datasets": [dataset], "methods": variants}
    tables = []
    for unit in ("patch", "superpixel"):
        scores = study.score("auc", unit=unit, steps=16, name=f"auc_{unit}", **where)
        scores = scores.set_index(["method", "clip"])["insertion"]
        tables.append(scores.rename(f"insertion AUC, {unit}"))
    located = study.score("located", **where).set_index(["method", "clip"])
    tables.append(located["hit"].rename("pointing"))
    for name, variant in variants.items():
        found = study.maps({name: variant}, model, dataset)
        index = pd.MultiIndex.from_product([[name], study.batch(dataset).ids])
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


def iterations(variant: tuple) -> int:
    """Return how many a variant takes."""
    _, kw = variant
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
        sk.step(model, clip, 1, **VARIANTS[name][1])
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
    study = Study(out=asked.out, clips=asked.clips, progress=True)
    places = [(study, model, dataset, "blur") for model, dataset in cells]
    if asked.data:  # as in params/ucf101-clips.yaml
        real = {"data": asked.data, "parts": True, "recipe": {"epochs": 40, "batch_size": 12}}
        real = replace(study, frames=16, size=64, **real)
        places.insert(1, (real, "r2plus1d_narrow", "ucf101-24", "fade"))
    rows = []
    for study, model, dataset, removal in places:
        where = f"{dataset}, {model}"
        rows += compared(quality(study, model, dataset, removal), where)
    for name, what in ((FAST, "fast"), (FIFTH, "a fifth")):
        share = iterations(VARIANTS[name]) / iterations(VARIANTS[SLOW])
        rows.append(row(f"(c) iterations of {what} / 1200", "", share, "ratio", "<= 0.2"))
    rows += whole_clip(112, 16)
    record("fast", rows)


if __name__ == "__main__":
    main()
