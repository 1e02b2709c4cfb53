"""Whatever is handed to the public functions: documented errors, or results of the right shape.

Never a NaN in silence, never another exception than TypeError and ValueError. Hypothesis draws the
shapes, dtypes and odd values; the draws are the same in every run.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stepkit as sk
from stepkit import metrics, removal, stats, viz

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined")  # said, and NaN

CASES = settings(max_examples=70, deadline=None, derandomize=True, database=None)
ODD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0]
DTYPES = [torch.float32] * 20 + [torch.float64, torch.float16, torch.int64, torch.bool]
METHODS = ["random", "gradient", "gradient_x_input", "occlusion", "grad_cam", "guided_backprop"]


class Network(nn.Module):
    """Takes clips of every size."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.conv, self.relu = nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()
            self.fc = nn.Linear(4, 3)

    def forward(self, clips):
        return self.fc(self.relu(self.conv(clips)).mean((2, 3, 4)))


@st.composite
def tensors(draw, *lengths):
    """A tensor of any dtype and values, most often of the lengths asked for (each: least, most)."""
    shape = [draw(st.integers(*length)) for length in lengths]
    if draw(st.integers(0, 19)) == 7:
        shape = draw(st.lists(st.integers(0, 4), max_size=6))
    seed = draw(st.integers(0, 2**16))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kind = draw(st.sampled_from(["noise"] * 6 + ["constant", "odd", "steps", "huge"]))
    if kind == "constant":
        values = torch.full_like(values, draw(st.sampled_from([0.0, 1.0, -3.0])))
    elif kind == "steps":
        values = values.round()
    elif kind == "huge":
        values = values * 1e6
    elif kind == "odd" and values.numel():
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(st.sampled_from(ODD))
    return values.to(draw(st.sampled_from(DTYPES)))


CLIPS = tensors((1, 3), (3, 3), (1, 4), (1, 9), (1, 9))
MAPS = tensors((1, 3), (1, 4), (1, 9), (1, 9))
WRONG = st.one_of(
    st.lists(st.integers(-1, 3), max_size=4), st.sampled_from([None, "a", 0.5, -1, 3])
)
TARGETS = st.one_of(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), WRONG)
RIGHT_AREAS = st.sampled_from([[0.1], [0.05, 0.5], [0.2, 0.3, 0.9]])
AREAS = st.one_of(RIGHT_AREAS, RIGHT_AREAS, st.lists(st.floats(-0.1, 1.1), min_size=1, max_size=3))


def outcome(call):
    """Return what a call returns, or None where it refuses with a documented error."""
    try:
        return call()
    except (TypeError, ValueError):
        return None


def clean(values, shape=None):
    values = values if torch.is_tensor(values) else torch.tensor(np.array(values))
    assert bool(torch.isfinite(values).all())
    if shape is not None:
        assert tuple(values.shape) == tuple(shape)


@CASES
@given(CLIPS, TARGETS, st.sampled_from(METHODS), st.integers(0, 3))
def test_attribute(clips, targets, method, batch_size):
    options = {"layer": "conv"} if method == "grad_cam" else {}
    given = {"batch_size": batch_size, **options}
    maps = outcome(lambda: sk.attribute(method, Network(), clips, targets, **given))
    if maps is not None:
        clean(maps, (len(clips), *clips.shape[2:]))
        assert maps.dtype == torch.float32


@CASES
@given(
    CLIPS,
    TARGETS,
    AREAS,
    st.sampled_from(["fast", "default", "printed", "released", "quick"]),
    st.sampled_from(["preservation", "deletion", "dual"]),
)
def test_step(clips, targets, areas, preset, variant):
    given = {"areas": areas, "iterations": 2, "variant": variant}
    found = outcome(lambda: sk.step(Network(), clips, targets, preset, **given))
    if found is not None:
        clean(found.masks, (len(clips), len(areas), *clips.shape[2:]))
        assert 0 <= found.masks.min() <= found.masks.max() <= 1
        clean(found.probabilities, (len(clips), len(areas)))
        clean(found.heatmap, (len(clips), *clips.shape[2:]))


@CASES
@given(
    CLIPS,
    MAPS,
    TARGETS,
    st.sampled_from(["patch", "pixel", "superpixel"]),
    st.integers(0, 5),
    st.sampled_from([sk.insertion, sk.deletion]),
    st.booleans(),
)
def test_curves(clips, maps, targets, unit, steps, metric, fits):
    if fits and clips.ndim == 5:
        maps = torch.randn(len(clips), *clips.shape[2:])
    found = outcome(lambda: metric(Network(), clips, maps, targets, unit=unit, steps=steps))
    if found is not None:
        clean(found.curve)
        assert len(found.curve) == len(clips)
        assert 0 <= found.curve.min() <= found.curve.max() <= 1
        clean(found.auc, (len(clips),))


BOXES = st.lists(st.tuples(*[st.floats(0, 9)] * 2, *[st.floats(-1, 9)] * 2), max_size=3).map(
    lambda rows: torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows]).view(-1, 4)
)


@CASES
@given(MAPS, BOXES, st.one_of(st.none(), st.floats(-1, 9)))
def test_pointing_game(maps, boxes, radius):
    every = [[boxes] * maps.shape[1]] * len(maps) if maps.ndim > 1 else [[boxes]]
    found = outcome(lambda: sk.pointing_game(maps, every, radius))
    if found is not None:
        assert found.hits.shape == found.boxed.shape == maps.shape[:2]
        assert not (found.hits & ~found.counted).any()


@CASES
@given(MAPS, MAPS, st.booleans())
def test_overlap_with_known_pixels(maps, masks, fits):
    masks = (torch.randn_like(maps.float()) if fits else masks) > 0
    for score in (metrics.relevance_mass, metrics.iou):
        found = outcome(lambda score=score: score(maps, masks))
        if found is not None:
            assert found.shape == maps.shape[:1]
            known = masks.flatten(1).any(1)
            if score is metrics.relevance_mass:  # documented: undefined without positive relevance
                known &= (maps > 0).flatten(1).any(1)
            else:  # nor without a ranking
                known &= (maps != maps[:, :1, :1, :1]).flatten(1).any(1)
            assert torch.equal(torch.isfinite(found), known)


@CASES
@given(tensors((1, 6), (1, 5)), tensors((1, 6)), st.booleans(), st.booleans())
def test_reliability(scores, chance, include_random, fits):
    if fits and scores.ndim == 2:
        chance = torch.randn(len(scores))
    given = {"include_random": include_random, "samples": 20}
    found = outcome(lambda: sk.reliability(scores, chance, **given))
    if found is not None and not np.isnan(found.alpha):  # undefined where nothing beats random
        assert -1 - 1e-9 <= found.alpha <= 1 + 1e-9


@CASES
@given(tensors((0, 6)), st.floats(-0.5, 1.5))
def test_bootstrap(values, level):
    found = outcome(lambda: stats.bootstrap_mean(values, samples=50, level=level))
    if found is not None:
        clean(found[["mean", "low", "high"]].to_numpy(float))


@CASES
@given(
    CLIPS,
    MAPS,
    st.sampled_from(["blur", "fade", "black", "mean", "dust"]),
    st.integers(0, 9),
    st.sampled_from([True, True, False]),
)
def test_removal(clips, masks, name, levels, fits):
    operators = {"blur": lambda: removal.blur(levels), "mean": lambda: removal.mean(clips)}
    operator = outcome(operators.get(name, lambda: removal.named(name)))
    if operator is None:
        return
    if fits and clips.ndim == 5:
        masks = torch.rand(len(clips), *clips.shape[2:])
    found = outcome(lambda: operator.apply(clips, masks))
    if found is not None:
        clean(found, clips.shape)


@CASES
@given(MAPS)
def test_display(maps):
    found = outcome(lambda: viz.display(maps))
    if found is not None:
        clean(found, maps.shape)
        assert 0 <= found.min() <= found.max() <= 1


@CASES
@given(
    st.integers(-1, 50),
    st.integers(-1, 9),
    st.sampled_from(["test", "train", "test", "dense"]),
    st.sampled_from([0, 0, 0, -1, 9]),
    st.one_of(st.none(), st.none(), st.integers(-1, 60)),
)
def test_sampled_frames(n, frames, mode, start, stop):
    draw = torch.Generator().manual_seed(0)
    found = outcome(lambda: sk.clips.sample_frames(n, frames, mode, start, stop, draw))
    if found is not None:
        assert len(found) == frames
        assert all(start <= i < (n if stop is None else stop) for i in found)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@CASES
@given(CLIPS)
def test_prepared_models_take_what_the_model_takes(precision, clips):
    ready = sk.prepare(Network(), precision)
    maps = outcome(lambda: sk.attribute("gradient", ready, clips, 0))
    if maps is not None:
        clean(maps, (len(clips), *clips.shape[2:]))
