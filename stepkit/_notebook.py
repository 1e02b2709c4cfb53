"""Notebook files: their parameters, what runs them, what makes an executed one fit to keep."""

import ast
import contextlib
import hashlib
import json
import os
import re
import signal
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from stepkit._files import write_whole

HASH = "stepkit_sha256"  # in the metadata of executed notebooks
INERT = "application/vnd.jupyter.widget-view+json"


def parameters(notebook: Path) -> dict[str, object]:
    """Return the parameters of a notebook with their defaults, as papermill finds them."""
    found = papermill.inspect_notebook(literal(notebook)).values()
    return {parameter["name"]: _default(parameter["default"]) for parameter in found}


def _default(source: str):
    try:
        return ast.literal_eval(source)
    except (SyntaxError, ValueError):
        return None


def literal(path: Path) -> str:
    """Papermill fills braces in paths; these are to stay braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def partial(executed: Path) -> Path:
    """Return the name that an executed notebook has until it is whole."""
    return executed.with_name(f"{executed.stem}.partial.ipynb")


def tidy(path: Path) -> None:
    """Take out of an executed notebook what has no meaning without its kernel.

    Widget views (their static twins stay), the widget state that papermill adds, and all but the
    last state of each progress bar. It then carries a hash, by which `read_whole` knows it.
    """
    book = nbformat.read(path, 4)
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if INERT not in out.get("data", {})]
            for out in cell.outputs:
                if out.output_type == "stream":
                    out.text = re.sub(r"[^\n]*\r(?!\n)", "", out.text)
    book.metadata[HASH] = _content(book)
    write_notebook(book, path)


def read_whole(path: Path):
    """Return an executed notebook; None if it is damaged."""
    try:
        book = nbformat.read(path, 4)
        return book if book.metadata.get(HASH) in (None, _content(book)) else None
    except Exception:  # not text, not JSON, no notebook
        return None


def write_notebook(book, path: Path) -> None:
    """Write a notebook whole, or not at all."""
    write_text(path, nbformat.writes(book, 4) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text whole, or not at all; no hash beside it, as git keeps it."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _content(book) -> str:
    metadata = {name: value for name, value in book.metadata.items() if name != HASH}
    return hashlib.sha256(json.dumps([book.cells, metadata], sort_keys=True).encode()).hexdigest()


# Jupyter's own watch takes a parent that died while the kernel started for another one's choice.
WATCHED = """
import os, runpy, threading, time
def watch():
    while os.getppid() == int(os.environ["JPY_PARENT_PID"]):
        time.sleep(1)
    os._exit(1)
if os.name == "posix":
    threading.Thread(target=watch, daemon=True).start()
runpy.run_module("ipykernel_launcher", run_name="__main__")
"""


def this_interpreter(threads: int) -> type:
    """Return a kernel manager that starts the interpreter which runs this, on so many threads.

    The kernel name ``python3`` finds the first kernel of that name on Jupyter's path, which may be
    one of another environment in the user's home. Its ``kill`` ends all that were started.
    """
    started = []

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        @property
        def kernel_spec(self):
            # Failures stand in the notebook. What a kernel says on the terminal is about its own
            # start and stop, and goes across the progress bar.
            quiet = ["--log-level=CRITICAL"]
            env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
            found = get_kernel_dict(extra_arguments=quiet) | {"env": env}
            runs = found["argv"].index("-m")
            found["argv"][runs : runs + 2] = ["-c", WATCHED]
            return KernelSpec(resource_dir=RESOURCES, **found)

        @staticmethod
        def kill():
            for manager in filter(lambda known: known.has_kernel, started):
                pid = getattr(manager.provisioner, "pid", None)
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(pid, signal.SIGTERM)

    return ThisInterpreter
