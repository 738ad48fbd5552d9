"""Checking the address of an endpoint before anything is sent to it."""

from __future__ import annotations

import ipaddress
import logging
import urllib.parse

from rmcore._base.errors import JudgeError

__all__ = ["check_base_url"]

_logger = logging.getLogger(__name__)


def check_base_url(base_url: str) -> tuple[str, bool]:
    """``base_url`` without a trailing slash, and whether it is this machine. Warns about plain http to another one.

    Raises:
        JudgeError: not an http(s) URL, or one with credentials, a query or a fragment. The URL is not quoted then.
    """
    expected = "expected an http:// or https:// URL such as https://host/v1"
    if not isinstance(base_url, str) or any(c.isspace() or not c.isprintable() for c in base_url):
        raise JudgeError(f"base_url: got a value that is no URL, {expected}")
    try:
        parts = urllib.parse.urlsplit(base_url)
        host = parts.hostname
        _ = parts.port  # raises on nonsense
    except ValueError:
        raise JudgeError(f"base_url: got a malformed URL, {expected}") from None
    if "@" in parts.netloc:
        raise JudgeError(f"base_url: got a URL with credentials, {expected}. Put the key into an environment variable")
    if parts.query or parts.fragment:
        raise JudgeError(f"base_url: got a URL with a query or a fragment, {expected}")
    if parts.scheme not in ("http", "https") or not host:
        raise JudgeError(f"base_url: got a URL without http(s) scheme or host, {expected}")
    loopback = _is_loopback(host)
    if parts.scheme == "http" and not loopback:
        _logger.warning("judge at %s: plain http, so prompts and key cross the network unencrypted", host)
    return base_url.rstrip("/"), loopback


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
