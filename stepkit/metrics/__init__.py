"""Metrics of attribution: each a function, known by name where `metric` stands above it."""

from stepkit.metrics._metric import METRICS, Metric, metric
from stepkit.metrics.curves import Curve, auc, deletion, insertion, perturbed
from stepkit.metrics.masks import watch
from stepkit.metrics.pointing import Pointing, iou, pointing_game, relevance_mass
from stepkit.metrics.reliability import (
    LOWER_IS_BETTER,
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
    "LOWER_IS_BETTER",
    "METRICS",
    "RATIOS",
    "Curve",
    "Metric",
    "Pointing",
    "Reliability",
    "agreement",
    "alpha_difference",
    "auc",
    "deletion",
    "insertion",
    "iou",
    "metric",
    "perturb",
    "perturbed",
    "pointing_game",
    "rank_correlation",
    "relevance_mass",
    "reliability",
    "reliability_gap",
    "reliability_table",
    "retrain",
    "watch",
]
