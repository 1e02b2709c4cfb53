"""What a choice changes: two ways to make a map, or to score it, on the same clips (notebook 07).

Every change is paired by clip and has its bootstrap interval.
"""

from collections.abc import Mapping

import pandas as pd

from stepkit import metrics, stats
from stepkit.study import Study

__all__ = ["of_maps", "of_scores", "summary"]


def of_maps(study: Study, variants: Mapping[str, tuple], *, name: str = "variants") -> pd.DataFrame:
    """Return what each variant of a method changes, on the study's first model and dataset.

    Parameters
    ----------
    study : Study
        Its methods, ``"random"`` among them, and its options of the metric ``"auc"``.
    variants : dict of str to (str, dict)
        By name a method of the study and other options: it is compared with that method, and takes
        its place in α.
    name : str
        Of the tables that are kept: ``auc_<name>``, ``located_<name>``.

    Returns
    -------
    DataFrame
        Indexed by ``variant`` and ``change``, with ``mean, low, high``. The changes:
        ``map``: Spearman's ρ of the two maps of a clip; ``insertion``: variant minus method, AUC in
        patches; ``hit``: variant minus method, share of frames; ``α``: of insertion, with the
        variant in the method's place, minus without.
    """
    everything, found = study.methods | variants, {}
    where = {"models": [study.first("models")], "datasets": [study.first("datasets")]}
    for metric, column in (("auc", "insertion"), ("located", "hit")):
        scores = study.score(metric, methods=everything, name=f"{metric}_{name}", **where)
        found[column] = scores.pivot(index="clip", columns="method", values=column)
    rows, auc = {}, found["insertion"]
    usual = auc[[*study.methods]]
    for variant, (base, _) in variants.items():
        pair = {variant: everything[variant]}, base
        maps = [study.maps(each)["maps"].flatten(1).double().numpy() for each in pair]
        sides = [
            metrics.against_random(usual.assign(**{base: auc[each]})) for each in (variant, base)
        ]
        rows[variant, "map"] = stats.mean_of_known(metrics.rank_correlation(*maps))
        for column, table in found.items():
            rows[variant, column] = stats.mean_of_known(table[variant] - table[base])
        rows[variant, "α"] = metrics.alpha_difference(*sides)
    return _changes(rows)


def of_scores(study: Study, variants: Mapping[str, tuple[dict, dict]]) -> pd.DataFrame:
    """Return what each variant of a metric changes, on the study's first model and dataset.

    Parameters
    ----------
    study : Study
        As for `of_maps`.
    variants : dict of str to (dict, dict)
        By name two sets of options that are compared, the second with the first: those of
        `stepkit.insertion`, and ``include_random`` of α.

    Returns
    -------
    DataFrame
        Indexed by ``variant`` and ``change``, with ``mean, low, high``. The changes: ``insertion``:
        second minus first, mean AUC over the methods; ``order``: Spearman's ρ of the methods' AUCs
        on a clip; ``α``: of insertion, second minus first.
    """
    rows = {}
    for variant, both in variants.items():
        sides, tables = [], []
        for given in both:
            options, table = dict(given), {}
            random = {"include_random": options.pop("include_random", False)}
            for method in study.methods:
                table[method] = study.measure("auc", method, **options)["insertion"].numpy()
            tables.append(pd.DataFrame(table))
            sides.append(metrics.against_random(tables[-1], **random))
        first, second = tables
        rho = metrics.rank_correlation(first.to_numpy(), second.to_numpy())
        rows[variant, "insertion"] = stats.bootstrap_mean((second - first).mean(axis=1))
        rows[variant, "order"] = stats.mean_of_known(rho)
        rows[variant, "α"] = metrics.alpha_difference(*sides[::-1])
    return _changes(rows)


def summary(changes: pd.DataFrame) -> pd.DataFrame:
    """Write the changes of each variant in columns, and in words which exceed their intervals."""
    words = stats.verdict(changes).drop(["map", "order"], level="change", errors="ignore")
    words = words[words != "undecided"].reset_index("change", name="is")
    said = (words["change"] + " " + words["is"]).groupby(level="variant").agg(", ".join)
    table = stats.written(changes).unstack("change", sort=False)
    return table.assign(verdict=said.reindex(table.index).fillna("no difference shown"))


def _changes(rows: dict) -> pd.DataFrame:
    return pd.DataFrame(rows).T.rename_axis(["variant", "change"])[["mean", "low", "high"]]
