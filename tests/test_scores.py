"""Scores other than Φ_c, through every method and metric; networks as people have them (wrap)."""

import types
import warnings

import pytest
import torch
from torch import nn
from torchvision.models import video
from torchvision.transforms import Normalize

import stepkit as sk
from stepkit.attribution import methods
from stepkit.clips import MEAN, STD, normalise
from stepkit.models.wrapped import Wrapped

FEW = {  # options that make a method quick
    "step": {"preset": "fast", "iterations": 3},
    "extremal_perturbation": {"preset": "fast", "iterations": 3},
    "meaningful_perturbation": {"iterations": 3},
    "fg_vis": {"iterations": 3},
    "i_gos": {"iterations": 2, "steps": 2},
    "rise": {"samples": 20},
    "lime": {"samples": 20, "segments": 8},
    "xrai": {"segments": (4, 8), "steps": 3},
    "integrated_gradients": {"steps": 3},
    "blur_ig": {"steps": 3},
    "smoothgrad": {"samples": 3},
    "smoothgrad_squared": {"samples": 3},
    "occlusion": {"window": (2, 8, 8)},
}


class Net(nn.Module):
    """Convolution, ReLU, average, one linear layer with a row of weights per output."""

    cam_layer = "relu"

    def __init__(self, rows):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv, self.relu = nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()
        self.fc = nn.Linear(4, len(rows))
        with torch.no_grad():
            for values in self.conv.parameters():
                values.copy_(torch.randn(values.shape, generator=generator) / 4)
            self.fc.weight.copy_(torch.tensor(rows, dtype=torch.float32))
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3, 4)))


ROW = [1.5, -2.0, 3.0, 1.0]
ONE, TWO = Net([ROW]), Net([ROW, [0.0] * 4])  # sigmoid(z) is the softmax of (z, 0)


def clips(n=2, frames=4, size=16, seed=0):
    return torch.randn(n, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", [name for name in methods().index if name != "random"])
@pytest.mark.filterwarnings("ignore:step")
def test_a_sigmoid_of_one_logit_is_the_softmax_of_it_and_zero(method):
    options = {"batch_size": 2} | FEW.get(method, {})
    expected = sk.attribute(method, TWO, clips(), 0, **options)
    found = sk.attribute(method, ONE, clips(), 0, score="sigmoid", **options)
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric", [sk.insertion, sk.deletion])
def test_curves_of_a_sigmoid_are_those_of_the_softmax_of_it_and_zero(metric):
    maps = clips().abs().mean(1)
    expected = metric(TWO, clips(), maps, 0, steps=5).curve
    found = metric(ONE, clips(), maps, 0, steps=5, score="sigmoid").curve
    torch.testing.assert_close(found, expected)


class Multi(nn.Module):
    """Label 0 is told from the left half, label 1 from the right: a sigmoid each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        half = x.shape[-1] // 2
        return self.weight * torch.stack([x[..., :half].mean((1, 2, 3, 4)),
                                          x[..., half:].mean((1, 2, 3, 4))], 1)  # fmt: skip


def test_one_label_of_several_is_explained_by_its_own_evidence():
    x = 1 + 0.1 * clips(1)
    p = Multi()(x).sigmoid()[0, 0].item()
    slope = p * (1 - p) * 4 / x[..., :8].numel()
    found = sk.attribute("gradient", Multi(), x, 0, score="sigmoid")[0]
    torch.testing.assert_close(found[..., :8], torch.full((4, 16, 8), slope))
    assert not found[..., 8:].any()
    assert sk.insertion(Multi(), x, found[None], 0, steps=4, score="sigmoid").curve[0, -1] == (
        pytest.approx(p)
    )
    masks = sk.step(Multi(), x, 0, "fast", iterations=5, score="sigmoid")
    kept = sk.removal.blur().apply(x, masks.masks[:, -1])
    assert masks.clip_probability.item() == pytest.approx(p)
    torch.testing.assert_close(masks.probabilities[:, -1], Multi()(kept).sigmoid()[:, 0].detach())


@pytest.mark.parametrize("score", ["value", "logit", lambda output, targets: output[:, 0]])
def test_a_score_without_bounds_is_explained_as_it_is(score):
    x = clips(1)
    found = sk.attribute("gradient", Multi(), x, 0, score=score)[0]
    torch.testing.assert_close(found[..., :8], torch.full((4, 16, 8), 4 / x[..., :8].numel()))
    masks = sk.step(Multi(), x + 1, 0, "fast", iterations=5, score=score)
    torch.testing.assert_close(masks.clip_probability, Multi()(x + 1)[:, 0].detach())
    kept = sk.removal.blur().apply(x + 1, masks.masks[:, -1])
    torch.testing.assert_close(masks.probabilities[:, -1], Multi()(kept)[:, 0].detach())
    assert torch.isnan(masks.smallest(100.0)[0]).all()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_regression_has_one_output_with_or_without_an_axis(shape):
    class Regression(Multi):
        def forward(self, x):
            return 1000 * super().forward(x)[:, 0].view(shape)

    x = clips(2) + 1
    found = sk.step(Regression(), x, 0, "fast", iterations=40, score="value")
    assert (found.visible_share[:, -1] < 0.5).all()  # its size does not outweigh the area
    curve = sk.deletion(Regression(), x, found.heatmap, 0, steps=4, score="value").curve
    torch.testing.assert_close(curve[:, 0], Regression()(x).flatten().detach())


def test_a_group_is_the_sum_of_its_classes():
    model, x = Net([ROW, [0.0, 1.0, 0.0, 2.0], [1.0] * 4, [-1.0] * 4]), clips()
    given = x.clone().requires_grad_()
    p = model(given).softmax(1)
    expected = torch.autograd.grad((p[0, 0] + p[0, 3] + p[1, 1] + p[1, 2]), given)[0]
    score = sk.scores.group([[0, 3], [1, 2]])
    found = sk.attribute("gradient", model, x, [0, 1], score=score)
    torch.testing.assert_close(found, expected.abs().mean(1))
    curve = sk.insertion(model, x, found, [0, 1], steps=3, score=score).curve[:, -1]
    torch.testing.assert_close(curve, torch.stack([p[0, 0] + p[0, 3], p[1, 1] + p[1, 2]]).detach())
    one = sk.scores.group(range(1, 3))
    output, zero = model(x).detach(), torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(one(output, zero), p[:, 1:3].sum(1).detach())
    torch.testing.assert_close(one.log(output, zero).exp(), one(output, zero))
    with pytest.raises(ValueError, match=r"targets: got 2, expected groups 0..1"):
        sk.attribute("gradient", model, x, [0, 2], score=score)
    with pytest.raises(ValueError, match="classes: got"):
        sk.scores.group([])
    with pytest.raises(ValueError, match=r"score: got group.*expected that of one class"):
        sk.attribute("lrp", model, x, 0, score=one)


class Steps(Net):
    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((3, 4)).transpose(1, 2))  # (N, T, K)


def test_one_time_step_of_several():
    model, x = Steps([ROW, [1.0] * 4]), clips()
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(given).softmax(2)[:, 2, 1].sum(), given)
    found = sk.attribute("gradient", model, x, 1, score=sk.scores.at_step(2))
    torch.testing.assert_close(found, expected.abs().mean(1))
    with pytest.raises(ValueError, match="step: got 4, expected one of the model's 4 time steps"):
        sk.attribute("gradient", model, x, 1, score=sk.scores.at_step(4))
    with pytest.raises(ValueError, match=r"output \(1, 4, 2\).*expected logits \(N, K\)"):
        sk.attribute("gradient", model, x, 1)


@pytest.mark.parametrize("call", [
    lambda: sk.attribute("gradient", ONE, clips(), 0),
    lambda: sk.attribute("rise", ONE, clips(), 0, samples=5),
    lambda: sk.attribute("grad_cam", ONE, clips(), 0),
    lambda: sk.step(ONE, clips(), 0),
    lambda: sk.insertion(ONE, clips(), clips().mean(1), 0),
])  # fmt: skip
def test_the_softmax_of_one_logit_is_refused(call):
    with pytest.raises(ValueError, match=r"one logit per clip.*always 1, expected score=.sigmoid"):
        call()


def test_outputs_that_look_like_sigmoids_draw_one_warning():
    model = nn.Sequential(Net([ROW, [0.0, 1.0, 0.0, 2.0], [1.0] * 4]), nn.Sigmoid())
    with pytest.warns(UserWarning, match=r'do not sum to 1, as sigmoids.*score="value"') as told:
        sk.attribute("gradient", model, clips(), 0)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.attribute("gradient", model, clips(), 1)


def test_scores_are_named_and_refused_by_name():
    with pytest.raises(ValueError, match=r"score: got 'sigmod', expected 'sigmoid'\? It is one of"):
        sk.attribute("gradient", TWO, clips(), 0, score="sigmod")
    with pytest.raises(TypeError, match="score: got int, expected"):
        sk.step(TWO, clips(), 0, score=3)
    with pytest.raises(ValueError, match=r"\(1, 2\) for 1 clips, expected a tensor \(1,\)"):
        sk.attribute("gradient", TWO, clips(), 0, score=lambda output, targets: output)
    with pytest.raises(ValueError, match=r"targets: got 1, expected 0, the only one of the"):
        sk.attribute("gradient", ONE, clips(), [0, 1], score="sigmoid")


# ------------------------------------------------------------------------------------------- wrap


@pytest.mark.parametrize("layout", ["NTCHW", "NCHWT", "NTHWC"])
def test_layouts(layout):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TWO

        def forward(self, x):
            return self.net(torch.einsum(f"{layout}->NCTHW", x))

    found = sk.attribute("gradient", sk.wrap(Other(), layout), clips(), 0)
    torch.testing.assert_close(found, sk.attribute("gradient", TWO, clips(), 0))


def test_pathways_see_fewer_frames_the_first_and_the_last_among_them():
    shown = []

    class SlowFast(nn.Module):
        def forward(self, pathways):
            shown.extend(pathways)
            return pathways[0].mean((3, 4)).sum(1)[:, :2] + pathways[1].mean()

    x = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(1, 3, 16, 8, 8).contiguous()
    assert sk.wrap(SlowFast(), [4, 1])(x).shape == (1, 2)
    assert shown[0][0, 0, :, 0, 0].tolist() == [0, 5, 10, 15]  # SlowFast's linspace, α = 4
    assert torch.equal(shown[1], x)


@pytest.mark.parametrize(("make", "output"), [
    (lambda z: types.SimpleNamespace(logits=z, hidden=None), "logits"),
    (lambda z: {"logits": z, "loss": 0}, "logits"),
    (lambda z: (z, "auxiliary"), "logits"),
    (lambda z: [None, z], 1),
    (lambda z: {"verb": None, "noun": z}, "noun"),
    (lambda z: {"verb": z}, lambda found: found["verb"]),
])  # fmt: skip
def test_outputs(make, output):
    class Other(nn.Module):
        def forward(self, x):
            return make(x.mean((3, 4)).flatten(1))

    expected = clips().mean((3, 4)).flatten(1)
    torch.testing.assert_close(sk.wrap(Other(), output=output)(clips()), expected)
    with pytest.raises(ValueError, match=r"model: got output .*expected logits|output: got 'x'"):
        sk.attribute("gradient", sk.wrap(Other(), output="x"), clips(), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision(dtype):
    model = Net([ROW, [1.0] * 4]).to(dtype)
    with pytest.raises(ValueError, match=r"model: got RuntimeError.*sk.wrap adapts"):
        sk.attribute("gradient", model, clips(), 0)
    found = sk.attribute("gradient", sk.wrap(model), clips(), 0)
    expected = sk.attribute("gradient", Net([ROW, [1.0] * 4]), clips(), 0)
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.98
    assert sk.step(sk.wrap(model), clips(), 0, iterations=1).masks.dtype == torch.float32


@pytest.mark.parametrize("weights", [video.MViT_V2_S_Weights, video.Swin3D_T_Weights])
def test_clips_stay_in_our_normalisation_and_the_network_gets_its_own(weights):
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((3, 4)).flatten(1)

    preset = weights.DEFAULT.transforms()
    rgb = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sk.wrap(Look(), normalise=preset)(normalise(rgb)[None])
    expected = Normalize(preset.mean, preset.std)(rgb.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(seen[0][0], expected)
    sk.wrap(Look(), normalise=(MEAN, STD))(normalise(rgb)[None])
    assert torch.equal(seen[1][0], normalise(rgb))


def test_torchscript_is_explained_by_what_needs_no_layers():
    script = torch.jit.trace(Net([ROW, [1.0] * 4]).eval(), clips(1))
    for method in ("gradient", "occlusion", "integrated_gradients"):
        found = sk.attribute(method, script, clips(), 0, **FEW.get(method, {}))
        expected = sk.attribute(method, Net([ROW, [1.0] * 4]), clips(), 0, **FEW.get(method, {}))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert sk.step(script, clips(1), 0, iterations=1).masks.shape == (1, 4, 4, 16, 16)
    with pytest.raises(ValueError, match="model: got TorchScript, expected the Python module, or"):
        sk.attribute("grad_cam", script, clips(), 0, layer="conv")


@pytest.mark.parametrize("method", ["gradient", "grad_cam", "deeplift", "lrp"])
def test_networks_inside_wrap_and_compile_keep_the_names_of_their_layers(method):
    model = Net([ROW, [1.0] * 4])
    expected = sk.attribute(method, model, clips(), 0)
    for other in (sk.wrap(model), torch.compile(model, backend="eager")):
        torch.testing.assert_close(sk.attribute(method, other, clips(), 0), expected)


def test_a_network_that_writes_into_its_input_is_refused_or_wrapped():
    model = nn.Sequential(nn.ReLU(inplace=True), Net([ROW, [1.0] * 4]))
    x = clips()
    with pytest.raises(ValueError, match=r"model: got a forward that writes into its input"):
        sk.attribute("gradient", model, x, 0)
    with pytest.raises(ValueError, match=r"writes into its input"):
        sk.insertion(model, x, x.mean(1), 0, steps=2)
    assert torch.equal(x, clips())
    assert sk.attribute("gradient", sk.wrap(model), x, 0).any()
    assert torch.equal(x, clips())


@pytest.mark.parametrize("unit", [nn.ReLU6(), nn.PReLU(), nn.Hardtanh(), nn.Hardsigmoid()])
def test_deeplift_adds_up_through_any_unit(unit):
    model = Net([ROW, [1.0] * 4]).requires_grad_(False)
    model.relu, x = unit, 3 * clips()
    black = sk.removal.black().nothing(x)
    found = sk.attribute("deeplift", model, x, 0).sum((1, 2, 3))
    torch.testing.assert_close(
        found, (model(x) - model(black))[:, 0].detach(), rtol=1e-3, atol=1e-4
    )


def test_a_score_without_gradient_is_refused_where_one_is_needed():
    def hard(output, targets):
        return (output[:, 0] > 0).float() + output[:, 1].detach()

    for call in (sk.step, lambda *given, **o: sk.attribute("gradient", *given, **o)):
        with pytest.raises(ValueError, match="model: got no gradient at the clips"):
            call(TWO, clips(), 0, score=hard)
    assert sk.insertion(TWO, clips(), clips().mean(1), 0, steps=2, score=hard).auc.shape == (2,)


def test_a_map_that_says_nothing_is_named_by_its_curve():
    with pytest.warns(UserWarning, match=r"maps: of clips \[1\] the same everywhere"):
        sk.insertion(TWO, clips(), clips().mean(1) * torch.tensor([1.0, 0.0])[:, None, None, None],
                     0, steps=2)  # fmt: skip


def test_wrong_words_of_wrap():
    with pytest.raises(ValueError, match="model: got one that is wrapped already"):
        sk.wrap(sk.wrap(TWO))
    with pytest.raises(ValueError, match="output: got 0, of a network that returns a tensor"):
        sk.wrap(TWO, output=0)(clips())
    with pytest.raises(ValueError, match="layout: got 4"):
        sk.wrap(TWO, 4)
    for wrong in (3, [False, True], [0.5], None):
        with pytest.raises(ValueError, match="classes: got"):
            sk.scores.group(wrong)
    assert sk.scores.group(torch.tensor([0, 2])).name == "group([[0, 2]])"
    with pytest.raises(TypeError, match="model: got function"):
        sk.wrap(lambda x: x)
    with pytest.raises(ValueError, match="layout: got 'NTCHX'"):
        sk.wrap(TWO, "NTCHX")
    with pytest.raises(ValueError, match="layout: got"):
        sk.wrap(TWO, [4, 0])
    assert isinstance(sk.wrap(TWO), Wrapped)
