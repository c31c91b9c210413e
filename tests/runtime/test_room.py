"""Memory and threads that are not there are refused with the figures, before anything is taken."""

import time
from pathlib import Path

import numpy as np
import pytest

import arriero
from arriero.engine import build_bundle
from arriero.errors import SessionError
from arriero.files.machine_memory import Room
from arriero.runtime import Flight, Session, room
from arriero.runtime.room import check_fits, check_threads, size

SMALL = Room(10 << 20, 20 << 20, "this process's control group (container)")


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tiny_model, tmp_path_factory.mktemp("room") / "bundle")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return arriero.load(bundle, max_seq=256, threads=1)


def test_a_billion_rows_are_refused_at_once(session: Session) -> None:
    said = (
        r"a batch of 1000000000 rows of 256 tokens takes [\d.]+ TB of memory, .* are free of the .* of .*: start fewer"
    )
    started = time.thread_time()
    for ask in (lambda: session.start(10**9), lambda: Flight(session, slots=10**9)):
        with pytest.raises(SessionError, match=said):
            ask()
    with pytest.raises(SessionError, match="a batch of 1000000000 rows of 1 tokens"):
        session.logits(np.broadcast_to(np.int64(5), (10**9, 1)))
    assert time.thread_time() - started < 5


@pytest.mark.parametrize("batch", [0, -1, 2.5, "3", None, True, 1e308, 10**400])
def test_rows_that_are_no_number_are_refused(session: Session, batch: object) -> None:
    with pytest.raises(SessionError, match=r"batch is .*, expected a whole number from 1 up"):
        session.start(batch)  # type: ignore[arg-type]


def test_a_million_threads_are_refused(bundle: Path) -> None:
    said = r"threads is 1000000, this process may use \d+ processors: give at most \d+"
    with pytest.raises(SessionError, match=said) as refused:
        arriero.load(bundle, threads=1_000_000)
    most = int(str(refused.value).split()[-1])
    assert check_threads(most) == most >= 64


def test_a_load_that_does_not_fit_a_container_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_room", lambda: SMALL)
    said = (
        r"with one sequence of 4096 tokens takes .* MB of memory, 10.5 MB are free of the 21.0 MB of this process's con"
    )
    with pytest.raises(SessionError, match=said):
        arriero.load(bundle, max_seq=4096, threads=1)
    with pytest.raises(SessionError, match=r"a prefix_bytes of 1073741824 takes 1[.]1 GB of memory, 10[.]5 MB are"):
        arriero.load(bundle, max_seq=64, threads=1, prefix_bytes=1 << 30)


def test_rows_that_do_not_fit_a_container_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.start(8)
    monkeypatch.setattr(room, "find_room", lambda: SMALL)
    session.start(1)
    with pytest.raises(SessionError, match="a batch of 80 rows of 256 tokens takes"):
        session.start(80)


def test_figures_are_in_words() -> None:
    assert [size(count) for count in (5, 1500, 2_000_000, 3 * 10**15)] == ["5 B", "1.5 kB", "2.0 MB", "3.0 PB"]
    check_fits("x", SMALL.free, "y", SMALL)
    with pytest.raises(SessionError, match=r"x takes 10\.5 MB of memory"):
        check_fits("x", SMALL.free + 1, "y", SMALL)


def test_a_prompt_that_must_be_too_long_is_not_tokenised(session: Session) -> None:
    started = time.thread_time()
    with pytest.raises(
        SessionError, match=r"the text has 60000000 characters, the session can hold \d+ at most: shorten"
    ):
        session.generate("ab" * 30_000_000)
    assert time.thread_time() - started < 1
