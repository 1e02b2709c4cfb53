"""How far a metric of attribution can be trusted: the measure α (paper §IV-B, Eqs. 20-21)."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from stepkit._checks import require, warn
from stepkit.metrics._metric import score_columns
from stepkit.stats import bootstrap

__all__ = ["Reliability", "against_random", "agreement", "alpha_difference", "rank_correlation"]
__all__ += ["reliability", "reliability_gap", "reliability_table"]


@dataclass(frozen=True)
class Reliability:
    """The reliability of a metric on N samples.

    Attributes
    ----------
    alpha : float
        α of Eq. 20, from -1 to 1; NaN where it is undefined.
    interval : (float, float)
        Percentile bootstrap interval of α over the samples; NaN where it is undefined.
    weights : ndarray
        w_p of Eq. 21, (N,).
    ranked : ndarray
        bool (N,), samples that have a ranking: not all methods tie there. The others do not count.
    """

    alpha: float
    interval: tuple[float, float]
    weights: np.ndarray
    ranked: np.ndarray


def reliability(
    scores,
    random_scores,
    *,
    lower_is_better: bool = False,
    include_random: bool = False,
    scenes=None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Reliability:
    """Return α: do the methods rank alike on all samples, and do they beat random (Eqs. 20-21)?

    The mean of Spearman's ρ between the rankings of the methods on two samples, over all pairs
    p < q, weighted with w_p·w_q; w_p is the share of the methods that beat random on sample p.

    Parameters
    ----------
    scores : array-like
        A, (N, M): what the metric says of M ≥ 2 methods on N samples, e.g. insertion AUCs.
    random_scores : array-like
        r, (N,): what it says of a random map on the same samples.
    lower_is_better : bool
        True for deletion: to beat random is then to be smaller. Never to tie with it.
    include_random : bool
        False, as printed: ρ over the M methods. True, as released: over M + 1 columns, random among
        them; wherever the methods beat random that is agreement, so α comes out higher.
    scenes : array-like, optional
        (N,), which samples belong together, such as clips of one video: the bootstrap then draws
        scenes, each with all of its samples. None: each sample is a scene. α is the same.
    samples : int
        Bootstrap samples.
    level : float
        Coverage of the interval.
    seed : int
        Of the resampling; the global random state is not touched.

    Returns
    -------
    Reliability
        ``.alpha .interval .weights (N,) .ranked (N,)``.

    Raises
    ------
    ValueError
        Shapes that do not fit; NaN.

    Warns
    -----
    UserWarning
        α is undefined, hence NaN: no two samples have both a ranking and a method that beats random
        (as when every method is worse than random everywhere).

    Notes
    -----
    Methods that tie share their mean rank. Where all of them tie, ρ does not exist; the paper is
    silent on it, and such a sample is left out of both sums (``.ranked`` says which).

    A bootstrap sample may hold a clip twice. The clip then counts twice, but not as a pair with
    itself, whose ρ of 1 would lift the interval off α; neither do two copies of a scene pair. With
    fewer than three scenes that count there is no interval (NaN). Where rankings have nothing in
    common, α ≈ 0, it is too wide.

    References
    ----------
    Li, Wang, Li, Huang, Sato 2021, §IV-B.

    Examples
    --------
    >>> found = reliability([[1, 2, 3], [1, 3, 2], [2, 3, 4]], [0, 0, 0])
    >>> round(found.alpha, 3)  # ρ = 0.5, 1, 0.5
    0.667
    """
    A, r = _numbers("scores", scores), _numbers("random_scores", random_scores)
    fits = A.ndim == 2 and A.shape[0] >= 1 and A.shape[1] >= 2
    require(fits, "scores", f"shape {A.shape}", "(N, M), N ≥ 1 samples and M ≥ 2 methods")
    require(r.shape == A.shape[:1], "random_scores", f"shape {r.shape}", f"({len(A)},)")
    found = _Alpha(A, r, scenes, lower_is_better, include_random)
    counting = np.count_nonzero(found.wins)
    if counting < 2:
        said = f"of {len(A)} samples {counting} have a ranking and a method that beats random"
        warn(f"reliability: {said}; α is undefined (NaN)")
    interval = bootstrap(found, found.n, samples=samples, level=level, seed=seed)
    interval = tuple(interval.tolist()) if np.count_nonzero(found.total) > 2 else (math.nan,) * 2
    return Reliability(found.of_all, interval, found.beats.mean(1), found.ranked)


def reliability_table(scores: pd.DataFrame, by: list[str], **options) -> pd.DataFrame:
    """Return α of each metric, for each group of a table of scores (Fig. 3).

    Parameters
    ----------
    scores : DataFrame
        A row per clip and method: columns ``clip``, ``method``, those of ``by``, and those of
        metrics (`Metric.columns`), such as ``insertion`` and ``deletion``. The method ``"random"``
        is what the others have to beat.
    by : list of str
        Columns, such as dataset, model and unit.
    **options
        Of `reliability`.

    Returns
    -------
    DataFrame
        ``mean`` (α), ``low``, ``high``, indexed by ``by`` and ``metric``.
    """
    rows = {}
    for group, part in scores.groupby(by, sort=False):
        for metric, side in _sides(part).items():
            found = reliability(**side, **options)
            rows[(*group, metric)] = (found.alpha, *found.interval)
    return pd.DataFrame(rows, ["mean", "low", "high"]).T.rename_axis([*by, "metric"])


def reliability_gap(scores: pd.DataFrame, by: list[str], **options) -> pd.DataFrame:
    """Return α of insertion minus α of deletion, on the same bootstrap samples of the clips.

    Arguments as for `reliability_table`. Columns ``mean, low, high``, a row per group.
    """
    rows = {}
    for group, part in scores.groupby(by, sort=False):
        sides = _sides(part)
        rows[group] = alpha_difference(sides["insertion"], sides["deletion"], **options)
    return pd.DataFrame(rows).T.rename_axis(by)


def _sides(part: pd.DataFrame) -> dict[str, dict]:
    """Return what `reliability` takes, for each metric of a group of scores."""
    wide = part.pivot(index="clip", columns="method")
    columns = score_columns(part).items()
    return {name: against_random(wide[name], lower_is_better=lower) for name, lower in columns}


def against_random(scores: pd.DataFrame, **options) -> dict:
    """Return what `reliability` takes, of scores (N, M + 1) with a column ``"random"``."""
    return {"scores": scores.drop(columns="random"), "random_scores": scores["random"]} | options


def alpha_difference(
    one: dict, other: dict, *, scenes=None, samples: int = 1000, seed: int = 0
) -> pd.Series:
    """Return α of one set of scores minus α of another, on the same bootstrap samples of the clips.

    ``one`` and ``other`` hold ``scores``, ``random_scores``, and the options ``lower_is_better``
    and ``include_random`` of `reliability`, which also has ``scenes``. Returns ``mean, low, high``;
    NaN where α is undefined.
    """
    first, second = (_Alpha(**side, scenes=scenes) for side in (one, other))
    given = {"samples": samples, "seed": seed}
    low, high = bootstrap(lambda counts: first(counts) - second(counts), first.n, **given)
    return pd.Series({"mean": first.of_all - second.of_all, "low": low, "high": high})


def agreement(scores: pd.DataFrame, truth: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Return how far each metric ranks the methods of a clip as the known evidence does.

    Spearman's ρ, clip by clip, between a metric's scores of the methods (deletion negated) and
    ``value`` of ``truth``, such as the share of a map's relevance inside the evidence. Not in the
    paper, where no evidence is known. Random maps lift ρ: they are apart from the others by both.

    Parameters
    ----------
    scores : DataFrame
        As for `reliability_table`.
    truth : DataFrame
        A row per clip and method, with the columns of ``by`` that it has, and ``value``.
    by : list of str
        Columns of ``scores``.
    value : str
        A column of ``truth``.

    Returns
    -------
    DataFrame
        A row per group, metric and clip: ``by``, ``metric``, ``clip``, ``rho`` over the methods,
        ``rho_with_random`` over random maps too; NaN where all of them tie.
    """
    keys = [c for c in by if c in truth]
    both = scores.merge(truth[[*keys, "clip", "method", value]], "left", [*keys, "clip", "method"])
    rows = []
    for (*group, clip), part in both.groupby([*by, "clip"], sort=False):
        for metric, lower in score_columns(scores).items():
            columns = np.stack([part[metric] * (-1 if lower else 1), part[value]])[:, None]
            methods = columns[..., part["method"].to_numpy() != "random"]
            rhos = [rank_correlation(*given)[0] for given in (methods, columns)]
            rows.append([*group, metric, clip, *rhos])
    return pd.DataFrame(rows, columns=[*by, "metric", "clip", "rho", "rho_with_random"])


def rank_correlation(scores, others) -> np.ndarray:
    """Return Spearman's ρ of each row of ``scores`` (N, M) with the same row of ``others``, (N,).

    NaN where a row has no ranking, all of its values being equal.
    """
    (z, ranked), (y, also) = (_standard_ranks(np.asarray(a, float)) for a in (scores, others))
    return np.where(ranked & also, (z * y).sum(1), math.nan)


def _numbers(argument: str, given) -> np.ndarray:
    given = given.detach().cpu() if isinstance(given, Tensor) else given
    try:
        values = np.asarray(given, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument}: got {type(given).__name__}, expected numbers") from error
    require(bool(np.isfinite(values).all()), argument, "NaN or infinity", "finite values")
    return values


def _standard_ranks(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return z (N, M) with z_p · z_q = ρ of samples p and q, and which samples have a ranking.

    Spearman's ρ is Pearson's of the mean ranks. Without a ranking z_p = 0.
    """
    ranks = pd.DataFrame(scores).rank(axis=1).to_numpy(copy=True)
    ranks -= ranks.mean(1, keepdims=True)  # whole or half numbers less (M+1)/2: exact
    ranked = ranks.any(1)
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return ranks / np.where(ranked[:, None], length, 1), ranked


class _Alpha:
    """Eq. 20 as a function of how often each scene occurs.

    With w_p times M, as M cancels and whole numbers add exactly. As z_p · z_p = 1, the sum
    2 Σ_{p<q} w_p w_q ρ_pq is a square less its diagonal, |Σ w_p z_p|² − Σ w_p².
    """

    def __init__(self, scores, random_scores, scenes, lower_is_better=False, include_random=False):
        A, r = np.asarray(scores, float), np.asarray(random_scores, float)
        self.beats = (r[:, None] - A if lower_is_better else A - r[:, None]) > 0
        z, self.ranked = _standard_ranks(np.column_stack([A, r]) if include_random else A)
        self.wins = wins = self.beats.sum(1) * self.ranked.astype(float)
        codes = np.asarray(range(len(wins)) if scenes is None else scenes)
        require(codes.shape == wins.shape, "scenes", f"shape {codes.shape}", f"({len(wins)},)")
        codes, known = pd.factorize(codes)
        self.n, self.total = len(known), np.bincount(codes, wins)
        self.vectors = np.zeros((self.n, z.shape[1]))
        np.add.at(self.vectors, codes, wins[:, None] * z)
        several, square = np.bincount(codes) > 1, np.bincount(codes, wins**2)
        self.alone = np.where(several, (self.vectors**2).sum(1), square)  # |Σ w_p z_p|² of a scene
        self.below, self.above = self.total**2 - square, self.alone - square  # its own pairs, twice
        self.of_all = float(self(np.ones((1, self.n)))[0])

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Return α (B,) of scenes that occur ``counts`` (B, S) times each; NaN without a pair.

        The pairs of two scenes count as often as both occur, those inside a scene once for each of
        its copies. Pairs of two copies, which hold each sample with itself, do not count.
        """
        twice = counts**2
        pairs = (counts @ self.total) ** 2 - twice @ self.total**2 + counts @ self.below
        above = ((counts @ self.vectors) ** 2).sum(1) - twice @ self.alone + counts @ self.above
        return np.divide(above, pairs, out=np.full(len(counts), math.nan), where=pairs > 0)
