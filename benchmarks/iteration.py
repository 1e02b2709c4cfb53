"""One iteration of STEP against the bare network, and against a straightforward way to write it.

    python benchmarks/iteration.py [--model r2plus1d_18] [--frames 16] [--size 112] [--repeats 5]

Measured side by side in one run, at equal batch: one clip, four areas, the model prepared.

- *bare*: forward and input gradient of as many clips as there are masks.
- *masks*: the iteration with a network that costs nothing, so all that STEP adds.
- *step*: the iteration.
- *twin*: the same iteration in plain torch: every pair of canvas pixel and cell at once, the ladder
  repeated for every area, the mask sorted.
"""

import argparse
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import stepkit as sk
from stepkit.attribution.masks import SHARPNESS, MaskGeometry, core_kernel, core_loss
from stepkit.attribution.step import _log_probabilities, _Objective, _settings
from stepkit.kernels import by_voxel
from stepkit.removal import blur

AREAS = (0.05, 0.10, 0.15, 0.20)


class Free(nn.Module):
    """A network that costs next to nothing and still hands a gradient to every voxel."""

    def forward(self, clips):
        total = clips.sum((1, 2, 3, 4)) / clips[0].numel()
        return torch.stack([total, -total], 1)


def drawn(geometry, frames):
    """Return random seeds (A, T, h, w), so that no two pixels of a mask tie."""
    draw = torch.Generator().manual_seed(1)
    return torch.rand(len(AREAS), frames, *geometry.seeds, generator=draw)


def ours(model, clips, targets, settings):
    """Return a function that runs one iteration and gives the seeds' gradient."""
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    ladder, objective = by_voxel(blur().ladder(clips)), _Objective(settings, geometry, clips)
    seeds = drawn(geometry, clips.shape[2])[None].requires_grad_()
    each = targets.repeat_interleave(len(AREAS))

    def iteration():
        canvas = geometry.spread(seeds)
        scores = _log_probabilities(model, ladder, geometry.crop(canvas), each, "preservation")
        energy, _ = objective(scores, canvas, 0.5)
        return torch.autograd.grad(energy, seeds)[0]

    return iteration


def twin(model, clips, targets, settings):
    """Return the same, written without a thought for speed."""
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    s, side, (bh, bw) = geometry.step, 2 * geometry.radius + 1, geometry.blocks
    weights = geometry.weights.to(clips)[None, :, :, None]  # (1, cells, s², 1)
    T = clips.shape[2]
    each = targets.repeat_interleave(len(AREAS))
    ladder = blur().ladder(clips).repeat_interleave(len(AREAS), 0)  # (A, 8, 3, T, H, W)
    cells = T * int(np.prod(geometry.seeds))
    kernel = core_kernel(settings.kernel_length, settings.kernel_size).to(clips)
    seeds = drawn(geometry, T).view(-1, 1, *geometry.seeds).requires_grad_()

    def iteration():
        before = geometry.padding
        after = [n + side - 1 - before - c for n, c in zip((bh, bw), geometry.seeds, strict=True)]
        grid = F.pad(seeds, (before, after[1], before, after[0]))
        windows = F.unfold(grid, side)[:, :, None]  # (B, cells, 1, blocks)
        z = windows * weights
        spread = (z * (SHARPNESS * z).softmax(1)).sum(1)  # (B, s², blocks)
        spread = spread.view(-1, s, s, bh, bw).permute(0, 3, 1, 4, 2).reshape(-1, s * bh, s * bw)
        rows, columns = geometry.canvas
        canvas = spread[:, :rows, :columns].reshape(1, len(AREAS), T, rows, columns).clamp(0, 1)
        height = geometry.crop(canvas)[0, :, None] * 7  # (A, 1, T, H, W)
        rung = height.detach().floor().clamp(0, 6)
        index = rung.long().expand(-1, 3, -1, -1, -1)[:, None]
        below, above = ladder.gather(1, index)[:, 0], ladder.gather(1, index + 1)[:, 0]
        kept = below + (height - rung) * (above - below)
        phi = model(kept).log_softmax(1).gather(1, each[:, None]).sum()
        values = canvas.flatten(2).sort(2).values
        n = values.shape[2]
        place = torch.arange(n).expand(len(AREAS), n)
        full = place >= n - torch.tensor([round(v * n) for v in AREAS])[:, None]
        area = ((values - full.to(values)) ** 2).mean(2).sum()
        core = core_loss(canvas, AREAS, kernel).sum()
        balance, lambda1 = cells / 4096, settings.area_weight * settings.area_growth**0.5
        energy = balance * (lambda1 * area + settings.core_weight * core) - phi
        return torch.autograd.grad(energy, seeds)[0].view(1, len(AREAS), T, *geometry.seeds)

    return iteration


def bare(model, clips, targets):
    """Return a function that runs the network and its input gradient, for as many masks."""
    many = clips.repeat_interleave(len(AREAS), 0).requires_grad_()
    each = targets.repeat_interleave(len(AREAS))

    def iteration():
        scores = model(many).log_softmax(1).gather(1, each[:, None])
        return torch.autograd.grad(scores.sum(), many)[0]

    return iteration


def seconds(functions, repeats):
    """Return the median seconds of each function; they take turns, so that all see one machine."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="r2plus1d_18")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    clips = torch.randn(1, 3, given.frames, given.size, given.size, generator=draw)
    targets = torch.tensor([1])
    settings = _settings("fast", {"areas": AREAS}, clips.shape[2:])
    model = sk.prepare(sk.load_model(given.model, num_classes=24))
    free = ours(Free(), clips, targets, settings)
    gap = (free() - twin(Free(), clips, targets, settings)()).abs().max() / free().abs().max()
    took = seconds(
        {
            "bare": bare(model, clips, targets),
            "step": ours(model, clips, targets, settings),
            "masks": free,
            "twin": twin(model, clips, targets, settings),
            "twin masks": twin(Free(), clips, targets, settings),
        },
        given.repeats,
    )
    print(f"{given.model}, 1 clip of {given.frames}x{given.size}x{given.size}, 4 areas, float32")
    for name, value in took.items():
        print(f"  {name:<14}{1000 * value:8.0f} ms")
    print(f"  STEP over bare network {took['step'] / took['bare']:.2f}")
    print(f"  twin over STEP         {took['twin'] / took['step']:.2f}")
    print(f"  twin's masks over ours {took['twin masks'] / took['masks']:.1f}")
    print(f"  gradients of the two differ by {gap:.1e} of the largest")


if __name__ == "__main__":
    main()
