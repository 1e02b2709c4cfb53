"""Metrics of attribution."""

from stepkit.metrics.curves import METRICS, Curve, auc, auc_metrics, deletion, insertion, perturbed
from stepkit.metrics.pointing import Pointing, iou, pointing_game, relevance_mass
from stepkit.metrics.reliability import (
    Reliability,
    agreement,
    alpha_difference,
    rank_correlation,
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
    "alpha_difference",
    "auc",
    "auc_metrics",
    "deletion",
    "insertion",
    "iou",
    "perturb",
    "perturbed",
    "pointing_game",
    "rank_correlation",
    "relevance_mass",
    "reliability",
    "reliability_gap",
    "reliability_table",
    "retrain",
]
