"""What a method costs, and Table I by trying."""

import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from stepkit import attribute, methods
from stepkit.attribution.cost import counted, measured

ROOT = Path(__file__).parents[1]
TRIAL = runpy.run_path(str(ROOT / "tools" / "trial.py"))
Plain, Tapped, clips, TRIED = (TRIAL[name] for name in ("Plain", "Tapped", "clips", "TRIED"))
METHODS = list(methods().index)


def explain(method, **options):
    return lambda model, *given: attribute(method, model, *given, **options)


@pytest.mark.parametrize(
    ("method", "options", "forward", "backward"),
    [
        ("random", {}, 0, 0),
        ("gradient", {}, 1, 1),
        ("integrated_gradients", {"steps": 10}, 10, 10),
        ("rise", {"samples": 20}, 20, 0),
        # and a last look at each area, at the clip, and at four random masks for each area
        ("step", {"iterations": 5, "areas": (0.1, 0.2)}, 10 + 2 + 1 + 8, 10),
    ],
)
def test_passes_are_counted(method, options, forward, backward):
    model, shown = Plain(), clips().repeat(2, 1, 1, 1, 1)
    attribute("random", model, shown, 0)  # a new model is tried once
    # beyond these, two clips share one trial of the model in STEP, and where nothing else asks it
    _, cost = measured(explain(method, **options), model, shown, 0)
    assert cost["forward"] == forward + (0.5 if method in ("random", "step") else 0)
    assert cost["backward"] == backward + (0.5 if method == "step" else 0)
    assert cost["seconds"] > 0


def test_counting_ends_with_the_context():
    model = nn.Flatten()
    with counted(model) as passes:
        model(torch.zeros(3, 2))
    model(torch.zeros(3, 2))
    assert passes == {"forward": 3, "backward": 0}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_gradient_counts_where_it_comes_back_and_as_often():
    model, x = Plain(), clips().repeat(2, 1, 1, 1, 1).requires_grad_()
    with counted(model) as passes:
        model(x)  # looked at, no more
        found = model(x)
        torch.autograd.grad(found.sum(), x, retain_graph=True)
        found.sum().backward()
    assert passes == {"forward": 4, "backward": 4}


def test_a_tap_sees_the_networks_own_gradients_and_notices_others():
    network = Tapped()
    network(clips((3, 16, 16)).requires_grad_()).sum().backward()
    assert network.true_to_itself()
    value, slope = network.record[1][0]
    network.record[1][0] = value, slope * 1.01
    assert not network.true_to_itself()
    network.record[1][0] = value, slope
    network.record[5].clear()
    assert not network.true_to_itself()


@pytest.mark.parametrize(
    ("method", "own"),
    [("gradient", True), ("grad_cam", True), ("rise", True)]
    + [(name, False) for name in ("guided_backprop", "deconvnet", "lrp", "excitation_backprop")],
)
def test_rules_that_are_not_the_networks_are_noticed(method, own):
    assert TRIAL["unmodified_rule"](method) == own


def test_every_method_has_been_tried():
    assert list(pd.read_csv(TRIED)["method"]) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_stored_trial_is_what_trying_gives(method):
    stored = pd.read_csv(TRIED, index_col="method", keep_default_na=False).loc[method]
    found = TRIAL["row"](method)
    assert {name: stored[name] for name in found} == found


def test_the_table_shows_what_was_tried():
    table = methods()
    assert table.loc["gradient", ["unmodified rule", "all networks", "unreduced resolution"]].all()
    assert not table.loc["grad_cam", "unreduced resolution"]
    assert "CNN-RNN" in table.loc["step", "works on"]


def test_the_page_of_methods_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "methods.py"))
    assert tool["PAGE"].read_text("utf-8") == tool["page"](), "run python tools/methods.py"
