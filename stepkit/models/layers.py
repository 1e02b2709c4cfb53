"""The layers of a network: inside its wrappers, open to hooks, and the one activations are of."""

import contextlib

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.video import S3D, MViT, SwinTransformer3d, VideoResNet
from torchvision.models.video import resnet as video_resnet

from stepkit._checks import require
from stepkit.models.wrapped import Wrapped

__all__ = ["find_layer", "out_of_place", "uncompiled", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network that `stepkit.wrap` or ``torch.compile`` holds, whose layers have names.

    Raises
    ------
    ValueError
        It is compiled by TorchScript, whose layers nobody can look at or change.
    """
    while isinstance(model, Wrapped) or hasattr(model, "_orig_mod"):  # torch.compile's
        model = model.model if isinstance(model, Wrapped) else model._orig_mod
    expected = "the Python module, or a method that does not look at layers (gradient, step, ...)"
    require(not isinstance(model, torch.jit.ScriptModule), "model", "TorchScript", expected)
    return model


@contextlib.contextmanager
def uncompiled(model: nn.Module):
    """Let a model that `prepare` or ``torch.compile`` compiled run layer by layer inside.

    Compiled, it calls no hooks.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if compiled or hasattr(model, "_orig_mod"):
        # it holds from being made, not from ``with`` on
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def find_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """Return the layer that activation methods look at.

    ``name`` as in ``model.named_modules()``, of the network itself where it is wrapped or compiled.
    By default the attribute ``cam_layer`` of models that carry one, and for torchvision's video
    models the last layer where space is left and that the classifier listens to: the last stage of
    a ResNet and of S3D, the last normalisation of a Swin transformer, the last block but one of an
    MViT (of the last, only the class token is read). For any other model it has to be named: which
    of its layers comes last, no list of layers tells.

    Raises
    ------
    ValueError
        No such layer, or none known for this model; lists those that there are.
    """
    model = unwrapped(model)
    layers = {key: layer for key, layer in model.named_modules() if key}
    name = _usual_layer(model) if name is None else name
    given = "no name, and no default for this model" if name is None else repr(name)[:80]
    known = isinstance(name, str) and name in layers
    require(known, "layer", given, f"{_worth_a_try(layers)}one of {', '.join(layers)}")
    return layers[name]


def _usual_layer(model: nn.Module) -> str | None:
    """Return the name of `find_layer`'s default."""
    names = {
        VideoResNet: lambda: "layer4",
        S3D: lambda: f"features.{len(model.features) - 1}",
        SwinTransformer3d: lambda: "norm",
        MViT: lambda: f"blocks.{len(model.blocks) - 2}",
    }
    known = [name() for kind, name in names.items() if isinstance(model, kind)]
    return getattr(model, "cam_layer", known[0] if known else None)


def _worth_a_try(layers: dict[str, nn.Module]) -> str:
    """Name the last block but one of a transformer (of the last, often only the class token is
    read), the last convolution of any other network.
    """
    kinds = {type(layer).__name__.lower() for layer in layers.values()}
    lists = [
        (len(layer), name)
        for name, layer in layers.items()
        if isinstance(layer, nn.ModuleList | nn.Sequential) and len({*map(type, layer)}) == 1
    ]
    length, name = max(lists, default=(0, ""))
    if length > 1 and any("attention" in kind for kind in kinds):
        return f"layer={f'{name}.{length - 2}'!r}, the last block but one, or "
    convolutions = [k for k, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    return f"layer={convolutions[-1]!r}, the last convolution, or " if convolutions else ""


def out_of_place(model: nn.Module) -> nn.Module:
    """Replace in-place operations, which break hooks on their inputs, by their equals; in place.

    Turns off the ``inplace`` flag of activations, and the ``out += residual`` of torchvision's
    residual blocks. Outputs, parameters and their names stay as they are.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        module.__class__ = _ADDING.get(type(module), type(module))
    return model


class _VideoBlock(video_resnet.BasicBlock):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + residual)


class _ImageBlock(resnet.BasicBlock):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


class _ImageBottleneck(resnet.Bottleneck):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + residual)


_ADDING = {ours.__base__: ours for ours in (_VideoBlock, _ImageBlock, _ImageBottleneck)}
