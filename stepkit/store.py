"""Maps of a dataset, one whole file per clip: found again, or made and kept.

``<out>/<dataset>/<model>/<method>/<clip>.<key>.safetensors`` holds a map, and for STEP its masks
too. A file carries the key of all that it depends on (`stepkit._keys`), of which its name has the
first digits, and a hash of its content; a damaged one is made anew. Files are written under a
temporary name and renamed, so that a killed run leaves whole files only, resumes, and ends with the
same bytes.
"""

import hashlib
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
from stepkit.data import collate
from stepkit.data.sample import balanced, file_name
from stepkit.models import precision_of

__all__ = ["TOGETHER", "Store", "chosen", "clip_seed", "maps", "measure", "model_key"]

TOGETHER = 8  # clips in memory at once
CHUNK = 16  # perturbed copies of one clip that go through the network together
HEALED = "made again, the file was damaged"


def maps(
    method: str,
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
    method : str
        An id of `stepkit.methods`.
    model : nn.Module
        Explained for each clip's true class.
    dataset : dataset of stepkit
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
    indices = chosen(dataset, n, seed)
    place = Path(out) / dataset.name / model_name / (folder or method)
    store = Store(method, model, model_key(model, tag), place, seed, options)
    found: list[dict] = []
    with tqdm(total=len(indices), desc=method, disable=not progress, leave=False) as bar:
        for start in range(0, len(indices), batch_size):
            samples = [dataset[i] for i in indices[start : start + batch_size]]
            tensors, done = store.take(samples, batch_size)
            for sample, what in zip(samples, done, strict=True):
                if what == HEALED:
                    warn(f"{store.file(sample)[0]}: damaged, made again")
            found += tensors
            bar.update(len(samples))
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

    Arguments as for `maps`; a clip that is done already is read from disk, with what it cost
    then: ``seconds``, ``forward`` and ``backward`` passes, see `stepkit.attribution.cost`.
    """
    sample, folder = dataset[i], METHODS.find(method).name
    place = Path(out) / dataset.name / model_name / folder
    store = Store(method, model, model_key(model), place, seed, options)
    path, key = store.file(sample, "_alone")
    found = read_tensors(path, key)
    if found is None:

        def alone(*_):
            return _make(method, model, [sample], CHUNK, seed, options)[0]

        _make("random", model, [sample], 1, seed, {})  # passes that every model is met with, once
        made, cost = measured(alone, model, sample.clip[None])
        found = made | {name: torch.tensor(value) for name, value in cost.items()}
        write_tensors(path, key, found)
    cost = {name: found[name].item() for name in ("seconds", "forward", "backward")}
    return found["maps"], cost


def chosen(dataset, n: int | None = None, seed: int = 0) -> list[int]:
    """Return which clips: ``n``, of all classes in turn where the dataset tells them."""
    n = len(dataset) if n is None else n
    require(0 < n <= len(dataset), "n", n, f"1..{len(dataset)} clips")
    told = hasattr(dataset, "targets") and hasattr(dataset, "classes")
    return balanced(dataset, n, seed) if told else list(range(n))


def model_key(model: nn.Module, tag: str = "") -> str:
    """Return what a model is, as maps depend on it; its tensors take a while to hash."""
    require(isinstance(tag, str), "tag", repr(tag), "a text")
    known = {"precision": precision_of(model), "library": _keys.library(*_keys.MAPS)}
    return _keys.key(model=_keys.model(model, tag), **known)


@dataclass(frozen=True)
class Store:
    """Where the maps of one method on one model lie, and how they come to be there."""

    method: str
    model: nn.Module
    model_key: str
    folder: Path
    seed: int = 0
    options: dict = field(default_factory=dict)

    def file(self, sample, suffix: str = "") -> tuple[Path, str]:
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
        return self.folder / f"{file_name(sample.id + suffix)}.{key[:8]}.safetensors", key

    def take(self, samples: list, batch_size: int) -> tuple[list[dict[str, Tensor]], list[str]]:
        """Return what is known of a few samples, and whether it was found or made for each."""
        files = [self.file(sample) for sample in samples]
        found = [read_tensors(*file) for file in files]
        done = ["found" if tensors else "made" for tensors in found]
        if "made" not in done:
            return found, done
        # the whole batch: rounding depends on what a clip is batched with
        made = _make(self.method, self.model, samples, batch_size, self.seed, self.options)
        for i, (path, key) in enumerate(files):
            if found[i] is None:
                done[i] = HEALED if is_damaged(path) else "made"
                write_tensors(path, key, made[i])
                found[i] = made[i]
        return found, done


def clip_seed(seed: int, clip_id: str) -> int:
    """Return the seed of a clip, whatever the order and the worker."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}".encode()).digest()[:7])


def _make(method, model, samples, batch_size, seed, options) -> list[dict[str, Tensor]]:
    """Explain samples; one dict of tensors each."""
    batch, seeds = collate(samples), [clip_seed(seed, sample.id) for sample in samples]
    given = {"batch_size": batch_size, "seed": seeds}
    named = results(method, model, batch.clips, batch.targets, **given, **options)
    return [{name: values[i] for name, values in named.items()} for i in range(len(samples))]
