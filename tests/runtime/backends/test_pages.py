"""Pages exchanged under a reader: the same bytes before and after, in memory of another kind."""

import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from arriero.files.machine_memory import Room
from arriero.runtime.backends import pages
from arriero.runtime.backends.pages import HUGE, Region, exchange_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="huge pages are Linux's")
BYTES = np.random.default_rng(0).integers(0, 256, 5 * HUGE + 12345, dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> mmap.mmap:
    (tmp_path / "weights").write_bytes(BYTES.tobytes())
    with (tmp_path / "weights").open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def region_of(file: mmap.mmap, size: int = len(BYTES)) -> Region:
    return Region(file, np.frombuffer(file, np.uint8).ctypes.data, size)


def is_of_a_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return line.endswith("/weights")
    raise AssertionError(f"nothing lies at {address:x}")


def test_whole_huge_pages_are_exchanged_under_a_reader(file: mmap.mmap) -> None:
    view, region = np.frombuffer(file, np.uint8), region_of(file)
    assert 4 * HUGE <= region.size <= 5 * HUGE
    assert is_of_a_file(region.first)
    exchange_pages([region])
    until = time.monotonic() + 20
    while is_of_a_file(region.last - 1) and time.monotonic() < until:
        assert np.array_equal(view, BYTES)
    assert not is_of_a_file(region.first)
    assert is_of_a_file(view.ctypes.data + len(view) - 1)  # behind the last whole huge page
    assert np.array_equal(view, BYTES)


def test_what_fills_no_huge_page_stays(file: mmap.mmap) -> None:
    region = region_of(file, HUGE // 2)
    assert region.size == 0
    exchange_pages([region])
    assert is_of_a_file(np.frombuffer(file, np.uint8).ctypes.data)


def test_where_memory_is_short_everything_stays(file: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "find_room", lambda: Room(8 * HUGE, 16 * HUGE, "this machine"))
    region = region_of(file)
    exchange_pages([region])
    time.sleep(0.1)
    assert is_of_a_file(region.first)
