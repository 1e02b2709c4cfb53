"""Ranking XRAI's regions: ours against a literal twin with sets of voxels, in one run.

    python benchmarks/xrai.py

At the paper's clip size with the released code's six scales; the printed ones would keep the twin
busy for hours.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from stepkit.attribution.xrai import LEAST, rank_regions
from stepkit.data import Synthetic
from stepkit.segments import supervoxels

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import ranked_regions

SIZE, COUNTS = (16, 112, 112), (10, 20, 50, 60, 80, 100)


def main():
    clip = Synthetic("appearance", n=1, frames=SIZE[0], size=SIZE[1:])[0].clip
    draw = torch.Generator().manual_seed(0)
    attribution = (clip.mean(0) * torch.randn(SIZE, generator=draw)).double().numpy()
    start = time.perf_counter()
    labels = [supervoxels(clip, count).numpy() for count in COUNTS]
    cut = time.perf_counter() - start
    times = []
    for _ in range(5):
        start = time.perf_counter()
        ours = rank_regions(attribution, labels)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    twin = ranked_regions(attribution, labels, round(LEAST * attribution.size))
    slow = time.perf_counter() - start
    fast = float(np.median(times))
    print(f"{sum(int(s.max()) + 1 for s in labels)} regions at {SIZE}, cut in {cut:.1f} s")
    print(f"ranked: twin {slow:.1f} s, ours {fast:.3f} s (median of 5), ratio {slow / fast:.0f}")
    print(f"largest difference {np.abs(ours - twin).max():.1e}")


if __name__ == "__main__":
    main()
