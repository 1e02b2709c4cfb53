"""What makes STEP's pass through R(2+1)D faster on a GPU: every way, measured in one go.

    python -m benchmarks.gpu [--out results] [--minutes 6] [--small]

Stages run in the order of their worth, each told with what it should take, and are left out where
the clock would run over. Each writes its rows into gpu.jsonl as soon as it has them, an error in
place of a number where a way fails. ``--small`` runs all of them on a small clip, to prove them.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks import lean  # first of all: it says how Triton runs, and stands in for PyAV

# isort: split
import pandas as pd
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import stepkit as sk
from benchmarks.lean import clocked
from stepkit import _convolutions, removal

preparation = import_module("stepkit.prepare")  # the package shows functions of these names
step_module = import_module("stepkit.attribution.step")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
AREAS = (0.05, 0.10, 0.15, 0.20)
PARTS = 14  # processes that compile Triton's kernels ahead


class Free(nn.Module):
    """A network that costs next to nothing and still hands a gradient to every voxel."""

    def forward(self, clips):
        total = clips.sum((1, 2, 3, 4)) / clips[0].numel()
        return total[:, None] * torch.linspace(-1, 1, 24, device=clips.device)


class Bench:
    def __init__(self, asked):
        self.out, self.small = Path(asked.out), asked.small
        self.out.mkdir(parents=True, exist_ok=True)
        self.begun, self.limit = asked.begun, 60 * asked.minutes
        self.rows, self.networks, self.bare_ms, self.step_ms = [], {}, {}, {}
        self.rate = self.operations = float("nan")
        self.stage, self.kept = "", {}

    def elapsed(self):
        return time.time() - self.begun

    def note(self, what, value=None, unit="", **more):
        row = {"stage": self.stage, "what": what, "value": value, "unit": unit, **more}
        self.rows.append(row)
        with (self.out / "gpu.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        shown = {k: v for k, v in row.items() if k != "stage"}
        print(f"  [{self.elapsed():5.0f} s] {shown}", flush=True)

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
            self.stage = stage.__name__
            over = self.elapsed() + estimate > self.limit
            print(f"== {self.stage}: about {estimate} s, {self.elapsed():.0f} s gone", flush=True)
            if over and not self.small:
                self.note("left out", reason="the clock")
                continue
            start = time.time()
            self.tried("failed", stage, self)
            self.note("stage took", time.time() - start, "s")

    # ------------------------------------------------------------------------------ what is run

    def setup(self):
        frames, size, self.clips_n = (4, 24, 1) if self.small else (16, 112, 16)
        draw = torch.Generator().manual_seed(0)
        clips = torch.randn(self.clips_n, 3, frames, size, size, generator=draw)
        clips = removal.gaussian_blur(clips, size / 28) + 0.1 * clips
        self.clips = (clips / clips.std((1, 2, 3, 4), keepdim=True)).to(DEVICE)
        name = "r2plus1d_narrow" if self.small else "r2plus1d_18"
        self.raw = sk.load_model(name, num_classes=24).to(DEVICE).requires_grad_(False)
        with torch.no_grad():
            logits = self.raw(self.clips[:4])
            spread = logits.std(0).mean() if len(logits) > 1 else logits.std()
            self.raw.fc.weight *= 2 / spread  # classes that clips tell apart: masks then matter
            self.raw.fc.bias -= self.raw(self.clips[:4]).mean(0)
            self.targets = torch.cat([self.raw(c[None]).argmax(1) for c in self.clips])
        self.many = self.clips.repeat_interleave(len(AREAS), 0).clone().requires_grad_()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.raw(self.clips[:1])
        self.operations = 2 * counter.get_total_flops()  # forward, and as many to the clips

    def network(self, precision="bfloat16", tile=32, **ways):
        old, preparation.TILE = preparation.TILE, tile
        try:
            ready = sk.prepare(self.raw, precision)
        finally:
            preparation.TILE = old
        if ways:
            _convolutions.rewrite(ready, **ways)
        return ready

    def bare(self, name, network, repeats=7):
        """Time a pass and back to the clips, batch of all masks; keep the network."""
        each = self.targets.repeat_interleave(len(AREAS))

        def once():
            logits = network(self.many)
            score = logits.log_softmax(1).gather(1, each[:, None]).sum()
            return torch.autograd.grad(score, self.many)[0]

        found = once().flatten(1)
        if "exact" not in self.kept:
            self.kept["exact"] = found
        alike = torch.cosine_similarity(found, self.kept["exact"], 1).median().item()
        ms = clocked(once, repeats) / len(self.many)
        self.bare_ms[name], self.networks[name] = ms, network
        share = self.operations / (ms / 1000) / self.rate
        self.note(f"bare {name}", ms, "ms/mask", share=share, alike=alike)

    def step(self, name, network, iterations=(10, 40)):
        """Time STEP's iteration, as the difference of two runs, and extrapolate to 1200."""
        iterations = (1, 2) if self.small else iterations
        took, given = [], {"areas": AREAS, "batch_size": self.clips_n}
        for n in (2, *iterations):
            start = time.time()
            found = sk.step(network, self.clips, self.targets, iterations=n, **given)
            if CUDA:
                torch.cuda.synchronize()
            took.append(time.time() - start)
        each = (took[2] - took[1]) / (iterations[1] - iterations[0])
        self.step_ms[name] = 1000 * each / len(self.many)
        ratio = self.step_ms[name] / self.bare_ms.get(name, float("nan"))
        share = self.operations * len(self.many) / each / self.rate
        more = {"step/bare": ratio, "share": share, "first run s": took[0]}
        more["clip s at 1200, extrapolated"] = 1200 * each / self.clips_n
        self.note(f"step {name}", self.step_ms[name], "ms/mask", **more)
        return found

    def best(self, compiled=False):
        names = [n for n in self.bare_ms if n != "float32" and "searched" not in n]
        names = [n for n in names if ("compiled" in n) <= compiled]
        return min(names, key=self.bare_ms.get)


# ---------------------------------------------------------------------------------------- stages


def card(bench):
    n = 256 if bench.small else 8192
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    ms = clocked(lambda: a @ b, 15)
    bench.rate = 2 * n**3 / (ms / 1000)
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    bench.note(
        "bf16 matrix rate", bench.rate / 1e12, "TFLOP/s", device=name, torch=torch.__version__
    )
    x = torch.randn(2**12 if bench.small else 2**29, device=DEVICE)
    y = torch.empty_like(x)
    bench.note("copy", 8 * len(x) / clocked(lambda: y.copy_(x), 15) / 1e9, "TB/s, read and written")
    bench.note("operations of a pass and back", bench.operations / 1e9, "GFLOP")


def bare_today(bench):
    bench.tried("float32", lambda: bench.bare("float32", sk.prepare(bench.raw), 2))
    bench.bare("prepared", bench.network())


def bare_ways(bench):
    for name, ways in {
        "flat + squares": {"flat": True, "squares": True},
        "squares": {"flat": False, "squares": True},
        "flat": {"flat": True, "squares": False},
        "flat + squares, tiles of 16": {"tile": 16, "flat": True},
        "flat + squares, tiles of 64": {"tile": 64, "flat": True},
    }.items():
        bench.tried(name, one_way, bench, name, ways)


def one_way(bench, name, ways):
    bench.bare(name, bench.network(**ways))


def searched(bench):
    torch.backends.cudnn.benchmark = True
    try:
        bench.bare("flat + squares, searched", bench.network(flat=True))
        bench.step("flat + squares, searched", bench.networks["flat + squares, searched"])
    finally:
        torch.backends.cudnn.benchmark = False


def units(bench, name="lean", tile=32):
    """Each unit by each way; the network of the fastest."""
    ready = bench.network(None if bench.small else "bfloat16", tile, flat=False, squares=True)
    network = lean.Lean(ready)
    if bench.small:
        lean.CONFIGS[:] = lean.CONFIGS[2:3]
    bench.bare(name, network)  # chooses on the way
    table = pd.DataFrame([row for unit in network.units for row in unit.table])
    table["tflops"] = table["gflop"] / table["ms"]
    table.to_csv(bench.out / f"units_{tile}.csv", index=False)
    groups = table.assign(kind=table["way"].str.split(" \\(").str[0])
    fastest = groups.groupby(["unit", "pass", "kind"], sort=False)["ms"].min().unstack()
    fastest["gflop"] = groups.groupby(["unit", "pass"], sort=False)["gflop"].first()
    with pd.option_context("display.width", 200, "display.max_rows", 100, "display.max_columns", 9):
        print(fastest.round(3).to_string(), flush=True)
    fixed = fastest.drop(columns="gflop").sum(skipna=False)
    for kind, ms in fixed.items():
        bench.note(f"all units by {kind}", ms / len(bench.many), "ms/mask")
    best = table.loc[table.groupby(["unit", "pass"])["ms"].idxmin()]
    bench.note("all units by the fastest", best["ms"].sum() / len(bench.many), "ms/mask")
    bench.note("which", best["way"].value_counts().to_dict())


def units_of_16(bench):
    units(bench, "lean, tiles of 16", 16)


def masks_alone(bench):
    bench.bare("free", Free().to(DEVICE))
    bench.bare_ms.pop("free")
    bench.step("free", Free().to(DEVICE))


def steps(bench):
    for name in dict.fromkeys(["prepared", bench.best()]):
        bench.kept[name] = bench.tried(name, bench.step, name, bench.networks[name])


def profiled(bench):
    for name in dict.fromkeys(["prepared", bench.best()]):
        bench.tried(name, one_profile, bench, name)


def one_profile(bench, name):
    kinds = [ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
    given, taken = {"areas": AREAS, "batch_size": bench.clips_n}, {}
    for n in (2, 4):
        with profile(activities=kinds) as trace:
            sk.step(bench.networks[name], bench.clips, bench.targets, iterations=n, **given)
        own = "self_device_time_total" if CUDA else "self_cpu_time_total"
        for event in trace.key_averages():
            more = [event.count, getattr(event, own)]
            taken.setdefault(event.key, []).append((n, *more))
    rows = []
    for key, found in taken.items():  # of two iterations: what four take more than two do
        count, time = (sum(f[i] * (1 if f[0] == 4 else -1) for f in found) for i in (1, 2))
        rows.append({"kernel": key, "launches": count / 2, "ms": time / 2000})
    table = pd.DataFrame(rows).sort_values("ms", ascending=False)
    table.to_csv(bench.out / f"profile_{name.replace(' ', '_')}.csv", index=False)
    total, many = table["ms"].sum(), table["launches"].sum()
    bench.note(f"profile {name}", total / len(bench.many), "ms/mask", launches=many)
    for row in table.head(25).itertuples():
        print(f"    {row.ms / total:6.1%} {row.ms:8.3f} ms {row.launches:5.1f}x {row.kernel[:110]}")


def masks_compiled(bench):
    """Reading the ladder, and the terms of the energy, through PyTorch's compiler."""
    old = {name: getattr(step_module, name) for name in ("read", "area_loss", "core_loss")}
    for name, function in old.items():
        wrapped = partial(called, torch.compile(function, dynamic=False))
        setattr(step_module, name, wrapped)
        bench.tried(name, bench.step, f"free, {name} compiled", Free().to(DEVICE))
    name = bench.best()
    bench.tried(name, bench.step, f"{name}, masks compiled", bench.networks[name])
    for name, function in old.items():
        setattr(step_module, name, function)


def called(program, *given):
    return program(*given)


def compiled(bench):
    for name, ways in {"flat + squares compiled": {"flat": True}, "prepared compiled": {}}.items():
        bench.tried(name, one_compiled, bench, name, ways, "default")


def one_compiled(bench, name, ways, mode):
    network = bench.network(**ways)
    network.compile(dynamic=False, mode=mode)
    start = time.time()
    bench.bare(name, network)
    bench.note(f"{name}: with compiling", time.time() - start, "s")
    if bench.bare_ms[name] <= min(bench.bare_ms.values()):
        bench.step(name, network)


def autotuned(bench):
    one_compiled(bench, "compiled, autotuned", {"flat": True}, "max-autotune-no-cudagraphs")


def graphed(bench):
    """One clip, four masks: CUDA graphs of the pass, against the pass."""
    small = bench.many[:4].detach().clone().requires_grad_()
    for name in dict.fromkeys(["prepared", bench.best()]):
        network = bench.networks[name]

        def once(network=network):
            return torch.autograd.grad(network(small).log_softmax(1)[:, 0].sum(), small)[0]

        bench.note(f"4 masks, {name}", clocked(once, 10) / 4, "ms/mask")
        if CUDA:
            bench.tried(f"4 masks, {name}, graphed", one_graph, bench, name, once)


def one_graph(bench, name, once):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    bench.note(f"4 masks, {name}, graphed", clocked(graph.replay, 10) / 4, "ms/mask")


def alike(bench):
    """Heatmaps of the fastest, and of today's, against those of float32, 60 iterations."""
    given = {"areas": AREAS, "batch_size": bench.clips_n, "iterations": 2 if bench.small else 60}
    maps = {}
    for name in dict.fromkeys(["float32", "prepared", bench.best()]):
        found = sk.step(bench.networks[name], bench.clips, bench.targets, "fast", **given)
        maps[name] = found.heatmap.flatten(1)
        kept = found.probabilities.mean().item()
        r = [
            torch.corrcoef(torch.stack(p))[0, 1].item()
            for p in zip(maps["float32"], maps[name], strict=True)
        ]
        bench.note(f"heatmaps of {name} with float32", min(r), "least correlation", all=r, phi=kept)


def full(bench):
    """All 1200 iterations, by the fastest."""
    name = bench.best(compiled=True)
    given = {"areas": AREAS, "batch_size": bench.clips_n, "iterations": 2 if bench.small else 1200}
    start = time.time()
    sk.step(bench.networks[name], bench.clips, bench.targets, **given)
    bench.note(f"1200 iterations, {name}", (time.time() - start) / bench.clips_n, "s/clip, all in")


STAGES = [
    (card, 8),
    (bare_today, 8),
    (bare_ways, 20),
    (units, 30),
    (masks_alone, 30),
    (steps, 25),
    (profiled, 15),
    (alike, 25),
    (units_of_16, 20),
    (searched, 25),
    (compiled, 70),
    (masks_compiled, 40),
    (full, 60),
    (graphed, 8),
    (autotuned, 90),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="results")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="*", help="stages")
    asked = parser.parse_args()
    asked.begun = time.time()
    workers = []
    if CUDA:
        call = [sys.executable, "-m", "benchmarks.lean"]
        workers = [subprocess.Popen([*call, str(i), str(PARTS)]) for i in range(PARTS)]
    bench = Bench(asked)
    bench.stage = "setup"
    bench.setup()
    for worker in workers:
        bench.tried("compiling ahead", worker.wait, 60)
    bench.note("set up", bench.elapsed(), "s")
    bench.run([s for s in STAGES if not asked.only or s[0].__name__ in asked.only])
    print("\n== in short (ms per mask and pass; share of the card's matrix rate)")
    for row in bench.rows:
        if row["value"] is not None and row["what"].startswith(
            ("bare ", "step ", "1200", "heatmaps", "bf16", "all units")
        ):
            more = {k: row[k] for k in ("share", "alike", "step/bare") if k in row}
            more = {k: f"{v:.3f}" for k, v in more.items()}
            print(f"{row['value']:10.4f} {row['unit']:10} {row['what']} {more}")
    print("errors:", [row["what"] for row in bench.rows if "error" in row])


if __name__ == "__main__":
    main()
