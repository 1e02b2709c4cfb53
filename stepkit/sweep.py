"""Attribution over a dataset: one whole file per clip, found again instead of made again.

``<out>/<dataset>/<model>/<method>/<clip>.<key>.safetensors`` holds a map, and for STEP its masks
too. A file carries the key of all that it depends on (`stepkit._keys`), of which its name has the
first digits, and a hash of its content; a damaged one is made anew. Files are written under a
temporary name and renamed, so that a killed run leaves whole files only, resumes, and ends with the
same bytes.

`explain` does it here and now, and returns the maps. `run` spreads it over threads, processes or a
cluster, goes on when a clip fails, and returns a table of what was done.
"""

import errno
import functools
import hashlib
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepkit import _keys
from stepkit._checks import one_of, require
from stepkit._files import fingerprint, is_damaged, read_tensors, write_tensors
from stepkit._settings import read_settings
from stepkit.attribution import METHODS, PRESETS
from stepkit.attribution import methods as methods_table
from stepkit.attribution._door import BLANK, is_blank, results
from stepkit.attribution.cost import measured
from stepkit.data import collate, load_dataset
from stepkit.data.sample import balanced, file_name
from stepkit.models import precision_of
from stepkit.networks import load_model
from stepkit.prepare import prepare
from stepkit.scheduler import Manifest, in_any_order, probe, unwound
from stepkit.scheduler import executor as _executor

executor = _executor  # beside `run`, for users
TOGETHER = 8  # clips in memory at once
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
    batch_size: int = TOGETHER,
    seed: int = 0,
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
    progress : bool
        Show a bar over clips.
    **options
        The method's, see `stepkit.attribute`. And ``tag``, a text, for a model of which no key can
        tell what it is, or not enough: it stands for its code, attributes and hooks.

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
    chosen = _chosen(dataset, n, seed)
    n = len(chosen)
    place = Path(out) / dataset.name / model_name / (folder or method)
    named = _named(model)
    found: list[dict] = []
    bar = tqdm(total=n, desc=f"{method}, {dataset.name}", disable=not progress, leave=False)
    for start in range(0, n, batch_size):
        samples = [dataset[i] for i in chosen[start : start + batch_size]]
        results, _ = _explained(method, model, samples, place, named, batch_size, seed, options)
        found += results
        bar.update(len(samples))
    bar.close()
    return {name: torch.stack([result[name] for result in found]) for name in found[0]}


def _explained(method, model, samples, place, named, batch_size, seed, options):
    """Return the results of a few samples, one dict each, and what was done for each of them."""
    wanted = [_key(sample, named, method, options, seed) for sample in samples]
    paths = [_file(place, s.id, key) for s, key in zip(samples, wanted, strict=True)]
    options = {name: value for name, value in options.items() if name != "tag"}
    results = [read_tensors(path, key) for path, key in zip(paths, wanted, strict=True)]
    done = ["found" if result else "made" for result in results]
    if "made" in done:
        # the whole batch: rounding depends on what a clip is batched with
        made = _make(method, model, samples, batch_size, seed, options)
        for i, path in enumerate(paths):
            if results[i] is None:
                if is_damaged(path):
                    done[i] = "made again, the file was damaged"
                    warnings.warn(f"{path}: damaged, made again", stacklevel=3)
                write_tensors(path, wanted[i], made[i])
                results[i] = made[i]
    return results, done


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
    key = _key(sample, _named(model), method, options, seed)
    path = _file(Path(out) / dataset.name / model_name / method, f"{sample.id}_alone", key)
    options.pop("tag", None)
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


def clip_seed(seed: int, clip_id: str) -> int:
    """Return the seed of a clip, whatever the order and the worker."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}".encode()).digest()[:7])


def _named(model: nn.Module) -> Callable[[str], str]:
    """Return a call that names the model, once for each tag: tensors take a while to hash."""
    facts = {"precision": precision_of(model), "library": _keys.library(*_keys.MAPS)}
    return functools.cache(lambda tag: _keys.key(model=_keys.model(model, tag), **facts))


def _key(sample, named, method: str, options: dict, seed: int) -> str:
    tag = options.get("tag", "")
    require(isinstance(tag, str), "tag", repr(tag), "a text")
    rest = {name: value for name, value in options.items() if name != "tag"}
    return _keys.key(
        clip=fingerprint({"clip": sample.clip}),
        target=int(sample.target),
        id=sample.id,
        model=named(tag),
        method=[method, METHODS.find(method).run],
        options=METHODS.find(method).filled(rest, sample.clip.shape[1:]),
        seed=clip_seed(seed, sample.id),
    )


def _chosen(dataset, n: int | None, seed: int) -> list[int]:
    """Return which clips: ``n``, of all classes in turn where the dataset tells them."""
    n = len(dataset) if n is None else n
    require(0 < n <= len(dataset), "n", n, f"1..{len(dataset)} clips")
    told = hasattr(dataset, "targets") and hasattr(dataset, "classes")
    return balanced(dataset, n, seed) if told else list(range(n))


def _file(place: Path, name: str, key: str) -> Path:
    """Return where a result lies: other options, another model or clip, another file."""
    return place / f"{file_name(name)}.{key[:8]}.safetensors"


def _make(method, model, samples, batch_size, seed, options) -> list[dict[str, Tensor]]:
    """Explain samples; one dict of tensors each."""
    batch = collate(samples)
    seeds = [clip_seed(seed, clip_id) for clip_id in batch.ids]
    given = {"batch_size": batch_size, "seed": seeds}
    named = results(method, model, batch.clips, batch.targets, **given, **options)
    return [{name: values[i] for name, values in named.items()} for i in range(len(samples))]


# ------------------------------------------------------------------------------ over many workers

# errors that every other clip meets as well, wherever they come from
FATAL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE


@dataclass(frozen=True)
class Job:
    """A method on a few clips: all that a worker needs to know, some hundred bytes."""

    network: bytes  # pickled calls, which the worker makes once: nothing heavy travels
    source: bytes
    model_name: str
    method: str
    folder: str
    options: tuple
    clips: tuple[int, ...]
    batch_size: int
    out: str
    seed: int
    threads: int


def run(
    source: Callable,
    network: Callable,
    methods: dict[str, dict],
    out: str | Path,
    *,
    model_name: str,
    n: int | None = None,
    batch_size: int = 1,
    executor: Executor | None = None,
    retries: int = 1,
    threads: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Explain a dataset by several methods on any number of workers; nothing is lost or done twice.

    Parameters
    ----------
    source, network : callable
        Return the dataset, and the model; called once in each worker. They are pickled, so they
        should be a function of a module, or ``functools.partial`` of one:
        ``partial(sk.load_dataset, "ucf101-24", "test", frames=16, size=112, data="/data")``.
    methods : dict of str to dict
        Options of each method. ``"step@cylinder"`` is method ``"step"`` in a folder of that name.
    out : path
        As for `explain`; workers on other machines need to see it under the same name.
    model_name : str
        Names the folder; what the model *is* enters by a hash of its weights.
    n : int, optional
        So many clips only, of all classes in turn (`stepkit.data.sample.balanced`).
    batch_size : int
        Clips explained together, one job; more than one is for GPUs. Bytes depend on it.
    executor : concurrent.futures.Executor, optional
        One that `executor` opens, ``Client.get_executor(pure=False)`` of a Dask client, or any
        other. None: a loop, here.
    retries : int
        How often a job that failed is tried again, its clips then one by one.
    threads : int
        Of torch, in each job. Bytes may depend on it, so the loop uses as many.
    seed : int
        Each clip draws from (seed, clip id), wherever it is explained.
    progress : bool
        Show a bar over clips.

    Returns
    -------
    DataFrame
        A row per method and clip: ``status`` ("done", "failed", "left"), ``what`` ("made", "found",
        "made again, the file was damaged"), ``note`` ("the map is the same everywhere"), ``error``,
        ``precision`` of the model, ``seconds``, ``attempts``. Also in
        ``<out>/<dataset>/<model>/manifest.csv``, among the rows of other sweeps; it is written
        every half minute, and when the sweep ends, however it ends.

    Raises
    ------
    OSError
        The store cannot be written to: a full disk, a quota, a read-only folder, a name that is too
        long, a file in the way. Tried before the first clip; later on, it stops the sweep.
    concurrent.futures.BrokenExecutor
        A worker of a pool of processes died, and the pool with it. (Dask replaces workers that
        die.) Both errors say how many maps are left; the same call goes on with them.
    TypeError
        ``source`` or ``network`` cannot be pickled.

    Examples
    --------
    >>> from functools import partial
    >>> import stepkit as sk
    >>> source = partial(sk.load_dataset, "motion", "test", n=2, frames=4, size=32)
    >>> network = partial(sk.load_model, "r2plus1d_narrow", 6)
    >>> methods = {"gradient": {}, "step": {"preset": "fast"}}
    >>> sk.sweep.run(source, network, methods, "maps", model_name="narrow")  # doctest: +SKIP
    """
    for name, value, least in (("batch_size", batch_size, 1), ("threads", threads, 1)):
        require(type(value) is int and value >= least, name, value, f"at least {least}")
    require(type(retries) is int and retries >= 0, "retries", retries, "at least 0")
    dataset = source()
    chosen = _chosen(dataset, n, seed)
    common = {
        "network": _pickled("network", network),
        "source": _pickled("source", source),
        "model_name": model_name,
        "batch_size": batch_size,
        "out": str(out),
        "seed": seed,
        "threads": threads,
    }
    jobs = [
        Job(
            method=folder.partition("@")[0],
            folder=folder,
            options=tuple(sorted(options.items())),
            clips=tuple(chosen[start : start + batch_size]),
            **common,
        )
        for folder, options in methods.items()
        for start in range(0, len(chosen), batch_size)
    ]
    place, ids = Path(out) / dataset.name / model_name, {i: dataset.ids[i] for i in chosen}
    longest = max(map(file_name, ids.values()), key=lambda name: len(name.encode()))
    manifest, bar = Manifest(place, methods, ids), partial(tqdm, unit="clip")
    try:
        for folder in methods:
            probe(place / folder, longest + ".safetensors")
        with unwound(), manifest, bar(total=len(ids) * len(methods), disable=not progress) as bar:
            for attempt in range(retries + 1):
                failed = []
                for job, outcomes, error in in_any_order(work, jobs, executor):
                    outcomes = _failed(job, error) if error else outcomes
                    bad = manifest.note(job.folder, job.clips, outcomes)
                    failed += [replace(job, clips=(i,)) for i in bad]
                    bar.update(len(outcomes) if attempt == 0 else len(outcomes) - len(bad))
                jobs = failed
    except OSError as error:
        told = f"{error.strerror or error}; {manifest.rest}"
        raise OSError(error.errno or errno.EIO, told, error.filename or str(place)) from error
    except BrokenExecutor as error:
        raise BrokenExecutor(f"{error}; {manifest.rest}") from error
    return manifest.table


def cost(clips: int, seconds_per_pass: float, workers: int = 1, methods=()) -> pd.DataFrame:
    """Say how long a sweep will take, before it is begun.

    hours = clips · passes · seconds per pass / workers. Passes are those of the default options,
    forward and backward each one (`stepkit.methods`); STEP's preset ``fast`` has a row of its own.
    Decoding, superpixels and writing are not in it.

    Parameters
    ----------
    clips : int
        How many.
    seconds_per_pass : float
        Of one clip through the network, forward or backward; measure it with
        ``benchmarks/iteration.py``: "bare" is eight passes, four clips forward and backward.
    workers : int
        Processes or GPUs of that speed.
    methods : sequence of str
        Ids; all by default.

    Returns
    -------
    DataFrame
        By method: ``passes`` per clip, ``hours``.

    Examples
    --------
    >>> cost(910, 0.01, workers=4, methods=["gradient"]).loc["gradient", "passes"]
    2
    """
    require(clips >= 1, "clips", clips, "at least 1")
    require(seconds_per_pass > 0, "seconds_per_pass", seconds_per_pass, "more than 0")
    require(workers >= 1, "workers", workers, "at least 1")
    table = methods_table()[["forward", "backward"]].sum(axis=1)
    for name in methods:
        one_of("methods", name, table.index)
    table = table[list(methods) or table.index]
    if "step" in table:
        share = PRESETS["fast"].iterations / PRESETS["default"].iterations
        table = pd.concat([table, pd.Series({"step, fast": round(share * table["step"])})])
    table = table.rename_axis("method").to_frame("passes")
    return table.assign(hours=clips * table["passes"] * seconds_per_pass / workers / 3600)


def _pickled(name: str, call: Callable) -> bytes:
    try:
        return pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{name}: got {call!r}, expected a function of a module, or functools.partial of one, "
            f"which can be pickled ({error})"
        ) from error


def work(job: Job) -> list[dict]:
    """Do one job, in a worker; return what became of each clip.

    Whatever goes wrong is the clip's failure, and the sweep goes on. Not so where its file cannot
    be written: no other's could.
    """
    start, threads, place = time.perf_counter(), torch.get_num_threads(), None
    torch.set_num_threads(job.threads)
    try:
        model, weights = _once(job.network, _with_weights)
        dataset = _once(job.source, lambda made: made)
        place = Path(job.out) / dataset.name / job.model_name / job.folder
        given = job.method, model, [dataset[i] for i in job.clips], place, weights
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*damaged, made again")  # the manifest says so
            found, done = _explained(*given, job.batch_size, job.seed, dict(job.options))
        precision = precision_of(model)
        blank = [f"the map is {BLANK}" if is_blank(made["maps"]) else "" for made in found]
        outcomes = [
            {"status": "done", "what": what, "note": note, "error": "", "precision": precision}
            for what, note in zip(done, blank, strict=True)
        ]
    except Exception as error:
        if _is_fatal(error, place):
            raise
        outcomes = _failed(job, error)
    finally:
        torch.set_num_threads(threads)
    seconds = (time.perf_counter() - start) / len(job.clips)
    return [outcome | {"seconds": seconds} for outcome in outcomes]


def _is_fatal(error: Exception, place: Path | None) -> bool:
    """Tell whether an error is that of the store, or one that every other clip meets as well."""
    if not isinstance(error, OSError):
        return False
    stored = place is not None and Path(str(error.filename)).is_relative_to(place)
    return stored or error.errno in FATAL


def _failed(job: Job, error: BaseException) -> list[dict]:
    said = f"{type(error).__name__}: {error}"
    told = {"status": "failed", "what": "", "note": "", "error": said, "precision": ""}
    return [told] * len(job.clips)


_known = threading.local()  # a model is changed while it is explained: no two threads share one
_making = threading.Lock()  # and fresh weights are drawn from one global generator


def _once(call: bytes, then: Callable):
    """Make what a pickled call returns, once in each thread; the last few are kept."""
    made = _known.__dict__.setdefault("made", {})
    if call not in made:
        while len(made) >= 4:
            made.pop(next(iter(made)))
        with _making:
            made[call] = then(pickle.loads(call)())
    return made[call]


def _with_weights(model: nn.Module) -> tuple[nn.Module, Callable]:
    return model, _named(model)


def asked(
    *, dataset, data, split, frames, size, n, model, weights, precision, method, settings, **others
) -> dict:
    """Turn what the command line says into arguments of `run`, checked before anything runs."""
    known = methods_table()["options"].str.split(", ")
    options, used = {}, set()
    given = read_settings(settings)
    for name in method:
        one_of("method", name, known.index)
        has = [*known[name], "score"]
        options[name] = {key: value for key, value in given.items() if key in has}
        used |= options[name].keys()
    for key in given:
        require(key in used, "--set", key, f"an option of {' or '.join(method)}")
    require(Path(weights).is_file(), "--weights", weights, "a file")
    clips = {"frames": frames, "size": size, "n": n or 120, "data": data}
    source = partial(load_dataset, dataset, split, **clips)
    network = partial(ready, model, len(source().classes), weights, precision)
    network()  # a wrong name or file is refused here, not by every job
    return {
        "source": source,
        "network": network,
        "methods": options,
        "model_name": model,
        "n": n,
        **others,
    }


def ready(name: str, classes: int, weights: str, precision: str = "float32") -> nn.Module:
    """Return a model as the command line sweeps with it: prepared, on a GPU where there is one.

    ``precision`` is ``"float32"``, or ``"bfloat16"`` or ``"auto"`` as for `stepkit.prepare`.
    """
    one_of("precision", precision, ("float32", "bfloat16", "auto"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, classes, weights=weights).to(device)
    return prepare(model, None if precision == "float32" else precision)
