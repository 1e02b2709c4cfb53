"""Files that are whole or absent, and hashes that say what they were made of."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
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
