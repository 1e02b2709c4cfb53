"""Metrics of attribution."""

from stepkit.metrics.curves import Curve, auc, deletion, insertion

__all__ = ["Curve", "auc", "deletion", "insertion"]
