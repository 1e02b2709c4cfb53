"""Peak memory of the methods that average gradients: it grows with batch_size, not with points.

    python benchmarks/memory.py

Each case runs in a process of its own, R(2+1)D-18 at 16×112×112; what is printed is the peak of the
process less that of one which only loads the model and looks at one clip.
"""

import resource
import subprocess
import sys

CASES = [  # method, option that counts the points, points, batch_size
    (method, option, points, batch)
    for method, option in (("integrated_gradients", "steps"), ("smoothgrad", "samples"))
    for points, batch in ((4, 2), (16, 2), (16, 4))
]


def peak(method: str, option: str, points: str, batch: str) -> None:
    """Run one case and print the peak of this process, in MB."""
    import torch

    from stepkit import attribute, load_model

    model, clip = load_model("r2plus1d_18", 24), torch.randn(1, 3, 16, 112, 112)
    attribute(method, model, clip, 0, batch_size=int(batch), **{option: int(points)})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(*case) -> float:
    """Run `peak` in a process of its own."""
    command = [sys.executable, __file__, *map(str, case)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    """Print the peaks."""
    least = {method: measure(method, option, 1, 1) for method, option, *_ in CASES}
    for method, option, points, batch in CASES:
        more = measure(method, option, points, batch) - least[method]
        print(f"{method}, {points} {option}, batch_size {batch}: {more:.0f} MB more than one point")


if __name__ == "__main__":
    peak(*sys.argv[1:]) if len(sys.argv) > 1 else main()
