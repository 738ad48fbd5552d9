"""Names are looked up where a resolver that hangs holds nobody up: not the pair, not the loop, not the process."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from rmcore._base.client.causes import ConnectionFailedError
from rmcore._base.client.resolve import Resolver
from rmcore._base.clock import SystemClock
from rmcore.judge import Pair, RetryPolicy

URL = "https://judge.test/v1/chat/completions"
PAIR = Pair("p", "a", "b")


@pytest.fixture
def hanging():
    """A lookup that never answers, until the test is over."""
    release = threading.Event()
    calls = []

    def lookup(host, port):
        calls.append((host, port))
        release.wait(30)

    lookup.calls = calls
    yield lookup
    release.set()


def test_a_resolver_that_hangs_is_left_and_asked_once(hanging):
    resolver = Resolver(URL, through_proxy=False, within_s=0.1, lookup=hanging)

    async def run():
        return await asyncio.gather(*(resolver.check() for _ in range(20)), return_exceptions=True)

    errors = asyncio.run(run())
    assert all("DNS: no answer about judge.test" in str(error) for error in errors)
    assert {type(error) for error in errors} == {ConnectionFailedError}
    assert hanging.calls == [("judge.test", 443)]


def test_a_name_is_looked_up_once_while_it_is_known_and_again_after_a_failure():
    answers = [socket.gaierror(socket.EAI_NONAME, "?"), None]
    calls = []

    def lookup(host, port):
        calls.append(host)
        if error := answers.pop(0):
            raise error

    resolver = Resolver(URL, through_proxy=False, within_s=5, lookup=lookup)

    async def run():
        with pytest.raises(ConnectionFailedError, match=r"no address is known for judge\.test"):
            await resolver.check()
        for _ in range(3):
            await resolver.check()

    asyncio.run(run())
    assert len(calls) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]:8000", "[fe80::1%25eth0]"])
def test_addresses_are_not_looked_up(host):
    def lookup(host, port):
        raise AssertionError

    asyncio.run(Resolver(f"http://{host}/v1", through_proxy=False, within_s=1, lookup=lookup).check())


def test_a_host_behind_a_proxy_is_the_proxys_to_look_up(monkeypatch):
    def lookup(host, port):
        raise AssertionError

    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    asyncio.run(Resolver(URL, through_proxy=True, within_s=1, lookup=lookup).check())


def test_whoever_stops_waiting_does_not_stop_the_others():
    release = threading.Event()
    resolver = Resolver(URL, through_proxy=False, within_s=5, lookup=lambda host, port: release.wait(5))

    async def run():
        first, second = asyncio.create_task(resolver.check()), asyncio.create_task(resolver.check())
        await asyncio.sleep(0.01)
        first.cancel()
        release.set()
        await second
        assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    asyncio.run(run())


def test_the_deadline_holds_against_a_resolver_that_hangs(make_judge, ask, hanging):
    judge = make_judge("http://judge.test/v1", clock=SystemClock(), deadline_s=0.3, orders="one")
    judge.client.exchange.resolver._lookup = hanging
    began = time.monotonic()
    verdict = ask(judge, PAIR)[0]
    assert (verdict.reason, time.monotonic() - began < 5) == ("deadline", True)


def test_without_an_answer_the_reason_is_the_connection(make_judge, ask, hanging, caplog):
    once = RetryPolicy(max_attempts=1)
    judge = make_judge("http://judge.test/v1", timeout_s=5.0, retry=once, orders="one")
    judge.client.exchange.resolver._lookup = hanging
    judge.client.exchange.resolver._within = 0.1
    assert ask(judge, PAIR)[0].reason == "connection"
    assert "DNS: no answer about judge.test" in caplog.text


def test_the_process_ends_though_the_resolver_hangs():
    """An event loop's own lookup would be waited for at exit."""
    script = """
        import socket, time
        real = socket.getaddrinfo
        def hang(host, *rest, **more):
            if host == "judge.test":
                time.sleep(120)
            return real(host, *rest, **more)
        socket.getaddrinfo = hang
        from rmcore.judge import ChatJudge, ClientOptions, Pair
        judge = ChatJudge("http://judge.test/v1", "m", None, deadline_s=0.3, orders="one")
        print(judge.judge_sync([Pair("p", "a", "b")])[0].reason)
        judge.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "deadline"), done.stderr


def test_a_thread_that_cannot_be_started_costs_one_attempt_and_no_more(monkeypatch):
    resolver = Resolver(URL, through_proxy=False, within_s=5, lookup=lambda host, port: None)

    def refused(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(ConnectionFailedError):
            asyncio.run(resolver.check())
    asyncio.run(resolver.check())


def test_a_name_that_only_the_proxy_may_know_is_left_to_the_request(monkeypatch):
    """``.test`` in NO_PROXY is the name ``test`` too for urllib, and is not for httpx."""

    def lookup(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", ".test")
    asyncio.run(Resolver("https://test/v1", through_proxy=True, within_s=1, lookup=lookup).check())
    monkeypatch.delenv("HTTPS_PROXY")
    with pytest.raises(ConnectionFailedError, match="no address is known for test"):
        asyncio.run(Resolver("https://test/v1", through_proxy=True, within_s=1, lookup=lookup).check())


@pytest.mark.parametrize(("port", "looked_up"), [("", 0), (":8443", 1)])
def test_a_port_in_no_proxy_counts(monkeypatch, port, looked_up):
    calls = []
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "judge.test:8443")
    url = f"https://judge.test{port}/v1"
    asyncio.run(Resolver(url, through_proxy=True, within_s=1, lookup=lambda *at: calls.append(at)).check())
    assert len(calls) == looked_up
