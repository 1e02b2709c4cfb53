"""Gradients of Φ_c, averaged over points: literal twins, Captum, completeness, memory."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from planted import Planted, noise, tube
from torch import nn

from stepkit import attribute
from stepkit.attribution import Work
from stepkit.attribution.gradients import (
    blur_ig,
    blur_path_gradient,
    gradient_x_input,
    integrated_gradients,
    path_gradient,
    smoothgrad,
    smoothgrad_squared,
)
from stepkit.models.scores import probability
from stepkit.removal import black, gaussian_blur

METHODS = {
    "gradient_x_input": {},
    "integrated_gradients": {"steps": 7},
    "smoothgrad": {"samples": 7},
    "smoothgrad_squared": {"samples": 7},
    "blur_ig": {"steps": 7},
}
SIZE = (3, 12, 10)


WORK = Work(batch_size=4)


class Net(nn.Module):
    """A small network with ReLU and tanh, in float64; remembers its largest batch."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.conv, self.fc = nn.Conv3d(3, 5, 3, padding=1), nn.Linear(5, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=draw)
        self.to(dtype)
        self.largest = 0

    def forward(self, x):
        self.largest = max(self.largest, len(x))
        return 3 * self.fc(torch.tanh(self.conv(x).relu()).mean((2, 3, 4)))


def clips(n=2, dtype=torch.float64):
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("rule", ["right", "left"])
def test_integrated_gradients_are_eq_24(rule):
    net, x, targets = Net(), clips(), torch.tensor([2, 0])
    baseline = black().nothing(x)
    found = path_gradient(net, x, targets, WORK, baseline, 6, rule=rule)
    pairs = zip(x, baseline, targets, strict=True)
    twin = [reference.integrated_gradient(net, a, b, c, 6, rule) for a, b, c in pairs]
    torch.testing.assert_close(found, torch.stack(twin))
    mapped = integrated_gradients(net, x, targets, WORK, steps=6, rule=rule)
    torch.testing.assert_close(mapped, found.abs().mean(1))


@pytest.mark.parametrize("squared", [False, True])
def test_smoothgrad_is_eqs_25_and_26(squared):
    net, x, targets, seeds = Net(), clips(), torch.tensor([2, 0]), [5, 6]
    run = smoothgrad_squared if squared else smoothgrad
    found = run(net, x, targets, replace(WORK, seeds=seeds), samples=5, noise=0.2)
    for clip, c, seed, mapped in zip(x, targets, seeds, found, strict=True):
        draw, sigma = torch.Generator().manual_seed(seed), 0.2 * (clip.max() - clip.min())
        noises = [sigma * torch.randn(clip.shape, generator=draw).double() for _ in range(5)]
        twin = reference.smooth_gradient(net, clip, c, noises, squared)
        torch.testing.assert_close(mapped, (twin if squared else twin.abs()).sum(0))


def test_blur_ig_is_eq_27():
    net, x, targets = Net(), clips(), torch.tensor([2, 0])
    found = blur_path_gradient(net, x, targets, WORK, 5, 3.0)
    pairs = zip(x, targets, strict=True)
    twin = [reference.blur_integrated_gradient(net, clip, c, 5, 3.0) for clip, c in pairs]
    torch.testing.assert_close(found, torch.stack(twin), rtol=1e-5, atol=1e-9)
    mapped = blur_ig(net, x, targets, WORK, steps=5, sigma_max=3.0)
    torch.testing.assert_close(mapped, found.abs().mean(1))


@pytest.mark.parametrize("sigma", [0.495, 0.7, 1.245, 2.995, 7.745, 10.245, 12.0])
def test_blur_ig_follows_the_derivative_of_the_gaussian(sigma):
    """Of its own kernel, not truncated: ⌈4σ⌉ jumps just above the σ that end in 5."""

    def kernel_and_slope(length):
        # at the middle of the difference, where it is exact to the second order
        offsets, s = torch.arange(-400, 401).double(), sigma + 0.005
        bell = torch.exp(-(offsets**2) / (2 * s**2))
        kernel, slope = bell / bell.sum(), bell * offsets**2 / s**3
        slope = (slope - kernel * slope.sum()) / bell.sum()
        at = 400 + torch.arange(length)[:, None] - torch.arange(length)
        return kernel[at], slope[at]

    net, x, target = Net(), clips(1), torch.tensor([2])
    (rows, row_slope), (columns, column_slope) = map(kernel_and_slope, SIZE[1:])
    slope = row_slope @ x @ columns.T + rows @ x @ column_slope.T
    # two points of the path: the clip, where ∂g/∂σ = 0, and σ
    found = blur_path_gradient(net, x, target, WORK, 2, 2 * sigma)
    blurred = gaussian_blur(x, sigma, reach=400)
    expected = sigma * slope[0] * reference.probability_gradient(net, blurred[0], 2)
    assert (found[0] - expected).norm() < 2e-4 * expected.norm()


def test_the_strongest_blur_follows_the_frame():
    net, x, targets = Net(), clips(), torch.tensor([2, 0])
    scaled = blur_ig(net, x, targets, WORK, steps=3, sigma_max=50 * 10 / 112)
    torch.testing.assert_close(blur_ig(net, x, targets, WORK, steps=3), scaled)


def test_integrated_gradients_are_complete():
    net, x, targets = Net(), clips(), torch.tensor([2, 0])
    baseline = black().nothing(x)
    with torch.no_grad():
        gap = probability(net(x), targets) - probability(net(baseline), targets)
    errors = []
    for steps in (20, 200):
        found = path_gradient(net, x, targets, WORK, baseline, steps)
        errors.append((found.sum((1, 2, 3, 4)) - gap).abs().max())
    assert errors[1] < 0.02 * gap.abs().max()
    assert errors[1] < errors[0] / 5


def test_blur_ig_is_complete():
    net, x, targets = Net(), clips(), torch.tensor([2, 0])
    with torch.no_grad():
        gap = probability(net(gaussian_blur(x, 2.0)), targets) - probability(net(x), targets)
    found = blur_path_gradient(net, x, targets, WORK, 300, 2.0).sum((1, 2, 3, 4))
    torch.testing.assert_close(found, gap, rtol=0.02, atol=0.02 * float(gap.abs().max()))


class Probability(nn.Module):
    """What Captum has to differentiate: Φ of all classes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(1)


def test_captum_agrees():
    captum = pytest.importorskip("captum.attr")
    net, x, targets = Net(), clips(), torch.tensor([2, 0])
    scores = Probability(net)
    found = captum.InputXGradient(scores).attribute(x.clone().requires_grad_(), target=targets)
    torch.testing.assert_close(gradient_x_input(net, x, targets, WORK), found.detach().sum(1).abs())
    options = {"target": targets, "n_steps": 9, "baselines": black().nothing(x)}
    for rule in ("right", "left"):
        found = captum.IntegratedGradients(scores).attribute(x, method=f"riemann_{rule}", **options)
        ours = integrated_gradients(net, x, targets, WORK, steps=9, rule=rule)
        torch.testing.assert_close(ours, found.abs().mean(1))


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq"])
def test_captums_noise_tunnel_agrees_on_the_same_noise(kind, monkeypatch):
    captum = pytest.importorskip("captum.attr")
    net, x, target = Net(), clips(1), torch.tensor([1])
    draw, sigma = torch.Generator().manual_seed(3), 0.15 * float(x.max() - x.min())
    noises = torch.stack([torch.randn(x.shape[1:], generator=draw).double() for _ in range(4)])
    monkeypatch.setattr(torch, "normal", lambda mean, std: sigma * noises)
    tunnel = captum.NoiseTunnel(captum.Saliency(Probability(net)))
    options = {"nt_type": kind, "nt_samples": 4, "stdevs": sigma, "target": target, "abs": False}
    found = tunnel.attribute(x, **options)
    run = smoothgrad if kind == "smoothgrad" else smoothgrad_squared
    ours = run(net, x, target, replace(WORK, seeds=[3]), samples=4)
    torch.testing.assert_close(ours, found.abs().sum(1))


@pytest.mark.parametrize("method", METHODS)
def test_neither_batches_nor_neighbours_change_a_map(method):
    net, x = Net(torch.float32), clips(3, torch.float32)
    options = METHODS[method]
    found = [
        attribute(method, net, x, [0, 1, 2], batch_size=b, seed=[4, 5, 6], **options)
        for b in (1, 3, 64)
    ]
    alone = attribute(method, net, x[1:2], [1], seed=[5], **options)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[0][1:2], alone, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m]])
def test_no_more_points_than_batch_size_are_in_memory(method):
    net, x = Net(torch.float32), clips(2, torch.float32)
    attribute(method, net, x, 0, batch_size=3, **METHODS[method])
    assert net.largest == 3


@pytest.mark.parametrize("method", ["smoothgrad", "smoothgrad_squared"])
def test_noise_comes_from_the_seed_alone(method):
    net, x = Net(torch.float32), clips(2, torch.float32)
    state = torch.get_rng_state()
    one, same, other = (attribute(method, net, x, 0, seed=s, samples=3) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_leaves_the_model_as_it_was(method):
    class Stops(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise KeyboardInterrupt
            return super().forward(x)

    net = Stops(torch.float32).train()
    with pytest.raises(KeyboardInterrupt):
        attribute(method, net, clips(2, torch.float32), 0, batch_size=1, **METHODS[method])
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("integrated_gradients", {"steps": 0}, "steps: got 0"),
        ("integrated_gradients", {"rule": "middle"}, "rule: got 'middle'"),
        ("integrated_gradients", {"baseline": "white"}, "removal: got 'white'"),
        ("smoothgrad", {"samples": 2.5}, "samples: got 2.5"),
        ("smoothgrad_squared", {"noise": -1}, "noise: got -1"),
        ("blur_ig", {"steps": True}, "steps: got True"),
        ("blur_ig", {"sigma_max": 0}, "sigma_max: got 0"),
    ],
)
def test_bad_values_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(method, Net(torch.float32), clips(1, torch.float32), 0, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_maximum_is_on_the_evidence(method):
    # a gentle model: under SmoothGrad's noise, a sure one has no slope left in float32
    size = (4, 24, 24)
    region, found = tube(*size), []
    model = Planted(region, gain=2.0)
    found = attribute(method, model, noise(*size, n=40), 1, **METHODS[method])
    hits = region.flatten()[found.flatten(1).argmax(1)].float().mean()
    assert hits >= 0.95
    assert np.isfinite(found.numpy()).all()
