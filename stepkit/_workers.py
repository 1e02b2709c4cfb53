"""Workers of any kind, which end with the process that gives out the work.

Whatever ends that process (a signal, Ctrl-C, a closed terminal, an error) ends its workers too.
"""

import contextlib
import itertools
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

from stepkit._checks import one_of

__all__ = ["end_with_parent", "executor", "in_any_order", "unwound"]

AHEAD = 1000  # tasks handed to an executor and not yet back: bounds its memory, not its speed


def in_any_order(
    do: Callable, jobs: list, executor: Executor | None
) -> Iterator[tuple[object, object]]:
    """Yield each job with what ``do`` made of it, or the error that it ended with, as they come.

    Raises
    ------
    OSError, concurrent.futures.BrokenExecutor
        Of any job: they concern all others as well, which are given up.
    """
    if executor is None:
        yield from ((job, do(job)) for job in jobs)
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
            yield job, error or future.result()
    finally:
        for future in waiting:
            future.cancel()


def executor(
    kind: str | Executor | None, workers: int = 0
) -> contextlib.AbstractContextManager[Executor | None]:
    """Return an executor to be opened by ``with``, and closed afterwards.

    Its processes end with this one, however it ends; on an error or an interrupt, at once.

    Parameters
    ----------
    kind : str
        ``"loop"`` (no executor), ``"threads"``, ``"processes"``; ``"dask"``: processes of a
        ``LocalCluster``; or the address of a Dask scheduler, ``"tcp://host:8786"``. An executor of
        one's own is not closed.
    workers : int
        How many; by default one per core. A scheduler has its own.
    """
    if not isinstance(kind, str):
        return contextlib.nullcontext(kind)
    workers = workers or os.cpu_count() or 1
    if "://" in kind:
        return _dask(workers, kind)
    one_of("executor", kind, ("loop", "threads", "processes", "dask"))
    if kind == "loop":
        return contextlib.nullcontext()
    return {"threads": ThreadPoolExecutor, "processes": _processes, "dask": _dask}[kind](workers)


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


@contextlib.contextmanager
def _dask(workers: int, address: str | None = None) -> Iterator[Executor]:
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise ImportError("executor on Dask needs: pip install 'stepkit[dask]'") from error
    here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    here = {} if address else here | {"silence_logs": logging.ERROR}
    # Dask has workers give back memory at once, and a clip's tensors ask for it anew thousands of
    # times: twice as slow
    keeps = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
    with dask.config.set(keeps), Client(address, **here) as client:  # and its workers watch us
        yield client.get_executor(pure=False)


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
