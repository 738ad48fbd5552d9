"""Why a request came to nothing, in one line with the remedy: connections, replies that are none, the environment.

All words are our own. Messages of HTTP libraries can quote headers, and one of them holds the key.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
import ssl
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

from rmcore._base.errors import JudgeError
from rmcore._base.http import is_loopback

__all__ = [
    "ConnectionFailedError",
    "check_environment",
    "connection_trouble",
    "not_a_completion",
    "past_proxies",
    "status_hint",
]

_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_PROXIES = ("http", "https", "all")
_OWN_AUTHORITY = "if it is your own authority's, name its file in SSL_CERT_FILE"
_ANOTHER_HOST = "give the host that it is for, or have one made for this host"
_LOCAL = {
    errno.EMFILE: "this process has too many open files; raise its limit (ulimit -n), or lower the concurrency",
    errno.ENFILE: "this machine has too many open files; lower the concurrency",
    errno.EADDRNOTAVAIL: "this machine has no address or port left to connect from; lower the concurrency",
    errno.ENOBUFS: "this machine has no room for further connections; lower the concurrency",
    errno.ENOMEM: "this machine has no memory for further connections; lower the concurrency",
    errno.EAGAIN: "this process cannot start further threads; raise its limit (ulimit -u), or lower the concurrency",
}
"""What a connection fails for that is no fault of the other side."""
_NO_WAY = {
    errno.ENETUNREACH: "no route to {place}; check the network",
    errno.EHOSTUNREACH: "no route to {place}; check the host's name and the network",
    errno.ETIMEDOUT: "{place} does not answer; check the host's name and the network",
    errno.EACCES: "this machine does not allow connections to {place}; check its firewall",
    errno.EPERM: "this machine does not allow connections to {place}; check its firewall",
}
_CERTIFICATE = {
    9: "it begins later: is this machine's clock right?",
    10: "it must be renewed, unless this machine's clock is wrong",
    62: _ANOTHER_HOST,
    64: _ANOTHER_HOST,
}
"""By OpenSSL's X509_V_ERR: not yet valid, expired, another host, another address."""


class ConnectionFailedError(ConnectionError):
    """No connection, or a broken one; ``str`` says why and what to do. ``lasting``: trying again will not help.
    ``local``: something of this machine has run out, and with fewer at once there may be enough.
    """

    def __init__(self, words: str, *, lasting: bool = False, local: bool = False) -> None:
        super().__init__(words)
        self.lasting, self.local = lasting, local


def connection_trouble(error: BaseException, url: str) -> ConnectionFailedError:
    """What an HTTP library raised while it asked ``url``, in our words."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or "?"
    place = f"{f'[{host}]' if ':' in host else host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    proxy = _proxy_of(parts)
    numbers = [cause.errno for cause in _chain(error) if isinstance(cause, OSError) and type(cause) in _PLAIN_OS_ERRORS]
    local = next((number for number in numbers if number in _LOCAL), None)
    if local is not None:
        return ConnectionFailedError(_LOCAL[local], local=True)
    for cause in _chain(error):
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConnectionFailedError(
                f"TLS: the certificate of {host} is not accepted ({cause.verify_message.rstrip('.')}); "
                + _CERTIFICATE.get(getattr(cause, "verify_code", 0), _OWN_AUTHORITY),
                lasting=True,
            )
        if isinstance(cause, ssl.SSLError):
            where = f"at {place}; is it http:// instead of https://?"
            if proxy:
                where = f"at {place}, or at the proxy of {proxy}; is it http:// instead of https:// in either?"
            return ConnectionFailedError(f"TLS: no TLS is spoken {where}", lasting=True)
        if isinstance(cause, socket.gaierror):
            if proxy:  # which is the one whose name is looked up here
                return ConnectionFailedError(f"DNS: no address is known for the proxy of {proxy}; check that variable")
            return ConnectionFailedError(f"DNS: no address is known for {host}; check the host's name and the network")
        if "ProxyError" in kinds:
            if str(cause).startswith("407"):
                return ConnectionFailedError(f"the proxy of {proxy} wants a login", lasting=True)
            return ConnectionFailedError(
                f"the proxy of {_proxy_variables(parts.scheme)} does not let the request through"
            )
        if isinstance(cause, ConnectionRefusedError):
            if proxy:
                return ConnectionFailedError(
                    f"nothing listens where the proxy of {proxy} should be: connection refused; check that variable, "
                    f"or name {host} in NO_PROXY if it needs none"
                )
            return ConnectionFailedError(f"nothing listens at {place}: connection refused; is the server running?")
        if isinstance(cause, (ConnectionResetError, BrokenPipeError)):
            through = f", or the proxy of {proxy}," if proxy else ""
            return ConnectionFailedError(f"{place}{through} reset the connection{_https(parts.scheme)}")
        if "RemoteProtocolError" in kinds:
            return ConnectionFailedError(
                _broken(str(cause), f"{place}, or the proxy of {proxy}," if proxy else place, parts.scheme)
            )
    way = next((_NO_WAY[number] for number in numbers if number in _NO_WAY), "no connection to {place}")
    return ConnectionFailedError(way.format(place=f"{place}, or the proxy of {proxy}" if proxy else place))


_PLAIN_OS_ERRORS = (OSError, BlockingIOError, PermissionError, TimeoutError)
"""As opposed to those of TLS and DNS, which count in numbers of their own."""


def _https(scheme: str) -> str:
    return "; a server that speaks https:// does that to http://" if scheme == "http" else ""


def _broken(said: str, place: str, scheme: str) -> str:
    """What is told of a reply that is none, by the HTTP library's words, which are not shown."""
    if "complete message body" in said or "incomplete chunked read" in said:
        return f"{place} closed the connection in the middle of a reply"
    https = _https(scheme)
    if "without sending a response" in said:
        return f"{place} closed the connection without an HTTP reply{https}"
    return f"{place} answered with something other than HTTP/1.1{https}"


def status_hint(
    status: int, url: str, headers: Mapping[str, str], key_env: str | None, *, explained: bool, key: str = ""
) -> str:
    """What to do about an error status; empty where the endpoint's own words must do (``explained``: it has some)."""
    path = urllib.parse.urlsplit(url).path
    if 300 <= status < 400:
        there = urllib.parse.urlsplit(urllib.parse.urljoin(url, headers.get("location", "")))
        target = f"{there.scheme}://{there.netloc.rpartition('@')[2]}{there.path}"[:200]
        return f"redirects to {target}; redirects are not followed, give the base URL of that"
    if 200 < status < 300:
        return "a reply without a completion; check the base URL"
    if status == 407:
        return f"the proxy of {_proxy_variables(urllib.parse.urlsplit(url).scheme) or 'the network'} wants a login"
    if status in (404, 405):
        versioned = re.search(r"/v\d+(beta\d*)?(/|$)|/deployments/", path) is not None
        if not versioned:
            return "there is no such path; base URLs mostly end in /v1"
        return "" if explained else "there is no such path; check the base URL"
    if status == 401:
        return f"the key of {key_env} is not accepted{_odd(key)}" if key_env else "no key was sent"
    return ""


def _odd(key: str) -> str:
    """What a key has around it that mostly is no part of one."""
    if key[:1] in ("'", '"') and key[-1:] == key[:1]:
        return "; it stands in quotation marks, which were sent with it"
    if key.lower().startswith("bearer "):
        return "; it begins with the word Bearer, which was sent twice"
    return ""


def not_a_completion(body: bytes) -> str:
    """What a reply of status 200 is that is no JSON."""
    start = body[:512].lstrip().lower()
    if not start:
        return "an empty reply"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "an HTML page instead of JSON: a sign-in page or a web interface; check the base URL"
    if start.startswith((b"data:", b"event:", b"id:", b"retry:", b": ", b":\n")):
        return (
            "server-sent events instead of JSON, although no stream was asked for; switch streaming off at the server"
        )
    return "no JSON; the beginning: " + body[:80].decode("utf-8", "replace")


def check_environment(*, proxies: bool = True, certificates: bool = True) -> None:
    """Proxies and certificates that the environment names can be used; ``False`` leaves the ones alone.

    Raises:
        JudgeError: naming the variable, what is wrong with it and the remedy. Values are not quoted: proxies have
            passwords.
    """
    names = (*_proxy_names(_PROXIES), "NO_PROXY", "no_proxy") if proxies else ()
    variables = [name for name in names if os.environ.get(name)]
    for name in variables:
        if "no_proxy" not in name.lower():
            _check_proxy(name, os.environ[name])
    if certificates:
        _check_certificates()
    if variables:
        import httpx

        try:
            # Whatever else there may be about them; a client is made of all of them, whichever it needs.
            httpx.AsyncClient(trust_env=True, verify=False)  # noqa: S501 - nothing is sent
        except Exception as error:
            raise JudgeError(
                f"{', '.join(variables)}: got a value that cannot be used ({type(error).__name__}), "
                "expected proxies such as http://host:port, and host names in NO_PROXY"
            ) from None


def _check_proxy(name: str, value: str) -> None:
    expected = "expected a URL such as http://host:port, or no such variable"
    if value != value.strip() or not value.isprintable() or any(c.isspace() for c in value):
        raise JudgeError(f"{name}: got white space or control characters in it, {expected}")
    try:
        parts = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise JudgeError(f"{name}: got a malformed URL, {expected}") from None
    if parts.scheme not in _PROXY_SCHEMES:
        raise JudgeError(f"{name}: got the scheme {parts.scheme[:20]!r}, expected one of {', '.join(_PROXY_SCHEMES)}")
    if not host:
        raise JudgeError(f"{name}: got a URL without a host, {expected}")
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise JudgeError(f"{name}: got a SOCKS proxy, expected the package for it: pip install 'httpx[socks]'")


def _check_certificates() -> None:
    # As httpx reads them: the folder counts only where no file is named.
    for name, kind in (("SSL_CERT_FILE", "file"), ("SSL_CERT_DIR", "folder")):
        value = os.environ.get(name)
        if not value:
            continue
        path = Path(value)
        try:
            usable = path.is_file() if kind == "file" else any(path.iterdir())
        except (OSError, ValueError):  # no such folder, a name that no file can have
            usable = False
        if kind == "folder" and not usable and os.path.isdir(value):
            raise JudgeError(f"{name}: got {value!r:.200}, which is empty or unreadable, expected certificates in it")
        if not usable:
            raise JudgeError(f"{name}: got {value!r:.200}, which is no {kind}, expected a {kind} of certificates")
        if kind == "file":
            try:
                ssl.create_default_context(cafile=value)
            except (OSError, ssl.SSLError):
                raise JudgeError(f"{name}: got {value!r:.200}, expected a readable PEM file of certificates") from None
        return


def _proxy_names(schemes: tuple[str, ...]) -> list[str]:
    return [word for scheme in schemes for word in (f"{scheme}_proxy".upper(), f"{scheme}_proxy")]


def _proxy_variables(scheme: str) -> str:
    return " or ".join(name for name in _proxy_names((scheme, "all")) if os.environ.get(name))


def _proxy_of(parts: urllib.parse.SplitResult) -> str:
    """The variables whose proxy requests to a URL go through; empty where they go there themselves."""
    return "" if is_loopback(parts.hostname or "?") or past_proxies(parts) else _proxy_variables(parts.scheme)


def past_proxies(parts: urllib.parse.SplitResult) -> bool:
    """Whether ``NO_PROXY`` names a URL's host, with or without its port."""
    import urllib.request  # has all of http.client with it, and is needed where something went wrong only

    host = parts.hostname or "?"
    return bool(urllib.request.proxy_bypass(host if ":" in host else parts.netloc.rpartition("@")[2] or host))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and the members of groups, each once; the innermost causes come first."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting and len(found) < 64:
        one = waiting.pop(0)
        if one in found:
            continue
        found.append(one)
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
    return reversed(found)
