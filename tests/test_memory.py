"""Memory kept between passes: no page is asked for twice, and afterwards all is as it was."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stepkit import _memory
from stepkit.models import frozen
from stepkit.networks import load_model

resource = pytest.importorskip("resource", reason="pages are counted on Unix only")
SIZE = 320 << 20  # bytes; more than `_memory.WORTH_GIVING`
PAGES = SIZE // resource.getpagesize()
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_glibc = pytest.mark.skipif(_memory._glibc() is None, reason=f"no glibc on {sys.platform}")


def pages_asked_for(rounds: int = 4) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def held() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@needs_glibc
@pytest.mark.skipif(
    HUGE.is_file() and "[always]" in HUGE.read_text(), reason="pages are huge: too few to count"
)
def test_freed_memory_is_used_again_inside_and_given_back_afterwards():
    with _memory.kept():
        pages_asked_for()  # until there is room
        with _memory.kept():  # one inside does not end it for the other
            pass
        assert pages_asked_for() < PAGES / 2
        before = held()
    assert held() < before - 0.9 * SIZE


@needs_glibc
def test_it_is_part_of_every_explanation_and_ends_with_an_error():
    def interrupted():
        with frozen(load_model("r2plus1d_narrow", 2)):
            assert _memory._inside == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _memory._inside == 0


@needs_glibc
def test_contexts_of_several_threads_overlap():
    together = threading.Barrier(4)

    def work(_):
        with _memory.kept():
            together.wait(20)
            inside = _memory._inside
            together.wait(20)
        return inside

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [4] * 4
    assert _memory._inside == 0


def test_elsewhere_it_does_nothing(monkeypatch):
    monkeypatch.setattr(_memory, "_glibc", lambda: None)
    with _memory.kept():
        assert _memory._inside == 0
