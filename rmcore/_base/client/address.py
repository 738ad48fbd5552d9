"""Where requests go: the base URL as people have it, what is posted to, and which header carries the key.

=======================================================  =======================================================
given                                                    posted to
=======================================================  =======================================================
``https://host/v1``                                      ``https://host/v1/chat/completions``
``https://host/v1/chat/completions``                     the same: it is a common thing to paste
``https://NAME.openai.azure.com/openai/deployments/D?``  ``…/deployments/D/chat/completions?api-version=…``, with
``api-version=…``                                        the key in ``api-key`` as Azure wants it
=======================================================  =======================================================
"""

from __future__ import annotations

import logging
import re
import urllib.parse
from dataclasses import dataclass

from rmcore._base.errors import JudgeError
from rmcore._base.http import check_base_url

__all__ = ["Address"]

_logger = logging.getLogger(__name__)
_AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com", ".azure-api.net")
_DEPLOYMENT = re.compile(r"/openai/deployments/[^/]+$")
_SECRET = re.compile(r"(?i)(^|[-_.])(api[-_]?key|key|code|token|secret|password|sig|signature|credentials?)$")


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint; make it with :meth:`of`.

    Attributes:
        base_url: without query, trailing slash and endpoint.
        url: what is posted to.
        name: who is asked, for the store: ``base_url`` and the query but for ``api-version``, which names the form of
            requests and no judge.
        loopback: it is this machine.
        key_header: ``authorization`` (a bearer key), or ``api-key`` (Azure).
    """

    base_url: str
    url: str
    name: str
    loopback: bool
    key_header: str = "authorization"

    @classmethod
    def of(cls, base_url: str, endpoint: str = "/chat/completions") -> Address:
        """Read a base URL, of whose paths ``endpoint`` is posted to.

        Raises:
            JudgeError: it is none; it holds credentials or a fragment, or something like a key in its query; or it
                names an Azure deployment without ``api-version``. Neither the URL nor its query is quoted.
        """
        bare, question, query = base_url.partition("?") if isinstance(base_url, str) else (base_url, "", "")
        base, loopback = check_base_url(bare)
        fields = _query(query)
        if base.endswith(endpoint):
            base = base.removesuffix(endpoint).rstrip("/")
            _logger.info("%s taken off the end of the base URL, since requests go there anyway", endpoint)
        parts = urllib.parse.urlsplit(base)
        host = (parts.hostname or "").lower()
        deployment = _DEPLOYMENT.search(parts.path) is not None
        if deployment and not any(name == "api-version" for name, _ in fields):
            raise JudgeError(
                "base_url: got an Azure deployment without an API version, expected it at the end of the URL, as in "
                "https://NAME.openai.azure.com/openai/deployments/DEPLOYMENT?api-version=2024-10-21"
            )
        lasting = urllib.parse.urlencode([(name, value) for name, value in fields if name != "api-version"])
        return cls(
            base_url=base,
            url=base + endpoint + (question + query if fields else ""),
            name=base + (f"?{lasting}" if lasting else ""),
            loopback=loopback,
            key_header="api-key" if deployment or host.endswith(_AZURE_HOSTS) else "authorization",
        )

    def authorization(self, key: str) -> dict[str, str]:
        """The header that carries ``key``; none without one."""
        if not key:
            return {}
        return {self.key_header: key if self.key_header == "api-key" else f"Bearer {key}"}


def _query(query: str) -> list[tuple[str, str]]:
    expected = "expected plain fields such as ?api-version=2024-10-21"
    if "#" in query or any(c.isspace() or not c.isprintable() for c in query):
        raise JudgeError(f"base_url: got a URL with a fragment or a malformed query, {expected}")
    try:
        fields = urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise JudgeError(f"base_url: got a malformed query, {expected}") from None
    if any(_SECRET.search(name) for name, _ in fields):
        raise JudgeError(f"base_url: got a query with a key, {expected}. Put the key into an environment variable")
    return fields
