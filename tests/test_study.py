"""What the notebooks share: found again where it was made, and as the library says by itself."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import stepkit as sk
from stepkit import metrics
from stepkit.data.sample import balanced
from stepkit.study import PAPER_METHODS, Experiment, evidence_map, options
from stepkit.training import QUICK

DATASET, MODEL = "appearance", "r2plus1d_narrow"
CHEAP = {"random": {}, "gradient": {}, "grad_cam": {}}


@pytest.fixture
def run(tmp_path):
    return Experiment(str(tmp_path), clips=2)


@pytest.fixture
def nothing_new(monkeypatch):
    """Call it, and whatever would be computed again fails."""

    def forbid():
        monkeypatch.setattr(sk.sweep, "_make", lambda *a: pytest.fail("explained again"))
        monkeypatch.setattr(metrics, "auc_metrics", lambda *a, **k: pytest.fail("scored again"))

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
    data = {"data": str(tmp_path / "clips"), "frames": 3, "size": 24}
    run = Experiment(str(tmp_path / "run"), clips=6, **data)
    untrained = sk.load_model(MODEL, 3)
    run._models[MODEL, "folder"] = untrained, None, None
    shown = run.batch("folder")
    assert shown.targets.bincount().tolist() == [2, 2, 2]
    maps = run.explain("gradient", MODEL, "folder")["maps"]
    expected = sk.attribute("gradient", untrained, shown.clips, shown.targets)
    torch.testing.assert_close(maps, expected)
    assert run.located({"gradient": {}}, [MODEL], ["folder"])["clip"].tolist() == shown.ids


def test_curves_are_those_of_the_library_and_found_again(run, nothing_new):
    words = {"unit": "patch", "steps": 4, "patch": 12}
    found = run.curves(CHEAP, MODEL, DATASET, **words)
    shown, network = run.batch(DATASET), run.fit(MODEL, DATASET)[0]
    maps = run.explain("grad_cam", MODEL, DATASET)["maps"]
    for kind, function in (("insertion", sk.insertion), ("deletion", sk.deletion)):
        expected = function(
            network, shown.clips, maps, shown.targets, baseline=run.mean_colour(DATASET), **words
        )
        torch.testing.assert_close(found["grad_cam"][kind], expected.curve, rtol=0, atol=1e-5)
    nothing_new()
    again = run.curves(CHEAP, MODEL, DATASET, **words)
    assert all(again[m][kind].equal(found[m][kind]) for m in CHEAP for kind in found[m])


def test_curves_of_other_settings_are_made_anew(run):
    first = run.curves({"gradient": {}}, MODEL, DATASET, steps=4, patch=12)
    longer = run.curves({"gradient": {}}, MODEL, DATASET, steps=8, patch=12)
    assert (first["gradient"]["insertion"].shape[1], longer["gradient"]["insertion"].shape[1]) == (
        5,
        9,
    )


def test_a_row_of_scores_per_dataset_model_unit_method_and_clip(run):
    table = run.auc(CHEAP, [MODEL], [DATASET], ("patch", "superpixel"), steps=3, patch=12)
    columns = {"dataset", "model", "unit", "method", "clip", "insertion", "deletion"}
    assert set(table) == columns
    assert len(table) == 2 * 3 * 2
    assert table[["insertion", "deletion"]].stack().between(0, 1).all()
    assert (run.folder / "scores" / "auc.csv").is_file()


def test_located_scores_are_those_of_the_library(run):
    table = run.located(CHEAP, [MODEL], [DATASET]).set_index(["method", "clip"])
    shown = run.batch(DATASET)
    maps = run.explain("grad_cam", MODEL, DATASET)["maps"]
    ours = table.loc["grad_cam"].loc[shown.ids]
    assert ours["mass"].tolist() == pytest.approx(
        metrics.relevance_mass(maps, shown.masks).tolist()
    )
    assert ours["iou"].tolist() == pytest.approx(metrics.iou(maps, shown.masks).tolist())
    hits = metrics.pointing_game(maps, shown.boxes).by_clip
    assert ours["hit"].tolist() == pytest.approx(hits.tolist())


def test_the_smallest_mask_beside_the_whole_clip(run):
    table = run.smallest_masks([MODEL], [DATASET], {"preset": "fast", "iterations": 12})
    assert len(table) == 2
    assert (table["higher"] == (table["Φ smallest mask"] > table["Φ clip"])).all()
    assert table[["on evidence", "chance"]].stack().between(0, 1).all()


def test_a_gallery_has_what_each_method_cost_or_why_it_refused(run, nothing_new):
    wanted = {"gradient": {}, "cam": {}}
    maps, table = run.gallery(wanted, "r50l_narrow", DATASET, i=1)
    assert list(maps) == [next(name for name in maps if name.startswith("Gradient\n"))]
    assert table.loc["gradient", "backward"] == 1
    assert table.loc["cam", "refused"].startswith("cam: ")
    nothing_new()
    again, _ = run.gallery({"gradient": {}}, "r50l_narrow", DATASET, i=1)
    assert all(again[name].equal(maps[name]) for name in maps)


def test_sets_of_options_with_a_name_are_kept_apart(run, nothing_new):
    few = {"iterations": 2, "areas": (0.1,)}
    first = run.explain("step", MODEL, DATASET, **few)
    other = run.explain("step@one frame", MODEL, DATASET, kernel_length=1, **few)
    nothing_new()
    assert run.explain("step", MODEL, DATASET, **few)["maps"].equal(first["maps"])
    again = run.explain("step@one frame", MODEL, DATASET, kernel_length=1, **few)
    assert again["maps"].equal(other["maps"])


def test_the_clip_to_draw_has_a_box_in_every_frame(run, monkeypatch):
    assert run.example(DATASET) == 1
    box, none = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.zeros(0, 4)
    for boxes, expected in (
        ([[], [box, none], [box, box], [none, none], [box, box]], 4),
        ([[], [box, none], [box, box]], 0),
        ([[], []], 0),
    ):
        given = replace(run.batch(DATASET), boxes=boxes)
        monkeypatch.setattr(run, "batch", lambda _, given=given: given)
        assert run.example(DATASET) == expected
        monkeypatch.undo()


def test_retraining_is_that_of_the_library_and_knows_the_evidence(tmp_path):
    run = Experiment(str(tmp_path), frames=4, size=32, clips=12)
    recipe = replace(QUICK, epochs=1, removal_share=0.0)
    counts = {"train": 12, "val": 6, "test": 6}
    trials = run.retrained({"random": {}}, [MODEL], [DATASET], counts, recipe, ratios=(0.1,))
    assert trials.groupby("method", sort=False).size().to_dict() == {"evidence": 6, "random": 6}
    assert run.table("retrained")["correct"].tolist() == trials["correct"].tolist()


def test_the_map_of_the_evidence_ranks_its_pixels_first_and_then_what_is_near(run):
    shown = run.batch(DATASET)
    ideal = evidence_map(shown)
    assert (ideal[shown.masks] == 1).all()
    assert ideal[~shown.masks].max() < 1
    near = torch.nn.functional.max_pool2d(shown.masks.float(), 3, 1, 1).bool() & ~shown.masks
    assert ideal[near].min() > ideal[:, :, 0, 0].max()


def test_a_sweep_makes_what_explain_then_finds(run, nothing_new):
    table = run.sweep({"gradient": {}}, [MODEL], [DATASET], "threads")
    assert table["status"].tolist() == ["done"] * 2
    assert table["clip"].tolist() == run.batch(DATASET).ids
    nothing_new()
    assert len(run.explain("gradient", MODEL, DATASET)["maps"]) == 2


def test_a_figure_is_written_twice_alike_and_says_what_made_it(run):
    names = [f"one.{kind}" for kind in ("json", "png", "svg")]
    written = []
    for _ in range(2):
        run.figure("one", sk.show(torch.zeros(3, 2, 16, 16)), "nothing", preset="fast")
        written.append([(run.folder / "figures" / name).read_bytes() for name in names])
    assert written[0] == written[1]
    made = json.loads(written[0][0])
    assert made["about"] == "nothing"
    assert made["run"]["preset"] == "fast"
    assert made["run"]["clips"] == 2
    assert str(run.folder) not in written[0][0].decode()


def test_claims_of_all_notebooks_in_one_table(run):
    with pytest.raises(ValueError, match="notebooks 03 to 06"):
        run.claims()
    rows = {"claim": ["c"], "mean": [1.0], "low": [0.5], "high": [1.5], "verdict": ["holds"]}
    run.keep(pd.DataFrame(rows), "claims_04")
    run.keep(pd.DataFrame(rows).assign(dataset="d"), "claims_03")
    found = run.claims()
    assert found["notebook"].tolist() == ["03", "04"]
    assert found["verdict"].tolist() == ["holds", "holds"]
    assert len(run.table("claims")) == 2
    with pytest.raises(ValueError, match=r"table: got no .*none\.csv"):
        run.table("none")
