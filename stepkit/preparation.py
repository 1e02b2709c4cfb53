"""Models that explain faster: `prepare`, and what asks how a model computes."""

import copy
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.video.resnet import Conv2Plus1D, R2Plus1dStem

from stepkit.checks import one_of
from stepkit.models import device_of

TILE = 32  # channels that a matrix unit takes at once, in bfloat16


def prepare(model: nn.Module, precision: str | None = None, *, compiled: bool = False) -> nn.Module:
    """Return a copy of the model that explains faster: the same function, and the same layers.

    In evaluation mode, its parameters frozen, each batch normalisation folded into the convolution
    before it (an identity stays in its place, so that names and hooks still fit), the weights of
    convolutions with the channels last in memory. Outputs differ by rounding only; the clips'
    gradient takes about half the time on a CPU. Every method and metric takes the copy as it takes
    the model; LRP and its kin then see one layer where there were two. In bfloat16, the channels
    between the two halves of a (2+1)D convolution are filled up to a multiple of 32 with zeros:
    there are 45, 230 or 921 of them, which matrix units are slow at.

    Parameters
    ----------
    model : nn.Module
        Any; left as it is. What ``torch.fx`` cannot trace is searched part by part.
    precision : str, optional
        ``"bfloat16"``: the layers compute in it, clips and logits stay float32. Worth it where the
        hardware multiplies such numbers, slower elsewhere. ``"auto"``: where `has_bfloat16` says
        so. By default the model's own.
    compiled : bool
        Compile with ``torch.compile``, anew for each shape of the clips, which takes a minute or
        two and, on a CPU, a C++ compiler; on a GPU into CUDA graphs (not yet tried by us, for want
        of one). Worth it for many iterations of one shape. Methods that look at layers, or change
        them, go the uncompiled way.

    Examples
    --------
    >>> model = prepare(load_model("r2plus1d_narrow", num_classes=6))
    >>> model.training
    False
    """
    one_of("precision", precision, (None, "bfloat16", "auto"))
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for conv, norm in list(_foldable(model)):
        folded = fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm))
        model.set_submodule(conv, folded.requires_grad_(False))
        model.set_submodule(norm, nn.Identity())
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(device_of(model, "cpu"))):
        _fill_up(model)
        model.bfloat16()
        model.register_forward_pre_hook(_narrowed)
        model.register_forward_hook(_widened)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.to(memory_format=formats[layer.weight.ndim])
    if compiled:
        # one shape, one program: what would serve all shapes serves none of them well
        graphs = "reduce-overhead" if device_of(model, "cpu").type == "cuda" else None
        model.compile(dynamic=False, mode=graphs)
    return model


def _fill_up(model: nn.Module) -> None:
    """Add channels of zeros inside factorised convolutions, up to full `TILE`s."""
    for block in model.modules():
        if isinstance(block, Conv2Plus1D | R2Plus1dStem):
            before, norm, _, after = [*block][:4]
            more = -before.out_channels % TILE
            if isinstance(norm, nn.Identity) and more <= before.out_channels / 2:
                _add_channels(before, after, more)


def _add_channels(before: nn.Module, after: nn.Module, more: int) -> None:
    """Let ``before`` give ``more`` channels that are always zero, and ``after`` ignore them."""
    space = (0, 0) * (before.weight.ndim - 2)
    before.weight = _frozen(F.pad(before.weight, (*space, 0, 0, 0, more)))
    if before.bias is not None:
        before.bias = _frozen(F.pad(before.bias, (0, more)))
    after.weight = _frozen(F.pad(after.weight, (*space, 0, more)))
    before.out_channels += more
    after.in_channels += more


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _narrowed(model, given):
    return tuple(x.bfloat16() for x in given)


def _widened(model, given, logits):
    return logits.float() if isinstance(logits, Tensor) else logits


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in hardware: AMX, AVX512-BF16, a recent GPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _foldable(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names of convolutions and of the normalisations that alone see their outputs."""
    try:
        nodes = fx.Tracer().trace(model).nodes
    except Exception:  # anything may stop the tracer: a model is free to be written as it likes
        for name, child in model.named_children():
            yield from _foldable(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node):
            continue
        once = calls[node.target] == calls[before.target] == len(before.users) == 1
        if once and before.op == "call_module":
            conv, norm = (model.get_submodule(n.target) for n in (before, node))
            pair = type(conv), type(norm)
            fits = pair in ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))
            if fits and norm.running_mean is not None:
                yield prefix + before.target, prefix + node.target
