"""Profile `paper`: its parameters, where its networks start, a run on tiny copies of its data."""

import json

import layouts
import pandas as pd
import pytest
import torch
from torchvision.models import _api, resnet50
from torchvision.models.video import r2plus1d_18

from stepkit import _files, training
from stepkit.__main__ import main
from stepkit.data import load_dataset
from stepkit.reproduce import ROOT, plan, read_profile
from stepkit.study import UNPERTURBED, Study
from stepkit.training import PAPER, fit, quick

DATASETS = ["ucf101-24", "epic-object", "something-v2"]
# a few minutes instead of weeks: everything that costs time is as small as it can be
TINY = [
    *("models=[r2plus1d_narrow]", "frames=4", "size=32", "clips=3", "preset=fast", "epochs=1"),
    *("points=2", "steps=4", "units=[patch]", "lengths=[0,5]", "step={iterations: 2}"),
    *("counts=[6,3,6]", "ratios=[0.1]", "seeds=[0]", "methods=[random,gradient,step]"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return layouts.write(tmp_path_factory.mktemp("data"))


def test_all_notebooks_share_data_networks_and_recipe(tmp_path):
    jobs = plan(ROOT, read_profile(ROOT, "paper"), [], {}, tmp_path, tmp_path)
    assert [job.notebook.name[:2] for job in jobs] == [f"{n:02d}" for n in range(1, 9)]
    for job in jobs:
        given = job.parameters
        assert (given["frames"], given["size"], given["data"]) == (16, 112, str(tmp_path))
        assert given["recipe"] == jobs[0].parameters["recipe"]  # or the folder of 01 is refused
    recipe = jobs[0].parameters["recipe"]
    assert recipe["like"] == "paper"
    assert recipe["weights"] == {"r2plus1d_18": "KINETICS400_V1", "r50l": "IMAGENET1K_V1"}
    assert {"epochs", "batch_size"}.isdisjoint(recipe)  # the paper's own


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("model", "weights", "source"),
    [("r2plus1d_18", "KINETICS400_V1", r2plus1d_18), ("r50l", "IMAGENET1K_V1", resnet50)],
)
def test_the_papers_recipe_starts_from_torchvisions_weights(
    model, weights, source, data, tmp_path, monkeypatch
):
    torch.manual_seed(5)
    published = source().state_dict()
    asked = []
    monkeypatch.setattr(
        _api, "load_state_dict_from_url", lambda url, **_: asked.append(url) or published
    )
    started = {}

    def stop(network, dataset, validation, out, recipe, **options):
        started.update(network=network, recipe=recipe, split=(dataset.split, validation.split))
        raise StoppedError

    monkeypatch.setattr(training, "train", stop)
    given = {"data": str(data), "frames": 4, "size": 32, "device": "cpu"}
    recipe = {"like": "paper", "weights": {model: weights}}
    study = Study(out=str(tmp_path), recipe=recipe, **given)
    with pytest.raises(StoppedError):
        study.fit(model, "ucf101-24")
    found = started["network"].state_dict()
    kept = [key for key in found if key.removeprefix("cnn.") in published and "fc." not in key]
    assert len(kept) > 100
    assert all(found[key].equal(published[key.removeprefix("cnn.")]) for key in kept)
    assert len(asked) == 1
    expected = (40, 48, 3, "sgd", 1e-3, 20, 0.0, weights)
    recipe = started["recipe"]
    assert (
        *(recipe.epochs, recipe.batch_size, recipe.clips_per_video, recipe.optimiser),
        *(recipe.learning_rate, recipe.step_epochs, recipe.removal_share, recipe.start),
    ) == expected


def test_a_recipe_may_start_from_a_file_and_another_start_is_another_training(data, tmp_path):
    sets = [
        load_dataset("ucf101-24", split, frames=4, size=32, data=str(data))
        for split in ("train", "val")
    ]
    file = tmp_path / "start.safetensors"
    training.save_model(training.load_model("r2plus1d_narrow", 3, seed=9), file)
    still = training.replace(PAPER, epochs=1, learning_rate=0.0, start=str(file))
    network, _, origin = fit("r2plus1d_narrow", *sets, tmp_path / "run", still)
    expected = training.load_model("r2plus1d_narrow", 3, seed=9)
    assert origin == "trained here"
    for name, value in network.named_parameters():
        assert value.equal(expected.get_parameter(name))
    other, _, _ = fit("r2plus1d_narrow", *sets, tmp_path / "run", training.replace(still, start=""))
    assert not any(
        value.equal(expected.get_parameter(name))
        for name, value in other.named_parameters()
        if value.ndim > 1
    )
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_the_quick_recipe_starts_from_a_checkpoint_that_travels():
    start = quick("r50l_narrow", "motion").start
    assert (training.WEIGHTS / f"{start}.safetensors").is_file()


def test_by_the_papers_recipe_no_model_saw_removal(data, tmp_path):
    given = {"data": str(data), "frames": 4, "size": 32, "device": "cpu"}
    recipe = {"like": "paper", "epochs": 1, "batch_size": 6}
    study = Study(out=str(tmp_path), recipe=recipe, **given)
    twin = study.fit("r2plus1d_narrow" + UNPERTURBED, "ucf101-24")
    assert twin is study.fit("r2plus1d_narrow", "ucf101-24")
    for recipe, argument in (({"like": "papers"}, "like"), ({"epoch": 3}, "recipe")):
        with pytest.raises(ValueError, match=f"^{argument}: got"):
            Study(recipe=recipe, **given).fit("r2plus1d_narrow", "ucf101-24")


def _scores(folder, name):
    return next(folder.glob(f"scores/*/{name}.csv"))


@pytest.mark.timeout(900)
def test_a_run_to_its_end_on_tiny_copies_of_all_three_datasets(data, tmp_path):
    start = tmp_path / "start.safetensors"
    training.save_model(training.load_model("r2plus1d_narrow", 3, seed=9), start)
    recipe = {"like": "paper", "epochs": 1, "batch_size": 4}
    recipe["weights"] = {"r2plus1d_narrow": str(start)}
    where = ["--data", str(data), "--out", str(tmp_path / "runs")]
    given = ["--set", *TINY, f"recipe={json.dumps(recipe)}"]
    assert main(["reproduce", "--profile", "paper", *where, *given]) == 0

    folder = tmp_path / "runs" / "paper"
    assert len(list(folder.glob("notebooks-*/0?_*.ipynb"))) == 8
    scores = pd.read_csv(_scores(folder, "auc"), dtype={"clip": str})
    assert scores["dataset"].unique().tolist() == DATASETS
    for name, part in scores.groupby("dataset"):
        test = load_dataset(name, "test", frames=4, size=32, data=str(data))
        classes = [test.targets[test.ids.index(clip)] for clip in part["clip"].unique()]
        assert sorted(classes) == [0, 1, 2]  # three clips, one of each class
    hits = pd.read_csv(_scores(folder, "located")).groupby("dataset")["hit"].count()
    assert (hits[DATASETS[:2]] > 0).all()
    assert hits["something-v2"] == 0  # no boxes, and no notebook minds
    (trained,) = folder.glob("models/r2plus1d_narrow_ucf101-24/*/model.safetensors")
    made = json.loads(_files.read(trained)[0])
    assert (made["optimiser"], made["clips_per_video"]) == ("sgd", 3)
    retrained = pd.read_csv(_scores(folder, "retrained"))
    assert retrained["dataset"].unique().tolist() == ["ucf101-24"]
    assert set(retrained["method"]) == {"evidence", "random", "gradient", "step"}
    (page,) = folder.glob("report-*.html")
    assert "claims" in page.read_text("utf-8")
