"""The key goes into one header of one request, and nowhere else."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import time
import urllib.parse

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rmcore._base.client.error_body import error_detail, scrub
from rmcore._base.client.secrets import without_secret
from rmcore._base.errors import JudgeError
from rmcore._base.http import check_base_url
from rmcore.judge import ChatJudge, Pair, ReplayServer

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
@example("%", "1", "0000")
@example("\\u", "", "0041deadbeef00")
@example("&#", ";", "000000000000000000000000000065")
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


# -- however it is written -------------------------------------------------------------------------------------------

WRITTEN = {
    "plain": lambda key: key,
    "upper case": str.upper,
    "percent, where it must be": lambda key: urllib.parse.quote(key, safe=""),
    "percent, all of it": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "percent, every third": lambda key: "".join(f"%{ord(c):02X}" if k % 3 else c for k, c in enumerate(key)),
    "percent, twice": lambda key: urllib.parse.quote("".join(f"%{ord(c):02X}" for c in key)),
    "percent, three times": lambda key: "".join(f"%2525{ord(c):02X}" for c in key),
    "JSON escapes": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "JSON escapes, twice": lambda key: "".join(f"\\\\u{ord(c):04x}" for c in key),
    "hexadecimal escapes": lambda key: "".join(f"\\x{ord(c):02x}" for c in key),
    "entities": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "entities, some": lambda key: key.replace("-", "&#x2D;").replace("&", "&amp;", 0),
    "lines": lambda key: "\n  ".join(key[k : k + 10] for k in range(0, len(key), 10)),
    "zero width": "\u200b".join,
    "two bytes a character": "\0".join,
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of the header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 of user and key": lambda key: base64.b64encode(f"u:{key}:x".encode()).decode(),
    "base64 for URLs": lambda key: base64.urlsafe_b64encode(f"ab{key}".encode()).decode(),
    "hexadecimal": lambda key: key.encode().hex().upper(),
    "the first half": lambda key: key[:14],
    "the last half": lambda key: key[-14:],
    "from the middle": lambda key: key[7:21],
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_key_that_comes_back_in_any_writing_is_neither_kept_nor_logged(
    ask, mock_judge, chat_reply, secret, caplog, tmp_path, name
):
    caplog.set_level(logging.DEBUG)
    written = WRITTEN[name](secret)
    verdicts = []
    for answer in ("said", "refused"):
        path = tmp_path / f"{answer}.db"

        def handler(request, answer=answer):
            if answer == "refused":
                return httpx.Response(400, json={"error": {"message": f"bad header {written}", "code": "bad"}})
            return chat_reply(request, f"You sent {written}, thank you.\n<verdict>$win</verdict>")

        judge = mock_judge(handler, api_key_env="RMCORE_TEST_KEY", store=path)
        verdicts.append(ask(judge))
    assert [verdict.preference for verdict in verdicts] == [1.0, None] or verdicts[0].flipped
    kept = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir())).decode("utf-8", "replace")
    for place in (kept, caplog.text, repr(verdicts)):
        assert written not in place
        assert json.dumps(written)[1:-1] not in place
    assert "***" in kept
    assert "***" in caplog.text


@given(
    st.text(max_size=30),
    st.text(max_size=30),
    st.text("abcXYZ0189-_+/=.", min_size=5, max_size=60),
    st.sampled_from(sorted(WRITTEN)).filter(lambda name: "half" not in name and "middle" not in name),
)
def test_no_writing_of_a_key_survives(before, after, key, name):
    clean = without_secret(f"{before} {WRITTEN[name](key)} {after}", key)
    assert "***" in clean


@given(st.text("ghijk %&#\\;+/ \u200bÄ", max_size=200), st.text("0123456789ABCDEF", min_size=30, max_size=60))
def test_text_without_the_key_is_left_alone(text, key):
    assert without_secret(text, key) == text


def test_what_stands_around_the_key_stays():
    assert without_secret("a key-0123456789-key b key-01 c", "key-0123456789-key") == "a *** b key-01 c"
    assert without_secret("key-0123456789-keykey-0123456789-key", "key-0123456789-key").strip("*") == ""
    assert without_secret("abc abcd", "abc") == "abc abcd"  # too short to be told from words


@pytest.mark.parametrize("unit", ["%", "%25", "key-01", "&#", "\\", "key-0123456789-key", "\u200b"])
def test_time_is_linear_in_what_an_endpoint_says(unit):
    def seconds(size):
        text = unit * (size // len(unit))
        began = time.process_time()
        without_secret(text, "key-0123456789-key")
        return time.process_time() - began

    seconds(10_000)
    assert seconds(200_000) < 0.1 + 40 * seconds(20_000)


# -- no state across requests ----------------------------------------------------------------------------------------


def test_cookies_are_neither_kept_nor_sent_back(ask, mock_judge, chat_reply, pairs):
    sent = []

    def handler(request):
        sent.append(request.headers.get("cookie"))
        reply = chat_reply(request, "<verdict>$win</verdict>")
        k = len(sent)
        reply.headers["set-cookie"] = f"backend{k}={k}; Path=/"
        return reply

    ask(mock_judge(handler), *pairs)
    assert len(sent) > len(pairs)
    assert set(sent) == {None}
