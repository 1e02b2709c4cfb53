"""STEP through R(2+1)D-18 on a GPU: a pass, whole runs, and what bfloat16 does to heatmaps.

    python benchmarks/gpu.py [--out results] [--minutes 10] [--small] [--only card bare full]

Stages in the order of their worth; what the clock has no time for is left out. Each writes rows
into gpu.jsonl as soon as it has them, an error in place of a number where something fails. The
network is trained for seconds on gratings that move in eight directions, so that masks matter.
``--small`` runs every stage on a small clip, to prove them, also without a GPU.
"""

import argparse
import contextlib
import json
import math
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from common import clocked  # first of all: it stands in for PyAV where there is none
from gratings import DIRECTIONS, gratings, train
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import stepkit as sk
from stepkit._convolutions import rewrite

preparation = import_module("stepkit.prepare")  # the package shows functions of these names
step_module = import_module("stepkit.attribution.step")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
AREAS = (0.05, 0.10, 0.15, 0.20)


class Free(nn.Module):
    """A network that costs next to nothing and still hands a gradient to every voxel."""

    def forward(self, clips):
        total = clips.sum((1, 2, 3, 4)) / clips[0].numel()
        return total[:, None] * torch.linspace(-1, 1, DIRECTIONS, device=clips.device)


def finished():
    if CUDA:
        torch.cuda.synchronize()
    return time.time()


class Bench:
    def __init__(self, asked):
        self.out, self.small = Path(asked.out), asked.small
        self.out.mkdir(parents=True, exist_ok=True)
        self.begun, self.limit = time.time(), 60 * asked.minutes
        self.rate, self.stage, self.bare_ms, self.exact = math.nan, "", {}, None

    def elapsed(self):
        return time.time() - self.begun

    def note(self, what, value=None, unit="", **more):
        row = {"stage": self.stage, "what": what, "value": value, "unit": unit, **more}
        with (self.out / "gpu.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        print(f"[{self.elapsed():5.0f} s]", row, flush=True)

    def tried(self, what, call, *given):
        """Call, and record the error where it fails."""
        try:
            return call(*given)
        except Exception as error:
            self.note(what, error=f"{type(error).__name__}: {str(error)[:600]}")
            if CUDA:
                torch.cuda.empty_cache()

    def run(self, stages):
        for stage, estimate in stages:
            self.stage, start = stage.__name__, time.time()
            if self.elapsed() + estimate > self.limit and not self.small:
                self.note("left out", reason="the clock")
                continue
            self.tried("failed", stage, self)
            self.note("stage took", finished() - start, "s")

    # ------------------------------------------------------------------------------ what is run

    def setup(self, seconds):
        """Train the network, and draw the clips to explain."""
        self.stage = "setup"
        draw = torch.Generator(DEVICE).manual_seed(0)
        size, many = ((4, 24), 1) if self.small else ((16, 112), 16)
        name = "r2plus1d_narrow" if self.small else "r2plus1d_18"
        self.raw = sk.load_model(name, num_classes=DIRECTIONS).to(DEVICE)
        steps = train(self.raw, *size, draw, seconds)
        clips, classes = gratings(64, *size, draw)
        with torch.no_grad():
            phi = torch.cat([self.raw(part) for part in clips.split(16)]).softmax(1)
        right = (phi.argmax(1) == classes).float().mean().item()
        phi = phi.gather(1, classes[:, None]).mean().item()
        self.note("trained", right, "share right", steps=steps, phi=phi, chance=1 / DIRECTIONS)
        self.clips, self.targets = clips[:many], classes[:many]
        self.many = self.clips.repeat_interleave(len(AREAS), 0).requires_grad_()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.raw(self.clips[:1])
        self.operations = 2 * counter.get_total_flops()  # forward, and as many to the clips

    def share(self, ms):
        return self.operations / (ms / 1000) / self.rate

    def bare(self, name, network, repeats=7):
        """Time a pass and back to the clips, batch of all masks."""
        each = self.targets.repeat_interleave(len(AREAS))[:, None]

        def once():
            score = network(self.many).log_softmax(1).gather(1, each).sum()
            return torch.autograd.grad(score, self.many)[0]

        start = time.time()
        found = once().flatten(1)
        first = finished() - start
        self.exact = found if self.exact is None else self.exact
        alike = torch.cosine_similarity(found, self.exact, 1).median().item()
        ms = self.bare_ms[name] = clocked(once, repeats) / len(self.many)
        self.note(f"bare {name}", ms, "ms/mask", share=self.share(ms), first_s=first, alike=alike)

    def step(self, network, **options):
        options = {"areas": AREAS, "batch_size": len(self.clips), **options}
        return sk.step(network, self.clips, self.targets, **options)

    def iterating(self, name, network, pays, ends=(10, 40)):
        """Time an iteration, the difference of two runs; eager with fewer passes than ``pays``."""
        ends, taken = ((1, 2) if self.small else ends), []
        with mock.patch.object(step_module, "PAYS", pays):
            for iterations in (2, *ends):
                start = time.time()
                self.step(network, iterations=iterations)
                taken.append(finished() - start)
        ms = 1000 * (taken[2] - taken[1]) / (ends[1] - ends[0]) / len(self.many)
        self.note(f"step {name}", ms, "ms/mask", share=self.share(ms), first_s=taken[0])


# ---------------------------------------------------------------------------------------- stages


def card(bench):
    n = 256 if bench.small else 8192
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    bench.rate = 2 * n**3 / (clocked(lambda: a @ b, 15) / 1000)
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    told = {"device": name, "torch": torch.__version__}
    bench.note("bf16 matrix rate", bench.rate / 1e12, "TFLOP/s", **told)
    x = torch.randn(2**12 if bench.small else 2**29, device=DEVICE)
    y = torch.empty_like(x)
    bench.note("copy", 8 * len(x) / clocked(lambda: y.copy_(x), 15) / 1e9, "TB/s, read and written")
    bench.note("operations of a pass and back", bench.operations / 1e9, "GFLOP")


def as_it_was(bench):
    """Return the network as `prepare` made it before convolutions were rewritten."""
    with mock.patch.object(preparation, "rewrite"):
        return sk.prepare(bench.raw, "bfloat16")


def bare(bench):
    bench.tried("float32", bench.bare, "float32", sk.prepare(bench.raw), 2)
    bench.bare("bfloat16, convolutions as they come", as_it_was(bench))
    bench.bare("bfloat16", sk.prepare(bench.raw, "bfloat16"))


def alike(bench):
    """Compare heatmaps of half the clips with those of float32, by `fast`."""
    half = max(1, len(bench.clips) // 2)
    clips, targets = bench.clips[:half], bench.targets[:half]
    exact, rounded = sk.prepare(bench.raw), clips.bfloat16().float()
    maps = None
    for name, network, shown in (
        ("float32", exact, clips),
        ("float32 of clips rounded to bfloat16", exact, rounded),
        ("bfloat16, convolutions as they come", as_it_was(bench), clips),
        ("bfloat16", sk.prepare(bench.raw, "bfloat16"), clips),
    ):
        options = {"areas": AREAS, "batch_size": half} | ({"iterations": 2} if bench.small else {})
        found = sk.step(network, shown, targets, "fast", **options)
        heat = found.heatmap.flatten(1)
        maps = heat if maps is None else maps
        both = [torch.stack(pair) for pair in zip(maps, heat, strict=True)]
        r = torch.stack([torch.corrcoef(pair)[0, 1] for pair in both])
        told = {"least": r.min().item(), "whole": found.clip_probability.mean().item()}
        told |= {"kept": found.probabilities.mean(0).tolist()}
        told |= {"random": found.random_probabilities.mean(0).tolist()}
        bench.note(f"heatmaps by {name}", r.median().item(), "r with float32, median", **told)


def fast(bench):
    """Time preset `fast` as a user calls it: short, so nothing is compiled."""
    options = {"iterations": 2} if bench.small else {}
    for turn in ("first", "second"):
        start = time.time()
        bench.step(sk.prepare(bench.raw, "bfloat16"), preset="fast", **options)
        bench.note(f"fast, {turn} call", (finished() - start) / len(bench.clips), "s/clip")


def full(bench):
    """Time a full run as a user calls it: long, so all is compiled in the first iterations."""
    iterations, times = (6 if bench.small else 1200), {}
    warm = iterations // 6  # the core loss has begun

    def look(done, masks, phi):
        if done in (warm, iterations - 1):
            times[done] = finished()
            bench.note(f"full run, iteration {done}", times[done] - start, "s since the call")

    start = time.time()
    network = sk.prepare(bench.raw, "bfloat16")
    found = bench.step(network, iterations=iterations, callback=look)
    total, each = finished() - start, (times[iterations - 1] - times[warm]) / (5 * warm - 1)
    ms = 1000 * each / len(bench.many)
    bench.note("step, full run", ms, "ms/mask", share=bench.share(ms))
    told = {"first call, in all": total, "of it compiling": total - iterations * each}
    told |= {"kept": found.probabilities.mean(0).tolist()}
    bench.note("1200 iterations, compiled", iterations * each / len(bench.clips), "s/clip", **told)


def masks(bench):
    bench.iterating("mask side alone", Free().to(DEVICE), 0)
    bench.iterating("mask side alone, eager", Free().to(DEVICE), math.inf)
    bench.iterating("eager", sk.prepare(bench.raw, "bfloat16"), math.inf)


def compiled(bench):
    bench.bare("compiled", sk.prepare(bench.raw, "bfloat16", compiled=True))


def profiled(bench):
    """Record the kernels of an iteration of a full run."""
    kinds, taken = [ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU], {}
    own = "self_device_time_total" if CUDA else "self_cpu_time_total"
    network = sk.prepare(bench.raw, "bfloat16")
    with mock.patch.object(step_module, "PAYS", 0):
        bench.step(network, iterations=2)
        for sign, iterations in ((-1, 2), (1, 4)):  # what four take more than two do
            with profile(activities=kinds) as trace:
                bench.step(network, iterations=iterations)
            for event in trace.key_averages():
                row = taken.setdefault(event.key, {"launches": 0, "ms": 0})
                row["launches"] += sign * event.count / 2
                row["ms"] += sign * getattr(event, own) / 2000
    table = pd.DataFrame.from_dict(taken, "index").sort_values("ms", ascending=False)
    table.to_csv(bench.out / "gpu_profile.csv", index_label="kernel")
    launches = float(table["launches"].sum())
    ms = float(table["ms"].sum()) / len(bench.many)
    bench.note("kernels of an iteration", ms, "ms/mask", launches=launches)
    print(table.head(25).to_string(max_colwidth=100, float_format="%.3f"))


def units(bench):
    """Try the bound of `lean`: each convolution with all that follows it in one kernel."""
    lean = import_module("lean")
    network = sk.prepare(bench.raw, None if bench.small else "bfloat16")
    rewrite(network)
    network = lean.Lean(network)
    bench.bare("lean", network)  # chooses on the way
    table = pd.DataFrame([row for unit in network.units for row in unit.table])
    table.to_csv(bench.out / "gpu_units.csv", index=False)
    best = table.loc[table.groupby(["unit", "pass"])["ms"].idxmin()]
    bench.note("which", **best["way"].value_counts().to_dict())
    bench.iterating("lean", network, 0)


STAGES = [
    (card, 2),
    (bare, 5),
    (alike, 15),
    (fast, 10),
    (full, 95),
    (masks, 12),
    (compiled, 15),
    (profiled, 10),
    (units, 60),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="results")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--train", type=float, default=25, help="seconds")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="*", help="stages")
    asked = parser.parse_args()
    bench = Bench(asked)
    with contextlib.suppress(KeyboardInterrupt):
        bench.setup(asked.train)
        bench.run([s for s in STAGES if not asked.only or s[0].__name__ in asked.only])


if __name__ == "__main__":
    main()
