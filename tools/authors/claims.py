"""The paper's claims beside what its authors' own scores say: the first part of the claims page.

The words stand in ``claims.md`` and ``finding.md``; every number is looked up here, in
the tracked tables.
"""

from pathlib import Path

import jinja2
import pandas as pd

from stepkit import stats
from stepkit.attribution import methods
from stepkit.published import LABELS, MARGIN, PRINTED, UNPRINTED, authors
from tools.authors.scores import UNITS

__all__ = ["finding", "page"]

COLUMN = ["dataset", "model", "unit"]
UCF, EPIC, SOMETHING = "ucf101-24", "epic-object", "something-v2"
R2P1D, R50L = "r2plus1d_18", "r50l"
TEMPLATES = Path(__file__).parent


def page() -> str:
    """Return the page's first part, Markdown."""
    return _filled("claims.md")


def finding() -> list[str]:
    """Return what the scores decide, in three sentences: those of the README."""
    return _filled("finding.md").splitlines()


def _filled(template: str) -> str:
    alphas = _alphas()
    insertion = alphas[(alphas["metric"] == "insertion") & alphas["unit"].isin(UNITS)]
    recurrent = insertion[insertion["model"] == R50L]["mean"]
    helps = gaps_to("step_t0")
    helps = helps[helps["low"] > 0]["mean"]
    known = {"MARGIN": MARGIN, "UCF": UCF, "EPIC": EPIC, "SOMETHING": SOMETHING}
    known |= {"R2P1D": R2P1D, "R50L": R50L}
    known |= {f.__name__: f for f in (above, alpha, alphas_of, count, gap, gaps_to, means_of)}
    known |= {f.__name__: f for f in (networks_apart, span)}
    known |= {"units": _units(), "leads": _leads(), "not_printed": _not_printed()}
    known |= {"beat_random": _ranges(alphas, "metric", "beat_random", 2), "ranks": _ranks()}
    known |= {"recurrent_alpha": _range(recurrent, 3), "helps_by": _range(helps, 3)}
    made = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return made.from_string((TEMPLATES / template).read_text("utf-8")).render(known)


# What the templates call


def alpha(signed: bool = False, what: str = "interval", **where) -> str:
    """Write an α, or a difference of two, with its interval."""
    row = _at(_alphas(), **where)
    if what == "mean":
        return f"{row['mean']:.3f}"
    return _signed(row) if signed else _number(row)


def alphas_of(model: str) -> str:
    """Write α of insertion by patches on each dataset."""
    some = _alphas()
    some = some[(some["model"] == model) & (some["unit"] == "patch")]
    some = some[some["metric"] == "insertion"].set_index("dataset")
    return ", ".join(f"{LABELS[dataset]} {_number(row)}" for dataset, row in some.iterrows())


def gap(against: str, dataset: str, model: str, unit: str = "patch") -> str:
    """Write STEP minus another method by insertion, with its interval."""
    return _signed(_at(_gaps(), against=against, dataset=dataset, model=model, unit=unit))


def gaps_to(against: str, model: str = "") -> pd.DataFrame:
    """Return STEP minus another method by insertion, a row per column of Table V."""
    gaps = _gaps()
    gaps = gaps[gaps["against"] == against]
    return gaps[gaps["model"] == model] if model else gaps


def above(rows: pd.DataFrame) -> int:
    """Count the intervals above zero."""
    return int((rows["low"] > 0).sum())


def count(rows: pd.DataFrame, verdict: str) -> int:
    """Count the rows with a verdict."""
    return int((rows["verdict"] == verdict).sum())


def span(rows: pd.DataFrame) -> str:
    """Write the least and the largest mean."""
    low, high = rows["mean"].min().round(3) + 0.0, rows["mean"].max().round(3) + 0.0  # no -0.000
    return f"{low:+.3f} to {high:+.3f}"


def means_of(dataset: str, model: str, unit: str) -> dict[str, str]:
    """Write the mean AUCs of a column; ``third``: of the best printed but Grad-CAM and XRAI."""
    means = authors("means")
    known = means.set_index(COLUMN).loc[(dataset, model, unit)].set_index("method")
    known = known[known["metric"] == "insertion"]
    third = known.loc[PRINTED, "mean"].drop(["grad_cam", "xrai"]).idxmax()
    words = {method: _number(row) for method, row in known.iterrows()}
    return words | {"third": f"{_label(third)}, {words[third]}"}


def networks_apart() -> int:
    """Count the columns in which L_K helps R(2+1)D more than R50L, the intervals apart."""
    sides = [gaps_to("step_t0", model).sort_values(["dataset", "unit"]) for model in (R2P1D, R50L)]
    return int((sides[0]["low"].to_numpy() > sides[1]["high"].to_numpy()).sum())


# What they look up


def _gaps() -> pd.DataFrame:
    gaps = authors("differences")
    return gaps[gaps["metric"] == "insertion"]


def _alphas() -> pd.DataFrame:
    alphas = authors("reliability")
    return alphas[alphas["form"] == "as printed"]


def _units() -> dict:
    """Tell by which unit insertion is the more reliable, in each pair of dataset and network."""
    apart = _alphas()
    apart = apart[apart["unit"] == "patch - superpixel"]
    rows, deletion = (apart[apart["metric"] == name] for name in ("insertion", "deletion"))
    words = stats.verdict(rows, MARGIN)
    higher = rows[words == "higher"]
    pairs = "; ".join(f"{_pair(row)} {_signed(row)}" for _, row in higher.iterrows())
    told = {"rows": rows, "words": words.tolist(), "higher": pairs}
    return told | {"deletion": stats.verdict(deletion).iloc[0]}


def _leads() -> dict:
    """Tell in which columns STEP is ahead of all printed methods, and where one is ahead of it."""
    printed = _gaps()
    printed = printed[printed["against"].isin(PRINTED)]
    worst = printed.loc[printed.groupby(COLUMN, sort=False)["low"].idxmin()]
    ahead = worst[worst["low"] > 0]
    p = printed["p"].where(printed["mean"] > 0, 1.0)  # that it is not ahead of all nine
    corrected = stats.holm(p.groupby([printed[key] for key in COLUMN], sort=False).max())
    behind = printed[printed["high"] < 0]
    behind = behind.loc[behind.groupby(COLUMN, sort=False)["mean"].idxmin()]
    trailing = [
        f"{_column(row)} {_signed(row, 'paper')} to {_label(row['against'])}"
        for _, row in behind.iterrows()
    ]
    words = {}
    for model, part in printed.groupby("model", sort=False):
        counts = part["verdict"].value_counts().items()
        words[LABELS[model]] = ", ".join(f"{word} {number}" for word, number in counts)
    return {
        "ahead": len(ahead),
        "columns": "; ".join(_column(row) for _, row in ahead.iterrows()),
        "corrected": int((corrected < 0.05).sum()),
        "behind": len(behind),
        "trailing": "; ".join(trailing),
        "by_network": "; ".join(f"{model}: {told}" for model, told in words.items()),
    }


def _not_printed() -> str:
    """Return the table of the methods that were run and that no table of the paper has."""
    means = authors("means")
    means = means[(means["metric"] == "insertion") & ~means["method"].str.startswith("step_")]
    head = ["column", *(t for m in UNPRINTED for t in (_label(m), f"STEP minus {_label(m)}"))]
    rows = [[*head, "highest mean"], ["---"] * (len(head) + 1)]
    for key, part in means.groupby(COLUMN, sort=False):
        known, where = part.set_index("method")["mean"], dict(zip(COLUMN, key, strict=True))
        best, row = known.idxmax(), [_column(where)]
        for method in UNPRINTED:
            if method not in known:
                row += ["not run", ""]
                continue
            bold = "**" if method == best else ""
            row += [f"{bold}{known[method]:.3f}{bold}", gap(method, **where)]
        rows.append([*row, f"{_label(best)} {known[best]:.3f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _ranks() -> dict[str, str]:
    ranks = authors("ranks")
    return _ranges(ranks[ranks["method"] == "step"], "model", "mean", 1)


def _ranges(table: pd.DataFrame, by: str, column: str, digits: int) -> dict[str, str]:
    return {name: _range(values, digits) for name, values in table.groupby(by)[column]}


def _range(values: pd.Series, digits: int) -> str:
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}"


def _at(table: pd.DataFrame, **where) -> pd.Series:
    for key, value in where.items():
        table = table[table[key] == value]
    return table.iloc[0]


def _number(row, *more: str) -> str:
    return stats.written(pd.DataFrame([row])[["mean", "low", "high", *more]], 3).iloc[0]


def _signed(row, *more: str) -> str:
    return ("+" if row["mean"] > 0 else "") + _number(row, *more)


def _label(method: str) -> str:
    return methods()["label"][method]


def _pair(row) -> str:
    return f"{LABELS[row['dataset']]}, {LABELS[row['model']]}"


def _column(row) -> str:
    return f"{_pair(row)}, {row['unit']}"
