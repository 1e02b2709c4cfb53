"""What the authors' scores decide: one table per question, computed by the library's own functions.

Every table takes the scores by cell, as `stepkit.published.scores.read` returns them. Its rows say
``dataset, model, unit, metric``; ``mean, low, high``, a value and its 95 % interval over scenes;
``videos, scenes``, how many; ``runs``, the authors' maps that it was computed from, as their logs
name them; ``code``, whose scores those are. ``verdict`` is of the claim that STEP is better than
``against``; a difference within `MARGIN` is level.
"""

import itertools
import math

import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from stepkit import published, stats
from stepkit.metrics import alpha_difference, reliability
from stepkit.published import MARGIN, PRINTED, STRONG, UNPRINTED
from tools.authors.scores import COMMIT, LENGTHS, RANKED, RUNS, Cell, classes, scenes

PAIRS = [  # whose differences are sized: metric, methods
    ("insertion", [*PRINTED, *UNPRINTED, "step"]),
    ("insertion", ["step", *LENGTHS]),
    ("deletion", [*RANKED, "step_t0"]),
]
SAMPLES = 10_000  # of the bootstrap over scenes
POWER = norm.ppf(0.975) + norm.ppf(0.8)  # a two-sided test at 5 % that finds it in 80 %
CODE = f"authors' logs before {COMMIT}"
_RUN = {method: run for run, method in RUNS.items()}

Scores = dict[Cell, pd.DataFrame]


def means(cells: Scores) -> pd.DataFrame:
    """Return the mean score of every ``method``, ``sd`` over videos, and what the ``paper`` prints.

    That is Table V's; for values of T_K, Table IV's. ``agrees``: it is the mean to less than a unit
    of its last digit, rounded or cut off.
    """
    tables = []
    for cell, table in cells.items():
        found, paper = _summary(cell, table), _printed(cell)
        found["paper"] = [paper.get(method, (math.nan, 0))[0] for method in table]
        unit = [10 ** -paper.get(method, (0, 0))[1] for method in table]
        near = (found["mean"] - found["paper"]).abs() < unit
        found["agrees"] = near.astype(object).where(found["paper"].notna(), "")
        tables.append(_named(cell, found, "method", [_RUN[method] for method in table]))
    return _bound(tables)


def differences(cells: Scores) -> pd.DataFrame:
    """Return ``method``, STEP, minus each other, ``against``, video by video.

    ``sd`` is over videos; ``p`` is of no difference (Student's t, standard error over scenes);
    ``paper`` the difference of the printed numbers. Deletion was run for STEP without L_K only.
    """
    tables = []
    for cell, table in cells.items():
        others = [method for method in table if method != cell.step]
        gaps = pd.DataFrame({method: table[cell.step] - table[method] for method in others})
        found, paper = _summary(cell, gaps), _printed(cell)
        found["p"] = 2 * student.sf((found["mean"] / found["se"]).abs(), found["scenes"] - 1)
        nothing = math.nan, 0
        step = paper.get(cell.step, nothing)[0]
        found["paper"] = [step - paper.get(method, nothing)[0] for method in others]
        found["verdict"] = _verdict(cell, found)
        found.insert(0, "method", cell.step)
        runs = [f"{_RUN[cell.step]} - {_RUN[method]}" for method in others]
        tables.append(_named(cell, found, "against", runs))
    return _bound(tables)


def alphas(cells: Scores) -> pd.DataFrame:
    """Return α of the paper's five methods (Eqs. 20-21) in both ``form``\\ s, and gaps between α.

    "as coded" counts random among the methods. ``low_videos, high_videos`` are the interval over
    videos; ``beat_random`` is the mean of w_p. A ``metric`` or ``unit`` with a minus is a gap, on
    the same bootstrap samples.
    """
    rows = []
    for cell, table in cells.items():
        of_scene = scenes(cell.dataset, table.index)
        known = {"videos": len(table), "scenes": len(set(of_scene))}
        known["runs"] = ", ".join(_RUN[method] for method in [*RANKED, "random"])
        for form, coded in (("as printed", False), ("as coded", True)):
            side = _side(cell, table) | {"include_random": coded}
            found = reliability(**side, scenes=of_scene, samples=SAMPLES)
            (low, high), videos = found.interval, reliability(**side).interval
            row = {"form": form, "mean": found.alpha, "low": low, "high": high}
            row |= {"low_videos": videos[0], "high_videos": videos[1]}
            row |= {"beat_random": found.weights.mean()}
            rows.append(cell._asdict() | row | known)
        for name, other in _compared(cell, cells):
            sides = _side(cell, table), _side(other, cells[other])
            gap = alpha_difference(*sides, scenes=of_scene, samples=SAMPLES)
            rows.append(cell._asdict() | name | {"form": "as printed"} | gap.to_dict() | known)
    return _bound([pd.DataFrame(rows)])


def ranks(cells: Scores) -> pd.DataFrame:
    """Return the mean rank on a video, 1 the best, of each ``method`` of Table V among the ten.

    Of deletion, among the six that were run; ``among`` says.
    """
    tables = []
    for cell, table in cells.items():
        ranked = [method for method in [*PRINTED, cell.step] if method in table]
        places = table[ranked].rank(axis=1, ascending=cell.lower_is_better)
        found = _summary(cell, places).assign(among=len(ranked))
        tables.append(_named(cell, found, "method", [_RUN[method] for method in ranked]))
    return _bound(tables)


def by_class(cells: Scores) -> pd.DataFrame:
    """Return STEP minus its strong rivals, and minus itself without L_K, by ``class`` of UCF101-24.

    A class has seven scenes: intervals are Student's t, see `stepkit.stats.by_scene`.
    """
    tables = []
    for cell, table in cells.items():
        of_class = classes(cell.dataset, table.index)
        for name, part in table.groupby(of_class) if of_class and not cell.lower_is_better else ():
            others = [m for m in [*STRONG, "score_cam", "step_t0"] if m in part]
            found = _summary(cell, pd.DataFrame({m: part["step"] - part[m] for m in others}))
            found["verdict"] = _verdict(cell, found)
            found.insert(0, "class", name)
            runs = [f"{_RUN['step']} - {_RUN[method]}" for method in others]
            tables.append(_named(cell, found, "against", runs))
    return _bound(tables)


def power(cells: Scores) -> pd.DataFrame:
    """Return, for each pair of methods, how many scenes tell a difference: what to plan with.

    Medians over the ``cells`` that have both: ``sd`` of the difference over videos; ``scene_sd``,
    its standard error over scenes times the root of their number, with the least and the largest;
    ``told_by_60``, the difference that 60 scenes find with a power of 80 % (two-sided, 5 %);
    ``for_0.02``, ``for_0.05`` and ``for_0.1``, the scenes that find a difference so large.
    """
    rows = []
    for metric, methods in PAIRS:
        pairs = list(itertools.combinations(methods, 2))
        some = [c for c, t in cells.items() if c.metric == metric and len({*methods} & {*t}) > 1]
        found = [_spread(cell, cells[cell], pairs) for cell in some]
        each = pd.concat(found).groupby(level=(0, 1), sort=False) if found else ()
        for (one, other), part in each:
            rows.append({"metric": metric, "one": one, "other": other} | _sizes(part))
    return _bound([pd.DataFrame(rows)])


TABLES = {
    "means": means,
    "differences": differences,
    "reliability": alphas,
    "ranks": ranks,
    "classes": by_class,
    "power": power,
}


def _summary(cell: Cell, values: pd.DataFrame, **options) -> pd.DataFrame:
    found = stats.by_scene(values, scenes(cell.dataset, values.index), **options)
    return found.rename(columns={"n": "videos"})


def _spread(cell: Cell, table: pd.DataFrame, pairs: list) -> pd.DataFrame:
    gaps = {(a, b): table[a] - table[b] for a, b in pairs if a in table and b in table}
    return _summary(cell, pd.DataFrame(gaps), samples=1)  # no interval is asked for


def _sizes(found: pd.DataFrame) -> dict:
    per_scene = found["se"] * found["scenes"] ** 0.5
    middle = per_scene.median()
    row = {"cells": len(found), "sd": found["sd"].median(), "scene_sd": middle}
    row |= {"scene_sd_least": per_scene.min(), "scene_sd_largest": per_scene.max()}
    row["told_by_60"] = POWER * middle / 60**0.5
    few = norm.ppf(0.975) ** 2 / 2  # what Student's t asks for beyond the normal's count
    sizes = {d: math.ceil((POWER * middle / d) ** 2 + few) for d in (0.02, 0.05, 0.1)}
    return row | {f"for_{d}": size for d, size in sizes.items()}


def _named(cell: Cell, found: pd.DataFrame, level: str, runs: list[str]) -> pd.DataFrame:
    """Put the cell's names before a summary, and behind it the runs that it was made of."""
    found = found.drop(columns="se").rename_axis(level).reset_index()
    for place, (key, value) in enumerate(cell._asdict().items()):
        found.insert(place, key, value)
    return found.assign(runs=runs)


def _bound(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True).round(4).assign(code=CODE)


def _verdict(cell: Cell, gaps: pd.DataFrame) -> pd.Series:
    """Say of each difference whether STEP is better; of deletion that is lower."""
    if cell.lower_is_better:
        gaps = pd.DataFrame({"low": -gaps["high"], "high": -gaps["low"]})
    return stats.verdict(gaps, MARGIN).map(stats.HOLDS)


def _side(cell: Cell, table: pd.DataFrame) -> dict:
    sides = {"scores": table[RANKED], "random_scores": table["random"]}
    return sides | {"lower_is_better": cell.lower_is_better}


def _compared(cell: Cell, cells: Scores) -> list[tuple[dict, Cell]]:
    """Return the cells whose α is taken from that of ``cell``, each with what its row says."""
    pairs = []
    if cell.metric == "insertion":
        pairs.append(({"metric": "insertion - deletion"}, cell._replace(metric="deletion")))
    if cell.unit == "patch":
        pairs.append(({"unit": "patch - superpixel"}, cell._replace(unit="superpixel")))
    return [(name, other) for name, other in pairs if other in cells]


def _printed(cell: Cell) -> dict[str, tuple[float, int]]:
    """Return the printed number of each method, and its digits; for STEP those of Table IV."""
    if cell.lower_is_better:
        return {}
    where = {"dataset": cell.dataset, "model": cell.model.partition("_")[0], "unit": cell.unit}
    tables = {name: published.table(name) for name in ("insertion", "kernel_length")}
    for key, value in where.items():
        tables = {name: table[table[key] == value] for name, table in tables.items()}
    found = {row.method: (row.insertion_auc, 2) for row in tables["insertion"].itertuples()}
    for row in tables["kernel_length"].itertuples():
        name = "step" if row.kernel_length == 8 else f"step_t{row.kernel_length}"
        found[name] = row.insertion_auc, 3
    return found
