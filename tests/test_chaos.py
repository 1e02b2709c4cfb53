"""Killed twenty times: no file is lost, none is half, nothing is stale, no process is left.

Each case starts a run in a process group of its own, kills it at a random moment (the seed is
fixed), and runs the same again to its end.
"""

import contextlib
import functools
import itertools
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

import stepkit as sk
from stepkit.reproduce import reproduce
from stepkit.training import QUICK, replace, train

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/environ").is_file(),
        reason="/proc, which tells who is left, is not here",
    ),
    pytest.mark.filterwarnings("ignore:step. no mask of clips"),
]

SOURCE = functools.partial(sk.load_dataset, "object", "test", n=12, frames=4, size=24)
NETWORK = functools.partial(sk.load_model, "r2plus1d_narrow", 6)
METHODS = {"smoothgrad": {"samples": 4}, "step": {"iterations": 4, "areas": (0.1, 0.3)}}
RECIPE = replace(QUICK, epochs=8, batch_size=4)
CELL = """import pathlib, time
for i in range(20):
    path = pathlib.Path(out, f"NAME{i}")
    if not path.exists():
        time.sleep(0.05)
        path.with_suffix(".half").write_text("whole")
        path.with_suffix(".half").rename(path)
print(*sorted(path.name for path in pathlib.Path(out).glob("NAME*")))"""


# --- what is killed: it writes into `out`, and goes on from what it finds there ---


def sweep(executor: str, out: Path) -> pd.DataFrame:
    where = {"executor": executor, "workers": 1 if executor == "dask" else 2}
    return sk.sweep(SOURCE, NETWORK, METHODS, out, model_name="narrow", retries=0, **where)


def training(workers: int, out: Path) -> None:
    clips, others = (
        sk.load_dataset("object", split, n=n, frames=4, size=24)
        for split, n in (("train", 8), ("val", 4))
    )
    get_context("forkserver").set_forkserver_preload(IMPORTED)  # as where it forks by default
    train(NETWORK(), clips, others, out, RECIPE, workers=workers)


def notebooks(out: Path) -> None:
    v4, kernel = nbformat.v4, {"name": "python3", "display_name": "Python 3", "language": "python"}
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    for name in ("00_a", "01_b"):
        first = v4.new_code_cell(
            'out: str = ""  # folder', metadata={"tags": ["parameters"]}, id="a"
        )
        cells = [first, v4.new_code_cell(CELL.replace("NAME", name), id="b")]
        book = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(book, out / "notebooks" / f"{name}.ipynb")
    assert reproduce(root=out) == 0


IMPORTED = ["stepkit", "stepkit.reproduce", "papermill", "distributed"]
NOTES = "runs/quick/0*[0-9]"
MAPS = "object/narrow/*/*.safetensors"
KINDS = {  # what runs, what tells how far it is, what it makes
    "loop": (functools.partial(sweep, "loop"), MAPS, [MAPS]),
    "threads": (functools.partial(sweep, "threads"), MAPS, [MAPS]),
    "processes": (functools.partial(sweep, "processes"), MAPS, [MAPS]),
    "dask": (functools.partial(sweep, "dask"), MAPS, [MAPS]),
    "training": (functools.partial(training, 0), "state.safetensors", ["model.*", "history.csv"]),
    "loaders": (functools.partial(training, 1), "state.safetensors", ["model.*", "history.csv"]),
    "notebooks": (notebooks, NOTES, [NOTES, "runs/quick/notebooks/0?_?.ipynb"]),
}
KILLS = [
    *itertools.product(["loop", "processes"], ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"]),
    *itertools.product(["dask", "training", "notebooks"], ["SIGKILL", "SIGTERM", "SIGINT"]),
    ("threads", "SIGKILL"),
    ("threads", "SIGTERM"),
    ("loaders", "SIGKILL"),
]


def begin(kind: str, out: Path, mark: str) -> None:
    os.setsid()
    os.environ["STEPKIT_CHAOS"] = mark  # what is started sees it, in whatever group
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    KINDS[kind][0](out)


@pytest.fixture(scope="module")
def nursery():
    """Forks of a process that has imported all and run nothing: they are there at once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def left(mark: str, group: int) -> dict[int, str]:
    """Return the processes that a run has left: of its group, or started by it."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, own = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            marked = f"STEPKIT_CHAOS={mark}".encode() in (place / "environ").read_bytes()
            if state != "Z" and (marked or int(own) == group):
                found[int(place.name)] = (place / "cmdline").read_text()[:200]
        except OSError:  # another user's, or gone
            continue
    return found


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def content(kind: str, out: Path) -> dict[str, bytes | list]:
    def read(path):
        if path.suffix != ".ipynb":
            return path.read_bytes()
        return [cell["outputs"] for cell in nbformat.read(path, 4).cells]  # around them: the time

    paths = [path for pattern in KINDS[kind][2] for path in out.glob(pattern)]
    return {str(path.relative_to(out)): read(path) for path in paths}


def times(kind: str, out: Path) -> set[tuple[Path, int]]:
    with contextlib.suppress(FileNotFoundError):
        return {(path, path.stat().st_mtime_ns) for path in out.glob(KINDS[kind][1])}
    return set()


@functools.cache
def undisturbed(kind: str, folder: Path) -> tuple[dict[str, bytes], int]:
    """Return what a run makes that nobody kills, and how many steps it takes."""
    KINDS[kind][0](folder / kind)
    return content(kind, folder / kind), RECIPE.epochs if kind == "training" else len(
        times(kind, folder / kind)
    )


ALONE = {"threads": "loop", "processes": "loop", "dask": "loop", "loaders": "training"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return lambda kind: undisturbed(ALONE.get(kind, kind), folder)


@pytest.mark.parametrize(("kind", "name"), KILLS, ids=lambda value: value.replace(", ", "-"))
def test_killed(tmp_path, nursery, whole, kind, name):
    if kind == "dask":
        pytest.importorskip("distributed")
    torch.set_num_threads(1)
    number, draw = getattr(signal, name), random.Random(f"{kind} {name}")
    (expected, steps), out, mark = whole(kind), tmp_path / "out", f"{os.getpid()} {kind} {name}"
    moment, seen = draw.randint(1, steps // 2), set()

    def has_come():
        seen.update(times(kind, out))
        return len(seen) >= moment

    victim = nursery.Process(target=begin, args=(kind, out, mark))
    victim.start()
    assert wait_for(has_come, 240)
    time.sleep(draw.uniform(0, 0.05))
    # a terminal tells all of a group, anyone else the one process
    tell = os.killpg if name in ("SIGINT", "SIGHUP") else os.kill
    tell(victim.pid, number)
    victim.join(60)
    assert victim.exitcode == (1 if name == "SIGINT" else -number)
    wait_for(lambda: not left(mark, victim.pid), 30)
    survivors = left(mark, victim.pid)
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert not survivors

    before = times(kind, out)
    if kind not in ("training", "loaders"):  # whose model is that of an earlier epoch
        assert content(kind, out) == {name: expected[name] for name in content(kind, out)}
    table = KINDS[ALONE.get(kind, kind)][0](out)
    assert content(kind, out) == expected
    if table is not None:
        assert (table["what"] == "found").sum() == len(before) < len(table)
    if kind not in ("training", "loaders"):
        assert before <= times(kind, out)
    assert not list(out.rglob("*.part"))
