"""A constitution: principles a judge is to judge by, of which each pair is judged by a few (Bai et al. 2022).

Which ones is drawn from the seed and the pair's texts alone, without regard to their order: both orders of a pair are
judged by the same principles, a run that was killed draws them again, and a principle that is added to the file changes
only those pairs that draw it (the principles with the smallest hashes are taken).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.keys import pair_key

__all__ = ["Constitution"]

_LONGEST = 4_096


@dataclass(frozen=True, slots=True)
class Constitution:
    """Principles, and how many of them a pair is judged by.

    Args:
        principles: each a sentence or a few, no two equal, at most 4,096 characters. They are the caller's own words:
            the judge is told to go by them.
        per_question: how many are drawn for a pair, without replacement.
        seed: another seed, another draw.

    Raises:
        InputError: no principles, one that is empty, too long or there twice, or more to draw than there are.
    """

    principles: tuple[str, ...]
    per_question: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        given: object = self.principles
        if isinstance(given, str) or not isinstance(given, Sequence):
            reject("principles", type(given).__name__, "a sequence of texts")
        object.__setattr__(self, "principles", tuple(self.principles))
        for k, text in enumerate(self.principles):
            if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST:
                reject(f"principles[{k}]", repr(text)[:80], f"a text of 1 to {_LONGEST} characters")
        if len(set(self.principles)) != len(self.principles):
            twice = next(text for text in self.principles if self.principles.count(text) > 1)
            reject("principles", f"{twice[:60]!r} twice", "each principle once")
        count = self.per_question
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(self.principles):
            got = f"{count!r:.40} of {len(self.principles)} principles"
            reject("per_question", got, "a number from 1 to how many there are")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            reject("seed", repr(self.seed)[:40], "an integer")

    @classmethod
    def from_file(cls, path: str | Path, *, per_question: int = 1, seed: int = 0) -> Constitution:
        """From a UTF-8 text file with a principle a line; blank lines and lines that begin with ``#`` are skipped.

        Raises:
            InputError: it is not UTF-8, or as for the class.
            OSError: the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"constitution {Path(path).name}: not UTF-8: {error.reason} at byte {error.start}"
            ) from None
        if "\0" in text:
            reject(f"constitution {Path(path).name}", "NUL characters, as UTF-16 text has them", "UTF-8 text")
        lines = text.split("\n")  # not at what else Unicode ends lines with: a principle may hold it
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        try:
            return cls(tuple(found), per_question, seed)
        except InputError as error:
            raise InputError(f"constitution {Path(path).name}: {error}") from None

    def drawn(self, prompt: Prompt, first: Response, second: Response) -> tuple[str, ...]:
        """The principles that a pair is judged by, in the order of the list; the same with the responses exchanged.

        Raises:
            InputError: the texts are not texts.
        """
        if self.per_question == len(self.principles):
            return self.principles
        pair = min(pair_key(prompt, first, second), pair_key(prompt, second, first))

        def rank(text: str) -> bytes:
            content = "\0".join(["constitution", str(self.seed), pair, text])
            return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()

        chosen = set(sorted(self.principles, key=rank)[: self.per_question])
        return tuple(text for text in self.principles if text in chosen)

    def longest(self) -> tuple[str, ...]:
        """As many of the longest principles as a pair is judged by: what a question needs room for at most."""
        return tuple(sorted(self.principles, key=len, reverse=True)[: self.per_question])
