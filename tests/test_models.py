import contextlib
import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import _api, resnet18
from torchvision.models.video import r2plus1d_18

from stepkit.models import batch_that_fits, check_model, find_layer, frozen, out_of_place
from stepkit.networks import DetachedLSTM, load_model
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


@pytest.mark.parametrize("name", ["mc3_18", "s3d", "swin3d_t", "mvit_v2_s"])
def test_video_models_of_torchvision_come_by_name_with_a_classifier_of_k(name):
    model = load_model(name, 7)
    assert [*model.state_dict().values()][-1].shape == (7,)
    assert not any(getattr(layer, "inplace", False) for layer in model.modules())


@pytest.mark.parametrize(("classes", "kept"), [(400, True), (7, False)])
def test_a_trained_classifier_is_kept_where_it_has_as_many_classes(monkeypatch, classes, kept):
    published = r2plus1d_18().state_dict()
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda url, **_: published)
    found = load_model("r2plus1d_18", classes, "KINETICS400_V1").state_dict()
    assert torch.equal(found["layer4.1.conv2.0.3.weight"], published["layer4.1.conv2.0.3.weight"])
    assert found["fc.weight"].shape == (classes, 512)
    assert torch.equal(found["fc.bias"], published["fc.bias"]) == kept


def two_frames(num_classes, width=4):
    """A network of one's own, to be named ``test_models:two_frames``."""
    layers = nn.Conv3d(3, width, 2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def test_a_network_of_ones_own_is_named_by_its_module_and_function():
    model = load_model("test_models:two_frames", 5, width=2)
    assert model(clips()).shape == (2, 5)
    assert not model.training
    assert not model[1].inplace
    same = load_model("test_models:two_frames", 5, seed=1, width=2)
    assert not torch.equal(same[0].weight, model[0].weight)
    for name in ("test_models:gone", "no_such_module:two_frames", "test models:x"):
        with pytest.raises(ValueError, match=rf"name: got '{name}' .* package.module:function"):
            load_model(name, 5)
    with pytest.raises(TypeError, match=r"model: got str, expected a torch.nn.Module"):
        load_model("builtins:str", 5)
    with pytest.raises(
        ValueError, match=r"name: got 'r2plus1d_19', expected 'r2plus1d_18'\? It is"
    ):
        load_model("r2plus1d_19", 5)


def test_fresh_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    state = torch.get_rng_state()
    one, same, other = (load_model("r2plus1d_narrow", 3, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.fc.weight, other.fc.weight)


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


def test_check_model_returns_the_score():
    model, x, target = load_model("r2plus1d_narrow", 9), clips(1), torch.tensor([8])
    found = check_model(model, x, target, gradient=True)
    torch.testing.assert_close(found, model(x).softmax(1)[:, 8].detach())


@pytest.mark.parametrize(("free", "fits"), [(1 << 30, 8), (100 << 20, 1), (10 << 20, 1)])
def test_a_batch_is_as_large_as_the_free_memory_takes(monkeypatch, free, fits):
    """A card that is not there: 100 MB are held already, a clip takes 100 more."""
    done, held = [], 100 << 20
    for name, value in (
        ("mem_get_info", (free, 0)),
        ("memory_allocated", held),
        ("memory_reserved", held),
        ("max_memory_allocated", held + (100 << 20)),
        ("reset_peak_memory_stats", None),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert batch_that_fits(lambda: done.append(1), torch.device("cuda")) == fits
    assert done == [1]
