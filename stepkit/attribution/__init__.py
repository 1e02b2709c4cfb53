"""Attribution methods, all behind one door: `attribute`.

Each method stands in a file of its family, with `method` above it.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from stepkit.attribution import (  # noqa: F401, to be registered
    backprop,
    cam,
    gradients,
    occlusion,
    optimised,
    relevance,
    xrai,
)
from stepkit.attribution._door import attribute
from stepkit.attribution._methods import METHODS, Work, method
from stepkit.attribution.settings import PRESETS, Settings
from stepkit.attribution.step import StepResult, heatmap, step

__all__ = [
    "PRESETS",
    "Settings",
    "StepResult",
    "Work",
    "attribute",
    "heatmap",
    "method",
    "methods",
    "step",
]

TRIED = Path(__file__).with_name("tried.csv")


def methods() -> pd.DataFrame:
    """List the methods: Table I, and what a reader wants to know beside it; one's own as well.

    Returns
    -------
    DataFrame
        Indexed by id: ``label``, ``family``, ``needs_gradient``, ``reads_layers``, ``source``, and
        the ``resolution`` that a map has by itself, in space and time (see `Method`); found by
        trying (``tools/trial.py``; blank for a method that was not tried): the kinds of network
        that it ``works on``, Table I's ``unmodified rule``, ``all networks`` and ``unreduced
        resolution``, ``forward`` and ``backward`` passes per clip with default options; and the
        method's ``options``.
    """
    known = list(METHODS.values())
    facts = ("family", "needs_gradient", "reads_layers", "source", "resolution")
    table = pd.DataFrame(
        [{"label": m.label or m.name} | {fact: getattr(m, fact) for fact in facts} for m in known],
        index=pd.Index([m.name for m in known], name="method"),
    )
    passes = {"forward": "Int64", "backward": "Int64"}
    tried = pd.read_csv(TRIED, index_col="method", keep_default_na=False, dtype=passes)
    table = table.join(tried)
    texts = table.columns.difference(list(passes))
    table[texts] = table[texts].astype(object).fillna("")
    return table.assign(options=[", ".join(m.option_names()) for m in known])


@method("random", order=0, label="Random", family="control", source="§V-B")
def _random(model, clips: Tensor, targets: Tensor, work: Work) -> Tensor:
    """Independent normal values per voxel: what every method has to beat."""
    draw = [
        torch.randn(clips.shape[2:], generator=torch.Generator().manual_seed(seed))
        for seed in work.seeds
    ]
    return torch.stack(draw)
