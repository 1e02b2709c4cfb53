"""What the notebooks share: found again where it was made, and as the library says by itself."""

import json
import pickle
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import stepkit as sk
from stepkit import metrics, stats
from stepkit.data.sample import balanced
from stepkit.study import PAPER_METHODS, Study, evidence_map, options
from stepkit.training import QUICK

DATASET, MODEL = "appearance", "r2plus1d_narrow"
CHEAP = {"random": {}, "gradient": {}, "grad_cam": {}}


@pytest.fixture
def study(tmp_path):
    return Study([MODEL], [DATASET], CHEAP, ["auc", "located"], str(tmp_path), clips=2)


@pytest.fixture
def nothing_new(monkeypatch):
    """Call it, and whatever would be computed again fails."""

    def forbid():
        monkeypatch.setattr(sk.store, "_make", lambda *a: pytest.fail("explained again"))
        for part in (metrics.curves, "watch"), (metrics.pointing, "_pointed"):
            monkeypatch.setattr(*part, lambda *a, **k: pytest.fail("scored again"))

    return forbid


def test_options_are_the_papers_eleven_with_step_and_points_set():
    found = options([], "fast", 7)
    assert list(found) == PAPER_METHODS
    assert found["step"] == {"preset": "fast", "removal": "blur"}
    assert found["smoothgrad"] == {"samples": 7}
    assert found["blur_ig"] == found["xrai"] == {"steps": 7}
    assert options(["rise", "gradient"], "fast", 7) == {"rise": {}, "gradient": {}}


class Listed:
    """A list on disk as benchmarks have them: sorted by class."""

    def __init__(self, *counts):
        self.classes = range(len(counts))
        self.targets = [c for c, count in enumerate(counts) for _ in range(count)]


def test_clips_are_drawn_from_all_classes_in_turn_by_seed():
    listed = Listed(*[38] * 20, *[37] * 3, 39)  # 910 clips of 24 classes, as UCF101-24's test list
    drawn = balanced(listed, 96)
    targets = torch.tensor(listed.targets)[drawn]
    assert targets.bincount(minlength=24).tolist() == [4] * 24
    assert targets.view(4, 24).eq(targets[:24]).all()  # in turn
    assert len(set(drawn)) == 96
    assert drawn == balanced(listed, 96) != balanced(listed, 96, seed=1)
    assert drawn[:30] == balanced(listed, 30)
    assert sorted(balanced(listed, 910)) == sorted(balanced(listed, 5000)) == list(range(910))
    few = torch.tensor(Listed(1, 5, 2).targets)[balanced(Listed(1, 5, 2), 6)]
    assert few.bincount().tolist() == [1, 3, 2]  # a class that has no more is passed over


def test_of_generated_clips_the_first_are_taken():
    assert balanced(sk.data.Synthetic(DATASET, n=40), 15, seed=3) == list(range(15))


def test_batch_maps_scores_and_sweep_are_of_the_same_clips_of_all_classes(tmp_path):
    for label in "abc":
        for i in range(4):
            folder = tmp_path / "clips" / "test" / label / f"{label}{i}"
            folder.mkdir(parents=True)
            for t in range(3):
                noise = np.random.default_rng((i, t)).integers(0, 256, (24, 24, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{t}.png")
    untrained, data = sk.load_model(MODEL, 3), {"data": str(tmp_path / "clips"), "frames": 3}
    study = Study({MODEL: untrained}, ["folder"], out=str(tmp_path), clips=6, size=24, **data)
    shown = study.batch()
    assert shown.targets.bincount().tolist() == [2, 2, 2]
    maps = study.maps("gradient")["maps"]
    expected = sk.attribute("gradient", untrained, shown.clips, shown.targets)
    torch.testing.assert_close(maps, expected)
    assert study.score("located", methods=["gradient"])["clip"].tolist() == shown.ids


# --------------------------------------------------------------------------------- scores, tables


def test_scores_are_those_of_the_library_and_found_again(study, nothing_new):
    words = {"unit": "patch", "steps": 4, "patch": 12}
    found = study.measure("auc", "grad_cam", **words)
    shown, network = study.batch(), study.network()
    maps = study.maps("grad_cam")["maps"]
    for kind, function in (("insertion", sk.insertion), ("deletion", sk.deletion)):
        expected = function(
            network, shown.clips, maps, shown.targets, baseline=study.mean_colour(), **words
        )
        torch.testing.assert_close(found[f"{kind} curve"], expected.curve, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[kind], expected.auc, rtol=0, atol=1e-5)
    nothing_new()
    again = study.measure("auc", "grad_cam", **words)
    assert all(again[name].equal(found[name]) for name in found)


def test_scores_of_other_settings_are_made_anew(study):
    first, longer = (study.measure("auc", "gradient", steps=n, patch=12) for n in (4, 8))
    assert first["insertion curve"].shape[1] == 5
    assert longer["insertion curve"].shape[1] == 9


def test_a_row_of_scores_per_dataset_model_option_method_and_clip(study):
    words = {"over": {"unit": ["patch", "superpixel"]}, "steps": 3, "patch": 12}
    table = study.score("auc", **words)
    columns = {"dataset", "model", "unit", "method", "clip", "insertion", "deletion"}
    assert set(table) == columns
    assert len(table) == 2 * 3 * 2
    assert table[["insertion", "deletion"]].stack().between(0, 1).all()
    by = ["dataset", "model", "unit", "method"]
    found = study.table("auc", "deletion", **words)
    pd.testing.assert_frame_equal(found, stats.intervals(table, "deletion", by))
    assert len(study.kept("auc")) == len(table)


def test_options_of_methods_and_metrics_belong_to_the_study(tmp_path):
    methods = {"random": {}, "few": ("smoothgrad", {"samples": 2})}
    auc = {"auc": {"steps": 3, "baseline": "fade"}}
    study = Study([MODEL], [DATASET], methods, auc, str(tmp_path), clips=2)
    shown, network = study.batch(), study.network()
    maps = study.maps("few")["maps"]
    seeds = [sk.store.clip_seed(0, clip_id) for clip_id in shown.ids]
    given = network, shown.clips, shown.targets
    torch.testing.assert_close(maps, sk.attribute("smoothgrad", *given, samples=2, seed=seeds))
    table = study.score().set_index("method")
    expected = sk.insertion(network, shown.clips, maps, shown.targets, steps=3).auc
    assert table.loc["few", "insertion"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert study.maps("few", samples=1)["maps"].ne(maps).any()


def test_located_scores_are_those_of_the_library(study):
    table = study.score("located").set_index(["method", "clip"])
    shown, maps = study.batch(), study.maps("grad_cam")["maps"]
    ours = table.loc["grad_cam"].loc[shown.ids]
    assert ours["mass"].tolist() == pytest.approx(
        metrics.relevance_mass(maps, shown.masks).tolist()
    )
    assert ours["iou"].tolist() == pytest.approx(metrics.iou(maps, shown.masks).tolist())
    found = metrics.pointing_game(maps, shown.boxes)
    assert ours["hit"].tolist() == pytest.approx(found.by_clip.tolist())
    assert ours["boxed"].tolist() == found.boxed.float().mean(1).tolist()


def test_the_smallest_mask_beside_the_whole_clip(study):
    step = {"step": {"preset": "fast", "iterations": 12}}
    table = study.score("smallest_mask", methods=step)
    assert len(table) == 2
    assert (table["higher"] == (table["Φ smallest mask"] > table["Φ clip"])).all()
    assert table[["on evidence", "chance"]].stack().between(0, 1).all()
    phi = study.maps(step)["probabilities"][:, 0]
    assert table["Φ smallest mask"].tolist() == pytest.approx(phi.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="smallest_mask: what gradient finds: got 'masks'"):
        study.score("smallest_mask", methods=["gradient"])


def test_a_gallery_has_what_each_method_cost_or_why_it_refused(tmp_path, nothing_new):
    where = "r50l_narrow", DATASET
    study = Study(*where, ["gradient", "cam"], out=str(tmp_path), clips=2)
    maps, table = study.gallery(*where, i=1)
    assert list(maps) == [next(name for name in maps if name.startswith("Gradient\n"))]
    assert table.loc["gradient", "backward"] == 1
    assert table.loc["cam", "refused"].startswith("cam: ")
    nothing_new()
    again, _ = Study(*where, ["gradient"], out=str(tmp_path), clips=2).gallery(*where, i=1)
    assert all(again[name].equal(maps[name]) for name in maps)


def test_sets_of_options_with_a_name_are_kept_apart(study, nothing_new):
    usual, other = {"smoothgrad": {"samples": 2}}, {"more": ("smoothgrad", {"samples": 3})}
    first, second = (study.maps(each)["maps"] for each in (usual, other))
    assert not first.equal(second)
    places = {path.parent.name for path in study.folder.glob("maps/**/*.safetensors")}
    assert places == {"smoothgrad", "smoothgrad@more"}
    nothing_new()
    assert study.maps(usual)["maps"].equal(first)
    assert study.maps(other)["maps"].equal(second)


# -------------------------------------------------------------------------------- runs, their files


def test_runs_with_other_settings_are_not_in_each_others_way(tmp_path):
    made, read = [], []
    for clips in (2, 3):
        study = Study([MODEL], [DATASET], ["random"], out=str(tmp_path), clips=clips)
        made.append(study.score("located"))
        study.figure("one", sk.show(torch.zeros(3, 2, 16, 16)))
    for clips in (2, 3):
        study = Study([MODEL], [DATASET], ["random"], out=str(tmp_path), clips=clips)
        read.append(study.kept("located"))
        settings = json.loads((tmp_path / "scores" / study.key / "settings.json").read_text())
        assert settings["clips"] == clips
        assert (tmp_path / "figures" / study.key / "one.png").is_file()
    assert [len(table) for table in read] == [len(table) for table in made] == [2, 3]
    other = Study([MODEL], [DATASET], ["gradient"], out=str(tmp_path), clips=2)
    with pytest.raises(ValueError, match=r"kept: got no .*located\.csv"):
        other.kept("located")
    assert len(other.kept("located", any_settings=True)) == 3  # the newest


def test_what_changes_no_result_is_no_setting(tmp_path):
    def key(**given):
        return Study([MODEL], [DATASET], **given).key

    assert key(out=str(tmp_path), progress=True, device="cpu") == key()
    network = sk.load_model(MODEL, 6)
    keys = {key(), key(seed=1), key(methods=["step"]), key(methods={"step": {"preset": "fast"}})}
    keys |= {Study({"a": network}).key, Study({"a": sk.load_model(MODEL, 6, seed=1)}).key}
    assert len(keys) == 6


def test_the_clip_to_draw_has_a_box_in_every_frame(study, monkeypatch):
    assert study.example() == 1
    box, none = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.zeros(0, 4)
    for boxes, expected in (
        ([[], [box, none], [box, box], [none, none], [box, box]], 4),
        ([[], [box, none], [box, box]], 0),
        ([[], []], 0),
    ):
        given = replace(study.batch(), boxes=boxes)
        monkeypatch.setattr(study, "batch", lambda _, given=given: given)
        assert study.example() == expected
        monkeypatch.undo()


def test_retraining_is_that_of_the_library_and_knows_the_evidence(tmp_path):
    study = Study(MODEL, DATASET, "random", out=str(tmp_path), frames=4, size=32, clips=12)
    recipe = replace(QUICK, epochs=1, removal_share=0.0)
    counts = {"train": 12, "val": 6, "test": 6}
    trials = study.retrained(counts, recipe, ratios=(0.1,))
    assert trials.groupby("method", sort=False).size().to_dict() == {"evidence": 6, "random": 6}
    assert study.kept("retrained")["correct"].tolist() == trials["correct"].tolist()


def test_the_map_of_the_evidence_ranks_its_pixels_first_and_then_what_is_near(study):
    shown = study.batch()
    ideal = evidence_map(shown)
    assert (ideal[shown.masks] == 1).all()
    assert ideal[~shown.masks].max() < 1
    near = torch.nn.functional.max_pool2d(shown.masks.float(), 3, 1, 1).bool() & ~shown.masks
    assert ideal[near].min() > ideal[:, :, 0, 0].max()


def test_a_sweep_makes_what_maps_then_finds(study, nothing_new):
    table = study.sweep("threads", {"gradient": {}, "few": ("smoothgrad", {"samples": 2})})
    assert table["status"].tolist() == ["done"] * 4
    assert table["clip"].tolist() == study.batch().ids * 2
    nothing_new()
    assert len(study.maps("gradient")["maps"]) == 2
    assert len(study.maps({"few": ("smoothgrad", {"samples": 2})})["maps"]) == 2


def test_a_figure_is_written_twice_alike_and_says_what_made_it(study):
    names = ["settings.json", "one.png", "one.svg"]
    written = []
    for _ in range(2):
        study.figure("one", sk.show(torch.zeros(3, 2, 16, 16)))
        place = study.folder / "figures" / study.key
        written.append([(place / name).read_bytes() for name in names])
    assert written[0] == written[1]
    made = json.loads(written[0][0])
    assert made["methods"] == {"random": ["random", {}]} | {m: [m, {}] for m in CHEAP}
    assert made["clips"] == 2
    assert {"stepkit", "torch", "matplotlib"} < made.keys()
    assert str(study.folder) not in written[0][0].decode()


def test_claims_of_all_notebooks_in_one_table(study):
    with pytest.raises(ValueError, match="notebooks 03 to 06"):
        study.claims()
    rows = {"claim": ["c"], "mean": [1.0], "low": [0.5], "high": [1.5], "verdict": ["holds"]}
    other = replace(study, seed=1)
    study.keep(pd.DataFrame(rows), "claims_04")
    other.keep(pd.DataFrame(rows).assign(dataset="d"), "claims_03")
    other.keep(pd.DataFrame(rows).assign(dataset="e"), "claims_04")
    found = study.claims()
    assert found["notebook"].tolist() == ["03", "04"]
    assert found["dataset"].isna().tolist() == [False, True]  # its own, where there is one
    assert len(study.kept("claims")) == 2
    with pytest.raises(ValueError, match=r"kept: got no .*none\.csv"):
        study.kept("none")


# ------------------------------------------------------------------------------- things of one's


class Brightest(nn.Module):
    """Knows the class of a clip by its mean colour."""

    def forward(self, clips):
        return clips.mean((2, 3, 4))


def brightness(model, clips, targets, work):
    return clips.mean(1)


def spread(model, batch, maps, *, power=1):
    """How far a map varies; more axes than (N,) stand in no table."""
    return {"spread": maps.flatten(1).std(1) ** power, "frames": maps.mean((2, 3))}


def made_here(n=4):
    draw = torch.Generator().manual_seed(1)
    clips = torch.randn(n, 3, 4, 16, 16, generator=draw)
    return [sk.data.Sample(clip, i % 3, f"mine {i}", []) for i, clip in enumerate(clips)]


def test_four_objects_of_ones_own_stand_beside_the_librarys(tmp_path):
    study = Study(
        models=[Brightest()],
        datasets={"mine": made_here()},
        methods=[brightness, "gradient", "random"],
        metrics=[spread, "auc"],
        out=str(tmp_path),
        clips=3,
    )
    table = study.table(spread)
    assert list(table.index.names) == ["dataset", "model", "method"]
    assert table.loc[("mine", "Brightest")].index.tolist() == ["brightness", "gradient", "random"]
    assert (table["n"] == 3).all()
    assert (table["low"] < table["high"]).drop("gradient", level="method").all()
    expected = study.batch().clips.mean(1).flatten(1).std(1)
    row = study.score(spread, power=2).set_index("method").loc["brightness", "spread"]
    assert row.tolist() == pytest.approx((expected**2).tolist(), abs=1e-6)
    assert study.measure(spread, brightness)["frames"].shape == (3, 4)
    scores = study.score("auc", steps=3)
    gaps = stats.differences(scores, "insertion", ["dataset", "model"], "brightness")
    assert gaps.index.get_level_values("method").tolist() == ["gradient", "random"]
    assert study.kept("spread")["method"].nunique() == 3
    maps, costs = study.gallery("Brightest", "mine", i=0)
    assert next(iter(maps)).startswith("brightness\n")
    assert (costs["refused"] == "").all()


def test_names_and_objects_may_be_mixed_and_the_odd_pair_is_refused(tmp_path):
    known = {"mine": sk.load_model(MODEL, 6), MODEL: MODEL}
    study = Study(known, [DATASET], "random", out=str(tmp_path), clips=2)
    assert study.score("located")["model"].unique().tolist() == ["mine", MODEL]
    study = Study([MODEL], {"mine": made_here()}, "random", out=str(tmp_path))
    with pytest.raises(ValueError, match="models: got dataset 'mine', which has no part 'train'"):
        study.score("located")
    with pytest.raises(ValueError, match="names: got 'Brightest' twice"):
        Study([Brightest(), Brightest()])


MODULE = """
import stepkit as sk

@sk.method("by_extra", label="Mine")
def run(model, clips, targets, work, *, times=1):
    return clips.sum(1) * times

@sk.metric("peak", columns=("peak",))
def peak(model, batch, maps):
    return {"peak": maps.amax((1, 2, 3))}
"""


def test_a_module_of_ones_own_gives_names(tmp_path, monkeypatch):
    (tmp_path / "extra_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"methods": {"by_extra": {"times": 2}, "gradient": {}, "random": {}}, "metrics": "peak"}
    given = {"out": str(tmp_path), "extra": "extra_of_a_test", "clips": 3}
    study = Study({"own": Brightest()}, {"mine": made_here()}, **names, **given)
    scores = study.score().set_index("method")
    expected = 2 * study.batch().clips.sum(1).amax((1, 2, 3))
    assert scores.loc["by_extra", "peak"].tolist() == pytest.approx(expected.tolist())
    by = ["dataset", "model"]
    alpha = metrics.reliability_table(scores.reset_index(), by)
    assert alpha.index.tolist() == [("mine", "own", "peak")]
    del metrics.METRICS["peak"], sys.modules["extra_of_a_test"]  # as in a new process
    again = pickle.loads(pickle.dumps(study))
    assert again.made == {}
    assert again.key == study.key
    assert again.score()["peak"].tolist() == scores["peak"].tolist()
    with pytest.raises(ValueError, match="extra: got 'no_such_module'"):
        Study(extra="no_such_module")
