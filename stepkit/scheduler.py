"""Jobs on any number of workers, how they end, and the table of what became of them.

Whatever ends the process that gives out the jobs (a signal, Ctrl-C, a closed terminal, an error)
ends its workers too, and leaves whole files only.
"""

import contextlib
import io
import itertools
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pandas as pd

from stepkit._checks import one_of, warn
from stepkit._files import write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AHEAD = 1000  # tasks handed to an executor and not yet back: bounds its memory, not its speed
SAVED_EVERY = 30.0  # seconds between two writings of the manifest
KEY = ["method", "options", "clip"]
COLUMNS = [*KEY, "status", "what", "note", "error", "precision", "seconds", "attempts"]


def in_any_order(
    do: Callable, jobs: list, executor: Executor | None
) -> Iterator[tuple[object, object, BaseException | None]]:
    """Yield each job with what ``do`` made of it and its error, one of them None, as they come.

    Raises
    ------
    OSError, concurrent.futures.BrokenExecutor
        Of any job: they concern all others as well, which are given up.
    """
    if executor is None:
        yield from ((job, do(job), None) for job in jobs)
        return
    todo, waiting, done = iter(jobs), {}, queue.SimpleQueue()
    try:
        while True:
            for job in itertools.islice(todo, AHEAD - len(waiting)):
                future = executor.submit(do, job)
                waiting[future] = job
                future.add_done_callback(done.put)
            if not waiting:
                return
            future = done.get()
            job, error = waiting.pop(future), future.exception()
            if isinstance(error, OSError | BrokenExecutor):
                raise error
            yield job, None if error else future.result(), error
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def executor(name: str, workers: int = 0) -> Iterator[Executor | None]:
    """Open an executor for `stepkit.sweep.run`, and close it afterwards.

    Its processes end with this one, however it ends; on an error or an interrupt, at once.

    Parameters
    ----------
    name : str
        ``"loop"`` (no executor), ``"threads"``, ``"processes"``; ``"dask"``: processes of a
        ``LocalCluster``; or the address of a Dask scheduler, ``"tcp://host:8786"``.
    workers : int
        How many; by default one per core. A scheduler has its own.
    """
    known = "loop", "threads", "processes", "dask"
    if "://" not in name:
        one_of("executor", name, known)
    workers = workers or os.cpu_count() or 1
    if name == "loop":
        yield None
    elif name == "threads":
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    elif name == "processes":
        with _processes(workers) as pool:
            yield pool
    else:
        try:
            import dask
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise ImportError(f"executor {name!r} needs: pip install 'stepkit[dask]'") from error
        with contextlib.ExitStack() as stack:
            where = name
            if name == "dask":
                quiet = {"dashboard_address": None, "silence_logs": logging.ERROR}
                # Dask has workers give back memory at once, and a clip's tensors ask for it anew
                # thousands of times: twice as slow
                keeps = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
                stack.enter_context(dask.config.set(keeps))
                cluster = LocalCluster(n_workers=workers, threads_per_worker=1, **quiet)
                where = stack.enter_context(cluster)  # whose workers watch this process as well
            client = stack.enter_context(Client(where))
            yield client.get_executor(pure=False)


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    context = get_context("spawn")  # a fork of a process with threads may hang
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, end_with_parent, (theirs,))
    try:
        yield pool
        pool.shutdown()
    finally:
        ours.close()  # whoever still works ends
        pool.shutdown(cancel_futures=True)
        theirs.close()


def end_with_parent(pipe: Connection | None = None) -> None:
    """End this worker when its parent does, or when the parent closes its end of ``pipe``.

    Also where another process forked the worker. A killed parent could not tell it to.
    """
    end = pipe or parent_process().sentinel

    def wait_for_it():
        wait([end])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    threading.Thread(target=wait_for_it, daemon=True).start()


@contextlib.contextmanager
def unwound() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a closed terminal) end what is inside as Ctrl-C does.

    Afterwards they do what they would have done. In another thread than the main one, or where the
    signal is ignored (nohup), nothing changes.
    """
    came, before = [], {}

    def stop(number, _):
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        both = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
        for number in filter(None, both):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def probe(folder: Path, name: str) -> None:
    """Write and remove a file with a name as long as this one: what is wrong is known beforehand.

    Raises
    ------
    OSError
        The folder cannot be written to, names of this length are not possible, the disk is full.
    """

    def write(path: Path):
        with open(path, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())

    path = folder / ("_" * len(os.fsencode(name)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / name)) from error


class Manifest:
    """The table of what is done, failed, left; kept as ``manifest.csv``, whole at any time.

    A row per method, options and clip. The file grows: rows of other sweeps stay as they are.
    """

    def __init__(self, folder: Path, methods: dict[str, dict], ids: dict[int, str]):
        self.path, self.saved = folder / "manifest.csv", time.monotonic()
        left = dict.fromkeys(COLUMNS, "")
        left |= {"status": "left", "seconds": float("nan"), "attempts": 0}
        self.rows = {
            (method, i): left | dict(zip(KEY, (method, _said(own), id_), strict=True))
            for method, own in methods.items()
            for i, id_ in ids.items()
        }

    def note(self, method: str, clips, outcomes: list[dict]) -> list[int]:
        """Enter what became of clips of a method; return those that failed."""
        both = list(zip(clips, outcomes, strict=True))
        for i, outcome in both:
            row = self.rows[method, i]
            row.update(outcome, attempts=row["attempts"] + 1)
        if time.monotonic() - self.saved > SAVED_EVERY:
            self.save()
        return [i for i, outcome in both if outcome["status"] == "failed"]

    @property
    def table(self) -> pd.DataFrame:
        """One row per method and clip."""
        return pd.DataFrame(self.rows.values(), columns=COLUMNS)

    @property
    def rest(self) -> str:
        """What is left to do, in words."""
        left = sum(row["status"] != "done" for row in self.rows.values())
        return f"{left} of {len(self.rows)} maps are left, and the same call goes on with them"

    def save(self) -> None:
        """Write the rows among those that the file holds already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(self.path.parent):
            rows = {_key(row): row for row in _read(self.path)}
            for row in self.rows.values():
                if row["status"] != "left" or _key(row) not in rows:
                    rows[_key(row)] = row
            table = pd.DataFrame(rows.values(), columns=COLUMNS)
            write_whole(self.path, lambda partial: table.to_csv(partial, index=False))
        self.saved = time.monotonic()

    def __enter__(self):
        self.save()
        return self

    def __exit__(self, error, *_):
        # an error that is on its way says more than another one of the same disk
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.save()


def _said(options: dict) -> str:
    """Return options in words that are the same in every process."""
    names = {k: getattr(v, "name", getattr(v, "__name__", v)) for k, v in options.items()}
    return ", ".join(f"{key}={name!r}" for key, name in sorted(names.items()))


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def _read(path: Path) -> list[dict]:
    """Return the rows of a manifest; none, with a warning, where it is damaged."""
    try:
        text = path.read_text("utf-8")
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        whole = text.endswith("\n") and list(table) == COLUMNS and not table.isna().any(axis=None)
    except FileNotFoundError:
        return []
    except ValueError:  # not UTF-8, not CSV
        whole = False
    if not whole:
        warn(f"{path}: damaged, or of another version of stepkit; begun anew")
        return []
    return table.to_dict("records")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a manifest there, where the system can tell."""
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network disks without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
