import pytest
import torch

from stepkit import files as whole_files
from stepkit import sweep
from stepkit.attribution import attribute
from stepkit.data import Synthetic, batch
from stepkit.models import load_model


@pytest.fixture
def data():
    return Synthetic("object", n=4, frames=3, size=24)


@pytest.fixture
def model():
    return load_model("r2plus1d_narrow", 6)


def explain(method, model, data, out, **options):
    return sweep.explain(method, model, data, out, model_name="narrow", **options)


def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def test_one_file_per_clip_at_its_place(tmp_path, model, data):
    found = explain("gradient", model, data, tmp_path)
    assert found["maps"].shape == (4, 3, 24, 24)
    paths = sorted((tmp_path / "object" / "narrow" / "gradient").iterdir())
    assert [path.stem for path in paths] == data.ids
    shown = batch(data)
    expected = attribute("gradient", model, shown.clips, shown.targets)
    torch.testing.assert_close(found["maps"], expected)


def test_step_keeps_its_masks(tmp_path, model, data):
    found = explain("step", model, data, tmp_path, n=2, iterations=2, areas=(0.1, 0.3))
    assert found["masks"].shape == (2, 2, 3, 24, 24)
    assert found["probabilities"].shape == (2, 2)
    again = explain("step", model, data, tmp_path, n=2, iterations=2, areas=(0.1, 0.3))
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_one_clip_by_itself_and_what_it_cost(tmp_path, model, data, monkeypatch):
    where = {"model_name": "narrow", "i": 2}
    maps, cost = sweep.measure("gradient", model, data, tmp_path, **where)
    shown = batch(data, [2])
    torch.testing.assert_close(maps, attribute("gradient", model, shown.clips, shown.targets)[0])
    assert (cost["forward"], cost["backward"]) == (2, 2)  # one to try the model out
    assert cost["seconds"] > 0
    monkeypatch.setattr(sweep, "_make", lambda *a: pytest.fail("computed again"))
    again, same = sweep.measure("gradient", model, data, tmp_path, **where)
    assert torch.equal(maps, again)
    assert cost["seconds"] == pytest.approx(same["seconds"])


def test_a_rerun_computes_nothing(tmp_path, model, data, monkeypatch):
    first = explain("random", model, data, tmp_path)
    monkeypatch.setattr(sweep, "_make", lambda *a: pytest.fail("computed again"))
    assert torch.equal(first["maps"], explain("random", model, data, tmp_path)["maps"])


@pytest.mark.parametrize("change", ["option", "weights", "seed", "clip"])
def test_what_depends_on_something_else_is_made_anew(tmp_path, model, data, change):
    before = explain("grad_cam", model, data, tmp_path)["maps"]
    options = {"layer": "layer2"} if change == "option" else {}
    if change == "weights":
        model = load_model("r2plus1d_narrow", 6, seed=1)
    if change == "clip":
        data = Synthetic("object", n=4, frames=3, size=24, seed=9)
        data.ids = Synthetic("object", n=4, frames=3, size=24).ids
    made = []
    real = sweep._make
    sweep._make = lambda *a: made.append(1) or real(*a)
    try:
        seed = 1 if change == "seed" else 0
        after = explain("grad_cam", model, data, tmp_path, seed=seed, **options)["maps"]
    finally:
        sweep._make = real
    assert made
    assert torch.equal(before, after) == (change == "seed")  # Grad-CAM draws no random numbers


def test_a_killed_sweep_resumes_to_the_same_bytes(tmp_path, model, data):
    explain("random", model, data, tmp_path / "whole", batch_size=1)
    calls, real = [], sweep._make

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    sweep._make = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            explain("random", model, data, tmp_path / "killed", batch_size=1)
    finally:
        sweep._make = real
    assert len(files(tmp_path / "killed")) == 2
    explain("random", model, data, tmp_path / "killed", batch_size=3)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert not list(tmp_path.rglob("*.part"))


def test_a_truncated_file_is_made_again(tmp_path, model, data):
    before = explain("gradient", model, data, tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    after = explain("gradient", model, data, tmp_path)
    assert torch.equal(before["maps"], after["maps"])


def test_a_failed_write_leaves_nothing_behind(tmp_path, model, data, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        explain("gradient", model, data, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
