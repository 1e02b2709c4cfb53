"""Draw results/benchmarks.csv: every ratio beside its goal, and what "fast" costs in quality.

python benchmarks/figure.py
"""

from functools import partial
from pathlib import Path

import pandas as pd
from common import TABLE
from matplotlib.figure import Figure

from stepkit.files import write_whole
from stepkit.viz import DPI, FONT

OUT = Path(__file__).parents[1] / "figures"


def draw(ax, table: pd.DataFrame, xlabel: str) -> None:
    """Draw a row per line: median and range or interval; its goal as an open mark."""
    places = range(len(table))[::-1]
    spans = [table["value"] - table["low"], table["high"] - table["value"]]
    ax.errorbar(table["value"], places, xerr=spans, fmt="o", color="black", capsize=2, ms=4)
    goals = table["goal"].str.extract(r"([\d.]+)$")[0].astype(float)
    signs = table["goal"].str.slice(0, 2)
    for sign, mark in (("<=", "<"), (">=", ">")):
        chosen = [(goal, y) for goal, s, y in zip(goals, signs, places, strict=True) if s == sign]
        if chosen:
            label = f"goal: at {'most' if sign == '<=' else 'least'}"
            ax.plot(*zip(*chosen, strict=True), mark, mfc="none", mec="#D55E00", ms=7, label=label)
    ax.set_yticks(places, table["what"], fontsize=FONT - 1)
    ax.set_xlabel(xlabel, fontsize=FONT)
    ax.tick_params(axis="x", labelsize=FONT)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def picture(table: pd.DataFrame) -> Figure:
    """Return the figure of one machine's rows."""
    ratios = table[table["unit"] == "ratio"]
    quality = table[table["unit"] == "difference"]
    counts = [max(1, len(ratios)), max(1, len(quality))]
    figure = Figure(figsize=(9, 1.6 + 0.2 * sum(counts)), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=counts)
    draw(above, ratios, "ratio, median and range of the repeats")
    above.set_xscale("log")
    above.axvline(1, color="grey", linewidth=0.8)
    above.legend(fontsize=FONT - 1, frameon=False)
    draw(below, quality, "fast minus 1200 iterations, mean and 95 % interval over clips")
    below.axvline(0, color="grey", linewidth=0.8)
    figure.suptitle(table["machine"].iloc[0], fontsize=FONT)
    return figure


def main():
    table = pd.read_csv(TABLE).fillna({"goal": "", "unit": ""})
    for i, (_, rows) in enumerate(table.groupby("machine", sort=False)):
        name = f"benchmarks{f'_{i + 1}' if i else ''}"
        made = picture(rows)
        for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
            write_whole(OUT / f"{name}.{kind}", partial(made.savefig, format=kind, metadata=facts))
        print(OUT / f"{name}.png")


if __name__ == "__main__":
    main()
