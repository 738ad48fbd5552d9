"""Finding a key in what an endpoint says back, however it is written there."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from rmcore._base.large import PIECE

__all__ = ["without_secret"]

_LEAST = 4  # a shorter key is in every text
_WINDOW = 12  # of a long key, this many characters in a row are a secret too
_PART = _WINDOW // 2
_APART = re.compile(r"[^%\\&#;/0-9a-fA-FuxXmp]")  # in no escape
_ESCAPED = re.compile(
    r"%(?:25){0,8}(?P<percent>[0-9A-Fa-f]{2})|\\{1,8}+u00(?P<u>[0-9A-Fa-f]{2})|\\{1,8}+x(?P<x>[0-9A-Fa-f]{2})"
    r"|&\#0{0,8}(?P<decimal>[0-9]{2,3});?|&\#[xX]0{0,8}(?P<hex>[0-9A-Fa-f]{2});?|(?P<and>&amp;)|\\{1,8}+(?P<slash>/)"
    r"|(?P<nothing>[\s\x00\u00ad\u200b-\u200f\u2060-\u2064\ufeff]+)"
)


def without_secret(text: str, secret: str) -> str:
    r"""``text`` with ``***`` for ``secret``, in time linear in the text.

    Found are the secret as it is, its characters escaped, all or some of them (percent signs, once or several times
    over; ``\u00XX``, ``\xXX``, HTML entities), in any case, with white space between, as base64 (of a text that it is
    part of, too) or hexadecimal digits; and of one of twelve characters or more any twelve in a row. A secret of fewer
    than four characters is not looked for, and one of four not in base64.
    """
    if len(secret) < _LEAST or not text:
        return text
    forms = _forms(secret)
    seen = "".join(_ESCAPED.sub(_character, piece).lower() for piece in _pieces(text))
    if any(part in seen for form in forms for part in _parts(form)):
        text = _replaced(text, forms)
    # As it is, also where a sign before it makes an escape of its first characters.
    lower, plain = text.lower(), secret.lower()
    if not any(part in lower for part in _parts(plain)):
        return text
    size = min(len(plain), _WINDOW)
    stretches = dict.fromkeys([plain, *(plain[k : k + size] for k in range(len(plain) - size + 1))])
    return re.sub("|".join(map(re.escape, stretches)), "***", text, flags=re.IGNORECASE)


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces that take no escape apart."""
    start = 0
    while start < len(text):
        apart = _APART.search(text, start + PIECE)
        end = len(text) if apart is None else apart.start()
        yield text[start:end]
        start = end


def _forms(secret: str) -> set[str]:
    """How it may be written, in lower case."""
    raw = secret.encode("utf-8", "surrogatepass")
    found = {secret.lower(), raw.hex()}
    for offset, lost in ((0, 0), (1, 2), (2, 3)):  # in base64 three bytes are four letters, whatever stands before
        whole = (offset + len(raw)) // 3 * 4
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            letters = encode(bytes(offset) + raw).decode("ascii")[lost:whole].lower()
            if len(letters) >= _LEAST:
                found.add(letters)
    return found


def _parts(form: str) -> list[str]:
    """Pieces of which every stretch of ``form`` that is looked for holds one."""
    if len(form) < _WINDOW:
        return [form]
    return [form[k : k + _PART] for k in range(0, len(form) - _PART + 1, _PART)]


def _character(escaped: re.Match[str]) -> str:
    """What an escape stands for."""
    kind, digits = escaped.lastgroup, escaped[escaped.lastgroup or 0]
    if kind == "nothing":
        return ""
    if kind in ("and", "slash"):
        return "&" if kind == "and" else "/"
    return chr(int(digits, 10 if kind == "decimal" else 16))


def _replaced(text: str, forms: set[str]) -> str:
    view, spans, done = [], [], 0
    for escaped in [*_ESCAPED.finditer(text), None]:
        until = len(text) if escaped is None else escaped.start()
        view += [char.lower() if len(char.lower()) == 1 else char for char in text[done:until]]
        spans += [(k, k + 1) for k in range(done, until)]
        if escaped is not None:
            done = escaped.end()
            for char in _character(escaped).lower():
                view.append(char)
                spans.append((escaped.start(), done))
    seen = "".join(view)
    stretches: dict[int, set[str]] = {}
    for form in forms:
        size = min(len(form), _WINDOW)
        stretches.setdefault(size, set()).update(form[k : k + size] for k in range(len(form) - size + 1))
    pieces, kept, hidden = [], 0, 0
    for k in range(len(seen)):
        for size, known in stretches.items():
            if seen[k : k + size] in known:
                start, end = spans[k][0], spans[k + size - 1][1]
                if start >= hidden:  # a new one, not the last one going on
                    pieces += [text[kept:start], "***"]
                kept = hidden = max(end, hidden)
    return "".join(pieces) + text[kept:]
