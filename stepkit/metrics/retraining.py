"""Retraining metrics: KAR and ROAR (paper §V-I, Fig. 8; Hooker et al. 2019, its ref. 33).

Perturbing a clip takes it off the distribution that a network was trained on, and its answer may be
about that instead of about what was removed. So perturb the *training* clips too, train the same
network on them from scratch, and see how well it does on test clips perturbed in the same way. KAR
keeps the share of the voxels that the map ranks highest: a good map keeps the accuracy up. ROAR
removes it: a good map brings the accuracy down.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _keys
from stepkit import removal as removals
from stepkit._checks import clips as check_clips
from stepkit._checks import one_of, require, tensor
from stepkit.data import Batch, Sample
from stepkit.data.sample import Samples
from stepkit.removal import Removal
from stepkit.training import Recipe, describe, evaluate, train

__all__ = ["RATIOS", "perturb", "retrain"]

RATIOS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)  # of §V-I
PARTS = ("train", "val", "test")


def retrain(
    network: Callable[[int], nn.Module],
    data: Mapping[str, Batch],
    maps: Mapping[str, Mapping[str, Tensor]],
    out: str | Path,
    recipe: Recipe,
    *,
    operation: str = "keep",
    ratios: Sequence[float] = RATIOS,
    seeds: Sequence[int] = (0,),
    removal: Removal | str = "black",
    progress: bool = False,
    tag: str = "",
) -> pd.DataFrame:
    """Keep or remove what each method marks, retrain from scratch, and test (KAR, ROAR).

    Parameters
    ----------
    network : callable
        A seed -> a new, untrained network, clips (N, 3, T, H, W) to logits (N, K).
    data : dict of str to Batch
        ``"train"``, ``"val"`` and ``"test"``: the clips, as `stepkit.data.batch` collects them. The
        checkpoint that is tested is the one that does best on ``"val"``; the test clips are looked
        at once, at the end. (The released code starts from pretrained weights and picks the epoch
        on the test set.)
    maps : dict of dict of Tensor
        Per method and part, attributions (N, T, H, W) of those clips.
    out : path
        A folder for the trainings, one for each method, ratio and seed. Those that are done are not
        done again; a killed one goes on with the epoch it was in.
    recipe : Recipe
        The budget of each training; every epoch sees the same clips.
    operation : str
        ``"keep"`` (KAR, default) or ``"remove"`` (ROAR).
    ratios : sequence of float
        Shares of a clip's voxels that are kept, or removed.
    seeds : sequence of int
        Of the network's weights and of the order of the clips, a training each.
    removal : Removal or str
        What stands where voxels were removed; black by default, as in the released code.
    progress : bool
        Show a bar over trainings.
    tag : str
        Of the network, as for `stepkit.training.train`.

    Returns
    -------
    DataFrame
        A row per method, ratio, seed and test clip: ``method, operation, ratio, seed, clip,
        correct``. The mean of ``correct`` is the accuracy of Fig. 8.

    Raises
    ------
    ValueError
        A missing part, maps that do not fit their clips, a ratio outside (0, 1).

    Examples
    --------
    >>> from stepkit.metrics import retrain
    >>> from stepkit.training import QUICK
    >>> scores = retrain(network, data, {"step": maps}, "runs/kar", QUICK)  # doctest: +SKIP
    >>> scores.groupby(["method", "ratio"])["correct"].mean()  # doctest: +SKIP
    """
    one_of("operation", operation, ("keep", "remove"))
    for name in PARTS:
        require(name in data, "data", f"no part {name!r}", "train, val and test")
    for method, name in product(maps, PARTS):
        shape, frames = getattr(maps[method].get(name), "shape", None), data[name].clips[:, 0].shape
        argument, expected = f"maps[{method!r}][{name!r}]", f"the clips' {tuple(frames)}"
        require(shape == frames, argument, f"shape {shape and tuple(shape)}", expected)
    rows = []
    jobs = [*product(maps, ratios, seeds)]
    for method, ratio, seed in tqdm(jobs, desc="retraining", disable=not progress, leave=False):
        what = f"{operation}_{ratio:g}"
        parts = []
        for name in PARTS:
            given = data[name]
            clips = perturb(given.clips, maps[method][name], ratio, operation, removal)
            both = zip(clips, given.targets.tolist(), given.ids, strict=True)
            parts.append(Samples([Sample(*each, boxes=[]) for each in both], what))
        model, (*known, test) = network(seed), parts
        # the folder's name holds the key: other maps, or another network, are another training
        run = _keys.key(run=describe(model, *known, recipe, seed, tag=tag))[:8]
        where = Path(out) / method / f"{what}_seed_{seed}_{run}"
        train(model, *known, where, recipe, seed=seed, tag=tag)
        found = evaluate(model, test, recipe.batch_size)
        row = {"method": method, "operation": operation, "ratio": ratio, "seed": seed}
        columns = {"clip": found["ids"], "correct": found["correct"].float()}
        rows.append(pd.DataFrame(columns | row))
    return pd.concat(rows, ignore_index=True)


def perturb(
    clips: Tensor,
    maps: Tensor,
    ratio: float,
    operation: str = "keep",
    removal: Removal | str = "black",
) -> Tensor:
    """Keep, or remove, the share ``ratio`` of each clip's voxels that its map ranks highest.

    ``clips`` (N, 3, T, H, W), ``maps`` (N, T, H, W) -> (N, 3, T, H, W). The order is global over a
    clip; voxels that tie keep their raster order, so that the count is exact.
    """
    check_clips(clips)
    tensor("maps", maps, "(N, T, H, W)")
    require(maps.shape == clips[:, 0].shape, "maps", tuple(maps.shape), tuple(clips[:, 0].shape))
    require(0 < ratio < 1, "ratio", ratio, "a share between 0 and 1")
    one_of("operation", operation, ("keep", "remove"))
    ranks = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    marked = (ranks < round(ratio * maps[0].numel())).view_as(maps)
    empty = removals.named(removal).nothing(clips)
    return torch.where((marked == (operation == "keep"))[:, None], clips, empty)
