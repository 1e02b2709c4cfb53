"""Where an iteration's time goes: its parts, one at a time, forward and backward.

    python benchmarks/parts.py [--frames 16] [--size 112] [--repeats 5]

*plain* is the way that one writes first, *ours* the engine's. The network is `iteration.py`'s.
"""

import argparse

import torch
from common import record, row, seconds
from iteration import AREAS, drawn, plain_parts

from stepkit.attribution.objective import area_loss, core_kernel, core_loss
from stepkit.attribution.settings import settings_for
from stepkit.attribution.smoothmax import MaskGeometry
from stepkit.removal import blur, read


def both_ways(part, given):
    """Return a call of a part and of its gradient."""
    weight = torch.rand_like(part(given).detach())

    def call():
        torch.autograd.grad((part(given) * weight).sum(), given)

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    clips = torch.randn(1, 3, asked.frames, asked.size, asked.size, generator=draw)
    settings = settings_for("fast", {"areas": AREAS}, clips.shape[2:])
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    seeds, ladder = drawn(geometry, clips), blur().ladder(clips)
    canvas = geometry.spread(seeds).detach().requires_grad_()
    masks = geometry.crop(canvas).detach().requires_grad_()
    kernel = core_kernel(settings.kernel_length, settings.kernel_size)
    spread, removal, area = plain_parts(geometry, clips)
    parts = {
        "smooth max": (spread, geometry.spread, seeds),
        "removal": (removal, lambda masks: read(ladder, masks), masks),
        "area": (area, lambda canvas: area_loss(canvas, AREAS), canvas),
        "core": (None, lambda canvas: core_loss(canvas, AREAS, kernel), canvas),
    }
    case = f"1 clip of {asked.frames}x{asked.size}x{asked.size}, 4 areas"
    rows = []
    for name, (plain, ours, given) in parts.items():
        ways = {"plain": plain, "ours": ours}
        calls = {way: both_ways(part, given) for way, part in ways.items() if part}
        for way, taken in seconds(calls, asked.repeats).items():
            rows.append(row(f"{name}, {way}", case, 1000 * taken, "ms"))
    record("parts", rows)


if __name__ == "__main__":
    main()
