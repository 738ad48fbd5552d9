"""One score call under way: its groups, what is known so far, and the result it becomes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rmcore._base import tracing
from rmcore._base.clock import Clock
from rmcore._base.errors import reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response
from rmcore.engine.call_groups import CallGroups, errors_by_group
from rmcore.engine.groups import GroupScores
from rmcore.engine.judging import JudgeQueue, Submission
from rmcore.engine.micro_batches import MicroBatch
from rmcore.engine.overlap import StoppedError
from rmcore.engine.pair_table import PairTable
from rmcore.engine.scored_part import ScoredPart
from rmcore.engine.usage import Overlap, Span, tally_by_judge
from rmcore.head.estimators import PairEstimator, VarianceKind
from rmcore.head.frozen import FrozenHead
from rmcore.judge.base import JudgeUsage, Pair
from rmcore.model.critiques import merged_texts
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.reward_model import RewardModel
from rmcore.model.signal import PairSignal, pair_signals
from rmcore.model.text import EncodedText, TextLimit
from rmcore.ops.dispatch import Backend

__all__ = ["ScoreCall"]


@dataclass
class ScoreCall:
    """The state of one score call. The working thread writes; the judge's loop only reports progress."""

    clock: Clock
    head: FrozenHead
    """The engine's head when the call began: an update meanwhile is for the next call."""
    groups: CallGroups
    model: RewardModel | None = None
    nonfinite: Literal["raise", "route"] = "raise"
    backend: Backend = "auto"
    estimator: PairEstimator | None = None
    """What scores pairs in the head's place."""
    variance: VarianceKind | None = None
    """Which part of the variance u is made of."""
    head_version: int | None = None
    """Which version of a head that changes ``head`` is."""
    novelty: bool = False
    """Whether the head is asked how far each response is from its training data."""
    progress: Progress | None = None
    limit: TextLimit | None = None
    """Of this call's texts, instead of the backbone's own."""
    encoding: EncodingStats | None = None
    deadline: float | None = None
    queue: JudgeQueue | None = None
    encoded: list[list[EncodedText]] = field(default_factory=list)
    parts: list[ScoredPart] = field(default_factory=list)
    kept: list[Tensor] | None = None
    """Hidden rows of each micro-batch, where a learner will want them."""
    spans: dict[str, list[Span]] = field(default_factory=dict)
    micro_batches: int = 1
    why_no_overlap: str = ""
    unwanted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.started = self.clock.now()

    def encode(self) -> None:
        """Encode every group's texts."""
        assert self.model is not None
        model, groups = self.model, self.groups
        settings: dict[str, Any] = {"orders": groups.orders, "limit": self.limit}
        if groups.design != "all" and model.mode == "concat":
            settings["compared"] = groups.design_of
        prompts, responses = groups.texts()
        critiques = groups.critiques
        with self.time("backbone"):
            if groups.on_error == "raise":
                self.encoded = model.encode_groups(prompts, responses, critiques=critiques, **settings)
                return
            model.notice_critiques(critiques is not None)
            left = iter(critiques or ())

            def encode(prompt: Prompt, group: Sequence[Response]) -> None:
                own: dict[str, Any] = {} if critiques is None else {"critiques": next(left)}
                self.encoded.append(model.encode_group(prompt, group, **own, **settings))

            errors = errors_by_group(encode, prompts, responses)
        groups.take_out(errors)

    # -- while it runs -----------------------------------------------------------------------------------------------

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time inside as the stage's; raise StoppedError instead if nobody wants the result any more."""
        self.stop_if_unwanted()
        began = self.clock.now()
        try:
            with tracing.span(f"rmcore.{stage}"):
                yield
        finally:
            self.spans.setdefault(stage, []).append((began, self.clock.now()))

    def stop_if_unwanted(self) -> None:
        """Raise StoppedError if the caller was cancelled or the judging has failed."""
        if self.unwanted.is_set() or (self.queue is not None and self.queue.broken.is_set()):
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

    def find_silent(self, part: ScoredPart) -> None:
        """Mark a part's pairs whose inputs tell nothing: different responses with equal inputs, unread texts."""
        table, mode = part.table, self.head.config.mode
        if self.encoded:
            texts = [text for k in part.groups for text in self.encoded[k]]
            states = self.groups.states_of(part.groups)
            if states is not None:
                texts = merged_texts(texts, states.flat.tolist())
            signal = pair_signals(texts, table.layout.pair_rows(mode, one_order=self.groups.one_order), mode)
            if table.alike is not None:  # states may be the same where texts are not: a window's, the first token's
                signal = torch.where(signal == PairSignal.PRESENT, table.alike.cpu().to(torch.uint8), signal)
            if any(unread := [text.unread for text in texts]):
                mask = torch.tensor(unread)
                table.measures = {name: of.masked_fill(mask, torch.nan) for name, of in table.measures.items()}
                if table.row_novelty is not None:
                    table.row_novelty = table.row_novelty.masked_fill(mask.to(table.row_novelty.device), torch.nan)
        elif self.groups.responses is not None and mode == "difference":
            # Hidden rows from elsewhere: v = ‖U(φ_i − φ_j)‖² is 0 where they are equal; answers' own spread is not.
            nothing = table.logit == 0 if "aleatoric" in table.parts else table.variance == 0
            signal = nothing.cpu().to(torch.uint8) * int(PairSignal.EQUAL_INPUTS)
        elif self.groups.responses is not None and table.alike is not None:
            signal = table.alike.cpu().to(torch.uint8) * int(PairSignal.EQUAL_INPUTS)
        else:
            return
        table.silence(signal)

    def submit(self, part: ScoredPart, rows: Tensor, preference: Tensor, uncertainty: Tensor) -> None:
        """Hand rows (n,) of a part to the judge, with the head's p̃ and u of each; raises InputError without texts."""
        part.rows = rows.tolist()
        if not part.rows:
            part.submission = Submission([], usage=JudgeUsage())
            return
        groups = self.groups
        if groups.prompts is None or groups.responses is None:
            reject("prompts, responses", "None", f"texts, since {len(part.rows)} pairs need the judge")
        assert self.queue is not None
        layout = part.table.layout
        columns = (layout.group[rows], layout.i[rows], layout.j[rows], preference, uncertainty)
        questions = []
        for number, i, j, p, u in zip(*(column.tolist() for column in columns), strict=True):
            group = part.groups[number]
            questions.append(
                Pair(
                    groups.prompts[group],
                    groups.responses[group][i],
                    groups.responses[group][j],
                    id=f"{part.first + number}:{i}:{j}",
                    uncertainty=u,
                    preference=p if math.isfinite(p) else None,
                    deadline=self.deadline,
                    principle="" if groups.principles is None else groups.principles[group],
                )
            )
        part.submission = self.queue.submit(questions)

    # -- when all is known -------------------------------------------------------------------------------------------

    def result(self, epsilon: float) -> GroupScores:
        """Put the verdicts in: p̃ = J where there is one, the head's elsewhere."""
        verdicts = self.queue.verdicts if self.queue is not None else []
        for part in self.parts:
            if part.submission is not None and part.rows:
                part.table.decide(part.rows, [verdicts[slot] for slot in part.submission.slots], epsilon)
        table = PairTable.joined([part.table for part in self.parts])
        overlap = self._overlap()
        seconds = {stage: math.fsum(end - begin for begin, end in spans) for stage, spans in self.spans.items()}
        if verdicts:
            seconds["judge"] = overlap.judge_s
        seconds["total"] = self.clock.now() - self.started
        return GroupScores(
            table,
            seconds,
            self.encoding,
            tally_by_judge(verdicts),
            overlap,
            self.queue.unaccounted if self.queue is not None else 0,
            None if self.kept is None else torch.cat([torch.empty(0, self.head.config.hidden_size), *self.kept]),
            dict(sorted(self.groups.errors.items())),
            self.head_version,
        )

    def _overlap(self) -> Overlap:
        busy = [span for spans in self.spans.values() for span in spans]
        judging = self.queue.spans if self.queue is not None else []
        return Overlap.of(judging, busy, micro_batches=self.micro_batches, why_not=self.why_no_overlap)
