"""Metrics of attribution."""

from stepkit.metrics.curves import METRICS, Curve, auc, auc_metrics, deletion, insertion, perturbed
from stepkit.metrics.pointing import Pointing, iou, pointing_game, relevance_mass
from stepkit.metrics.reliability import (
    Reliability,
    agreement,
    reliability,
    reliability_gap,
    reliability_table,
)
from stepkit.metrics.retraining import RATIOS, perturb, retrain

__all__ = [
    "METRICS",
    "RATIOS",
    "Curve",
    "Pointing",
    "Reliability",
    "agreement",
    "auc",
    "auc_metrics",
    "deletion",
    "insertion",
    "iou",
    "perturb",
    "perturbed",
    "pointing_game",
    "relevance_mass",
    "reliability",
    "reliability_gap",
    "reliability_table",
    "retrain",
]
