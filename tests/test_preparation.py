"""Prepared models: the same function, faster."""

import copy
import importlib
import shutil

import pytest
import torch
from test_models import NARROW, clips
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.video import mvit_v2_s, s3d, swin3d_t

import stepkit as sk
from stepkit.attribution.cost import counted
from stepkit.models import find_layer, precision_of
from stepkit.networks import load_model
from stepkit.prepare import TILE, prepare

preparation = importlib.import_module("stepkit.prepare")  # sk.prepare is the function


def with_statistics(model):
    """Give normalisations something to do: statistics and weights, negative ones too."""
    draw = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
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


# ----------------------------------------------- what others read, too, or call, must not be folded


class Body(nn.Sequential):
    """Two convolutions, each with a normalisation."""

    def __init__(self):
        layers = (nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 3, 1))
        super().__init__(*layers, nn.BatchNorm3d(3))


class Case(nn.Module):
    """A network whose code can be traced, one that cannot be in the cases with ``shapes``."""

    kept = 0  # normalisations that remain after `prepare`

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.maps(x).mean((2, 3, 4))

    def maps(self, x):
        return self.body(x)


CASES = []


def case(kind):
    CASES.append(kind)
    return kind


def shapes(x):
    """Ask for a shape, as many networks do; no trace goes past it."""
    return [int(n) for n in x.shape]


@case
class Plain(Case):
    pass


@case
class LoopsOverFrames(Case):
    """The CNN-LSTM of tutorials; the LSTM's code cannot be traced either."""

    kept = 2  # no trace of its code: nothing is folded

    def build(self):
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x):
        steps = [self.body(x[:, :, [t]]).mean((2, 3, 4)) for t in range(x.shape[2])]
        return self.lstm(torch.stack(steps, 1))[0][:, -1]


@case
class AsksForShapes(Case):
    kept = 2  # no trace of its code: nothing is folded

    def maps(self, x):
        return self.body(x) if shapes(x)[3] > 4 else x


@case
class SkipsFromInside(Case):
    """The first convolution's output is used outside of the part as well."""

    kept = 2  # no trace of its code: nothing is folded

    def maps(self, x):
        return self.body(x) + (self.body[0](x) if shapes(x)[2] else 0)


@case
class SkipsFromInsideTraced(Case):
    kept = 1

    def maps(self, x):
        return self.body(x) + self.body[0](x)


@case
class SkipsAtOneSize(Case):
    kept = 2  # no trace of its code: nothing is folded

    def maps(self, x):
        found = self.body(x)
        return found + self.body[0](x) if shapes(x)[3] == 6 else found


@case
class GoesThroughTheLayers(Case):
    """Layer by layer, and keeps what each gave."""

    kept = 2  # no trace of its code: nothing is folded

    def maps(self, x):
        kept = [x]
        for layer in self.body if shapes(x) else ():
            kept.append(layer(kept[-1]))
        return sum(kept)


@case
class CallsTheNormalisationAgain(Case):
    kept = 2  # no trace of its code: nothing is folded

    def maps(self, x):
        return self.body[1](self.body(x)) if shapes(x) else x


@case
class HasAnotherWayIn(Case):
    """A method of the part, past its forward."""

    kept = 2  # no trace of its code: nothing is folded

    def build(self):
        class Part(Body):
            def features(self, x):
                x = self[0](x)
                return self[1](x) + x

        self.body = Part()

    def maps(self, x):
        return self.body.features(x) + self.body(x) if shapes(x) else x


@case
class GivesAnArgument(Case):
    """The part goes another way with it."""

    kept = 1

    def build(self):
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)

            def forward(self, x, skip=None):
                x = self.conv(x)
                return self.norm(x) if skip is None else self.norm(x) + x

        self.one, self.two = Part(), Part()

    def maps(self, x):
        return self.two(self.one(x), True) + self.body(x)


@case
class GivesAnArgumentUntraced(GivesAnArgument):
    kept = 4  # no trace of its code: nothing is folded

    def maps(self, x):
        return super().maps(x) if shapes(x) else x


@case
class SharesAConvolution(Case):
    """One convolution, two normalisations."""

    kept = 2

    def build(self):
        self.conv, self.a, self.b = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3), nn.BatchNorm3d(3)

    def maps(self, x):
        x = self.conv(self.body(x))
        return self.a(x) + self.b(x).relu()


@case
class SharesANormalisation(Case):
    kept = 1

    def build(self):
        self.a, self.b, self.norm = nn.Conv3d(3, 3, 1), nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)

    def maps(self, x):
        return self.norm(self.b(self.norm(self.a(self.body(x))).relu()))


@case
class HasTwoNames(Case):
    """For the same layers, and calls them by the second."""

    kept = 1

    def build(self):
        self.conv, self.norm = nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)
        self.again, self.norm_again = self.conv, self.norm

    def maps(self, x):
        return self.norm_again(self.again(self.body(x)))


@case
class SharesAPart(Case):
    """Between traced code and code that cannot be traced, which calls its layers."""

    kept = 2  # no trace of its code: nothing is folded

    def build(self):
        class Part(nn.Module):
            def __init__(self, body):
                super().__init__()
                self.body = body

            def forward(self, x):
                return self.body[1](x) + self.body[0](x) if shapes(x) else x

        self.part = Part(self.body)

    def maps(self, x):
        return self.body(x) + self.part(x)


@case
class SharesAWeight(Case):
    def build(self):
        self.body[3].weight = self.body[0].weight


@case
class ReadsAWeight(Case):
    kept = 1

    def maps(self, x):
        return self.body(x) + F.conv3d(x, self.body[0].weight)


@case
class ReadsATiedWeight(Case):
    kept = 2

    def build(self):
        self.body[3].weight = self.body[0].weight

    def maps(self, x):
        return self.body(x) + F.conv3d(x, self.body[3].weight)


@case
class ReadsAStatistic(Case):
    kept = 1

    def maps(self, x):
        return self.body(x) + x * (self.body[4].running_var + 1).sum()


@case
class ReadsAnAttribute(Case):
    kept = 2

    def maps(self, x):
        return self.body(x) * self.body[1].num_features


@case
class AsksWhatALayerIs(Case):
    kept = 2

    def maps(self, x):
        return self.body(x) + (x if isinstance(self.body[1], nn.BatchNorm3d) else 0)


@case
class HasWeightNorm(Case):
    kept = 1

    def build(self):
        nn.utils.parametrizations.weight_norm(self.body[0])


@case
class HasAHook(Case):
    """It changes what the convolution gives."""

    kept = 1

    def build(self):
        self.body[0].register_forward_hook(lambda layer, given, output: output + output.abs())


@case
class HasAHookBefore(Case):
    kept = 1

    def build(self):
        self.body[4].register_forward_pre_hook(lambda layer, given: (given[0].relu(),))


@case
class HasAHookAround(Case):
    """Around a convolution whose normalisation is outside."""

    kept = 1

    def build(self):
        self.first, self.norm = nn.Sequential(nn.Conv3d(3, 3, 1)), nn.BatchNorm3d(3)
        self.first.register_forward_hook(lambda layer, given, output: output.relu())

    def maps(self, x):
        return self.body(self.norm(self.first(x)))


@case
class HasAHookOnTheGradient(Case):
    kept = 1

    def build(self):
        self.body[1].register_full_backward_hook(lambda layer, given, output: (given[0] * 2,))


@case
class HasAnotherForward(Case):
    """Put onto the part itself: its class's is not what runs."""

    kept = 2

    def build(self):
        body = self.body
        body.forward = lambda x: body[4](body[3](body[1](x) + body[0](x)).relu())


@case
class KeepsBatchStatistics(Case):
    """As of the batch, whatever mode it is put into."""

    kept = 1

    def build(self):
        self.body[1].train = lambda mode: None


@case
class HasNoStatistics(Case):
    kept = 1

    def build(self):
        self.body[1] = nn.BatchNorm3d(3, track_running_stats=False)


@case
class KeepsWhatItSees(Case):
    def maps(self, x):
        self.seen = self.body(x)
        return self.seen


@case
class NamesTheInput(Case):
    kept = 1

    def maps(self, x):
        return self.body(x) + self.body[0](input=x)


@case
class NamesTheInputUntraced(NamesTheInput):
    kept = 2  # no trace of its code: nothing is folded

    def maps(self, x):
        return super().maps(x) if shapes(x) else x


@pytest.mark.parametrize("kind", CASES)
def test_prepare_keeps_the_function_whatever_its_code(kind):
    torch.manual_seed(0)
    model = with_statistics(kind().double()).eval()
    ready, found = prepare(model), []
    for network in (model, ready, copy.deepcopy(ready)):
        found.append([])
        for size in (6, 5):
            x = clips(2, 3, size).double().requires_grad_()
            logits = network(x)
            found[-1] += [logits, *torch.autograd.grad(logits[:, 1].sum(), x)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-12)
    assert count(ready, nn.modules.batchnorm._BatchNorm) == kind.kept
    assert not any(isinstance(value, fx.Proxy) for value in vars(ready).values())


def test_layers_that_others_call_stay_what_they_were_in_bfloat16():
    model = with_statistics(SkipsFromInside()).eval()
    x = clips(2, 3, 6)
    with torch.no_grad():
        torch.testing.assert_close(prepare(model, "bfloat16")(x), model(x), rtol=0.02, atol=0.02)


def keeps_a_graph():
    model = Plain()
    model.register_forward_hook(lambda model, given, output: setattr(model, "seen", output))
    model(clips(1, 3, 6))
    return model


def has_the_older_weight_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Conv3d(3, 3, 1)))


def is_a_script():
    return torch.jit.trace(Plain().eval(), clips(1, 3, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", [keeps_a_graph, has_the_older_weight_norm, is_a_script])
def test_a_model_that_cannot_be_copied_is_refused_with_the_remedy(build):
    with pytest.raises(ValueError, match=r"^model: got '.*', expected .* remove hooks"):
        prepare(build())


def test_a_model_may_return_anything():
    class Out(Plain):
        def forward(self, x):
            return {super().forward(x)}  # a set: no step of a trace

    model, x = with_statistics(Out()).eval(), clips(1, 3, 6)
    ready = prepare(model)
    assert count(ready, nn.BatchNorm3d) == 2
    with torch.no_grad():
        torch.testing.assert_close([*ready(x)], [*model(x)])


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
    model = with_statistics(load_model(name, 5)).double().requires_grad_(False)
    full, x = copy.deepcopy(model), clips(1, 4, 32).double().requires_grad_()
    preparation._fill_up(preparation._fold(nn.Sequential(full)))
    widths = [
        [c.out_channels for c in net.modules() if hasattr(c, "out_channels")]
        for net in (model, full)
    ]
    assert widths[0] != widths[1]
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
