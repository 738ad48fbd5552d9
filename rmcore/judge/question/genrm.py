"""How generative reward models of NeMo-Gym's kind are asked and answer: roles of their own, and scores as JSON.

The conversation comes as it is, then, in roles that the model's chat template knows, an optional ``principle`` and the
responses as ``response_1`` and ``response_2``. The answer holds a JSON object (perhaps under ``overall``)::

    {"score_1": 1 to 5, "score_2": 1 to 5, "ranking": 1 (the first is much better) to 6 (the second is)}

The object ends the answer. A reply without one, or that goes on in words behind it, is no verdict. It is never filled
up: a missing score is not 3, no ranking not 3.5.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt, Response, canonical_prompt, canonical_response, message_text, response_text
from rmcore.judge.question.around import is_plain
from rmcore.judge.question.cut import Cut, ends
from rmcore.judge.question.sanitise import RULES, sanitise
from rmcore.judge.question.verdict import Labels, is_tail, parse_verdict

__all__ = ["GENRM_VERSION", "GenRMScores", "genrm_messages", "read_scores", "scores_of"]

GENRM_VERSION: Final = f"genrm-1, {RULES}"
"""Of the form of the question, part of a store's keys."""

_NUMBER = re.compile(r"\s*\d{1,3}(?:\.\d{1,9})?\s*", re.ASCII)
_NO_LABELS = Labels("\0win", "\0loss", "\0tie")  # in no reply: its final answer is read, and no verdict of ours in it
_GONE = "\n[… {} characters are not shown …]\n"
_TIE_BREAK = 10.0
_OWN_ROLES = ("principle", "response_1", "response_2")


@dataclass(frozen=True, slots=True)
class GenRMScores:
    """What a generative reward model says of two responses: helpfulness 1 to 5 each, ranking 1 to 6."""

    score_1: float
    score_2: float
    ranking: float

    @property
    def preference(self) -> float:
        """J in [−1, 1] from the first response's side.

        The difference of the scores over its range; equal scores are decided by the ranking, which then counts for a
        quarter at most, as much as one step of the scores.
        """
        if self.score_1 != self.score_2:
            return (self.score_1 - self.score_2) / 4
        return (3.5 - self.ranking) / _TIE_BREAK


def scores_of(preference: float) -> GenRMScores:
    """The scores that say ``preference`` (J in [−1, 1]): as far apart, around 3, since their level is not known."""
    return GenRMScores(3 + 2 * preference, 3 - 2 * preference, 3.5 - 2.5 * preference)


def genrm_messages(
    prompt: Prompt,
    first: Response,
    second: Response,
    principle: str = "",
    cut: Cut | None = None,
    tokens: tuple[str, ...] = (),
) -> tuple[list[dict[str, str]], int]:
    """The messages of one question, and how many control sequences were broken up in the texts and the principle.

    ``tokens`` are broken besides those that are known by their shape.

    Raises:
        InputError: the texts are refused; or a prompt has a message in a role that only a question has.
    """
    cut = cut or Cut()
    turns = canonical_prompt(prompt)
    spoken = [("user", turns)] if isinstance(turns, str) else [(turn["role"], message_text(turn)) for turn in turns]
    for k, (role, _) in enumerate(spoken):
        if role.lower() in _OWN_ROLES:
            reject(f"prompt[{k}].role", repr(role), f"a role besides {', '.join(_OWN_ROLES)}, which a question has")
    if cut.prompt:  # of several messages the longest gives way
        longest = max(range(len(spoken)), key=lambda k: len(spoken[k][1]))
        spoken[longest] = (spoken[longest][0], _shortened(spoken[longest][1], cut.prompt))
    spoken += [("principle", principle)] if principle else []
    for role, response, gone in (("response_1", first, cut.first), ("response_2", second, cut.second)):
        spoken.append((role, _shortened(response_text(canonical_response(response)), gone)))
    messages, broken = [], 0
    for role, text in spoken:
        clean, count = sanitise(text, tokens)
        messages.append({"role": role, "content": clean})
        broken += count
    return messages, broken


def read_scores(choice: Mapping[str, object]) -> tuple[GenRMScores | None, str, str]:
    """The scores of a reply, or ``None`` and why there are none; and the final answer.

    Only the final answer counts, as with every judge (:func:`~rmcore.judge.question.verdict.parse_verdict`), and
    nothing but white space, brackets and the like may follow its scores. Objects that contradict each other, and scores
    whose ranking says the opposite, are ``conflicting``. Total.
    """
    parsed = parse_verdict(choice, _NO_LABELS)
    if parsed.reason != "unparsable":
        return None, parsed.reason, parsed.critique
    scored = [(scores, end) for value, end in _objects(parsed.critique) if (scores := _scores(value)) is not None]
    found = {scores for scores, _ in scored}
    if len(found) <= 1 and not (scored and _is_meant(parsed.critique, scored[-1][1])):
        return None, "unparsable", parsed.critique
    if len(found) > 1:
        return None, "conflicting", parsed.critique
    (scores,) = found
    if (scores.score_1 - scores.score_2) * (3.5 - scores.ranking) < 0:
        return None, "conflicting", parsed.critique
    return scores, "", parsed.critique


def _is_meant(answer: str, end: int) -> bool:
    return is_tail(answer, end) and is_plain(answer, end, end)


def _scores(value: Any) -> GenRMScores | None:
    """Of an object that has all three, each a number in its range."""
    if not isinstance(value, dict):
        return None
    overall = value.get("overall")
    fields = overall if isinstance(overall, dict) else value
    numbers = [_number(fields.get(name)) for name in ("score_1", "score_2", "ranking")]
    first, second, ranking = numbers
    if first is None or second is None or ranking is None:
        return None
    if not (1 <= first <= 5 and 1 <= second <= 5 and 1 <= ranking <= 6):
        return None
    return GenRMScores(first, second, ranking)


def _number(value: object) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """The object; None where a name is there twice, with two values: nobody knows which is meant."""
    known = dict(fields)
    return known if all(known[name] == value for name, value in fields) else None


def _objects(text: str) -> list[tuple[Any, int]]:
    """The outermost JSON objects in ``text``, wherever they stand, and where each ends."""
    decoder, found, at = json.JSONDecoder(object_pairs_hook=_once), list[tuple[Any, int]](), text.find("{")
    tries = 0
    while at >= 0 and tries < 64:  # a text full of braces costs no more than that
        try:
            value, end = decoder.raw_decode(text, at)
            found.append((value, end))
        except (ValueError, RecursionError):
            end, tries = at + 1, tries + 1
        at = text.find("{", end)
    return found


def _shortened(text: str, gone: int) -> str:
    if not gone:
        return text
    head, tail = ends(text, gone)
    return head + _GONE.format(len(text) - len(head) - len(tail)) + tail
