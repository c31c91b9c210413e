"""Requests from Dynamo's frontend in a session's words, as version 1.6.1 sends them, and what is refused."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arriero.cli.app import app
from arriero.errors import SessionError
from arriero.runtime import Generated, Session
from arriero.runtime.logprobs import TokenLogprobs
from arriero.serving.dynamo_requests import chunk, read_request, usage
from arriero.serving.dynamo_worker import write_card
from arriero.serving.errors import RequestError
from arriero.serving.texts import TokenTexts

SENT: dict[str, Any] = {
    "token_ids": [0, 5, 6],
    "model": "tiny",
    "sampling_options": {"n": 2, "temperature": 0.5, "top_k": -1, "seed": 7, "guided_decoding": None, "best_of": None},
    "stop_conditions": {"max_tokens": 9, "stop": ["END"], "stop_token_ids_hidden": [1, 2], "min_tokens": None},
    "output_options": {"logprobs": 2, "prompt_logprobs": None},
    "eos_token_ids": [2, 3],
}


def test_a_request_is_read_in_a_sessions_words(session: Session) -> None:
    asked = read_request(SENT, 8)
    assert (asked.ids, asked.count, asked.choices, asked.images) == ([0, 5, 6], 9, 2, [])
    assert asked.settings == {
        "temperature": 0.5,
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": [2, 3, 1],
        "stop_strings": ["END"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert [asked.of(index)["seed"] for index in (0, 1)] == [7, 8]
    request = session.request(asked.ids, asked.count, asked.images, **asked.of(0))
    assert (request.count, request.ends, request.top_logprobs) == (9, {1, 2, 3}, 2)


@pytest.mark.parametrize(
    ("guided", "setting"),
    [
        ({"json": {"type": "object"}}, {"json_schema": {"type": "object"}}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a.b", "c"]}, {"regex": r"a\.b|c"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ],
)
def test_guided_decoding_is_a_grammar(guided: dict[str, Any], setting: dict[str, Any]) -> None:
    sent = {"token_ids": [5], "sampling_options": {"guided_decoding": guided}}
    assert read_request(sent, 1).settings == setting


def test_greedy_and_endless_requests_are_so() -> None:
    stops = {"ignore_eos": True, "stop_token_ids_hidden": [1], "stop_token_ids": [9]}
    sent = {"token_ids": [5], "sampling_options": {"temperature": 0.0}, "stop_conditions": stops, "eos_token_ids": [1]}
    assert read_request(sent, 1).settings == {"do_sample": False, "eos_token_id": [9]}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"sampling_options": {"n": 9}}, "n is 9, this worker gives at most 8"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search is True, which this worker does not do"),
        ({"sampling_options": {"guided_decoding": {"structural_tag": {}}}}, "structural_tag is not done"),
        ({"sampling_options": {"guided_decoding": {"regex": "a", "json": {}}}}, "json and regex are given"),
        ({"output_options": {"prompt_logprobs": 1}}, "prompt_logprobs are not given"),
        ({"multi_modal_data": {"video_url": [{"Url": "data:"}]}}, "video_url is not taken"),
        ({"multi_modal_data": {"image_url": [{"Url": "/etc/passwd"}]}}, "image 1 is no data URL"),
        ({"multi_modal_data": {"image_url": [{"Url": "data:image/png;base64,"}]}}, "image 1"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(part: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read_request({"token_ids": [5], **part}, 8)


def test_pieces_are_chunks_of_tokens(session: Session) -> None:
    texts = TokenTexts(session.text.tokenizer)
    piece = Generated([50], "x", "eos", logprobs=(TokenLogprobs(50, -0.5, ((50, -0.5), (60, -1.5))),))
    found = chunk(1, piece, texts)
    assert found["top_logprobs"] == [
        [
            {"rank": 1, "token_id": 50, "token": texts.text_of(50), "logprob": -0.5},
            {"rank": 2, "token_id": 60, "token": texts.text_of(60), "logprob": -1.5},
        ]
    ]
    del found["top_logprobs"]
    assert found == {"token_ids": [50], "index": 1, "log_probs": [-0.5], "finish_reason": "stop"}
    assert chunk(0, Generated([], "", None), texts) == {"token_ids": [], "index": 0}
    assert usage(5, 2, 4)["prompt_tokens_details"] == {"cached_tokens": 4}


def test_the_card_has_what_the_frontend_reads_and_is_one_for_all_workers(
    session: Session, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    card = write_card(bundle, session)
    assert {path.name for path in card.iterdir()} >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert write_card(bundle, session) == card
    assert [*card.parent.iterdir()] == [card]
    card.parent.rename(tmp_path / "other")
    card.parent.symlink_to(tmp_path / "other")
    with pytest.raises(SessionError, match="is another user's"):
        write_card(bundle, session)


def test_the_verb_says_how_dynamo_is_installed_and_which_options_are_the_frontends(bundle: Path) -> None:
    for options, said in (
        (["--dynamo"], "docs/dynamo.md has the install that works"),
        (["--dynamo", "--host", "0.0.0.0"], "--host is given beside --dynamo"),
        (["--dynamo", "--api-key-file", "keys"], "--api-key-file is given beside --dynamo"),
    ):
        found = CliRunner().invoke(app, ["serve", str(bundle), *options])
        assert found.exit_code == 2
        assert said in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1
