"""Metrics of attribution: each a function, known by name where `metric` stands above it."""

from stepkit.metrics import _metric, curves, pointing, retraining
from stepkit.metrics import reliability as _reliability  # its name here is the function's
from stepkit.metrics._metric import *  # noqa: F403
from stepkit.metrics.curves import *  # noqa: F403
from stepkit.metrics.pointing import *  # noqa: F403
from stepkit.metrics.reliability import *  # noqa: F403
from stepkit.metrics.retraining import *  # noqa: F403

__all__ = _metric.__all__ + curves.__all__ + pointing.__all__
__all__ += _reliability.__all__ + retraining.__all__
