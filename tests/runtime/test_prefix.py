"""What prompts have in common is computed once, and changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import SessionError
from arriero.runtime import Session, State
from arriero.runtime.state import Limits

GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
TEXT = "A list is a mutable sequence. The method returns the number of items that are in it, or raises an error. " * 12


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Session:
    return arriero.load(tiny_model, max_seq=500)


@pytest.fixture
def session(plain: Session) -> Session:
    """One that knows nothing yet, over the same graph."""
    return knowing(plain, 1 << 26)


def knowing(plain: Session, limit: int) -> Session:
    return Session(plain.decoder, plain.text, plain.defaults, Limits(500, None), prefix_bytes=limit)


@pytest.mark.parametrize("shared", [20, 32, 33, 100, 128, 129, 200, 300])
def test_a_shared_beginning_is_known_and_the_rest_as_if_it_were_not(
    session: Session, plain: Session, shared: int
) -> None:
    ids = session.text.encode(TEXT)
    first, second = ids[:shared] + [50, 60, 70] * 20, ids[:shared] + [80, 90] * 15
    assert session.generate(first, 20, **GREEDY) == plain.generate(first, 20, **GREEDY)
    found = session.generate(second, 20, **GREEDY)
    assert found == plain.generate(second, 20, **GREEDY)
    assert found.reused == shared // 32 * 32
    again = session.generate(second, 20, **GREEDY)
    assert (again, again.reused) == (found, (len(second) - 1) // 32 * 32)


def test_only_what_is_not_known_is_computed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    prefill = session.prefill

    def counting(state: State, rows: list[list[int]], *more: Any) -> Any:
        computed.extend(map(len, rows))
        return prefill(state, rows, *more)

    monkeypatch.setattr(session, "prefill", counting)
    ids = session.text.encode(TEXT)[:300]
    session.generate_many([[*ids, 9, number] for number in range(7, 11)], 2, slots=2, **GREEDY)
    assert sum(computed) == 302 + 3 * (302 - 288)


def test_a_turn_goes_on_from_where_the_last_one_ended(session: Session, plain: Session) -> None:
    ids = session.text.encode(TEXT)[:100]  # and over a boundary of 128 while it is being answered
    answered = session.generate(ids, 90, **GREEDY)
    turn = [*ids, *answered.ids, 20, 21, 22]
    found = session.generate(turn, 10, **GREEDY)
    assert found == plain.generate(turn, 10, **GREEDY)
    assert found.reused == 189 // 32 * 32


def test_a_flight_shares_what_its_sequences_begin_with(session: Session, plain: Session) -> None:
    system = session.text.encode(TEXT)[:140]
    prompts = [[*system, 30 + number] for number in range(6)]
    found = session.generate_many(prompts, 50, slots=3, **GREEDY)
    assert found == [plain.generate(prompt, 50, **GREEDY) for prompt in prompts]
    assert [each.reused for each in found] == [0] + [128] * 5


@pytest.mark.parametrize("blocks", [0, 1, 5, 11])
def test_bytes_stay_within_the_limit(plain: Session, blocks: int) -> None:
    size = 32 * 2 * 2 * 32 * 4 * len(plain.spec.layers)
    session, ids = knowing(plain, blocks * size + 100), plain.text.encode(TEXT)
    for prompt in (ids[:200], ids[10:140], ids[:200], ids[300:330], ids[:60]):
        assert session.generate(prompt, 5, **GREEDY) == plain.generate(prompt, 5, **GREEDY)
        assert session.prefixes.size == len(session.prefixes.blocks) * size <= session.prefixes.limit
    assert len(session.prefixes.blocks) == min(blocks, 11)


def test_what_was_used_longest_ago_goes_first_and_ends_before_beginnings(plain: Session) -> None:
    size = 32 * 2 * 2 * 32 * 4 * len(plain.spec.layers)
    session, ids = knowing(plain, 6 * size), list(range(100, 400))
    old, used, new = ids[:97], ids[100:170], ids[200:265]
    for prompt in (old, used, new):  # 3, 2 and 2 blocks
        session.generate(prompt, 1, **GREEDY)
    assert [session.generate(each, 1, **GREEDY).reused for each in (new, used, old)] == [64, 64, 64]


class Index:
    """A router's index of one worker's blocks, as its events tell."""

    def __init__(self) -> None:
        self.tokens: dict[bytes, tuple[int, ...]] = {}
        self.removals = 0

    def stored(self, parent: bytes | None, key: bytes, tokens: Sequence[int]) -> None:
        assert parent is None or parent in self.tokens
        before = () if parent is None else self.tokens[parent]
        self.tokens[key] = (*before, *tokens)

    def removed(self, key: bytes) -> None:
        del self.tokens[key]
        self.removals += 1


def test_events_of_blocks_tell_which_beginnings_are_kept(plain: Session) -> None:
    session = knowing(plain, 6 * 32 * 8 * 2 * 2 * 32 * 4)  # six blocks
    index = session.prefixes.watch = Index()
    ids = session.text.encode(TEXT)
    for first in (0, 40, 0, 80):
        session.generate(ids[first : first + 100], 2, **GREEDY)
        assert index.tokens.keys() == session.prefixes.blocks.keys()
    assert index.removals > 0
    assert tuple(ids[80:176]) in index.tokens.values()


def test_beginnings_with_images_are_told_as_far_as_they_are_text(multimodal_model: Path) -> None:
    session = arriero.load(multimodal_model, max_seq=300, threads=1, prefix_bytes=1 << 26)
    index = session.prefixes.watch = Index()
    prompt, image = "word " * 40 + "<|image|>" + "word " * 40, np.zeros((30, 40, 3), np.uint8)
    session.generate(prompt, 1, images=[image], **GREEDY)
    ids = session.read(prompt, [image]).ids
    text = ids.index(session.image_token) // session.prefixes.block
    assert 0 < len(index.tokens) == text < len(session.prefixes.blocks)
    assert max(index.tokens.values(), key=len) == tuple(ids[: text * session.prefixes.block])


def test_another_image_is_another_beginning(multimodal_model: Path) -> None:
    plain = arriero.load(multimodal_model, max_seq=300)
    session = arriero.load(multimodal_model, max_seq=300, prefix_bytes=1 << 26)
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(2))
    reused = []
    for image in (first, second, first):
        asked: dict[str, Any] = {"images": [image], "max_new_tokens": 8, **GREEDY}
        found = session.generate("<|image|>What is this? " + "word " * 10, **asked)
        assert found == plain.generate("<|image|>What is this? " + "word " * 10, **asked)
        reused.append(found.reused)
    assert reused[0] == 0
    assert reused[1] < reused[2]


def test_bytes_below_zero_are_refused(tiny_model: Path) -> None:
    with pytest.raises(SessionError, match="prefix_bytes is -1, expected a whole number from 0 up"):
        arriero.load(tiny_model, prefix_bytes=-1)
