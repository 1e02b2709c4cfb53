"""Peak memory: it grows with what is worked on at once, not with points, iterations or steps.

    python benchmarks/memory.py [--size 112] [--frames 16]

Each case runs in a process of its own, R(2+1)D-18; what counts is the peak of the process less that
of one which only loads the model and the clips.
"""

import argparse
import resource
import subprocess
import sys

CASES = [  # method, options
    ("gradient", {"batch_size": 1}),
    ("integrated_gradients", {"steps": 4, "batch_size": 2}),
    ("integrated_gradients", {"steps": 16, "batch_size": 2}),
    ("integrated_gradients", {"steps": 16, "batch_size": 4}),
    ("grad_cam", {"batch_size": 1}),
    ("rise", {"samples": 16, "batch_size": 2}),
    ("step", {"preset": "fast", "iterations": 2, "areas": (0.1,)}),
    ("step", {"preset": "fast", "iterations": 2, "areas": (0.05, 0.1, 0.15, 0.2)}),
    ("step", {"preset": "fast", "iterations": 4, "areas": (0.05, 0.1, 0.15, 0.2)}),
]


def peak(method: str, options: str, frames: str, size: str) -> None:
    """Run one case and print the peak of this process, in MB."""
    import ast

    import torch

    from stepkit import attribute, load_model, prepare

    model = prepare(load_model("r2plus1d_18", 24))
    clip = torch.randn(1, 3, int(frames), int(size), int(size))
    if method != "none":
        attribute(method, model, clip, 0, **ast.literal_eval(options))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(*case) -> float:
    """Run `peak` in a process of its own."""
    command = [sys.executable, __file__, "case", *map(str, case)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    from common import record, row

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--frames", type=int, default=16)
    asked = parser.parse_args()
    size = asked.frames, asked.size
    least, rows = measure("none", {}, *size), []
    for method, options in CASES:
        told = ", ".join(f"{name} {value}" for name, value in options.items() if name != "preset")
        case = f"r2plus1d_18, 1 clip of {size[0]}x{size[1]}x{size[1]}, {told}"
        more = measure(method, options, *size) - least
        rows.append(row(f"(f) peak memory, {method}", case, more, "MB"))
    record("memory", rows)


if __name__ == "__main__":
    peak(*sys.argv[2:]) if sys.argv[1:2] == ["case"] else main()
