"""What spreading work costs: 100,000 jobs of nothing through Dask, two workers against one.

    python benchmarks/sweep.py [--jobs 100000] [--clips 12] [--repeats 3]

The first says what the scheduler takes for each job, and what memory this process grows by. The
second explains generated clips with STEP, one thread a job, by one and by two processes of Dask.
"""

import argparse
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

from common import record, row

import stepkit as sk
from stepkit._workers import executor, in_any_order

WEIGHTS = Path(sk.__file__).parent / "weights" / "r2plus1d_narrow_appearance.safetensors"


def nothing(job):
    """Stand in for `stepkit.sweep.work`."""
    return [{"status": "done", "what": "made", "error": "", "seconds": 0.0}]


def overhead(jobs: int) -> list[dict]:
    """Send jobs through Dask that do nothing."""
    every = [("step", [i]) for i in range(jobs)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with executor("dask", 2) as pool:
        start = time.perf_counter()
        count = sum(1 for _ in in_any_order(nothing, every, pool))
        taken = time.perf_counter() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert count == jobs
    case = f"{jobs} jobs that do nothing, 2 workers"
    return [
        row("Dask, for each job", case, 1000 * taken / jobs, "ms"),
        row("Dask, memory of this process and its scheduler", case, more, "MB"),
    ]


def seconds(workers: int, clips: int) -> float:
    """Return how long a sweep takes, without what it takes to open the executor and the model."""
    source = partial(sk.load_dataset, "appearance", "test", n=clips, frames=8, size=48)
    network = partial(sk.load_model, "r2plus1d_narrow", 6, weights=str(WEIGHTS))
    given = {"step": {"preset": "fast"}}, {"model_name": "narrow"}
    with tempfile.TemporaryDirectory() as out, executor("dask", workers) as pool:
        few = {"random": {}, "step@warm": {"preset": "fast", "iterations": 2}}
        sk.sweep(source, network, few, out, **given[1], executor=pool)
        start = time.perf_counter()
        table = sk.sweep(source, network, given[0], out, **given[1], executor=pool)
        taken = time.perf_counter() - start
    assert (table["status"] == "done").all()
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=100_000, help="that do nothing; 0: none")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    # in turns, so that both see the same machine
    pairs = [(seconds(1, asked.clips), seconds(2, asked.clips)) for _ in range(asked.repeats)]
    ratios = [one / two for one, two in pairs]
    case = f"{asked.clips} clips of 8x48x48 by STEP, r2plus1d_narrow, one thread a job"
    rows = [row("one worker / two workers", case, ratios, "ratio", ">= 1.7")]
    record("sweep", rows)
    if asked.jobs:
        record("scheduler", overhead(asked.jobs))


if __name__ == "__main__":
    main()
