"""Metrics of attribution."""

from stepkit.metrics.curves import Curve, auc, deletion, insertion
from stepkit.metrics.pointing import Pointing, iou, pointing_game, relevance_mass
from stepkit.metrics.reliability import Reliability, reliability

__all__ = [
    "Curve",
    "Pointing",
    "Reliability",
    "auc",
    "deletion",
    "insertion",
    "iou",
    "pointing_game",
    "relevance_mass",
    "reliability",
]
