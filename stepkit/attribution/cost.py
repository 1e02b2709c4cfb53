"""What an explanation costs: passes through the network, and seconds."""

import contextlib
import time

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepkit.models import device_of, uncompiled

__all__ = ["counted", "measured"]


@contextlib.contextmanager
def counted(model: nn.Module):
    """Count the clips that pass through ``model`` while the context lasts.

    Yields
    ------
    dict
        ``forward``: clips that went in; ``backward``: those on whose way back a gradient arrived at
        what the model had put out.
    """
    passes, seen = {"forward": 0, "backward": 0}, set()

    def went(_, inputs, output):
        call, n = passes["forward"], len(inputs[0])
        passes["forward"] += n

        def back(_):
            way = call, torch._C._current_graph_task_id()
            passes["backward"] += n if way not in seen else 0
            seen.add(way)

        with torch._C.DisableTorchFunction():  # methods that go by rules have none for this
            leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            # such methods keep beside a tensor what goes back in its place
            for x in tree_leaves([[x, vars(x)] for x in leaves]):
                if isinstance(x, Tensor) and x.grad_fn:
                    x.grad_fn.register_prehook(back)

    handle = model.register_forward_hook(went)
    try:
        with uncompiled(model):  # a compiled model calls no hooks
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
    start = time.perf_counter()
    with counted(model) as passes:
        result = explain(model, clips, *targets)
    if device_of(model, "cpu").type == "cuda":
        torch.cuda.synchronize()
    cost = {"seconds": time.perf_counter() - start, **passes}
    return result, {name: value / len(clips) for name, value in cost.items()}
