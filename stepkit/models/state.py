"""How a model stands while it is explained: frozen, on its device, in its precision."""

import contextlib
import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["batch_that_fits", "device_of", "frozen", "precision_of"]


@contextlib.contextmanager
def frozen(model: nn.Module):
    """Evaluation mode and no parameter gradients inside; everything as it was afterwards.

    Holds also when the body raises or is interrupted, and where threads share the model. An
    ``nn.LSTM`` and its kin cannot be differentiated by cuDNN in evaluation mode, so cuDNN is not
    used for models that contain one. A ``torch.inference_mode`` around the call, which knows no
    gradients, is left for its length.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    gradients = torch.set_grad_enabled(torch.is_grad_enabled())  # leaving the mode turns them on
    try:
        _freeze(model)
        with torch.inference_mode(False), gradients, cudnn:
            yield model
    finally:  # also of an interrupt on the way
        _thaw(model)


_lock = threading.Lock()
_before = weakref.WeakKeyDictionary()  # how often a model is frozen, and how it was at first


def _freeze(model: nn.Module) -> None:
    with _lock:
        if model not in _before:
            modes = [(part, part.training) for part in model.modules()]
            learning = [(values, values.requires_grad) for values in model.parameters()]
            _before[model] = [0, modes, learning]
            model.eval().requires_grad_(False)
        _before[model][0] += 1


def _thaw(model: nn.Module) -> None:
    with _lock:
        times, modes, learning = _before.get(model, (0, (), ()))
        if times > 1:
            _before[model][0] -= 1
            return
        _before.pop(model, None)
        for part, training in modes:
            part.training = training
        for values, requires_grad in learning:
            values.requires_grad_(requires_grad)


def device_of(model: nn.Module, default) -> torch.device:
    """Return where the model's parameters live; ``default`` for a model that has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device(default)


def precision_of(model: nn.Module, default: torch.dtype = torch.float32) -> str:
    """Return in what a model computes, such as "float32": the type of its first parameter."""
    first = next(model.parameters(), None)
    return str(default if first is None else first.dtype).removeprefix("torch.")


def batch_that_fits(work: Callable[[], object], device: torch.device) -> int:
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
