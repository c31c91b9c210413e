"""llama.cpp's own tests of its server as a checklist: each case that is not about its model or its flags is tried here.

Read from `tools/server/tests/unit` of the llama.cpp in llama-cpp-python 0.3.36. Left out are its model's words, its own
paths (slots, infilling, embeddings, rerankers, Anthropic's interface, its router of models) and its own fields.
"""

import ast
from pathlib import Path

import httpx

CHECKLIST = {
    "test_security": {
        "access_public_endpoint, incorrect_api_key, correct_api_key, openai_library_correct_api_key, cors_options, "
        "cors_origins_localhost_reflects, cors_origins_localhost_rejects": (
            "test_keys_open_the_doors_and_tenants_share_no_beginnings"
        ),
        "local_media_file": "test_images_come_in_the_request_or_not_at_all",
    },
    "test_basic": {
        "server_start_simple, server_models": "test_the_model_is_listed_and_another_not_found",
    },
    "test_chat_completion": {
        "chat_completion, chat_completion_with_openai_library": "test_a_whole_answer_is_the_session_s",
        "chat_completion_cached_tokens": "test_known_beginnings_are_counted",
        "chat_completion_stream": "test_a_stream_is_the_whole_answer_in_pieces",
        "completion_with_response_format, completion_with_json_schema": "test_json_of_a_schema_and_json_of_none",
        "completion_with_grammar": "test_regular_expressions_and_grammars_are_heeded",
        "completion_with_invalid_grammar": "test_what_cannot_be_enforced_is_refused_with_its_reason",
        "invalid_chat_completion_req": "test_what_is_no_request_is_refused_in_openai_s_form",
        "logprobs": "test_logprobs_are_the_session_s_and_their_bytes_the_text_s",
        "logprobs_stream": "test_log_probabilities_of_a_stream_are_those_of_the_whole",
        "context_size_exceeded": "test_large_bodies_and_long_prompts_are_refused",
        "context_size_exceeded_stream": "test_a_prompt_that_is_too_long_is_refused_before_a_stream_begins",
        "chat_completions_multiple_choices": "test_choices_share_their_prompt_and_have_seeds_in_a_row",
        "chat_completions_token_count": "test_tokens_and_texts_are_exchanged",
    },
    "test_completion": {
        "completion, completion_stream, completion_stream_vs_non_stream, completion_with_openai_library, "
        "completion_stream_with_openai_library, completion_with_tokens_input": (
            "test_completions_take_texts_ids_and_several"
        ),
        "completion_stream_with_openai_library_stops": "test_a_stop_string_ends_the_text_before_it",
        "consistent_result_same_seed, different_result_different_seed": (
            "test_choices_share_their_prompt_and_have_seeds_in_a_row"
        ),
        "consistent_result_different_batch_size, completion_parallel_slots, completion_unified": (
            "test_greedy_texts_are_the_same_among_others_that_join_and_leave"
        ),
        "cache_vs_nocache_prompt, completion_prompt_cache": "test_known_beginnings_are_counted",
        "json_prompt_mtm_error_when_not_supported": "test_images_come_in_the_request_or_not_at_all",
        "cancel_request": "test_a_client_that_leaves_frees_its_row",
    },
    "test_compat_oai_responses": {
        "responses_with_openai_library, responses_stream_with_openai_library": (
            "test_responses_are_answered_whole_and_as_events"
        ),
    },
    "test_tokenize": {"tokenize_detokenize, tokenize_with_bos": "test_tokens_and_texts_are_exchanged"},
    "test_tool_call": {
        "completion_with_required_tool_real_model": "test_a_demanded_call_fits_its_schema",
        "completion_without_tool_call_fast": "test_content_is_given_as_soon_as_it_is_no_call",
        "weather, calc_result": "test_a_conversation_with_calls_is_continued_as_the_session_does",
    },
}
"""Cases of each of its files, by the test here that tries the same."""

BODY = {"prompt": "The list type", "max_tokens": 6, "temperature": 0}


def test_each_case_of_the_checklist_has_its_test() -> None:
    known: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        known |= {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {test for cases in CHECKLIST.values() for test in cases.values()} <= known


def test_a_prompt_that_is_too_long_is_refused_before_a_stream_begins(http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json={**BODY, "prompt": "word " * 1200, "stream": True})
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"
    assert "tokens" in refused.json()["error"]["message"]


def test_log_probabilities_of_a_stream_are_those_of_the_whole(http: httpx.Client) -> None:
    whole = http.post("/v1/completions", json={**BODY, "logprobs": 2}).json()["choices"][0]["logprobs"]
    lines = http.post("/v1/completions", json={**BODY, "logprobs": 2, "stream": True}).text.splitlines()
    parts = [httpx.Response(200, text=line[6:]).json()["choices"][0]["logprobs"] for line in lines if '"id"' in line]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [each for part in parts if part for each in part[name]] == whole[name]
