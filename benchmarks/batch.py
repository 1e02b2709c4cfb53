"""Seconds per clip for a batch that fills the device, and where they go.

    python benchmarks/batch.py [--model r2plus1d_18] [--frames 16] [--size 112] [--clips 0]
        [--iterations 0] [--compiled]

Meant for a GPU: 1200 iterations, and preset fast, of as many clips as fit; how near the device's
rate of matrix products that comes; a profile of a few iterations by PyTorch's own profiler. On a
CPU the same runs with one clip and three iterations, unless told otherwise.
"""

import argparse
from functools import partial

import torch
from common import record, row, seconds
from iteration import AREAS, matrix_rate, operations
from torch.profiler import ProfilerActivity, profile

import stepkit as sk
from stepkit.attribution import PRESETS
from stepkit.models import batch_that_fits, precision_of

TOP = 10  # of the profile


def profiled(call, device) -> list[dict]:
    """Return the operations that took most of a call, as shares of all."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as trace:
        call()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = sorted(trace.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in found)
    return [
        row(f"profile: {e.key}", "", getattr(e, own) / total, "of the time") for e in found[:TOP]
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="r2plus1d_18")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--clips", type=int, default=0, help="at once; 0: as many as fit")
    parser.add_argument("--iterations", type=int, default=0, help="0: those of the presets")
    parser.add_argument("--compiled", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    raw = sk.load_model(asked.model, num_classes=24).to(device)
    model = sk.prepare(raw, "auto", compiled=asked.compiled)

    def explained(clips, preset, iterations):
        given = {"iterations": iterations, "areas": AREAS, "batch_size": len(clips)}
        return sk.step(model, clips, 0, preset, **given)

    one = torch.randn(1, 3, asked.frames, asked.size, asked.size, device=device)
    n = asked.clips or (batch_that_fits(lambda: explained(one, "fast", 1), device) if gpu else 1)
    clips, kind = one.repeat(n, 1, 1, 1, 1), precision_of(model)
    case = f"{asked.model}, {n} clips of {asked.frames}x{asked.size}x{asked.size}, 4 areas, {kind}"

    rows = []
    for preset, goal in (("default", "<= 2.5" if gpu else ""), ("fast", "")):
        iterations = asked.iterations or (PRESETS[preset].iterations if gpu else 3)
        call = partial(explained, clips, preset, iterations)
        taken = seconds({preset: call}, 1)[preset] / n
        what = f"a clip by {preset}, {iterations} iterations"
        full = iterations == PRESETS[preset].iterations
        rows.append(row(what, case, taken, "s", goal if full else ""))
    # before, one clip is tried; after, the masks' probabilities take a pass without its gradient
    each = taken / (iterations + 1 / (n * len(AREAS)) + 1 / 2)
    share = operations(raw, one) / matrix_rate(kind, device, 5) / each
    rows.append(
        row("share of the rate of matrix products", case, share, "", ">= 0.4" if gpu else "")
    )
    rows += profiled(partial(explained, clips, "fast", 3), device)
    record(f"batch {asked.model}", rows, device)


if __name__ == "__main__":
    main()
