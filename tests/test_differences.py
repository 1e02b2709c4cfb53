"""What a choice changes: paired by clip, with the variant in its method's place."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from stepkit import differences, metrics, stats
from stepkit.study import Experiment

WHERE = {"model": "r2plus1d_narrow", "dataset": "appearance", "steps": 3}
METHODS = {"random": {}, "gradient": {}, "integrated_gradients": {"steps": 2}}


@pytest.fixture
def run(tmp_path):
    return Experiment(str(tmp_path), clips=3)


def test_a_variant_equal_to_its_method_changes_nothing(run):
    same = {"integrated_gradients@the same": {"steps": 2}}
    found = differences.of_maps(run, METHODS, same, **WHERE)["mean"].droplevel("variant")
    assert found.round(12).to_dict() == {"map": 1, "insertion": 0, "hit": 0, "α": 0}


def test_changes_of_maps_are_those_of_the_library(run):
    left = {"integrated_gradients@left": {"steps": 2, "rule": "left"}}
    found = differences.of_maps(run, METHODS, left, **WHERE, name="x")
    found = found.loc["integrated_gradients@left"]
    where = WHERE["model"], WHERE["dataset"]
    one = run.explain("integrated_gradients", *where, **METHODS["integrated_gradients"])["maps"]
    other = run.explain("integrated_gradients@left", *where, steps=2, rule="left")["maps"]
    rho = [spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(one, other, strict=True)]
    assert found.loc["map", "mean"] == pytest.approx(np.mean(rho))
    curves = run.curves({**METHODS, **left}, *where, steps=3)
    auc = {m: metrics.auc(kinds["insertion"]).numpy() for m, kinds in curves.items()}
    gap = auc["integrated_gradients@left"] - auc["integrated_gradients"]
    assert found.loc["insertion"].tolist() == stats.bootstrap_mean(gap).tolist()[:3]
    sides = []
    for name in ("integrated_gradients@left", "integrated_gradients"):
        both = np.stack([auc[name], auc["gradient"]], 1)
        sides.append(metrics.reliability(both, auc["random"]).alpha)
    np.testing.assert_allclose(found.loc["α", "mean"], sides[0] - sides[1])
    assert (run.folder / "scores" / "auc_x.csv").is_file()


def test_clips_whose_map_is_flat_are_left_out(run, monkeypatch):
    left = {"integrated_gradients@left": {"steps": 2, "rule": "left"}}
    whole, explain = differences.of_maps(run, METHODS, left, **WHERE), run.explain

    def first_is_flat(method, *where, **options):
        found = explain(method, *where, **options)
        flat = [0] if method in left else []
        return found | {"maps": found["maps"].index_fill(0, torch.tensor(flat).long(), 0.0)}

    monkeypatch.setattr(run, "explain", first_is_flat)
    found = differences.of_maps(run, METHODS, left, **WHERE).droplevel("variant")
    assert found.notna().all(axis=None)
    assert found.loc["map", "mean"] != whole.droplevel("variant").loc["map", "mean"]
    hits = run.table("located_variants").pivot(index="clip", columns="method", values="hit")
    gap = (hits["integrated_gradients@left"] - hits["integrated_gradients"]).dropna()
    assert len(gap) == 2
    assert found.loc["hit", "mean"] == pytest.approx(gap.mean())


def test_changes_of_scores_are_those_of_the_library(run):
    variants = {"trapezoid": ({}, {"rule": "trapezoid"}), "faded": ({}, {"baseline": "fade"})}
    found = differences.of_scores(run, METHODS, variants, **WHERE)
    curves = run.curves(METHODS, WHERE["model"], WHERE["dataset"], steps=3)
    curves = torch.stack([kinds["insertion"] for kinds in curves.values()])
    gap = metrics.auc(curves, "trapezoid") - metrics.auc(curves)
    assert found.loc[("trapezoid", "insertion"), "mean"] == pytest.approx(gap.mean().item())
    assert found.loc["faded"].notna().all(axis=None)
    table = differences.summary(found)
    assert list(table) == ["insertion", "order", "α", "verdict"]
    assert list(table.index) == list(variants)


def test_a_summary_says_which_changes_exceed_their_intervals():
    rows = {
        ("a@b", "map"): (0.9, 0.8, 1.0),
        ("a@b", "insertion"): (0.2, 0.1, 0.3),
        ("a@b", "α"): (-0.2, -0.3, -0.1),
        ("a@c", "map"): (0.9, 0.8, 1.0),
        ("a@c", "insertion"): (0.2, -0.1, 0.3),
        ("a@c", "α"): (0.0, 0.0, 0.0),
    }
    index = pd.MultiIndex.from_tuples(rows, names=["variant", "change"])
    table = differences.summary(pd.DataFrame(rows.values(), index, ["mean", "low", "high"]))
    assert table["verdict"].to_dict() == {
        "a: b": "insertion higher, α lower",
        "a: c": "no difference shown",
    }
