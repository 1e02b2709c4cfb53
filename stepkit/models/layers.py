"""The layers of a network: inside its wrappers, and the one that activation methods look at."""

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torchvision.models.video import S3D, MViT, SwinTransformer3d, VideoResNet

from stepkit._checks import require
from stepkit.models.wrapped import Wrapped

__all__ = ["find_layer", "inside"]


def inside(model: nn.Module) -> nn.Module:
    """Return the network that `stepkit.wrap` or ``torch.compile`` holds, whose layers have names.

    Raises
    ------
    ValueError
        It is compiled by TorchScript, whose layers nobody can look at or change.
    """
    while isinstance(model, Wrapped | OptimizedModule):
        model = model.model if isinstance(model, Wrapped) else model._orig_mod
    expected = "the Python module, or a method that does not look at layers (gradient, step, ...)"
    require(not isinstance(model, torch.jit.ScriptModule), "model", "TorchScript", expected)
    return model


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
    model = inside(model)
    layers = {key: layer for key, layer in model.named_modules() if key}
    name = _usual_layer(model) if name is None else name
    given = "no name, and no default for this model" if name is None else repr(name)[:80]
    usual = _worth_a_try(layers)
    known = isinstance(name, str) and name in layers
    require(known, "layer", given, f"{usual}one of {', '.join(layers)}")
    return layers[name]


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
    if lists and max(lists)[0] > 1 and any("attention" in kind for kind in kinds):
        length, name = max(lists)
        return f"layer={name + f'.{length - 2}'!r}, the last block but one, or "
    convolutions = [k for k, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    return f"layer={convolutions[-1]!r}, the last convolution, or " if convolutions else ""


def _usual_layer(model: nn.Module) -> str | None:
    """Return the name of `find_layer`'s default."""
    if isinstance(model, VideoResNet):
        usual = "layer4"
    elif isinstance(model, S3D):
        usual = f"features.{len(model.features) - 1}"
    elif isinstance(model, SwinTransformer3d):
        usual = "norm"
    elif isinstance(model, MViT):
        usual = f"blocks.{len(model.blocks) - 2}"
    else:
        usual = None
    return getattr(model, "cam_layer", usual)
