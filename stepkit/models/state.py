"""How a model stands while it is explained: frozen, out of place, on its device."""

import contextlib
import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torchvision.models import resnet
from torchvision.models.video import resnet as video_resnet

from stepkit._memory import kept

__all__ = [
    "device_of",
    "fitting",
    "frozen",
    "is_compiled",
    "out_of_place",
    "precision_of",
    "uncompiled",
]


@contextlib.contextmanager
def frozen(model: nn.Module):
    """Evaluation mode and no parameter gradients inside; everything as it was afterwards.

    Holds also when the body raises or is interrupted. An ``nn.LSTM`` and its kin cannot be
    differentiated by cuDNN in evaluation mode, so cuDNN is not used for models that contain one.
    A ``torch.inference_mode`` around the call, which knows no gradients, is left for its length.
    Memory that is freed inside is kept at hand, see `stepkit._memory`.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with contextlib.ExitStack() as within:
        within.callback(_thaw, model)  # also of an interrupt on the way
        _freeze(model)
        if torch.is_inference_mode_enabled():
            within.enter_context(torch.inference_mode(False))
            within.enter_context(torch.no_grad())  # as outside
        within.enter_context(cudnn)
        within.enter_context(kept())
        yield model


_frozen = weakref.WeakKeyDictionary()  # how often, and how every part was before


_freezing = threading.Lock()


def _freeze(model: nn.Module) -> None:
    """Freeze a model; threads may overlap: the first keeps how it was."""
    with _freezing:
        if model not in _frozen:
            modes = [(part, part.training) for part in model.modules()]
            learning = [(values, values.requires_grad) for values in model.parameters()]
            _frozen[model] = [1, modes, learning]
            model.eval()
            model.requires_grad_(False)
        else:
            _frozen[model][0] += 1


def _thaw(model: nn.Module) -> None:
    """Bring back how a frozen model was, when the last thread leaves it."""
    with _freezing:
        if model not in _frozen:
            return
        _frozen[model][0] -= 1
        if not _frozen[model][0]:
            _, modes, learning = _frozen.pop(model)
            for part, training in modes:
                part.training = training
            for values, requires_grad in learning:
                values.requires_grad_(requires_grad)


def is_compiled(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` or `prepare` compiled the model: then it calls no hooks."""
    return isinstance(model, OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )


@contextlib.contextmanager
def uncompiled(model: nn.Module):
    """Let a compiled model run layer by layer inside, so that hooks are called."""
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # it holds from being made, not from ``with`` on
        yield


def device_of(model: nn.Module, default) -> torch.device:
    """Return where the model's parameters live; ``default`` for a model that has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device(default)


def precision_of(model: nn.Module, default: torch.dtype = torch.float32) -> str:
    """Return in what a model computes, such as "float32": the type of its first parameter."""
    first = next(model.parameters(), None)
    return str(default if first is None else first.dtype).removeprefix("torch.")


def fitting(work: Callable[[], object], device: torch.device) -> int:
    """Return how many clips fit into a CUDA device at once, when ``work`` does one.

    Its peak into four fifths of the memory that is free; what larger batches need beside takes the
    rest.
    """
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held
    torch.cuda.reset_peak_memory_stats(device)
    work()
    taken = torch.cuda.max_memory_allocated(device) - held
    return max(1, int(0.8 * free / max(1, taken)))


def out_of_place(model: nn.Module) -> nn.Module:
    """Replace in-place operations, which break hooks on their inputs, by their equals; in place.

    Turns off the ``inplace`` flag of activations, and the ``out += residual`` of torchvision's
    residual blocks. Outputs, parameters and their names stay as they are.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if type(module) in _RESIDUAL:
            module.__class__ = _RESIDUAL[type(module)]
    return model


class _VideoBlock(video_resnet.BasicBlock):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + residual)


class _VideoBottleneck(video_resnet.Bottleneck):
    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + residual)


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


_OURS = (_VideoBlock, _VideoBottleneck, _ImageBlock, _ImageBottleneck)


_RESIDUAL = {ours.__base__: ours for ours in _OURS}
