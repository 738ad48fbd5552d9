"""What can be counted of critiques without a model: length, sections, repeats, and whether they say what was decided.

CriticBench (Lin et al. 2024) measures feedback by models; this is the part that needs none. A *contradiction* is a
comparison whose own words prefer the response that its verdict did not: "the first response is better", and the second
was chosen. Only plain statements of that kind are read; most critiques make none, and those are ``silent``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rmcore._base.quantile import quantiles
from rmcore.judge.critics.critique import junk_reason
from rmcore.judge.keys import CRITIC_VERSION
from rmcore.judge.store.ledger import Unreadable, VerdictLedger

__all__ = ["CritiqueStats", "Said", "critique_stats", "sections", "stated_preference", "stored_critique_stats"]

_WHICH = dict.fromkeys(("first", "1", "one", "a"), "first") | dict.fromkeys(("second", "2", "two", "b"), "second")
_RESPONSE = (
    r"(?:the\s+)?(?:(?P<n1>first|second)\s+(?:response|answer|one)"
    r"|(?:response|answer)\s+(?P<n2>1|2|one|two|a|b)\b)"
)
_BETTER = r"better|stronger|superior|preferable|preferred|more\s+(?:accurate|helpful|correct|complete|useful|relevant)"
_WORSE = r"worse|weaker|inferior|less\s+(?:accurate|helpful|correct|complete|useful|relevant)"
_IS = r"(?:is|was|seems|appears|would\s+be)"
_STATEMENT = re.compile(
    rf"\b{_RESPONSE}\s+{_IS}\s+(?:clearly\s+|overall\s+|slightly\s+|much\s+|far\s+|therefore\s+|the\s+)?"
    rf"(?:(?P<better>{_BETTER})|(?P<worse>{_WORSE}))\b",
    re.IGNORECASE,
)
_PREFER = re.compile(rf"\b(?:i|we)\s+(?:would\s+)?(?:prefer|choose|pick)\s+{_RESPONSE}", re.IGNORECASE)
# "It is not that the first response is better", "If the first response were": no statement.
_DOUBT = re.compile(
    r"\b(?:not|n't|neither|nor|no|if|whether|while|although|though|unless)\b[^.!?\n]{0,40}$", re.IGNORECASE
)
_SECTION = re.compile(r"^\s{0,3}(?:#{1,6}\s+\S|\*\*[^*\n]{1,80}\*\*\s*:?\s*$|[A-Z][\w /-]{1,40}:\s*$)", re.MULTILINE)
_ITEM = re.compile(r"^\s{0,6}(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)
_WORDS = re.compile(r"\w+", re.UNICODE)
_BOUND = 65_536

Said: TypeAlias = Literal["first", "second", "both"]


def stated_preference(critique: str) -> Said | None:
    """Which response a comparison's words say is better: ``both`` where it says one and the other, None for neither."""
    found: set[str] = set()
    text = critique[:_BOUND]
    for statement in _STATEMENT.finditer(text):
        if _DOUBT.search(text, max(0, statement.start() - 60), statement.start()):
            continue
        which = _WHICH[(statement["n1"] or statement["n2"]).lower()]
        if statement["worse"]:
            which = "second" if which == "first" else "first"
        found.add(which)
    for statement in _PREFER.finditer(text):
        found.add(_WHICH[(statement["n1"] or statement["n2"]).lower()])
    if len(found) == 2:
        return "both"
    return "first" if found == {"first"} else "second" if found == {"second"} else None


def sections(critique: str) -> int:
    """Headings and list items: how far a critique is set out in parts."""
    text = critique[:_BOUND]
    return len(_SECTION.findall(text)) + len(_ITEM.findall(text))


@dataclass
class CritiqueStats:
    """Counts over critiques; :meth:`add` takes them one at a time.

    Attributes:
        critiques: with a text.
        empty: calls that were answered without one.
        words, sections: of each.
        junk: by reason (:func:`~rmcore.judge.critics.critique.junk_reason`).
        stated: of comparisons with a win or a loss, what their words say beside the verdict: ``agrees``,
            ``contradicts``, ``both`` or ``silent``.
        contradictions: names of those that contradict, the first hundred.
        repeated: critiques whose words were there before, case and punctuation aside.
    """

    critiques: int = 0
    empty: int = 0
    words: list[int] = field(default_factory=list)
    sections: list[int] = field(default_factory=list)
    junk: Counter[str] = field(default_factory=Counter)
    stated: Counter[str] = field(default_factory=Counter)
    contradictions: list[str] = field(default_factory=list)
    repeated: int = 0
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def add(self, text: str, preference: float | None = None, name: str = "") -> None:
        """Count one.

        Args:
            text: the critique.
            preference: the verdict beside it, from the side of the response shown first; None for a critique of one
                response, or without a verdict.
            name: for :attr:`contradictions`.
        """
        words = _WORDS.findall(text.casefold())
        if not words:
            self.empty += 1
            return
        self.critiques += 1
        self.words.append(len(words))
        self.sections.append(sections(text))
        key = hashlib.sha256(" ".join(words).encode("utf-8", "surrogatepass")).digest()
        self.repeated += key in self._seen
        self._seen.add(key)
        junk = junk_reason(text)
        if junk:
            self.junk[junk] += 1
        if preference is None or preference == 0:
            return
        said, decided = stated_preference(text), "first" if preference > 0 else "second"
        how = {None: "silent", "both": "both", decided: "agrees"}.get(said, "contradicts")
        self.stated[how] += 1
        if how == "contradicts" and len(self.contradictions) < 100:
            self.contradictions.append(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "critiques": self.critiques,
            "empty": self.empty,
            "words": _spread(self.words),
            "sections": _spread(self.sections),
            "repeated": self.repeated,
            "junk": dict(self.junk.most_common()),
            "stated": {name: self.stated[name] for name in ("agrees", "contradicts", "both", "silent")},
            "contradictions": self.contradictions,
        }


def critique_stats(critiques: Iterable[tuple[str, float | None, str]]) -> CritiqueStats:
    """Of (text, preference, name) as :meth:`CritiqueStats.add` takes them."""
    stats = CritiqueStats()
    for text, preference, name in critiques:
        stats.add(text, preference, name)
    return stats


def stored_critique_stats(
    ledger: VerdictLedger, *, model: str | None = None, unreadable: Unreadable | None = None
) -> dict[str, CritiqueStats]:
    """Of every answered call of a store, by the model that answered; canaries are left out."""
    found: dict[str, CritiqueStats] = {}
    for call in reversed(ledger.calls(model=model, unreadable=unreadable)):
        if call.canary or not call.replied:
            continue
        preference = None if call.template.startswith(CRITIC_VERSION) else call.preference
        text = ledger.texts(call)["critique"]
        found.setdefault(call.answering, CritiqueStats()).add(text, preference, call.key)
    return found


def _spread(values: list[int]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "p50": None, "p95": None}
    p50, p95 = quantiles(values, (0.5, 0.95))
    return {"mean": sum(values) / len(values), "p50": p50, "p95": p95}
