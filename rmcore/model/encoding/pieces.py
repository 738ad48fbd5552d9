"""Where a long text may be cut so that the tokens of its pieces are the tokens of the whole.

A tokenizer works on a text in one call, and its tokens become Python objects in another: of ten megabytes, a tenth of a
second for the ids and more than one for the offsets, in which no other thread of the process gets a turn. Pieces keep
each call short.

A cut goes before a single space that stands between two ASCII letters, and only for a tokenizer of which it is known
that nothing it does reaches over such a place:

1. No added token has a letter beside a space, or takes in spaces beside a letter of its own.
2. The normalizer changes characters one by one, or within a letter and its marks.
3. The pre-tokenizer decides by the characters around a place, and either splits there (GPT-2's way and its successors',
   BERT's, SentencePiece's with words split), or the model is a BPE none of whose tokens has a letter followed by a
   space (Llama 2, Gemma): a merge over the place would make such a token, and merges beside it do not depend on it.
4. The post-processor adds nothing to a text by itself, and moves no offset because of where a text begins.

Anything else, a pattern that is not in the list below for one, is tokenised whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rmcore._base.large import LARGE, PIECE

__all__ = ["pieces_of", "splits_at_spaces"]

_PLACE = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_BESIDE = re.compile("[A-Za-z] | [A-Za-z]")
_OVER = re.compile("[A-Za-z][ \u2581\u0120]")  # a space as SentencePiece and GPT-2 write it

# Alternatives of the patterns in use. None matches a letter and then a space, or looks further than at one character
# that is not white space; what matches " a" begins at the space. So each splits such a place, wherever a match began.
_LETTERS = frozenset(
    {
        r" ?\p{L}+",
        r"\s?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    }
)
_OTHERS = frozenset(
    {
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"'(?:[sdmt]|ll|ve|re)",
        r"'(?i:[sdmt]|ll|ve|re)",
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        r"\p{N}",
        r"\p{N}+",
        r" ?\p{N}+",
        r" ?\p{N}",
        r"\p{N}{1,3}",
        r"\s*[\r\n]",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
        r" ?[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[0-9]",
        r"\d",
        r"\d+",
        r"\d{1,3}",
    }
)


def pieces_of(text: str, cuttable: bool) -> Iterator[tuple[int, str]]:
    """The pieces of a text, and at which character each begins; one, the text, if it is not long or not ``cuttable``.

    Args:
        text: any.
        cuttable: what :func:`splits_at_spaces` says of the tokenizer.
    """
    start = 0
    while cuttable and len(text) - start >= LARGE:
        found = _PLACE.search(text, start + PIECE // 2)
        if found is None:
            break
        yield start, text[start : found.start()]
        start = found.start()
    yield start, text[start:] if start else text


def splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a text's tokens are those of its pieces, cut before single spaces between letters.

    Args:
        tokenizer: a Hugging Face tokenizer; of a slow one nothing is known.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        return False
    try:
        normalizer, before, after = (
            _state(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer", "post_processor")
        )
    except Exception:  # a plain one, of parts written in Python, which cannot be looked into
        return False
    steps = _steps(normalizer)
    local = all(map(_keeps_apart, tokenizer.added_tokens_decoder.values())) and all(map(_is_local, steps))
    if not local or not all(map(_adds_nothing, _steps(after))):
        return False
    kinds = [_splits(step, any(map(_writes_space, steps))) for step in _steps(before)]
    if None in kinds:
        return False
    return True in kinds or _merges_stop(backend)


def _state(component: Any) -> Mapping[str, Any] | None:
    """A part of a tokenizer as its JSON has it."""
    if component is None:
        return None
    found = json.loads(component.__getstate__())
    if not isinstance(found, dict):
        raise TypeError(type(found).__name__)
    return found


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The parts of a sequence, and of sequences in it; of None none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner: list[Mapping[str, Any]] = next(
        (part[key] for key in ("normalizers", "pretokenizers", "processors") if key in part), []
    )
    return [step for one in inner for step in _steps(one)]


def _keeps_apart(token: Any) -> bool:
    text = token.content
    seen = text.replace("\u2581", " ") if token.normalized else text
    if not text or _BESIDE.search(seen) or token.single_word:
        return False
    return not ((token.rstrip and text[-1].isalpha()) or (token.lstrip and text[0].isalpha()))


def _writes_space(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer is SentencePiece's: a space becomes U+2581."""
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "\u2581"


def _is_local(step: Mapping[str, Any]) -> bool:
    kinds = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled")
    return step["type"] in kinds or _writes_space(step)


def _adds_nothing(step: Mapping[str, Any]) -> bool:
    if step["type"] in ("ByteLevel", "RobertaProcessing"):
        # An offset then begins before the first space of a text, and behind that of others.
        return not (step.get("trim_offsets", True) and step.get("add_prefix_space", True))
    return step["type"] in ("TemplateProcessing", "BertProcessing")


def _splits(step: Mapping[str, Any], written: bool) -> bool | None:
    """Whether a pre-tokenizer splits before the space; None if it may do anything.

    ``written``: the space is U+2581 by then.
    """
    kind = step["type"]
    if kind == "Metaspace":
        return bool(step.get("split", True)) if step.get("replacement") == "\u2581" else None
    if kind in ("Digits", "Punctuation"):
        return False
    if kind == "Split":
        pattern = step["pattern"]
        if "String" in pattern:
            return False if written and pattern["String"] == " " else None
        alternatives = _alternatives(pattern.get("Regex", ""))
        plain = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
        if written or not plain or not alternatives <= _LETTERS | _OTHERS:
            return None
        return bool(alternatives & _LETTERS)
    if written:
        return None
    if kind == "ByteLevel":
        return bool(step.get("use_regex", True))
    return True if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit") else None


def _alternatives(pattern: str) -> frozenset[str]:
    """What stands between the bars of a pattern that are in no group and in no set of characters."""
    found, part, depth, within, at = set(), "", 0, False, 0
    while at < len(pattern):
        character = pattern[at]
        if character == "|" and not depth and not within:
            found.add(part)
            part = ""
            at += 1
            continue
        if character == "\\":
            part += pattern[at : at + 2]
            at += 2
            continue
        within = character == "[" or (within and character != "]")
        if not within:
            depth += (character == "(") - (character == ")")
        part += character
        at += 1
    return frozenset({*found, part})


def _merges_stop(backend: Any) -> bool:
    """Whether a model is a BPE without a token that has a letter followed by a space."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or getattr(model, "ignore_merges", True):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    vocabulary = backend.get_vocab(with_added_tokens=False)
    letters = (chr(code + case) for code in range(26) for case in (65, 97))
    return all(letter in vocabulary for letter in letters) and not any(_OVER.search(token) for token in vocabulary)
