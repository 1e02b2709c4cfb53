import contextlib
import copy
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18
from torchvision.models.video import mvit_v2_s, r2plus1d_18, s3d, swin3d_t

import stepkit as sk
from stepkit import models
from stepkit.attribution.cost import counted
from stepkit.models import (
    DetachedLSTM,
    check_model,
    find_layer,
    fitting,
    frozen,
    load_model,
    out_of_place,
    precision_of,
    prepare,
    probability,
)
from stepkit.training import save_model

NARROW = ("r2plus1d_narrow", "r50l_narrow")


def clips(n=2, frames=4, size=32, seed=0):
    return torch.randn(n, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*NARROW, "r2plus1d_18", "r50l"])
@pytest.mark.parametrize("shape", [(3, 4, 32, 32), (3, 5, 40, 56)])
def test_models_take_any_clip_size(name, shape):
    model = load_model(name, 7)
    assert not model.training
    with torch.no_grad():
        assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_fresh_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    state = torch.get_rng_state()
    one, same, other = (load_model("r2plus1d_narrow", 3, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.fc.weight, other.fc.weight)


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
    monkeypatch.setattr(models, "has_bfloat16", lambda device: fast)
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


@pytest.mark.parametrize("build", [lambda: r2plus1d_18(weights=None), lambda: resnet18()])
def test_out_of_place_changes_no_output_and_lets_hooks_work(build):
    model = build().eval()
    x = clips(2, 4, 32) if "Video" in type(model).__name__ else torch.randn(2, 3, 32, 32)
    safe = out_of_place(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(model(x), safe(x))
    assert list(safe.state_dict()) == list(model.state_dict())
    ran = []
    for module in safe.modules():
        module.register_full_backward_hook(lambda *a: ran.append(1))
    safe(x.requires_grad_()).sum().backward()  # raises on torchvision's own blocks
    assert len(ran) > 20


def literal_lstm(lstm, features):
    """One step at a time, one clip at a time, gates written out."""
    out = []
    for sequence in features:
        h = torch.zeros(lstm.hidden)
        c = torch.zeros(lstm.hidden)
        steps = []
        for x in sequence:
            z = lstm.input.weight @ x + lstm.input.bias + lstm.state.weight @ h
            i, f, g, o = (z[k * lstm.hidden : (k + 1) * lstm.hidden] for k in range(4))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.relu(g)
            h = torch.sigmoid(o) * torch.relu(c)
            steps.append(h)
        out.append(torch.stack(steps))
    return torch.stack(out)


def test_lstm_equals_its_literal_twin():
    torch.manual_seed(0)
    lstm, x = DetachedLSTM(5, 4), torch.randn(3, 6, 5)
    torch.testing.assert_close(lstm(x), literal_lstm(lstm, x))


def test_no_gradient_flows_through_the_lstm_state():
    lstm, x = DetachedLSTM(5, 4), torch.randn(1, 6, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(lstm(x)[:, -1].sum(), x)
    assert slope[:, :-1].abs().max() == 0
    assert slope[:, -1].abs().max() > 0


def test_printed_variant_averages_probabilities_released_averages_logits():
    for variant in ("printed", "released"):
        model = load_model("r50l_narrow", 4, variant=variant)
        x = clips(2, 3, 32)
        with torch.no_grad():
            frames = x.transpose(1, 2)
            features = torch.stack([model.cnn(f) for f in frames])
            steps = model.after(literal_lstm(model.lstm, model.before(features)))
            if variant == "printed":
                expected = steps.softmax(2).mean(1)
            else:
                expected = steps.mean(1).softmax(1)
            torch.testing.assert_close(model(x).softmax(1), expected)


def test_released_r50l_has_its_layers_in_the_documented_order():
    model = load_model("r50l", 5, variant="released")
    widths = [m.out_features for m in model.before if isinstance(m, nn.Linear)]
    assert widths == [1024, 512]
    assert model.lstm.hidden == 256
    assert model.after.out_features == 5


def test_checkpoint_round_trip_and_mismatch(tmp_path):
    model = load_model("r2plus1d_narrow", 3, seed=4)
    save_model(model, tmp_path / "m.safetensors")
    again = load_model("r2plus1d_narrow", 3, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(model(clips()), again(clips()))
    with pytest.raises(ValueError, match=r"fc\.bias"):
        load_model("r2plus1d_narrow", 4, tmp_path / "m.safetensors")
    save_file({"nothing": torch.zeros(1)}, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="other tensors"):
        load_model("r2plus1d_narrow", 3, tmp_path / "n.safetensors")
    with pytest.raises(FileNotFoundError, match="gone"):
        load_model("r2plus1d_narrow", 3, tmp_path / "gone.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"weights: got .*torn.*, expected a .safetensors file"):
        load_model("r2plus1d_narrow", 3, tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match=r"weights: got 'm.pth', expected a .safetensors file$"):
        load_model("r2plus1d_narrow", 3, "m.pth")
    with pytest.raises(ValueError, match=r"weights: got 'm.pth', .* or KINETICS400_V1"):
        load_model("r2plus1d_18", 3, "m.pth")


class Watched(nn.Module):
    """Mixed modes, a frozen layer, a gradient in place: all of it must survive."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)
        self.relu, self.drop, self.fc = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 2)
        self.train()
        self.norm.eval()
        self.fc.weight.requires_grad_(False)
        self.conv.weight.grad = torch.ones_like(self.conv.weight)

    def forward(self, x):
        return self.fc(self.drop(self.relu(self.norm(self.conv(x))).mean((2, 3, 4))))


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        [value.clone() for value in model.state_dict().values()],
        [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
    )


def same_state(before, after):
    return (
        before[:3] == after[:3]
        and before[4] == after[4]
        and all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_restores_everything(error):
    model = Watched()
    before = state_of(model)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        if error:
            raise error
    assert same_state(before, state_of(model))


def test_find_layer_knows_the_families_and_lists_layers_otherwise():
    assert find_layer(load_model("r50l_narrow", 2)) is not None
    video = load_model("r2plus1d_18", 2)
    assert find_layer(video) is video.layer4
    assert find_layer(video, "layer3") is video.layer3
    with pytest.raises(ValueError, match=r"layer: got 'layer9'.*layer1"):
        find_layer(video, "layer9")
    with pytest.raises(ValueError, match=r"no default for this model.*conv"):
        find_layer(Watched())


def test_probability_is_the_softmax_of_the_target():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    found = probability(logits, torch.tensor([1, 2]))
    expected = torch.tensor([2.0]).exp() / logits[0].exp().sum()
    torch.testing.assert_close(found, torch.cat([expected, torch.tensor([1 / 3])]))


def test_check_model_counts_classes():
    assert check_model(load_model("r2plus1d_narrow", 9), clips(1), gradient=True) == 9


@pytest.mark.parametrize(("free", "fits"), [(1 << 30, 8), (100 << 20, 1), (10 << 20, 1)])
def test_a_batch_is_as_large_as_the_free_memory_takes(monkeypatch, free, fits):
    """A card that is not there: 100 MB are held already, a clip in four copies takes 100 more."""
    seen, held = [], 100 << 20

    class Watches(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.sum((1, 2, 3, 4))[:, None].expand(-1, 2)

    for name, value in (
        ("mem_get_info", (free, 0)),
        ("memory_allocated", held),
        ("memory_reserved", held),
        ("max_memory_allocated", held + (100 << 20)),
        ("reset_peak_memory_stats", None),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert fitting(Watches(), clips(1), views=4) == fits
    assert [shape[0] for shape in seen] == [4]
