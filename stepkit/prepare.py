"""Models that explain faster: `prepare`, and what asks how a model computes."""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.video.resnet import Conv2Plus1D, R2Plus1dStem

from stepkit._checks import one_of, require
from stepkit._convolutions import rewrite
from stepkit.models import device_of

__all__ = ["has_bfloat16", "prepare"]

TILE = 32  # channels that a matrix unit takes at once, in bfloat16
_FOLDABLE = (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)


def prepare(
    model: nn.Module, precision: str | None = None, *, compiled: bool | None = None
) -> nn.Module:
    """Return a copy of the model that explains faster: the same function, and the same layers.

    In evaluation mode, its parameters frozen, each batch normalisation folded into the convolution
    before it (an identity stays in its place, so that names and hooks still fit), the weights of
    convolutions with the channels last in memory. Folded is only what a trace by ``torch.fx``
    proves: that the normalisation alone reads the convolution's output. Outputs differ by rounding
    only; the clips' gradient takes about half the time on a CPU. Every method and metric takes the
    copy as it takes the model; LRP and its kin then see one layer where there were two. In
    bfloat16, the channels between the two halves of a (2+1)D convolution are filled up to a
    multiple of 32 with zeros: there are 45, 230 or 921 of them, which matrix units are slow at; and
    on a CUDA device convolutions that are flat in space or time go by images, those of few channels
    and a stride by squares of pixels, which libraries are faster at there.

    Parameters
    ----------
    model : nn.Module
        Any; left as it is. Nothing is folded in parts whose code cannot be traced, as it loops over
        frames or asks for shapes: who else reads a layer there, no trace tells.
    precision : str, optional
        ``"bfloat16"``: the layers compute in it, clips and logits stay float32. Worth it where the
        hardware multiplies such numbers, slower elsewhere. ``"auto"``: where `has_bfloat16` says
        so. By default the model's own.
    compiled : bool, optional
        Compile with ``torch.compile``, anew for each shape of the clips, which takes a minute or
        two and, on a CPU, a C++ compiler; on a GPU some 15 seconds. Worth it for many iterations of
        one shape. Methods that look at layers, or change them, go the uncompiled way. By default
        only in bfloat16 on a CUDA device with Triton, and there only for what is long enough: the
        iterations of `step` and ``"extremal_perturbation"`` where a batch takes 30,000 passes or
        more (clips × areas × iterations; 7 clips at 1200 iterations of four areas).

    Raises
    ------
    ValueError
        Another precision; a model that cannot be copied or frozen.

    Examples
    --------
    >>> model = prepare(load_model("r2plus1d_narrow", num_classes=6))
    >>> model.training
    False
    """
    one_of("precision", precision, (None, "bfloat16", "auto"))
    try:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # whatever a model holds may refuse, and TorchScript does
        remedy = "remove hooks, what they have kept, and weight_norm, or take the model unprepared"
        require(False, "model", f"'{error}'", f"one that can be copied and frozen: {remedy}")
    inner = _fold(nn.Sequential(model))
    device = device_of(model, "cpu")
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(device)):
        _fill_up(inner)
        model.bfloat16()
        model.register_forward_pre_hook(_narrowed)
        model.register_forward_hook(_widened)
        if device.type == "cuda":
            rewrite(model)
            model.compiles = compiled is None  # in long runs of STEP
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.to(memory_format=formats[layer.weight.ndim])
    if compiled:
        # one shape, one program: what would serve all shapes serves none of them well
        model.compile(dynamic=False)
    return model


def _fill_up(inner: list[tuple[nn.Module, nn.Module]]) -> None:
    """Add channels of zeros between the two convolutions of each pair, up to full `TILE`s."""
    for before, after in inner:
        more = -before.out_channels % TILE
        if more <= before.out_channels / 2:
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


def _fold(model: nn.Sequential) -> list[tuple[nn.Module, nn.Module]]:
    """Fold in place what the trace of the only module inside ``model`` proves.

    Returns the convolutions between which channels may be added: the two of a factorised one,
    nothing else between them.
    """
    traced, folded, inner = _Trace(model), {}, []
    for conv, norm, after in traced.chains():
        layers = folded[conv], folded[norm] = model.get_submodule(conv), model.get_submodule(norm)
        model.set_submodule(conv, fuse_conv_bn_eval(*layers).requires_grad_(False))
        model.set_submodule(norm, nn.Identity())
        home = conv.rpartition(".")[0]
        block = model.get_submodule(home)
        if after.startswith(home + ".") and isinstance(block, Conv2Plus1D | R2Plus1dStem):
            inner.append((conv, after))
    if folded and str(_Trace(model).graph) != str(traced.graph):
        inner = []  # its code asks what its layers are: the copy would go another way
        for name, layer in folded.items():
            model.set_submodule(name, layer)
    return [(model.get_submodule(a), model.get_submodule(b)) for a, b in inner]


class _Trace(fx.Tracer):
    """The steps of a model. A part whose code cannot be traced is one step, as a layer is."""

    proxy_buffer_attributes = True  # reading a statistic is a step, too

    def __init__(self, model: nn.Sequential):
        super().__init__()
        model = copy.deepcopy(model)  # its code may keep what it sees
        self.opaque, self.hooked = [], []
        for module in model.modules():
            hooks = module._forward_hooks, module._forward_pre_hooks
            hooks += module._backward_hooks, module._backward_pre_hooks
            if any(hooks):
                self.hooked.append(set(module.modules()))
                for kind in hooks:
                    kind.clear()
        with torch.random.fork_rng([]):
            try:
                self.trace(model)
            except Exception:  # it returns what is no tensor
                self.opaque = ["0"]

    def call_module(self, module, forward, args, kwargs):
        known, stack = len(self.opaque), self.module_stack.copy()
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # a model is free to be written as it likes
            self.opaque[known:], self.module_stack = [self.path_of_module(module)], stack
            return self.create_proxy("call_module", self.opaque[-1], args, kwargs)

    def chains(self) -> Iterator[tuple[str, str, str]]:
        """Yield names: a convolution, the normalisation that alone reads it, and the convolution
        that alone reads that, through a ReLU, or "".
        """
        at, nodes = self.root.get_submodule, self.graph.nodes
        calls = Counter(at(node.target) for node in nodes if node.op == "call_module")
        read = {at(n.target.rpartition(".")[0]) for n in nodes if n.op == "get_attr"}
        read.update(layer for name in self.opaque for layer in at(name).modules())
        places = Counter(c for module in self.root.modules() for c in module._modules.values())

        def alone(*layers):  # called once, by traced code, and no hook sees what lies between them
            once = all(calls[c] == places[c] == 1 and c not in read for c in layers)
            return once and all(len({c in held for c in layers}) == 1 for held in self.hooked)

        for node in nodes:
            names = [step.target for step in islice(_only_readers(node), 4)]
            layers = [at(name) for name in names]
            kinds = [type(layer) for layer in layers]
            if tuple(kinds[:2]) in _FOLDABLE and alone(*layers[:2]):
                fixed = layers[1].running_mean is not None
                if fixed and not any(layer.training for layer in layers[:2]):
                    inner = kinds[2:] == [nn.ReLU, kinds[0]] and alone(*layers[:2], layers[3])
                    yield *names[:2], names[3] if inner else ""


def _only_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a call of a layer, the call that alone reads its output, and so on."""
    while node.op == "call_module":
        yield node
        if len(node.users) != 1:
            return
        (node,) = node.users
