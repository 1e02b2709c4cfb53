"""The authors' scores: read out of a made-up repository, and what is computed from the real."""

import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepkit import published
from tools import store
from tools.authors import __main__ as command
from tools.authors import claims, decided, logs, scores
from tools.authors.scores import Cell

ROOT = Path(__file__).resolve().parents[1]
HEAD = ",".join(["video", "random", "step", *scores.RANKED]) + "\n"
VIDEOS = {"ucf101-24": 3, "epic-object": 2, "something-v2": 2}
UCF = ["v_Diving_g01_c01", "v_Diving_g01_c02", "v_Biking_g02_c01"]
PATCH = Cell("ucf101-24", "r2plus1d_18", "patch", "insertion")


# --------------------------------------------------------------- extraction, from logs as they are


def log(name, values, unit="cm_16", metric="ins", order="most_first", average=None, end=True):
    """One run as the authors' code prints it; ``name`` is ``<dataset>_<model>_<map>``."""
    dataset, model, method = name.split("_", 2)
    method = re.sub(r"_full.*", "", method)
    lines = [f"Loaded /home/x/exe_res/{name}.pt", "Use 4 GPUs!", "('1', '2') tensor([19, 2]) ('a')"]
    lines += [f"{video}: {value}" for video, value in values]
    if end:
        average = np.mean([value for _, value in values]) if average is None else average
        lines.append(
            f"Finished: {unit}, {metric}, {order}, {dataset}, {model}, {method}, #Step=128"
        )
        lines.append(f"Average: {average}")
    return "\n".join(lines) + "\n"


def ucf(*values):
    return list(zip(UCF, values, strict=True))


def git(repo, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    run = subprocess.run(["git", "-C", repo, *who, *arguments], capture_output=True, check=True)
    return run.stdout.decode().strip()


def repository(folder, files):
    """Commit ``files``, then their removal; return that commit."""
    git(folder.parent, "init", "-q", folder.name)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "runs")
    git(folder, "rm", "-rq", ".")
    git(folder, "commit", "-qm", "remove outs_files", "--allow-empty")
    return git(folder, "rev-parse", "HEAD")


SG, GC = ucf(0.5, 0.25, 0.12344), ucf(0.9, 0.8, 0.7)
FILES = {
    "outs_ucf101/r2p1d_ins_morf.txt": log("ucf101_r2p1d_sg_full", SG)
    + log("ucf101_r2p1d_perturb_full_core8_test_summed", GC[:2], end=False)  # partial
    + log("ucf101_r2p1d_grad_cam_full", ucf(0.1, 0.1, 0.1))  # made again below
    + log("ucf101_r2p1d_ig_full", SG, average=0.5)
    + log("ucf101_r2p1d_g_full", [*SG[:2], SG[0]])
    + log("ucf101_r2p1d_la_full", SG[:2])
    + log("ucf101_r2p1d_sg2_full", SG, unit="cm")
    + log("ucf101_tsm_sg2_full", SG)
    + log("ucf101_r2p1d_sg2_full", SG, order="least_first")
    + log("ucf101_r2p1d_sg2_full", ucf(0.1, math.nan, 0.2))
    + log("ucf101_r2p1d_grad_cam_layer3_full", SG)
    + log("ucf101_r2p1d_perturb_full_core5_test_summed", SG).replace(", perturb,", ", ig,"),
    "outs_ucf101/r2p1d_ins_morf_extra.txt": log("ucf101_r2p1d_grad_cam_full", GC[::-1])
    + log("ucf101_r2p1d_perturb_full_core8_test_summed", GC)
    + log("ucf101_r2p1d_perturb_full_core8_test_summed", SG, unit="scm_256", metric="del")
    + log("ucf101_r2p1d_perturb_full_test_summed", SG, unit="scm_256", metric="del"),
    "outs_epic/r50l_ins_morf_perturb_rerun.txt": log(
        "epic_r50l_perturb_full", [("P01_01_1-a", 0.1), ("P01_01_2-b", 0.2)]
    ),
    "outs_sthsthv2_old/r2p1d_ins_morf.txt": log(
        "sthsthv2_r2p1d_sg_full", [("7", 0.1), ("10", 0.2)]
    ),
    "outs_all/score_cam.txt": log("sthsthv2_r50l_score_cam_full_test", [("7", 0.1), ("10", 2e-05)]),
    "outs_ucf101/r2p1d_kar_sg.txt": log("ucf101_r2p1d_sg_full", GC),  # no such log is read
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clones") / "authors"
    return folder, repository(folder, FILES)


def test_whole_runs_become_tables(clone, tmp_path):
    folder, commit = clone
    found, _ = logs.extract(folder, tmp_path / "out", commit, VIDEOS)
    patch = found[PATCH]
    assert patch.columns.tolist() == ["smoothgrad", "grad_cam", "step"]
    assert patch.index.tolist() == sorted(UCF)
    assert patch.loc[UCF[2]].tolist() == [0.1234, 0.7, 0.7]  # four decimals
    other = Cell("something-v2", "r50l", "patch", "insertion")
    deleted = Cell("ucf101-24", "r2plus1d_18", "superpixel", "deletion")
    assert set(found) == {PATCH, other, deleted}
    assert found[other].loc["10", "score_cam"] == 0
    assert found[deleted].columns.tolist() == ["step", "step_t0"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"blocks.csv", *("_".join(cell) + ".csv" for cell in found)}
    written = pd.read_csv(tmp_path / "out" / ("_".join(PATCH) + ".csv"), index_col="video")
    pd.testing.assert_frame_equal(written, patch, check_exact=True)


def test_every_run_is_accounted_for(clone, tmp_path):
    folder, commit = clone
    _, runs = logs.extract(folder, tmp_path, commit, VIDEOS)
    assert len(runs) == 19
    left = runs[~runs["taken"]].set_index("map")["why"]
    assert left.groupby("map").agg(" / ".join).to_dict() == {
        "perturb_core8": "the run did not end",
        "grad_cam": "a later run: outs_ucf101/r2p1d_ins_morf_extra.txt, line 1",
        "ig": "the scores do not have the average that the log says",
        "g": "a video twice",
        "la": "2 of 3 videos",
        "sg2": " / ".join(["of a unit, an order or a network that is not kept"] * 3)
        + " / the scores do not have the average that the log says",
        "grad_cam_layer3": "of a map that is not kept",
        "perturb_core5": "ucf101 r2p1d perturb was loaded, ucf101 r2p1d ig finished",
        "perturb": "an earlier or partial run",
        "sg": "an earlier or partial run",
    }


def test_the_clone_is_only_read(clone, tmp_path):
    folder, commit = clone

    def state():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files}

    before = state()
    logs.extract(folder, tmp_path, commit, VIDEOS)
    assert state() == before


def test_the_command_says_what_it_took_and_where_the_paper_differs(
    clone, tmp_path, capsys, monkeypatch
):
    for dataset, count in VIDEOS.items():
        monkeypatch.setitem(scores.VIDEOS, dataset, count)
    folder, commit = clone
    call = ["scores", "--repo", str(folder), "--commit", commit, "--out", str(tmp_path / "out")]
    assert command.main(call) == 0
    told = capsys.readouterr()
    assert "line 1: sg, 3 videos, 0.2911; taken" in told.out
    assert "la, 2 videos, 0.375; left: 2 of 3 videos" in told.out
    assert "6 of 19 runs taken, 3 files in" in told.out
    assert "mean 0.8, the paper prints 0.74: ucf101-24, r2plus1d_18, patch, grad_cam" in told.err
    assert "score_cam" not in told.err  # the paper prints none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo": "nowhere"}, r"^--repo: got .*nowhere .*expected a full clone of shinkyo0513/"),
        ({"commit": "0000000"}, r"^--repo: got .*expected a full clone of"),
        ({"videos": dict.fromkeys(VIDEOS, 9)}, "^--repo: got no whole run in"),
    ],
)
def test_a_clone_that_does_not_fit_is_refused(clone, tmp_path, change, message):
    given = {"repo": clone[0], "out": tmp_path, "commit": clone[1], "videos": VIDEOS}
    if "repo" in change:
        change = {"repo": tmp_path / change["repo"]}
    with pytest.raises(ValueError, match=message):
        logs.extract(**given | change)


def test_a_folder_without_scores_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^authors: got no scores in .*tools.authors scores"):
        scores.read(tmp_path)
    with pytest.raises(ValueError, match=r"^authors: got no .*means.csv, .*tools.authors tables"):
        published.authors("means", str(tmp_path))
    assert command.main(["tables", "--authors", str(tmp_path)]) == 2
    assert "stepkit: authors: got no scores" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^name: got 'alpha', expected one of 'means'"):
        published.authors("alpha")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,step,mine\nv,1,2\n", r"csv: got columns \['mine'\]"),
        ("video,step\nv,1\n", r"csv: got no \['random', 'gradient'"),
        (f"{HEAD}v{',1' * 7}\nv{',2' * 7}\n", "csv: got a gap or a video twice"),
        (f"{HEAD}v,,1,1,1,1,1,1\n", "csv: got a gap"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, text, message):
    (tmp_path / ("_".join(PATCH) + ".csv")).write_text(text)
    with pytest.raises(ValueError, match=message):
        scores.read(tmp_path)


# ----------------------------------------------------------------- the tables, from made-up scores


@pytest.fixture(scope="module")
def cells():
    """Scores of 40 groups of two videos in which every difference is known."""
    rng = np.random.default_rng(0)
    videos = [f"v_{c}_g{g:02d}_c0{k}" for c in ("A", "B") for g in range(20) for k in (1, 2)]
    hard = rng.uniform(0.3, 0.7, len(videos))
    methods = {name: 0.01 * i for i, name in enumerate([*scores.PRINTED, *scores.LENGTHS])}
    table = {name: hard - 0.2 + gap for name, gap in methods.items()}
    noise = np.tile([0.01, -0.01], len(videos) // 2)
    table |= {"step": hard + noise, "random": hard - 0.25, "score_cam": hard + 0.05}
    table = pd.DataFrame(table, pd.Index(videos, name="video"))[
        [m for m in scores.METHODS if m in table]
    ]
    deletion = ["random", *scores.RANKED, "step_t0"]
    deleted = table[deletion].assign(random=hard + 0.25)
    return {PATCH: table, PATCH._replace(metric="deletion"): deleted}


def test_differences_are_those_that_were_put_in(cells):
    found = decided.differences(cells).set_index(["metric", "against"])
    row = found.loc[("insertion", "grad_cam")]
    assert row["mean"] == pytest.approx(0.2 - 0.08, abs=1e-4)
    assert [row["low"], row["high"]] == pytest.approx([row["mean"]] * 2)  # scenes do not vary
    assert row["sd"] == pytest.approx(np.tile([0.01, -0.01], 40).std(ddof=1), abs=1e-4)
    assert row["paper"] == pytest.approx(0.805 - 0.74)
    assert row["runs"] == "perturb_core8 - grad_cam"
    assert [row["videos"], row["scenes"]] == [80, 40]
    assert (row["verdict"], found.loc[("insertion", "score_cam"), "verdict"]) == (
        "holds",
        "does not hold",
    )
    # deletion: STEP without L_K is above, which is worse
    row = found.loc[("deletion", "gradient")]
    assert row["method"] == "step_t0"
    assert row["mean"] == pytest.approx(0.09 - 0.01, abs=1e-4)
    assert row["verdict"] == "does not hold"


def test_means_stand_beside_the_printed_ones(cells):
    found = decided.means(cells)
    found = found[found["metric"] == "insertion"].set_index("method")
    assert found.loc["grad_cam", "paper"] == 0.74
    assert found.loc["step", "paper"] == 0.805  # Table IV has a digit more than Table V
    assert found.loc["score_cam", "agrees"] == ""
    assert not found.loc["grad_cam", "agrees"]
    near = {PATCH: cells[PATCH][["grad_cam"]] * 0 + 0.7452}
    assert decided.means(near)["agrees"].tolist() == [True]  # the paper cut it off


def test_ranks_count_from_the_best(cells):
    found = decided.ranks(cells).set_index(["metric", "method"])
    assert found.loc[("insertion", "step"), ["mean", "among"]].tolist() == [1, 10]
    assert found.loc[("insertion", "gradient_x_input"), "mean"] == 10
    assert found.loc[("deletion", "gradient"), ["mean", "among"]].tolist() == [1, 6]


def test_reliability_is_one_where_every_video_agrees(cells):
    found = decided.alphas(cells).set_index(["metric", "form"])
    assert found.loc[("insertion", "as printed"), "mean"] == 1
    assert found.loc[("insertion", "as printed"), "beat_random"] == 1
    assert found.loc[("deletion", "as printed"), "beat_random"] == 1  # lower is better
    assert found.loc[("insertion - deletion", "as printed"), "mean"] == 0


def test_a_folder_of_scores_gives_the_same_tables(cells, tmp_path):
    for cell, table in cells.items():
        table.to_csv(tmp_path / ("_".join(cell) + ".csv"))
    assert command.main(["tables", "--authors", str(tmp_path), "--out", str(tmp_path)]) == 0
    for name, table in decided.TABLES.items():
        found = published.authors(name, str(tmp_path))
        written = tmp_path / "again.csv"
        table(cells).to_csv(written, index=False)
        pd.testing.assert_frame_equal(found, pd.read_csv(written))


def test_classes_are_read_off_the_names(cells):
    found = decided.by_class(cells)
    assert found["class"].unique().tolist() == ["A", "B"]
    assert found["videos"].unique().tolist() == [40]
    assert set(found["metric"]) == {"insertion"}


def test_the_scenes_that_a_difference_takes():
    """For sd 0.1 and a difference of 0.05, the textbook has 34 pairs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    x = 0.1 * (x - x.mean()) / x.std(ddof=1)
    videos = pd.Index([f"v_A_g{i}_c01" for i in range(400)], name="video")
    table = pd.DataFrame({"xrai": 0.5 + x, "step": 0.5}, videos)
    lone = PATCH._replace(unit="superpixel")
    cells = {PATCH: table, lone: table[["step"]]}  # the second has no pair
    (row,) = decided.power(cells).to_dict("records")
    assert (row["one"], row["other"], row["cells"]) == ("xrai", "step", 1)
    assert row["sd"] == row["scene_sd"] == 0.1
    assert row["for_0.05"] == 34
    assert row["told_by_60"] == pytest.approx(2.8016 * 0.1 / 60**0.5, abs=1e-4)


# -------------------------------------------------------------------- the real ones, and the pages


@pytest.fixture(scope="module")
def folder(real_data):
    place = real_data / "authors-scores"
    if not any(place.glob("*.csv")):
        pytest.fail(f"{real_data} holds no authors-scores")
    return place


@pytest.mark.real_data
@pytest.mark.parametrize("name", published.AUTHORS)
def test_tracked_tables_are_computed_from_the_authors_scores(folder, name):
    found, tracked = decided.TABLES[name](scores.read(folder)), published.authors(name)
    names = [c for c in found if not pd.api.types.is_float_dtype(found[c])]
    numbers = [c for c in found if c not in names]
    for column in names:
        told = (found[column].astype(str), tracked[column].fillna("").astype(str))
        assert told[0].tolist() == told[1].tolist()
    np.testing.assert_allclose(found[numbers], tracked[numbers], atol=1.5e-4, equal_nan=True)


@pytest.mark.real_data
def test_scores_have_all_videos_and_scenes(folder):
    cells = scores.read(folder)
    assert len(cells) == 14
    groups = {"ucf101-24": (910, 168), "epic-object": (500, 150), "something-v2": (1000, 1000)}
    for cell, table in cells.items():
        of_scene = scores.scenes(cell.dataset, table.index)
        assert (len(table), len(set(of_scene))) == groups[cell.dataset]
    assert len(set(scores.classes("ucf101-24", cells[PATCH].index))) == 24


# SPEC §12: dataset, model, unit, metric, α, and its interval over videos where that is printed
ALPHAS = """
ucf101-24 r2plus1d_18 patch insertion .369 .339 .400
ucf101-24 r2plus1d_18 superpixel insertion .364
epic-object r2plus1d_18 patch insertion .172 .136 .207
epic-object r2plus1d_18 superpixel insertion .130
something-v2 r2plus1d_18 patch insertion .303 .272 .334
something-v2 r2plus1d_18 superpixel insertion .228
ucf101-24 r50l patch insertion .091 .070 .115
ucf101-24 r50l superpixel insertion .067
epic-object r50l patch insertion .027 .017 .039
epic-object r50l superpixel insertion .017
something-v2 r50l patch insertion .017 .009 .027
something-v2 r50l superpixel insertion .015
ucf101-24 r2plus1d_18 patch deletion .079 .054 .107
ucf101-24 r2plus1d_18 superpixel deletion .093
"""
# SPEC §12: STEP minus, insertion, patch; the ends of an interval move with the seed
GAPS = """
ucf101-24 r2plus1d_18 score_cam .051 .039 .062
ucf101-24 r2plus1d_18 smoothgrad_squared .056 .047 .064
ucf101-24 r2plus1d_18 grad_cam .060 .048 .072
ucf101-24 r2plus1d_18 xrai .067 .055 .079
epic-object r2plus1d_18 grad_cam -.042 -.061 -.023
epic-object r2plus1d_18 score_cam -.040
epic-object r2plus1d_18 smoothgrad_squared .071
epic-object r2plus1d_18 xrai .019 .000 .038
something-v2 r2plus1d_18 score_cam -.162
something-v2 r2plus1d_18 grad_cam -.150 -.166 -.134
something-v2 r2plus1d_18 xrai -.107
something-v2 r2plus1d_18 excitation_backprop -.062
ucf101-24 r50l smoothgrad_squared -.001 -.019 .017
ucf101-24 r50l grad_cam .059
epic-object r50l guided_backprop -.055 -.073 -.038
something-v2 r50l score_cam -.051
epic-object r50l step_t0 -.002 -.010 .006
"""


def rows(text):
    return [line.split() for line in text.strip().splitlines()]


@pytest.mark.parametrize("row", rows(ALPHAS), ids=" ".join)
def test_alpha_is_the_known_one_to_the_printed_digits(row):
    where, numbers = row[:4], [float(x) for x in row[4:]]
    alpha = published.authors("reliability")
    found = alpha[alpha["form"] == "as printed"].set_index(["dataset", "model", "unit", "metric"])
    found = found.loc[tuple(where), ["mean", "low_videos", "high_videos"]]
    for known, number in zip(found, numbers, strict=False):
        assert known == pytest.approx(number, abs=0.00056)  # tables have four digits


@pytest.mark.parametrize("row", rows(GAPS), ids=" ".join)
def test_differences_are_the_known_ones(row):
    numbers = [float(x) for x in row[3:]]
    gaps = published.authors("differences")
    gaps = gaps[(gaps["metric"] == "insertion") & (gaps["unit"] == "patch")]
    found = gaps.set_index(["dataset", "model", "against"]).loc[tuple(row[:3])]
    assert found["mean"] == pytest.approx(numbers[0], abs=0.00056)
    # the digits, and the noise of a bootstrap of about a thousand samples
    noise = 0.0005 + 0.08 * (found["high"] - found["low"])
    assert found[["low", "high"]].tolist()[: len(numbers) - 1] == pytest.approx(
        numbers[1:], abs=noise
    )


@pytest.mark.real_data
def test_all_differences_are_those_of_another_computation(real_data):
    path = real_data.parent / "paper" / "authors_differences.csv"
    if not path.is_file():
        pytest.skip("the other computation is not on this machine")
    keys, known = ["dataset", "model", "unit", "against"], pd.read_csv(path)
    gaps = published.authors("differences")
    both = known.merge(gaps[gaps["metric"] == "insertion"], on=keys, suffixes=("_known", ""))
    assert len(both) == len(known) == len(gaps[gaps["metric"] == "insertion"])
    np.testing.assert_allclose(both["mean"], both["step_minus"], atol=1.01e-4)
    np.testing.assert_allclose(both["sd"], both["sd_known"], atol=1.01e-4)
    noise = 1e-4 + 0.08 * (both["high"] - both["low"])  # of about a thousand samples
    for end in ("low", "high"):
        assert ((both[end] - both[f"{end}_known"]).abs() < noise).all()
    assert both[["videos_known", "scenes_known"]].to_numpy().tolist() == (
        both[["videos", "scenes"]].to_numpy().tolist()
    )


def test_what_follows_from_the_differences():
    gaps = published.authors("differences")
    gaps = gaps[gaps["metric"] == "insertion"].set_index("against")
    above = {m: (gaps.loc[[m], "low"] > 0).sum() for m in scores.LENGTHS}
    assert above == {"step_t0": 11, "step_t5": 10, "step_t11": 11, "step_t14": 10}
    assert not (gaps.loc[scores.LENGTHS, "high"] < 0).any()
    ranks = published.authors("ranks")
    ranks = ranks[ranks["method"] == "step"].set_index(["dataset", "model"])["mean"].round(1)
    assert ranks[("ucf101-24", "r2plus1d_18")].tolist() == [2.0, 2.5]
    assert (ranks.drop(("ucf101-24", "r2plus1d_18")).agg(["min", "max"])).tolist() == [3.8, 5.3]


def test_three_means_are_not_those_that_the_paper_prints():
    means = published.authors("means")
    other = means[means["paper"].notna() & (means["agrees"].astype(str) != "True")]
    keys = ["dataset", "model", "unit", "method", "mean", "paper"]
    assert other[keys].to_numpy().tolist() == [
        ["ucf101-24", "r2plus1d_18", "patch", "blur_ig", 0.601, 0.62],
        ["ucf101-24", "r2plus1d_18", "patch", "step_t0", 0.7626, 0.761],
        ["epic-object", "r50l", "patch", "step_t0", 0.4573, 0.456],
    ]


def test_readme_and_claims_page_say_what_the_tables_say():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    first = readme[: readme.index("This is")]
    for sentence in claims.finding():
        assert f"- {sentence}" in first
    assert "(figures/authors.png)" in first
    page = (ROOT / "results" / "claims.md").read_text("utf-8")
    assert page.startswith(claims.page() + "\n\n")
    assert (ROOT / "figures" / "authors.png").is_file()


def test_every_claim_has_a_verdict_of_the_five():
    table = claims.page().split("\n\n")[2].splitlines()[2:]
    assert len(table) >= 12
    words = {"holds", "level", "does not hold", "undecided", "cannot be tested here"}
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == 4
        assert "§" in cells[0]
        told = set(re.findall(r"\*\*(.+?)\*\*", cells[2]))
        assert told
        assert told <= words


def test_a_page_of_runs_opens_with_the_authors_scores():
    row = {"claim": "c", "dataset": "d", "model": "m", "mean": 0.1, "low": 0.0, "high": 0.2}
    row |= {"profile": "quick", "unit": None, "against": None, "ratio": None, "verdict": "holds"}
    page = store.claims_page(pd.DataFrame([row]))
    assert page.index("by its own scores") < page.index("## Profile `quick`")
