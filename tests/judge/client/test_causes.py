"""Failures told with their cause, and endpoints in the forms that people have them (Azure, pasted paths, no system)."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

import certifi
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_client import WIN

from rmcore._base.client.address import Address
from rmcore._base.client.causes import check_environment, connection_trouble, not_a_completion, status_hint
from rmcore._base.client.exchange import HttpExchange
from rmcore._base.errors import JudgeError
from rmcore.integrations.client import GroupClient
from rmcore.judge import ChatJudge, ClientOptions, RetryPolicy

URL = "https://judge.example/v1"
AZURE = "https://me.openai.azure.com/openai/deployments/gpt"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "posted", "name", "header"),
    [
        (URL, f"{URL}/chat/completions", URL, "authorization"),
        (f"{URL}/", f"{URL}/chat/completions", URL, "authorization"),
        (f"{URL}/chat/completions", f"{URL}/chat/completions", URL, "authorization"),
        (f"{URL}/chat/completions/", f"{URL}/chat/completions", URL, "authorization"),
        (f"{URL}?route=eu", f"{URL}/chat/completions?route=eu", f"{URL}?route=eu", "authorization"),
        (f"{AZURE}?api-version=2024-10-21", f"{AZURE}/chat/completions?api-version=2024-10-21", AZURE, "api-key"),
        (
            f"{AZURE}/chat/completions?api-version=2024-10-21",
            f"{AZURE}/chat/completions?api-version=2024-10-21",
            AZURE,
            "api-key",
        ),
        (
            "https://me.openai.azure.com/openai/v1",
            "https://me.openai.azure.com/openai/v1/chat/completions",
            "https://me.openai.azure.com/openai/v1",
            "api-key",
        ),
        (
            "http://127.0.0.1:4000/openai/deployments/d?api-version=1",
            "http://127.0.0.1:4000/openai/deployments/d/chat/completions?api-version=1",
            "http://127.0.0.1:4000/openai/deployments/d",
            "api-key",
        ),
    ],
)
def test_where_requests_go(given_url, posted, name, header):
    address = Address.of(given_url)
    assert (address.url, address.name, address.key_header) == (posted, name, header)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (AZURE, "API version"),
        (f"{URL}?api-key=hunter2", "with a key"),
        (f"{URL}?subscription_key=hunter2", "with a key"),
        (f"{URL}?sig=hunter2", "with a key"),
        (f"{URL}?a=b#hunter2", "fragment"),
        (f"{URL}?hunter2", "malformed"),
        (f"{URL}?a=hunter2 b", "malformed"),
        ("http://127.0.0.1:0/v1", "port 0"),
    ],
)
def test_addresses_that_are_refused_and_not_quoted(url, says):
    with pytest.raises(JudgeError, match=says) as caught:
        ChatJudge(url, "m", None)
    assert "hunter2" not in str(caught.value)


def test_azure_gets_its_key_in_its_own_header(ask, mock_judge, chat_reply, secret):
    seen = []

    def azure(request):
        seen.append((str(request.url), request.headers.get("api-key"), request.headers.get("authorization")))
        return chat_reply(request, WIN)

    url = f"{AZURE}?api-version=2024-10-21"
    assert ask(mock_judge(azure, base_url=url, api_key_env="RMCORE_TEST_KEY", orders="one")).preference is not None
    assert seen == [(f"{AZURE}/chat/completions?api-version=2024-10-21", secret, None)]


# -- replies that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "url", "reason", "says"),
    [
        (
            httpx.Response(308, headers={"location": "/v2/chat/completions?k=v"}),
            URL,
            "http_308",
            "redirects to https://judge.example/v2/chat/completions;",
        ),
        (httpx.Response(404, json={"detail": "Not Found"}), "https://judge.example", "http_404", "mostly end in /v1"),
        (httpx.Response(405, text="no"), URL, "http_405", "there is no such path"),
        (httpx.Response(401, json={"error": {"message": "bad"}}), URL, "http_401", "no key was sent"),
        (httpx.Response(200, text="<!DOCTYPE html><html>Sign in"), URL, "not_json", "an HTML page"),
        (httpx.Response(200, text='data: {"choices": []}\n\ndata: [DONE]\n'), URL, "not_json", "server-sent events"),
        (httpx.Response(200, text=""), URL, "not_json", "an empty reply"),
        (httpx.Response(200, text="hello"), URL, "not_json", "the beginning: hello"),
        (httpx.Response(200, text="[1]"), URL, "not_json", "no object"),
        (httpx.Response(204), URL, "http_204", "without a completion; check the base URL"),
        (httpx.Response(407), URL, "http_407", "the proxy of the network wants a login"),
        (httpx.Response(200, headers={"content-encoding": "br"}, content=b"x"), URL, "bad_encoding", "compressed"),
        (httpx.Response(200, json={"choices": [{"text": "<verdict>"}]}), URL, "no_choices", "of /completions"),
        (httpx.Response(200, json={"choices": [{"delta": {}}]}), URL, "no_choices", "of a stream"),
    ],
)
def test_the_log_names_cause_and_url(ask, mock_judge, caplog, answer, url, reason, says):
    with caplog.at_level("WARNING"):
        assert ask(mock_judge(lambda _: answer, base_url=url, orders="one")).reason == reason
    (line,) = [r.getMessage() for r in caplog.records if "no verdict" in r.getMessage()]
    assert says in line
    assert f"POST {url}/chat/completions" in line


def test_a_path_that_the_endpoint_explains_is_not_explained_again():
    assert status_hint(404, f"{URL}/chat/completions", {}, None, explained=True) == ""
    assert "OPENAI_API_KEY" in status_hint(401, URL, {}, "OPENAI_API_KEY", explained=True)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('"sk-abcdefgh"', "stands in quotation marks"),
        ("'sk-abcdefgh'", "stands in quotation marks"),
        ("Bearer sk-abcdefgh", "begins with the word Bearer"),
        ("sk-abcdefgh", None),
        ('"sk-abcdefgh', None),
    ],
)
def test_what_is_around_a_key_that_is_not_accepted_is_told(ask, mock_judge, monkeypatch, caplog, value, says):
    monkeypatch.setenv("RMCORE_TEST_KEY", value)
    judge = mock_judge(lambda request: httpx.Response(401, json={}), api_key_env="RMCORE_TEST_KEY", orders="one")
    assert ask(judge).reason == "http_401"
    assert "the key of RMCORE_TEST_KEY is not accepted" in caplog.text
    assert "abcdefgh" not in caplog.text
    assert ("quotation" in caplog.text or "Bearer" in caplog.text) is (says is not None)
    assert says is None or says in caplog.text


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True), ("localhost.", True), ("x.localhost", True), ("127.0.0.2", True), ("[::1]", True),
        ("0.0.0.0", True), ("[::]", True), ("[::ffff:127.0.0.1]", True),
        ("10.0.0.1", False), ("judge.example", False), ("[2001:db8::1]", False), ("localhost.example", False),
    ],
)  # fmt: skip
def test_no_proxy_is_asked_for_this_machine_however_it_is_called(monkeypatch, caplog, host, here):
    """Servers print the address that they bind to, and that is what people paste."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    exchange = ChatJudge(f"http://{host}:8000/v1", "m", None).client.exchange
    assert exchange.address.loopback is here
    assert exchange.connections._trust_env is not here
    assert ("plain http" in caplog.text) is not here
    told = str(connection_trouble(ConnectionRefusedError(), f"http://{host}:8000/v1"))
    assert ("proxy of HTTP_PROXY" in told) is not here


@given(st.binary(max_size=300))
def test_any_reply_is_named(body):
    assert not_a_completion(body)


# -- connections -----------------------------------------------------------------------------------------------------


def test_an_ipv6_address_is_told_as_it_is_written():
    words = str(connection_trouble(ConnectionRefusedError(), "http://[::1]:8000/v1"))
    assert "nothing listens at [::1]:8000: connection refused" in words


def test_a_port_where_nobody_listens(ask, make_judge, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    judge = make_judge(f"http://127.0.0.1:{port}/v1", retry=RetryPolicy(max_attempts=1), orders="one")
    with caplog.at_level("WARNING"):
        assert ask(judge).reason == "connection"
    assert f"nothing listens at 127.0.0.1:{port}" in caplog.text


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", "closed the connection in the middle of a reply"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", "in the middle of a reply"),
        (b"", "closed the connection without an HTTP reply; a server that speaks https://"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection without an HTTP reply"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "closed the connection without an HTTP reply"),
        (b"<html>hello</html>\n", "closed the connection without an HTTP reply"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "answered with something other than HTTP/1.1"),
    ],
)
def test_what_is_no_whole_reply_is_told_apart(ask, make_judge, caplog, reply, says):
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level("WARNING"):

        def answer():
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(1 << 20)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1 << 20)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        judge = make_judge(url, orders="one", retry=RetryPolicy(max_attempts=1), context_tokens=4096)
        assert ask(judge).reason == "connection"
        thread.join()
    assert says in caplog.text


def test_https_where_http_is_spoken(ask, make_judge, caplog):
    with socket.create_server(("127.0.0.1", 0)) as plain, caplog.at_level("WARNING"):

        def answer():
            connection, _ = plain.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        verdict = ask(make_judge(f"https://127.0.0.1:{plain.getsockname()[1]}/v1", orders="one"))
        thread.join()
    assert (verdict.reason, verdict.usage.attempts) == ("connection", 1)  # it will not mend by itself
    assert "is it http://" in caplog.text


def _caused(outer: BaseException, cause: BaseException) -> BaseException:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (socket.gaierror(-2, "Name or service not known"), "DNS: no address is known for judge.example"),
        (ExceptionGroup("all", [OSError(), ConnectionRefusedError()]), "nothing listens at judge.example:443"),
        (ssl.SSLCertVerificationError(1, "self-signed"), "SSL_CERT_FILE"),
        (ConnectionResetError(), "reset"),
        (BrokenPipeError(), "reset"),
        (OSError("sk-secret"), "no connection to judge.example:443"),
        (OSError(errno.EMFILE, "sk-secret"), "too many open files; raise its limit (ulimit -n)"),
        (OSError(errno.EADDRNOTAVAIL, "sk-secret"), "no address or port left to connect from"),
        (OSError(errno.EHOSTUNREACH, "sk-secret"), "no route to judge.example:443"),
        (OSError(errno.ETIMEDOUT, "sk-secret"), "judge.example:443 does not answer"),
        (OSError(errno.EPERM, "sk-secret"), "does not allow connections to judge.example:443"),
        # of a name with two addresses, one of which cannot work here: what the other says
        (ExceptionGroup("all", [OSError(errno.ENETUNREACH, "x"), ConnectionRefusedError()]), "connection refused"),
        (ExceptionGroup("all", [ConnectionRefusedError(), OSError(errno.ENETUNREACH, "x")]), "connection refused"),
    ],
)
def test_the_innermost_cause_is_the_one_told(cause, says):
    if isinstance(cause, ssl.SSLCertVerificationError):
        cause.verify_message = "self-signed certificate"
    words = str(connection_trouble(_caused(httpx.ConnectError("sk-secret"), _caused(OSError("sk-secret"), cause)), URL))
    assert says in words
    assert "sk-secret" not in words


@pytest.mark.parametrize(
    ("code", "says"),
    [(9, "clock"), (10, "renewed"), (62, "host that it is for"), (64, "host that it is for"), (18, "SSL_CERT_FILE")],
)
def test_a_refused_certificate_has_the_remedy_of_its_fault(code, says):
    """Naming an expired one in SSL_CERT_FILE helps nobody."""
    cause = ssl.SSLCertVerificationError(1, "no")
    cause.verify_code, cause.verify_message = code, "why"
    words = str(connection_trouble(cause, URL))
    assert says in words
    assert ("SSL_CERT_FILE" in words) is (code == 18)


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (socket.gaierror(-2, "Name or service not known"), "no address is known for the proxy of HTTPS_PROXY"),
        (ConnectionRefusedError(), "nothing listens where the proxy of HTTPS_PROXY should be"),
        (ConnectionResetError(), "judge.example:443, or the proxy of HTTPS_PROXY, reset"),
        (ssl.SSLError(1, "wrong version number"), "or at the proxy of HTTPS_PROXY"),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), "or the proxy of HTTPS_PROXY,"),
    ],
)
def test_a_proxy_is_blamed_where_one_is_asked_and_nowhere_else(monkeypatch, cause, says):
    error = _caused(httpx.ConnectError(""), cause)
    assert "roxy" not in str(connection_trouble(error, URL))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert says in str(connection_trouble(error, URL))
    assert "roxy" not in str(connection_trouble(error, "http://judge.example/v1"))
    monkeypatch.setenv("NO_PROXY", "judge.example")
    assert "roxy" not in str(connection_trouble(error, URL))


def test_a_proxy_that_wants_a_login_is_not_asked_again(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    trouble = connection_trouble(httpx.ProxyError("407 Proxy Authentication Required"), URL)
    assert (str(trouble), trouble.lasting) == ("the proxy of HTTPS_PROXY wants a login", True)
    trouble = connection_trouble(httpx.ProxyError("503 Service Unavailable"), URL)
    assert ("does not let the request through" in str(trouble), trouble.lasting) == (True, False)


def test_only_what_is_this_machines_own_is_local():
    for number in range(1, 134):
        own = connection_trouble(_caused(httpx.ConnectError("x"), OSError(number, "x")), URL)
        told = number in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN)
        assert own.local is told
    assert not connection_trouble(_caused(httpx.ConnectError("x"), ssl.SSLError(errno.EAGAIN, "x")), URL).local


# -- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:9"),
        ("ALL_PROXY", "ftp://127.0.0.1:9"),
        ("HTTPS_PROXY", " http://127.0.0.1:9"),
        ("https_proxy", "http://127.0.0.1:port"),
        ("HTTP_PROXY", "http://"),
        ("HTTP_PROXY", "http://user:hunter2@[::1"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
        ("SSL_CERT_DIR", "/nonexistent"),
        ("SSL_CERT_FILE", "x" * 5000),
        ("SSL_CERT_DIR", "x" * 5000),
    ],
)
def test_an_unusable_setting_is_named_before_pairs_are_lost(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(JudgeError, match=name) as caught:
        ChatJudge(URL, "m", None)
    assert "hunter2" not in str(caught.value)
    # Neither this machine's own servers nor a transport of the user's own look at the environment.
    ChatJudge("http://127.0.0.1:9/v1", "m", None)
    ChatJudge(URL, "m", None, client=ClientOptions(transport=httpx.MockTransport(lambda _: httpx.Response(200))))


@pytest.mark.parametrize("loopback", ["https://localhost:1/v1", "https://127.0.0.1:1/v1", "https://[::1]:1/v1"])
def test_a_server_on_this_machine_may_have_a_certificate_of_its_own(monkeypatch, tmp_path, loopback):
    """The remedy that a refused certificate is told with works there, too; proxies do not count all the same."""
    monkeypatch.setenv("HTTPS_PROXY", "socks://nowhere")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(JudgeError, match="SSL_CERT_FILE"):
        ChatJudge(loopback, "m", None)
    first = Path(certifi.where()).read_text(encoding="utf-8").partition("-----END CERTIFICATE-----")
    (tmp_path / "one.pem").write_text(first[0] + first[1], encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "one.pem"))
    exchange = HttpExchange(Address.of(loopback), None, ClientOptions())
    clients = (exchange.connections, GroupClient(loopback.removesuffix("/v1"))._connections)

    async def trusted(connections):
        with connections.here().client():
            return connections.here()._verify.cert_store_stats()["x509"]

    assert [asyncio.run(trusted(one)) for one in clients] == [1, 1]


def test_a_certificate_file_without_certificates(monkeypatch, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(JudgeError, match=r"SSL_CERT_FILE.*PEM"):
        check_environment()


def test_a_folder_without_certificates(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with pytest.raises(JudgeError, match=r"SSL_CERT_DIR: got .*, which is empty or unreadable"):
        check_environment()


def test_usable_settings_are_left_alone(monkeypatch):
    for name in ("HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://user:pass@127.0.0.1:3128")
    monkeypatch.setenv("ALL_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1,.example")
    check_environment()


@given(st.text(max_size=40))
def test_any_proxy_is_usable_or_refused_in_our_words(value):
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("ALL_PROXY", value)
        except (ValueError, UnicodeEncodeError):
            return  # no value of a variable
        said = "ALL_PROXY"
        try:
            check_environment()
        except JudgeError as error:
            said = str(error)
        assert "ALL_PROXY" in said
