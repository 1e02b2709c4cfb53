"""Bad input: a clear error that names the argument, and the user's model as it was."""

import math

import pytest
import torch
from test_models import Watched, same_state, state_of
from torch import nn

from stepkit import attribute, deletion, insertion, load_model, read_clip, removal, stats, step
from stepkit.attribution.smoothmax import MaskGeometry


def clips(n=2):
    return torch.randn(n, 3, 4, 24, 24, generator=torch.Generator().manual_seed(0))


def maps(n=2):
    return torch.rand(n, 4, 24, 24, generator=torch.Generator().manual_seed(1))


def nan():
    bad = clips()
    bad[1, 2, 3, 4, 5] = math.nan
    return bad


class Wrapped(Watched):
    """A model whose logits pass through a function."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return self.last(super().forward(x))


class NoGradient(Watched):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Numpy(Watched):
    def forward(self, x):
        return torch.from_numpy(super().forward(x.detach()).detach().numpy())


def gradient(model, *args, **options):
    return attribute("gradient", model, *args, **options)


def masks(model, *args):
    return attribute("meaningful_perturbation", model, *args, iterations=2)


ROWS = [
    # what is called, the model, arguments, options, the error, what its message must say
    (gradient, lambda: Watched().forward, (clips(), 0), {}, TypeError, "model: got method"),
    (step, lambda: Watched().forward, (clips(), 0), {}, TypeError, "model: got method"),
    (gradient, Watched, (clips()[0], 0), {}, ValueError, r"clips: got shape \(3, 4, 24, 24\)"),
    (gradient, Watched, (clips()[:, :1], 0), {}, ValueError, r"clips: .*\(N, 3, T, H, W\)"),
    (gradient, Watched, (clips().double(), 0), {}, TypeError, "clips: got dtype torch.float64"),
    (gradient, Watched, (clips().numpy(), 0), {}, TypeError, "clips: got ndarray"),
    (gradient, Watched, (nan(), 0), {}, ValueError, "clips: got NaN"),
    (gradient, Watched, (clips()[:0], 0), {}, ValueError, r"clips: got shape \(0, 3"),
    (gradient, Watched, (clips(), 2), {}, ValueError, "targets: got 2, expected classes 0"),
    (gradient, Watched, (clips(), [0, -1]), {}, ValueError, "targets: got -1, expected class"),
    (gradient, Watched, (clips(), [0]), {}, ValueError, r"targets: got shape \(1,\)"),
    (gradient, Watched, (clips(), [0.5, 1.0]), {}, TypeError, "targets: got dtype"),
    (gradient, Watched, (clips(), "dog"), {}, TypeError, "targets: got str"),
    (gradient, Watched, (clips(), 0), {"batch_size": 0}, ValueError, "batch_size: got 0"),
    (gradient, Watched, (clips(), 0), {"layer": "conv"}, ValueError, "option: got 'layer'"),
    (gradient, Watched, (clips(), 0), {"seed": [1]}, ValueError, "seed: got 1 seeds"),
    (gradient, lambda: Wrapped(lambda y: y.softmax(1)), (clips(), 0), {}, ValueError,
     "model: got probabilities"),
    (gradient, lambda: Wrapped(lambda y: y[:, 0]), (clips(), 0), {}, ValueError,
     r"model: got output \(1,\)"),
    (gradient, lambda: Wrapped(lambda y: y * math.nan), (clips(), 0), {}, ValueError,
     "model: got NaN"),
    (gradient, lambda: Wrapped(lambda y: {"logits": y}), (clips(), 0), {}, ValueError,
     "model: got output dict"),
    (gradient, NoGradient, (clips(), 0), {}, ValueError, "model: got no gradient"),
    (gradient, Numpy, (clips(), 0), {}, ValueError, "model: got no gradient"),
    (step, NoGradient, (clips(), 0), {}, ValueError, "model: got no gradient"),
    (masks, NoGradient, (clips(), 0), {}, ValueError, "model: got no gradient"),
    (step, Watched, (clips(), 0), {"preset": "best"}, ValueError, "preset: got 'best'.*'default'"),
    (step, Watched, (clips(), 0), {"area": 0.1}, ValueError, "option: got 'area'.*'areas'"),
    (step, Watched, (clips(), 0), {"areas": ()}, ValueError, "areas: got"),
    (step, Watched, (clips(), 0), {"areas": (0.2, 0.1)}, ValueError, "areas: got"),
    (step, Watched, (clips(), 0), {"areas": (0.1, 1.5)}, ValueError, "areas: got"),
    (step, Watched, (clips(), 0), {"iterations": 0}, ValueError, "iterations: got 0"),
    (step, Watched, (clips(), 0), {"iterations": 2.5}, ValueError, "iterations: got 2.5"),
    (step, Watched, (clips(), 0), {"variant": "keep"}, ValueError, "variant: got 'keep'"),
    (step, Watched, (clips(), 0), {"removal": "white"}, ValueError, "removal: got 'white'.*'blur'"),
    (step, Watched, (clips(), 0), {"kernel_shape": "cube"}, ValueError, "kernel_shape: got 'cube'"),
    (step, Watched, (clips(), 0), {"kernel_length": 9, "iterations": 1}, ValueError,
     "kernel_length: got kernel"),
    (step, Watched, (clips(), 0), {"learning_rate": -1}, ValueError, "learning_rate: got -1"),
    (step, Watched, (clips(), 0), {"iterations": True}, ValueError, "iterations: got True"),
    (step, Watched, (clips(), 0), {"momentum": 1.5}, ValueError, "momentum: got 1.5"),
    (step, Watched, (clips(), 0), {"core_weight": -1}, ValueError, "core_weight: got -1"),
    (step, Watched, (clips(), 0), {"area_growth": math.nan}, ValueError, "area_growth: got nan"),
    (insertion, Watched, (clips(), maps(), 0), {"by": 3}, ValueError, "option: got 'by'.*'order'"),
    (insertion, Watched, (clips(), maps(1), 0), {}, ValueError, r"maps: got shape \(1, 4"),
    (insertion, Watched, (clips(), maps() * math.nan, 0), {}, ValueError, "maps: got NaN"),
    (insertion, Watched, (clips(), maps(), 0), {"order": "best"}, ValueError, "order: got 'best'"),
    (insertion, Watched, (clips(), maps(), 0), {"unit": "voxel"}, ValueError, "unit: got 'voxel'"),
    (insertion, Watched, (clips(), maps(), 0), {"rule": "sum"}, ValueError, "rule: got 'sum'"),
    (insertion, Watched, (clips(), maps(), 0), {"steps": 0}, ValueError, "steps: got 0"),
    (deletion, Watched, (clips(), maps(), 0), {"baseline": "x"}, ValueError, "removal: got 'x'"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_bad_call_is_refused_and_the_model_untouched(row):
    call, make, args, options, error, message = ROWS[row]
    model = make()
    watched = model if isinstance(model, nn.Module) else model.__self__
    before = state_of(watched)
    with pytest.raises(error, match=message):
        call(model, *args, **options)
    assert same_state(before, state_of(watched))


def test_the_table_is_long_enough():
    assert len(ROWS) >= 25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attribute("grad_cma", Watched(), clips(), 0),
            "method: got 'grad_cma', expected 'grad_cam'\\? It is one of 'random'",
        ),
        (
            lambda: attribute("grad_cam", Watched(), clips(), 0),
            "no default for this model.*layer='conv'",
        ),
        (lambda: attribute("grad_cam", Watched(), clips(), 0, layer="fc2"), "layer: got 'fc2'.*fc"),
        (lambda: attribute("grad_cam", Watched(), clips(), 0, layer="fc"), r"layer: got output"),
        (lambda: load_model("resnet", 3), "name: got 'resnet'.*'r50l'"),
        (lambda: load_model("r50l", 0), "num_classes: got 0"),
        (lambda: load_model("r50l", 3, variant="mine"), "variant: got 'mine'"),
        (lambda: removal.blur(levels=1), "levels: got 1"),
        (lambda: removal.blur(sigma=0), "sigma: got 0"),
        (lambda: removal.constant((0, 0)), "rgb: got"),
        (lambda: removal.black().apply(clips(), maps(1)), "mask: got shape"),
        (lambda: removal.black().apply(clips(), maps() * 2), "mask: got values"),
        (lambda: MaskGeometry(24, 24, 0, 3), "step: got 0"),
        (lambda: stats.bootstrap_mean([]), "values: got shape"),
        (lambda: stats.bootstrap_mean([1.0], samples=0), "samples: got 0"),
        (lambda: read_clip(__file__), "test_bad_input.py"),
    ],
)
def test_bad_value_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_map_that_says_nothing_is_named():
    """Of the second clip the probability is exactly 1: no gradient is left of it."""
    certain = torch.tensor([[0.0, 0.0], [1e4, 0.0]])
    model = Wrapped(lambda y: y + certain[-len(y) :])
    with pytest.warns(UserWarning, match=r"gradient: the map of clips \[1\] is the same"):
        found = gradient(model, clips(), 0)
    assert found[0].any()
    assert not found[1].any()


def test_nan_that_appears_on_the_way_is_reported():
    class Explodes(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            y = x.mean((2, 3, 4))
            return y if self.calls < 3 else y * math.nan

    with pytest.raises(ValueError, match="model: got NaN"):
        step(Explodes(), clips(), 0, iterations=4)
    with pytest.raises(ValueError, match="model: got NaN"):
        insertion(Explodes(), clips(), maps(), 0, steps=40, batch_size=2)
