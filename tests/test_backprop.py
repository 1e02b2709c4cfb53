"""DeConvNet, guided backpropagation and DeepLIFT: twins, Captum itself, and a model left alone."""

import warnings

import pytest
import reference
import torch
from test_cam import Colours, hit_rate, squares
from test_models import same_state, state_of
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

from stepkit import attribute, load_model
from stepkit.models import out_of_place
from stepkit.removal import black

METHODS = ("deconvnet", "guided_backprop", "deeplift")


def clips(n=2, T=2, H=6, W=5, seed=0):
    return torch.randn(n, 3, T, H, W, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- twins


class Residual(nn.Module):
    """logits = fc(relu(z + second(relu(z)))), z = first(x); ``relu`` and ``+`` in several forms."""

    def __init__(self, form="modules", size=(2, 6, 5)):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            self.first = nn.Conv3d(3, 4, (1, 3, 3), (1, 2, 1), (0, 1, 1))
            self.second = nn.Conv3d(4, 4, (3, 1, 3), padding="same")
            cells = self.first(torch.zeros(1, 3, *size)).numel()
            self.fc = nn.Linear(cells, 3)
        self.form, self.one, self.two = form, nn.ReLU(), nn.ReLU()

    def forward(self, x):
        z, form = self.first(x), self.form
        if form == "modules":
            h = self.two(z + self.second(self.one(z)))
        elif form == "one module":
            h = self.one(z + self.second(self.one(z)))
        elif form == "functions":
            h = (z + self.second(torch.relu(z))).relu()
        elif form == "in place":
            out = self.second(F.relu(z.clone(), inplace=True))
            out += z
            h = out.relu_()
        return self.fc(h.flatten(1))


FORMS = ("modules", "one module", "functions", "in place")


def matrix(linear, shape):
    """A linear map, applied to every basis vector of ``shape``; bias left out."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    at_zero = linear(torch.zeros(1, *shape, dtype=torch.float64))
    return (linear(basis) - at_zero).flatten(1).T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_its_literal_twin(method, form):
    x, targets = clips(3), [0, 2, 1]
    found = attribute(method, Residual(form), x, targets)
    double = Residual().double()
    double.requires_grad_(False)
    for layer in (double.first, double.second, double.fc):
        layer.bias.zero_()  # the twin has none
    plain = attribute(method, _without_bias(Residual(form)), x, targets)
    shape = double.first(x[:1].double()).shape[1:]
    W1, W2 = matrix(double.first, x.shape[1:]), matrix(double.second, shape)
    x0 = black().nothing(x).double().flatten(1)
    for i, target in enumerate(targets):
        flat, W3 = x[i].double().flatten(), double.fc.weight[target]
        back = reference.residual_net_backward(method, W1, W2, W3, flat, x0[i])
        if method == "deeplift":
            expected = ((flat - x0[i]) * back).reshape(x[i].shape).sum(0)
        else:
            expected = back.reshape(x[i].shape).abs().mean(0)
        torch.testing.assert_close(plain[i], expected.float(), rtol=1e-4, atol=1e-6)
    # which units are on depends on the biases: deconvnet, without pooling, does not ask
    assert torch.allclose(found, plain) == (method == "deconvnet")


def _without_bias(model):
    for layer in (model.first, model.second, model.fc):
        nn.init.zeros_(layer.bias)
    return model


class Branches(nn.Module):
    """One ReLU module for two branches side by side; and ReLU in place on what is read later on."""

    def __init__(self, form):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            self.left, self.right = (
                nn.Conv3d(3, 4, 1),
                nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)),
            )
            self.fc = nn.Linear(4, 3)
        self.form, self.relu, self.other = form, nn.ReLU(inplace=form == "in place"), nn.ReLU()

    def forward(self, x):
        a, b = self.left(x), self.right(x)
        if self.form == "in place":
            self.relu(a), self.relu(b)  # what is returned is not looked at
        else:
            second = self.other if self.form == "two modules" else self.relu
            a, b = self.relu(a), second(b)
        return self.fc((a - 2 * b).mean((2, 3, 4)))


@pytest.mark.parametrize("form", ["one module", "in place"])
@pytest.mark.parametrize("method", [*METHODS, "lrp"])
def test_a_relu_for_two_branches_does_as_two(method, form):
    x = clips()
    two = attribute(method, Branches("two modules"), x, 1)
    torch.testing.assert_close(attribute(method, Branches(form), x, 1), two, rtol=1e-4, atol=1e-7)


# -------------------------------------------------------------------------------- Captum by itself


def video_resnet():
    """Torchvision's own class, in-place as it is; one block a stage."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        convolutions = [Conv3DSimple] * 4
        return VideoResNet(BasicBlock, convolutions, [1, 1, 1, 1], BasicStem, num_classes=4).eval()


@pytest.mark.parametrize("method", METHODS)
def test_in_place_model_here_is_out_of_place_model_in_captum(method):
    attr = pytest.importorskip("captum.attr")
    kind = {
        "deconvnet": attr.Deconvolution,
        "guided_backprop": attr.GuidedBackprop,
        "deeplift": attr.DeepLift,
    }[method]
    x, targets = clips(2, 4, 32, 32), torch.tensor([1, 3])
    options = {"baselines": black().nothing(x)} if method == "deeplift" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = kind(out_of_place(video_resnet())).attribute(
            x.clone(), target=targets, **options
        )
    expected = expected.detach()
    expected = expected.sum(1) if method == "deeplift" else expected.abs().mean(1)
    found = attribute(method, video_resnet(), x, targets)
    assert found.abs().max() > 1e-5
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


# ------------------------------------------------------------------------- DeepLIFT's completeness


class Frames(nn.Module):
    """Torchvision's image ResNet on each frame: its blocks use one ReLU twice, pools overlap."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            blocks = (resnet.BasicBlock, [1, 1, 1, 1])
            self.cnn = resnet.ResNet(*blocks, num_classes=4)

    def forward(self, x):
        logits = self.cnn(x.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (len(x), -1)).mean(1)


class Activated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(4)
            self.first, self.second = nn.Conv3d(3, 4, (1, 3, 3)), nn.Conv3d(4, 4, (1, 2, 2))
            self.fc = nn.Linear(4, 4)
        self.activation = activation

    def forward(self, x):
        h = self.activation(self.second(self.activation(3 * self.first(x))))
        return self.fc(h.mean((2, 3, 4)))


ACTIVATIONS = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(inplace=True),
    "sigmoid in place": torch.Tensor.sigmoid_,
    "elu": nn.ELU(0.5, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3, inplace=True),
    "softplus": nn.Softplus(2.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.Tensor.tanh,
    "overlapping pools": lambda x: F.max_pool3d(x, (1, 3, 3), (1, 1, 2), (0, 1, 1)),
    "pool of frames": lambda x: F.max_pool2d(x.flatten(1, 2), 3, 2, 1).unflatten(1, x.shape[1:3]),
}
COMPLETE = {
    "video resnet": (video_resnet, (4, 32, 32)),
    "image resnet": (Frames, (2, 48, 40)),
    "narrow": (lambda: load_model("r2plus1d_narrow", 4), (4, 24, 32)),
    "linear": (lambda: Activated(nn.Identity()), (2, 9, 8)),
    **{name: (lambda a=a: Activated(a), (2, 9, 8)) for name, a in ACTIVATIONS.items()},
}


@pytest.mark.parametrize("name", COMPLETE)
def test_deeplift_adds_up_to_the_difference_of_logits(name):
    build, size = COMPLETE[name]
    model, x, targets = build().eval(), clips(3, *size), torch.tensor([1, 3, 0])
    with torch.no_grad():
        difference = (model(x) - model(black().nothing(x))).gather(1, targets[:, None])[:, 0]
    total = attribute("deeplift", model, x, targets).sum((1, 2, 3))
    assert difference.abs().max() > 1e-3
    torch.testing.assert_close(total, difference, rtol=1e-3, atol=1e-5)


def test_deeplift_of_a_black_clip_is_zero():
    x = black().nothing(clips())
    assert attribute("deeplift", Residual(), x, 1).abs().max() == 0


def test_deeplift_keeps_its_sign_and_the_others_have_none():
    x = clips()
    assert (attribute("deeplift", Residual(), x, 1) < 0).any()
    for method in ("deconvnet", "guided_backprop"):
        assert (attribute(method, Residual(), x, 1) >= 0).all()


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", ["deconvnet", "guided_backprop"])
def test_a_model_without_relu_is_refused(method):
    model = Activated(nn.GELU())
    with pytest.raises(ValueError, match=f"{method}: got a model without ReLU, expected one with"):
        attribute(method, model, clips(1, 2, 9, 8), 0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_announced(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(method, Residual(), clips(), 0)


# --------------------------------------------------------------------------- what the door promises


@pytest.mark.parametrize("method", METHODS)
def test_neither_batch_size_nor_seed_nor_neighbours_matter(method):
    x, targets = clips(5), [0, 1, 2, 1, 0]
    whole = attribute(method, Residual(), x, targets, batch_size=8)
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"seed": 7}):
        again = attribute(method, Residual(), x, targets, **options)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-6)
    alone = attribute(method, Residual(), x[3:4], 1)
    torch.testing.assert_close(alone, whole[3:4], rtol=1e-4, atol=1e-6)


def test_deeplift_counts_a_clip_and_its_baseline_as_two():
    sizes = []

    class Counts(Residual):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    attribute("deeplift", Counts(), clips(5), 0, batch_size=4)
    assert max(sizes) == 4


def whole_state(model):
    """All that a module holds, with the identity of each thing."""
    kept = []
    for name, module in model.named_modules():
        inside = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        kept.append((name, module, type(module), inside))
    return kept


class Fails(Branches):
    def __init__(self, at, error):
        super().__init__("in place")
        self.plan = (at, error, [])

    def forward(self, x):
        at, error, calls = self.plan
        calls.append(1)
        found = super().forward(x)
        if len(calls) == at:
            raise error
        return found


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("method", "at"),
    [*((m, 4) for m in METHODS), ("deconvnet", 5), ("guided_backprop", 5)],  # tried in three
)
def test_model_is_as_it_was_after_an_error(method, at, error):
    model = Fails(at, error)
    before, things = state_of(model), whole_state(model)
    with pytest.raises(error):
        attribute(method, model, clips(), 0, batch_size=1)
    assert same_state(before, state_of(model))
    assert things == whole_state(model)
    with torch.no_grad():  # and no mode of ours is still on
        assert F.relu(torch.tensor(-1.0)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_torchvisions_model_is_as_it_was(method):
    model, x = video_resnet(), clips(1, 2, 16, 16)
    before, things = state_of(model), whole_state(model)
    attribute(method, model, x, 0)
    assert same_state(before, state_of(model))
    assert things == whole_state(model)


# ------------------------------------------------------------------------------------ known answers


class LargestCell(Colours):
    """Reads the largest cell, not the average: a place that deconvnet can follow back."""

    def forward(self, x):
        seen = self.relu(self.see(x))
        return self.fc(nn.MaxPool3d(seen.shape[2:])(seen).flatten(1) / 70)


KNOWN = [(Colours, "guided_backprop"), (Colours, "deeplift")]
KNOWN += [(LargestCell, method) for method in METHODS]


@pytest.mark.parametrize(("kind", "method"), KNOWN)
def test_points_at_the_square_that_speaks_for_the_class(kind, method):
    x, regions = squares()
    for target, colour in ((1, 0), (0, 1)):
        found = attribute(method, kind(), x, target, batch_size=40)
        assert hit_rate(found, regions[:, colour]) >= 0.95


def test_guided_backprop_leaves_out_what_speaks_against_the_class():
    x, regions = squares()
    found = attribute("guided_backprop", Colours(), x, 1, batch_size=40)
    assert found[regions[:, 0]].min() > 0
    assert found[~regions[:, 0]].max() == 0
    assert attribute("gradient", Colours(), x, 1)[regions[:, 1]].max() > 0


def test_deconvnet_does_not_look_at_the_clip_where_nothing_is_pooled():
    x, _ = squares(4)
    found = attribute("deconvnet", Colours(), x, 1)
    assert found.amin() > 0
    assert torch.equal(found, found[:1].expand_as(found))
