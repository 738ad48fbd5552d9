"""Making untrusted text harmless inside a judge's prompt, visibly and reversibly.

A policy under reinforcement learning finds whatever moves its judge: control tokens of chat templates, closing think
tags, verdict tags, marker lines like ours. Each is broken by one visible sign (``␛``, :data:`ESCAPE`) after its first
character, so no tokenizer and no parser takes it for the real thing while a reader still sees what was written.
"""

from __future__ import annotations

import re

__all__ = ["ESCAPE", "neutralise", "restore"]

ESCAPE = "\u241b"
"""SYMBOL FOR ESCAPE: visible, rare in real text, and left alone by Unicode normalisation."""

_LEFT, _RIGHT = "<＜﹤‹〈⟨", ">＞﹥›〉⟩"  # the angle bracket and the signs that pass for it
_NAMES = "think|thinking|s|bos|eos|pad|unk|sop|eop|start_of_turn|end_of_turn|tool_calls?|tool_response|tool_responses"
_SQUARE = "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|THINK|gMASK"

# Each alternative matches ONE character and looks ahead for the rest, so overlapping sequences are all found and the
# sign lands between two characters of which neither is the sign: that is what makes `restore` exact. All repeats are
# bounded: time is linear in the text.
_DANGEROUS = re.compile(
    "|".join(
        [
            # <|im_start|>, <|endoftext|>, and DeepSeek's full-width <｜User｜>
            rf"[{_LEFT}](?=[|｜][^|｜{_LEFT}{_RIGHT}\n]{{1,64}}[|｜][{_RIGHT}])",
            # <verdict>, </verdict>, < verdict foo>, and the HTML-escaped form
            rf"[{_LEFT}](?=\s{{0,8}}[/／]?\s{{0,8}}verdict)",
            r"&(?=(?:lt|\#60|\#x3c);\s{0,8}[/／]?\s{0,8}verdict)",
            # </think>, <s>, <start_of_turn>, …
            rf"[{_LEFT}](?=\s{{0,8}}[/／]?\s{{0,8}}(?:{_NAMES})\s{{0,8}}[/／]?[{_RIGHT}])",
            # <<SYS>> and [INST]
            rf"[{_LEFT}](?=[{_LEFT}][/／]?SYS[{_RIGHT}]{{2}})",
            rf"\[(?=[/／]?(?:{_SQUARE})\])",
            # verdict forms of well-known judge prompts: [[A]], [[B]], [[C]]
            r"\[(?=\[\s?[ABC]\s?\]\])",
            # marker lines like our own
            rf"[{_LEFT}](?=[{_LEFT}]{{2}}[^{_LEFT}{_RIGHT}\n]{{1,80}}[{_RIGHT}]{{3}})",
        ]
    ),
    re.IGNORECASE,
)
_SIGNS = re.compile(ESCAPE + "+")


def neutralise(text: str) -> tuple[str, int]:
    """``text`` with every control sequence broken, and how many were.

    A sign that the text itself holds is doubled (and not counted), so that :func:`restore` can tell them apart.
    """
    return _DANGEROUS.subn(lambda found: found.group() + ESCAPE, text.replace(ESCAPE, ESCAPE * 2))


def restore(text: str) -> str:
    """The text that :func:`neutralise` was given: ``restore(neutralise(text)[0]) == text`` for every text."""
    return _SIGNS.sub(lambda signs: ESCAPE * (len(signs.group()) // 2), text)
