"""Structured replies and endpoints that do not take what they are sent: no pair is lost over a field of the request."""

from __future__ import annotations

import json
from collections import Counter

import httpx
import pytest

from rmcore._base.errors import InputError
from rmcore.judge import Fault, JudgePrompt, Labels, Pair, RecordedJudge, ReplayServer, parse_verdict

PAIR = Pair("p-win", "a", "b")
LABELS = Labels("KQXVD", "PLMZT", "WRGHB")
PAIRS = [Pair(f"p{i}", "a", "b") for i in range(6)]


def refusal(message, status=400, **error):
    return httpx.Response(status, json={"error": {"message": message, "type": "invalid_request_error"} | error})


def body(request):
    return json.loads(request.content)


@pytest.fixture
def json_reply(chat_reply):
    """A reply in the form that the request asks for, which must be its own labels under a strict schema."""

    def reply(request, word="tie"):
        payload = body(request)
        labels = JudgePrompt.parse(payload["messages"]).labels
        if "response_format" not in payload:
            return chat_reply(request, f"<verdict>${word}</verdict>")
        wanted = payload["response_format"]
        assert wanted["type"] == "json_schema"
        assert wanted["json_schema"]["strict"] is True
        schema = wanted["json_schema"]["schema"]
        assert schema["required"] == ["critique", "verdict"] == list(schema["properties"])
        assert schema["additionalProperties"] is False
        assert schema["properties"]["verdict"]["enum"] == [labels.win, labels.loss, labels.tie]
        return chat_reply(request, json.dumps({"critique": "So it is.", "verdict": labels.label(word)}))

    return reply


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "outcome", "critique"),
    [
        ('{"critique": "Right.", "verdict": "KQXVD"}', "win", "Right."),
        ('{"verdict": "PLMZT", "critique": "Wrong."}', "loss", "Wrong."),
        ('\n ```json\n{"critique": "", "verdict": "wrghb"}\n``` ', "tie", ""),
        ('{"verdict": "KQXVD"}', "win", ""),
        ('{"verdict": "KQXVD", "critique": 3, "confidence": 0.9}', "win", ""),
        ('{"verdict": "KQXVD", "verdict": "KQXVD"}', "win", ""),
        ('<think>{"verdict": "PLMZT"}</think>{"critique": "c", "verdict": "KQXVD"}', "win", "c"),
        ('{"critique": "It closes </think> early", "verdict": "KQXVD"}', "win", "It closes </think> early"),
        ('{"critique": "<think>", "verdict": "KQXVD"}', "win", "<think>"),
        ('{"critique": "It says \\"verdict\\": \\"A\\"", "verdict": "KQXVD"}', "win", 'It says "verdict": "A"'),
        ('{"critique": "<verdict>A</verdict>", "verdict": "KQXVD"}', "win", "<verdict>A</verdict>"),
        ('{"critique": "raw "quotes" in it", "verdict": "KQXVD"}', "win", None),
        ('My answer:\n{"critique": "c", "verdict" : "KQXVD"}\n```\n', "win", None),
        ('{"critique": "c", "verdict": "A"} <verdict>KQXVD</verdict>', "win", None),
        ('<verdict>A</verdict> {"verdict": "KQXVD"}', "win", None),
    ],
)
def test_json_replies(text, outcome, critique):
    parsed = parse_verdict(text, LABELS)
    assert (parsed.outcome, parsed.reason) == (outcome, "")
    assert critique is None or parsed.critique == critique


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"critique": "c", "verdict": "A"}', "unparsable"),
        ('{"critique": "c", "verdict": null}', "unparsable"),
        ('{"critique": "c", "verdict": ["KQXVD"]}', "unparsable"),
        ('{"critique": "c", "verdict": {"label": "KQXVD"}}', "unparsable"),
        ('{"critique": "c", "verdict": "KQXVD", "verdict": "PLMZT"}', "conflicting"),
        ('{"critique": "c", "verdict": "KQXVD", "verdict": "A"}', "unparsable"),
        ('{"critique": "<verdict>PLMZT</verdict>", "verdict": "KQXVD"}', "conflicting"),
        ('{"critique": "It says \\"verdict\\": \\"PLMZT\\"", "verdict": "KQXVD"}', "conflicting"),
        ('{"verdict": "KQXVD"} {"verdict": "PLMZT"}', "conflicting"),
        ('{"verdict": "KQXVD"} <verdict>PLMZT</verdict>', "conflicting"),
        ('{"verdict": "KQXVD"} <verdict>A</verdict>', "unparsable"),
        ('{"critique": "KQXVD"}', "unparsable"),
        ('{"critique": "c"', "unparsable"),
        ("{}", "unparsable"),
        ('{"critique": "c", "verdict": "KQX', "unparsable"),
        ('["KQXVD"]', "unparsable"),
        ('"KQXVD"', "unparsable"),
        ("{" * 5000 + "}" * 5000, "unparsable"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "unparsable"),
        ('{"n": ' + "9" * 10_000 + "}", "unparsable"),
    ],
)
def test_json_replies_without_a_verdict(text, reason):
    parsed = parse_verdict(text, LABELS)
    assert (parsed.outcome, parsed.reason) == (None, reason)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ['"verdict":', '{"verdict":"', "```json{", '\\"', '"verdict": "K"', "}"])
def test_time_is_linear_in_hostile_json(unit):
    text = unit * (1_000_000 // len(unit))
    for given in (text, "{" + text + "}", "```" + text + "```"):
        parse_verdict(given, LABELS)


# -- asking ----------------------------------------------------------------------------------------------------------


def test_the_question_says_what_the_schema_says():
    for output in ("text", "json_schema"):
        rendered = JudgePrompt(output=output).render("p", "a", "b")
        assert JudgePrompt.parse(rendered.messages).output == rendered.output == output
        assert ("<verdict>" in rendered.messages[0]["content"]) == (output == "text")
    with pytest.raises(InputError, match="output"):
        JudgePrompt(output="xml")


def test_over_http(ask, make_judge, rows, pairs):
    recorded = RecordedJudge.from_rows(rows)
    with ReplayServer(recorded) as server:
        as_text = ask(make_judge(server.base_url), *pairs)
        judge = make_judge(server.base_url, output="json_schema")
        as_json = ask(judge, *pairs)
    assert [(v.preference, v.flipped, v.reason) for v in as_json] == [
        (v.preference, v.flipped, v.reason) for v in as_text
    ]
    assert judge.dropped == {}
    assert as_json[0].critique.startswith("Replaying a recorded verdict.")


def test_what_is_sent(ask, mock_judge, json_reply):
    verdict = ask(mock_judge(json_reply, output="json_schema"))
    assert (verdict.preference, verdict.reason) == (0.0, "")
    assert verdict.critique == "So it is.\n\n[other order: first and second exchanged]\nSo it is."


@pytest.mark.parametrize(
    "message",
    [
        "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
        "This model does not support response format `json_schema`.",
        "response_format: Extra inputs are not permitted",
        "Structured outputs are not available for this deployment.",
    ],
)
def test_an_endpoint_that_refuses_the_schema_is_asked_for_text(ask, mock_judge, json_reply, caplog, message):
    sent = []

    def handler(request):
        sent.append("response_format" in body(request))
        return refusal(message) if sent[-1] else json_reply(request)

    judge = mock_judge(handler, output="json_schema", orders="one", concurrency=1)
    with caplog.at_level("WARNING"):
        verdicts = ask(judge, *PAIRS)
    assert [v.preference for v in verdicts] == [0.0] * 6
    assert sent == [True, *[False] * 6]  # once, and never again
    assert [(v.usage.calls, v.usage.attempts, len(v.usage.latencies_s)) for v in verdicts] == [(1, 2, 1)] + [
        (1, 1, 1)
    ] * 5
    assert judge.counts["text_instead"] == 1
    assert judge.dropped == {"response_format": message}
    assert [r.levelname for r in caplog.records if "does not take response_format" in r.getMessage()] == ["WARNING"]


def test_an_endpoint_that_answers_the_schema_with_nothing_is_asked_for_text(ask, mock_judge, json_reply):
    sent = []

    def handler(request):
        sent.append("response_format" in body(request))
        if sent[-1]:
            return httpx.Response(200, json={"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})
        return json_reply(request, "tie")

    judge = mock_judge(handler, output="json_schema", orders="one", concurrency=1)
    assert [v.preference for v in ask(judge, *PAIRS)] == [0.0] * 6
    assert sent == [True, *[False] * 6]
    assert judge.dropped == {"response_format": "no_content"}


def test_one_empty_reply_of_an_endpoint_that_can_is_an_accident(ask, mock_judge, json_reply):
    sent = []

    def handler(request):
        sent.append("response_format" in body(request))
        if len(sent) == 3:
            return httpx.Response(200, json={"choices": [{"message": {"content": None}, "finish_reason": "stop"}]})
        return json_reply(request)

    judge = mock_judge(handler, output="json_schema", orders="one", concurrency=1)
    assert [v.preference for v in ask(judge, *PAIRS)] == [0.0] * 6
    assert sent == [True, True, True, False, True, True, True]
    assert (judge.counts["text_instead"], judge.dropped) == (1, {})


def test_an_endpoint_that_never_says_anything_is_not_asked_for_ever(ask, mock_judge):
    empty = httpx.Response(200, json={"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})
    judge = mock_judge(lambda r: empty, output="json_schema", orders="one")
    verdict = ask(judge)
    assert (verdict.reason, verdict.usage.attempts, judge.dropped) == ("no_content", 2, {})


def test_a_cut_off_or_refused_reply_is_no_reason_to_ask_again(ask, make_judge, recorded):
    faults = [Fault(finish_reason="length"), Fault(message={"content": "", "refusal": "no"})]
    with ReplayServer(recorded, faults=faults) as server:
        verdicts = ask(make_judge(server.base_url, output="json_schema", orders="one", concurrency=1), PAIR, PAIR)
    assert [v.reason for v in verdicts] == ["length", "refusal"]
    assert server.requests == 2


@pytest.mark.parametrize(
    ("sent", "message", "then"),
    [
        (
            {"temperature": 0.0},
            "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported.",
            {},
        ),
        ({"temperature": 0.0}, "`temperature` is deprecated for this model.", {}),
        (
            {"max_tokens": 99},
            "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead.",
            {"max_completion_tokens": 99},
        ),
        (
            {"max_completion_tokens": 99},
            "Unrecognized request argument supplied: max_completion_tokens",
            {"max_tokens": 99},
        ),
    ],
)
def test_a_parameter_that_is_refused_by_name_is_left_out(ask, mock_judge, json_reply, sent, message, then):
    (name,) = sent
    bodies = []

    def handler(request):
        bodies.append({k: v for k, v in body(request).items() if k not in ("model", "messages")})
        return refusal(message) if name in bodies[-1] else json_reply(request)

    judge = mock_judge(handler, orders="one", concurrency=1, extra_body={"seed": 7}, **sent)
    assert [v.preference for v in ask(judge, *PAIRS)] == [0.0] * 6
    assert bodies == [sent | {"seed": 7}, *[then | {"seed": 7}] * 6]
    assert (list(judge.dropped), judge.counts[f"refused:{name}"]) == ([name], 1)


def test_everything_refused_one_after_the_other(ask, mock_judge, json_reply):
    """A reasoning model behind an old server: five requests for the first question, one for each other."""
    wanted = ["max_tokens", "temperature", "logprobs", "response_format"]
    attempts = []

    def handler(request):
        payload = body(request)
        attempts.append(next((name for name in wanted if name in payload), None))
        return json_reply(request) if attempts[-1] is None else refusal(f"{attempts[-1]} is not supported", 422)

    judge = mock_judge(
        handler, output="json_schema", soft=True, temperature=0.0, max_tokens=9, orders="one", concurrency=1
    )
    verdicts = ask(judge, *PAIRS)
    assert [(v.preference, v.reason) for v in verdicts] == [(0.0, "hard:no_logprobs")] * 6
    assert attempts == [*wanted, *[None] * 6]
    assert set(judge.dropped) == set(wanted)


def test_questions_in_flight_together_each_find_out_and_it_is_told_once(ask, make_judge, rows, caplog):
    recorded = RecordedJudge.from_rows(
        [{"prompt": p.prompt, "first": "a", "second": "b", "verdict": "win"} for p in PAIRS]
    )
    with ReplayServer(recorded, refuses=("temperature",), latency_s=0.05) as server, caplog.at_level("WARNING"):
        judge = make_judge(server.base_url, orders="one", temperature=0.5, concurrency=6)
        assert [v.preference for v in ask(judge, *PAIRS)] == [1.0] * 6
        assert [v.preference for v in ask(judge, *PAIRS)] == [1.0] * 6
    assert server.statuses == Counter({200: 12, 400: judge.counts["refused:temperature"]})
    assert sum("does not take temperature" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "seed is not supported"),
        (400, "temperature must be between 0 and 2"),
        (400, "The response was filtered. Your text says: temperature"),
        (400, "'top_p' is not supported"),
        (400, ""),
        (401, "temperature is not supported"),
        (404, "temperature is not supported"),
        (500, "temperature is not supported"),
    ],
)
def test_other_refusals_are_left_as_they_are(ask, mock_judge, clock, status, message):
    judge = mock_judge(lambda r: refusal(message, status), orders="one", temperature=0.0)
    verdict = ask(judge)
    assert (verdict.reason, judge.dropped) == (f"http_{status}", {})
    assert verdict.usage.attempts == (5 if status == 500 else 1)


def test_two_limits_that_refuse_each_other(ask, mock_judge):
    def handler(request):
        name = next(name for name in ("max_tokens", "max_completion_tokens") if name in body(request))
        return refusal(f"{name} is not supported")

    judge = mock_judge(handler, orders="one", max_tokens=9)
    verdict = ask(judge)
    assert (verdict.reason, verdict.usage.attempts, judge.dropped) == ("http_400", 2, {})


def test_what_did_not_help_is_not_left_out(ask, mock_judge):
    judge = mock_judge(lambda r: refusal("temperature is not supported"), orders="one", temperature=0.0)
    verdict = ask(judge)
    assert (verdict.reason, verdict.usage.attempts, judge.dropped) == ("http_400", 2, {})
