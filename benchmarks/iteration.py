"""One iteration of STEP against the bare network, and against a straightforward way to write it.

    python benchmarks/iteration.py [--model r2plus1d_18] [--frames 16] [--size 112] [--repeats 5]
        [--eager]

Measured side by side in one run, at equal batch, one clip and four areas, for each precision that
the device has, and compiled unless --eager or for want of a C++ compiler:

- *bare*: forward and input gradient of the prepared model, for as many clips as there are masks.
- *step*: the iteration, with the same model.
- *masks*: the iteration with a network that costs next to nothing, so all that STEP adds.
- *twin*: the same iteration in plain torch and float32, the model as it comes: every pair of canvas
  pixel and cell at once, the ladder repeated for every area, the mask sorted.

Each runs four times in a row, and the time is that of one.
"""

import argparse
import shutil

import numpy as np
import torch
from common import record, row, seconds
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import stepkit as sk
from stepkit.attribution import objective
from stepkit.attribution.objective import Objective, core_kernel, core_loss
from stepkit.attribution.settings import settings_for
from stepkit.attribution.smoothmax import SHARPNESS, MaskGeometry
from stepkit.prepare import has_bfloat16
from stepkit.removal import blur

AREAS = (0.05, 0.10, 0.15, 0.20)
ROW = 4  # iterations


class Free(nn.Module):
    """A network that costs next to nothing and still hands a gradient to every voxel."""

    def forward(self, clips):
        total = clips.sum((1, 2, 3, 4)) / clips[0].numel()
        return torch.stack([total, -total], 1)


def drawn(geometry, clips):
    """Return random seeds (1, A, T, h, w), so that no two pixels of a mask tie."""
    draw = torch.Generator().manual_seed(1)
    seeds = torch.rand(1, len(AREAS), clips.shape[2], *geometry.seeds, generator=draw)
    return seeds.to(clips).requires_grad_()


def ours(model, clips, targets, settings):
    """Return a function that runs one iteration and gives the seeds' gradient."""
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    worth = Objective(model, clips, targets, settings, sk.scores.PROBABILITY, geometry)
    seeds = drawn(geometry, clips)

    def iteration():
        energy, _ = worth(geometry.spread(seeds), 0.5)
        return torch.autograd.grad(energy, seeds)[0]

    return iteration


def plain_parts(geometry, clips):
    """Return smooth max, removal and area loss, each written without a thought for speed."""
    s, side, (bh, bw) = geometry.step, 2 * geometry.radius + 1, geometry.blocks
    weights = geometry.weights.to(clips)[None, :, :, None]  # (1, cells, s², 1)
    T, A = clips.shape[2], len(AREAS)
    ladder = blur().ladder(clips).repeat_interleave(A, 0)  # (A, 8, 3, T, H, W)

    def spread(seeds):  # (1, A, T, h, w) -> canvas (1, A, T, rows, columns)
        before = geometry.padding
        after = [n + side - 1 - before - c for n, c in zip((bh, bw), geometry.seeds, strict=True)]
        grid = F.pad(seeds.view(-1, 1, *geometry.seeds), (before, after[1], before, after[0]))
        windows = F.unfold(grid, side)[:, :, None]  # (B, cells, 1, blocks)
        z = windows * weights
        found = (z * (SHARPNESS * z).softmax(1)).sum(1)  # (B, s², blocks)
        found = found.view(-1, s, s, bh, bw).permute(0, 3, 1, 4, 2).reshape(-1, s * bh, s * bw)
        rows, columns = geometry.canvas
        return found[:, :rows, :columns].reshape(1, A, T, rows, columns).clamp(0, 1)

    def removal(masks):  # (1, A, T, H, W) -> clips (A, 3, T, H, W)
        height = masks[0, :, None] * 7  # (A, 1, T, H, W)
        rung = height.detach().floor().clamp(0, 6)
        index = rung.long().expand(-1, 3, -1, -1, -1)[:, None]
        below, above = ladder.gather(1, index)[:, 0], ladder.gather(1, index + 1)[:, 0]
        return below + (height - rung) * (above - below)

    def area(canvas):
        values = canvas.flatten(2).sort(2).values
        n = values.shape[2]
        place = torch.arange(n, device=values.device).expand(A, n)
        counts = torch.tensor([round(v * n) for v in AREAS], device=values.device)
        full = place >= n - counts[:, None]
        return ((values - full.to(values)) ** 2).mean(2).sum()

    return spread, removal, area


def twin(model, clips, targets, settings):
    """Return the same, of plain parts."""
    geometry = MaskGeometry(*clips.shape[-2:], settings.step, settings.sigma)
    spread, removal, area = plain_parts(geometry, clips)
    each = targets.repeat_interleave(len(AREAS))
    cells = clips.shape[2] * int(np.prod(geometry.seeds))
    kernel = core_kernel(settings.kernel_length, settings.kernel_size).to(clips)
    seeds = drawn(geometry, clips)

    def iteration():
        canvas = spread(seeds)
        kept = removal(geometry.crop(canvas))
        phi = model(kept).log_softmax(1).gather(1, each[:, None]).sum()
        core = core_loss(canvas, AREAS, kernel).sum()
        balance, lambda1 = cells / 4096, settings.area_weight * settings.area_growth**0.5
        energy = balance * (lambda1 * area(canvas) + settings.core_weight * core) - phi
        return torch.autograd.grad(energy, seeds)[0]

    return iteration


def bare(model, clips, targets):
    """Return a function that runs the network and its input gradient, for as many masks."""
    many = clips.repeat_interleave(len(AREAS), 0).requires_grad_()
    each = targets.repeat_interleave(len(AREAS))

    def iteration():
        scores = model(many).log_softmax(1).gather(1, each[:, None])
        return torch.autograd.grad(scores.sum(), many)[0]

    return iteration


def in_a_row(iteration):
    """Return a function that runs ``ROW`` iterations."""

    def run():
        for _ in range(ROW):
            iteration()

    return run


def operations(model, clips) -> float:
    """Count the floating-point operations of *bare*: the forward pass, and as many back."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clips)
    return 2 * len(AREAS) * counter.get_total_flops()


def matrix_rate(kind: str, device, repeats: int) -> float:
    """Return the operations per second of a large matrix product: the most to be hoped for."""
    n = 8192 if device.type == "cuda" else 3072
    a = torch.randn(n, n, device=device, dtype=getattr(torch, kind.partition(" ")[0]))
    taken = seconds({"product": lambda: a @ a}, repeats)["product"]
    return 2 * n**3 / float(np.median(taken))


def disagreement(given) -> float:
    """Return how far the two gradients are apart, at most, as a share of the largest.

    With the network that is free, and without sharing among values that nearly tie, which a sort
    does not have.
    """
    tie, objective.TIE = objective.TIE, 0.0
    try:
        exact, found = twin(Free(), *given)(), ours(Free(), *given)()
    finally:
        objective.TIE = tie
    return float((found - exact).abs().max() / exact.abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="r2plus1d_18")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator().manual_seed(0)
    clips = torch.randn(1, 3, asked.frames, asked.size, asked.size, generator=draw).to(device)
    targets = torch.tensor([1], device=device)
    given = clips, targets, settings_for("fast", {"areas": AREAS}, clips.shape[2:])
    raw = sk.load_model(asked.model, num_classes=24).to(device).requires_grad_(False)
    kinds = {"float32": sk.prepare(raw)}
    if has_bfloat16(device):
        kinds["bfloat16"] = sk.prepare(raw, "bfloat16")
    if not asked.eager and shutil.which("c++"):
        best = [*kinds][-1]
        kinds[f"{best} compiled"] = sk.prepare(raw, "auto", compiled=True)
    row_of = {"masks": ours(Free(), *given)}
    for kind, model in kinds.items():
        row_of |= {f"bare {kind}": bare(model, clips, targets), f"step {kind}": ours(model, *given)}
    row_of |= {"twin masks": twin(Free(), *given), "twin": twin(raw, *given)}
    timed = {name: in_a_row(iteration) for name, iteration in row_of.items()}
    took = {name: taken / ROW for name, taken in seconds(timed, asked.repeats).items()}
    case = f"{asked.model}, 1 clip of {asked.frames}x{asked.size}x{asked.size}, 4 areas"
    goals = {"masks": "<= 80"}
    rows = [
        row(name, case, 1000 * taken, "ms", goals.get(name, "")) for name, taken in took.items()
    ]
    for kind in kinds:
        floor, step = took[f"bare {kind}"], took[f"step {kind}"]
        rows.append(row(f"(a) step / bare, {kind}", case, step / floor, "ratio", "<= 1.15"))
        rows.append(row(f"(b) twin / step, {kind}", case, took["twin"] / step, "ratio", ">= 10"))
        rate = matrix_rate(kind, device, asked.repeats)
        share = operations(raw, clips) / rate / step
        rows.append(row(f"matrix products, {kind}", "", rate / 1e9, "GFLOP/s"))
        rows.append(row(f"(a) share of that rate in step, {kind}", case, share, ""))
    rows.append(row("twin masks / masks", case, took["twin masks"] / took["masks"], "ratio"))
    rows.append(row("the twins' gradients apart", case, disagreement(given), "of the largest"))
    record(f"iteration {asked.model}", rows, device)


if __name__ == "__main__":
    main()
