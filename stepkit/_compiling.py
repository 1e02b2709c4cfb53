"""What PyTorch's compiler makes faster on a GPU, and for which runs that is worth the wait."""

import contextlib
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._triton import has_triton

PAYS = 30_000  # passes of one shape: with fewer, compiling (half a minute) takes more than it saves
_short = []  # whether the runs at work are; of all threads, as gradients have one of their own


@contextlib.contextmanager
def uncompiled_if(short: bool):
    """Let nothing be compiled inside, if the run is a short one."""
    _short.append(short)
    try:
        yield
    finally:
        _short.remove(short)


def worth_it(tensor: Tensor) -> bool:
    """Tell whether what works on a tensor is to be compiled: on a GPU, in a run that is long."""
    return tensor.is_cuda and not any(_short) and has_triton()


def fused(function: Callable, tensor: Tensor) -> Callable:
    """Return ``function`` in few kernels, where compiling it is worth it."""
    return _once(function) if worth_it(tensor) else function


def compiled(function: Callable) -> Callable:
    """Compile for each shape by itself; where that fails, say so and go on uncompiled."""
    program = torch.compile(function, dynamic=False)

    def run(*given):
        nonlocal program
        try:
            return program(*given)
        except Exception as error:  # such as a machine without a C compiler
            if program is function or isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(f"STEP goes uncompiled, more slowly: {error}", stacklevel=2)
            program = function
            return function(*given)

    return run


_once = cache(compiled)
