"""What a STEP iteration costs against clips, frames, edge and areas; and peak memory.

    python benchmarks/scaling.py [--repeats 5]

The narrow R(2+1)D, prepared. Each line is a least-squares fit through the medians: the cost of one
more clip, frame, 1000 pixels, area; *R²* says how straight it is. Cost per voxel must not grow.
"""

import argparse

import numpy as np
import torch
from common import record, row, seconds

import stepkit as sk

LEAST = {"clips": 2, "frames": 8, "size": 48, "areas": 2}
SWEEPS = {
    "clips": (1, 2, 4, 8),
    "frames": (4, 8, 16, 32),
    "size": (32, 48, 64, 96, 128),
    "areas": (1, 2, 4, 8),
}
ITERATIONS = 4


def explain(model, clips, frames, size, areas):
    """Return a call of STEP with so few iterations that only their cost counts."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(clips, 3, frames, size, size, generator=draw)
    shares = tuple(0.4 * (i + 1) / areas for i in range(areas))
    options = {"areas": shares, "iterations": ITERATIONS, "batch_size": clips}
    return lambda: sk.step(model, x, 0, "fast", **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    model, rows = sk.prepare(sk.load_model("r2plus1d_narrow", 6)), []
    for name, values in SWEEPS.items():
        calls = {value: explain(model, **LEAST | {name: value}) for value in values}
        taken = seconds(calls, asked.repeats)
        times = np.array([1000 * np.median(taken[value]) / ITERATIONS for value in values])
        against = np.array(values) ** 2 / 1000 if name == "size" else np.array(values)
        slope, start = np.polyfit(against, times, 1)
        straight = np.corrcoef(against, times)[0, 1] ** 2
        unit = "1000 pixels" if name == "size" else name.rstrip("s")
        held = ", ".join(f"{key} {value}" for key, value in LEAST.items() if key != name)
        case = f"{name} {values[0]} to {values[-1]}; {held}"
        rows.append(row(f"(e) an iteration for each {unit} more", case, slope, "ms"))
        rows.append(row(f"(e) what it costs beside, by {name}", case, start, "ms"))
        rows.append(row(f"(e) R² of the line, by {name}", case, straight, "", ">= 0.98"))
    record("scaling", rows)


if __name__ == "__main__":
    main()
