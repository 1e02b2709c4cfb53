"""What the benchmarks share: taking turns on the clock, and one table of what came out."""

import datetime
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock

try:
    import av  # noqa: F401
except ImportError:  # nothing here reads a video
    for part in ("", ".codec", ".codec.context", ".stream", ".video", ".video.reformatter"):
        sys.modules["av" + part] = MagicMock()

# isort: split
import numpy as np
import pandas as pd
import torch

from stepkit import stats
from stepkit._files import write_whole
from stepkit.prepare import has_bfloat16

CPU = torch.device("cpu")
TABLE = Path(__file__).parents[1] / "results" / "benchmarks.csv"


def seconds(functions: dict, repeats: int) -> dict[str, np.ndarray]:
    """Return ``repeats`` times of each function, which take turns: all see the same machine.

    The first turn warms up and does not count.
    """
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(taken) for name, taken in times.items()}


def clocked(call, repeats: int = 5) -> float:
    """Return a call's median milliseconds, by the device's events where there is one."""
    cuda, taken = torch.cuda.is_available(), []
    for _ in range(repeats + 1 if cuda else 1):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - begun))
    return median(taken[1:] or taken)


def row(what: str, case: str, values, unit: str = "", goal: str = "") -> dict:
    """Return a row of the table: median, least and most of ``values``; ``goal`` is "<= 1.15"."""
    values = np.atleast_1d(np.asarray(values, float))
    found = {"what": what, "case": case, "value": np.median(values)}
    found |= {"low": values.min(), "high": values.max(), "repeats": len(values)}
    found |= {"unit": unit, "goal": goal}
    if goal:
        sign, bound = goal.split()
        reached = found["value"] <= float(bound) if sign == "<=" else found["value"] >= float(bound)
        found["reached"] = "yes" if reached else "no"
    return found


def difference(what: str, case: str, values) -> dict:
    """Return a row of paired differences, more being better: mean and bootstrap interval.

    *Reached* is "yes" where the interval does not end below zero: not worse beyond its half-width.
    """
    gap = stats.bootstrap_mean(values)
    found = row(what, case, gap["mean"], "difference")
    found |= {"low": gap["low"], "high": gap["high"], "repeats": len(values)}
    return found | {"goal": "not worse", "reached": "no" if gap["high"] < 0 else "yes"}


def machine(device: torch.device) -> str:
    """Return what the numbers depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        told = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        names = [line.partition(": ")[2] for line in told.splitlines() if "model name" in line]
        name = names[0] if names else platform.processor() or platform.machine()
        fast = "with" if has_bfloat16(device) else "without"
        name = f"{torch.get_num_threads()} threads of {name}, {fast} bfloat16"
    return f"{name}, torch {torch.__version__}"


def record(benchmark: str, rows: list[dict], device=CPU) -> pd.DataFrame:
    """Print the rows, and put them into results/benchmarks.csv in place of earlier ones.

    Rows of the same benchmark on another machine stay. ``device`` is where the work was done.
    """
    table = pd.DataFrame(rows)
    table.insert(0, "benchmark", benchmark)
    table["machine"], table["date"] = machine(device), datetime.date.today().isoformat()
    print(table.drop(columns=["benchmark", "machine", "date"]).round(4).to_string(index=False))
    if TABLE.is_file():
        known = pd.read_csv(TABLE)
        same = (known["benchmark"] == benchmark) & (known["machine"] == machine(device))
        table = pd.concat([known[~same], table]).sort_values("benchmark", kind="stable")
    TABLE.parent.mkdir(exist_ok=True)
    write_whole(TABLE, lambda partial: table.to_csv(partial, index=False, float_format="%.6g"))
    return table
