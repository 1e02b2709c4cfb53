"""A method of one's own, beside the others: registered by one decorator, or a bare function."""

from functools import partial

import pandas as pd
import pytest
import torch
from test_models import Watched

import stepkit as sk
from stepkit import store
from stepkit.attribution import METHODS


def clips(n=3):
    return torch.randn(n, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def noisy(model, clips, targets, work, *, samples=2, spread: float = 0.5):
    """Mean |gradient| at copies with noise, every option by its default."""
    assert len(clips) == len(targets) == len(work.seeds) <= work.batch_size
    maps = torch.zeros_like(clips[:, 0])
    draws = [torch.Generator().manual_seed(seed) for seed in work.seeds]
    for _ in work.bar(range(samples), desc="noisy"):
        noise = torch.stack([torch.randn(clips.shape[1:], generator=draw) for draw in draws])
        x = (clips + spread * noise).requires_grad_()
        (slope,) = torch.autograd.grad(work.score(model(x), targets).sum(), x)
        maps += slope.abs().mean(1) / samples
    return maps


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setattr(METHODS, "data", dict(METHODS))
    facts = {"label": "Mine", "source": "me", "needs_gradient": True}
    assert sk.method("mine", **facts)(noisy) is noisy
    return "mine"


def test_it_stands_in_the_table_with_blanks_for_what_was_not_tried(mine):
    table = sk.methods()
    assert list(table.index)[-1] == mine
    row = table.loc[mine]
    assert (row.label, row.family, row.source, row.options) == (
        "Mine",
        "own",
        "me",
        "samples, spread",
    )
    assert row.needs_gradient
    assert not row.reads_layers
    assert row["works on"] == row["all networks"] == ""
    assert pd.isna(row.forward)
    assert table.loc["gradient", "forward"] == 1


def test_options_are_refused_and_filled_as_others_are(mine):
    with pytest.raises(ValueError, match="option: got 'sample', expected 'samples'"):
        sk.attribute(mine, Watched(), clips(), 0, sample=3)
    filled = METHODS[mine].filled({"spread": 1.0}, (4, 8, 8))
    assert filled == {"samples": 2, "spread": 1.0, "score": sk.scores.PROBABILITY}
    assert METHODS.find(noisy).filled({}, (4, 8, 8))["samples"] == 2


@pytest.mark.parametrize("given", ["mine", noisy])
def test_batches_and_seeds_work_for_it(mine, given):
    call = partial(sk.attribute, given, Watched(), clips(), [0, 1, 0])
    whole, single = call(seed=3), call(seed=3, batch_size=1)
    torch.testing.assert_close(whole, single)
    assert not torch.equal(whole, call(seed=4))


def test_a_function_without_a_name_in_the_table_is_explained_by_too():
    model = Watched()
    expected = sk.attribute("gradient", model, clips(), 0)
    assert torch.equal(sk.attribute(METHODS["gradient"].run, model, clips(), 0), expected)
    found = sk.attribute(
        lambda model, x, targets, work, power=2: x.mean(1) ** power, Watched(), clips(), 0
    )
    assert torch.equal(found, clips().mean(1) ** 2)


def test_its_maps_are_looked_at():
    def gives(maps):
        return lambda model, clips, targets, work: maps

    x = clips(1)
    with pytest.raises(
        ValueError, match=r"<lambda>: got \(4, 8, 8\), expected maps \(1, 4, 8, 8\)"
    ):
        sk.attribute(gives(x[0, 0]), Watched(), x, 0)
    with pytest.raises(ValueError, match="<lambda>: got NoneType, expected maps"):
        sk.attribute(gives(None), Watched(), x, 0)
    with pytest.raises(ValueError, match="NaN in <lambda>"):
        sk.attribute(gives(x[:, 0] / 0), Watched(), x, 0)
    with pytest.warns(
        UserWarning, match=r"<lambda>: the map of clips \[0\] is the same everywhere"
    ):
        sk.attribute(gives(0 * x[:, 0]), Watched(), x, 0)


def test_what_needs_a_gradient_is_refused_where_none_arrives(monkeypatch):
    class Blind(Watched):
        def forward(self, x):
            return super().forward(x.detach())

    def zero(model, clips, targets, work):
        model(clips)
        return torch.zeros_like(clips[:, 0])

    monkeypatch.setattr(METHODS, "data", dict(METHODS))
    sk.method("zero", needs_gradient=True)(zero)
    with pytest.raises(ValueError, match="model: got no gradient"):
        sk.attribute("zero", Blind(), clips(), 0)


def test_a_name_is_taken_once(mine):
    with pytest.raises(ValueError, match="method: got 'gradient', which is another's"):
        sk.method("gradient")(noisy)


def test_its_maps_are_kept(mine, tmp_path):
    data = sk.load_dataset("object", "test", n=2, frames=4, size=24)
    model = sk.load_model("r2plus1d_narrow", num_classes=6)
    first = store.maps(mine, model, data, tmp_path, model_name="narrow", samples=1)
    again = store.maps(mine, model, data, tmp_path, model_name="narrow", samples=1)
    assert torch.equal(first["maps"], again["maps"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
