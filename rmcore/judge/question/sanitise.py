"""Making untrusted text harmless inside a judge's prompt, visibly and reversibly.

A policy under reinforcement learning finds whatever moves its judge: control tokens of chat templates, closing think
tags, verdict tags, marker lines like ours, text that no reader sees. Each is broken by one visible sign (``␛``,
:data:`ESCAPE`) after its first character, so no tokenizer and no parser takes it for the real thing while a reader
still sees what was written.

Control tokens are found by their **shape**, since every model family brings new ones. With spaces before, behind and
between the parts, closed by a slash or not:

- between angle brackets: ``<|x|>``, ``<|x>``, ``<x|>``, ``<UPPER_CASE>``, ``<with_underscores>``, ``<word:word>``, and
  ``<[x]>``, names without a mark of their own (``<s>``, ``<pad>``, ``<think>``), of which there is a list;
- between square ones: ``[UPPER_CASE]``, ``[|x|]``, ``[@x@]``; MiniMax's ``]~b]`` and ``[e~[``; Falcon's ``>>TITLE<<``;
  OLMo's ``|||IP_ADDRESS|||``; Kimi's ``◁x▷``; and ``/no_think``, which some chat templates obey.

So ordinary text that has such a shape gets a sign too: ``[TODO]``, ``buffer[MAX_LEN]``, ``<YOUR_NAME>``, ``<TABLE>``,
``vector<my_type>``, ``<xsl:template>``. It stays readable, and the contract tells the judge what the sign means. Left
alone are ``List<int>``, ``a<b>c``, ``<div class="x">``, ``[1]``, ``[a link](https://…)``, ``vector<uint8_t>``.

What is aimed at the *reader* (verdict and think tags) is matched loosely besides, since a language model reads past a
disguise. Look-alikes count as the real thing everywhere: full width, mathematical letters, other brackets and bars,
combining marks, invisible characters; HTML entities for the brackets; for verdict and think also letters of other
scripts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

from rmcore._base.large import pieces

__all__ = ["ESCAPE", "RULES", "blank", "breakable", "restore", "sanitise"]

RULES = "sanitise 4"
"""Part of a prompt's version: which sequences are broken shapes the question."""

ESCAPE = "\u241b"
"""SYMBOL FOR ESCAPE: visible, rare in real text, and left alone by Unicode normalisation."""

# What shows nothing of its own: control characters, soft hyphen, joiners, bidirectional controls, variation selectors,
# fillers, tag characters, and marks that sit on the letter before them.
_UNSEEN = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_MARKS = r"\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
# Text that reads otherwise than it is stored, and text in tag characters, which shows nothing at all.
_TURNED = r"\u202a-\u202e\u2066-\u2069\U000e0001-\U000e007f"

# Patterns are matched against a *folded* copy of the text, character for character: what shows nothing is _U (or _V,
# where that alone is worth a sign), every kind of space is one, and a look-alike is what it looks like.
_U, _V = "\u200b", "\u202e"
_SAME = {
    "<": "＜﹤‹〈⟨❮≺ᐸ˂",
    ">": "＞﹥›〉⟩❯≻ᐳ˃",
    "/": "／∕⁄⧸",
    "|": "｜¦∣ǀ❘❙⏐│┃",
    "[": "［⁅⟦❲",
    "]": "］⁆⟧❳",
    "_": "＿▁﹍﹎﹏",
    ":": "：꞉ː∶",
    "~": "～∼˜〜",
    "!": "！ǃ",
    "◁": "◃⊲◀◂",
    "▷": "▹⊳▶▸",
    "\n": "\u2028\u2029\x85",
}
# Full width, small, mathematical, circled, letter-like, superscript, Roman, squared; and the long s.
_DRESSED = (
    r"\uff01-\uff5e\ufe50-\ufe6f\U0001d400-\U0001d7ff\u24b6-\u24e9\u2100-\u214f\u1d2c-\u1d6a\u2160-\u217f"
    r"\u02b0-\u02b8\u02e0-\u02e4\u1d78\u1d9b-\u1dbf\u2071\u207f\u2090-\u209c\U0001f130-\U0001f149\u017f"
)


def _folded() -> dict[int, str]:
    """What each character counts as, for those that count as another."""
    # Everything that counts as something else lies there.
    planes = (*range(0x3165), *range(0xFE00, 0x10000), *range(0x1D173, 0x1D800), *range(0x1F130, 0x1F14A))
    some = "".join(map(chr, (*planes, *range(0xE0000, 0xE1000))))
    plain = {ord(char): unicodedata.normalize("NFKC", char) for char in re.findall(f"[{_DRESSED}]", some)}
    found = {code: char for code, char in plain.items() if len(char) == 1 and " " < char <= "~"}
    found |= {ord(char): " " for char in re.findall(r"[^\S\r\n]", some)}
    for signs, sign in ((_UNSEEN + _MARKS, _U), (_TURNED, _V)):
        found |= {ord(char): sign for char in re.findall(f"[{signs}]", some)}
    return found | {ord(like): sign for sign, alike in _SAME.items() for like in alike}


_FOLDED = _folded()

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
# All repeats are bounded, and possessive wherever what follows cannot want what they took: time is linear in the text.
_T = rf"[{_U}{_V}]{{0,64}}+"  # between parts that touch
_S = rf"[ {_U}{_V}]{{0,64}}+"  # between parts on one line
_L = rf"[ \n\r{_U}{_V}]{{0,64}}+"  # between parts that a reader puts together
_W = rf"[\w{_U}{_V}]"  # of a name
_CAPITAL = "A-ZΑ-ΩА-Я"


def _disguised(word: str) -> str:
    """A pattern for ``word`` in any of its disguises."""
    return "(?i:" + _T.join(f"[{re.escape(c + _CONFUSABLE.get(c, ''))}]" for c in word) + ")"


_VERDICT, _THINK = _disguised("verdict"), _disguised("think")


def _any_of(words: str, numbered: str = "") -> str:
    """A pattern for any of ``words``, or any of ``numbered`` with digits behind it; case and invisible signs aside."""
    plain = [_T.join(map(re.escape, word)) for word in words.split()]
    return "(?i:" + "|".join(plain + [_T.join(word) + rf"{_T}(?:\d{_T}){{1,5}}+" for word in numbered.split()]) + ")"


# Tags that open or close reasoning, with attributes or without.
_REASONING = _any_of(
    "thinking thoughts thought reasoning reflection analysis scratchpad cot seed:think answer response"
)
# Names between brackets that are control tokens of some model and have no shape that tells them from other words.
_NAMES = _any_of(
    "s bos eos pad unk mask gmask cls sep sop eop sod eod eot eom eoh eoa image video audio speech global-img box "
    "ref quad reponame filename pr escape role 2mass img imgpad slice 用户",
    "unused extra reserved special pad unk image token ctrl",
)
_SQUARE = _any_of(
    "inst think start_header_id end_header_id multimodal toxicity=0", "unused extra_id_ reserved_ special_ control_"
)
# Types of C between angle brackets, the one kind of name with an underscore that code is full of.
_C_TYPES = r"(?:u?int(?:_fast|_least)?(?:8|16|32|64|ptr|max)|s?size|ptrdiff|wchar|char(?:8|16|32)|time|clock|off|pid)_t"


def _after_left(right: str, free: str) -> str:
    """What makes the angle bracket before it a control sequence.

    Args:
        right: the closing bracket.
        free: any character of a token that is none of it.
    """
    slash = rf"{_S}/?{_S}"
    kinds = [
        rf"{slash}\|{_S}(?!\|?{right}){free}{{1,80}}+{right}",  # <|im_start|>, <|turn>, <｜DSML｜invoke>
        rf"{_S}[^\s<>|&{ESCAPE}]{{1,64}}+{_S}\|{_S}{right}",  # <turn|>
        rf"{_S}\[{_S}(?=\w)[\w{_U}{_V}]{{1,80}}+{_S}\]{_S}{right}",  # <[begin_of_image]>
        rf"{_L}/?{_L}{_VERDICT}",  # <verdict>, < verdict foo>
        rf"{_L}/?{_L}(?:{_THINK}|{_REASONING})(?:{_L}/?{_L}{right}|[ \n]{free}{{0,80}}+{right})",  # <think type=x>
        rf"{_L}/?{_L}{_NAMES}{_L}/?{_L}{right}",  # <s>
        rf"{slash}(?!{_C_TYPES}{right})(?=[^_\s<>&]{{0,64}}+_){_W}{{2,64}}+{_S}/?{_S}{right}",  # <start_of_turn>
        rf"{slash}[{_CAPITAL}][{_CAPITAL}0-9{_U}{_V}]{{1,64}}+{_S}/?{_S}{right}",  # <EOT>
        rf"{slash}(?=[^\W\d]){_W}{{1,64}}+{_S}:{_S}{_W}{{1,64}}+{_S}/?{_S}{right}",  # <seed:bos>
    ]
    return "|".join(kinds)


_LEFT = "|".join(
    [
        _after_left(">", r"[^<>\n]"),
        rf"{_T}<{_S}/?{_S}(?i:SYS){_S}>{_T}>",  # <<SYS>>
        rf"{_T}<{_T}<[^<>\n]{{1,80}}+>{_T}>{_T}>",  # marker lines like our own
    ]
)
_SQUARE_LEFT = "|".join(
    [
        rf"{_S}/?{_S}[a-z]{{0,2}}+{_T}[{_CAPITAL}][{_CAPITAL}0-9_{_U}{_V}]{{1,64}}+{_S}\]",  # [INST], [gMASK]
        rf"{_S}/?{_S}{_SQUARE}{_S}\]",
        rf"{_S}\|{_S}[\w .:/{_U}{_V}-]{{1,64}}+\|{_S}\]",  # [|user|]
        rf"{_S}@{_W}{{1,64}}+@{_S}\]",  # [@BOS@]
        rf"\[{_S}(?i:[ABC]){_S}\]\]",  # verdicts of well-known judge prompts: [[A]]
        rf"{_T}\w{{1,16}}+{_T}~{_T}\[",  # [e~[
    ]
)
_SQUARE_RIGHT = "|".join(
    [
        rf"{_T}~?{_T}!{_T}~?{_T}\w{{1,16}}+{_T}[!~]?{_T}\[",  # ]~!b[, ]!p~[
        rf"{_S}[!~]{{1,2}}+{_S}\w{{1,16}}+{_S}[!~]?{_S}\]",  # ]~b]
        rf"{_T}<{_T}\][^\[\]<>\n]{{1,80}}+\[{_T}>{_T}\[",  # ]<]speech[>[
    ]
)
# Each alternative matches ONE character and looks ahead for the rest, so overlapping sequences are all found and the
# sign lands right behind a character that is not the sign: that is what makes `restore` exact.
_DANGEROUS = re.compile(
    "|".join(
        [
            rf"<(?={_LEFT})",
            rf"&(?=(?i:lt|\#0{{0,6}}+60|\#x0{{0,6}}+3c);?(?:{_after_left('[&>]', '[^<>&' + chr(92) + 'n]')}))",
            rf"\[(?={_SQUARE_LEFT})",
            rf"\](?={_SQUARE_RIGHT})",
            rf">(?=>{_T}[A-Z][A-Z0-9_]{{1,64}}+{_T}<<)",  # >>TITLE<<
            rf"\|(?=\|\|{_T}[A-Z][A-Z0-9_]{{1,64}}+{_T}\|\|\||(?:ENDOFTEXT|SPEAKER|NEWLINE)\|)",  # |||IP_ADDRESS|||
            rf"◁(?={_S}/?{_S}{_W}{{1,64}}+{_S}▷)",
            rf"/(?=(?i:no_?think|think_o(?:n|ff))(?!{_W}))|(?<!\S)/(?=(?i:think)(?!\S))",
            rf"{_V}(?!{ESCAPE})",
        ]
    )
)
_CHUNK, _REACH = 32_768, 4_096  # looked through at a time, so that other threads get their turn; longest look ahead
_SIGNS = re.compile(ESCAPE + "+")
_BLANK = re.compile(rf"[\s{_UNSEEN}{_MARKS}\u2800]*")


def sanitise(text: str, tokens: tuple[str, ...] = ()) -> tuple[str, int]:
    """``text`` with every control sequence broken, and how many were.

    A sign that the text itself holds is doubled (and not counted), so that :func:`restore` can tell them apart.

    Args:
        text: any text.
        tokens: control sequences besides those that have a known shape, such as the special tokens of the judge's
            tokenizer. Each has two characters or more, none of them :data:`ESCAPE`.
    """
    if ESCAPE in text:
        text = "".join(piece.replace(ESCAPE, ESCAPE * 2) for piece in pieces(text))
    folded = "".join(piece.translate(_FOLDED) for piece in pieces(text))
    found = set(_positions(_DANGEROUS, folded))
    own = _own(tokens)
    if own is not None:
        found.update(_positions(own, folded))
    parts, done = [], 0
    for position in sorted(found):
        parts += [text[done : position + 1], ESCAPE]
        done = position + 1
    return "".join(parts) + text[done:], len(found)


def _positions(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    """Where ``pattern`` is found."""
    for start in range(0, len(text), _CHUNK):
        for found in pattern.finditer(text, start, start + _CHUNK + _REACH):
            if found.start() >= start + _CHUNK:
                break
            yield found.start()


@lru_cache(maxsize=8)
def _own(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern for the tokens that have no known shape, ``None`` if there are none."""
    unknown = {token.translate(_FOLDED) for token in tokens if not sanitise(token)[1]}
    return re.compile(_tree(unknown)) if unknown else None


def _tree(words: Iterable[str]) -> str:
    """A pattern that matches the first character of each of ``words`` and looks ahead for the rest.

    Words are put together by their beginnings, so that thousands of them cost no more time than the longest.
    """
    by_first: dict[str, set[str]] = {}
    for word in words:
        by_first.setdefault(word[0], set()).add(word[1:])

    def rest(words: set[str]) -> str:
        if "" in words:
            return ""  # the shortest is enough: what begins with it is broken too
        groups: dict[str, set[str]] = {}
        for word in words:
            groups.setdefault(word[0], set()).add(word[1:])
        return "(?:" + "|".join(re.escape(first) + rest(group) for first, group in sorted(groups.items())) + ")"

    return "|".join(f"{re.escape(first)}(?={rest(group)})" for first, group in sorted(by_first.items()))


def breakable(tokens: Iterable[str]) -> tuple[str, ...]:
    """Those of ``tokens`` that a sign can break: not a single character, nor what holds the sign itself."""
    return tuple(token for token in tokens if len(token) > 1 and ESCAPE not in token)


def restore(text: str) -> str:
    """The text that :func:`sanitise` was given: ``restore(sanitise(text)[0]) == text`` for every text."""
    # A run of signs is the text's own, doubled, or those after one of ours, which makes the number odd.
    return _SIGNS.sub(lambda signs: ESCAPE * (len(signs.group()) // 2), text)


def blank(text: str) -> bool:
    """Whether a reader sees nothing: no character, or only white space, invisible characters and stray marks."""
    return _BLANK.fullmatch(text) is not None
