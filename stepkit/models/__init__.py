"""What every network brings: `wrap`, its score, its layers, its state.

A model is any ``nn.Module`` that maps clips (N, 3, T, H, W) to logits (N, K); Φ_c is the softmax
probability of class c. Nothing in stepkit asks for more than that.
"""

from stepkit.models.check import called, check_model, meet
from stepkit.models.layers import find_layer, inside
from stepkit.models.state import (
    device_of,
    fitting,
    frozen,
    is_compiled,
    out_of_place,
    precision_of,
    uncompiled,
)
from stepkit.models.wrapped import Wrapped, wrap

__all__ = [
    "Wrapped",
    "called",
    "check_model",
    "device_of",
    "find_layer",
    "fitting",
    "frozen",
    "inside",
    "is_compiled",
    "meet",
    "out_of_place",
    "precision_of",
    "uncompiled",
    "wrap",
]
