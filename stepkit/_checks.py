"""Arguments, checked at the door: every error names argument, value and expectation.

And defaults in pixels, which follow a clip's size. Lowest floor: imports nothing of stepkit.
"""

import difflib
import sys
import warnings

import torch
from torch import Tensor, nn


def require(condition: bool, argument: str, given: object, expected: str) -> None:
    """Raise ``ValueError("argument: got <given>, expected <expected>")`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{argument}: got {given}, expected {expected}")


def warn(message: str) -> None:
    """Warn whoever called stepkit, at the line of the call."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("stepkit"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def one_of(argument: str, given: object, choices) -> None:
    """Raise ``ValueError`` that lists ``choices``, a near one first, unless ``given`` is one."""
    choices = list(choices)
    near = difflib.get_close_matches(str(given), map(str, choices), 1, 0.75)
    meant = f"{near[0]!r}? It is " if near else ""
    listed = ", ".join(map(repr, choices))
    require(given in choices, argument, repr(given), f"{meant}one of {listed}")


def tensor(argument: str, given: object, shape: str, dtype=torch.float32) -> Tensor:
    """Check a float32 tensor of finite values.

    ``shape`` spells the axes, as in ``"(N, 3, T, H, W)"``: a number is a fixed length, a letter any
    length of at least one.

    Raises
    ------
    TypeError
        ``given`` is no tensor, or of another dtype.
    ValueError
        Another rank or length, an empty axis, a NaN or an infinity.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{argument}: got {type(given).__name__}, expected a tensor {shape}")
    if given.dtype != dtype:
        raise TypeError(f"{argument}: got dtype {given.dtype}, expected {dtype}")
    axes = [axis.strip() for axis in shape.strip("()").split(",")]
    fits = given.ndim == len(axes) and all(
        int(axis) == length if axis.isdigit() else length > 0
        for axis, length in zip(axes, given.shape, strict=True)
    )
    require(fits, argument, f"shape {tuple(given.shape)}", shape)
    if dtype.is_floating_point:
        require(finite(given), argument, "NaN or infinity", "finite values")
    return given


def finite(values: Tensor) -> bool:
    """Tell whether all values are finite; the sum tells, unless it overflows."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def clips(given: object) -> Tensor:
    """Check a batch of normalised clips, float32 (N, 3, T, H, W)."""
    return tensor("clips", given, "(N, 3, T, H, W)")


def model(given: object) -> nn.Module:
    """Check that a model is one."""
    if not isinstance(given, nn.Module):
        raise TypeError(f"model: got {type(given).__name__}, expected a torch.nn.Module")
    return given


def targets(given: object, n: int, device=None) -> Tensor:
    """Return the targets as int64 (N,); a single one stands for every clip.

    Whether a network has that many classes is for `stepkit.models.scores` to say.
    """
    try:
        given = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"targets: got {type(given).__name__}, expected N class indices") from error
    given = given.expand(n) if given.ndim == 0 else given
    if given.dtype.is_floating_point or given.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"targets: got dtype {given.dtype}, expected integers")
    require(tuple(given.shape) == (n,), "targets", f"shape {tuple(given.shape)}", f"({n},)")
    given = given.long().clone()  # it may have been made under inference_mode
    low = int(given.min())
    require(low >= 0, "targets", low, "class indices, which begin at 0")
    return given


def in_proportion(pixels: float, size) -> float:
    """Return what ``pixels`` of the paper's 112 are in frames of ``size`` (..., H, W)."""
    return pixels * min(size[-2:]) / 112
