"""What a choice changes: two ways to make a map, or to score it, on the same clips (notebook 07).

Every change is paired by clip and has its bootstrap interval.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from stepkit import metrics, stats
from stepkit.study import Experiment


def of_maps(
    run: Experiment,
    methods: Mapping[str, dict],
    variants: Mapping[str, dict],
    model: str,
    dataset: str,
    *,
    steps: int,
    name: str = "variants",
) -> pd.DataFrame:
    """Return what each variant of a method changes.

    Parameters
    ----------
    run : Experiment
    methods : dict of str to dict
        The methods that α ranks, with their options; ``"random"`` among them.
    variants : dict of str to dict
        ``"step@cylinder"`` with its options is compared with ``methods["step"]``, and takes its
        place in α.
    model, dataset : str
    steps : int
        L of the curves.
    name : str
        Of the tables in the run's ``scores/``: ``auc_<name>.csv``, ``located_<name>.csv``.

    Returns
    -------
    DataFrame
        Indexed by ``variant`` and ``change``, with ``mean, low, high``. The changes:
        ``map``: Spearman's ρ of the two maps of a clip; ``insertion``: variant minus method, AUC in
        patches; ``hit``: variant minus method, share of frames; ``α``: of insertion, with the
        variant in the method's place, minus without.
    """
    everything = {**methods, **variants}
    scores = run.auc(everything, [model], [dataset], steps=steps, name=f"auc_{name}")
    located = run.located(everything, [model], [dataset], name=f"located_{name}")
    auc = scores.pivot(index="clip", columns="method", values="insertion")
    hit = located.pivot(index="clip", columns="method", values="hit")
    rows = {}
    for variant, options in variants.items():
        base = variant.partition("@")[0]
        others = [method for method in methods if method not in (base, "random")]
        maps = [
            run.explain(which, model, dataset, **kw)["maps"]
            for which, kw in ((variant, options), (base, methods[base]))
        ]
        sides = [
            {"scores": auc[[which, *others]], "random_scores": auc["random"]}
            for which in (variant, base)
        ]
        rows[variant, "map"] = stats.mean_of_known(map_correlation(*maps))
        rows[variant, "insertion"] = stats.bootstrap_mean(auc[variant] - auc[base])
        rows[variant, "hit"] = stats.mean_of_known(hit[variant] - hit[base])
        rows[variant, "α"] = metrics.alpha_difference(*sides)
    return _table(rows, "variant")


def of_scores(
    run: Experiment,
    methods: Mapping[str, dict],
    variants: Mapping[str, Sequence[dict]],
    model: str,
    dataset: str,
    *,
    steps: int,
) -> pd.DataFrame:
    """Return what each variant of a metric changes.

    Parameters
    ----------
    run, methods, model, dataset, steps
        As for `of_maps`.
    variants : dict of str to (dict, dict)
        By name two sets of options that are compared, the second with the first: those of
        `Experiment.curves`, ``rule`` of `stepkit.metrics.auc`, ``include_random`` of α.

    Returns
    -------
    DataFrame
        Indexed by ``variant`` and ``change``, with ``mean, low, high``. The changes: ``insertion``:
        second minus first, mean AUC over the methods; ``order``: Spearman's ρ of the methods' AUCs
        on a clip; ``α``: of insertion, second minus first.
    """
    rows = {}
    for variant, options in variants.items():
        tables, sides = [], []
        for side in options:
            rest = dict(side)
            rule, random = rest.pop("rule", "mean"), rest.pop("include_random", False)
            curves = run.curves(methods, model, dataset, **{"steps": steps, **rest})
            found = {m: metrics.auc(kinds["insertion"], rule) for m, kinds in curves.items()}
            table = pd.DataFrame({method: values.numpy() for method, values in found.items()})
            tables.append(table)
            sides.append({"random_scores": table["random"], "include_random": random})
            sides[-1]["scores"] = table.drop(columns="random")
        first, second = tables
        rho = metrics.rank_correlation(first.to_numpy(), second.to_numpy())
        rows[variant, "insertion"] = stats.bootstrap_mean(second.mean(axis=1) - first.mean(axis=1))
        rows[variant, "order"] = stats.mean_of_known(rho)
        rows[variant, "α"] = metrics.alpha_difference(*sides[::-1])
    return _table(rows, "variant")


def map_correlation(maps: Tensor, others: Tensor) -> np.ndarray:
    """Return Spearman's ρ of two maps of each clip, (N, T, H, W) twice -> (N,)."""
    return metrics.rank_correlation(
        *(given.flatten(1).double().numpy() for given in (maps, others))
    )


def summary(changes: pd.DataFrame) -> pd.DataFrame:
    """Write the changes of each variant in columns, and in words which exceed their intervals."""
    columns = list(dict.fromkeys(changes.index.get_level_values("change")))
    variants = list(dict.fromkeys(changes.index.get_level_values("variant")))
    words = stats.verdict(changes).drop(["map", "order"], level="change", errors="ignore")
    words = words[words != "undecided"].reset_index("change", name="is")
    said = (words["change"] + " " + words["is"]).groupby(level="variant").agg(", ".join)
    table = stats.written(changes).unstack("change").reindex(variants)[columns]
    table["verdict"] = said.reindex(variants).fillna("no difference shown")
    return table.rename(index=lambda variant: variant.replace("@", ": "))


def _table(rows: dict, level: str) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=[level, "change"])
    return pd.DataFrame(list(rows.values()), index)[["mean", "low", "high"]]
