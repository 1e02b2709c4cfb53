"""Optimised masks other than STEP: against the plain loops in `reference`, and known answers."""

import contextlib
import copy
import math

import numpy as np
import pytest
import reference
import torch
from planted import Planted, near, noise, tube
from test_models import same_state, state_of
from test_step import Sensor
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet

from stepkit import attribute, step
from stepkit.attribution._calls import Activations
from stepkit.attribution.optimised import _defence, line_search
from stepkit.models import out_of_place
from stepkit.networks import load_model

SIZE = (2, 7, 10)  # T, H, W
CELL = {"cell": 3}  # 3×4 cells, not square and not dividing the frame
QUICK = {
    "meaningful_perturbation": {"iterations": 3},
    "i_gos": {"iterations": 2, "steps": 3},
    "fg_vis": {"iterations": 3},
    "extremal_perturbation": {"iterations": 3, "areas": (0.1, 0.3)},
}
METHODS = list(QUICK)


def levels_of(clip, rungs=2):
    """The clip's blur pyramid with the default σ, float64."""
    return reference.pyramid(clip, rungs, 20 * min(clip.shape[2:]) / 112)


# ---------------------------------------------------------------------------- against the equations


@pytest.mark.parametrize(
    ("variant", "iterations", "rungs"),
    [
        ("preservation", 1, 2),
        ("preservation", 3, 2),
        ("preservation", 2, 8),
        ("deletion", 1, 2),
        ("deletion", 3, 2),
    ],
)
def test_meaningful_perturbation_agrees_with_equation_1_and_adam(variant, iterations, rungs):
    model, clips, targets = Sensor(SIZE), noise(*SIZE, n=2), [2, 0]
    options = {"area_weight": 0.05, "smoothness": 5.0, "beta": 3.0, "variant": variant, **CELL}
    if rungs != 2:
        options["removal"] = "blur"  # the default is Eq. 2
    found = attribute(
        "meaningful_perturbation", model, clips, targets, iterations=iterations, **options
    )
    literal = copy.deepcopy(model).double()
    for clip, target, mask in zip(clips, targets, found, strict=True):
        expected = reference.meaningful_perturbation(
            *(literal, clip, levels_of(clip, rungs), target, (2, 3, 4), iterations),
            *(0.05, 5.0, 3.0, variant),
        )
        assert expected.min() < expected.max()
        torch.testing.assert_close(mask.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("search", ["mask", "path"])
def test_i_gos_agrees_with_the_integrated_gradient_and_its_line_search(search):
    model, clips, targets, seeds = Sensor(SIZE), noise(*SIZE, n=2), [2, 0], [5, 6]
    options = {"iterations": 2, "steps": 2, "area_weight": 0.05, "smoothness": 0.5, "beta": 2.0}
    options |= {"noise": 0.2, "search": search, **CELL}
    found = attribute("i_gos", model, clips, targets, seed=seeds, **options)
    literal = copy.deepcopy(model).double()
    for clip, target, seed, answer in zip(clips, targets, seeds, found, strict=True):
        draw = torch.Generator().manual_seed(seed)
        drawn = [[0.2 * torch.randn(clip.shape, generator=draw) for _ in "12"] for _ in "12"]
        expected = reference.i_gos(
            literal, clip, levels_of(clip), target, (2, 3, 4), 2, 2, 0.05, 0.5, 2.0, drawn, search
        )
        assert expected.max() > 0.03
        torch.testing.assert_close(answer.double(), expected, rtol=0, atol=2e-5)


def test_line_search_finds_each_clips_own_step():
    # F(M) = k·mean((M−½)²): the stiffer the bowl, the shorter the step; the last one is uphill
    stiff = torch.tensor([0.5, 3.0, 60.0, 1.0])
    cells = torch.rand(4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    slope = stiff[:, None, None, None] * (cells - 0.5) / 4 * 28**2 / 30
    slope[3] *= -1
    found = line_search(lambda m: stiff * (m - 0.5).square().mean((1, 2, 3)), cells, slope)
    alphas = []
    for k, mask, direction, answer in zip(stiff, cells, slope, found, strict=True):
        expected, alpha = reference.line_search(
            lambda m, k=k: k * (m - 0.5).square().mean(), mask, direction
        )
        alphas.append(alpha)
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
    # the step that comes below 1e-5 is taken as it is
    assert alphas == pytest.approx([8, 1.6, 0.064, 8 * 0.2**9])


class TwoLayers(nn.Module):
    def __init__(self, W, V):
        super().__init__()
        self.register_buffer("W", torch.as_tensor(W).float())
        self.register_buffer("V", torch.as_tensor(V).float())

    def forward(self, clips):
        return (clips.flatten(1) @ self.W.T).relu() @ self.V.T


def test_fg_vis_stops_the_gradient_at_neurons_that_left_their_range():
    # by hand: h(x) = (1, 2, 0, 1), h(e) = (2, 1, 1, 0); neurons 1 and 3 are new evidence, 4 is shut
    W = [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]
    bounds = []
    with Activations(lambda h: bounds.append(h.detach())):
        (torch.tensor([1.0, 2.0]) @ torch.tensor(W).T).relu()
    e = torch.tensor([2.0, 1.0], requires_grad=True)
    with Activations(_defence(bounds)):
        h = (e @ torch.tensor(W).T).relu()
    assert torch.autograd.grad(h.sum(), e)[0].tolist() == [0, 1]
    _, stopped = reference.defended_gradient(np.array(W), np.ones((2, 4)), [1, 2], [2, 1], 0)
    assert stopped == [True, False, True, False]


def test_fg_vis_bounds_negative_activations_from_below():
    # leaky ReLU: h(x) = −0.1 allows −0.1..0, h(x) = 3 allows 0..3
    bounds = [F.leaky_relu(torch.tensor([-1.0, -1.0, -1.0, -1.0, 3.0, 3.0, 3.0]), 0.1)]
    e = torch.tensor([-0.5, -1.0, -2.0, 1.0, 2.0, -1.0, 4.0], requires_grad=True)
    with Activations(_defence(bounds)):
        h = nn.LeakyReLU(0.1)(e)
    stopped = torch.autograd.grad(h.sum(), e)[0] == 0
    assert stopped.tolist() == [False, False, True, True, False, True, True]


@pytest.mark.parametrize("iterations", [1, 3, 12])
def test_fg_vis_agrees_with_a_two_layer_net_solved_neuron_by_neuron(iterations):
    size, neurons = (1, 2, 3), 12
    rng = np.random.default_rng(4)
    W, V = rng.normal(size=(neurons, 3 * math.prod(size))), rng.normal(size=(3, neurons)) / 4
    clips, targets = noise(*size, n=2), [1, 2]
    found = attribute(
        "fg_vis", TwoLayers(W, V), clips, targets, iterations=iterations, area_weight=2.0
    )
    for clip, target, answer in zip(clips, targets, found, strict=True):
        x = clip.flatten().double().numpy()
        mask = reference.fg_vis(W, V, x, target, iterations, 2.0).reshape(clip.shape)
        if iterations == 12:
            _, stopped = reference.defended_gradient(W, V, x, mask.flatten() * x, target)
            assert 0 < sum(stopped) < neurons
        torch.testing.assert_close(answer.double(), torch.from_numpy(mask).mean(0))


def test_extremal_perturbation_is_step_without_the_core_term():
    model, clips = Sensor((4, 12, 14)), noise(4, 12, 14, n=2)
    options = {"areas": (0.1, 0.4), "iterations": 12, "variant": "dual", "removal": "fade"}
    found = attribute("extremal_perturbation", model, clips, 1, **options)
    assert torch.equal(found, step(model, clips, 1, kernel_length=0, **options).heatmap)
    assert not torch.equal(found, step(model, clips, 1, **options).heatmap)


# ---------------------------------------------------------------------------- known answers

TRIAL = (4, 32, 40)


class PlantedReLU(Planted):
    """The same model with the clip's texture behind an activation function."""

    def forward(self, clips):
        return super().forward(clips.relu() + (-clips).relu())


@pytest.mark.parametrize(
    ("method", "options", "n", "least"),
    [
        ("meaningful_perturbation", {"iterations": 50}, 20, 0.6),
        ("meaningful_perturbation", {"iterations": 50, "removal": "blur"}, 20, 0.6),
        ("meaningful_perturbation", {"iterations": 50, "variant": "deletion"}, 20, 0.6),
        ("i_gos", {"iterations": 5, "steps": 8}, 20, 0.9),
        ("i_gos", {"iterations": 5, "steps": 4, "search": "path"}, 20, 0.9),
        ("fg_vis", {"iterations": 80, "area_weight": 30.0}, 20, 0.6),
        ("extremal_perturbation", {"iterations": 50, "areas": (0.05,)}, 4, 0.5),
    ],
)
def test_masks_lie_on_the_evidence(method, options, n, least):
    region = tube(*TRIAL)
    around = near(region, 7 * 32 / 112)
    assert around.float().mean() < 0.12, "chance"
    model = (PlantedReLU if method == "fg_vis" else Planted)(region)
    maps = attribute(method, model, noise(*TRIAL, n=n), 1, batch_size=n, **options)
    hits = region.flatten()[maps.flatten(1).argmax(1)].float().mean()
    assert hits >= 0.95
    mass = (maps * around).sum((1, 2, 3)) / maps.sum((1, 2, 3))
    assert mass.mean() >= least, f"{mass.mean():.2f}, where chance is {around.float().mean():.2f}"


@pytest.mark.parametrize("method", ["meaningful_perturbation", "i_gos", "fg_vis"])
def test_nothing_lies_on_evidence_of_another_model(method):
    # the control: a mask for a model that reads another tube
    elsewhere = PlantedReLU(tube(*TRIAL, (0.75, 0.75)))
    around = near(tube(*TRIAL, (0.2, 0.2)), 2)
    options = {"fg_vis": {"iterations": 80, "area_weight": 30.0}}.get(method, {"iterations": 5})
    maps = attribute(method, elsewhere, noise(*TRIAL, n=2), 1, **options)
    assert float((maps * around).sum() / maps.sum()) < around.float().mean() * 1.1


# ---------------------------------------------------------------------------- what holds of any run


class Awkward(nn.Module):
    """In place, functional, one module twice; can raise at a forward pass of choice."""

    def __init__(self, at=0, error=None):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            self.stem = nn.Conv2d(3, 4, 3, 2, 1)
            self.block = resnet.BasicBlock(4, 4)  # out += identity, self.relu twice, in place
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)
        self.fc.weight.requires_grad_(False)
        self.at, self.error, self.calls = at, error, 0

    def forward(self, clips):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        x = F.relu(self.stem(clips.transpose(1, 2).flatten(0, 1)), inplace=True)
        x = self.drop(self.block(x)).mean((2, 3)).unflatten(0, (len(clips), -1))
        return self.fc(x.mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_neighbours_and_batch_size_change_nothing(method):
    model, clips, targets = load_model("r2plus1d_narrow", 3), noise(3, 20, 24, n=3), [0, 1, 2]
    options = QUICK[method] | ({"area_weight": 0.0} if method == "i_gos" else {})
    together = attribute(method, model, clips, targets, seed=[7, 8, 9], **options)
    pairs = attribute(method, model, clips, targets, seed=[7, 8, 9], batch_size=2, **options)
    alone = attribute(method, model, clips[1:2], 1, seed=[8], **options)
    torch.testing.assert_close(pairs, together, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()])
def test_model_and_torch_are_as_they_were(method, error):
    model = Awkward(0 if error is None else 3, error)

    def kinds():
        return [(type(m), [*vars(m)], getattr(m, "inplace", None)) for m in model.modules()]

    before, built, random = state_of(model), kinds(), torch.get_rng_state()
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        attribute(method, model, noise(2, 12, 14, n=2), 1, **QUICK[method])
    assert same_state(before, state_of(model))
    assert built == kinds()
    assert torch.equal(random, torch.get_rng_state())
    assert torch._C._len_torch_function_stack() == 0, "nothing listens to torch any more"


def test_fg_vis_sees_activations_in_place_as_functions_and_of_one_module_twice():
    model, clips, seen = Awkward().eval(), noise(2, 12, 14, n=2), []
    with Activations(lambda h: seen.append(h.clone())):
        model(clips)
    assert len(seen) == 3
    assert all(h.min() == 0 < h.max() for h in seen)
    plain = Awkward()
    plain.block = out_of_place(nn.Sequential(copy.deepcopy(model.block)))[0]
    one, other = (attribute("fg_vis", net, clips, 1, iterations=5) for net in (model, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert one.min() < 0.9


def test_fg_vis_without_an_activation_function_says_why():
    with pytest.raises(ValueError, match=r"model: got no activation function.*expected ReLU"):
        attribute("fg_vis", Planted(tube(2, 12, 14)), noise(2, 12, 14), 1)


def test_only_i_gos_draws_and_from_its_own_seeds():
    model, clips = Sensor(SIZE), noise(*SIZE)
    draw = [attribute("i_gos", model, clips, 1, seed=s, **QUICK["i_gos"]) for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    still = [attribute("i_gos", model, clips, 1, seed=s, noise=0.0, iterations=2) for s in (3, 4)]
    assert torch.equal(*still)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(1, 9, 13), (3, 11, 8)])
def test_any_size_gives_a_map_with_values(method, size):
    maps = attribute(method, Awkward(), noise(*size, n=1), 2, **QUICK[method])
    assert maps.shape == (1, *size)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert torch.isfinite(maps).all()
    assert maps.min() >= 0
    assert maps.min() < maps.max()


BAD = [
    ("meaningful_perturbation", {"iterations": 0}, "iterations: got 0"),
    ("meaningful_perturbation", {"iterations": 2.5}, "iterations: got 2.5"),
    ("meaningful_perturbation", {"learning_rate": 0}, "learning_rate: got 0"),
    ("meaningful_perturbation", {"area_weight": -1}, "area_weight: got -1"),
    ("meaningful_perturbation", {"smoothness": -1}, "smoothness: got -1"),
    ("meaningful_perturbation", {"beta": 0.5}, "beta: got 0.5"),
    ("meaningful_perturbation", {"cell": 0}, "cell: got 0"),
    ("meaningful_perturbation", {"variant": "dual"}, "variant: got 'dual'"),
    ("meaningful_perturbation", {"removal": "smear"}, "removal: got 'smear'"),
    ("i_gos", {"iterations": 0}, "iterations: got 0"),
    ("i_gos", {"steps": 0}, "steps: got 0"),
    ("i_gos", {"noise": -0.1}, "noise: got -0.1"),
    ("i_gos", {"search": "line"}, "search: got 'line'"),
    ("i_gos", {"cell": 1.5}, "cell: got 1.5"),
    ("fg_vis", {"iterations": True}, "iterations: got True"),
    ("fg_vis", {"learning_rate": -1}, "learning_rate: got -1"),
    ("fg_vis", {"area_weight": -2}, "area_weight: got -2"),
    ("extremal_perturbation", {"kernel_length": 5}, "option: got 'kernel_length'"),
    ("extremal_perturbation", {"areas": (2,)}, "areas: got"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_bad_values_name_the_argument(method, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(method, Awkward(), noise(2, 12, 14), 1, **options)
