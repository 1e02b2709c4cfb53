"""Intervals for every number that a table shows."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import t as student

from stepkit._checks import one_of, require

__all__ = ["HOLDS", "against_best", "bootstrap", "bootstrap_mean", "by_scene", "differences"]
__all__ += ["holm", "intervals", "mean_of_known", "verdict", "written"]

FEW_SCENES = 30  # with fewer, the percentile bootstrap covers too little
HOLDS = {w: w for w in ("level", "undecided")} | {"higher": "holds", "lower": "does not hold"}
_COLUMNS = ["mean", "low", "high", "n"]
_BLOCK = 1_000_000  # counts of draws that are held at once


def bootstrap(
    statistic: Callable, *sizes: int, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> np.ndarray:
    """Return the percentile bootstrap interval of a statistic, ``low`` and ``high``, (2, ...).

    Parameters
    ----------
    statistic : callable
        How often each of n clips (scenes, trainings) is drawn, (B, n) floats for every one of
        ``sizes``, to the statistic of these B samples, (B, ...). Samples where it is NaN are left
        out.
    *sizes : int
        n; each is drawn by itself.
    samples : int
        Bootstrap samples.
    level : float
        Coverage of the interval.
    seed : int
        Of the resampling; the global random state is not touched.

    Examples
    --------
    >>> values = np.array([1.0, 2.0, 6.0])
    >>> bootstrap(lambda counts: counts @ values / 3, 3).round(6)
    array([1., 6.])
    """
    require(type(samples) is int and samples >= 1, "samples", samples, "at least one")
    require(0 < level < 1, "level", level, "a share between 0 and 1")
    rng, block = np.random.default_rng(seed), max(1, _BLOCK // max(sizes))
    rows = [min(block, samples - start) for start in range(0, samples, block)]
    found = np.concatenate([statistic(*(_counts(rng, n, b) for n in sizes)) for b in rows])
    known = found[~np.isnan(found.reshape(samples, -1)).any(1)]
    if not len(known):
        return np.full((2, *found.shape[1:]), np.nan)
    return np.quantile(known, ((1 - level) / 2, (1 + level) / 2), axis=0)


def _counts(rng: np.random.Generator, n: int, rows: int) -> np.ndarray:
    """Draw ``n`` of ``n``, ``rows`` times; return how often each came, (rows, n)."""
    drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def bootstrap_mean(values, **options) -> pd.Series:
    """Return the mean of ``values`` (N,) and its percentile bootstrap interval.

    For a paired comparison pass the differences of the pairs.

    Parameters
    ----------
    values : array-like
        One number per clip, (N,); or one per clip and training, (N, S): then both are resampled,
        each by itself, so that the interval also holds what another seed would have given.
    **options
        ``samples``, ``level`` and ``seed`` of `bootstrap`.

    Returns
    -------
    Series
        ``mean``, ``low``, ``high``, ``n``.

    Examples
    --------
    >>> bootstrap_mean([1.0, 1.0, 1.0]).tolist()
    [1.0, 1.0, 1.0, 3.0]
    """
    values = np.asarray(values, dtype=float)
    fits = values.ndim in (1, 2) and values.size > 0
    require(fits, "values", f"shape {values.shape}", "(N,) or (N, S), not empty")
    require(bool(np.isfinite(values).all()), "values", "NaN or infinity", "finite values")

    def mean(clips, trainings=1):
        return (clips @ values * trainings).reshape(len(clips), -1).sum(1) / values.size

    low, high = bootstrap(mean, *values.shape, **options)
    return pd.Series({"mean": values.mean(), "low": low, "high": high, "n": float(len(values))})


def by_scene(values: pd.DataFrame, scenes, *, level: float = 0.95, **options) -> pd.DataFrame:
    """Return the mean over clips of each column of ``values``, and its interval over scenes.

    Clips of one scene are alike, so a bootstrap sample draws scenes, each with all of its clips,
    and takes the mean over the clips drawn. With fewer than 30 scenes the interval is Student's t
    with the standard error ``se``.

    Parameters
    ----------
    values : DataFrame
        (N, K), a row per clip; for paired comparisons, differences.
    scenes : array-like
        (N,), the scene of each clip; at least two.
    level, **options
        Of `bootstrap`.

    Returns
    -------
    DataFrame
        A row per column of ``values``: ``mean, low, high``; ``se``, the standard error
        sqrt(S/(S-1)·Σ_s e_s²)/N of the mean, where e_s is the sum over a scene's clips of value
        less mean; ``sd``, the standard deviation over clips; ``n``, ``scenes``.

    Examples
    --------
    >>> by_scene(pd.DataFrame({"gap": [1.0, 1.0, 1.0]}), ["a", "a", "b"])["high"].tolist()
    [1.0]
    """
    x, (codes, known) = values.to_numpy(float), pd.factorize(np.asarray(scenes))
    fits = len(codes) == len(x)
    require(fits, "scenes", f"{len(codes)} of them", f"one for each of {len(x)} clips")
    require(len(known) > 1, "scenes", f"{len(known)} different", "at least two")
    require(bool(np.isfinite(x).all()), "values", "NaN or infinity", "finite values")
    sums, sizes, mean = np.zeros((len(known), x.shape[1])), np.bincount(codes), x.mean(0)
    np.add.at(sums, codes, x)
    left = ((sums - mean * sizes[:, None]) ** 2).sum(0)
    se = np.sqrt(len(known) / (len(known) - 1) * left) / len(x)
    if len(known) < FEW_SCENES:
        low, high = mean + np.outer(student.interval(level, len(known) - 1), se)
    else:

        def means(counts):
            return (counts @ sums) / (counts @ sizes)[:, None]

        low, high = bootstrap(means, len(known), level=level, **options)
    found = {"mean": mean, "low": low, "high": high, "se": se, "sd": x.std(0, ddof=1)}
    return pd.DataFrame(found | {"n": len(x), "scenes": len(known)}, values.columns)


def intervals(
    scores: pd.DataFrame, value: str, by: list[str], trainings: str | None = None
) -> pd.DataFrame:
    """Return mean and interval of ``value`` for each group of rows; one row per clip goes in.

    ``trainings`` names the column, such as ``"seed"``, that tells apart several rows of a clip; see
    `bootstrap_mean`. Columns ``mean, low, high, n``, indexed by ``by``, groups in order of
    appearance. Clips whose value is NaN, as hits without boxes are, are left out; a group without
    others is a row of NaN with ``n`` = 0.
    """
    require(len(scores) > 0, "scores", "no row", "at least one; rows of NaN may stay in")

    def interval(part):
        values = part[value]
        if trainings is not None:
            values = part.pivot(index="clip", columns=trainings, values=value)
        return mean_of_known(values)

    columns = scores.columns.difference(by)
    return scores.groupby(by, sort=False)[columns].apply(interval)[_COLUMNS]


def mean_of_known(values) -> pd.Series:
    """Return `bootstrap_mean` of the clips without NaN; if there are none, NaN and ``n`` = 0."""
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values.reshape(len(values), -1)).any(1)]
    nothing = pd.Series(dict.fromkeys(_COLUMNS, np.nan) | {"n": 0.0})
    return bootstrap_mean(known) if len(known) else nothing


def differences(
    scores: pd.DataFrame,
    value: str,
    by: list[str],
    method: str = "step",
    trainings: str | None = None,
) -> pd.DataFrame:
    """Return ``method`` minus every other method, paired by clip, with intervals.

    ``scores`` has columns ``method``, ``clip``, ``value``, those of ``by``, and ``trainings`` as
    for `intervals`. Returns columns ``mean, low, high, n``, indexed by ``by`` and the other method;
    NaN as there.
    """
    one_of("method", method, scores["method"].unique())
    keys, is_it = [*by, "clip", *([trainings] if trainings else [])], scores["method"] == method
    of_method = scores[is_it].set_index(keys)[value].rename("minuend")
    pairs = scores[~is_it].merge(of_method, "left", on=keys, validate="m:1")
    pairs[value] = pairs["minuend"] - pairs[value]
    pairs = pairs.iloc[pairs.groupby(by, sort=False).ngroup().argsort(kind="stable")]
    return intervals(pairs, value, [*by, "method"], trainings)


def written(table: pd.DataFrame, digits: int = 2) -> pd.Series:
    """Write rows of ``mean, low, high`` as "0.71 [0.65, 0.77]".

    Where there is a column ``paper`` that holds a number, that follows: "0.71 [0.65, 0.77] (0.80)".
    NaN is "–".
    """
    number = f"{{:.{digits}f}}"
    forms = {False: f"{number} [{number}, {number}]"}
    forms[True] = f"{forms[False]} ({number})"
    columns = table.reindex(columns=["mean", "low", "high", "paper"])
    rows = [forms[bool(row[3] == row[3])].format(*row) for row in columns.to_numpy()]
    return pd.Series(rows, table.index, dtype=object).mask(columns["mean"].isna(), "–")


def verdict(gaps: pd.DataFrame, margin: float = 0.0) -> pd.Series:
    """Say of each difference whether it is "higher", "lower", or "undecided" (interval holds 0).

    With a ``margin``, the smallest difference of interest, it is "level" where the whole interval
    lies within it, on whichever side of 0.
    """
    words = pd.Series("undecided", gaps.index)
    words = words.mask(gaps["low"] > 0, "higher").mask(gaps["high"] < 0, "lower")
    return words.mask((gaps["low"] > -margin) & (gaps["high"] < margin), "level")


def holm(p) -> np.ndarray:
    """Return Holm's p-values of a family of tests, (N,): what each is worth among the others."""
    p = np.asarray(p, dtype=float)
    order, n = p.argsort(kind="stable"), len(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(n, 0, -1))
    return np.minimum(stepped, 1)[order.argsort()]


def against_best(gaps: pd.DataFrame) -> pd.DataFrame:
    """Keep, of each group of `differences`, the row of the strongest other method.

    It is the one that leaves the smallest mean difference; its name becomes column ``against``.
    Groups of which nothing is known (NaN) are left out.
    """
    by = [name for name in gaps.index.names if name != "method"]
    rows = gaps.dropna(subset="mean").reset_index("method").rename(columns={"method": "against"})
    return rows.sort_values("mean", kind="stable").groupby(by, sort=False).head(1).sort_index()
