"""Convolutions written otherwise give the same values, and the same gradients."""

import copy
import importlib

import pytest
import torch
from test_models import clips
from test_preparation import with_statistics
from torch import nn

from stepkit import _convolutions
from stepkit.networks import load_model
from stepkit.prepare import prepare

preparation = importlib.import_module("stepkit.prepare")  # sk.prepare is the function

LAYERS = {
    "stem of R(2+1)D": nn.Conv3d(3, 5, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    "stem of R3D": nn.Conv3d(3, 5, (3, 7, 7), (1, 2, 2), (1, 3, 3)),
    "strided in time as well": nn.Conv3d(2, 5, (3, 4, 5), 2, (1, 0, 2)),
    "stem of a ResNet": nn.Conv2d(3, 5, 7, 2, 3),
    "patches": nn.Conv2d(3, 5, 4, 4),
    "steps of three": nn.Conv2d(1, 5, (5, 4), 3, (1, 2)),
    "frames": nn.Conv3d(6, 5, (1, 3, 3), 1, (0, 1, 1)),
    "frames, strided": nn.Conv3d(6, 5, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
    "places": nn.Conv3d(6, 5, (3, 1, 1), 1, (1, 0, 0)),
    "places, strided": nn.Conv3d(6, 5, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
    "points": nn.Conv3d(6, 5, 1),
}
LEFT = {
    "of neither kind": nn.Conv3d(6, 5, 3, 1, 1),
    "in groups": nn.Conv3d(6, 6, (1, 3, 3), groups=2),
    "dilated": nn.Conv2d(3, 5, 3, 2, dilation=2),
    "reflecting": nn.Conv2d(3, 5, 3, 2, 1, padding_mode="reflect"),
    "padded by name": nn.Conv3d(6, 5, (1, 3, 3), padding="same"),
    "many channels": nn.Conv2d(6, 5, 7, 2, 3),
}


@pytest.mark.parametrize("size", [(5, 18, 21), (4, 17, 16)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_rewritten_layer_gives_the_same(name, size):
    layer = copy.deepcopy(LAYERS[name]).requires_grad_(False)
    if layer.weight.ndim == 4:
        size = size[1:]
    x, found = torch.randn(2, layer.in_channels, *size, requires_grad=True), []
    for rewritten in (False, True):
        if rewritten:
            _convolutions.rewrite(layer)
            assert type(layer) is not type(LAYERS[name])
        out = layer(x)
        found.append((out, torch.autograd.grad((out**2).sum(), x)[0]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_other_layers_stay(name):
    layer = copy.deepcopy(LEFT[name])
    _convolutions.rewrite(layer)
    assert type(layer) is type(LEFT[name])


@pytest.mark.parametrize("compiled", [None, False])
def test_prepare_rewrites_on_a_gpu_in_bfloat16_and_lets_long_runs_compile(compiled, monkeypatch):
    model = with_statistics(load_model("r2plus1d_narrow", 5))
    plain = prepare(model, "bfloat16")
    monkeypatch.setattr(preparation, "device_of", lambda *given: torch.device("cuda"))
    exact, ready = prepare(model), prepare(model, "bfloat16", compiled=compiled)
    changed = (_convolutions._Conv2d, _convolutions._Conv3d)
    assert [any(isinstance(c, changed) for c in m.modules()) for m in (plain, exact, ready)] == [
        False,
        False,
        True,
    ]
    assert ready.compiles == (compiled is None)
    assert ready.state_dict().keys() == plain.state_dict().keys()
    x = clips(2, 4, 32)
    torch.testing.assert_close(ready(x), plain(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["r2plus1d_18", "r50l"])
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_rewritten_network_gives_the_same_and_is_seen_by_hooks(name, precision):
    model = prepare(with_statistics(load_model(name, 5)), precision)
    other, x = copy.deepcopy(model), clips(1, 4, 32).requires_grad_()
    _convolutions.rewrite(other)
    seen, found = [], []
    for network in (model, other):
        kind = nn.Conv3d if name == "r2plus1d_18" else nn.Conv2d
        first = next(layer for layer in network.modules() if isinstance(layer, kind))
        first.register_forward_hook(lambda layer, given, out: seen.append(out.detach()))
        logits = network(x)
        found.append(torch.autograd.grad(logits[:, 1].sum(), x)[0])
    assert type(first) is not kind
    if precision is None:
        torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)
        scale = found[0].abs().max().item()
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * scale)
    else:
        assert torch.cosine_similarity(*(x.flatten() for x in found), 0) > 0.98
    assert other.state_dict().keys() == model.state_dict().keys()
