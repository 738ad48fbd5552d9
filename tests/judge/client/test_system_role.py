"""Judges whose chat template knows no system role."""

from __future__ import annotations

import json

import httpx
import pytest
from support.chat_client import WIN

from rmcore.judge import JudgePrompt, Pair, RetryPolicy

# -- judges without a system role --------------------------------------------------------------------------------------

REFUSALS = [
    (400, "System role not supported"),
    (400, "Only user and assistant roles are supported!"),
    (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
    (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
    (422, "messages[0].role: unknown variant `system`, expected `user` or `assistant`"),
    (400, "Developer instruction is not enabled for models/gemma-3-1b-it"),
    (500, "Value error in template: System role not supported"),
    (400, "system messages are not allowed"),
]


@pytest.mark.parametrize(("status", "words"), REFUSALS)
def test_a_judge_without_system_role_is_asked_without_one(ask, mock_judge, chat_reply, caplog, status, words):
    roles = []

    def endpoint(request):
        messages = json.loads(request.content)["messages"]
        roles.append([message["role"] for message in messages])
        if messages[0]["role"] == "system":
            return httpx.Response(status, json={"object": "error", "message": words, "code": status})
        question = JudgePrompt.parse(messages)
        return chat_reply(request, WIN if question.first == "a" else "<verdict>$loss</verdict>")

    judge = mock_judge(endpoint, retry=RetryPolicy(max_attempts=1), concurrency=1)
    with caplog.at_level("WARNING"):
        verdicts = ask(judge, Pair("p", "a", "b"), Pair("q", "a", "c"))
    assert [v.preference for v in verdicts] == [1, 1]
    assert roles.count(["system", "user"]) == 1, "what was learnt is kept"
    assert roles[-1] == ["user"]
    assert caplog.text.count("does not take system_role") == 1


@pytest.mark.parametrize("words", ["temperature is not supported", "the system is not ready", "internal error"])
def test_other_refusals_keep_the_system_message(ask, mock_judge, words):
    judge = mock_judge(lambda _: httpx.Response(400, json={"error": {"message": words}}), orders="one")
    assert ask(judge).reason == "http_400"
    assert "system_role" not in str(judge.counts)
