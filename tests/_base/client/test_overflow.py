"""A request that was too long for the model, in the words of each server, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.client.overflow import Overflow, model_context, read_overflow

OPENAI = "This model's maximum context length is 8192 tokens. However, "
FORMS = [
    (400, "context_length_exceeded", OPENAI + "your messages resulted in 10000 tokens.", 8192, 10000),
    (400, "", OPENAI + "you requested 9000 tokens (8000 in the messages, 1000 in the completion).", 8192, 9000),
    (400, "context_length_exceeded", "Your input exceeds the context window of this model.", None, None),
    (400, "", "Input tokens exceed the configured limit of 272000 tokens. It had 300000 tokens.", 272000, 300000),
    (400, "string_above_max_length", "string too long. Expected maximum length 10485760, got 12000000.", None, None),
    (400, "BadRequestError", OPENAI + "your request has 9000 input tokens.", 8192, 9000),
    (
        400,
        "",
        "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 4096 "
        "tokens and your request has 3000 input tokens (2048 > 4096 - 3000).",
        4096,
        None,
    ),
    (400, "", "The decoder prompt (length 5000) is longer than the maximum model length of 4096.", 4096, 5000),
    (400, "", "Input length (5000) exceeds model's maximum context length (4096).", 4096, 5000),
    (400, "", "The input (5000 tokens) is longer than the model's context length (4096 tokens).", 4096, 5000),
    (
        400,
        "",
        "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total "
        "of 5000 tokens: 3000 tokens from the input messages and 2000 tokens for the completion.",
        4096,
        5000,
    ),
    (400, "", "Input length (5000 tokens) exceeds the maximum allowed length (4090 tokens).", 4090, 5000),
    (500, "server_error", "the request exceeds the available context size. try increasing it", None, None),
    (400, "exceed_context_size_error", "request (5000 tokens) exceeds the available context size (4096)", 4096, 5000),
    # As llama.cpp's server answered on 2026-11-28.
    (
        400,
        "exceed_context_size_error",
        "request (16031 tokens) exceeds the available context size (2048 tokens), try increasing it; n_ctx 2048",
        2048,
        16031,
    ),
    (400, "exceed_context_size_error", "too long; n_prompt_tokens 5000; n_ctx 4096", 4096, 5000),
    (400, "", "prompt is too long: 208310 tokens > 200000 maximum", 200000, 208310),
    (400, "", "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000", 200000, None),
    (422, "", "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens", 4096, 5000),
    (422, "", "`inputs` must have less than 4095 tokens. Given: 5000", 4095, 5000),
    (400, "", "Prompt contains 40000 tokens, too large for model with 32768 maximum context length", 32768, 40000),
    (
        400,
        "",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        1048576,
        1200000,
    ),
    (400, "", "Input is too long for requested model.", None, None),
    (400, "", "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5000.", 4081, 5000),
    (413, "rate_limit_exceeded", "Request too large for model `m` on tokens per minute: Limit 6000, 8421", 6000, 8421),
    (429, "rate_limit_exceeded", "Request too large for gpt-4o: Limit 30000, Requested 42000.", 30000, 42000),
    (400, "", "This model's maximum prompt length is 131072 but the request contains 200000 tokens.", 131072, 200000),
    (400, "", "the input length exceeds the context length", None, None),
    (400, "", "the model is loaded with context length of only 4096 tokens, which is not enough.", 4096, None),
    (400, "", "The sum of prompt length (5000.0) should not exceed max_seq_len (4096)", 4096, 5000),
    (400, "", "default_max_tokens (-904) = max_seq_len (4096) - splited_prompt_len (5000)", 4096, 5000),
    (400, "", f"litellm.ContextWindowExceededError: {OPENAI}your messages resulted in 10,000 tokens.", 8192, 10000),
    (400, "", "This endpoint's maximum context length is 8192 tokens. You requested about 12,000 tokens", 8192, 12000),
    (200, "", "prompt is too long", None, None),
]


@pytest.mark.parametrize(("status", "code", "text", "limit", "asked"), FORMS)
def test_every_servers_words_are_known(status, code, text, limit, asked):
    assert read_overflow(status, code, text) == Overflow(limit, asked)


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (400, "", "Unsupported value: 'temperature' does not support 0.2 with this model."),
        (400, "invalid", "max_tokens is too large: 5000. This model supports at most 4096 completion tokens"),
        (400, "", "Invalid value for max_tokens: must be <= 4096"),
        (429, "rate_limit_exceeded", "Rate limit reached on tokens per min. Limit: 10000 / min."),
        (400, "", "response_format is not supported"),
        (401, "context_length_exceeded", "maximum context length is 4096 tokens"),
        (500, "", "internal error"),
        (503, "", "the model is overloaded"),
        (400, "", "System role not supported"),
    ],
)
def test_other_errors_are_none(status, code, text):
    assert read_overflow(status, code, text) is None


def test_a_bare_413_may_mean_it():
    assert read_overflow(413, "", "<html>Request Entity Too Large</html>") is not None
    assert read_overflow(413, "", "no") == Overflow(stated=False)


@given(st.integers(), st.text(max_size=40), st.text(max_size=400))
def test_any_error_is_read(status, code, text):
    read_overflow(status, code, text)


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        ({"data": [{"id": "m", "max_model_len": 4096}]}, 4096),
        ({"data": [{"id": "other", "max_model_len": 4096}]}, 4096),
        ({"data": [{"id": "other", "max_model_len": 4096}, {"id": "m", "context_length": 8192}]}, 8192),
        ({"data": [{"id": "m", "meta": {"n_ctx_train": 8192}}]}, None),
        ({"data": [{"id": "m", "meta": {"n_ctx_train": 8192, "n_ctx": 2048}}]}, 2048),
        ({"data": [{"id": "m", "context_length": 9000, "top_provider": {"context_length": 4000}}]}, 4000),
        ({"data": [{"id": "m", "max_model_len": 3}]}, None),
        ({"data": [{"id": "m", "max_model_len": True}]}, None),
        ({"data": [{"id": "a"}, {"id": "b", "max_model_len": 4096}]}, None),
        ([{"id": "m", "context_window": 4096}], 4096),
        ({"data": {}}, None),
        (None, None),
        ({"data": [None, 3]}, None),
    ],
)
def test_what_a_list_of_models_says(reply, tokens):
    assert model_context(reply, "m") == tokens
