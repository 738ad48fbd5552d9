"""The key goes into one header of one request, and nowhere else."""

from __future__ import annotations

import json
import logging
import pickle
import urllib.parse

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import JudgeError
from rmcore._base.http import check_base_url
from rmcore.judge import ChatJudge, Pair, ReplayServer
from rmcore.judge.client.reply import error_detail, scrub

PAIR = Pair("p-win", "a", "b")


def test_the_key_is_sent_and_kept_nowhere(ask, make_judge, recorded, secret, caplog):
    caplog.set_level(logging.DEBUG)
    with ReplayServer(recorded, require_key=secret) as server:
        judge = make_judge(server.base_url, api_key_env="RMCORE_TEST_KEY")
        verdict = ask(judge)
    assert verdict.preference == 1
    assert "RMCORE_TEST_KEY" in repr(judge)
    everything = repr(judge) + repr(vars(judge)) + repr(vars(judge.client)) + caplog.text + repr(verdict)
    assert secret not in everything
    assert secret.encode() not in pickle.dumps(ChatJudge("http://localhost/v1", "m", "RMCORE_TEST_KEY"))


def test_the_key_is_read_at_each_call(ask, make_judge, recorded, secret, monkeypatch):
    with ReplayServer(recorded, require_key="another") as server:
        judge = make_judge(server.base_url, api_key_env="RMCORE_TEST_KEY")
        assert ask(judge).reason == "http_401"
        assert server.requests == 2  # once an order: a wrong key is not tried again
        monkeypatch.setenv("RMCORE_TEST_KEY", " another\n")
        assert ask(judge).preference == 1


@pytest.mark.parametrize(("value", "reason"), [(None, "no_api_key"), ("  ", "no_api_key"), ("sk-a\nb", "bad_api_key")])
def test_without_a_usable_key_nothing_is_sent(ask, make_judge, recorded, monkeypatch, caplog, value, reason):
    if value is None:
        monkeypatch.delenv("RMCORE_TEST_KEY", raising=False)
    else:
        monkeypatch.setenv("RMCORE_TEST_KEY", value)
    with ReplayServer(recorded) as server:
        verdict = ask(make_judge(server.base_url, api_key_env="RMCORE_TEST_KEY"))
    assert (verdict.reason, server.requests) == (reason, 0)
    assert "environment variable RMCORE_TEST_KEY" in caplog.text
    assert "sk-a" not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        "Incorrect API key provided: {key}. You can find",
        '{{"error": {{"message": "Incorrect API key provided: {key}", "code": "invalid_api_key"}}}}',
        '{{"error": "Bearer {key}"}}',
        '{{"message": "your header was authorization: bearer {key}\\u001b[2J\\nFAKE LOG LINE"}}',
        "url was /x?key={quoted}",
        "{padding}{key}",
    ],
)
def test_an_error_that_echoes_the_key_is_scrubbed(ask, mock_judge, secret, caplog, body):
    caplog.set_level(logging.DEBUG)
    text = body.format(key=secret, quoted=urllib.parse.quote(secret), padding="x" * 2390)
    judge = mock_judge(lambda request: httpx.Response(401, text=text), api_key_env="RMCORE_TEST_KEY")
    verdict = ask(judge)
    assert verdict.reason == "http_401"
    assert "no verdict for 1 of 1 pairs" in caplog.text
    for logged in (caplog.text, repr(verdict)):
        assert secret not in logged
        assert secret[:12] not in logged
    assert all("\n" not in r.getMessage() and "\x1b" not in r.getMessage() for r in caplog.records)


def test_an_exception_that_quotes_the_key_is_not_quoted(ask, mock_judge, secret, caplog):
    caplog.set_level(logging.DEBUG)

    def handler(request):
        raise httpx.LocalProtocolError(f"Illegal header value {request.headers['authorization']}")

    judge = mock_judge(handler, api_key_env="RMCORE_TEST_KEY")
    verdict = ask(judge)
    assert verdict.reason == "error_LocalProtocolError"
    assert secret not in caplog.text + repr(verdict)


@given(st.text(max_size=20), st.text(max_size=20), st.text("abcXYZ0189-_+/=", min_size=4, max_size=40))
def test_scrub_leaves_no_key(before, after, key):
    assert key not in scrub(before + key + after, key).replace("***", "\0")


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.text(), lambda x: st.dictionaries(st.sampled_from(["error", "message", "code"]), x)
    ).map(lambda v: json.dumps(v).encode())
)
def test_details_are_short_single_lines(body):
    detail = error_detail(body, "the-key")
    assert len(detail) <= 300
    assert detail.isprintable()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/v1",
        "https://hunter2@host/v1",
        "https://host/v1?api_key=hunter2",
        "https://host/v1#hunter2",
        "ftp://host/hunter2",
        "hunter2",
        "https:///hunter2",
        "https://host:hunter2/v1",
        "https://ho st/hunter2",
        "https://[hunter2/v1",
        "",
        None,
    ],
)
def test_urls_that_are_refused_and_not_quoted(url):
    with pytest.raises(JudgeError, match="base_url") as caught:
        ChatJudge(url, "m")
    assert "hunter2" not in str(caught.value)


def test_a_key_given_as_the_variables_name_is_refused_and_not_quoted():
    with pytest.raises(JudgeError, match="api_key_env") as caught:
        ChatJudge("https://host/v1", "m", "sk-hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "clean", "loopback", "warned"),
    [
        ("https://api.example.com/v1/", "https://api.example.com/v1", False, False),
        ("http://10.0.0.7:8000/v1", "http://10.0.0.7:8000/v1", False, True),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", True, False),
        ("http://localhost:8000/v1", "http://localhost:8000/v1", True, False),
        ("http://[::1]:8000", "http://[::1]:8000", True, False),
        ("http://127.0.0.1.evil.example/v1", "http://127.0.0.1.evil.example/v1", False, True),
    ],
)
def test_plain_http_beyond_this_machine_is_warned_of(caplog, url, clean, loopback, warned):
    assert check_base_url(url) == (clean, loopback)
    assert ("unencrypted" in caplog.text) == warned


def test_a_redirect_does_not_carry_the_key_away(ask, mock_judge, secret):
    hosts = []

    def handler(request):
        hosts.append(request.url.host)
        return httpx.Response(307, headers={"location": "https://evil.example/v1/chat/completions"})

    judge = mock_judge(handler, api_key_env="RMCORE_TEST_KEY", orders="one")
    assert ask(judge).reason == "http_307"
    assert hosts == ["127.0.0.1"]


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(ask, make_judge, recorded, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with ReplayServer(recorded) as server:
        assert ask(make_judge(server.base_url)).preference == 1
