"""Attribution over a dataset: one whole file per clip, found again instead of made again.

``<out>/<dataset>/<model>/<method>/<clip>.safetensors`` holds a map, and for STEP its masks too. A
file carries a hash of all that it depends on (clip, target, weights, method, options, seed); a
file of another hash is made anew. Files are written under a temporary name and renamed, so that a
killed run leaves whole files only, resumes, and ends with the same bytes.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit.attribution import attribute, heatmap, step
from stepkit.attribution.cost import measured
from stepkit.checks import require
from stepkit.data.sample import collate
from stepkit.files import fingerprint, read_tensors, write_tensors

CHUNK = 16  # perturbed copies of one clip that go through the network together


def explain(
    method: str,
    model: nn.Module,
    dataset,
    out: str | Path,
    *,
    model_name: str,
    folder: str = "",
    n: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    **options,
) -> dict[str, Tensor]:
    """Explain the first ``n`` clips of a dataset; clips that are done already are read from disk.

    Parameters
    ----------
    method : str
        An id of `stepkit.methods`.
    model : nn.Module
        Explained for each clip's true class.
    dataset : dataset of stepkit
    out : path
        The run's folder of maps.
    model_name : str
        Names the folder; what the model *is* enters by a hash of its weights.
    folder : str
        Names the innermost folder; the method by default. For several sets of options.
    n : int, optional
        Clips, all by default.
    batch_size : int
        Clips in memory at once.
    seed : int
        Each clip draws from (seed, clip id).
    progress : bool
        Show a bar over clips.
    **options
        The method's, see `stepkit.attribute`.

    Returns
    -------
    dict of Tensor
        ``maps`` (N, T, H, W); for STEP also ``masks`` (N, A, T, H, W), ``probabilities`` (N, A) and
        ``visible_share`` (N, A).
    """
    n = len(dataset) if n is None else n
    require(0 < n <= len(dataset), "n", n, f"1..{len(dataset)} clips")
    place = Path(out) / dataset.name / model_name / (folder or method)
    weights = fingerprint(*model.state_dict().values())
    found: list[dict] = []
    bar = tqdm(total=n, desc=f"{method}, {dataset.name}", disable=not progress, leave=False)
    for start in range(0, n, batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, n))]
        keys = [_key(sample, weights, method, options, seed) for sample in samples]
        paths = [place / f"{sample.id}.safetensors" for sample in samples]
        results = [read_tensors(path, key) for path, key in zip(paths, keys, strict=True)]
        todo = [i for i, result in enumerate(results) if result is None]
        if todo:
            # the whole batch: rounding depends on what a clip is batched with
            made = _make(method, model, samples, batch_size, seed, options)
            for i in todo:
                write_tensors(paths[i], keys[i], made[i])
                results[i] = made[i]
        found += results
        bar.update(len(samples))
    bar.close()
    return {name: torch.stack([result[name] for result in found]) for name in found[0]}


def measure(
    method: str,
    model: nn.Module,
    dataset,
    out: str | Path,
    *,
    model_name: str,
    i: int,
    seed: int = 0,
    **options,
) -> tuple[Tensor, dict]:
    """Explain clip ``i`` of a dataset by itself; return its map (T, H, W) and what it cost.

    Arguments as for `explain`; a clip that is done already is read from disk, with what it cost
    then: ``seconds``, ``forward`` and ``backward`` passes, see `stepkit.attribution.cost`.
    """
    sample = dataset[i]
    folder = Path(out) / dataset.name / model_name / method
    path = folder / f"{sample.id}_alone.safetensors"
    key = _key(sample, fingerprint(*model.state_dict().values()), method, options, seed)
    found = read_tensors(path, key)
    if found is None:

        def alone(*_):
            return _make(method, model, [sample], CHUNK, seed, options)[0]

        made, cost = measured(alone, model, sample.clip[None])
        found = made | {name: torch.tensor(value) for name, value in cost.items()}
        write_tensors(path, key, found)
    cost = {name: found[name].item() for name in ("seconds", "forward", "backward")}
    return found["maps"], cost


def clip_seed(seed: int, clip_id: str) -> int:
    """Return the seed of a clip, whatever the order and the worker."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}".encode()).digest()[:7])


def _key(sample, weights: str, method: str, options: dict, seed: int) -> str:
    facts = {
        "clip": fingerprint(sample.clip),
        "target": sample.target,
        "weights": weights,
        "method": method,
        "options": {name: repr(value) for name, value in sorted(options.items())},
        "seed": clip_seed(seed, sample.id),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _make(method, model, samples, batch_size, seed, options) -> list[dict[str, Tensor]]:
    """Explain samples; one dict of tensors each."""
    batch = collate(samples)
    if method == "step":
        found = step(model, batch.clips, batch.targets, batch_size=batch_size, **options)
        if found.interrupted:  # half-optimised masks are for looking at, not for keeping
            raise KeyboardInterrupt
        named = {
            "maps": heatmap(found.masks),
            "masks": found.masks,
            "probabilities": found.probabilities,
            "visible_share": found.visible_share,
        }
    else:
        seeds = [clip_seed(seed, clip_id) for clip_id in batch.ids]
        maps = attribute(
            method, model, batch.clips, batch.targets, batch_size=batch_size, seed=seeds, **options
        )
        named = {"maps": maps}
    return [{name: values[i] for name, values in named.items()} for i in range(len(samples))]
