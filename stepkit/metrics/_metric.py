"""What a metric is to the library: one function, and a few facts about it."""

from collections.abc import Callable
from dataclasses import dataclass

from stepkit._registry import Registry

__all__ = ["METRICS", "Metric", "metric"]


@dataclass(frozen=True)
class Metric:
    """A metric of attribution.

    Attributes
    ----------
    name : str
        By which it is asked for.
    run : callable
        ``(model, batch, maps, **options) -> {column: Tensor (N,)}``: the network, a
        `stepkit.data.Batch`, the attributions (N, T, H, W). What has more axes than (N,), such as a
        curve, is kept with the scores, and stands in no table.
    label : str
        For people.
    columns, lower_is_better : tuple of str
        The columns that say how good a map is, and those of them where lower is better: α, and the
        agreement with the truth, are of these (`stepkit.metrics.reliability_table`).
    reads : str
        What it scores of all that a method finds: ``"maps"``, or ``"masks"`` (N, A, T, H, W).
    baseline : bool
        It has an option ``baseline``: a study gives it the mean colour of the training clips.
    """

    name: str
    run: Callable
    label: str = ""
    columns: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    reads: str = "maps"
    baseline: bool = False


METRICS = Registry("metric", Metric)
metric = METRICS.register


def score_columns(scores) -> dict[str, bool]:
    """Return which columns of a table of scores say how good a map is, and if lower is better."""
    rows = [(column, row) for row in METRICS.values() for column in row.columns]
    return {column: column in row.lower_is_better for column, row in rows if column in scores}
