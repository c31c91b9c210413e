"""A draft changes nothing but the time: greedy, drawn, alone, in flight, over chunks, with known beginnings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagle_reference import Reference, head_config, write_head
from free_drafts import FreeDrafts
from numpy.typing import NDArray

import arriero
from arriero.engine import build_bundle
from arriero.errors import SessionError
from arriero.export import export_checkpoint
from arriero.runtime import Flight, Session
from arriero.runtime.draft import WAITING, Followed
from arriero.runtime.guesses import Guessing
from arriero.runtime.rider import Boarding

VOCABULARY = 24
GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 5, "eos_token_id": []}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "drawn by filters": {**DRAWN, "temperature": 0.7, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.1},
}


@pytest.fixture(scope="module")
def model(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few tokens and short chunks with a random head, which is right now and then."""
    folder = tmp_path_factory.mktemp("drafted")
    make_llama4(seed=1, vocab_size=VOCABULARY, attention_chunk_size=16).save_pretrained(folder / "checkpoint")
    torch.manual_seed(0)
    reference = Reference(head_config(VOCABULARY), 32, 3, VOCABULARY - 4)
    head = write_head(reference, folder / "head", [1, 2, 4], tokens=list(range(4, VOCABULARY)))
    return export_checkpoint(folder / "checkpoint", folder / "model", draft=head)


def load(folder: Path, **settings: Any) -> Session:
    """A session whose draft is asked whatever it costs."""
    session = arriero.load(folder, max_seq=160, **settings)
    session.costs = FreeDrafts()
    return session


@pytest.fixture(scope="module")
def session(model: Path) -> Session:
    return load(model)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are verified however little they trust themselves."""
    monkeypatch.setattr("arriero.runtime.speculation.LEAST_TRUST", 0.0)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(3, VOCABULARY, int(rng.integers(1, 40))).tolist() for _ in range(count)]


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("way", WAYS)
def test_one_text_is_the_same(way: str, session: Session) -> None:
    accepted = 0
    for prompt in prompts(4):
        plain = session.generate(prompt, 90, draft_tokens=0, **WAYS[way])
        found = session.generate(prompt, 90, draft_tokens=4, **WAYS[way])
        assert found == plain
        assert plain.drafted == 0
        accepted += found.accepted
    assert accepted > 0


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lookup", [0, 6])
def test_texts_in_flight_are_the_same(way: str, lookup: int, session: Session) -> None:
    asked = prompts(7)
    plain = [session.generate(prompt, 70, draft_tokens=0, **WAYS[way]) for prompt in asked]
    guesses = {"draft_tokens": 3, "prompt_lookup_num_tokens": lookup}
    found = session.generate_many(asked, 70, slots=3, prefill_budget=5, **guesses, **WAYS[way])
    assert found == plain
    assert sum(each.accepted for each in found) > 0


@pytest.mark.usefixtures("trusting")
def test_logits_are_the_same_bit_by_bit(session: Session) -> None:
    for prompt in prompts(3):
        settings = {**GREEDY, "logprobs": True, "top_logprobs": 3}
        plain = session.generate(prompt, 60, draft_tokens=0, **settings)
        assert session.generate(prompt, 60, draft_tokens=5, **settings).logprobs == plain.logprobs


@pytest.mark.usefixtures("trusting")
def test_ends_among_guesses_end_a_text_there(session: Session) -> None:
    prompt = prompts(1)[0]
    free = session.generate(prompt, 60, draft_tokens=0, **GREEDY)
    for change in (
        {"max_new_tokens": 17},
        {"max_new_tokens": 1},
        {"max_new_tokens": 0},
        {"eos_token_id": free.ids[30]},
    ):
        ended: dict[str, Any] = {**GREEDY, "max_new_tokens": 60, **change}
        plain = session.generate(prompt, draft_tokens=0, **ended)
        assert session.generate(prompt, draft_tokens=4, **ended) == plain
        assert session.generate_many([prompt, [5]], draft_tokens=4, **ended)[0] == plain


@pytest.mark.usefixtures("trusting")
def test_a_text_may_fill_the_session(session: Session) -> None:
    plain = session.generate([5, 6], draft_tokens=0, **GREEDY)
    assert len(plain.ids) == 158
    assert session.generate([5, 6], draft_tokens=9, **GREEDY) == plain
    assert session.generate_many([[5, 6], [7]], draft_tokens=9, **GREEDY)[0] == plain


@pytest.mark.usefixtures("trusting")
def test_known_beginnings_change_nothing(model: Path, session: Session) -> None:
    keeping = load(model, prefix_bytes=1 << 24)
    prompt = np.random.default_rng(3).integers(3, VOCABULARY, 70).tolist()
    for turn in (prompt, [*prompt, 8, 9, 10]):
        plain = session.generate(turn, 60, draft_tokens=0, **GREEDY)
        found = keeping.generate(turn, 60, draft_tokens=4, **GREEDY)
        assert found == plain
    assert found.reused > 0
    assert found.accepted > 0


@pytest.mark.usefixtures("trusting")
def test_known_beginnings_keep_what_the_draft_has_read(model: Path) -> None:
    keeping, ids = load(model, prefix_bytes=1 << 24), prompts(1)[0] * 3
    twice = []
    for _ in range(2):
        state = keeping.start(1, 160, drafted=True)
        boarding = Boarding(keeping, state, keeping.request(ids, 5))
        while boarding.left:
            boarding.read(keeping.decoder.longest)
        assert state.followed is not None
        assert state.followed.is_whole(0)
        assert state.followed.read_B[0] == len(ids) - 1
        twice.append(state.followed.caches.read(0, 0, len(ids) - 1)["0.key"])
    assert boarding.trail is not None
    assert boarding.trail.reused > 16
    apart = np.abs(twice[0] - twice[1]).max((0, 2)) > 1e-5
    assert set(np.flatnonzero(apart) % 16) <= {15}  # whose next token was not known when its chunk was kept


@pytest.mark.usefixtures("trusting")
def test_beginnings_that_no_draft_has_read_have_it_begin_behind_them(model: Path) -> None:
    keeping, ids = load(model, prefix_bytes=1 << 24), prompts(1)[0] * 3
    plain = keeping.generate(ids, 40, draft_tokens=0, **GREEDY)
    found = keeping.generate(ids, 40, draft_tokens=4, **GREEDY)
    assert found.reused > 16
    assert found == plain
    again = keeping.generate(ids, 40, draft_tokens=0, **GREEDY)
    assert again == plain


def chi_squared(counts_V: NDArray[np.int64], expected_V: NDArray[np.float64]) -> float:
    """Pearson's statistic, tokens that are expected less than five times put together."""
    rare = expected_V < 5
    pairs = [*zip(counts_V[~rare], expected_V[~rare], strict=True), (counts_V[rare].sum(), expected_V[rare].sum())]
    return float(sum((count - mean) ** 2 / mean for count, mean in pairs if mean))


@pytest.mark.usefixtures("trusting")
def test_drawn_tokens_have_the_models_distribution(session: Session) -> None:
    prompt, draws = [5, 9, 14, 4, 7], 1500
    requests = [session.request(prompt, 3, **{**DRAWN, "seed": seed}) for seed in range(draws)]
    flight = Flight(session, 16, 16, guessing=Guessing(draft=2))
    numbers = [flight.join(request) for request in requests]
    texts: dict[int, list[int]] = {number: [] for number in numbers}
    drafted = accepted = 0
    while flight.riding or flight.waiting:
        for number, piece in flight.step():
            texts[number] += piece.ids
            drafted, accepted = drafted + piece.drafted, accepted + piece.accepted
    assert drafted >= draws
    assert accepted > draws // 50
    logits_SV = session.logits([prompt])[0].astype(np.float64)
    first_V = np.exp(logits_SV[-1] - logits_SV[-1].max())
    first_V /= first_V.sum()
    counts_V = np.bincount([ids[0] for ids in texts.values()], minlength=VOCABULARY)
    # 99.9 % of samples of 23 degrees of freedom lie below 49.7
    assert chi_squared(counts_V, draws * first_V) < 49.7
    rows = session.logits([[*prompt, token] for token in range(VOCABULARY)])[:, -1].astype(np.float64)
    second_VV = np.exp(rows - rows.max(-1, keepdims=True))
    second_V = first_V @ (second_VV / second_VV.sum(-1, keepdims=True))
    counts_V = np.bincount([ids[1] for ids in texts.values()], minlength=VOCABULARY)
    assert chi_squared(counts_V, draws * second_V) < 49.7


@pytest.mark.usefixtures("trusting")
def test_guesses_are_drawn_as_the_tokens_are(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that knows the model's own logits is right whatever is drawn."""
    prompt, settings = prompts(1)[0], WAYS["drawn by filters"] | {"repetition_penalty": 1.0}
    plain = session.generate(prompt, 40, draft_tokens=0, **settings)
    whole = session.logits([[*prompt, *plain.ids]])[0]
    known = {len(prompt) + index: whole[len(prompt) + index - 1] for index in range(40)}

    def propose(self: Any, first: int, newest: Any, wanted: Any, choose: Any) -> list[list[int]]:
        place = len(prompt) + seen[0]
        choose.__self__.tokens = None  # the model's own
        logits = [known[place + step] for step in range(wanted[0]) if place + step in known]
        return [[choose(0, step, each)[0] for step, each in enumerate(logits)]]

    seen = [0]
    monkeypatch.setattr(Followed, "propose", propose)
    pieces = []
    for piece in session.stream(prompt, 40, draft_tokens=3, **settings):
        pieces.append(piece)
        seen[0] += len(piece.ids)
    assert [token for piece in pieces for token in piece.ids] == plain.ids
    drafted = sum(piece.drafted for piece in pieces)
    assert drafted > 10
    assert drafted == sum(piece.accepted for piece in pieces)


def test_states_that_wait_are_read_before_they_are_many(session: Session) -> None:
    state = session.start(2, 120, drafted=True)
    assert state.followed is not None
    session.prefill(state, [[5] * 50, [6] * 3])
    assert state.followed.read_B[0] > 0
    for _ in range(WAITING + 3):
        session.decode(state, [7, 8])
        waiting = [len(each) for each in state.followed.tokens]
        assert max(waiting) <= WAITING
        held = state.followed.began_B + state.followed.read_B + waiting
        assert held.tolist() == state.past_B.tolist()
        assert waiting == [sum(map(len, each)) for each in state.followed.states]
    assert (state.followed.began_B > 0).all()  # nobody asked for guesses
    assert not state.followed.is_whole(0)


def test_a_row_that_is_rewound_among_what_was_read_begins_anew(session: Session) -> None:
    state = session.start(1, 120, drafted=True)
    assert state.followed is not None
    session.prefill(state, [[5] * 40])
    assert state.followed.read_B[0] > 32
    state.rewind([32])
    assert (state.followed.read_B[0], state.followed.tokens[0]) == (0, [])
    session.prefill(state, [[6, 7]])
    assert state.followed.tokens[0] == [6, 7]


def test_a_draft_that_fails_costs_no_text(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = session.generate_many(prompts(3), 30, draft_tokens=0, **GREEDY)

    def fail(self: Any, *_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Followed, "propose", fail)
    assert session.generate_many(prompts(3), 30, draft_tokens=3, **GREEDY) == plain


def test_a_verification_that_fails_is_done_without_guesses(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = session.generate_many(prompts(3), 30, draft_tokens=0, **GREEDY)

    def fail(self: Any, *_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Session, "verify", fail)
    assert session.generate_many(prompts(3), 30, draft_tokens=3, **GREEDY) == plain


def test_a_row_that_is_left_alone_is_followed_from_where_it_is_wanted_again(session: Session) -> None:
    state, (prompt,) = session.start(1, 64, drafted=True), prompts(1)
    followed = state.followed
    assert followed is not None
    session.prefill(state, [prompt])
    followed.heed(0, int(state.past_B[0]), is_wanted=False)
    assert not state.is_followed
    assert not followed.is_whole(0)
    for token in prompt[:3]:
        session.decode_rows(state, [token])
    assert not followed.tokens[0]
    followed.heed(0, int(state.past_B[0]), is_wanted=True)
    session.decode_rows(state, [prompt[3]])
    assert followed.tokens[0] == [prompt[3]]
    assert int(followed.began_B[0]) == len(prompt) + 3
    assert followed.propose(0, [prompt[4]], [2], lambda row, step, logits_V: (5, True)) == [[5, 5]]


def test_a_models_draft_is_used_unless_nobody_wants_it(session: Session, model: Path) -> None:
    assert session.guessing() == Guessing(draft=session.usual_draft)
    assert session.guessing(3, 0) == Guessing(lookup=3)
    assert session.start(1, 8).followed is None


def test_drafts_that_a_model_does_not_have_are_refused(tiny_model: Path, session: Session) -> None:
    plain = arriero.load(tiny_model, max_seq=64)
    with pytest.raises(SessionError, match="the model has no draft: export it with --draft HEAD"):
        plain.stream("The", draft_tokens=3)
    with pytest.raises(SessionError, match="draft_tokens is -1, expected a whole number from 0 up"):
        session.stream([5], draft_tokens=-1)
    assert plain.generate("The", 2, draft_tokens=0).drafted == 0


@pytest.mark.usefixtures("trusting")
def test_a_bundle_has_the_draft_in_it(model: Path, session: Session, tmp_path: Path) -> None:
    bundle = build_bundle(model, tmp_path / "bundle", target="cpu", copy_weights=True)
    spec = json.loads((bundle / "spec.json").read_text())
    assert {file["path"] for file in spec["weight_files"]} == {""}
    prompt = prompts(1)[0]
    built = load(bundle)
    assert built.generate(prompt, 60, draft_tokens=4, **GREEDY) == session.generate(prompt, 60, **GREEDY)


def test_memory_counts_the_drafts_rows(session: Session) -> None:
    plain, drafted = session.start(2, 64), session.start(2, 64, drafted=True)
    assert drafted.followed is not None
    own = drafted.followed.caches.buffers["0.key"]
    assert drafted.caches.row_bytes(64) - plain.caches.row_bytes(64) == 2 * own[0].nbytes
    flight = Flight(session, 2, 64, cache_bytes=1 << 30)
    assert flight.state.followed is not None
