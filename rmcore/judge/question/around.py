"""What a verdict stands in: one that is struck out, or within tags that nobody knows, is not plainly meant.

``<analysis>VERDICT</analysis>`` is a thought, ``<s>VERDICT</s>`` is struck out, and what ``<draft>`` or ``<foo>`` mean
only their author knows. Tags that announce an answer or give it a look say nothing against it; a tag that does not
close behind the verdict (``vector<int>``, ``<stdio.h>``) is none around it, unless it strikes out: then the half of it
that is there is enough for doubt. So is one ``~~`` before it that nothing closes in its paragraph. What stands in
quotation marks is spoken of.
"""

from __future__ import annotations

import re
from collections import Counter

from rmcore._base.large import find_all

__all__ = ["is_plain"]

_TAG = re.compile(r"<(?<![`'\"(]<)\s{0,8}(?:(/)\s{0,8})?([^\W\d][\w:.-]{0,39})(?:\s[^<>]{0,199}?)?(/?)>")
_REACH = 512
_STRUCK = frozenset({"s", "del", "strike"})
_KNOWN = re.compile(  # names that announce an answer, and HTML's for how it looks
    r"(?:(?:my|the|final|overall)[_-]?)?(?:answer|output|result|response|reply|message|assistant|conclusion|decision|"
    r"judge?ment|evaluation|comparison|critique|review|verdict)s?|"
    r"b|strong|i|em|u|p|div|span|center|font|mark|big|small|code|pre|h[1-6]|ul|ol|li|table|tbody|tr|td|th|html|body|xml"
)
_PARAGRAPH = re.compile(r"\n[ \t]{0,8}\n")
_HALF = re.compile(r"(?<!~)~[\s*_`]{0,8}(?:<\s{0,8}verdict\s{0,8}>)?[\s*_`]{0,8}$", re.IGNORECASE)
_NEAR = 64  # characters before a verdict, its tag and emphasis among them, in which one tilde strikes it out


def is_plain(text: str, start: int, stop: int) -> bool:
    """Whether what stands from ``start`` to ``stop`` is neither struck out nor within tags of unknown names."""
    opened = Counter[str]()
    for tag in find_all(_TAG, text, _REACH):
        if tag.start() >= start:
            break
        ends, name, empty = tag.groups()
        if not empty:
            name = name.lower()
            opened[name] = max(0, opened[name] + (-1 if ends else 1))
    unknown = {name for name, count in opened.items() if count and _KNOWN.fullmatch(name) is None}
    if unknown & _STRUCK:
        return False
    if unknown and any(tag[1] and tag[2].lower() in unknown for tag in find_all(_TAG, text, _REACH, stop)):
        return False
    if "~" not in text:
        return True
    begins = 0
    for blank in find_all(_PARAGRAPH, text[:start], _REACH):  # Markdown strikes out within a paragraph
        begins = blank.end()
    return text.count("~~", begins, start) % 2 == 0 and _HALF.search(text[max(begins, start - _NEAR) : start]) is None
