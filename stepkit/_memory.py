"""Memory of the processor, kept at hand between passes.

A pass through a network takes gigabytes and frees them again. The C library hands pieces of 32 MB
and more back to the system at once, and the next pass gets them page by page, each cleared anew: a
quarter of the time of R(2+1)D-18 in bfloat16.
"""

import contextlib
import ctypes
import os
import threading

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_FROM_START = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
WORTH_GIVING = 256 << 20  # bytes; it takes milliseconds, as long as a small network's pass
_lock, _inside = threading.Lock(), 0


@contextlib.contextmanager
def kept():
    """Keep what is freed inside; at the end it goes back to the system, if it is much.

    Afterwards the C library does as it comes to do by itself in a process that frees large
    tensors. Without effect where it is not glibc (macOS, Windows, musl), where the environment
    tells it what to do (``MALLOC_...``, ``GLIBC_TUNABLES``), for pieces of more than 64 MB in
    another thread than the main one, and on a GPU, whose memory PyTorch keeps anyway. Contexts may
    nest, and overlap in threads.
    """
    global _inside
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for name, value in _FROM_START.items():
                    library.mallopt(name, value)
                if _freed(library) > WORTH_GIVING:
                    give_back()


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2; the one but last says how many bytes are free."""

    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]


def _freed(library) -> int:
    """Return how many bytes are free and still held, of the main thread's."""
    try:
        ask = library.mallinfo2
    except AttributeError:  # before glibc 2.33
        return WORTH_GIVING + 1
    ask.restype = _Info
    return ask().field_8


def give_back() -> None:
    """Give the system back what is freed."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc():
    """Return the C library, if it can be told these things and nobody has."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    try:
        library = ctypes.CDLL(None)
        library.mallopt, library.malloc_trim, library.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return library
