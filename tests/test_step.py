"""STEP: a whole run against the plain loop in `reference`, and what must hold of every run.

That it finds planted evidence is shown in test_known_answers.
"""

import contextlib
import copy
import importlib
import math
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from torch import nn

from stepkit import _compiling, removal
from stepkit.attribution import PRESETS, Settings, StepResult, attribute, heatmap, step
from stepkit.models.scores import PROBABILITY
from stepkit.prepare import prepare

step_module = importlib.import_module("stepkit.attribution.step")  # the package has the function

SIZE = (3, 6, 7)  # T, H, W
QUICK = {"iterations": 4, "areas": (0.1, 0.4), "learning_rate": 0.01}


class Sensor(nn.Module):
    """Every voxel votes, not quite linearly, on three classes."""

    def __init__(self, size=SIZE, gain=4.0):
        super().__init__()
        draw = torch.randn(3, 3 * math.prod(size), generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(gain * draw / draw.shape[1] ** 0.5)

    def forward(self, clips):
        return (torch.tanh(clips).flatten(1)[:, None] * self.weight).sum(2)


class Fails(nn.Module):
    """A model that raises when it is called for the ``at``-th time."""

    def __init__(self, at, error):
        super().__init__()
        self.model, self.at, self.error, self.calls = Sensor(), at, error, 0
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm3d(3)

    def forward(self, clips):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.model(self.norm(self.drop(clips)))


def noise(n=2, size=SIZE, seed=3):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def clear_area(size, s, sigma, near, on_canvas=True):
    """An area v whose threshold lies between two values of the all-ones mask, not within a tie."""
    T, H, W = size
    ones = torch.ones(T, math.ceil(H / s), math.ceil(W / s), dtype=torch.float64)
    canvas = reference.spread(ones, H, W, s, sigma)
    mask = canvas if on_canvas else reference.crop(canvas, H, W, sigma)
    values = mask.flatten().sort(descending=True).values.tolist()
    n = len(values)
    clear = [k for k in range(1, n) if values[k - 1] - values[k] > 1e-3]
    return min((k / n for k in clear), key=lambda v: abs(v - near))


# ------------------------------------------------------------------------- a run, next to its twin

CASES = {
    "default": {},
    "log, released": {"reward": "log", "core_form": "released"},
    "visible mask": {"on_canvas": False},
    "deletion, cylinder": {"variant": "deletion", "kernel_shape": "cylinder", "kernel_length": 3},
    "dual": {"variant": "dual"},
    "adam": {"optimiser": "adam", "learning_rate": 0.1},
    "no core": {"kernel_length": 0, "area_weight": 300},
    "one frame": {"size": (1, 7, 5), "sigma": 1, "kernel_length": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_masks_and_history_equal_the_plain_loop(case):
    # a strong reward and areas away from ties: see the test of equal rows and columns in test_masks
    options = {
        "iterations": 6,
        "learning_rate": 10 * 6 / 1200,
        "step": 2,
        "sigma": 2,
        "kernel_length": 2,
        "kernel_size": 3,
        "core_start": 0.3,
        "area_weight": 30,
        "core_weight": 30,
        **CASES[case],
    }
    size = options.pop("size", SIZE)
    on_canvas = options.get("on_canvas", True)
    area = clear_area(size, options["step"], options["sigma"], 0.4, on_canvas)
    model, clips = Sensor(size), noise(1, size)
    found = step(model, clips, 0, areas=(area,), removal=removal.blur(4, 3.0), **options)
    mask, record = reference.step(
        copy.deepcopy(model).double(),
        clips[0].double(),
        0,
        area,
        levels=reference.pyramid(clips[0], 4, 3.0),
        **options,
    )
    history = found.history[["probability", "area_loss", "core_loss"]].to_numpy(float)
    np.testing.assert_allclose(history, record, rtol=0, atol=5e-6)
    torch.testing.assert_close(found.masks[0, 0], mask.float(), rtol=0, atol=5e-5)
    assert mask.std() > 0.1, "too easy: the mask has hardly moved"


def test_clips_and_areas_side_by_side_equal_the_plain_loop():
    model, clips, targets = Sensor(), noise(2), [1, 0]
    areas = tuple(clear_area(SIZE, 3, 2, v) for v in (0.2, 0.5))
    options = {"iterations": 4, "learning_rate": 0.01, "step": 3, "sigma": 2, "kernel_length": 0}
    found = step(model, clips, targets, areas=areas, removal="black", **options)
    for n, target in enumerate(targets):
        rungs = torch.stack([reference.colour(clips[n], (0, 0, 0)), clips[n].double()])
        for a, area in enumerate(areas):
            mask, record = reference.step(
                copy.deepcopy(model).double(),
                clips[n].double(),
                target,
                area,
                levels=rungs,
                kernel_size=1,
                **options,
            )
            torch.testing.assert_close(found.masks[n, a], mask.float(), rtol=0, atol=5e-5)
            rows = found.history.query("clip == @n and area == @area")
            seen = rows.sort_values("iteration")[["probability", "area_loss"]].to_numpy(float)
            np.testing.assert_allclose(seen, np.array(record)[:, :2], rtol=0, atol=5e-6)


# ------------------------------------------------------------------------------------ the result


def test_result_has_the_documented_shapes_dtype_and_range():
    found = step(Sensor(), noise(), [0, 1], **QUICK)
    assert found.masks.shape == (2, 2, *SIZE)
    assert found.masks.dtype == torch.float32
    assert 0 <= found.masks.min() < found.masks.max() <= 1
    assert not found.masks.requires_grad
    assert found.areas == (0.1, 0.4)
    assert found.probabilities.shape == found.visible_share.shape == (2, 2)
    assert not found.interrupted
    assert found.precision == "float32"
    assert found.device == "cpu"


def test_result_says_in_which_precision_the_model_ran():
    found = step(prepare(Sensor(), "bfloat16"), noise(), [0, 1], **QUICK)
    assert found.precision == "bfloat16"
    assert found.masks.dtype == torch.float32


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("pays", [8, 9])  # passes of a clip: two areas, four iterations
def test_a_network_is_compiled_where_prepare_lets_it_and_the_run_is_long(pays, marked, monkeypatch):
    model, clips, seen = Sensor(), noise(), []
    expected = step(model, clips, [0, 1], batch_size=1, **QUICK)
    model.compiles = marked
    monkeypatch.setattr(step_module, "PAYS", pays)
    monkeypatch.setattr(step_module, "worth_it", lambda clips: not any(_compiling._short))
    monkeypatch.setattr(
        step_module, "compiled", lambda model: lambda clips: seen.append(len(clips)) or model(clips)
    )
    found = step(model, clips, [0, 1], batch_size=1, **QUICK)
    assert torch.equal(found.masks, expected.masks)
    assert seen == ([2] * 4 * 2 if marked and pays == 8 else [])  # its iterations, nothing else
    assert not _compiling._short


def test_visible_share_is_the_mean_of_the_mask():
    found = step(Sensor(), noise(), [0, 1], **QUICK)
    for n in range(2):
        for a in range(2):
            mean = found.masks[n, a].double().mean().item()
            assert found.visible_share[n, a].item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("variant", ["preservation", "deletion", "dual"])
@pytest.mark.parametrize("operator", ["blur", "fade", removal.blur(2, 3.0)])
def test_probabilities_are_those_of_the_masks(variant, operator):
    model, clips, targets = Sensor(), noise(), [0, 1]
    found = step(model, clips, targets, variant=variant, removal=operator, **QUICK)
    for a in range(2):
        mask = found.masks[:, a]
        kept = removal.named(operator).apply(clips, 1 - mask if variant == "deletion" else mask)
        phi = model(kept).softmax(1)[range(2), targets].detach()
        torch.testing.assert_close(found.probabilities[:, a], phi, rtol=0, atol=1e-6)


def test_history_has_the_documented_rows_and_columns():
    found = step(Sensor(), noise(3), [0, 1, 2], batch_size=2, **QUICK)
    columns = {"clip", "area", "iteration", "probability", "area_loss", "core_loss"}
    assert set(found.history.columns) == columns
    assert len(found.history) == 3 * 2 * 4
    rows = set(found.history[["clip", "area", "iteration"]].itertuples(index=False, name=None))
    assert rows == {(n, v, i) for n in range(3) for v in (0.1, 0.4) for i in range(4)}
    assert found.history.index.tolist() == list(range(24))


def test_history_starts_at_the_all_ones_mask():
    model, clips = Sensor(), noise(1)
    found = step(model, clips, 1, step=2, sigma=2, kernel_length=2, kernel_size=3, **QUICK)
    first = found.history.query("iteration == 0").set_index("area")
    canvas = reference.spread(torch.ones(3, 3, 4, dtype=torch.float64), 6, 7, 2, 2)
    mask = reference.crop(canvas, 6, 7, 2)
    phi = model(removal.blur().apply(clips, mask[None].float())).softmax(1)[0, 1].item()
    kernel = reference.kernel(2, 3, 3)
    for area in (0.1, 0.4):
        row = first.loc[area]
        assert row["probability"] == pytest.approx(phi, abs=1e-6)
        expected = reference.area_loss(canvas, area).item()
        assert row["area_loss"] == pytest.approx(expected, abs=1e-6)
        expected = reference.core_loss_printed(canvas, area, kernel).item()
        assert row["core_loss"] == pytest.approx(expected, abs=1e-6)


def result(probabilities, areas, variant="preservation"):
    """A result with these probabilities (N, A), whose masks are full of clip·10 + area."""
    probabilities = torch.tensor(probabilities)
    N, A = probabilities.shape
    marks = 10.0 * torch.arange(N)[:, None] + torch.arange(A)
    return StepResult(
        masks=marks[:, :, None, None, None].expand(N, A, *SIZE).clone(),
        areas=areas,
        probabilities=probabilities,
        clip_probability=torch.ones(N),
        random_probabilities=torch.zeros(N, A),
        visible_share=torch.zeros(N, A),
        history=pd.DataFrame(),
        settings=Settings(areas=areas, variant=variant),
        score=PROBABILITY,
        interrupted=False,
        precision="float32",
        device="cpu",
    )


@pytest.mark.parametrize("variant", ["preservation", "deletion"])
@pytest.mark.parametrize("phi0", [0.05, 0.25, 0.5, 0.75, 0.9])
def test_smallest_area_is_that_of_equation_4(variant, phi0):
    areas = (0.05, 0.1, 0.15, 0.2)
    probabilities = [
        [0.125, 0.25, 0.5, 0.875],  # rises, and meets two bounds exactly
        [0.875, 0.5, 0.25, 0.125],
        [0.5, 0.875, 0.125, 0.75],  # neither
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 1.0],
    ]
    area, mask = result(probabilities, areas, variant).smallest(phi0)
    assert area.shape == (5,)
    assert mask.shape == (5, *SIZE)
    for n, row in enumerate(probabilities):
        a = reference.smallest(row, areas, phi0, variant)
        if a is None:
            assert area[n].isnan()
            assert bool(mask[n].isnan().all())
        else:
            assert area[n] == torch.tensor(areas[a])
            assert bool((mask[n] == 10 * n + a).all())


@pytest.mark.parametrize("phi0", [0, 1, -0.5, 1.5, float("nan")])
def test_smallest_refuses_a_bound_that_is_no_probability(phi0):
    with pytest.raises(ValueError, match=r"^phi0: got"):
        result([[0.5]], (0.1,)).smallest(phi0)


@pytest.mark.parametrize("size", [(2, 9, 14), (1, 5, 4), (3, 1, 2), (2, 28, 20)])
def test_heatmap_is_the_blurred_sum_of_the_masks(size):
    masks = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = heatmap(masks)
    assert found.shape == (2, *size)
    for n in range(2):
        expected = torch.from_numpy(reference.heatmap(masks[n])).float()
        torch.testing.assert_close(found[n], expected, rtol=0, atol=3e-6)


def test_heatmap_of_the_result_is_that_of_its_masks():
    found = step(Sensor(), noise(), [0, 1], **QUICK)
    assert found.heatmap.equal(heatmap(found.masks))
    assert attribute("step", Sensor(), noise(), [0, 1], **QUICK).equal(found.heatmap)


# ------------------------------------------------------------------- what the result depends on


def test_same_call_gives_the_same_bytes():
    first, second = (step(Sensor(), noise(), [0, 1], **QUICK) for _ in range(2))
    assert first.masks.equal(second.masks)
    assert first.probabilities.equal(second.probabilities)
    pd.testing.assert_frame_equal(first.history, second.history, check_exact=True)


def test_result_does_not_depend_on_batch_size_or_the_other_clips():
    model, clips, targets = Sensor(), noise(3), [0, 1, 2]
    options = {**QUICK, "iterations": 12}
    together = step(model, clips, targets, batch_size=3, **options)
    assert together.masks.std() > 0.05
    order = ["clip", "area", "iteration"]
    for batch_size in (1, 2):
        split = step(model, clips, targets, batch_size=batch_size, **options)
        torch.testing.assert_close(split.masks, together.masks, rtol=0, atol=1e-5)
        torch.testing.assert_close(split.probabilities, together.probabilities, rtol=0, atol=1e-5)
        pd.testing.assert_frame_equal(
            *(f.history.sort_values(order, ignore_index=True) for f in (split, together)),
            check_exact=False,
            rtol=0,
            atol=1e-5,
        )
    alone = step(model, clips[2:], 2, **options)
    torch.testing.assert_close(alone.masks[0], together.masks[2], rtol=0, atol=1e-5)


def test_result_does_not_depend_on_the_other_areas():
    model, clips = Sensor(), noise(1)
    together = step(model, clips, 0, **QUICK)
    for a, area in enumerate(QUICK["areas"]):
        alone = step(model, clips, 0, **{**QUICK, "areas": (area,)})
        torch.testing.assert_close(alone.masks[:, 0], together.masks[:, a], rtol=0, atol=1e-6)


def test_each_clip_has_its_own_target():
    model, clips = Sensor(), noise(2)
    both = step(model, clips, [2, 0], **QUICK)
    for n, target in enumerate((2, 0)):
        same = step(model, clips, target, **QUICK)
        torch.testing.assert_close(same.masks[n], both.masks[n], rtol=0, atol=1e-6)
        other = step(model, clips, 1, **QUICK)
        assert (other.masks[n] - both.masks[n]).abs().max() > 0.01


@pytest.mark.parametrize(("reward", "operator"), [("probability", "blur"), ("log", "black")])
def test_variants_push_the_probability_the_right_way(reward, operator):
    model, clips = Sensor(), noise(2)
    options = {
        "iterations": 30,
        "areas": (0.3,),
        "removal": operator,
        "reward": reward,
        "area_weight": 30,
        "core_weight": 30,
    }

    def logits(target, variant):
        """Log-odds of class 0, in what is kept and in what is left, if ``target`` is optimised."""
        masks = step(model, clips, target, variant=variant, **options).masks[:, 0]
        views = (removal.named(operator).apply(clips, m) for m in (masks, 1 - masks))
        return [model(view).softmax(1)[:, 0].logit().detach() for view in views]

    for_0, against_0 = logits(0, "preservation")[0], logits(1, "preservation")[0]
    assert bool((for_0 > against_0 + 1).all())
    for_0, against_0 = logits(0, "deletion")[1], logits(1, "deletion")[1]
    assert bool((for_0 < against_0 - 1).all())
    kept, left = logits(0, "dual")
    assert bool((kept > left + 1).all())


def test_kernel_length_zero_switches_core_loss_off():
    model, clips = Sensor(), noise()
    options = {**QUICK, "core_start": 0.0}
    off = step(model, clips, 0, kernel_length=0, **options)
    assert not off.history["core_loss"].any()
    unweighted = step(model, clips, 0, core_weight=0.0, **options)
    assert unweighted.history["core_loss"].all()
    assert off.masks.equal(unweighted.masks)
    on = step(model, clips, 0, **options)
    assert (on.masks - off.masks).abs().max() > 0.01


def test_core_loss_counts_from_its_start_on():
    model, clips = Sensor(), noise()
    off = step(model, clips, 0, core_weight=0.0, **QUICK)
    late = step(model, clips, 0, core_start=0.75, **QUICK)  # from iteration 3 of 0, 1, 2, 3 on
    for run, start in ((off, 4), (late, 4)):
        assert run.history["iteration"].nunique() == start
    early = off.history["iteration"] <= 3  # the record of an iteration is taken before its step
    pd.testing.assert_frame_equal(off.history[early], late.history[early], check_exact=True)
    assert not off.masks.equal(late.masks)


def test_learning_rate_and_schedules_stretch_with_the_iterations():
    # twice the iterations, half the step: nearly the same path
    model, clips = Sensor(), noise(1)
    options = {**QUICK, "learning_rate": 0.0005, "areas": (0.3,), "momentum": 0.0, "dampening": 0.0}
    few = step(model, clips, 0, **{**options, "iterations": 40})
    many = step(model, clips, 0, **{**options, "iterations": 80})
    start = step(model, clips, 0, **{**options, "iterations": 1, "learning_rate": 1e-9})
    moved = (few.masks - start.masks).abs().mean()
    assert (few.masks - many.masks).abs().mean() < 0.05 * moved


# ----------------------------------------------------------------------------- sizes and presets


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 9), (2, 5, 13), (5, 3, 3), (1, 1, 1)])
def test_any_clip_size_runs(size):
    found = step(Sensor(size), noise(1, size), 0, **QUICK)
    assert found.masks.shape == (1, 2, *size)
    assert found.heatmap.shape == (1, *size)
    assert bool(found.masks.isfinite().all())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(3, 8, 9), (1, 2, 5)])
def test_any_preset_runs_on_a_small_clip(preset, size):
    # on 2×5 pixels the kernel's least size of 3 is larger than the visible mask
    found = step(Sensor(size), noise(1, size), 0, preset, iterations=2)
    assert found.masks.shape == (1, 4, *size)
    assert found.areas == PRESETS[preset].areas


def test_presets_differ_in_what_is_documented():
    names = [f.name for f in fields(Settings)]

    def changes(preset):
        ours, default = PRESETS[preset], Settings()
        return {
            name: getattr(ours, name)
            for name in names
            if str(getattr(ours, name)) != str(getattr(default, name))
        }

    assert changes("default") == {}
    printed = changes("printed")
    assert printed.keys() == {"removal", "on_canvas"}
    assert printed["removal"].name == removal.blur(levels=2).name
    assert printed["on_canvas"] is False
    assert changes("released") == {
        "areas": (0.05, 0.10, 0.15, 0.50),
        "reward": "log",
        "core_form": "released",
    }
    assert changes("fast").keys() == {"iterations", "optimiser", "learning_rate", "reward"}
    assert PRESETS["fast"].iterations <= Settings().iterations / 5


def test_default_settings_are_those_of_the_paper_and_its_code():
    s = Settings()
    assert s.areas == (0.05, 0.10, 0.15, 0.20)
    assert (s.iterations, s.learning_rate, s.momentum, s.dampening) == (1200, 0.05, 0.9, 0.9)
    assert (s.area_weight, s.core_weight) == (300, 300)
    assert s.area_growth == pytest.approx(1.0008668**1200)
    assert math.ceil(s.core_start * 1200 - 1e-9) == 101
    assert (s.reward, s.core_form, s.variant) == (None, "printed", "preservation")
    assert s.removal.name == removal.blur().name
    assert s.on_canvas


@pytest.mark.parametrize(
    ("variant", "reward"),
    [("preservation", "probability"), ("dual", "probability"), ("deletion", "log")],
)
def test_the_reward_follows_the_variant(variant, reward):
    found = step(Sensor(SIZE), noise(1, SIZE), 0, areas=(0.1,), iterations=1, variant=variant)
    assert found.settings.reward == reward


@pytest.mark.parametrize(
    ("size", "lengths"),
    [
        ((16, 112, 112), (8, 11, 7, 11)),
        ((8, 56, 60), (4, 5, 4, 6)),
        ((10, 56, 56), (5, 5, 4, 6)),
        ((3, 8, 9), (3, 5, 1, 1)),
        ((4, 56, 56), (3, 5, 4, 6)),
        ((2, 8, 4), (2, 3, 1, 1)),
        ((1, 8, 8), (1, 5, 1, 1)),
    ],
)
def test_lengths_follow_the_clip(size, lengths):
    found = step(Sensor(size), noise(1, size), 0, areas=(0.1,), iterations=1)
    s = found.settings
    assert (s.kernel_length, s.kernel_size, s.step, s.sigma) == lengths


def test_options_replace_those_of_the_preset():
    options = {"kernel_length": 1, "step": 3, "sigma": 4, "removal": "fade", **QUICK}
    found = step(Sensor(), noise(1), 0, "released", **options)
    s = found.settings
    assert (s.kernel_length, s.step, s.sigma, s.removal.name) == (1, 3, 4, "fade")
    assert (s.iterations, s.areas, s.core_form) == (4, (0.1, 0.4), "released")


# ------------------------------------------------------------------------- interrupts and manners


def test_interrupt_returns_the_masks_reached():
    # calls: two to try the model, then one per iteration
    model = Fails(6, KeyboardInterrupt()).train()
    found = step(model, noise(), [0, 1], **{**QUICK, "iterations": 50})
    assert found.interrupted
    assert found.history["iteration"].max() == 2  # 0, 1, 2 were finished
    assert len(found.history) == 2 * 2 * 3
    assert found.masks.shape == (2, 2, *SIZE)
    full = step(Fails(0, None), noise(), [0, 1], **{**QUICK, "iterations": 50})
    same = full.history.query("iteration <= 2").reset_index(drop=True)
    pd.testing.assert_frame_equal(found.history, same, check_exact=True)


def test_interrupt_at_the_first_iteration_returns_masks():
    found = step(Fails(3, KeyboardInterrupt()), noise(), 0, **QUICK)
    assert found.interrupted
    assert len(found.history) == 0
    assert found.masks.shape == (2, 2, *SIZE)


def test_interrupt_of_one_batch_ends_them_all():
    model = Fails(5, KeyboardInterrupt())
    found = step(model, noise(4), 0, batch_size=2, **{**QUICK, "iterations": 20})
    assert found.interrupted
    assert set(found.history["clip"]) == {0, 1}
    assert model.calls <= 5 + 4  # at most one more look at the masks and clips of each batch


def test_a_callback_sees_each_iteration_and_can_end_it():
    calls = []

    def look(done, masks, phi):
        calls.append((done, masks.clone(), phi))
        return done == 3

    settings = QUICK | {"iterations": 50}
    found = step(Sensor(), noise(), [0, 1], callback=look, **settings)
    assert [done for done, _, _ in calls] == [0, 1, 2, 3]
    assert found.interrupted
    assert found.history["iteration"].max() == 2
    _, masks, phi = calls[-1]
    assert found.masks.equal(masks)
    torch.testing.assert_close(found.probabilities, phi)


def test_a_callback_changes_nothing():
    watched = step(Sensor(), noise(), [0, 1], callback=lambda *_: None, **QUICK)
    assert not watched.interrupted
    assert watched.masks.equal(step(Sensor(), noise(), [0, 1], **QUICK).masks)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_model_is_left_as_it_was(error):
    model = Fails(5 if error else 0, error).train()
    raises = pytest.raises(error) if error is RuntimeError else contextlib.nullcontext()
    model.drop.eval()
    model.norm.weight.requires_grad_(False)
    model.model.weight.grad = torch.ones_like(model.model.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with raises:
        step(model, noise(), [0, 1], **{**QUICK, "iterations": 8})
    assert (model.training, model.drop.training, model.norm.training) == (True, False, True)
    assert model.model.weight.requires_grad
    assert not model.norm.weight.requires_grad
    assert model.model.weight.grad.equal(torch.ones_like(model.model.weight))
    for name, value in model.state_dict().items():
        assert value.equal(state[name]), name
    assert torch.get_rng_state().equal(random_state)


def test_clips_that_require_a_gradient_are_taken_and_get_none():
    # did the ladder keep the clips' graph, the second backward would raise
    clips = noise().requires_grad_(True)
    found = step(Sensor(), clips, 0, **QUICK)
    assert clips.grad is None
    assert found.masks.equal(step(Sensor(), clips.detach(), 0, **QUICK).masks)


def test_no_grad_around_the_call_changes_nothing():
    expected = step(Sensor(), noise(), 0, **QUICK)
    with torch.no_grad():
        found = step(Sensor(), noise(), 0, **QUICK)
    assert found.masks.equal(expected.masks)


def test_clips_and_targets_are_left_as_they_were():
    clips, targets = noise(), torch.tensor([0, 1])
    step(Sensor(), clips, targets, **QUICK)
    assert clips.equal(noise())
    assert targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"preset": "paper"}, "preset"),
        ({"area": 0.1}, "option"),
        ({"areas": ()}, "areas"),
        ({"areas": (0.2, 0.1)}, "areas"),
        ({"areas": (0.1, 0.1)}, "areas"),
        ({"areas": (0.0, 0.1)}, "areas"),
        ({"areas": (0.5, 1.0)}, "areas"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": 1.5}, "iterations"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"kernel_length": -1}, "kernel_length"),
        ({"kernel_length": 4}, "kernel_length"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_shape": "cube"}, "kernel_shape"),
        ({"core_form": "paper"}, "core_form"),
        ({"reward": "logit"}, "reward"),
        ({"removal": "grey"}, "removal"),
        ({"variant": "both"}, "variant"),
        ({"step": 0}, "step"),
        ({"sigma": 1.5}, "sigma"),
        ({"batch_size": 0}, "batch_size"),
        ({"targets": 3}, "targets"),
        ({"targets": [0]}, "targets"),
        ({"clips": noise()[0]}, "clips"),
        ({"clips": noise()[:, :2]}, "clips"),
        ({"clips": noise()[:0]}, "clips"),
        ({"clips": noise() / 0}, "clips"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(change, argument):
    given = {"clips": noise(), "targets": [0, 1], **QUICK, **change}
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        step(Sensor(), given.pop("clips"), given.pop("targets"), **given)


def test_one_number_for_areas_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match=r"^areas: got"):
        step(Sensor(), noise(), 0, areas=0.1)


def test_float64_is_refused_by_name():
    with pytest.raises(TypeError, match=r"^clips: got dtype torch\.float64"):
        step(Sensor().double(), noise().double(), 0, **QUICK)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits.softmax(1), r"probabilities \(rows sum to 1\)"),
        (lambda logits: logits.detach(), "no gradient at the clips"),
        (lambda logits: logits[:, 0], "output"),
        (lambda logits: logits * float("nan"), "NaN"),
    ],
)
def test_a_model_that_cannot_be_explained_is_refused(spoil, message):
    class Spoilt(Sensor):
        def forward(self, clips):
            return spoil(super().forward(clips))

    with pytest.raises(ValueError, match=f"^model: got {message}"):
        step(Spoilt(), noise(), 0, **QUICK)


def test_a_model_that_turns_to_nan_is_refused():
    class Fragile(Sensor):
        def forward(self, clips):
            return super().forward(clips) / (clips.abs().amax((1, 2, 3, 4)) > 1)[:, None].float()

    with pytest.raises(ValueError, match=r"^model: got NaN"):
        step(Fragile(), noise(), 0, removal="fade", **{**QUICK, "iterations": 40, "areas": (0.01,)})
