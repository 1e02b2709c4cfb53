"""Files that are whole or absent, and hashes that say what they were made of."""

import hashlib
import os
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
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
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
    """Write tensors to a ``.safetensors`` file, whole, with ``key``, the hash of what made them."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_file(tensors, partial, {"key": key}))


def read_tensors(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return what a file of this key holds; None where there is none that is whole."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (FileNotFoundError, SafetensorError):
        return None
