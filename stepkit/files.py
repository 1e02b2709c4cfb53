"""Files that are whole or absent, and hashes that say what they were made of."""

import errno
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name beside ``path``, then rename what it wrote to ``path``.

    A reader, a kill or a full disk never meets half a file; what was there before stays until then.
    """
    # a name that no other thread, process or machine writes to
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fingerprint(*tensors: Tensor) -> str:
    """Return a hash of the tensors' shapes, types and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a ``.safetensors`` file, whole, with ``key``, the hash of what made them.

    Raises
    ------
    OSError
        The disk is full, or does not work.
    """
    tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # one entry: safetensors writes several in any order, and then no two files are alike
    facts = {"key": f"{key} {fingerprint(*tensors.values())}"}
    try:
        write_whole(path, lambda partial: save_file(tensors, partial, facts))
    except SafetensorError as error:  # its kind of OSError, which tells the number in words
        number = errno.ENOSPC if f"os error {errno.ENOSPC})" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error


def read_tensors(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return what a file of this key holds; None where there is none, or a damaged one."""
    found = _read(path)
    return found[1] if found and found[0] == key else None


def is_damaged(path: Path) -> bool:
    """Tell whether there is a file, but not as `write_tensors` left it."""
    return path.is_file() and _read(path) is None


def _read(path: Path) -> tuple[str, dict[str, Tensor]] | None:
    """Return the key and the tensors of a file that is whole."""
    try:
        with safe_open(path, "pt") as file:
            key, _, content = (file.metadata() or {}).get("key", "").partition(" ")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (FileNotFoundError, SafetensorError):
        return None
    return (key, tensors) if content == fingerprint(*tensors.values()) else None
