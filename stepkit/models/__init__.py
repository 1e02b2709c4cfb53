"""What every network brings: `wrap`, its score, its layers, its state.

A model is any ``nn.Module`` that maps clips (N, 3, T, H, W) to logits (N, K); Φ_c is the softmax
probability of class c. Nothing in stepkit asks for more than that.
"""

from stepkit.models.check import check_model, check_once
from stepkit.models.layers import find_layer, out_of_place, uncompiled, unwrapped
from stepkit.models.state import batch_that_fits, device_of, frozen, precision_of
from stepkit.models.wrapped import Wrapped, wrap

__all__ = ["Wrapped", "batch_that_fits", "check_model", "check_once", "device_of", "find_layer"]
__all__ += ["frozen", "out_of_place", "precision_of", "uncompiled", "unwrapped", "wrap"]
