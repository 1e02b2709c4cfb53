"""The door: `attribute` for every method, and what it promises about models, seeds and batches."""

import pytest
import torch
from test_models import Watched, same_state, state_of
from torch import nn

from stepkit import attribute, methods
from stepkit.networks import load_model

FAST = {
    "step": {"iterations": 3, "areas": (0.1, 0.3)},
    "extremal_perturbation": {"iterations": 3, "areas": (0.1, 0.3)},
    "meaningful_perturbation": {"iterations": 3},
    "i_gos": {"iterations": 2, "steps": 3},
    "fg_vis": {"iterations": 3},
    "integrated_gradients": {"steps": 4},
    "blur_ig": {"steps": 4},
    "smoothgrad": {"samples": 3},
    "smoothgrad_squared": {"samples": 3},
    "xrai": {"segments": (8, 20), "steps": 3},
    "occlusion": {"window": (2, 12, 16), "stride": (2, 12, 16)},
    "rise": {"samples": 20},
    "lime": {"samples": 20, "segments": 12},
}
METHODS = list(methods().index)


def options(method, model):
    """What keeps a method quick, and the layer where none can be found."""
    layer = "layer" in methods().options[method].split(", ") and isinstance(model, Watched)
    return FAST.get(method, {}) | ({"layer": "relu"} if layer else {})


def clips(n=3, seed=0):
    return torch.randn(n, 3, 4, 24, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_finite_float32_map_per_clip(method):
    model = Watched()
    found = attribute(method, model, clips(), [0, 1, 0], **options(method, model))
    assert found.shape == (3, 4, 24, 32)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert not found.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_batch_size_and_neighbours_change_nothing(method):
    model = load_model("r2plus1d_narrow", 2)
    quick = options(method, model)
    whole = attribute(method, model, clips(), [0, 1, 0], batch_size=8, **quick)
    single = attribute(method, model, clips(), [0, 1, 0], batch_size=1, **quick)
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_same_call_same_bytes_and_the_global_state_is_left(method):
    model = load_model("r2plus1d_narrow" if method == "cam" else "r50l_narrow", 2)
    quick, state = options(method, model), torch.get_rng_state()
    one, two = (attribute(method, model, clips(), 1, seed=5, **quick) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.get_rng_state())


def test_random_maps_follow_the_seed():
    draw = [attribute("random", Watched(), clips(), 0, seed=s) for s in (0, 1, [7, 8, 9])]
    assert not torch.equal(draw[0], draw[1])
    assert torch.equal(draw[2][1:2], attribute("random", Watched(), clips(1), 0, seed=[8]))


class Fails(Watched):
    """Raises at its n-th forward pass."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("method", METHODS)
def test_model_is_as_it_was_after_a_call(method):
    model = Watched()
    before = state_of(model)
    attribute(method, model, clips(), 0, **options(method, model))
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
@pytest.mark.parametrize("at", [1, 2])
def test_model_is_as_it_was_after_an_error(method, at):
    model = Fails(at, RuntimeError("out of memory"))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        attribute(method, model, clips(), 0, batch_size=1, **options(method, model))
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("method", ["gradient", "grad_cam"])
def test_model_is_as_it_was_after_an_interrupt(method):
    model = Fails(2, KeyboardInterrupt())
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        attribute(method, model, clips(), 0, batch_size=1, **options(method, model))
    assert same_state(before, state_of(model))


def test_gradient_agrees_with_finite_differences():
    class Smooth(nn.Module):
        def forward(self, x):
            return torch.stack([x.sin().sum((1, 2, 3, 4)), x.cos().sum((1, 2, 3, 4))], 1) / 50

    x, model, h = clips(1), Smooth(), 1e-2
    found = attribute("gradient", model, x, 1)[0, 1, 5, 7]
    slopes = []
    for channel in range(3):
        up, down = x.clone().double(), x.clone().double()
        up[0, channel, 1, 5, 7] += h
        down[0, channel, 1, 5, 7] -= h
        slopes.append((model(up).softmax(1)[0, 1] - model(down).softmax(1)[0, 1]).abs() / (2 * h))
    assert found == pytest.approx(float(sum(slopes) / 3), rel=1e-3)


def test_gradient_agrees_with_captum():
    saliency = pytest.importorskip("captum.attr").Saliency
    model, x = load_model("r2plus1d_narrow", 4), clips(2)
    phi = nn.Sequential(model, nn.Softmax(1))
    expected = saliency(phi).attribute(x.clone().requires_grad_(), target=torch.tensor([1, 3]))
    found = attribute("gradient", model, x, [1, 3])
    torch.testing.assert_close(found, expected.mean(1), rtol=1e-4, atol=1e-8)


class OneStep(nn.Module):
    """One time step at its layer, where Grad-CAM per step and Grad-CAM over all agree."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.fc = nn.Conv3d(3, 6, (4, 5, 5), stride=(1, 4, 4)), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu_().mean((2, 3, 4)))  # in place, behind the hooked layer


def test_grad_cam_agrees_with_captum_where_the_layer_has_one_time_step():
    attr = pytest.importorskip("captum.attr")
    model, x = OneStep(), clips(2)

    class Safe(OneStep):
        def forward(self, x):
            return self.fc(self.conv(x).relu().mean((2, 3, 4)))

    safe = Safe()
    cam = attr.LayerGradCam(safe, safe.conv).attribute(x, target=torch.tensor([0, 2]))
    cam = cam.detach().relu()[:, 0]  # (N, 1, h, w)
    expected = nn.functional.interpolate(cam, (24, 32), mode="bilinear", align_corners=False)
    found = attribute("grad_cam", model, x, [0, 2], layer="conv")
    torch.testing.assert_close(found, expected.expand(-1, 4, -1, -1), rtol=1e-4, atol=1e-7)


def test_grad_cam_weights_each_time_step_by_itself():
    model, x = load_model("r2plus1d_narrow", 4), clips(1)
    kept = {}
    handle = model.layer3.register_forward_hook(lambda m, i, o: kept.update(a=o))
    logit = model(x)[0, 2]
    handle.remove()
    (slope,) = torch.autograd.grad(logit, kept["a"])
    a, g = kept["a"][0].detach(), slope[0]
    K, T, H, W = a.shape
    cam = torch.zeros(T, H, W)
    for t in range(T):
        for k in range(K):
            cam[t] += g[k, t].sum() / (H * W) * a[k, t]
    expected = nn.functional.interpolate(cam.relu()[None], (24, 32), mode="bilinear")[0]
    found = attribute("grad_cam", model, x, 2)[0]
    for t in range(4):
        torch.testing.assert_close(found[t], expected[t * T // 4], rtol=1e-4, atol=1e-7)


def test_grad_cam_folds_frames_back_for_a_frame_by_frame_network():
    model, x = load_model("r50l_narrow", 4), clips(2)
    found = attribute("grad_cam", model, x, [0, 1])
    assert found.shape == (2, 4, 24, 32)
    # frames are told apart
    assert (found[:, 0] - found[:, 1]).abs().max() > 0
