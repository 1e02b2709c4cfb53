"""Metrics of attribution."""

from stepkit.metrics.curves import METRICS, Curve, auc, auc_metrics, deletion, insertion
from stepkit.metrics.pointing import Pointing, iou, pointing_game, relevance_mass
from stepkit.metrics.reliability import Reliability, reliability
from stepkit.metrics.retraining import RATIOS, perturb, retrain

__all__ = [
    "METRICS",
    "RATIOS",
    "Curve",
    "Pointing",
    "Reliability",
    "auc",
    "auc_metrics",
    "deletion",
    "insertion",
    "iou",
    "perturb",
    "pointing_game",
    "relevance_mass",
    "reliability",
    "retrain",
]
