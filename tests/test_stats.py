"""Bootstrap intervals against a plain loop and against all resamples there are."""

import itertools

import numpy as np
import pandas as pd
import pytest
import reference

from stepkit import stats


def draw(n, seed=0):
    return np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_equals_a_plain_loop(n, level):
    values = draw(n)
    found = stats.bootstrap_mean(values, samples=200, level=level, seed=3)
    assert found.index.tolist() == ["mean", "low", "high", "n"]
    expected = reference.bootstrap_mean(values, 200, level, seed=3)
    assert found[["mean", "low", "high"]].tolist() == pytest.approx(expected, abs=1e-14)
    assert found["n"] == n


def test_interval_is_that_of_all_resamples():
    values = [0.0, 0.13, 0.31, 0.77]
    means = np.sort([np.mean(resample) for resample in itertools.product(values, repeat=4)])
    found = stats.bootstrap_mean(values, level=0.9)
    sampling = 4 * (0.05 * 0.95 / 10_000) ** 0.5  # of a share of 10,000 samples
    for edge, share in ((found["low"], 0.05), (found["high"], 0.95)):
        assert np.mean(means <= edge + 1e-12) >= share - sampling
        assert np.mean(means < edge - 1e-12) <= share + sampling


def test_trainings_are_resampled_beside_the_clips():
    values = np.random.default_rng(1).normal(size=(5, 3))
    found = stats.bootstrap_mean(values, samples=200, seed=2)
    rng = np.random.default_rng(2)
    clips, trainings = rng.integers(5, size=(200, 5)), rng.integers(3, size=(200, 3))
    means = [values[np.ix_(c, t)].mean() for c, t in zip(clips, trainings, strict=True)]
    assert found["mean"] == pytest.approx(values.mean())
    np.testing.assert_allclose(found[["low", "high"]], np.quantile(means, [0.025, 0.975]))


def test_an_interval_over_trainings_holds_both_of_two_that_lie_apart():
    rows = [(c, s, float(s)) for c in range(50) for s in (0, 1)]
    table = pd.DataFrame(rows, columns=["clip", "seed", "x"]).assign(group="a", method="step")
    found = stats.intervals(table, "x", ["group"], trainings="seed")
    assert found.iloc[0].tolist() == [0.5, 0, 1, 50]
    both = pd.concat([table, table.assign(method="other", x=0.0)])
    gaps = stats.differences(both, "x", ["group"], trainings="seed")
    assert gaps.iloc[0].tolist() == [0.5, 0, 1, 50]


def test_any_statistic_has_an_interval_and_samples_without_it_are_left_out():
    values = draw(9)

    def ratio(counts):  # NaN where the first is drawn less than twice
        return np.where(counts[:, 0] < 2, np.nan, counts @ values / counts[:, 0])

    low, high = stats.bootstrap(ratio, 9, samples=300, level=0.8, seed=5)
    samples = np.random.default_rng(5).integers(9, size=(300, 9))
    known = [values[s].sum() / (s == 0).sum() for s in samples if (s == 0).sum() > 1]
    assert [low, high] == pytest.approx(np.quantile(known, [0.1, 0.9]).tolist(), abs=1e-12)
    assert np.isnan(stats.bootstrap(lambda counts: counts[:, 0] * np.nan, 9, samples=30)).all()


def test_pairing_narrows_the_interval():
    hard = 10 * draw(40)  # what clips have in common is larger than what methods differ by
    a, b = hard + 0.5 + 0.1 * draw(40, seed=1), hard
    paired, alone = stats.bootstrap_mean(a - b), stats.bootstrap_mean(a)
    assert 0.4 < paired["low"] < paired["mean"] < paired["high"] < 0.6
    assert alone["high"] - alone["low"] > 10 * (paired["high"] - paired["low"])


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = stats.bootstrap_mean(rng.normal(size=60), samples=400, level=0.9, seed=i)
        hits += found["low"] <= 0 <= found["high"]
    assert 0.9 - 0.08 < hits / 200 < 0.9 + 0.08


def test_same_seed_gives_the_same_interval_and_leaves_the_global_state():
    np.random.seed(11)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (stats.bootstrap_mean(draw(9), samples=50) for _ in range(2))
    pd.testing.assert_series_equal(first, second, check_exact=True)
    other = stats.bootstrap_mean(draw(9), samples=50, seed=1)
    assert other["low"] != first["low"]
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_level_widens_the_interval():
    narrow, wide = (stats.bootstrap_mean(draw(20), level=level) for level in (0.5, 0.99))
    assert wide["low"] < narrow["low"] < narrow["mean"] < narrow["high"] < wide["high"]


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: stats.bootstrap_mean([]), "values"),
        (lambda: stats.bootstrap_mean([[[1.0, 2.0]]]), "values"),
        (lambda: stats.bootstrap_mean([1.0, float("nan")]), "values"),
        (lambda: stats.bootstrap_mean([1.0], level=0), "level"),
        (lambda: stats.bootstrap_mean([1.0], level=95), "level"),
        (lambda: stats.bootstrap_mean([1.0], samples=0), "samples"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(call, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        call()


def scores():
    """Three methods on five clips of two datasets, not in alphabetical order."""
    rows = [
        {"dataset": d, "method": m, "clip": c, "auc": level + v}
        for d, shift in (("x", 0.0), ("a", 1.0))
        for m, level in (("step", 0.5 + shift), ("gradient", 0.2), ("random", 0.1))
        for c, v in enumerate(0.01 * draw(5, seed=int(shift)))
    ]
    return pd.DataFrame(rows)


def test_intervals_equal_one_group_at_a_time():
    table = scores()
    found = stats.intervals(table, "auc", ["dataset", "method"])
    assert found.columns.tolist() == ["mean", "low", "high", "n"]
    appeared = table[["dataset", "method"]].drop_duplicates().apply(tuple, axis=1).tolist()
    assert found.index.tolist() == appeared
    for group, row in found.iterrows():
        rows = table[(table["dataset"] == group[0]) & (table["method"] == group[1])]
        expected = stats.bootstrap_mean(rows["auc"])
        assert row.tolist() == pytest.approx(expected.tolist(), abs=1e-14)


def test_differences_are_paired_by_clip():
    shuffled = scores().sample(frac=1, random_state=0)
    found = stats.differences(shuffled, "auc", ["dataset"])
    assert set(found.index) == {(d, m) for d in ("x", "a") for m in ("gradient", "random")}
    assert found.index.get_level_values("dataset").is_monotonic_decreasing != (
        found.index.get_level_values("dataset").is_monotonic_increasing
    )  # groups stay together, in whatever order the rows came
    assert found.loc[("x", "gradient"), "mean"] == pytest.approx(0.3, abs=1e-12)
    assert found.loc[("a", "random"), "mean"] == pytest.approx(1.4, abs=1e-12)
    # clips vary, differences do not: a paired interval has no width
    assert (found["high"] - found["low"]).max() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"^method: got 'steps'"):
        stats.differences(scores(), "auc", ["dataset"], method="steps")


def test_clips_of_which_nothing_is_known_are_left_out_and_groups_of_them_say_so():
    table, known = scores(), scores()
    table.loc[(table["dataset"] == "x") & (table["clip"] < 2), "auc"] = np.nan
    table.loc[table["dataset"] == "a", "auc"] = np.nan
    known = known[(known["dataset"] == "x") & (known["clip"] >= 2)]
    for call in (
        lambda t: stats.intervals(t, "auc", ["dataset", "method"]),
        lambda t: stats.differences(t, "auc", ["dataset"]),
    ):
        found = call(table)
        pd.testing.assert_frame_equal(found.loc[["x"]], call(known))
        assert found.loc["a", ["mean", "low", "high"]].isna().all(axis=None)
        assert (found.loc["a", "n"] == 0).all()
        assert (stats.written(found.loc[["a"]]) == "–").all()
    assert set(stats.verdict(found)["a"]) == {"undecided"}
    assert stats.against_best(found).index.tolist() == ["x"]
    with pytest.raises(ValueError, match=r"^scores: got no row"):
        stats.intervals(table.dropna(subset="auc")[:0], "auc", ["dataset"])


def test_verdict_follows_the_interval():
    gaps = pd.DataFrame({"low": [0.1, -0.2, -0.1, 0.0], "high": [0.2, -0.1, 0.1, 0.1]})
    assert stats.verdict(gaps).tolist() == ["higher", "lower", "undecided", "undecided"]


def test_written_intervals():
    table = pd.DataFrame({"mean": [0.714], "low": [0.65], "high": [0.771]}, index=["step"])
    assert stats.written(table).to_dict() == {"step": "0.71 [0.65, 0.77]"}
    assert stats.written(table, 1).to_dict() == {"step": "0.7 [0.7, 0.8]"}


def test_the_strongest_other_method_leaves_the_smallest_difference():
    index = pd.MultiIndex.from_product([["a", "b"], ["x", "y"]], names=["dataset", "method"])
    means = [0.2, -0.1, 0.3, 0.4]
    gaps = pd.DataFrame({"mean": means, "low": means, "high": means, "n": 5.0}, index)
    found = stats.against_best(gaps)
    assert found["against"].to_dict() == {"a": "y", "b": "x"}
    assert found["mean"].to_dict() == {"a": -0.1, "b": 0.3}
    assert stats.verdict(found).map(stats.HOLDS).tolist() == ["does not hold", "holds"]


# ------------------------------------------------------------------------------------------- scenes


def test_scenes_of_one_clip_have_the_usual_standard_error():
    x = draw(40)
    found = stats.by_scene(pd.DataFrame({"x": x}), range(40)).loc["x"]
    assert found["se"] == pytest.approx(x.std(ddof=1) / 40**0.5, rel=1e-12)
    assert found[["sd", "n", "scenes"]].tolist() == pytest.approx([x.std(ddof=1), 40, 40])


def test_copies_of_a_clip_in_its_scene_add_nothing():
    x, scenes = draw(40), np.arange(40)
    once = stats.by_scene(pd.DataFrame({"x": x}), scenes)
    thrice = stats.by_scene(pd.DataFrame({"x": np.repeat(x, 3)}), np.repeat(scenes, 3))
    columns = ["mean", "low", "high", "se"]
    np.testing.assert_allclose(thrice[columns], once[columns], rtol=1e-12)
    alone = stats.by_scene(pd.DataFrame({"x": np.repeat(x, 3)}), range(120))
    assert (thrice["se"] / alone["se"]).item() == pytest.approx((3 * 119 / 117) ** 0.5, rel=0.02)


def test_a_bootstrap_over_scenes_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    scenes = rng.integers(31, size=80)
    scenes = np.array([f"scene {s}" for s in np.concatenate([np.arange(31), scenes])])
    values = rng.normal(size=len(scenes))
    found = stats.by_scene(pd.DataFrame({"x": values}), scenes, samples=60, level=0.8, seed=4)
    names, means = list(dict.fromkeys(scenes)), []
    for drawn in np.random.default_rng(4).integers(31, size=(60, 31)):
        clips = [v for s in drawn for v, of in zip(values, scenes, strict=True) if of == names[s]]
        means.append(sum(clips) / len(clips))
    ends = found.loc["x", ["low", "high"]].tolist()
    assert ends == pytest.approx(np.quantile(means, [0.1, 0.9]).tolist(), abs=1e-12)


def test_few_scenes_have_students_interval():
    values = pd.DataFrame({"x": [1.0, 2.0, 4.0]})
    found = stats.by_scene(values, ["a", "b", "c"]).loc["x"]
    half = 4.302653 * (7 / 3) ** 0.5 / 3**0.5  # t of two degrees of freedom, from a table
    assert found[["mean", "low", "high"]].tolist() == pytest.approx(
        [7 / 3, 7 / 3 - half, 7 / 3 + half], abs=1e-6
    )


@pytest.mark.parametrize(
    ("values", "scenes", "argument"),
    [
        ([1.0, 2.0], ["a"], "scenes"),
        ([1.0, 2.0], ["a", "a"], "scenes"),
        ([1.0, np.nan], ["a", "b"], "values"),
    ],
)
def test_scenes_that_do_not_fit_are_refused(values, scenes, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        stats.by_scene(pd.DataFrame({"x": values}), scenes)


def test_within_the_margin_is_level_on_either_side_of_zero():
    low, high = [0.005, -0.03, -0.01, 0.01, -0.019], [0.015, -0.005, 0.03, 0.03, 0.019]
    gaps = pd.DataFrame({"low": low, "high": high})
    words = ["level", "lower", "undecided", "higher", "level"]
    assert stats.verdict(gaps, margin=0.02).tolist() == words


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.6]).tolist() == [1, 1]
