"""One score call under way: its arguments, its plan, what is known so far, and the result it becomes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmcore._base.clock import Clock
from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt
from rmcore.engine.groups import GroupScore, GroupScores, PairDecision
from rmcore.engine.judging import Asked, Asking
from rmcore.engine.overlap import StoppedError
from rmcore.engine.pair_table import PairMatrices, Where
from rmcore.engine.routing import Reservation
from rmcore.engine.usage import Overlap, Span, tally_by_judge
from rmcore.head.frozen import FrozenHead
from rmcore.judge.base import JudgeUsage, Pair
from rmcore.model.backbone import EncodingStats
from rmcore.model.reward_model import Progress
from rmcore.model.text import EncodedText
from rmcore.ops import reference

__all__ = ["MicroBatch", "Reserved", "ScoreCall", "micro_batches"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Consecutive groups that are encoded and scored together.

    Attributes:
        first: number of the first group.
        first_row: of its hidden rows among those of the whole call.
        sizes: K of each group.
        tokens: of all its texts together.
        tokens_before: of the groups before it.
    """

    first: int
    first_row: int
    sizes: list[int]
    tokens: int = 0
    tokens_before: int = 0

    @property
    def stop(self) -> int:
        """One past the number of the last group."""
        return self.first + len(self.sizes)


def micro_batches(sizes: Sequence[int], encoded: Sequence[Sequence[EncodedText]], tokens: float) -> list[MicroBatch]:
    """Cut the groups, in their order, into as few parts as have about ``tokens`` tokens each, all of about equal size.

    In their order, not sorted by length: a router that works part by part must not see the long groups first, or its
    budget would go to them. Of equal size, so that no small rest runs at the price of a full batch.
    """
    counts = [sum(len(text) for text in group) for group in encoded]
    total = sum(counts)
    parts = max(1, math.ceil(total / tokens))
    result: list[MicroBatch] = []
    first = first_row = row = before = done = 0
    mark = 1  # the next of the parts - 1 marks that cut the tokens into equal shares
    for group, count in enumerate(counts):
        done += count
        row += len(encoded[group])
        if group + 1 == len(counts) or (mark < parts and done * parts >= total * mark):
            result.append(MicroBatch(first, first_row, list(sizes[first : group + 1]), done - before, before))
            first, first_row, before = group + 1, row, done
            mark = done * parts // max(total, 1) + 1
    return result


@dataclass
class Reserved:
    """A budgeted router's reservation and the questions it is for."""

    reservation: Reservation
    asked: Asked | None = None

    @property
    def usage(self) -> JudgeUsage | None:
        """What they cost; None if nobody knows, or if it never came to asking."""
        return None if self.asked is None else self.asked.usage


@dataclass
class ScoreCall:
    """The state of one score call. The working thread writes; the judge's loop only reports progress."""

    sizes: list[int]
    prompts: Sequence[Prompt] | None
    responses: Sequence[Sequence[str]] | None
    clock: Clock
    head: FrozenHead
    """The engine's head when the call began: an update meanwhile is for the next call."""
    progress: Progress | None = None
    encoding: EncodingStats | None = None
    hidden: Tensor | None = None
    deadline: float | None = None
    asking: Asking | None = None
    encoded: list[list[EncodedText]] = field(default_factory=list)
    matrices: list[PairMatrices] = field(default_factory=list)
    identical: list[Where] = field(default_factory=list)
    unaffordable: list[Where] = field(default_factory=list)
    routed: list[tuple[Where, int]] = field(default_factory=list)
    kept: list[Tensor] | None = None
    """Hidden rows of each micro-batch, where a learner will want them."""
    reservations: list[Reserved] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    micro_batches: int = 1
    why_no_overlap: str = ""
    unwanted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.started = self.clock.now()

    # -- while it runs -----------------------------------------------------------------------------------------------

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time inside as the stage's; raise StoppedError instead if nobody wants the result any more."""
        self.stop_if_unwanted()
        began = self.clock.now()
        try:
            yield
        finally:
            self.spans.setdefault(stage, []).append((began, self.clock.now()))

    def stop_if_unwanted(self) -> None:
        """Raise StoppedError if the caller was cancelled or the asking has failed."""
        if self.unwanted.is_set() or (self.asking is not None and self.asking.broken.is_set()):
            raise StoppedError

    def encoding_progress(self, part: MicroBatch) -> Progress:
        """A callback for one micro-batch that reports in terms of all, and stops the backbone between two passes."""
        total = sum(sum(len(text) for text in group) for group in self.encoded)

        def update(stage: str, done: int, of: int) -> None:
            self.stop_if_unwanted()
            if self.progress is not None:
                # Equal texts are encoded once, so the backbone may have less to do than the plan says.
                self.progress(stage, part.tokens_before + (part.tokens * done // of if of else part.tokens), total)

        return update

    def report_answers(self, done: int, asked: int) -> None:
        """Called on the judge's loop after each of its calls."""
        if self.progress is not None:
            self.progress("judging", done, asked)

    def reserve(self, reservation: Reservation) -> Reserved:
        """Note a reservation, so that it is settled whatever happens."""
        self.reservations.append(Reserved(reservation))
        return self.reservations[-1]

    def ask(self, where: list[Where], preference: Tensor, uncertainty: Tensor) -> Asked:
        """Hand pairs to the judge, with the head's p̃ and u of each, both (Q,); raises InputError without texts."""
        if not where:
            return Asked([], usage=JudgeUsage())
        if self.prompts is None or self.responses is None:
            reject("prompts, responses", "None", f"texts, since {len(where)} pairs need the judge")
        assert self.asking is not None
        questions = [
            Pair(
                self.prompts[group],
                self.responses[group][i],
                self.responses[group][j],
                id=f"{group}:{i}:{j}",
                uncertainty=u,
                preference=p if math.isfinite(p) else None,
                deadline=self.deadline,
            )
            for (group, i, j), p, u in zip(where, preference.tolist(), uncertainty.tolist(), strict=True)
        ]
        asked = self.asking.ask(questions)
        self.routed += zip(where, asked.slots, strict=True)
        return asked

    # -- when all is known -------------------------------------------------------------------------------------------

    def result(self, epsilon: float, *, one_order: bool) -> GroupScores:
        """Put the verdicts in: p̃ = J where there is one, the head's elsewhere."""
        verdicts = self.asking.verdicts if self.asking is not None else []
        decisions: list[list[PairDecision]] = [[] for _ in self.matrices]
        masks = [torch.zeros_like(m.logit, dtype=torch.bool) for m in self.matrices]
        for group, i, j in self.identical:
            decisions[group].append(PairDecision(i, j, "identical"))
        for group, i, j in self.unaffordable:
            masks[group][i, j] = masks[group][j, i] = True
            decisions[group].append(PairDecision(i, j, "judge_failed", "budget"))
        for (group, i, j), slot in self.routed:
            verdict = verdicts[slot]
            masks[group][i, j] = masks[group][j, i] = True
            if verdict.preference is None:
                decisions[group].append(PairDecision(i, j, "judge_failed", verdict.reason, verdict))
                continue
            self.matrices[group].put(i, j, float(reference.verdict_logit(verdict.preference, epsilon)))
            decisions[group].append(PairDecision(i, j, "judge", verdict.reason, verdict))
        groups = tuple(
            GroupScore(
                preference=m.preference,
                uncertainty=m.uncertainty,
                logit=m.logit,
                variance=m.variance,
                routed=mask,
                decisions=tuple(sorted(decided, key=lambda d: (d.i, d.j))),
                one_order=one_order,
            )
            for m, mask, decided in zip(self.matrices, masks, decisions, strict=True)
        )
        overlap = self._overlap()
        seconds = {stage: math.fsum(end - begin for begin, end in spans) for stage, spans in self.spans.items()}
        if verdicts:
            seconds["judge"] = overlap.judge_s
        seconds["total"] = self.clock.now() - self.started
        return GroupScores(
            groups,
            seconds,
            self.encoding,
            tally_by_judge(verdicts),
            overlap,
            self.asking.unaccounted if self.asking is not None else 0,
            torch.cat(self.kept) if self.kept is not None else None,
        )

    def _overlap(self) -> Overlap:
        busy = [span for spans in self.spans.values() for span in spans]
        judging = self.asking.spans if self.asking is not None else []
        return Overlap.of(judging, busy, micro_batches=self.micro_batches, why_not=self.why_no_overlap)
