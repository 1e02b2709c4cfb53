"""α of Eqs. 20-21 against a double loop, cases done by hand, and its limits."""

import math
import time

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from scipy.stats import spearmanr

import stepkit as sk
from stepkit import metrics, stats
from stepkit.metrics import agreement, reliability, reliability_gap, reliability_table


def draw(N, M, seed=0, values=None):
    """Scores (N, M) and those of random maps (N,), from so few values that many of them tie."""
    rng = np.random.default_rng(seed)
    if values:
        return rng.integers(values, size=(N, M)) / values, rng.integers(values, size=N) / values
    return rng.normal(size=(N, M)), rng.normal(size=N)


def agreeing(N, M, seed, noise=1.0):
    """Methods that differ by a half from one to the next, seen through noise; random is worst."""
    rng = np.random.default_rng(seed)
    return 0.5 * np.arange(M) + noise * rng.normal(size=(N, M)), rng.normal(size=N) - 0.5


def undefined(*args, **options):
    with pytest.warns(UserWarning, match=r"reliability: .* α is undefined \(NaN\)"):
        found = reliability(*args, **options)
    assert math.isnan(found.alpha)
    assert all(map(math.isnan, found.interval))
    return found


def test_alpha_by_hand():
    scores = [[1, 2, 2, 4], [1, 2, 3, 4], [4, 3, 2, 1]]  # two tie in the first sample
    found = reliability(scores, [0, 1.5, 3.5])
    assert found.weights.tolist() == [1, 3 / 4, 1 / 4]
    tied = 4.5 / math.sqrt(4.5 * 5)  # ρ of the ranks 1, 2½, 2½, 4 and 1, 2, 3, 4
    above = 1 * 3 / 4 * tied - 1 * 1 / 4 * tied - 3 / 4 * 1 / 4
    assert found.alpha == pytest.approx(above / (3 / 4 + 1 / 4 + 3 / 16), abs=1e-14)


def test_alpha_by_hand_with_random_among_the_methods():
    # ranks 2 3 1 and 3 2 1 of method, method, random: ρ = 1/2, where the two methods alone have -1
    assert reliability([[1, 2], [2, 1]], [0, 0]).alpha == pytest.approx(-1, abs=1e-14)
    found = reliability([[1, 2], [2, 1]], [0, 0], include_random=True)
    assert found.alpha == pytest.approx(1 / 2, abs=1e-14)
    assert found.weights.tolist() == [1, 1]


@pytest.mark.parametrize("include_random", [False, True])
@pytest.mark.parametrize("lower_is_better", [False, True])
@pytest.mark.parametrize(("N", "M", "values"), [(12, 5, None), (12, 4, 3), (2, 2, None), (9, 7, 2)])
def test_alpha_equals_the_double_loop(N, M, values, lower_is_better, include_random):
    options = {"lower_is_better": lower_is_better, "include_random": include_random}
    for seed in range(3):
        A, r = draw(N, M, seed, values)
        expected = reference.reliability(A, r, **options)
        if expected is None:
            undefined(A, r, **options)
            continue
        found = reliability(A, r, samples=1, **options)
        assert found.alpha == pytest.approx(expected, abs=1e-12)
        weights = [reference.beating_random(A, r, p, lower_is_better) for p in range(N)]
        assert found.weights.tolist() == pytest.approx(weights, abs=1e-15)


@pytest.mark.parametrize("include_random", [False, True])
@pytest.mark.parametrize("N", [5, 7])  # of 5, many resamples hold no pair
def test_interval_equals_a_plain_loop(N, include_random):
    A, r = draw(N, 4, seed=N, values=3)
    r[:] = -0.5
    A[0], r[0] = 0.5, 0.4  # no ranking
    A[1], r[1] = [0.5, 0.2, 0.1, 0.5], 1.0  # no method beats random
    options = {"include_random": include_random}
    found = reliability(A, r, samples=25, level=0.8, seed=5, **options)
    expected = reference.reliability_interval(A, r, 25, 0.8, 5, **options)
    assert found.interval == pytest.approx(expected, abs=1e-12)
    assert found.interval[0] < found.interval[1]


def test_no_interval_from_fewer_than_three_samples_that_count():
    A, r = [[1, 2, 3], [1, 3, 2], [1, 2, 3]], [0, 0, 4]
    found = reliability(A, r)
    assert found.alpha == pytest.approx(0.5, abs=1e-14)
    assert all(map(math.isnan, found.interval))
    assert not any(map(math.isnan, reliability(A, [0, 0, 0]).interval))


def test_identical_rankings_give_one():
    A, r = draw(10_000, 12)
    found = reliability(np.sort(A, axis=1), r + 1, samples=20)
    assert [found.alpha, *found.interval] == pytest.approx([1, 1, 1], abs=1e-12)


def test_independent_rankings_give_zero_and_random_among_them_inflates_it():
    A, _ = draw(4000, 5)
    r = A.min(1) - 1  # every method beats random
    assert reliability(A, r, samples=1).alpha == pytest.approx(0, abs=0.002)
    # random is always last: its rank less 3½ is -2½, that of the others ½ on average, of 17½ in all
    released = reliability(A, r, samples=1, include_random=True)
    assert released.alpha == pytest.approx((2.5**2 + 5 * 0.5**2) / 17.5, abs=0.01)


@pytest.mark.parametrize("N", [2, 10, 1000])
def test_rankings_that_half_the_samples_reverse_cancel_but_for_the_missing_diagonal(N):
    A = np.tile([1.0, 2, 3], (N, 1))
    A[: N // 2] = A[: N // 2, ::-1]
    assert reliability(A, np.zeros(N), samples=1).alpha == pytest.approx(-1 / (N - 1), abs=1e-12)


def test_undefined_where_all_methods_are_worse_than_random():
    A, _ = draw(9, 4)
    assert undefined(A, A.max(1) + 1).weights.tolist() == [0] * 9
    undefined(A, A.max(1))  # a tie with random is no win
    undefined(A, A.max(1) + 1, include_random=True)
    undefined(A, A.min(1) - 1, lower_is_better=True)


def test_undefined_without_a_pair():
    undefined([[1, 2, 3]], [0])
    undefined([[1, 2, 3], [1, 2, 3]], [0, 4])
    found = undefined([[1, 2, 3], [2, 2, 2]], [0, 0])
    assert found.ranked.tolist() == [True, False]


def test_sample_where_all_methods_tie_is_left_out():
    A, r = agreeing(9, 4, seed=0)
    more, random = np.vstack([A, np.full((2, 4), 7.0)]), [*r, 0, 0]
    found = reliability(more, random)
    assert found.alpha == pytest.approx(reliability(A, r).alpha, abs=1e-14)
    assert found.ranked.tolist() == [True] * 9 + [False] * 2
    assert found.weights[-2:].tolist() == [1, 1]
    # random is not tied with them: with its column they have a ranking
    assert reliability(more, random, include_random=True).ranked.all()


def test_sample_without_a_win_has_no_say():
    A, r = agreeing(9, 4, seed=1)
    r[3] = 100
    other = A.copy()
    other[3] = other[3, ::-1]
    assert reliability(A, r).alpha == pytest.approx(reliability(other, r).alpha, abs=1e-14)


def test_only_ranks_and_wins_count():
    A, r = agreeing(30, 5, seed=2)
    alpha = reliability(A, r).alpha
    rng = np.random.default_rng(0)
    methods, rows = rng.permutation(5), rng.permutation(30)
    assert reliability(np.exp(3 * A), np.exp(3 * r)).alpha == pytest.approx(alpha, abs=1e-12)
    assert reliability(A[:, methods], r).alpha == pytest.approx(alpha, abs=1e-12)
    assert reliability(A[rows], r[rows]).alpha == pytest.approx(alpha, abs=1e-12)
    assert reliability(-A, -r, lower_is_better=True).alpha == pytest.approx(alpha, abs=1e-12)


def test_interval_covers_the_truth_as_often_as_it_says():
    truth = reliability(*agreeing(40_000, 5, seed=999), samples=1).alpha
    assert 0.2 < truth < 0.8
    hits = []
    for seed in range(200):
        found = reliability(*agreeing(40, 5, seed), samples=300, level=0.9, seed=seed)
        hits.append(found.interval[0] <= truth <= found.interval[1])
    assert 0.9 - 0.08 < np.mean(hits) < 0.9 + 0.08


def test_copies_of_a_sample_do_not_lift_the_interval():
    A, r = agreeing(12, 5, seed=3)
    found = reliability(A, r, level=0.02, samples=4000)  # a narrow one, around the median
    assert found.interval[0] - 0.03 < found.alpha < found.interval[1] + 0.03


def test_same_seed_gives_the_same_interval_whatever_the_blocks(monkeypatch):
    np.random.seed(11)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    A, r = agreeing(15, 4, seed=4)
    first = reliability(A, r, samples=50).interval
    assert reliability(A, r, samples=50).interval == first
    assert reliability(A, r, samples=50, seed=1).interval != first
    monkeypatch.setattr(stats, "_BLOCK", 7 * 15)
    assert reliability(A, r, samples=50).interval == pytest.approx(first, abs=1e-14)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_level_widens_the_interval():
    A, r = agreeing(30, 5, seed=5)
    narrow, wide = (reliability(A, r, level=level) for level in (0.5, 0.99))
    ends = [wide.interval[0], *narrow.interval, wide.interval[1]]
    assert ends == sorted(set(ends))


def test_ten_thousand_samples_of_twelve_methods_take_less_than_a_second():
    A, r = agreeing(10_000, 12, seed=6)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = reliability(A, r)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
    assert found.interval[0] < found.alpha < found.interval[1]


def test_lists_tensors_and_tables_are_the_same():
    A, r = agreeing(8, 3, seed=7)
    expected = sk.reliability(A, r)
    for scores, random in [
        (A.tolist(), r.tolist()),
        (torch.from_numpy(A).requires_grad_(), torch.from_numpy(r)),
        (pd.DataFrame(A), pd.Series(r)),
    ]:
        found = sk.reliability(scores, random)
        assert (found.alpha, found.interval) == (expected.alpha, expected.interval)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [1.0, 2.0]}, ValueError, r"scores: got shape \(2,\), expected \(N, M\)"),
        ({"scores": [[1.0], [2.0]]}, ValueError, r"scores: got shape \(2, 1\)"),
        ({"scores": np.zeros((0, 3))}, ValueError, r"scores: got shape \(0, 3\)"),
        ({"scores": [[1.0, math.nan], [1.0, 2.0]]}, ValueError, "scores: got NaN"),
        ({"scores": [["a", "b"]]}, TypeError, "scores: got list, expected numbers"),
        ({"random_scores": [0.0]}, ValueError, r"random_scores: got shape \(1,\), expected \(2,\)"),
        ({"random_scores": [[0.0], [1.0]]}, ValueError, r"random_scores: got shape \(2, 1\)"),
        ({"random_scores": [0.0, math.inf]}, ValueError, "random_scores: got NaN or infinity"),
        ({"samples": 0}, ValueError, "samples: got 0"),
        ({"samples": 10.5}, ValueError, "samples: got 10.5"),
        ({"level": 95}, ValueError, "level: got 95"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(change, error, message):
    call = {"scores": [[1.0, 2.0], [3.0, 4.0]], "random_scores": [0.0, 1.0]} | change
    with pytest.raises(error, match="^" + message):
        reliability(**call)


# ------------------------------------------------------------------------------- tables of scores


def scores_of(values, dataset="a"):
    """A long table; ``values`` method -> (insertions, deletions) per clip."""
    rows = [
        {"dataset": dataset, "clip": f"{dataset}{n}", "method": m, "insertion": i, "deletion": d}
        for m, pair in values.items()
        for n, (i, d) in enumerate(zip(*pair, strict=True))
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    made = {m: rng.random((2, 8)) for m in ("x", "random", "y", "z")}
    made["x"][0] += 1  # insertion: always the best
    return pd.concat([scores_of(made), scores_of({m: v[:, ::-1] for m, v in made.items()}, "b")])


def test_a_table_of_alphas_is_that_of_each_group(table):
    found = reliability_table(table, ["dataset"])
    assert list(found.index) == [(d, m) for d in "ab" for m in ("insertion", "deletion")]
    for (dataset, metric), row in found.iterrows():
        part = table[table["dataset"] == dataset]
        wide = part.pivot(index="clip", columns="method", values=metric)
        lower = metric == "deletion"
        expected = reliability(wide[["x", "y", "z"]], wide["random"], lower_is_better=lower)
        assert row["mean"] == pytest.approx(expected.alpha)
        assert (row["low"], row["high"]) == pytest.approx(expected.interval)


def test_the_gap_of_two_alphas_is_taken_on_the_same_clips(table):
    both = reliability_table(table, ["dataset"])["mean"].unstack("metric")
    gap = reliability_gap(table, ["dataset"])
    assert gap["mean"].tolist() == pytest.approx(list(both["insertion"] - both["deletion"]))
    assert (gap["low"] <= gap["mean"]).all()
    assert (gap["mean"] <= gap["high"]).all()
    # a metric and its mirror image: no gap, and none in any bootstrap sample
    mirrored = table.assign(deletion=-table["insertion"])
    assert reliability_gap(mirrored, ["dataset"]).to_numpy().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_the_difference_of_two_alphas_takes_their_options():
    rng = np.random.default_rng(0)
    A, r = rng.random((8, 4)), rng.random(8)
    one = {"scores": A, "random_scores": r}
    found = metrics.alpha_difference(one | {"include_random": True}, one)
    expected = reliability(A, r, include_random=True).alpha - reliability(A, r).alpha
    assert found["mean"] == pytest.approx(expected)
    assert metrics.alpha_difference(one, one).tolist() == [0, 0, 0]


@pytest.mark.parametrize("decimals", [1, 8])  # with and without ties
def test_rank_correlation_is_spearmans(decimals):
    rng = np.random.default_rng(0)
    A, B = rng.random((6, 20)).round(decimals), rng.random((6, 20)).round(decimals)
    expected = [spearmanr(a, b)[0] for a, b in zip(A, B, strict=True)]
    np.testing.assert_allclose(metrics.rank_correlation(A, B), expected)
    assert np.isnan(metrics.rank_correlation([[1.0, 1.0]], [[1.0, 2.0]])).all()


def test_agreement_with_the_truth_is_spearmans_rho_clip_by_clip():
    insertion = [[0.5, 0.1], [0.9, 0.2], [0.7, 0.4], [0.1, 0.3]]
    methods = ("x", "y", "z", "random")
    scores = scores_of({m: (row, row) for m, row in zip(methods, insertion, strict=True)})
    mass = pd.DataFrame({"method": methods, "mass": [0.4, 0.3, 0.2, 0.1]})
    truth = pd.concat([mass.assign(dataset="a", clip=clip) for clip in ("a0", "a1")])
    table = agreement(scores, truth, ["dataset"], "mass").set_index(["metric", "clip"])
    for column, rows in (("rho", 3), ("rho_with_random", 4)):
        expected = {
            (m, f"a{n}"): sign
            * spearmanr([row[n] for row in insertion[:rows]], mass["mass"][:rows]).statistic
            for m, sign in (("insertion", 1), ("deletion", -1))
            for n in range(2)
        }
        assert table[column].to_dict() == pytest.approx(expected)
    # random maps are last by both metric and truth: with them the two seem to agree
    assert table.loc[("insertion", "a0"), "rho"] == pytest.approx(-0.5)
    assert table.loc[("insertion", "a0"), "rho_with_random"] == pytest.approx(0.4)
    flat = agreement(scores.assign(insertion=0.0), truth, ["dataset"], "mass")
    assert flat[flat["metric"] == "insertion"][["rho", "rho_with_random"]].isna().all(axis=None)


# ------------------------------------------------------------------------------------------- scenes


def alpha_of_scenes(A, r, scenes, drawn):
    """Eq. 20 over copies of scenes: no pair of a scene's copies, each copy with its own pairs."""
    clips = [(copy, s, p) for copy, s in enumerate(drawn) for p in range(len(r)) if scenes[p] == s]
    above = below = 0.0
    for i, (copy, scene, p) in enumerate(clips):
        for other, same, q in clips[i + 1 :]:
            if scene == same and copy != other:
                continue
            w = reference.beating_random(A, r, p, False) * reference.beating_random(A, r, q, False)
            above, below = above + w * spearmanr(A[p], A[q]).statistic, below + w
    return above / below if below else math.nan


def test_interval_over_scenes_equals_a_plain_loop():
    A, r = agreeing(11, 4, seed=2)
    scenes = [0, 0, 0, 1, 2, 2, 3, 3, 3, 4, 4]
    found = reliability(A, r, scenes=scenes, samples=15, level=0.8, seed=3)
    assert found.alpha == pytest.approx(alpha_of_scenes(A, r, scenes, range(5)), abs=1e-12)
    assert found.alpha == pytest.approx(reliability(A, r).alpha, abs=1e-12)
    draws = np.random.default_rng(3).integers(5, size=(15, 5))
    alphas = [alpha_of_scenes(A, r, scenes, drawn) for drawn in draws]
    assert found.interval == pytest.approx(np.nanquantile(alphas, [0.1, 0.9]), abs=1e-12)


def test_scenes_of_one_sample_change_nothing():
    A, r = agreeing(30, 5, seed=7)
    alone = reliability(A, r, scenes=list(range(30)), samples=50)
    assert alone.interval == pytest.approx(reliability(A, r, samples=50).interval, abs=1e-12)


def test_copies_within_a_scene_do_not_narrow_the_interval():
    A, r = agreeing(60, 5, seed=8)
    again = np.repeat(A, 4, 0), np.repeat(r, 4)
    low, high = reliability(*again, scenes=np.repeat(range(60), 4), samples=2000).interval
    once = reliability(A, r, samples=2000).interval
    alone = reliability(*again, samples=2000).interval
    assert high - low > 0.9 * (once[1] - once[0])
    assert high - low > 1.7 * (alone[1] - alone[0])


def test_scenes_have_to_fit():
    A, r = agreeing(5, 3, seed=0)
    with pytest.raises(ValueError, match=r"^scenes: got shape \(4,\)"):
        reliability(A, r, scenes=[0, 1, 2, 3])


def test_the_difference_of_an_alpha_from_itself_is_nothing_over_scenes_too():
    A, r = agreeing(12, 4, seed=9)
    side = {"scores": A, "random_scores": r}
    gap = metrics.alpha_difference(side, side, scenes=np.repeat(range(6), 2), samples=30)
    assert gap.tolist() == [0, 0, 0]
