"""Prepared models: the same function, faster; and memory that is kept between passes."""

import copy
import shutil

import pytest
import torch
from test_models import NARROW, clips
from torch import nn
from torchvision.models.video import mvit_v2_s, s3d, swin3d_t

import stepkit as sk
from stepkit import preparation
from stepkit.attribution.cost import counted
from stepkit.models import find_layer, load_model, precision_of
from stepkit.preparation import TILE, prepare


def with_statistics(model):
    """Give normalisations something to do: statistics and weights, negative ones too."""
    draw = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for values in (layer.running_mean, layer.bias.data, layer.weight.data):
                values.copy_(torch.randn(values.shape, generator=draw))
            layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=draw))
    return model


def count(model, kind):
    return sum(isinstance(layer, kind) for layer in model.modules())


@pytest.mark.parametrize("name", [*NARROW, "r2plus1d_18", "r50l"])
def test_prepare_keeps_function_gradient_names_and_the_model(name):
    model = with_statistics(load_model(name, 5)).double().train()
    before = copy.deepcopy(model.state_dict())
    ready = prepare(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not ready.training
    assert not any(p.requires_grad for p in ready.parameters())
    assert count(model, nn.modules.batchnorm._BatchNorm) > 5
    assert count(ready, nn.modules.batchnorm._BatchNorm) == 0
    assert [n for n, _ in ready.named_modules()] == [n for n, _ in model.named_modules()]
    assert type(find_layer(ready)) is type(find_layer(model))
    x, found = clips(1, 4, 32).double().requires_grad_(), []
    for network in (model.eval(), ready):
        logits = network(x)
        found.append((logits, torch.autograd.grad(logits[:, 1].sum(), x)[0]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * ours.abs().max().item())


@pytest.mark.parametrize("build", [s3d, swin3d_t, mvit_v2_s])
def test_prepare_takes_any_video_model(build):
    model = with_statistics(build(weights=None, num_classes=4)).eval()
    x = clips(1, 16, 224)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(prepare(model)(x), expected, rtol=1e-3, atol=1e-4)


class Awkward(nn.Module):
    """Convolutions whose normalisation must stay, in a forward that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 4, 1), nn.Conv3d(4, 4, 1)
        self.shared, self.alone = nn.BatchNorm3d(4), nn.BatchNorm3d(4, track_running_stats=False)
        self.body = nn.Sequential(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4))
        self.branch = Branch()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError
        x = self.shared(self.b(self.shared(self.a(x))))
        x = self.alone(self.branch(self.body(x)))
        return self.head(x.mean((2, 3, 4)))


class Branch(nn.Module):
    """The convolution's own output is used as well, so the normalisation must stay."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


def test_prepare_folds_no_normalisation_that_others_need():
    model = Awkward().double().eval()
    for norm in (model.shared, model.body[1], model.branch.norm):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    ready = prepare(model)
    assert isinstance(ready.body[1], nn.Identity)
    kept = (ready.shared, ready.alone, ready.branch.norm)
    assert all(isinstance(norm, nn.BatchNorm3d) for norm in kept)
    with torch.no_grad():
        torch.testing.assert_close(ready(clips().double()), model(clips().double()))


@pytest.mark.parametrize("name", ["r2plus1d_narrow", "r50l_narrow"])
def test_prepare_in_bfloat16_takes_and_gives_float32(name):
    model = with_statistics(load_model(name, 5)).eval()
    low, x, found = prepare(model, "bfloat16"), clips(2, 4, 32).requires_grad_(), []
    assert precision_of(model) == precision_of(prepare(model)) == "float32"
    assert precision_of(low) == "bfloat16"
    for network in (prepare(model), low):
        logits = network(x)
        found.append((logits, torch.autograd.grad(logits[:, 1].sum(), x)[0]))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        assert torch.cosine_similarity(rounded.flatten(), exact.flatten(), 0) > 0.98


@pytest.mark.parametrize("fast", [True, False])
def test_prepare_takes_the_fast_precision_of_the_device(fast, monkeypatch):
    monkeypatch.setattr(preparation, "has_bfloat16", lambda device: fast)
    ready = prepare(load_model("r2plus1d_narrow", 5), "auto")
    assert precision_of(ready) == ("bfloat16" if fast else "float32")


def test_prepare_refuses_other_precisions():
    with pytest.raises(ValueError, match="precision: got 'int8', expected one of"):
        prepare(load_model("r2plus1d_narrow", 5), "int8")


class Small(nn.Module):
    """Compiled in seconds."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3, 4)))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_gives_the_same_and_its_layers_can_be_seen():
    model, x = Small().eval(), clips(2, 4, 16)
    ready = prepare(model, compiled=True)
    for method, options in {"gradient": {}, "grad_cam": {"layer": "conv"}, "deeplift": {}}.items():
        torch.testing.assert_close(
            sk.attribute(method, ready, x, [0, 1], **options),
            sk.attribute(method, model, x, [0, 1], **options),
        )
    with counted(ready) as passes, torch.no_grad():
        ready(x)
    assert passes["forward"] == 2
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(ready)(x), model(x))


@pytest.mark.parametrize("name", ["r2plus1d_18", "r2plus1d_narrow"])
def test_channels_that_are_filled_up_change_nothing(name):
    model = prepare(with_statistics(load_model(name, 5)).double())
    full, x = copy.deepcopy(model), clips(1, 4, 32).double().requires_grad_()
    preparation._fill_up(full)
    found = [torch.autograd.grad(network(x)[:, 1].sum(), x)[0] for network in (model, full)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(full(x), model(x), rtol=1e-9, atol=1e-12)


def test_channels_are_not_filled_up_around_a_normalisation_that_stays():
    class Twice(nn.Module):  # its normalisations see two inputs, so they are not folded
        def __init__(self):
            super().__init__()
            self.network = load_model("r2plus1d_18", 5)

        def forward(self, x):
            return self.network(x) + self.network(x.flip(-1))

    model, x = Twice().eval(), clips(1, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(prepare(model, "bfloat16")(x), model(x), rtol=0.1, atol=0.1)


def test_all_channels_of_the_paper_s_network_are_full_tiles_in_bfloat16():
    def inner(network):
        layers = network.modules()
        return [layer.in_channels for layer in layers if isinstance(layer, nn.Conv3d)][1:]

    model = load_model("r2plus1d_18", 5)
    assert any(channels % TILE for channels in inner(model))
    assert not any(channels % TILE for channels in inner(prepare(model, "bfloat16")))
    assert inner(prepare(model)) == inner(model)
