"""Draw results/benchmarks.csv: each ratio beside its goal, and what "fast" costs in quality.

python benchmarks/figure.py
"""

from functools import partial
from pathlib import Path

import pandas as pd
from common import TABLE
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from stepkit._files import write_whole
from stepkit.viz._style import DPI, FONT
from stepkit.viz.plots import plot_intervals

OUT = Path(__file__).parents[1] / "figures"


def ratios(table: pd.DataFrame) -> Figure:
    """Draw a line per ratio: median, range of the repeats, goal."""
    figure = Figure(figsize=(9, 1.3 + 0.24 * len(table)), dpi=DPI, layout="constrained")
    ax, places = figure.subplots(), range(len(table))[::-1]
    spans = [table["value"] - table["low"], table["high"] - table["value"]]
    ax.errorbar(table["value"], places, xerr=spans, fmt="o", color="black", capsize=2, ms=4)
    goals = table["goal"].str.extract(r"([\d.]+)$")[0].astype(float)
    for sign, mark, most in (("<=", "<", "at most"), (">=", ">", "at least")):
        chosen = table["goal"].str.startswith(sign).to_numpy()
        heights = [y for y, is_chosen in zip(places, chosen, strict=True) if is_chosen]
        style = {"mfc": "none", "mec": "#D55E00", "ms": 7, "label": f"goal: {most}"}
        ax.plot(goals[chosen], heights, mark, **style)
    ax.set_yticks(places, table["what"], fontsize=FONT - 1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.axvline(1, color="grey", linewidth=0.8)
    ax.set_xlabel("ratio: median and range of the repeats", fontsize=FONT)
    ax.tick_params(axis="x", labelsize=FONT)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=FONT - 1, frameon=False)
    figure.suptitle(table["machine"].iloc[0], fontsize=FONT)
    return figure


def quality(table: pd.DataFrame) -> Figure:
    """Draw less minus 1200 iterations, a panel per dataset and network, a row per measure."""
    fifth = table["what"].str.contains("a fifth")
    table = table.assign(
        what=table["what"].str.extract(r"([^:)]+)$")[0].str.strip(),
        model=fifth.map({False: "fast: 60 iterations", True: "a fifth: 240 iterations"}),
        dataset=table["case"].str.replace(", ", "\n").str.replace("_narrow", ""),
    )
    table = table.rename(columns={"value": "mean"}).set_index(["dataset", "model", "what"])
    title = "minus 1200 iterations"
    return plot_intervals(table[["mean", "low", "high"]], xlabel=title, zero=True)


def newest_first(table: pd.DataFrame) -> list[str]:
    """Return the machines of some rows."""
    return list(table.groupby("machine")["date"].max().sort_values(ascending=False).index)


def main():
    table = pd.read_csv(TABLE).fillna({"goal": "", "unit": ""})
    table["machine"] = table["machine"].str.replace(r"\+\w+$", "", regex=True)
    pictures, ratio = {}, table[table["unit"] == "ratio"]
    for i, machine in enumerate(newest_first(ratio)):
        of_machine = ratio[ratio["machine"] == machine]
        pictures[f"benchmarks{f'_{i + 1}' if i else ''}"] = ratios(of_machine)
    compared = table[(table["benchmark"] == "fast") & (table["unit"] == "difference")]
    for machine in newest_first(compared)[:1]:
        pictures["benchmarks_fast"] = quality(compared[compared["machine"] == machine])
    for name, picture in pictures.items():
        for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
            save = partial(picture.savefig, format=kind, metadata=facts)
            write_whole(OUT / f"{name}.{kind}", save)
        print(OUT / f"{name}.png")


if __name__ == "__main__":
    main()
