"""Metrics of attribution."""

from stepkit.metrics.curves import METRICS, Curve, auc, auc_metrics, deletion, insertion
from stepkit.metrics.pointing import Pointing, iou, pointing_game, relevance_mass
from stepkit.metrics.reliability import Reliability, reliability

__all__ = [
    "METRICS",
    "Curve",
    "Pointing",
    "Reliability",
    "auc",
    "auc_metrics",
    "deletion",
    "insertion",
    "iou",
    "pointing_game",
    "relevance_mass",
    "reliability",
]
