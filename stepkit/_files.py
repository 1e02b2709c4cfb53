"""Files that are whole or absent, and that tell whether they are still as they were written."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepkit._checks import warn

ABANDONED = 3600.0  # seconds after which a file that nobody has finished is nobody's


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name beside ``path``, then rename what it wrote to ``path``.

    A reader, a kill or a full disk never meets half a file; what was there before stays until then.
    What processes that are dead by now had begun in the same folder is removed.
    """
    _clean(path.parent)
    # a name that no other thread, process or machine writes to, and that says whose it is
    partial = path.with_name(f".{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.part")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@functools.lru_cache(4096)  # once a process: a folder may hold 100,000 files
def _clean(folder: Path) -> None:
    for path in folder.glob("*.part"):
        with contextlib.suppress(OSError):  # another process was quicker, or it is not ours
            if time.time() - path.stat().st_mtime > ABANDONED or _is_dead(path.name):
                path.unlink()


def _is_dead(name: str) -> bool:
    """Tell whether ``.host-process-number.part`` is of a process here that is no more."""
    named = re.fullmatch(rf"\.{re.escape(socket.gethostname())}-(\d+)-\w+\.part", name)
    try:
        if named:
            os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is somebody else's
        pass
    return False


# ----------------------------------------------------------------------------------------- tensors


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return a hash of the tensors' names, shapes, types and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a ``.safetensors`` file, whole, with ``key``, which says what made them.

    Raises
    ------
    OSError
        The disk is full, or does not work.
    """
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # one entry: safetensors writes several in any order, and then no two files are alike
    facts = {"key": f"{key} {_content(key, tensors)}"}
    try:
        write_whole(path, lambda partial: save_file(tensors, partial, facts))
    except SafetensorError as error:  # its kind of OSError, which tells the number in words
        number = errno.ENOSPC if f"os error {errno.ENOSPC})" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error


def read_tensors(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return what a file of this key holds; None where there is none, or a damaged one."""
    found = read(path)
    return found[1] if found and found[0] == key else None


def is_damaged(path: Path) -> bool:
    """Tell whether there is a file, but not as `write_tensors` left it."""
    return path.is_file() and read(path) is None


def is_altered(path: Path) -> bool:
    """Tell whether a readable file of tensors carries a hash that is not that of its content."""
    with safe_open(path, "pt") as file:
        return "key" in (file.metadata() or {}) and read(path) is None


def read(path: Path) -> tuple[str, dict[str, Tensor]] | None:
    """Return the key and the tensors of a file that is whole."""
    try:
        with safe_open(path, "pt") as file:
            key, _, content = (file.metadata() or {}).get("key", "").rpartition(" ")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (FileNotFoundError, SafetensorError):
        return None
    return (key, tensors) if content == _content(key, tensors) else None


def _content(key: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(f"{key} {fingerprint(tensors)}".encode()).hexdigest()


# ------------------------------------------------------------------------------------------ tables


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole, and beside it its hash, in ``.<name>.sha256``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content, known = table.to_csv(index=False, lineterminator="\n").encode(), _sums(path)[:1]
    # the old one as well, which is right until the new table is there
    sums = "\n".join(dict.fromkeys([hashlib.sha256(content).hexdigest(), *known]))
    write_whole(_beside(path), lambda partial: partial.write_text(sums, "utf-8"))
    write_whole(path, lambda partial: partial.write_bytes(content))


def read_table(path: Path, **types) -> pd.DataFrame | None:
    """Return a table as it was written; None, with a warning, for a damaged one.

    ``types`` are those of columns, as for ``pandas.read_csv``. None as well where there is no file.
    """
    try:
        content, sums = path.read_bytes(), _sums(path)
        if not sums or hashlib.sha256(content).hexdigest() in sums:  # without: of somebody else
            return pd.read_csv(io.BytesIO(content), dtype=types)
    except FileNotFoundError:
        return None
    except ValueError:  # not UTF-8, empty, or no table
        pass
    warn(f"{path}: damaged, left out; what wrote it makes it again")
    return None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _sums(path: Path) -> list[str]:
    try:
        return _beside(path).read_text("utf-8").split()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
