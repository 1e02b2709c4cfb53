"""A dataset explained by several methods over threads, processes or a cluster.

`sweep` makes what `stepkit.store.maps` then finds, goes on when a clip fails, and returns a table
of what was done. A job is a method on a few clips; it carries how to make its network and its
dataset, some hundred bytes, and each worker makes them once.
"""

import errno
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from stepkit._checks import one_of, require
from stepkit._manifest import Manifest, probe
from stepkit._workers import executor as opened
from stepkit._workers import in_any_order, unwound
from stepkit.attribution import METHODS
from stepkit.attribution._door import BLANK, is_blank
from stepkit.data.sample import as_dataset
from stepkit.models import precision_of
from stepkit.networks import load_model
from stepkit.prepare import prepare
from stepkit.store import Store, chosen, model_key

__all__ = ["ready", "sweep"]

# errors that every other clip meets as well, wherever they come from
FATAL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE


def sweep(
    source: Callable,
    network: Callable,
    methods: dict[str, dict | tuple[str | Callable, dict]],
    out: str | Path,
    *,
    model_name: str,
    n: int | None = None,
    batch_size: int = 1,
    executor: str | Executor | None = "loop",
    workers: int = 0,
    retries: int = 1,
    threads: int = 1,
    seed: int = 0,
    tag: str = "",
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
        Options of each method. ``"step@cylinder"`` is method ``"step"`` in a folder of that name;
        ``{"mine": (function, {"steps": 8})}`` a function of one's own, as `stepkit.attribute` takes
        it, of a module that workers can import.
    out : path
        As for `stepkit.store.maps`; workers on other machines need to see it under the same name.
    model_name : str
        Names the folder; what the model *is* enters by a hash of its weights.
    n : int, optional
        So many clips only, of all classes in turn (`stepkit.data.sample.balanced`).
    batch_size : int
        Clips explained together, one job; more than one is for GPUs. Bytes depend on it.
    executor : str or concurrent.futures.Executor
        ``"loop"``, here; ``"threads"``; ``"processes"``; ``"dask"``: processes of a
        ``LocalCluster``; the address of a Dask scheduler, ``"tcp://host:8786"``. Or one that is
        open, such as ``Client.get_executor(pure=False)`` of a Dask client.
    workers : int
        How many; by default one per core. A scheduler has its own.
    retries : int
        How often a job that failed is tried again, its clips then one by one.
    threads : int
        Of torch, in each job. Bytes may depend on it, so the loop uses as many.
    seed : int
        Each clip draws from (seed, clip id), wherever it is explained.
    tag : str
        As for `stepkit.store.maps`.
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
    >>> sk.sweep(source, network, methods, "maps", model_name="narrow")  # doctest: +SKIP
    """
    for name, value, least in (("batch_size", batch_size, 1), ("threads", threads, 1)):
        require(type(value) is int and value >= least, name, value, f"at least {least}")
    require(type(retries) is int and retries >= 0, "retries", retries, "at least 0")
    dataset = as_dataset(source())
    place = Path(out) / dataset.name / model_name
    calls = _pickled("source", source), _pickled("network", network)
    runs = {folder: _run(folder, asked) for folder, asked in methods.items()}
    do = partial(work, Plan(*calls, runs, place, batch_size, threads, seed, tag))
    clips = chosen(dataset, n, seed)
    starts = range(0, len(clips), batch_size)
    jobs = [(folder, clips[at : at + batch_size]) for folder in runs for at in starts]
    told = {folder: options for folder, (_, options) in runs.items()}
    manifest = Manifest(place, told, {i: dataset.ids[i] for i in clips})
    bar = tqdm(total=len(manifest.rows), unit="clip", disable=not progress)
    try:
        probe([place / folder for folder in runs], [dataset.ids[i] for i in clips])
        with unwound(), opened(executor, workers) as pool, manifest, bar:
            for _ in range(retries + 1):
                jobs = _attempt(do, jobs, pool, manifest, bar)
    except OSError as error:
        told = f"{error.strerror or error}; {manifest.rest}"
        raise OSError(error.errno or errno.EIO, told, error.filename or str(place)) from error
    except BrokenExecutor as error:
        raise BrokenExecutor(f"{error}; {manifest.rest}") from error
    return manifest.table


def _run(folder: str, asked: dict | tuple) -> tuple[Callable, dict]:
    """Return a method as a function, with whose module a worker imports it, and its options."""
    name, options = asked if isinstance(asked, tuple) else (folder.partition("@")[0], asked)
    return METHODS.find(name).run, options


def _attempt(do: Callable, jobs: list, pool: Executor | None, manifest: Manifest, bar) -> list:
    """Do jobs; return those to try again, one for each clip that failed."""
    failed = []
    for (folder, clips), outcomes in in_any_order(do, jobs, pool):
        if isinstance(outcomes, BaseException):
            outcomes = _failed(clips, outcomes)
        bad = manifest.note(folder, clips, outcomes)
        failed += [(folder, [i]) for i in bad]
        bar.update(len(clips) - len(bad))
    return failed


def _pickled(name: str, call: Callable) -> bytes:
    try:
        return pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{name}: got {call!r}, expected a function of a module, or functools.partial of one, "
            f"which can be pickled ({error})"
        ) from error


@dataclass(frozen=True)
class Plan:
    """What all jobs of a sweep share: all that a worker needs to know beside method and clips."""

    source: bytes  # pickled calls, which the worker makes once: nothing heavy travels
    network: bytes
    methods: dict[str, tuple[Callable, dict]]
    place: Path
    batch_size: int
    threads: int
    seed: int
    tag: str


def work(plan: Plan, job: tuple[str, list[int]]) -> list[dict]:
    """Do one job, in a worker; return what became of each clip.

    Whatever goes wrong is the clip's failure, and the sweep goes on. Not so where its file cannot
    be written: no other's could.
    """
    (folder, clips), start, threads = job, time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        model, dataset = _own.made(plan.network), as_dataset(_own.made(plan.source))
        (run, options), place = plan.methods[folder], plan.place / folder
        store = Store(run, model, _own.key(model, plan.tag), place, plan.seed, options)
        found, done = store.take([dataset[i] for i in clips], plan.batch_size)
        notes = [f"the map is {BLANK}" if is_blank(result["maps"]) else "" for result in found]
        told = {"status": "done", "error": "", "precision": precision_of(model)}
        both = zip(done, notes, strict=True)
        outcomes = [told | {"what": what, "note": note} for what, note in both]
    except Exception as error:
        if _is_fatal(error, plan.place):
            raise
        outcomes = _failed(clips, error)
    finally:
        torch.set_num_threads(threads)
    seconds = (time.perf_counter() - start) / len(clips)
    return [outcome | {"seconds": seconds} for outcome in outcomes]


def _is_fatal(error: Exception, place: Path) -> bool:
    """Tell whether an error is that of the store, or one that every other clip meets as well."""
    if not isinstance(error, OSError):
        return False
    return error.errno in FATAL or Path(str(error.filename)).is_relative_to(place)


def _failed(clips: list[int], error: BaseException) -> list[dict]:
    told = {"status": "failed", "what": "", "note": "", "precision": ""}
    return [told | {"error": f"{type(error).__name__}: {error}"}] * len(clips)


_making = threading.Lock()  # fresh weights are drawn from one global generator


def _made(call: bytes):
    with _making:
        return pickle.loads(call)()


class _Own(threading.local):
    """What a thread has made; a model is changed while it is explained: no two threads share it."""

    def __init__(self):
        self.made, self.key = lru_cache(4)(_made), lru_cache(4)(model_key)


_own = _Own()


def ready(name: str, classes: int, weights: str = "", precision: str = "float32") -> nn.Module:
    """Return a model as the command line sweeps with it: prepared, on a GPU where there is one.

    ``name`` and ``weights`` as for `stepkit.load_model`; ``precision`` is ``"float32"``, or
    ``"bfloat16"`` or ``"auto"`` as for `stepkit.prepare`.
    """
    one_of("precision", precision, ("float32", "bfloat16", "auto"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, classes, weights or None).to(device)
    return prepare(model, None if precision == "float32" else precision)
