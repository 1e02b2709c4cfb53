"""Maps of a dataset, one whole file per clip: found again, or made and kept.

``<out>/<dataset>/<model>/<method>/<clip>.<key>.safetensors`` holds a map, and for STEP its masks
too. A file carries the key of all that it depends on (`stepkit._keys`), of which its name has the
first digits, and a hash of its content; a damaged one is made anew. Files are written under a
temporary name and renamed, so that a killed run leaves whole files only, resumes, and ends with the
same bytes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _keys
from stepkit._checks import require, warn
from stepkit._files import fingerprint, is_damaged, read_tensors, write_tensors
from stepkit.attribution import METHODS
from stepkit.attribution._door import results
from stepkit.attribution.cost import measured
from stepkit.data.sample import as_dataset, balanced, collate, file_name
from stepkit.models import precision_of

__all__ = ["TOGETHER", "Store", "chosen", "clip_seed", "maps", "measure", "model_key"]

TOGETHER = 8  # clips in memory at once
CHUNK = 16  # perturbed copies of one clip that go through the network together
COST = "seconds", "forward", "backward"
HEALED = "made again, the file was damaged"


def maps(
    method: str | Callable,
    model: nn.Module,
    dataset,
    out: str | Path,
    *,
    model_name: str,
    folder: str = "",
    n: int | None = None,
    batch_size: int = TOGETHER,
    seed: int = 0,
    tag: str = "",
    progress: bool = False,
    **options,
) -> dict[str, Tensor]:
    """Explain ``n`` clips of a dataset; clips that are done already are read from disk.

    Parameters
    ----------
    method : str or callable
        An id of `stepkit.methods`, or a function as `stepkit.attribute` takes it.
    model : nn.Module
        Explained for each clip's true class.
    dataset : dataset or list of Sample
    out : path
        The run's folder of maps.
    model_name : str
        Names the folder; what the model *is* enters the key.
    folder : str
        Names the innermost folder; the method by default. For several sets of options.
    n : int, optional
        So many clips, of all classes in turn (`stepkit.data.sample.balanced`); all by default.
    batch_size : int
        Clips in memory at once.
    seed : int
        Each clip draws from (seed, clip id).
    tag : str
        For a model of which no key can tell what it is, or not enough: stands for its code,
        attributes and hooks.
    progress : bool
        Show a bar over clips.
    **options
        The method's, see `stepkit.attribute`.

    Returns
    -------
    dict of Tensor
        ``maps`` (N, T, H, W); for STEP also ``masks`` (N, A, T, H, W), ``probabilities`` (N, A) and
        ``visible_share`` (N, A).

    Raises
    ------
    TypeError
        Part of the model or of the options cannot be named, see `stepkit._keys`.
    """
    dataset, name = as_dataset(dataset), folder or METHODS.find(method).name
    place = Path(out) / dataset.name / model_name / name
    store = Store(method, model, model_key(model, tag), place, seed, options)
    indices, found = chosen(dataset, n, seed), []
    starts = range(0, len(indices), batch_size)
    for start in tqdm(starts, name, disable=not progress, leave=False):
        samples = [dataset[i] for i in indices[start : start + batch_size]]
        tensors, done = store.take(samples, batch_size)
        for sample, what in zip(samples, done, strict=True):
            if what == HEALED:
                warn(f"{place / sample.id}: damaged, made again")
        found += tensors
    return {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}


def measure(
    method: str | Callable,
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

    Arguments as for `maps`; a clip that is done already is read from disk, with what it cost
    then: ``seconds``, ``forward`` and ``backward`` passes, see `stepkit.attribution.cost`.
    """
    dataset = as_dataset(dataset)
    place = Path(out) / dataset.name / model_name / METHODS.find(method).name
    store = Store(method, model, model_key(model), place, seed, options, measured=True)
    (found,), _ = store.take([dataset[i]], CHUNK)
    return found["maps"], {name: found[name].item() for name in COST}


def chosen(dataset, n: int | None = None, seed: int = 0) -> list[int]:
    """Return which clips: ``n``, of all classes in turn."""
    n = len(dataset) if n is None else n
    require(0 < n <= len(dataset), "n", n, f"1..{len(dataset)} clips")
    return balanced(dataset, n, seed)


def model_key(model: nn.Module, tag: str = "") -> str:
    """Return what a model is, as maps depend on it; its tensors take a while to hash."""
    require(isinstance(tag, str), "tag", repr(tag), "a text")
    known = {"precision": precision_of(model), "library": _keys.library(*_keys.MAPS)}
    return _keys.key(model=_keys.model(model, tag), **known)


@dataclass(frozen=True)
class Store:
    """Where the maps of one method on one model lie, and how they come to be there."""

    method: str | Callable
    model: nn.Module
    model_key: str
    folder: Path
    seed: int = 0
    options: dict = field(default_factory=dict)
    measured: bool = False  # with what it cost, clips one by one

    def file(self, sample) -> tuple[Path, str]:
        """Return where a result lies, and its key: of other options, model or clip, other ones."""
        row = METHODS.find(self.method)
        key = _keys.key(
            clip=fingerprint({"clip": sample.clip}),
            target=int(sample.target),
            id=sample.id,
            model=self.model_key,
            method=[row.name, row.run],
            options=row.filled(self.options, sample.clip.shape[1:]),
            seed=clip_seed(self.seed, sample.id),
        )
        name = file_name(f"{sample.id}_alone" if self.measured else sample.id)
        return self.folder / f"{name}.{key[:8]}.safetensors", key

    def take(self, samples: list, batch_size: int) -> tuple[list[dict[str, Tensor]], list[str]]:
        """Return what is known of a few samples, and whether it was found or made for each."""
        files = [self.file(sample) for sample in samples]
        found = [read_tensors(*file) for file in files]
        done = ["found" if tensors else "made" for tensors in found]
        if "made" not in done:
            return found, done
        # the whole batch: rounding depends on what a clip is batched with
        made = _make(self, samples, batch_size)
        for i, (path, key) in enumerate(files):
            if found[i] is None:
                done[i] = HEALED if is_damaged(path) else "made"
                write_tensors(path, key, made[i])
                found[i] = made[i]
        return found, done


def _make(store: Store, samples: list, batch_size: int) -> list[dict[str, Tensor]]:
    """Explain samples; one dict of tensors each."""
    batch, seeds = collate(samples), [clip_seed(store.seed, sample.id) for sample in samples]
    given = {"batch_size": batch_size, "seed": seeds} | store.options

    def explain(model, clips):
        return results(store.method, model, clips, batch.targets, **given)

    if store.measured:
        results("random", store.model, batch.clips, batch.targets)  # passes by which it is met
        found, cost = measured(explain, store.model, batch.clips)
        found |= {name: torch.tensor([cost[name]] * len(samples)) for name in COST}
    else:
        found = explain(store.model, batch.clips)
    return [{name: values[i] for name, values in found.items()} for i in range(len(samples))]


def clip_seed(seed: int, clip_id: str) -> int:
    """Return the seed of a clip, whatever the order and the worker."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}".encode()).digest()[:7])
