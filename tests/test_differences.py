"""What a choice changes: paired by clip, with the variant in its method's place."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from stepkit import differences, metrics, stats
from stepkit.study import Study

METHODS = {"random": {}, "gradient": {}, "integrated_gradients": {"steps": 2}}
LEFT = {"left": ("integrated_gradients", {"steps": 2, "rule": "left"})}
MODEL, DATASET = "r2plus1d_narrow", "appearance"


@pytest.fixture
def study(tmp_path):
    auc = {"auc": {"steps": 3}}
    return Study([MODEL, "unused"], [DATASET], METHODS, auc, str(tmp_path), clips=3)


def test_a_variant_equal_to_its_method_changes_nothing(study):
    same = {"the same": ("integrated_gradients", {"steps": 2})}
    found = differences.of_maps(study, same)["mean"].droplevel("variant")
    assert found.round(12).to_dict() == {"map": 1, "insertion": 0, "hit": 0, "α": 0}


def test_changes_of_maps_are_those_of_the_library(study):
    found = differences.of_maps(study, LEFT, name="x").loc["left"]
    one, other = (study.maps(method)["maps"] for method in ("integrated_gradients", LEFT))
    rho = [spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(one, other, strict=True)]
    assert found.loc["map", "mean"] == pytest.approx(np.mean(rho))
    auc = {m: study.measure("auc", m)["insertion"].numpy() for m in METHODS}
    auc["left"] = study.measure("auc", LEFT)["insertion"].numpy()
    gap = auc["left"] - auc["integrated_gradients"]
    expected = stats.bootstrap_mean(gap.astype(float)).tolist()[:3]
    assert found.loc["insertion"].tolist() == pytest.approx(expected, abs=1e-6)
    sides = []
    for name in ("left", "integrated_gradients"):
        both = np.stack([auc[name], auc["gradient"]], 1)
        sides.append(metrics.reliability(both, auc["random"]).alpha)
    np.testing.assert_allclose(found.loc["α", "mean"], sides[0] - sides[1])
    assert set(study.kept("auc_x")["method"]) == {*METHODS, "left"}


def test_clips_whose_map_is_flat_are_left_out(study, monkeypatch):
    whole, maps = differences.of_maps(study, LEFT), study.maps

    def first_is_flat(method, *where, **options):
        found = maps(method, *where, **options)
        flat = [0] if "left" in method else []
        return found | {"maps": found["maps"].index_fill(0, torch.tensor(flat).long(), 0.0)}

    monkeypatch.setattr(study, "maps", first_is_flat)
    with pytest.warns(UserWarning, match=r"of clips \[0\] the same everywhere"):
        found = differences.of_maps(study, LEFT).droplevel("variant")
    assert found.notna().all(axis=None)
    assert found.loc["map", "mean"] != whole.droplevel("variant").loc["map", "mean"]
    hits = study.kept("located_variants").pivot(index="clip", columns="method", values="hit")
    gap = (hits["left"] - hits["integrated_gradients"]).dropna()
    assert len(gap) == 2
    assert found.loc["hit", "mean"] == pytest.approx(gap.mean())


def test_changes_of_scores_are_those_of_the_library(study):
    variants = {"trapezoid": ({}, {"rule": "trapezoid"}), "faded": ({}, {"baseline": "fade"})}
    found = differences.of_scores(study, variants)
    curves = torch.stack([study.measure("auc", m)["insertion curve"] for m in METHODS])
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
        "a@b": "insertion higher, α lower",
        "a@c": "no difference shown",
    }
