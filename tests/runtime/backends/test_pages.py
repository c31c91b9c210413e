"""Pages exchanged under a reader: the same bytes before and after, in memory of another kind."""

import mmap
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import SessionError
from arriero.files.machine_memory import Room
from arriero.runtime.backends import pages
from arriero.runtime.backends.pages import HUGE, Region, check_pages, exchange_pages, in_huge_pages
from arriero.spec.stored_weights import Weight

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


def test_who_insists_has_them_however_little_memory_there_is(file: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "find_room", lambda: Room(8 * HUGE, 16 * HUGE, "this machine"))
    monkeypatch.setattr(pages, "SLOW", 0.0)
    view, region = np.frombuffer(file, np.uint8), region_of(file)
    exchange_pages([region], insist=True)
    until = time.monotonic() + 20
    while is_of_a_file(region.last - 1) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_of_a_file(region.first)
    assert np.array_equal(view, BYTES)


FLOATS: dict[str, Any] = {"dtype": "bfloat16", "convert": "bfloat16"}
MADE: dict[str, Any] = {"dtype": "int8", "convert": "uint8", "layout": "panels", "is_made": True}


def weight(name: str, **more: Any) -> Weight:
    return Weight(**{"name": name, "file": "weights", "offset": 0, "shape": (64, 64), **FLOATS, **more})


WEIGHTS = [
    weight("model.embed_tokens.weight:bfloat16"),
    weight("model.layers.0.self_attn.q_proj.weight:bfloat16"),
    weight("model.layers.0.feed_forward.experts.down_proj:bfloat16", shape=(4, 64, 64), stacked=True),
    weight("model.norm.weight", convert="float32"),
    weight("model.layers.1.self_attn.q_proj.weight:panels", **MADE),
]


@pytest.mark.parametrize(("asked", "chosen"), [("file", []), ("auto", WEIGHTS[4:]), ("huge", WEIGHTS[1::3])])
def test_what_every_token_reads_as_it_lies_may_be_copied(asked: Any, chosen: list[Weight]) -> None:
    assert in_huge_pages(WEIGHTS, asked) == chosen


@pytest.mark.parametrize("asked", ["auto", "huge", "file"])
def test_pages_change_nothing_but_where_weights_lie(tiny_model: Path, asked: Any) -> None:
    session = arriero.load(tiny_model, max_seq=64, pages=asked)
    expected = arriero.load(tiny_model, max_seq=64).generate([5, 6, 7, 8], 12, temperature=0).ids
    assert session.generate([5, 6, 7, 8], 12, temperature=0).ids == expected


def test_pages_that_there_are_not_or_that_do_not_fit_are_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SessionError, match="pages is 'large', expected one of auto, huge, file"):
        arriero.load(tiny_model, pages="large")  # type: ignore[arg-type]
    monkeypatch.setattr("arriero.runtime.room.find_room", lambda: Room(1000, 16 * HUGE, "this machine"))
    with pytest.raises(SessionError, match=r"a copy of the weights .* in huge pages .*take pages"):
        check_pages(WEIGHTS, "huge")
    monkeypatch.setattr(pages, "has_huge_pages", lambda: False)
    with pytest.raises(SessionError, match='which this system has not: take "auto"'):
        check_pages(WEIGHTS, "huge")
