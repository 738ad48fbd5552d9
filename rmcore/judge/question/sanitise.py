"""Making untrusted text harmless inside a judge's prompt, visibly and reversibly.

A policy under reinforcement learning finds whatever moves its judge: control tokens of chat templates, closing think
tags, verdict tags, marker lines like ours, text that no reader sees. Each is broken by one visible sign (``␛``,
:data:`ESCAPE`) after its first character, so no tokenizer and no parser takes it for the real thing while a reader
still sees what was written.

Control tokens are matched as tokenizers know them. What is aimed at the *reader* (verdict and think tags) is matched
loosely, since a language model reads past a disguise: look-alike letters, full width, combining marks, invisible
characters between the letters, HTML entities.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["ESCAPE", "blank", "restore", "sanitise"]

ESCAPE = "\u241b"
"""SYMBOL FOR ESCAPE: visible, rare in real text, and left alone by Unicode normalisation."""

_LEFT, _RIGHT = "<＜﹤‹〈⟨❮≺ᐸ˂", ">＞﹥›〉⟩❯≻ᐳ˃"  # the angle bracket and the signs that pass for it
_SLASH, _BAR = "/／∕⁄⧸", "|｜¦∣ǀ"
# What shows nothing of its own: control characters, soft hyphen, joiners, bidirectional controls, variation selectors,
# fillers, tag characters, and marks that sit on the letter before them.
_UNSEEN = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_MARKS = r"\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_TIGHT = rf"[{_UNSEEN}{_MARKS}]{{0,3}}"  # between two letters of a word
_LOOSE = rf"[\s{_UNSEEN}{_MARKS}]{{0,8}}"  # between the parts of a tag

# Letters of other scripts that pass for the Latin ones (a choice from Unicode's confusables, for the words below).
_CONFUSABLE = {
    "c": "сϲᴄ",
    "d": "ԁꓒ",
    "e": "еєҽε℮",
    "g": "ɡց",
    "h": "һհ",
    "i": "іıíìïιl1|ӏ!",
    "k": "кκᴋ",
    "n": "ոпη",
    "r": "гꭇᴦ",
    "t": "тτᴛ",
    "v": "ѵνᴠ",
}


def _styled() -> dict[str, str]:
    """Latin letters in other dress (full width, circled, mathematical, superscript), by their plain lower case."""
    found: dict[str, str] = {}
    blocks = (
        (0x1D400, 0x1D6A4),
        (0xFF21, 0xFF5B),
        (0x24B6, 0x24EA),
        (0x2100, 0x2150),
        (0x1D2C, 0x1D6B),
        (0x2160, 0x2180),
    )
    for start, end in blocks:
        for sign in map(chr, range(start, end)):
            letter = unicodedata.normalize("NFKC", sign).casefold()
            if len(letter) == 1 and "a" <= letter <= "z":
                found[letter] = found.get(letter, "") + sign
    return found


_STYLED = _styled()


def _disguised(word: str) -> str:
    """A pattern for ``word`` in any of its disguises."""
    letters = (f"[{re.escape(c + c.upper() + _STYLED.get(c, '') + _CONFUSABLE.get(c, ''))}]" for c in word)
    return _TIGHT.join(letters)


_VERDICT, _THINK = _disguised("verdict"), _disguised("think")
# Names between angle brackets that are control tokens of some model, or that servers cut a reply at.
_NAMES = (
    "thinking|thoughts?|reasoning|reflection|seed:think|s|bos|eos|pad|unk|sop|eop|start_of_turn|end_of_turn"
    "|tool_calls?|tool_response|tool_responses|function_calls?|start_of_image|end_of_image|fim_prefix|fim_suffix"
    r"|fim_middle|unused\d{1,4}|extra_id_\d{1,4}|reserved_\d{1,4}"
)
_SQUARE = "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|THINK|gMASK|sMASK|CLS|SEP|EOS|BOS"
_ENTITY = r"(?:lt|\#0{0,6}60|\#x0{0,6}3c);?"

# Each alternative matches ONE character and looks ahead for the rest, so overlapping sequences are all found and the
# sign lands right behind a character that is not the sign: that is what makes `restore` exact. All repeats are
# bounded: time is linear in the text.
_AFTER_LEFT = "|".join(
    [
        # <|im_start|>, <|endoftext|>, and DeepSeek's full-width <｜User｜>
        rf"{_TIGHT}[{_BAR}][^{_BAR}{_LEFT}{_RIGHT}\n]{{1,64}}[{_BAR}]{_TIGHT}[{_RIGHT}]",
        # <verdict>, </verdict>, < verdict foo>
        rf"{_LOOSE}[{_SLASH}]?{_LOOSE}{_VERDICT}",
        # </think>, <s>, <start_of_turn>, </reasoning>, …
        rf"{_LOOSE}[{_SLASH}]?{_LOOSE}(?:{_THINK}|{_NAMES}){_LOOSE}[{_SLASH}]?[{_RIGHT}]",
        # <<SYS>>
        rf"[{_LEFT}][{_SLASH}]?SYS[{_RIGHT}]{{2}}",
        # marker lines like our own
        rf"{_TIGHT}[{_LEFT}]{_TIGHT}[{_LEFT}][^{_LEFT}{_RIGHT}\n]{{1,80}}[{_RIGHT}]{_TIGHT}[{_RIGHT}]{_TIGHT}[{_RIGHT}]",
    ]
)
_DANGEROUS = re.compile(
    "|".join(
        [
            rf"[{_LEFT}](?={_AFTER_LEFT})",
            # the HTML-escaped forms
            rf"&(?={_ENTITY}(?:{_LOOSE}[{_SLASH}]?{_LOOSE}(?:{_VERDICT}|{_THINK}&)|[{_BAR}][^{_BAR}\n]{{1,64}}[{_BAR}]&))",
            # [INST], [/THINK]
            rf"\[(?=[{_SLASH}]?(?:{_SQUARE})\])",
            # verdict forms of well-known judge prompts: [[A]], [[B]], [[C]]
            r"\[(?=\[\s?[ABC]\s?\]\])",
            # Kimi's ◁think▷
            rf"◁(?=[{_SLASH}]?think▷)",
            # text that reads otherwise than it is stored, and text in tag characters, which shows nothing at all
            rf"[\u202a-\u202e\u2066-\u2069\U000e0001-\U000e007f](?!{ESCAPE})",
        ]
    ),
    re.IGNORECASE,
)
_SIGNS = re.compile(ESCAPE + "+")
_BLANK = re.compile(rf"[\s{_UNSEEN}{_MARKS}\u2800]*")


def sanitise(text: str) -> tuple[str, int]:
    """``text`` with every control sequence broken, and how many were.

    A sign that the text itself holds is doubled (and not counted), so that :func:`restore` can tell them apart.
    """
    return _DANGEROUS.subn(lambda found: found.group() + ESCAPE, text.replace(ESCAPE, ESCAPE * 2))


def restore(text: str) -> str:
    """The text that :func:`sanitise` was given: ``restore(sanitise(text)[0]) == text`` for every text."""
    # A run of signs is the text's own, doubled, or those after one of ours, which makes the number odd.
    return _SIGNS.sub(lambda signs: ESCAPE * (len(signs.group()) // 2), text)


def blank(text: str) -> bool:
    """Whether a reader sees nothing: no character, or only white space, invisible characters and stray marks."""
    return _BLANK.fullmatch(text) is not None
