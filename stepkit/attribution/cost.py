"""What an explanation costs: passes through the network, and seconds."""

import contextlib
import time
from unittest import mock

import torch
from torch import Tensor, nn

from stepkit.models import device_of, uncompiled


@contextlib.contextmanager
def counted(model: nn.Module):
    """Count the clips that pass through ``model`` while the context lasts.

    Yields
    ------
    dict
        ``forward``: clips that went in; ``backward``: those of them from which a gradient was
        taken. A backward pass is counted where it is asked for (`torch.autograd`), with the clips
        that went forward, gradients on, since the last one.
    """
    passes, pending = {"forward": 0, "backward": 0}, [0]

    def went(_, inputs):
        passes["forward"] += len(inputs[0])
        pending[0] += len(inputs[0]) if torch.is_grad_enabled() else 0

    def counts(call):
        def asked(*args, **kwargs):
            passes["backward"] += pending[0]
            pending[0] = 0
            return call(*args, **kwargs)

        return asked

    handle = model.register_forward_pre_hook(went)
    patches = [
        mock.patch.object(torch.autograd, name, counts(getattr(torch.autograd, name)))
        for name in ("grad", "backward")
    ]
    try:
        with patches[0], patches[1], uncompiled(model):  # a compiled model calls no hooks
            yield passes
    finally:
        handle.remove()


def measured(explain, model: nn.Module, clips: Tensor, *targets) -> tuple[Tensor, dict]:
    """Run a method on clips and say what each of them cost.

    Parameters
    ----------
    explain : callable
        ``explain(model, clips, *targets)``, such as `stepkit.attribute` with a method.
    model, clips, *targets
        Handed to it.

    Returns
    -------
    result
        What ``explain`` returned.
    cost : dict
        ``seconds``, ``forward`` and ``backward`` passes per clip. STEP's include the one that tries
        the model out (`stepkit.models.check_model`, one clip a call).
    """
    with counted(model) as passes:
        start = time.perf_counter()
        result = explain(model, clips, *targets)
        if device_of(model, "cpu").type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    cost = {"seconds": seconds, **passes}
    return result, {name: value / len(clips) for name, value in cost.items()}
